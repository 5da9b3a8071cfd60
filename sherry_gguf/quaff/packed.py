"""Packed layers whose outlier channels are scaled."""

import torch
from torch import nn

from sherry_gguf.packed import linear, operators

from .scaling import GAMMA, Targeted, TargetedScaling


class PackedLinear(Targeted, linear.PackedLinear):
    """A packed layer whose activations are scaled as Quaff scales them. Its buffers are also those of `scaling`."""

    @classmethod
    def of(cls, layer: nn.Linear, channels: torch.Tensor, maxima: torch.Tensor, gamma: float = GAMMA) -> "PackedLinear":
        """Take over a packed layer, or quantize another, and scale these outlier channels.

        channels: int64 (k,). maxima: the largest |x| of each input, (inputs,).
        Raises ValueError if the inputs fit no type, or QuantizeError if the weights are not finite.
        """
        if isinstance(layer, linear.PackedLinear):
            made = cls(layer, layer.kind)
            made.qweight, made.lost = layer.qweight, layer.lost
        else:
            made = cls.quantized(layer)  # type: ignore[assignment]
        made.scaling = TargetedScaling(channels.to(made.qweight.device), gamma).train(made.training)
        if len(channels):
            made.scaling.start(maxima[channels.to(maxima.device)], made.outlier_weights().abs().amax(0))
        return made

    def outlier_weights(self) -> torch.Tensor:
        return operators.packed_columns(*self._matrix, self.scaling.channels)

    def scaled_product(self, x: torch.Tensor, channels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        if len(channels):
            x = x.clone()
            x[:, channels] /= factors.to(x.dtype)
        return operators.packed_linear(x, *self._matrix)
