"""What FLASH_ATTN_EXT must give, in float64, and how far float32 arithmetic may be from it; and operands to try it with."""

import numpy as np

from sherry_gguf import kernels

U = 2.0**-24  # half a unit in the last place of float32
KEYS = 64  # of attention.h
TINY = 2.0**-100  # exp rounds to 0 below -87


def stored(x, kind):
    """float32 values as a cache holds them."""
    if kind == "f32":
        return x
    if kind == "f16":
        return x.astype(np.float16)
    if kind == "bf16":
        return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
    return kernels.quantize_q8_0(np.ascontiguousarray(x).ravel()).reshape(*x.shape[:-1], x.shape[-1] // 32 * 34)


def values(x):
    """What a cache's bytes stand for, float64."""
    if x.dtype in (np.float16, np.float32):
        return x.astype(np.float64)
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks = np.ascontiguousarray(x).reshape(*x.shape[:-1], -1, 34)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    return (d * blocks[..., 2:].view(np.int8)).reshape(*x.shape[:-1], -1)


def slopes(heads, max_bias):
    """ALiBi's factors (Press et al. 2022), extended to other numbers of heads as llama.cpp does."""
    power = 2 ** int(np.log2(heads))
    h = np.arange(heads)
    exponent = np.where(h < power, (h + 1) / power, (2 * (h - power) + 1) / 2 / power)
    return 2.0 ** (-max_bias * exponent) if max_bias else np.ones(heads)


def repeated(x, streams, heads):
    return np.repeat(np.repeat(x, streams // x.shape[0], axis=0), heads // x.shape[1], axis=1)


def reference(q, k, v, mask=None, sinks=None, scale=1.0, max_bias=0.0, softcap=0.0, parts=1):
    """The exact result in float64, and how far float32 arithmetic may be from it.

    The bound adds what each operation may contribute, to first order: the dot product's sum of k_size terms, the scale, softcap, mask and
    exp; one factor for each chunk of keys that moved the maximum; the sums over all keys. docs/kernels.md derives it.
    """
    streams, heads, tokens, size = q.shape
    keys = k.shape[2]
    k, v, q = repeated(values(k), streams, heads), repeated(values(v), streams, heads), q.astype(np.float64)
    s = scale * np.einsum("shtd,shkd->shtk", q, k)
    error = (size + 3) * U * abs(scale) * np.einsum("shtd,shkd->shtk", abs(q), abs(k))
    if softcap:
        s = softcap * np.tanh(s / softcap)
        error += 12 * U * softcap
    if mask is not None:
        bias = mask[np.arange(streams) % mask.shape[0]][:, np.arange(heads) % mask.shape[1]].astype(np.float64)
        bias *= slopes(heads, max_bias)[:, None, None]
        s = s + bias
        error += np.where(np.isfinite(bias), abs(bias), 0) * (2 * heads + 4) * U * (max_bias > 0)
    error += U * np.where(np.isfinite(s), abs(s), 0)
    if sinks is not None:
        s = np.concatenate([s, np.broadcast_to(sinks.astype(np.float64)[:, None, None], (streams, heads, tokens, 1))], axis=-1)
        error = np.concatenate([error, np.zeros((streams, heads, tokens, 1))], axis=-1)
        v = np.concatenate([v, np.zeros((*v.shape[:2], 1, v.shape[3]))], axis=2)
    most = s.max(-1, keepdims=True)
    most = np.where(np.isfinite(most), most, 0)
    p = np.exp(s - most)
    span = np.where(np.isfinite(s), most - s, 0)
    chunks = keys // KEYS + 1 + parts
    error = error + U * (4 + 4 * chunks + 1.05 * span + span.max(-1, keepdims=True))
    total = p.sum(-1, keepdims=True)
    p /= np.where(total == 0, 1, total)
    exact = np.einsum("shtk,shkd->sthd", p, v)
    bound = np.einsum("shtk,shkd->sthd", p * error, abs(v)) + np.einsum("shtk->sth", p * error)[..., None] * abs(exact)
    bound += (2 * keys + 2 * chunks + 8) * U * np.einsum("shtk,shkd->sthd", p, abs(v)) + TINY
    return exact, 1.01 * bound


def operands(rng, k_kind="f16", v_kind=None, streams=1, heads=4, kv_heads=2, tokens=3, keys=100, size=64, v_size=None, kv_streams=None):
    """q, k, v; keys lie in memory as in llama.cpp's cache, all heads of a key together."""
    kv_streams = kv_streams or streams
    q = rng.standard_normal((streams, tokens, heads, size), np.float32).transpose(0, 2, 1, 3)
    k = stored(rng.standard_normal((kv_streams, keys, kv_heads, size), np.float32), k_kind).transpose(0, 2, 1, 3)
    v = stored(rng.standard_normal((kv_streams, keys, kv_heads, v_size or size), np.float32), v_kind or k_kind).transpose(0, 2, 1, 3)
    return q, k, v


def causal(tokens, keys, window=None):
    """float16 (1, 1, tokens, keys): the last token sees all keys, or the last `window` of them."""
    behind = np.arange(keys - tokens, keys)[:, None] - np.arange(keys)
    return np.where((behind >= 0) & (behind < (window or keys)), 0, -np.inf).astype(np.float16)[None, None]
