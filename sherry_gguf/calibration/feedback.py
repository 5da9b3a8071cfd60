"""Quantization with error feedback: GPTQ (Frantar et al., arXiv 2210.17323) with the 32 codes of a group of four.

GPTQ rounds one column after the other, and moves the error to the columns that follow, as the inputs' second moments tell. Here a
step takes four columns and chooses the code whose error is smallest after the rest of the row has made up for it: the choice of the
zero is part of that.
"""

import torch

from sherry_gguf.ternary import GROUP, PATTERNS

DAMPING = 0.01  # of the mean diagonal of the second moments, as in GPTQ
SCALES = (0.8, 0.9, 1.0, 1.1, 1.2)  # tried, as multiples of the kept weights' mean magnitude


@torch.no_grad()
def quantize(weight: torch.Tensor, moments: torch.Tensor, group_size: int) -> torch.Tensor:
    """Weights of 0 and +-d that give nearly the same outputs.

    Args:
        weight: float (out, in).
        moments: float (in, in), the sum of xᵀx over the layer's inputs x.
        group_size: inputs that share a scale, a multiple of 4.

    Returns:
        float32 (out, in), with scales that float16 holds.
    """
    rest, columns = weight.float().clone(), weight.shape[1]
    factor = _factor(moments, rest)
    patterns = torch.tensor(PATTERNS, dtype=torch.float32, device=weight.device)  # (32, 4)
    result = torch.empty_like(rest)
    for begin in range(0, columns, group_size):
        end = begin + group_size
        d = _scale(rest[:, begin:end], factor.diagonal()[begin:end])
        error = torch.empty(len(rest), group_size, device=weight.device)
        for i in range(begin, end, GROUP):
            four = slice(i, i + GROUP)
            codes, chosen = choose(rest[:, four], factor[four, four], patterns, d)
            result[:, four] = d * patterns[codes]
            rest[:, i + GROUP : end] -= chosen @ factor[four, i + GROUP : end]
            error[:, i - begin : i - begin + GROUP] = chosen
        rest[:, end:] -= error @ factor[begin:end, end:]
    return result


def choose(weight: torch.Tensor, factor: torch.Tensor, patterns: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best pattern for four columns of each row.

    Args:
        weight: (out, 4), with the errors of the columns before.
        factor: (4, 4), U: the columns' part of the Cholesky factor.
        patterns: (n, 4), to choose from.
        d: (out, 1), the scales, at least 0.

    Returns:
        The patterns' indices, int64 (out,), and t (out, 4): the error e of the columns is t·U, where t is the error of each after
        those before it have made up for theirs. The best pattern has the smallest |t|².
    """
    inverse = torch.linalg.inv(factor)
    w, p = weight @ inverse, patterns @ inverse  # t = w - d·p
    best = (d * p.square().sum(-1) - 2 * w @ p.t()).argmin(-1)  # |t|² = |w|² + d·(d·|p|² - 2·w·p)
    return best, w - d * p[best]


def _factor(moments: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse second moments. Inputs that never were above 0 lose their weights."""
    h = moments.to(torch.float64, copy=True)
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1
    weight[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    for step in torch.linalg.cholesky, torch.cholesky_inverse:
        h = step(h)  # one name, so that two of these are in memory and not four
    return torch.linalg.cholesky(h, upper=True).to(weight.dtype)


def _scale(weight: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """The scale of each row's group, (out, 1): the best of SCALES for the weighted error without feedback."""
    magnitude = weight.abs()
    lanes = magnitude.view(len(weight), -1, GROUP)
    kept = magnitude.masked_fill((lanes == lanes.amin(-1, keepdim=True)).view(magnitude.shape), 0)
    mean = kept.sum(-1, keepdim=True) / (weight.shape[1] // GROUP * (GROUP - 1))
    best, least = mean, torch.full_like(mean, torch.inf)
    for factor in SCALES:
        d = (mean * factor).half().float()
        error = ((magnitude - d * (kept > 0)) / pivot).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, d, best), torch.minimum(error, least)
    return best


def latent(weight: torch.Tensor, quantized: torch.Tensor, group_size: int, share: float = 0.3) -> torch.Tensor:
    """Latent weights that Sparse-AbsMean quantizes to `quantized`, and whose magnitudes still say how sure each choice is.

    weight, quantized: float (out, in). share: how far a latent weight is from its quantized one, at most, in scales; below 0.5.
    """
    groups = quantized.reshape(-1, group_size)
    d = groups.abs().amax(-1, keepdim=True)
    safe = d.clamp(min=torch.finfo(torch.float32).tiny)
    moved = groups + share * d * torch.tanh((weight.reshape(groups.shape) - groups) / safe)
    kept = groups != 0
    mean = (moved.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return (moved * (d / mean.clamp(min=torch.finfo(torch.float32).tiny))).reshape(weight.shape)
