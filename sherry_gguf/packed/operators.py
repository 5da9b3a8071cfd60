"""PyTorch operators on repacked weights, `torch.ops.sherry_gguf`: the product, its gradient and single columns.

The weights are the bytes of a repacked matrix W of `rows` outputs by `columns` inputs, uint8 (bytes,), from `kernels.repack`; `kind` names
their type, TQ1_25, TQ1_25_64 or STQ1_0. On the CPU the C kernels multiply, on `torch.get_num_threads()` threads, and W is never decoded as
a whole. On other devices each product decodes W to the dtype of the activations. All operators raise ValueError for other dtypes and
shapes, and for tensors on different devices.
"""

from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sherry_gguf import kernels, repacked, stq1_0, tq1_25, tq1_25_64
from sherry_gguf.blocks import BlockType

from .decode import decode, round_to_q8_0

KINDS = {kind.name: kind for kind in (tq1_25.TYPE, tq1_25_64.TYPE, stq1_0.TYPE)}

STRIP = 2 << 20  # bytes of W that are decoded at a time. Smaller strips cost time: PyTorch's threads wait for each other after each.


def _by_kernels(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu"


def _kind(weight: torch.Tensor, kind: str, rows: int, columns: int) -> BlockType:
    """The type named `kind`, if the weights fit it."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if weight.dtype != torch.uint8:
        raise ValueError(f"packed weights are {weight.dtype}, not torch.uint8")
    kernels.check_repacked(np.broadcast_to(np.uint8(0), weight.shape), rows, columns, KINDS[kind])  # which only looks at the shape
    return KINDS[kind]


_MATRICES: Any = WeakTensorKeyDictionary()  # what `_matrix` returned for the tensors that are alive: checks take longer than a product


def _matrix(weight: torch.Tensor, kind: str, rows: int, columns: int) -> repacked.Matrix:
    key = weight.data_ptr(), kind, rows, columns
    known = _MATRICES.get(weight)
    if known and known[0] == key:
        return known[1]
    matrix = repacked.Matrix(weight.detach().numpy(), rows, columns, _kind(weight, kind, rows, columns))
    if matrix.data.ctypes.data == key[0]:  # no copy, which later changes would miss
        _MATRICES[weight] = key, matrix
    return matrix


def _check(name: str, x: torch.Tensor, width: int) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        hint = ": use bf16 instead of fp16" if x.dtype == torch.float16 else ""
        raise ValueError(f"{name} is {x.dtype}, not torch.float32 or torch.bfloat16{hint}")
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, the weights need (..., {width})")


def _rows(name: str, x: torch.Tensor, width: int, weight: torch.Tensor) -> torch.Tensor:
    """x (..., width) as (tokens, width)."""
    _check(name, x, width)
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}, the packed weights on {weight.device}: move one to the other's device")
    return x.detach().reshape(x.shape[:-1].numel(), width)


@torch.library.custom_op("sherry_gguf::packed_linear", mutates_args=())
def packed_linear(x: torch.Tensor, weight: torch.Tensor, kind: str, rows: int, columns: int) -> torch.Tensor:
    """x @ W.T with x quantized to Q8_0, as llama.cpp multiplies (`repacked.Matrix.multiply`).

    x: float32 or bfloat16 (..., columns), of any strides. Returns (..., rows) in x's dtype. The gradient of x is
    `packed_linear_transposed`, straight through the rounding of x; the weights have none.
    """
    y = _rows("x", x, columns, weight)
    if _by_kernels(weight):
        product = _matrix(weight, kind, rows, columns).multiply(y.float().numpy(), torch.get_num_threads())
        out = torch.from_numpy(product).to(x.dtype)
    else:
        of = _kind(weight, kind, rows, columns)
        out = round_to_q8_0(y, of).to(x.dtype) @ decode(weight, of, rows, columns).to(x.dtype).t()
    return out.reshape(*x.shape[:-1], rows)


@torch.library.custom_op("sherry_gguf::packed_linear_transposed", mutates_args=())
def packed_linear_transposed(grad: torch.Tensor, weight: torch.Tensor, kind: str, rows: int, columns: int) -> torch.Tensor:
    """grad @ W; on the CPU in float32, with W decoded in strips of columns.

    grad: float32 or bfloat16 (..., rows), of any strides. Returns (..., columns) in grad's dtype.
    """
    g = _rows("grad", grad, rows, weight)
    if not _by_kernels(weight):
        out = g @ decode(weight, _kind(weight, kind, rows, columns), rows, columns).to(grad.dtype)
        return out.reshape(*grad.shape[:-1], columns)
    g, matrix = g.float(), _matrix(weight, kind, rows, columns)
    out = torch.empty(len(g), columns)
    width = max(STRIP // (4 * max(rows, 1)) // matrix.kind.size, 1) * matrix.kind.size
    for first in range(0, columns, width):
        last = min(first + width, columns)
        strip = matrix.decode(first=first, last=last, threads=torch.get_num_threads())
        torch.mm(g, torch.from_numpy(strip), out=out[:, first:last])
    return out.reshape(*grad.shape[:-1], columns).to(grad.dtype)


@torch.library.custom_op("sherry_gguf::packed_columns", mutates_args=())
def packed_columns(weight: torch.Tensor, kind: str, rows: int, columns: int, channels: torch.Tensor) -> torch.Tensor:
    """W[:, channels]: the weights of the input channels, int64 (k,), float32 (rows, k)."""
    if channels.device != weight.device:
        raise ValueError(f"channels are on {channels.device}, the packed weights on {weight.device}: move one to the other's device")
    if _by_kernels(weight):
        return torch.from_numpy(_matrix(weight, kind, rows, columns).columns(channels.detach().numpy()))
    of = _kind(weight, kind, rows, columns)
    blocks = decode(weight, of, rows, columns, channels // of.size).unflatten(-1, (-1, of.size))
    return blocks.gather(2, (channels % of.size).expand(rows, -1)[..., None])[..., 0]


@packed_linear.register_fake
def _(x, weight, kind, rows, columns):
    _check("x", x, columns)
    return x.new_empty((*x.shape[:-1], rows))


@packed_linear_transposed.register_fake
def _(grad, weight, kind, rows, columns):
    _check("grad", grad, rows)
    return grad.new_empty((*grad.shape[:-1], columns))


@packed_columns.register_fake
def _(weight, kind, rows, columns, channels):
    return weight.new_empty((rows, channels.shape[0]), dtype=torch.float32)


def _save(ctx, inputs, output):
    _, weight, *ctx.rest = inputs
    ctx.save_for_backward(weight)


def _gradient(ctx, grad):
    return packed_linear_transposed(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


packed_linear.register_autograd(_gradient, setup_context=_save)
