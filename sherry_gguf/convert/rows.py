"""Reads a lazy tensor in chunks of rows, so that memory stays near one chunk for each thread."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import gguf_type
from ..errors import ConvertError
from .tensor import Tensor
from .upstream import convert_errors, evaluate, is_cast, upstream

CHUNK = 1 << 22  # weights that a thread handles at a time


def unrounded(tensor: Any) -> Any:
    """The tensor that upstream applied `astype(float16)` to."""
    gguf = gguf_type.register()
    if isinstance(tensor, gguf.LazyChunkedTensor):
        return gguf.LazyChunkedTensor(tensor._chunks, tensor.shape, np.float32)
    return tensor._args[0] if isinstance(tensor, gguf.LazyNumpyTensor) and tensor._data is None else tensor


def _pieces(tensor: Any) -> Iterator[Any]:
    """The pieces of whole rows that a lazy tensor is made of, in order: ranges of a file, lazy tensors or arrays.

    Sees through casts to float32 and through tensors that are joined along the rows. Whatever else upstream did to a tensor is done on
    the whole of it.
    """
    import torch
    from gguf.utility import LocalTensor

    gguf = gguf_type.register()
    if isinstance(tensor, gguf.LazyChunkedTensor):
        for load in tensor._chunks:
            yield load()
    elif not isinstance(tensor, gguf.LazyBase) or tensor._data is not None:
        yield tensor
    elif len(tensor._args) == 1 and isinstance(tensor._args[0], LocalTensor):
        yield tensor._args[0]
    elif is_cast(tensor, torch.float32):
        yield from _pieces(tensor._args[0])
    elif tensor._func in (torch.stack, torch.cat) and len(tensor.shape) > 1 and (*tensor._args[1:], *tensor._kwargs.values()) in ((), (0,)):
        for part in tensor._args[0]:
            yield from _pieces(part)
    else:
        yield tensor


def is_stored(tensor: Any) -> bool:
    """Whether a safetensors file holds a lazy tensor's values as they are."""
    from gguf.utility import LocalTensor

    return all(isinstance(piece, LocalTensor) for piece in _pieces(tensor))


def row_loaders(tensor: Any, width: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """For each chunk of rows, in order: the first row, and a function that loads (rows, width) as float32, or float64 if it is that.

    The functions may run in any thread. They read a tensor that is stored in a file chunk by chunk, without a mapping, whose pages would
    count as memory.
    """
    import torch
    from gguf.utility import LocalTensor

    step = max(1, CHUNK // width)
    row = 0
    for piece in _pieces(tensor):
        if isinstance(piece, LocalTensor):
            rows = math.prod(piece.shape) // width
        else:
            piece = evaluate(piece)
            piece = (torch.from_numpy(piece) if isinstance(piece, np.ndarray) else piece).reshape(-1, width)
            rows = len(piece)
        for start in range(0, rows, step):
            yield row + start, functools.partial(_load_rows, piece, start, min(step, rows - start), width)
        row += rows


def _load_rows(piece: Any, start: int, count: int, width: int) -> np.ndarray:
    import torch

    if isinstance(piece, torch.Tensor):
        return as_floats(piece[start : start + count])
    dtype = upstream().LazyTorchTensor._dtype_str_map[piece.dtype]
    stored = piece.data_range
    row_bytes = width * dtype.itemsize
    data = np.fromfile(stored.filename, np.uint8, count * row_bytes, offset=stored.offset + start * row_bytes)
    return as_floats(torch.from_numpy(data).view(dtype).reshape(count, width))


def as_floats(x: Any) -> np.ndarray:
    """A torch tensor as an array: float64 as it is, any other dtype as float32."""
    import torch

    return (x if x.dtype is torch.float64 else x.to(torch.float32)).numpy()


def computing(t: Tensor):
    """A context in which upstream computes a tensor's values: its errors become ConvertErrors, OSErrors pass."""
    return convert_errors(f"{t.name} ({t.source or 'made by llama.cpp'}): llama.cpp's conversion failed", but=(OSError,))


def load_chunk(load: Callable[[], np.ndarray], t: Tensor) -> np.ndarray:
    """Call a function of `row_loaders`. Raises ConvertError."""
    try:
        return load()
    except (OSError, RuntimeError) as e:
        raise ConvertError(f"cannot read {t.source or t.name}: {e}") from e
