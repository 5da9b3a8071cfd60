"""Targeted momentum scaling: a factor for each outlier channel, which follows the activations slowly."""

import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import nn

from sherry_gguf.training.files import write

GAMMA = 0.1  # of the old factor, in the authors' code


def in_backward() -> bool:
    """Whether autograd runs a backward pass now: then a forward pass is the recomputation of a checkpointed one."""
    return torch._C._current_graph_task_id() != -1


class TargetedScaling(nn.Module):
    """The factors s of a layer's outlier channels. What training changes is in buffers.

    Attributes:
        channels: int64 (k,).
        factors: float32 (k,), at least 1.
        started: bool (), whether training has set the factors.
        gamma: s becomes gamma * s + (1 - gamma) * beta in each training step.
        shared: whether all processes of torch.distributed use the maxima over all of them, and so the same factors. Each of them must
            then run each forward pass of training: experts, which some process may skip, have it off.

    Raises ValueError for a gamma outside 0 to 1.
    """

    channels: torch.Tensor
    factors: torch.Tensor
    started: torch.Tensor

    def __init__(self, channels: torch.Tensor, gamma: float = GAMMA):
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma {gamma}: must be from 0 to 1")
        self.gamma = gamma
        self.shared = True
        self.register_buffer("channels", channels.to(torch.int64))
        self.register_buffer("factors", torch.ones(len(channels), device=channels.device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=channels.device))

    def _apply(self, fn, recurse=True):
        exact = self.factors
        super()._apply(fn, recurse)
        self.factors = exact.to(self.factors.device)  # also after model.bfloat16()
        return self

    @staticmethod
    def wanted(x_max: torch.Tensor, w_max: torch.Tensor) -> torch.Tensor:
        """beta (k,) = max(1, sqrt(max |x| / max |w|)); 1 where weights or activations are 0 or not finite."""
        beta = (x_max.float() / w_max.float()).sqrt()
        return torch.where(torch.isfinite(beta), beta, 1.0).clamp_(min=1.0)

    @torch.no_grad()
    def start(self, x_max: torch.Tensor, w_max: torch.Tensor) -> None:
        """Factors for evaluation before training, from calibration's maxima (k,); the first training step replaces them."""
        self.factors.copy_(self.wanted(x_max.to(self.factors.device), w_max))

    @torch.no_grad()
    def update(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Follow the outlier channels x (tokens, k) in training; in evaluation, and in recomputing a forward pass, nothing happens.

        Padding counts: a layer does not know which tokens it is. weights: (outputs, k).
        """
        if not self.training or not x.numel() or in_backward():
            return
        most = x.detach().abs().amax(0).float()
        if self.shared and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        beta = self.wanted(most, weights.abs().amax(0))
        kept = torch.where(self.started, self.gamma, 0.0)
        self.factors.copy_(kept * self.factors + (1 - kept) * beta)
        self.started.fill_(True)

    def extra_repr(self) -> str:
        return f"channels={len(self.channels)}, gamma={self.gamma}"


class Targeted:
    """A mixin for FrozenLinear: the outlier channels are divided by factors s before rounding, and x' ((s - 1) W) of them is added.

    Attributes:
        scaling: a TargetedScaling.
    """

    scaling: TargetedScaling

    def outlier_weights(self) -> torch.Tensor:
        """W[:, O] (outputs, k), in any floating-point dtype."""
        raise NotImplementedError

    def scaled_product(self, x: torch.Tensor, channels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """x (tokens, inputs), its channels (k,) divided by factors (k,), times the weights."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        channels = self.scaling.channels
        if not len(channels):
            return self.scaled_product(x, channels, self.scaling.factors)
        weights, outliers = self.outlier_weights(), x[:, channels]
        self.scaling.update(outliers, weights)
        factors = self.scaling.factors
        y = self.scaled_product(x, channels, factors)
        rest = ((factors - 1) / factors).to(x.dtype) * outliers  # x' (s - 1)
        return y.addmm_(rest, weights.to(x.dtype).t())


def _scalings(model: Any) -> dict[str, TargetedScaling]:
    """The scalings of a model by the names of their layers, which no adapter changes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = ((name, m) for name, m in base.named_modules() if isinstance(m, TargetedScaling))
    return {name.replace(".base_layer", ""): m for name, m in found}


def save_factors(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the factors of all layers as safetensors, whole or not at all, for `load_factors`. Raises OSError.

    The tensors: LAYER.scaling.channels, int64 (k,); LAYER.scaling.factors, float32 (k,); LAYER.scaling.started, bool ().
    """
    state = {f"{name}.{key}": getattr(m, key) for name, m in _scalings(model).items() for key in ("channels", "factors", "started")}
    write(Path(path), safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}))


@torch.no_grad()
def load_factors(model: nn.Module, path: str | os.PathLike) -> None:
    """Read what `save_factors` wrote. Raises ValueError if the file belongs to another model or calibration; OSError."""
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as e:
        raise ValueError(f"{path}: not a safetensors file: {e}") from e
    scalings = _scalings(model)
    for name, m in scalings.items():
        if not torch.equal(state.get(f"{name}.channels", torch.empty(0)), m.channels.cpu()) or f"{name}.factors" not in state:
            raise ValueError(f"{path}: the outlier channels of {name} differ: the file belongs to another model or calibration")
    for name, m in scalings.items():
        m.factors.copy_(state[f"{name}.factors"])
        m.started.copy_(state[f"{name}.started"])
