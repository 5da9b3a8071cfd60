"""Turns a tensor into the file's bytes, and measures how well they hold its values."""

import collections
import concurrent.futures
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import gguf_type, llama_cpp, ternary, tq1_25_64
from ..blocks import NOT_FINITE
from ..errors import ConvertError, QuantizeError
from .checkpoint import Grouping
from .provenance import Checkpoint
from .rows import computing, is_stored, load_chunk, row_loaders
from .tensor import Tensor, first_bad
from .upstream import evaluate

WORKERS = min(8, os.cpu_count() or 1)  # threads


class _BadRow(Exception):
    def __init__(self, row: int, cause: str):
        self.row, self.cause = row, cause


class Encoder:
    """Encodes tensors chunk by chunk, on the threads of a pool."""

    def __init__(self, grouping: Grouping, pool: concurrent.futures.Executor, checkpoint: Checkpoint):
        from .. import kernels  # which are compiled; other commands do without

        self.grouping, self.pool, self.checkpoint, self.kernels = grouping, pool, checkpoint, kernels

    def chunks(self, t: Tensor) -> Iterator[tuple[int, Any]]:
        """(weights, bytes) of each chunk. After the last one, t's exactness, error and sha256 are known."""
        digest = hashlib.sha256()
        if t.raw:
            data = _bytes(evaluate(t.data))
            digest.update(data)
            yield t.weights, data
        else:
            if not is_stored(t.data):
                sources = self.checkpoint.sources(t.name, t.data)
                t.changed = self.checkpoint.change(sources, lambda: self._in_order(t, lambda row, x: x))
            scale = self._tensor_scales(t)
            for data, n, *found in self._in_order(t, lambda row, x: self._encode(t, row, x, scale)):
                digest.update(data)
                t.add(*found)
                yield n, data
        t.sha256 = digest.digest()

    def _in_order(self, t: Tensor, work: Callable[[int, np.ndarray], Any]) -> Iterator[Any]:
        waiting: collections.deque = collections.deque()
        jobs = row_loaders(t.data, t.shape[-1] if t.shape else 1)

        def run(row: int, load: Callable[[], np.ndarray]) -> Any:
            return work(row, load_chunk(load, t))

        try:
            while True:
                with computing(t):
                    more = list(itertools.islice(jobs, WORKERS + 1 - len(waiting)))
                waiting.extend((row, self.pool.submit(run, row, load)) for row, load in more)
                if not waiting:
                    return
                row, future = waiting.popleft()
                try:
                    yield future.result()
                except _BadRow as e:
                    raise t.bad_row(row + e.row, e.cause) from None
        finally:
            for _, future in waiting:
                future.cancel()

    def _encode(self, t: Tensor, row: int, source: np.ndarray, scale: np.ndarray | None):
        """(bytes, weights, and the arguments of `Tensor.add`) of rows from `row_loaders`."""
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(source, np.float32)
        if (bad := first_bad(x)) is not None:
            raise _BadRow(bad, NOT_FINITE)
        if t.type.name in ("F32", "F16", "BF16"):
            return _bytes(gguf_type.register().quants.quantize(x, t.type)), x.size, 0, 0, 0, 0.0
        if t.kind is None:
            try:
                return _bytes(llama_cpp.ggml().quantize(t.type.name, x)), x.size, 0, 0, 0, 0.0
            except ValueError as e:
                raise ConvertError(f"{t.name} ({t.source}) cannot be stored as {t.type.name}: {e}") from e
        if scale is None and t.group == t.kind.size:
            try:
                data = self.kernels.quantize(x, kind=t.kind)
            except QuantizeError as e:
                raise _BadRow(e.row, e.cause) from None
        else:
            data = _quantize_groups(t, x, None if scale is None else scale[row : row + len(x)])
        exact, vanished, sums = compare(source, self.kernels.dequantize(data, t.kind), t.kind.size)
        blocks = x.size // t.kind.size
        found = blocks, exact, vanished, sums
        if exact == blocks:
            return _bytes(data), x.size, *found
        return _bytes(data), x.size, *found, _is_dense(x, t.kind.size), t.group > tq1_25_64.TYPE.size and self._is_exact_in_64(source)

    def _is_exact_in_64(self, source: np.ndarray) -> bool:
        """Whether TQ1_25_64 holds each value of (rows, n). Weights that are not ternary show it in the first rows."""
        kind = tq1_25_64.TYPE
        for rows in source[: 1 + 4096 // source.shape[-1]], source:
            try:
                data = self.kernels.quantize(np.ascontiguousarray(rows, np.float32), kind=kind)
            except QuantizeError:
                return False
            if not (self.kernels.dequantize(data, kind) == rows).all():
                return False
        return True

    def _tensor_scales(self, t: Tensor) -> np.ndarray | None:
        """per_tensor: each row's scale, which is its matrix's; a stack of experts is many matrices."""
        if t.kind is None or self.grouping.granularity != "per_tensor":
            return None
        whole = self._in_order(t, lambda row, x: x.astype(np.float32))
        rows = [ternary.sparse_absmean(x, x.shape[-1])[1][:, 0] for x in whole]
        return np.concatenate(rows).reshape(-1, t.shape[-2]).mean(axis=1).repeat(t.shape[-2])


def _quantize_groups(t: Tensor, x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    """Blocks that have the scale of a wider group, or with per_tensor the row's entry of `scale`."""
    lanes, d = ternary.sparse_absmean(x, t.group)
    if scale is not None:
        d = scale[:, None]
    with np.errstate(over="ignore"):
        half = d.astype(np.float16)
    if (too_large := np.isinf(half).any(axis=-1)).any():
        raise _BadRow(int(too_large.argmax()), f"a mean magnitude, {d.max():.6g}, is beyond fp16 (65504)")
    assert t.kind
    return t.kind.pack(lanes, np.repeat(half, t.group // t.kind.size, axis=-1))


def _bytes(data: np.ndarray) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def compare(x: np.ndarray, y: np.ndarray, block: int) -> tuple[int, int, np.ndarray]:
    """Compare weights (rows, n), float32 or float64, with their stored values, float32 (rows, n), which are overwritten.

    Returns the number of exact blocks, the number of blocks that became all zero and are not exact, and error², weight², value² and
    weight · value, each summed in float64.
    """
    same = (x == y).reshape(-1, block).all(axis=1)
    weight = _dot(x, x)
    if same.all():
        return same.size, 0, np.array([0.0, weight, weight, weight])
    vanished = ~same & ~y.reshape(-1, block).any(axis=1)
    value, both = _dot(y, y), _dot(x, y)
    error = np.subtract(x, y, out=y if x.dtype == y.dtype else None)
    return int(same.sum()), int(vanished.sum()), np.array([_dot(error, error), weight, value, both])


def _is_dense(x: np.ndarray, block: int) -> bool:
    """Whether each block in the first rows of (rows, n) holds only 0, +d and -d, but some group of four does not have exactly one 0."""
    blocks = np.abs(x[: 1 + 4096 // x.shape[-1]].reshape(-1, block))
    d = blocks.max(axis=1, keepdims=True)
    zeros = (blocks == 0).reshape(-1, ternary.GROUP)
    sparse = (zeros.sum(axis=1) == ternary.GROUP - ternary.KEPT) | zeros.all(axis=1)
    return bool(((blocks == d) | (blocks == 0)).all() and not sparse.all())


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, y, dtype=np.float64))
