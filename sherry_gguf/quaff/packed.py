"""Layers whose weights stay packed: 1.375 bits each in TQ1_25, 1.5 in TQ1_25_64."""

import numpy as np
import torch
from torch import nn

from sherry_gguf import kernels, tq1_25, tq1_25_64
from sherry_gguf.blocks import BlockType

from . import operators
from .linear import FrozenLinear, Targeted
from .scaling import GAMMA, TargetedScaling


def kind_of(inputs: int) -> BlockType:
    """The type whose blocks fit rows of this many weights. Raises ValueError if none does."""
    for kind in tq1_25.TYPE, tq1_25_64.TYPE:
        if inputs % kind.size == 0:
            return kind
    raise ValueError(f"{inputs} inputs: rows must be a multiple of {tq1_25_64.TYPE.size} weights")


class PackedLinear(Targeted, FrozenLinear):
    """A layer on a repacked matrix: 8-bit activations, scaled as Quaff scales them, and gradients from weights decoded in strips.

    Buffers: qweight uint8 (bytes,), tiles of 64 rows (kernels.repack), and those of `scaling`.

    Attributes:
        lost: the error of the weights, relative to their norm; 0 where they were 3:4 sparse ternary.
    """

    qweight: torch.Tensor
    lost: float = 0.0

    def __init__(self, layer: nn.Linear, channels: torch.Tensor, maxima: torch.Tensor, gamma: float = GAMMA):
        """Raises ValueError if the inputs fit no type, or QuantizeError if the weights are not finite."""
        kind = kind_of(layer.in_features)
        weight = np.ascontiguousarray(layer.weight.detach().float().cpu().numpy())
        blocks = kernels.quantize(weight, kind=kind)
        norm = float(np.linalg.norm(weight))
        self._hold(layer, blocks, kind)
        self.lost = float(np.linalg.norm(kernels.dequantize(blocks, kind=kind) - weight)) / norm if norm else 0.0
        self.set_channels(channels, maxima, gamma)

    @classmethod
    def from_blocks(cls, layer: nn.Linear, blocks: np.ndarray, kind: BlockType) -> "PackedLinear":
        """A layer without outlier channels. layer: its shape, dtype and bias; the weight may be on the meta device.

        blocks: uint8 (outputs, bytes of a row). Raises ValueError for another shape.
        """
        made = cls.__new__(cls)
        made._hold(layer, blocks, kind)
        made.set_channels(torch.zeros(0, dtype=torch.int64), torch.zeros(layer.in_features))
        return made

    def _hold(self, layer: nn.Linear, blocks: np.ndarray, kind: BlockType) -> None:
        super().__init__(layer)
        if self._zero.is_meta:
            self._zero = torch.zeros((), dtype=layer.weight.dtype)
        self.kind = kind
        repacked = kernels.repack(blocks, kind)
        kernels.check_repacked(repacked, self.out_features, self.in_features, kind)
        self.register_buffer("qweight", torch.from_numpy(repacked).to(self._zero.device))

    def set_channels(self, channels: torch.Tensor, maxima: torch.Tensor, gamma: float = GAMMA) -> None:
        """Scale these outlier channels, int64 (k,), from now on. maxima: the largest |x| of each input, (inputs,)."""
        self.scaling = TargetedScaling(channels.to(self.qweight.device), gamma).train(self.training)
        if len(channels):
            self.scaling.start(maxima[channels.to(maxima.device)], self.outlier_weights().abs().amax(0))

    @property
    def _matrix(self) -> tuple[torch.Tensor, str, int, int]:
        return self.qweight, self.kind.name, self.out_features, self.in_features

    def outlier_weights(self) -> torch.Tensor:
        return operators.packed_columns(*self._matrix, self.scaling.channels)

    def scaled_product(self, x: torch.Tensor, channels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        if len(channels):
            x = x.clone()
            x[:, channels] /= factors.to(x.dtype)
        return operators.packed_linear(x, *self._matrix)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        return operators.packed_linear_transposed(grad, *self._matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind.name}"
