"""Block types of 3:4 sparse ternary weights: bytes to lanes and scales, and back. The NumPy reference for the C kernels.

A block holds a 4-bit slot for each group, then a sign bit for each, then an fp16 scale. The types differ in the length of a block;
`stq1_0` also in the weights that form a group, and in the order of the nibbles (docs/format.md).
"""

import dataclasses
import math

import numpy as np

from . import ternary
from .errors import QuantizeError

NOT_FINITE = "a weight is NaN or infinite"
OVERFLOW = "the mean magnitude of a block is beyond fp16 (65504)"
Q8_0 = 32  # activations in a Q8_0 block
Q8_0_BYTES = 2 + Q8_0

_CHUNK = 1 << 20  # weights handled at a time, so that memory stays bounded


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A block type, and the operations on rows of its blocks.

    Attributes:
        name: the type's name in GGUF tools.
        type_id: its number in GGUF and ggml.
        file_type: general.file_type, LLAMA_FTYPE_MOSTLY_*.
        size: weights per block.
        weights: a C-order shape for a block's weights; swapping its last two axes puts them in group order.
        nibbles: the same for the slots, one nibble each, the low nibble of a byte first: from file order to group order.
    """

    name: str
    type_id: int
    file_type: int
    size: int
    weights: tuple[int, ...]
    nibbles: tuple[int, ...]

    @property
    def groups(self) -> int:
        return self.size // ternary.GROUP

    @property
    def bytes(self) -> int:
        """Bytes per block."""
        return self.groups // 2 + self.groups // 8 + 2

    def to_groups(self, x: np.ndarray) -> np.ndarray:
        """Put the weights or activations of whole blocks, (..., n), in group order: four lanes, then the next group's."""
        return _swapped(x, self.weights)

    def from_groups(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_groups`."""
        return _swapped(x, _back(self.weights))

    def check_weights(self, x: np.ndarray) -> np.ndarray:
        """x as an array that `quantize` takes: float16, float32 or float64, shape (..., n), n a multiple of `size`. Raises ValueError."""
        x = np.asarray(x)
        if x.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"weights are {x.dtype}, not float16, float32 or float64")
        if x.ndim == 0 or x.shape[-1] % self.size:
            raise ValueError(f"weights of shape {x.shape}: rows are not a multiple of {self.size}")
        return x

    def check_blocks(self, b: np.ndarray) -> np.ndarray:
        """b as an array of whole blocks: uint8, shape (..., nb), nb a multiple of `bytes`. Raises ValueError."""
        b = np.asarray(b)
        if b.dtype != np.uint8:
            raise ValueError(f"packed rows are {b.dtype}, not uint8")
        if b.ndim == 0 or b.shape[-1] % self.bytes:
            raise ValueError(f"packed rows of shape {b.shape} are not a multiple of {self.bytes} bytes")
        return b

    def check_row(self, b_row: np.ndarray) -> np.ndarray:
        """`check_blocks` of a single row, which has one axis."""
        if (b_row := self.check_blocks(b_row)).ndim != 1:
            raise ValueError(f"the packed row has shape {b_row.shape}, not one axis")
        return b_row

    def pack(self, lanes: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Lanes int8 (..., n) of -1, 0, +1 and scales float16 (..., n / size) to uint8 (..., n / size * bytes).

        Raises ValueError unless every group has exactly one zero, and for another dtype or shape.
        """
        lanes = np.asarray(lanes)
        if lanes.ndim == 0 or lanes.shape[-1] % self.size:
            raise ValueError(f"lanes of shape {lanes.shape}: rows are not a multiple of {self.size}")
        codes = ternary.lanes_to_codes(self.to_groups(lanes).reshape(-1, self.groups, ternary.GROUP))
        d = np.asarray(d)
        if d.dtype != np.float16:
            raise ValueError(f"scales are {d.dtype}, not float16")
        if d.shape != (*lanes.shape[:-1], lanes.shape[-1] // self.size):
            raise ValueError(f"scales of shape {d.shape} for lanes of shape {lanes.shape}")
        blocks = np.empty((len(codes), self.bytes), np.uint8)
        signs = self.groups // 2
        slots = _swapped(codes & 15, self.nibbles)
        blocks[:, :signs] = slots[:, ::2] | slots[:, 1::2] << 4
        blocks[:, signs:-2] = np.packbits(codes >> 4, axis=1, bitorder="little")
        blocks[:, -2:] = d.astype("<f2").reshape(-1, 1).view(np.uint8)
        return blocks.reshape(*lanes.shape[:-1], lanes.shape[-1] // self.size * self.bytes)

    def unpack(self, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (..., nb), nb a multiple of `bytes`, to lanes int8 (..., nb / bytes * size) and scales float16 (..., nb / bytes).

        Any bytes decode. Raises ValueError for another dtype or length.
        """
        b = self.check_blocks(b)
        blocks = b.reshape(-1, self.bytes)
        signs = self.groups // 2
        slots = np.empty((len(blocks), self.groups), np.uint8)
        slots[:, ::2], slots[:, 1::2] = blocks[:, :signs] & 15, blocks[:, :signs] >> 4
        codes = _swapped(slots, _back(self.nibbles))
        codes |= np.unpackbits(blocks[:, signs:-2], axis=1, bitorder="little") << 4
        lanes = self.from_groups(ternary.codes_to_lanes(codes).reshape(len(blocks), self.size))
        d = np.ascontiguousarray(blocks[:, -2:]).view("<f2")
        n = b.shape[-1] // self.bytes
        return lanes.reshape(*b.shape[:-1], n * self.size), d.reshape(*b.shape[:-1], n)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Sparse-AbsMean of each block (docs/format.md, "Quantizing a block").

        x: float16, float32 or float64 (..., n), n a multiple of `size`. Returns uint8 (..., n / size * bytes).
        Raises QuantizeError, which has the row, for a NaN, an infinity, or a mean magnitude beyond fp16; ValueError for
        another dtype or length.
        """
        x = self.check_weights(x)
        out = np.empty((*x.shape[:-1], x.shape[-1] // self.size * self.bytes), np.uint8)
        blocks, packed = x.reshape(-1, self.size), out.reshape(-1, self.bytes)
        step = _CHUNK // self.size
        for start in range(0, len(blocks), step):
            chunk = blocks[start : start + step]
            bad = ~np.isfinite(chunk).all(axis=1)
            if bad.any():
                raise self._error(x, start + int(bad.argmax()), NOT_FINITE)
            lanes, scale = ternary.sparse_absmean(self.to_groups(chunk), self.size)
            with np.errstate(over="ignore"):
                d = scale.astype(np.float16)
            if np.isinf(d).any():
                raise self._error(x, start + int(np.isinf(d).argmax()), OVERFLOW)
            packed[start : start + step] = self.pack(self.from_groups(lanes), d)
        return out

    def _error(self, x: np.ndarray, block: int, cause: str) -> QuantizeError:
        return QuantizeError(block // (x.shape[-1] // self.size), cause)

    def dequantize(self, b: np.ndarray) -> np.ndarray:
        """uint8 (..., nb), nb a multiple of `bytes`, to float32 (..., nb / bytes * size): each weight is its lane times d.

        Raises ValueError for another dtype or length.
        """
        b = self.check_blocks(b)
        out = np.empty((*b.shape[:-1], b.shape[-1] // self.bytes * self.size), np.float32)
        packed, blocks = b.reshape(-1, self.bytes), out.reshape(-1, self.size)
        step = _CHUNK // self.size
        for start in range(0, len(packed), step):
            lanes, d = self.unpack(packed[start : start + step])
            with np.errstate(invalid="ignore"):  # damaged blocks may have an infinite d
                np.multiply(lanes, d.astype(np.float32), out=blocks[start : start + step])
        return out

    def is_exact(self, x: np.ndarray) -> np.ndarray:
        """Whether dequantize(quantize(x)) equals x in all weights of each block: bool (..., n / size).

        -0 equals 0 here; the format has no signed zeros. Takes what `quantize` takes. A block with a NaN, an infinity or too large a mean
        is not exact. Raises ValueError for another dtype or length.
        """
        x = self.check_weights(x)
        exact = np.empty(x.size // self.size, bool)
        blocks = x.reshape(-1, self.size)
        step = _CHUNK // self.size
        for start in range(0, len(blocks), step):
            chunk = self.to_groups(blocks[start : start + step])
            lanes, scale = ternary.sparse_absmean(np.where(np.isfinite(chunk), chunk, 0), self.size)
            with np.errstate(over="ignore", invalid="ignore"):
                d = scale.astype(np.float16).astype(np.float64)
                exact[start : start + step] = (lanes * d == chunk).all(axis=1)
        return exact.reshape(*x.shape[:-1], x.shape[-1] // self.size)

    def check_activations(self, b_row: np.ndarray, y: np.ndarray) -> np.ndarray:
        """y as a float32 array of the activations for a packed row, uint8 (nb,). Raises ValueError."""
        n = b_row.size // self.bytes * self.size
        y = np.asarray(y)
        if y.dtype != np.float32:
            raise ValueError(f"activations are {y.dtype}, not float32")
        if y.shape != (n,):
            raise ValueError(f"activations of shape {y.shape}, the packed row needs ({n},)")
        if not np.isfinite(y).all():
            raise ValueError(f"activation {int(np.isfinite(y).argmin())} is NaN or infinite")
        return y

    def vec_dot(self, b_row: np.ndarray, y: np.ndarray) -> float:
        """The dot product of a packed row, uint8 (nb,), and activations, float32 (nb / bytes * size,) (docs/format.md).

        The activations are first quantized to Q8_0: 32 int8 and an fp16 scale. Integer sums are exact, the rest is float64.
        Raises ValueError for another dtype, for lengths that differ, and for a length that is not a multiple of `bytes`.
        """
        from gguf import GGMLQuantizationType, quants  # late: a converting process first chooses its gguf package

        b_row = self.check_row(b_row)
        lanes, d = self.unpack(b_row)
        y = self.check_activations(b_row, y)
        if not lanes.size:
            return 0.0  # gguf refuses empty arrays
        return dot_q8_0(lanes, d, quants.quantize(y, GGMLQuantizationType.Q8_0).reshape(-1, Q8_0_BYTES))


def dot_q8_0(lanes: np.ndarray, d: np.ndarray, q8_0: np.ndarray) -> float:
    """The dot product, in float64, of lanes int8 (n,), scales float16 (blocks,) and Q8_0 blocks uint8 (n / 32, 34)."""
    dy = np.ascontiguousarray(q8_0[:, :2]).view("<f2").astype(np.float64).reshape(len(d), -1)
    q = q8_0[:, 2:].view(np.int8)
    sums = np.einsum("jk,jk->j", lanes.reshape(-1, Q8_0), q, dtype=np.int64).reshape(dy.shape)
    return float((d.astype(np.float64) * (dy * sums).sum(axis=1)).sum())


def _swapped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """x (..., n) with each piece of n viewed in `shape` and its last two axes swapped; unchanged if `shape` has one axis."""
    if len(shape) == 1:
        return x
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], x.shape[-1] // math.prod(shape), *shape).swapaxes(-1, -2)).reshape(x.shape)


def _back(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 1 else (*shape[:-2], shape[-1], shape[-2])
