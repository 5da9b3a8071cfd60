"""TQ1_25 blocks: 128 weights of a 3:4 sparse ternary row in 22 bytes. The NumPy reference of the C kernels.

A block is 16 bytes of 4-bit slots, 4 bytes of signs and an fp16 scale. Group g (0..31) holds weights 4g..4g+3; its
slot is in byte 4 * (g // 8) + g % 4, the low nibble where g % 8 < 4, else the high one, and its sign is bit g of the
sign word.
"""

from __future__ import annotations

import numpy as np

from . import ternary

NAME = "TQ1_25"
TYPE_ID = 125  # in GGUF and ggml
FILE_TYPE = 125  # general.file_type, LLAMA_FTYPE_MOSTLY_TQ1_25
BLOCK = 128  # weights
BLOCK_BYTES = 22
GROUPS = BLOCK // ternary.GROUP

NOT_FINITE = "a weight is NaN or infinite"
OVERFLOW = "the mean magnitude of a block is beyond fp16 (65504)"

_CHUNK = 1 << 20  # weights handled at a time, so that memory stays bounded


class QuantizeError(ValueError):
    """Weights that TQ1_25 cannot hold at all.

    row: the first such row, counted over all leading axes; cause: NOT_FINITE or OVERFLOW.
    """

    def __init__(self, row: int, cause: str):
        super().__init__(f"row {row}: {cause}")
        self.row = row
        self.cause = cause


def check_weights(x: np.ndarray) -> np.ndarray:
    """x as an array, if `quantize` takes it: float16, float32 or float64, shape (..., n), n a multiple of 128."""
    x = np.asarray(x)
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"weights are {x.dtype}, not float16, float32 or float64")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"weights of shape {x.shape}: rows are not whole blocks of {BLOCK}")
    return x


def check_blocks(b: np.ndarray) -> np.ndarray:
    """b as an array, if it holds whole blocks: uint8, shape (..., nb), nb a multiple of 22."""
    b = np.asarray(b)
    if b.dtype != np.uint8:
        raise ValueError(f"packed rows are {b.dtype}, not uint8")
    if b.ndim == 0 or b.shape[-1] % BLOCK_BYTES:
        raise ValueError(f"packed rows of shape {b.shape} are not whole blocks of {BLOCK_BYTES} bytes")
    return b


def check_activations(n: int, y: np.ndarray) -> np.ndarray:
    """y as a float32 array, if it holds the n activations that a packed row needs."""
    y = np.asarray(y)
    if y.dtype != np.float32:
        raise ValueError(f"activations are {y.dtype}, not float32")
    if y.shape != (n,):
        raise ValueError(f"activations of shape {y.shape}, the packed row needs ({n},)")
    if not np.isfinite(y).all():
        raise ValueError(f"activation {int(np.isfinite(y).argmin())} is NaN or infinite")
    return y


def pack(lanes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Lanes int8 (..., n) of -1, 0, +1 and scales float16 (..., n / 128) to uint8 (..., n / 128 * 22).

    Raises ValueError where a group has not exactly one zero, and for another dtype or shape.
    """
    lanes = np.asarray(lanes)
    if lanes.ndim == 0 or lanes.shape[-1] % BLOCK:
        raise ValueError(f"lanes of shape {lanes.shape}: rows are not whole blocks of {BLOCK}")
    codes = ternary.lanes_to_codes(lanes.reshape(-1, GROUPS, ternary.GROUP))
    d = np.asarray(d)
    if d.dtype != np.float16:
        raise ValueError(f"scales are {d.dtype}, not float16")
    if d.shape != (*lanes.shape[:-1], lanes.shape[-1] // BLOCK):
        raise ValueError(f"scales of shape {d.shape} for lanes of shape {lanes.shape}")
    blocks = np.empty((len(codes), BLOCK_BYTES), np.uint8)
    slots = (codes & 15).reshape(-1, 4, 2, 4)
    blocks[:, :16] = (slots[:, :, 0] | slots[:, :, 1] << 4).reshape(-1, 16)
    blocks[:, 16:20] = np.packbits(codes >> 4, axis=1, bitorder="little")
    blocks[:, 20:] = d.astype("<f2").reshape(-1, 1).view(np.uint8)
    return blocks.reshape(*lanes.shape[:-1], lanes.shape[-1] // BLOCK * BLOCK_BYTES)


def unpack(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (..., nb), nb a multiple of 22, to lanes int8 (..., nb / 22 * 128) and scales float16 (..., nb / 22).

    Any bytes decode. Raises ValueError for another dtype or a length that is no whole number of blocks.
    """
    b = check_blocks(b)
    blocks = b.reshape(-1, BLOCK_BYTES)
    qs = blocks[:, :16].reshape(-1, 4, 1, 4)
    slots = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, GROUPS)
    signs = np.unpackbits(blocks[:, 16:20], axis=1, bitorder="little")
    lanes = ternary.codes_to_lanes(signs << 4 | slots)
    d = np.ascontiguousarray(blocks[:, 20:]).view("<f2")
    n = b.shape[-1] // BLOCK_BYTES
    return lanes.reshape(*b.shape[:-1], n * BLOCK), d.reshape(*b.shape[:-1], n)


def quantize(x: np.ndarray) -> np.ndarray:
    """Sparse-AbsMean of each block (format.md, "Quantizing a block").

    x: float16, float32 or float64 (..., n), n a multiple of 128. Returns uint8 (..., n / 128 * 22).
    Raises QuantizeError, naming the row, for a NaN, an infinity, or a mean magnitude beyond fp16; ValueError for
    another dtype or length.
    """
    x = check_weights(x)
    out = np.empty((*x.shape[:-1], x.shape[-1] // BLOCK * BLOCK_BYTES), np.uint8)
    blocks, packed = x.reshape(-1, BLOCK), out.reshape(-1, BLOCK_BYTES)
    step = _CHUNK // BLOCK
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        bad = ~np.isfinite(chunk).all(axis=1)
        if bad.any():
            raise _error(x, start + int(bad.argmax()), NOT_FINITE)
        lanes, scale = ternary.sparse_absmean(chunk, BLOCK)
        with np.errstate(over="ignore"):
            d = scale.astype(np.float16)
        if np.isinf(d).any():
            raise _error(x, start + int(np.isinf(d).argmax()), OVERFLOW)
        packed[start : start + step] = pack(lanes, d)
    return out


def _error(x: np.ndarray, block: int, cause: str) -> QuantizeError:
    return QuantizeError(block // (x.shape[-1] // BLOCK), cause)


def dequantize(b: np.ndarray) -> np.ndarray:
    """uint8 (..., nb), nb a multiple of 22, to float32 (..., nb / 22 * 128): each weight is its lane times d.

    Raises ValueError for another dtype or a length that is no whole number of blocks.
    """
    b = check_blocks(b)
    out = np.empty((*b.shape[:-1], b.shape[-1] // BLOCK_BYTES * BLOCK), np.float32)
    packed, blocks = b.reshape(-1, BLOCK_BYTES), out.reshape(-1, BLOCK)
    step = _CHUNK // BLOCK
    for start in range(0, len(packed), step):
        lanes, d = unpack(packed[start : start + step])
        with np.errstate(invalid="ignore"):  # a block that is not ours may hold an infinite d
            np.multiply(lanes, d.astype(np.float32), out=blocks[start : start + step])
    return out


def is_exact(x: np.ndarray) -> np.ndarray:
    """Does each block survive? bool (..., n / 128): dequantize(quantize(x)) equals x in all 128 weights.

    The sign of a zero is the one thing that the format does not hold. Takes and raises what `quantize` does, except
    that a block with a NaN, an infinity or too large a mean is not an error here: it is not exact.
    """
    x = check_weights(x)
    exact = np.empty(x.size // BLOCK, bool)
    blocks = x.reshape(-1, BLOCK)
    step = _CHUNK // BLOCK
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step]
        lanes, scale = ternary.sparse_absmean(np.where(np.isfinite(chunk), chunk, 0), BLOCK)
        with np.errstate(over="ignore", invalid="ignore"):
            d = scale.astype(np.float16).astype(np.float64)
            exact[start : start + step] = (lanes * d == chunk).all(axis=1)
    return exact.reshape(*x.shape[:-1], x.shape[-1] // BLOCK)


def vec_dot(b_row: np.ndarray, y: np.ndarray) -> float:
    """The dot product of a packed row, uint8 (nb,), with activations, float32 (nb / 22 * 128,) (format.md).

    The activations go through Q8_0: 32 int8 and an fp16 scale. The integer sums are exact, the rest is float64.
    Raises ValueError for another dtype, a length that is no whole number of blocks, or lengths that differ.
    """
    from gguf import GGMLQuantizationType, quants  # here, since a converting process chooses its gguf package first

    b_row = check_blocks(b_row)
    if b_row.ndim != 1:
        raise ValueError(f"the packed row has shape {b_row.shape}, not one axis")
    lanes, d = unpack(b_row)
    y = check_activations(lanes.size, y)
    if not lanes.size:
        return 0.0  # gguf takes no empty array
    q8_0 = quants.quantize(y, GGMLQuantizationType.Q8_0).reshape(-1, 34)
    return dot_q8_0(lanes, d, q8_0)


def dot_q8_0(lanes: np.ndarray, d: np.ndarray, q8_0: np.ndarray) -> float:
    """Lanes int8 (n,), scales float16 (n / 128,) and Q8_0 blocks uint8 (n / 32, 34) to their dot product, float64."""
    dy = np.ascontiguousarray(q8_0[:, :2]).view("<f2").astype(np.float64).reshape(-1, 4)
    q = q8_0[:, 2:].view(np.int8).reshape(-1, 4, 32)
    sums = np.einsum("bjk,bjk->bj", lanes.reshape(-1, 4, 32), q, dtype=np.int64)
    return float((d.astype(np.float64) * (dy * sums).sum(axis=1)).sum())
