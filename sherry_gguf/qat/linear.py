"""A linear layer that trains 3:4 sparse ternary weights, and its insertion into a model."""

from __future__ import annotations

import re

import torch
from torch import nn

from .quantizer import sparse_absmean

# What a GGUF keeps unquantized as well: the head, and the routers of a mixture of experts.
KEEP = r"(^|\.)(lm_head|router|gate)$"


class SherryLinear(nn.Linear):
    """`nn.Linear` that multiplies by `sparse_absmean(weight)`; `weight` (out, in) is the latent weight that trains."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, group_size: int = 128, **kwargs):
        if in_features % group_size:
            raise ValueError(f"in_features is {in_features}: it must be a multiple of the group size, {group_size}")
        super().__init__(in_features, out_features, bias, **kwargs)
        self.group_size = group_size

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 128) -> SherryLinear:
        """The same layer, on the very parameters of `linear`."""
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, group_size=group_size, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def quantized_weight(self) -> torch.Tensor:
        """(out, in), the latent weight's dtype: 0 or +-d, what the forward pass multiplies by."""
        return sparse_absmean(self.weight, self.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def prepare(model: nn.Module, group_size: int = 128, keep: str = KEEP) -> list[str]:
    """Turn the linear layers of `model` into `SherryLinear`, in place; the parameters stay the same objects.

    Args:
        model: any module; embeddings are never touched, nor is what `get_output_embeddings()` names.
        group_size: weights along the input that share one scale.
        keep: regular expression; layers whose dotted name it finds stay as they are.

    Returns:
        The names of the layers that were turned.

    Raises:
        ValueError: there are none, or one's in_features are no multiple of `group_size`; nothing is changed then.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    turn = {name: m for name, m in model.named_modules()
            if type(m) is nn.Linear and name and m is not head and not re.search(keep, name)}
    if not turn:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize (kept: {keep!r})")
    for name, m in turn.items():
        if m.in_features % group_size:
            raise ValueError(f"{name} has {m.in_features} input features, no multiple of the group size {group_size}: "
                             "use another group_size, or name the layer in keep")
    for name, m in turn.items():
        model.set_submodule(name, SherryLinear.from_linear(m, group_size))
    return list(turn)
