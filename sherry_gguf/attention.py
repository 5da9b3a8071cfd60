"""The C kernels of attention (ggml_patch/src/attention.h) on NumPy arrays."""

import operator

import numpy as np

from . import kernels
from .kernels import ffi, lib

_TYPES = {
    np.dtype(np.float16): lib.SHERRY_ATTENTION_F16,
    np.dtype(np.uint16): lib.SHERRY_ATTENTION_BF16,
    np.dtype(np.uint8): lib.SHERRY_ATTENTION_Q8_0,
}


def available() -> list[str]:
    """The instruction sets in `kernels.available()` that have kernels for attention, best first."""
    return [name for name in kernels.available() if kernels.instruction_set(name).attention != ffi.NULL]


MOST_THREADS, MOST_SCRATCH = 512, 1 << 30  # GGML_MAX_N_THREADS


def _between(value, least: int, most: int, what: str) -> int:
    if not least <= (value := operator.index(value)) <= most:
        raise ValueError(f"{value} {what}: must be from {least} to {most}")
    return value


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    max_bias: float = 0.0,
    softcap: float = 0.0,
    isa: str | None = None,
    threads: int = 1,
    scratch: int | None = None,
) -> np.ndarray:
    """softmax(scale * q k^T + mask) v of each head, as ggml's FLASH_ATTN_EXT defines it (ggml_flash_attn_ext in ggml.h).

    Returns float32 (streams, tokens, heads, v_size); rows that see no key are 0.

    q: float32 (streams, heads, tokens, k_size).
    k, v: (kv_streams, kv_heads, keys, row), where a row is k_size or v_size float16, as many uint16 (the bits of bfloat16), or uint8
        (blocks of Q8_0, 34 bytes per 32 values). `streams` is a multiple of kv_streams, `heads` of kv_heads. There may be 0 keys.
    mask: float16 (mask_streams, mask_heads, tokens, keys), repeated for further streams and heads; -inf hides a key.
    sinks: float32 (heads,): a score of each head whose value is 0.
    scale: factor of the products of queries and keys.
    max_bias: ALiBi's, which scales each head's mask; 0 for none.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    isa: an instruction set in `available()`; by default the one that SHERRY_ISA names, else the best.
    threads: number of threads to split the work for; here the parts run one after another.
    scratch: bytes of each thread; by default the size that ggml gives each of two threads.
    Any strides will do, as long as the last axis is contiguous and items (and blocks) are aligned.
    Raises ValueError for other dtypes, shapes and strides, for empty axes, threads or scratch out of range, a missing set, or operands
    that the kernels leave to llama.cpp.
    """
    entry = kernels.instruction_set(isa)
    if entry.attention == ffi.NULL:
        raise ValueError(f"instruction set {ffi.string(entry.name).decode()} has no attention; those that do: {', '.join(available())}")
    threads = _between(threads, 1, MOST_THREADS, "threads")
    q, k, v = (np.asarray(x) for x in (q, k, v))
    mask, sinks = (x if x is None else np.asarray(x) for x in (mask, sinks))
    a = _operands(q, k, v, mask, sinks)
    a.scale, a.max_bias, a.softcap = scale, max_bias, softcap
    out = np.full((a.streams, a.tokens, a.heads, a.v_size), np.nan, np.float32)
    a.dst, a.dst_stride = ffi.cast("char *", out.ctypes.data), out.strides[2]
    scratch = 256 * (2 * a.k_size + 2 * a.v_size + 128) if scratch is None else scratch
    scratch = _between(scratch, 0, MOST_SCRATCH, "bytes of scratch") // 64 * 64
    plan = ffi.new("struct sherry_attention_plan *")
    if not lib.sherry_attention_make_plan(a, threads, scratch, plan):
        raise ValueError(f"head sizes {a.k_size} and {a.v_size} with {scratch} bytes of scratch: llama.cpp's code must do it")
    memory = kernels.aligned(scratch * threads)
    memory[:] = 0xFF  # not a number
    floats = ffi.cast("float *", memory.ctypes.data)
    if plan.tiles:
        for item in reversed(range(plan.items)):
            lib.sherry_attention_tile(entry.attention, a, plan, item, floats)
    for turn in range(plan.rounds):
        for thread in reversed(range(threads)):
            lib.sherry_attention_part(entry.attention, a, plan, turn, thread, floats)
        for thread in range(threads if plan.key_parts > 1 else 0):
            lib.sherry_attention_join(a, plan, turn, thread, floats)
    return out


def _operands(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None, sinks: np.ndarray | None):
    """The operands as C takes them; the caller keeps the arrays alive. Raises ValueError."""
    for name, x in {"q": q, "k": k, "v": v, "the mask": mask}.items():
        if x is not None and (x.ndim != 4 or 0 in x.shape[:2]):
            raise ValueError(f"{name} has the shape {x.shape}, not four axes, the first two of at least 1")
    a = ffi.new("struct sherry_attention *")
    (a.k_type, a.k_size), (a.v_type, a.v_size) = (_row(x) for x in (k, v))
    a.streams, a.heads, a.tokens, size = q.shape
    a.kv_streams, a.kv_heads, a.keys, _ = k.shape
    if a.tokens < 1:
        raise ValueError(f"q has the shape {q.shape}: no tokens")
    if q.dtype != np.float32 or size != a.k_size or v.shape[:3] != k.shape[:3] or a.streams % a.kv_streams or a.heads % a.kv_heads:
        raise ValueError(f"q is {q.dtype} {q.shape}, k {k.shape}, v {v.shape}: they do not belong together")
    if mask is not None and (mask.dtype != np.float16 or mask.shape[2:] != (a.tokens, a.keys)):
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}, not float16 (..., {a.tokens}, {a.keys})")
    if sinks is not None and (sinks.dtype != np.float32 or sinks.shape != (a.heads,)):
        raise ValueError(f"the sinks are {sinks.dtype} {sinks.shape}, not float32 ({a.heads},)")
    a.q, a.k, a.v = _pointer("q", q), _pointer("k", k), _pointer("v", v)
    a.q_stride, a.k_stride, a.v_stride = (_strides(x) for x in (q, k, v))
    a.mask_streams, a.mask_heads = (1, 1) if mask is None else mask.shape[:2]
    if mask is not None:
        a.mask, a.mask_stride = _pointer("the mask", mask), _strides(mask)
    if sinks is not None:
        a.sinks = ffi.cast("float *", _pointer("the sinks", sinks))
    return a


def _row(x: np.ndarray) -> tuple[int, int]:
    """The C type of keys or values and the number of values in a row. Raises ValueError."""
    size, whole = x.shape[-1], x.dtype != np.uint8 or x.shape[-1] % kernels.Q8_0_BYTES == 0
    if x.dtype not in _TYPES or not whole:
        raise ValueError(f"keys or values are {x.dtype} {x.shape}, not float16, uint16, or uint8 with whole blocks of {kernels.Q8_0_BYTES}")
    return _TYPES[x.dtype], size // kernels.Q8_0_BYTES * lib.TQ1_25_QK8_0 if x.dtype == np.uint8 else size


def _pointer(name: str, x: np.ndarray):
    """Where an array begins. Raises ValueError if C cannot read it there."""
    if x.shape[-1] > 1 and x.strides[-1] != x.itemsize:
        raise ValueError(f"{name}: the last axis is not contiguous")
    odd = x.dtype == np.uint8 and any(offset % 2 for offset in (x.ctypes.data, *x.strides[:-1]))  # blocks hold fp16
    if odd or not x.flags.aligned:
        raise ValueError(f"{name}: not aligned in memory, pass a copy")
    return ffi.cast("char *", x.ctypes.data)


def _strides(x: np.ndarray) -> list[int]:
    return [x.strides[2], x.strides[1], x.strides[0]]
