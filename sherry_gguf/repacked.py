"""A repacked matrix in memory: products with many vectors on several threads, and its weights as floats."""

import math
import operator
from collections.abc import Callable

import numpy as np

from . import kernels, stq1_0, tq1_25
from .blocks import Q8_0, Q8_0_BYTES, BlockType
from .kernels import ffi, lib

TILE = lib.TQ1_25_TILE  # rows
PLACES = [(row >> 3 & 1) << 5 | (row & 1) << 4 | row >> 4 << 2 | row >> 1 & 3 for row in range(TILE)]  # TQ1_25_PLACE of tile.h

_A_THREADS = 2 << 20  # bytes of weights that are worth a thread, if there is one column
_AT_A_TIME = 4 << 20  # bytes of decoded weights, where an instruction set has no kernels for repacked rows


class Matrix:
    """A repacked matrix of `rows` rows of `n` weights. All methods release the GIL while they compute.

    Attributes:
        data: uint8 (bytes,), tiles of 64 rows, then the leftover rows as blocks (tile.h).
        rows, n: its shape.
        kind: the type of the blocks.
    """

    def __init__(self, data: np.ndarray, rows: int, n: int, kind: BlockType = tq1_25.TYPE):
        """Takes the bytes that `kernels.repack` returns, without a copy if they are contiguous and at an even address.

        Raises ValueError for another dtype or shape.
        """
        data, self.rows, self.n = kernels.check_repacked(data, rows, n, kind)
        self.data, self.kind = np.require(data, requirements=["C"]), kind
        if self.data.ctypes.data % 2:  # the scales are fp16
            self.data = self.data.copy()
        self._number, self._x = getattr(lib, f"KIND_{kind.name}"), ffi.from_buffer("uint8_t[]", self.data)

    @classmethod
    def from_blocks(cls, b: np.ndarray, kind: BlockType = tq1_25.TYPE) -> "Matrix":
        """Repack rows of blocks, uint8 (rows, bytes of a row). Raises ValueError for another dtype or shape."""
        b = np.asarray(b)
        return cls(kernels.repack(b, kind), len(b), b.shape[1] // kind.bytes * kind.size, kind)

    def blocks(self) -> np.ndarray:
        """The rows as they were before repacking, uint8 (rows, bytes of a row)."""
        width, whole, parts = self.n // self.kind.size, self.rows // TILE * TILE, self.kind.groups // 8
        out = np.empty((self.rows, width, self.kind.bytes), np.uint8)
        tiles = self.data[: whole * width * self.kind.bytes].reshape(-1, width, TILE * self.kind.bytes)
        # a tile has parts of four bytes of slots and one of signs, each byte in 64 rows; then the scales
        part = tiles[..., : parts * 5 * TILE].reshape(-1, width, parts, 5, TILE).transpose(0, 4, 1, 2, 3)
        slots = part[..., :4].reshape(whole, width, parts * 4)
        if self.kind.nibbles != (parts, 2, 4):  # the order in tiles
            groups = (
                np.stack([slots & 15, slots >> 4], -1).reshape(whole, width, parts, 4, 2).swapaxes(-1, -2).reshape(whole, width, parts * 8)
            )
            slots = groups[..., ::2] | groups[..., 1::2] << 4
        d = np.ascontiguousarray(tiles[..., parts * 5 * TILE :]).view("<u2")[..., PLACES].swapaxes(1, 2)
        out[:whole, :, : parts * 4] = slots
        out[:whole, :, parts * 4 : -2] = part[..., 4].reshape(whole, width, parts)
        out[:whole, :, -2:] = np.ascontiguousarray(d).view(np.uint8).reshape(whole, width, 2)
        out[whole:] = self.data[whole * width * self.kind.bytes :].reshape(-1, width, self.kind.bytes)
        return out.reshape(self.rows, -1)

    def multiply(self, x: np.ndarray, threads: int = 1, isa: str | None = None) -> np.ndarray:
        """The products of all rows with activations, float32 (columns, n), quantized to Q8_0. Returns float32 (columns, rows).

        As in llama.cpp, the number of columns decides between tables, codes, wide tables and panels, and the activations of STQ1_0 are put
        in the order of the groups before they are quantized. A column with a NaN or an infinity gives NaNs.
        isa: an instruction set in `kernels.available()`; by default the one that SHERRY_ISA names, else the best.
        Raises ValueError for a missing set, another dtype or shape, or fewer than one thread.
        """
        entry, threads = kernels.instruction_set(isa), operator.index(threads)
        x = np.asarray(x)
        if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != self.n:
            raise ValueError(f"activations are {x.dtype} {x.shape}, rows of {self.n} weights need float32 (columns, {self.n})")
        if threads < 1:
            raise ValueError(f"{threads} threads: at least 1 is needed")
        repacked, columns = entry.gemv != ffi.NULL, len(x)
        if repacked and columns == 1:
            return self._multiply_one(entry, np.require(x, requirements=["C", "ALIGNED"]), threads)
        q8_0 = self._quantize(x, threads, repacked)
        if repacked:
            product, pieces = self._choose(entry, columns, threads)
            out = product(self.data, self.rows, self.n, q8_0, isa, pieces, self.kind, threads)
        else:
            out = self._multiply_decoded(q8_0)
        with np.errstate(invalid="ignore", over="ignore"):
            bad = ~np.isfinite(x.sum(axis=1))  # Q8_0 has no NaN
        if bad.any():
            out[bad & ~np.isfinite(x).all(axis=1)] = np.nan
        return out

    def _multiply_one(self, entry, x: np.ndarray, threads: int) -> np.ndarray:
        """`multiply` by one column, (1, n), with the least that has to happen: at this size Python takes longer than C."""
        out = np.empty((1, self.rows), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            if not math.isfinite(x.sum()) and not np.isfinite(x).all():  # Q8_0 has no NaN
                out.fill(np.nan)
                return out
        isa, y = ffi.addressof(entry), np.empty(self.n // Q8_0 * Q8_0_BYTES, np.uint8)
        to_x, to_y, to_out = ffi.from_buffer("float[]", x), ffi.from_buffer("tq1_25_q8_0[]", y), ffi.from_buffer("float[]", out)
        if self.kind is stq1_0.TYPE:
            ordered = np.empty_like(x)
            lib.stq1_0_order(to_x, ffi.from_buffer("float[]", ordered), self.n)
            to_x = ffi.from_buffer("float[]", ordered)
        lib.tq1_25_quantize_q8_0(to_x, to_y, self.n)
        table = ffi.from_buffer(kernels.aligned(lib.tq1_25_table_size(isa, self.n)))
        lib.tq1_25_make_table(isa, self.n, 0, self.n, to_y, table)
        ys, tables, outs = ffi.new("tq1_25_q8_0 *[1]", [to_y]), ffi.new("void *[1]", [table]), ffi.new("float *[1]", [to_out])

        def multiply(begin: int, end: int) -> None:
            lib.tq1_25_mul_tables(isa, self._number, self.rows, self.n, self._x, begin, end, 1, ys, tables, outs)

        threads = min(threads, self.data.nbytes // _A_THREADS)
        tiles = -(-self.rows // TILE)
        if threads < 2:
            multiply(0, tiles)
        else:
            kernels.share(_ranges(tiles, 4 * threads), lambda: multiply, threads)
        return out

    @staticmethod
    def _choose(entry, columns: int, threads: int) -> tuple[Callable[..., np.ndarray], int]:
        """The way to multiply, and how many pieces make about four for each thread: of each group of columns, or of all."""
        if columns <= entry.max_tables:
            return kernels.mul_tables, threads
        if columns > entry.max_codes and entry.gemm != ffi.NULL:
            return kernels.mul_panels, threads  # of tile rows, and again of panels
        groups = -(-columns // lib.TQ1_25_CODE_COLUMNS)
        pieces = -(-4 * threads // groups) if threads > 1 else 1
        return kernels.mul_wide if columns > entry.max_codes and entry.wide_rows != ffi.NULL else kernels.mul_codes, pieces

    def _quantize(self, x: np.ndarray, threads: int, repacked: bool) -> np.ndarray:
        x = np.require(x, requirements=["C", "ALIGNED"])
        q8_0 = np.empty((len(x), self.n // Q8_0 * Q8_0_BYTES), np.uint8)

        def quantize(begin: int, end: int) -> None:
            part = x[begin:end]
            if repacked and self.kind is stq1_0.TYPE:
                part = np.empty_like(part)
                lib.stq1_0_order(ffi.from_buffer("float[]", x[begin:end]), ffi.from_buffer("float[]", part), part.size)
            lib.tq1_25_quantize_q8_0(ffi.from_buffer("float[]", part), ffi.from_buffer("tq1_25_q8_0[]", q8_0[begin:end]), part.size)

        kernels.share(_ranges(len(x), threads), lambda: quantize, threads)
        return q8_0

    def _multiply_decoded(self, q8_0: np.ndarray) -> np.ndarray:
        blocks, out = q8_0.reshape(-1, Q8_0_BYTES), np.empty((len(q8_0), self.rows), np.float32)
        with np.errstate(invalid="ignore"):  # scales may not be finite
            y = blocks[:, 2:].view(np.int8) * np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
            for begin, end in _ranges(self.rows, -(-4 * self.rows * self.n // _AT_A_TIME)):
                out[:, begin:end] = y.reshape(len(q8_0), self.n) @ self.decode(begin, end).T
        return out

    def decode(self, begin: int = 0, end: int | None = None, first: int = 0, last: int | None = None, threads: int = 1) -> np.ndarray:
        """Weights first .. last - 1, multiples of the block, of rows begin .. end - 1, by default all: float32 (rows, weights).

        Raises ValueError for other ranges.
        """
        begin, first, end, last = (
            *map(operator.index, (begin, first)),
            *(k if j is None else operator.index(j) for j, k in ((end, self.rows), (last, self.n))),
        )
        if not 0 <= begin <= end <= self.rows:
            raise ValueError(f"rows {begin} to {end} of {self.rows}")
        if not 0 <= first <= last <= self.n or first % self.kind.size or last % self.kind.size:
            raise ValueError(f"weights {first} to {last} of {self.n}: whole blocks of {self.kind.size} are needed")
        out = np.empty((end - begin, last - first), np.float32)

        def decode(start: int, stop: int) -> None:
            to = ffi.from_buffer("float[]", out[start:stop])
            lib.tq1_25_decode_rows(self._number, self.rows, self.n, self._x, begin + start, begin + stop, first, last, to)

        kernels.share(_ranges(len(out) if out.size else 0, threads), lambda: decode, threads)
        return out

    def columns(self, channels: np.ndarray) -> np.ndarray:
        """The weights of these input channels, int64 (k,), in all rows: float32 (rows, k).

        Raises ValueError for another dtype or shape and for channels outside 0 .. n - 1.
        """
        channels = np.asarray(channels)
        if channels.dtype != np.int64 or channels.ndim != 1:
            raise ValueError(f"channels are {channels.dtype} {channels.shape}, not int64 (k,)")
        if outside := channels[(channels < 0) | (channels >= self.n)].tolist():
            raise ValueError(f"channel {outside[0]} of {self.n}")
        out = np.empty((self.rows, len(channels)), np.float32)
        if out.size:
            of = ffi.from_buffer("int64_t[]", np.ascontiguousarray(channels))
            lib.tq1_25_decode_columns(self._number, self.rows, self.n, self._x, len(channels), of, ffi.from_buffer("float[]", out))
        return out


def _ranges(count: int, pieces: int) -> list[tuple[int, int]]:
    """0 .. count in up to `pieces` ranges of about the same length; none is empty."""
    pieces = min(pieces, count)
    return [(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]
