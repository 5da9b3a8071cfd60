"""Sparse-AbsMean on tensors, with a straight-through gradient (Sherry, arXiv 2601.07892, Eq. 4 and 5)."""

from __future__ import annotations

import torch

from sherry_gguf.ternary import GROUP, KEPT

# bfloat16 is left out on purpose: its 8 significant bits cannot hold an fp16 scale.
_DTYPES = (torch.float16, torch.float32, torch.float64)


def sparse_absmean(weight: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """Fake-quantize `weight` to 3:4 sparse ternary; the gradient passes through unchanged.

    In each 4 consecutive inputs the smallest magnitude (the lowest lane among equals) becomes 0; the others become
    +d or -d (negative where < 0), d being the mean magnitude of what is kept among `group_size` inputs, rounded once
    to fp16. The result is bit for bit what `sherry_gguf.ternary.sparse_absmean` gives, so that what evaluation
    computed is what a GGUF stores.

    Args:
        weight: (..., in_features), float16, float32 or float64; in_features a multiple of `group_size`.
        group_size: inputs that share one scale; a multiple of 4.

    Returns:
        A tensor of the same shape, dtype and device. A group that holds NaN or infinity, or whose mean overflows fp16,
        comes out non-finite, so that a training loss shows it; `export` refuses such a model.

    Raises:
        TypeError: another dtype.
        ValueError: `group_size` is no positive multiple of 4, or in_features none of `group_size`.
    """
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight is {weight.dtype}: keep it in float32 (or float16, float64), which hold an fp16 scale")
    if group_size <= 0 or group_size % GROUP:
        raise ValueError(f"group_size is {group_size}: it must be a positive multiple of {GROUP}")
    if weight.ndim == 0 or weight.shape[-1] % group_size:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: the last axis must be a multiple of {group_size}")
    return _SparseAbsMean.apply(weight, group_size)


class _SparseAbsMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, group_size: int) -> torch.Tensor:
        zero = _smallest_lane(weight.abs().reshape(-1, GROUP)).view(-1, group_size)
        rows = weight.reshape(-1, group_size)
        # cumsum, not sum: on the CPU it adds in order, as the reference does. A zeroed lane adds an exact 0.
        total = rows.abs().masked_fill(zero, 0).cumsum(-1, dtype=torch.float64)[:, -1:]
        d = _round_to_half(total / (group_size // GROUP * KEPT)).to(weight.dtype)
        # + 0.0 turns -0.0 into 0.0, which counts as positive
        return torch.copysign(d, rows + 0.0).masked_fill_(zero & d.isfinite(), 0).view(weight.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


def _smallest_lane(magnitude: torch.Tensor) -> torch.Tensor:
    """(n, 4) magnitudes -> (n, 4) bool, True at the smallest of each row, the first among equals.

    Comparisons of whole lanes: twice as fast as argmin and scatter over rows of four.
    """
    m0, m1, m2, m3 = magnitude.unbind(-1)
    second, fourth = m1 < m0, m3 < m2
    upper = torch.minimum(m2, m3) < torch.minimum(m0, m1)
    lane = torch.where(upper, fourth + torch.tensor(2, dtype=torch.int8, device=magnitude.device), second)
    return lane.unsqueeze(-1) == torch.arange(GROUP, dtype=torch.int8, device=magnitude.device)


def _round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float64 >= 0 -> float16 with a single rounding, nearest, ties to even.

    `x.half()` goes through float32 and so rounds twice. Rounding that first step to odd makes the second one right.
    """
    f = x.float()
    rest = x - f.double()
    even = (f.view(torch.int32) & 1) == 0
    toward = torch.where(rest > 0, torch.inf, -torch.inf).to(f.dtype)
    return torch.where((rest != 0) & even, torch.nextafter(f, toward), f).half()
