"""The C kernels of attention (ggml_patch/src/attention.h) on NumPy arrays."""

import numpy as np

from . import kernels
from .kernels import ffi, lib

TYPES = {"float16": lib.SHERRY_ATTENTION_F16, "uint16": lib.SHERRY_ATTENTION_BF16, "uint8": lib.SHERRY_ATTENTION_Q8_0}


def available() -> list[str]:
    """The instruction sets in `kernels.available()` that have kernels for attention, best first."""
    return [name for name in kernels.available() if kernels.instruction_set(name).attention != ffi.NULL]


def head_size(x: np.ndarray) -> int:
    """The number of values in a row of keys or values."""
    return x.shape[-1] // kernels.Q8_0_BYTES * lib.TQ1_25_QK8_0 if x.dtype == np.uint8 else x.shape[-1]


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
    """softmax(scale * q k^T + mask) v, as ggml's FLASH_ATTN_EXT computes it. Returns float32 (streams, tokens, heads, v_size).

    q: float32 (streams, heads, tokens, k_size).
    k, v: (kv_streams, kv_heads, keys, row); float16, uint16 (the bits of bfloat16), or uint8 (blocks of Q8_0, 34 bytes per 32 values).
        `streams` is a multiple of kv_streams, `heads` of kv_heads.
    mask: float16 (mask_streams, mask_heads, tokens, keys), repeated for further streams and heads.
    sinks: float32 (heads,): a score of each head whose value is 0.
    max_bias: ALiBi's, which scales each head's mask; 0 for none.
    softcap: scores become softcap * tanh(score / softcap); 0 for none.
    isa: an instruction set in `available()`; by default the one that SHERRY_ISA names, else the best.
    threads: among how many threads to split the work, which run one after the other here.
    scratch: bytes of each thread; by default what ggml gives to two threads.
    Any strides will do, as long as the last axis is contiguous. Raises ValueError for other dtypes and shapes, a missing set, or operands
    that the kernels leave to llama.cpp.
    """
    entry = kernels.instruction_set(isa)
    if entry.attention == ffi.NULL:
        raise ValueError(f"instruction set {ffi.string(entry.name).decode()} has no attention; those that do: {', '.join(available())}")
    a = _operands(q, k, v, mask, sinks)
    a.scale, a.max_bias, a.softcap = scale, max_bias, softcap
    out = np.full((a.streams, a.tokens, a.heads, a.v_size), np.nan, np.float32)
    a.dst, a.dst_stride = ffi.cast("char *", out.ctypes.data), out.strides[2]
    if scratch is None:
        scratch = 256 * (2 * a.k_size + 2 * a.v_size + 128)
    scratch = scratch // 64 * 64
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
    a = ffi.new("struct sherry_attention *")
    a.k_type, a.v_type = (_type_of(x) for x in (k, v))
    a.k_size, a.v_size = head_size(k), head_size(v)
    a.streams, a.heads, a.tokens, size = q.shape
    a.kv_streams, a.kv_heads, a.keys, _ = k.shape
    if q.dtype != np.float32 or size != a.k_size or v.shape[:3] != k.shape[:3] or a.streams % a.kv_streams or a.heads % a.kv_heads:
        raise ValueError(f"q is {q.dtype} {q.shape}, k {k.shape}, v {v.shape}: they do not belong together")
    if mask is not None and (mask.dtype != np.float16 or mask.shape[2:] != (a.tokens, a.keys)):
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}, not float16 (..., {a.tokens}, {a.keys})")
    if sinks is not None and (sinks.dtype != np.float32 or sinks.shape != (a.heads,) or not sinks.flags.c_contiguous):
        raise ValueError(f"the sinks are {sinks.dtype} {sinks.shape}, not contiguous float32 ({a.heads},)")
    a.q, a.k, a.v = (_pointer(x) for x in (q, k, v))
    a.q_stride, a.k_stride, a.v_stride = (_strides(x) for x in (q, k, v))
    a.mask_streams, a.mask_heads = (1, 1) if mask is None else mask.shape[:2]
    if mask is not None:
        a.mask, a.mask_stride = _pointer(mask), _strides(mask)
    if sinks is not None:
        a.sinks = ffi.cast("float *", sinks.ctypes.data)
    return a


def _type_of(x: np.ndarray) -> int:
    if x.dtype.name not in TYPES or x.ndim != 4:
        raise ValueError(f"keys or values are {x.dtype} {x.shape}, not float16, uint16 or uint8 with four axes")
    return TYPES[x.dtype.name]


def _pointer(x: np.ndarray):
    if x.strides[-1] != x.itemsize:
        raise ValueError("the last axis is not contiguous")
    return ffi.cast("char *", x.ctypes.data)


def _strides(x: np.ndarray) -> list[int]:
    return [x.strides[2], x.strides[1], x.strides[0]]
