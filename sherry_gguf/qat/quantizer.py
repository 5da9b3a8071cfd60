"""Fake quantization of weights with a straight-through gradient: Sparse-AbsMean, and other methods for comparison."""

from typing import Any

import torch

from sherry_gguf.ternary import GROUP, KEPT

GRANULARITIES = ("per_group", "per_channel", "per_tensor")
GROUP_SIZE = 128  # weights of a TQ1_25 block, which stores such groups without loss
SMALL_GROUP_SIZE = 64  # and of a TQ1_25_64 block
GROUP_SIZES = (GROUP_SIZE, SMALL_GROUP_SIZE)
TWN_THRESHOLD = 0.7  # of the mean magnitude
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as many bytes as a float
_CHUNK = 1 << 22  # weights per step of a sum in order


def fake_quantize(weight: torch.Tensor, method: str = "sherry", granularity: str = "per_group", group_size: int = GROUP_SIZE,
                  residual: float = 0.0, rescale: bool = False) -> torch.Tensor:  # fmt: skip
    """T*a of `weight`, by a method of `METHODS`, plus `residual` times the weight itself (Sherry, Eq. 7).

    X·(T*a + λ·W) is X·T*a + λ·X·W with one product instead of two. The gradient is straight-through: T*a counts as the
    identity, so it is the gradient of the result times 1 + λ.

    Every scale is rounded to fp16 once, so that a GGUF stores what was computed. With bfloat16 weights it is rounded further,
    to bfloat16's 8 significant bits, which fp16 holds as well.

    Args:
        weight: (out_features, in_features) in bfloat16, float16, float32 or float64.
        method: `sherry` (Sparse-AbsMean), `absmean` (BitNet b1.58), `twn`, `binary`, or `full` (the weight as it is).
        granularity: which weights share a scale: `per_group` of `group_size` inputs, `per_channel` (a row), `per_tensor`.
        group_size: group size of per_group.
        residual: λ of Arenas; 0 in evaluation.
        rescale: divide by 1 + λ, so that the residual does not change the magnitude of the result.

    Returns:
        A tensor of the same shape, dtype and device. If weights that share a scale include NaN or infinity, or if the scale
        overflows fp16, all of them but zeros become NaN or infinite. The training loss shows it, and `export` refuses the model.

    Raises:
        TypeError: another dtype.
        ValueError: an unknown method or granularity, or in_features do not fit it.
    """
    check(tuple(weight.shape), method, granularity, group_size)
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight is {weight.dtype}: it must be one of {', '.join(map(str, _DTYPES))}")
    if method == "full":
        return weight
    return _StraightThrough.apply(weight, method, scale_size(weight.shape, granularity, group_size), residual, rescale)


def check(shape: tuple[int, ...], method: str, granularity: str, group_size: int) -> None:
    """Raises ValueError if `fake_quantize` cannot quantize a weight of this shape."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(METHODS)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: it must be one of {', '.join(GRANULARITIES)}")
    if method == "full":
        return
    if granularity == "per_group" and (not isinstance(group_size, int) or group_size <= 0 or group_size % GROUP):
        raise ValueError(
            f"group_size is {group_size!r}: it must be a positive multiple of {GROUP}, or 'auto' for --group_size and QuantConfig"
        )
    multiple = divisor(method, granularity, group_size)
    if len(shape) == 0 or shape[-1] % multiple:
        raise ValueError(
            f"a weight has shape {shape}: {method} {granularity} needs inputs (the last axis) that are a multiple of {multiple}"
        )


def divisor(method: str, granularity: str, group_size: int) -> int:
    """The number that a layer's inputs must be a multiple of."""
    if method == "full":
        return 1
    return group_size if granularity == "per_group" else GROUP if method == "sherry" else 1


def scale_size(shape: tuple[int, ...], granularity: str, group_size: int) -> int:
    """The number of weights that share one scale."""
    if granularity == "per_group":
        return group_size
    return shape[-1] if granularity == "per_channel" else torch.Size(shape).numel()


def sparse_absmean(weight: torch.Tensor, group_size: int = GROUP_SIZE, granularity: str = "per_group") -> torch.Tensor:
    """Fake-quantize `weight` to 3:4 sparse ternary (Sherry, arXiv 2601.07892, Eq. 4 and 5), straight-through.

    Of each 4 consecutive inputs the one with the smallest magnitude (the lowest lane among equals) becomes 0; the others become
    +d, or -d if they are negative. d is the mean magnitude of the kept weights that share the scale. The result equals
    `sherry_gguf.ternary.sparse_absmean` bit for bit if its scale is rounded to fp16. Arguments, result and errors are those of
    `fake_quantize`.
    """
    return fake_quantize(weight, "sherry", granularity, group_size)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, method: str, size: int, residual: float, rescale: bool) -> torch.Tensor:
        ctx.factor = 1.0 if rescale else 1.0 + residual
        quantized = _quantize(weight, method, size)
        if residual:
            quantized.add_(weight, alpha=residual)
            if rescale:
                quantized.div_(1.0 + residual)
        return quantized

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return (grad if ctx.factor == 1 else grad * ctx.factor), None, None, None, None


def _quantize(weight: torch.Tensor, method: str, size: int) -> torch.Tensor:
    rows = weight.reshape(-1, size).contiguous()  # reshape may return a transposed weight unchanged
    if rows.dtype == torch.bfloat16:
        rows = rows.float()
    zero, d = METHODS[method](rows.abs())
    d = _round_to_half(d).to(weight.dtype).to(rows.dtype)
    # + 0.0 turns -0.0 into 0.0, which counts as positive
    quantized = torch.copysign(d, rows + 0.0)
    if zero is not None:
        # masked_fill_(zero, 0), 4 times as fast on a CPU; a product of floats would give -0.0 and NaN
        quantized.view(_INTEGERS[quantized.element_size()]).mul_(zero.logical_not_())
    return quantized.to(weight.dtype).view(weight.shape)


# A method takes magnitudes (n, size) and returns which of them become 0, bool (n, size) or None, and the scale, float64 (n, 1).


def _sherry(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lanes = magnitude.view(-1, GROUP)
    smallest = lanes.amin(-1, keepdim=True)
    count = magnitude.shape[-1] // GROUP * KEPT
    total = magnitude.sum(-1, keepdim=True, dtype=torch.float64)
    total -= smallest.view(len(magnitude), -1).sum(-1, keepdim=True, dtype=torch.float64)
    mean = total / count
    if magnitude.device.type != "cpu":  # the checks below would make a GPU wait; export quantizes on the CPU
        return smallest_lane(lanes).view(magnitude.shape), mean
    zero = lanes == smallest
    if zero.count_nonzero() != len(lanes):  # equal magnitudes, or NaN
        zero = smallest_lane(lanes)
    zero = zero.view(magnitude.shape)
    # The reference adds in order, which is slow here. Any order gives the same fp16 number, unless the mean is very close to a
    # rounding boundary.
    margin = mean * (4 * magnitude.shape[-1] * torch.finfo(torch.float64).eps)
    unsure = (_round_to_half(mean - margin) != _round_to_half(mean + margin)) & mean.isfinite()
    if unsure.any():
        i = unsure.squeeze(-1).nonzero().squeeze(-1)
        mean[i] = _sum_in_order(magnitude[i].masked_fill_(zero[i], 0)) / count
    return zero, mean


def _absmean(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BitNet b1.58 (arXiv 2402.17764, Eq. 1 to 3): round(w / mean) clipped to -1..1, times the mean."""
    mean = magnitude.mean(-1, keepdim=True, dtype=torch.float64)
    return magnitude <= (mean / 2).to(magnitude.dtype), mean


def _twn(magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary weight networks (arXiv 1605.04711): 0 below 0.7 of the mean, the mean of the others."""
    zero = magnitude <= TWN_THRESHOLD * magnitude.mean(-1, keepdim=True)
    kept = (~zero).sum(-1, keepdim=True).clamp_(min=1)
    return zero, magnitude.masked_fill(zero, 0).sum(-1, keepdim=True, dtype=torch.float64) / kept


def _binary(magnitude: torch.Tensor) -> tuple[None, torch.Tensor]:
    """Binary weights (XNOR-Net, arXiv 1603.05279, Eq. 6): the sign times the mean."""
    return None, magnitude.mean(-1, keepdim=True, dtype=torch.float64)


METHODS: dict[str, Any] = {"sherry": _sherry, "absmean": _absmean, "twn": _twn, "binary": _binary, "full": None}


def smallest_lane(magnitude: torch.Tensor) -> torch.Tensor:
    """(n, 4) magnitudes -> (n, 4) bool, True at the smallest of each row, the first among equals.

    Comparing whole lanes is twice as fast as argmin and scatter over rows of four. A tensor made from a number would be copied to a
    GPU while both wait, so there is none.
    """
    m0, m1, m2, m3 = magnitude.unbind(-1)
    second, fourth = m1 < m0, m3 < m2
    upper = torch.minimum(m2, m3) < torch.minimum(m0, m1)
    lane = torch.where(upper, fourth.view(torch.int8) + 2, second.view(torch.int8))
    return lane.unsqueeze(-1) == torch.arange(GROUP, dtype=torch.int8, device=magnitude.device)


def _sum_in_order(x: torch.Tensor) -> torch.Tensor:
    """(n, size) -> float64 (n, 1). On the CPU cumsum adds in order."""
    total = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
    for part in x.split(max(1, _CHUNK // len(x)), dim=-1):
        total = torch.cat([total, part.double()], dim=-1).cumsum(-1)[:, -1:]
    return total


def _round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float64 >= 0 -> float16 in a single rounding, to nearest, ties to even.

    `x.half()` goes through float32 and so rounds twice. Rounding to odd in the first step makes the second one right.
    """
    f = x.float()
    rest = x - f.double()
    even = (f.view(torch.int32) & 1) == 0
    toward = torch.where(rest > 0, torch.inf, -torch.inf).to(f.dtype)
    return torch.where((rest != 0) & even, torch.nextafter(f, toward), f).half()
