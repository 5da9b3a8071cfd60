"""Linear layers whose weights stay packed: 1.375 bits each in TQ1_25, 1.5 in TQ1_25_64."""

import numpy as np
import torch
from torch import nn

from sherry_gguf import kernels, tq1_25, tq1_25_64
from sherry_gguf.blocks import BlockType
from sherry_gguf.repacked import Matrix

from . import operators
from .decode import decode
from .frozen import FrozenLinear


def kind_of(inputs: int) -> BlockType:
    """The type whose blocks fit rows of this many weights. Raises ValueError if none does."""
    for kind in tq1_25.TYPE, tq1_25_64.TYPE:
        if inputs % kind.size == 0:
            return kind
    raise ValueError(f"{inputs} inputs: rows must be a multiple of {tq1_25_64.TYPE.size} weights")


class PackedLinear(FrozenLinear):
    """A layer on a repacked matrix: 8-bit activations, and gradients from weights decoded in strips.

    Its buffer `qweight` holds tiles of 64 rows (kernels.repack), uint8 (bytes,). In state dicts it is the plain blocks, uint8 (outputs,
    bytes of a row), as a GGUF has them, so that they mean the same everywhere.

    Attributes:
        lost: the error of the weights, relative to their norm; 0 where they were 3:4 sparse ternary.
    """

    qweight: torch.Tensor
    lost: float = 0.0
    _is_hf_initialized = True  # to transformers: nothing here is drawn at random

    def __init__(self, layer: nn.Linear, kind: BlockType):
        """layer: its shape, dtype and bias; the weight may be on the meta device. Weights come from `put` or a state dict.

        Raises ValueError if the inputs are not whole blocks.
        """
        super().__init__(layer)
        if self.in_features % kind.size:
            raise ValueError(f"{self.in_features} inputs are not a multiple of {kind.size}, a block of {kind.name}")
        if self._zero.is_meta:
            self._zero = torch.zeros((), dtype=layer.weight.dtype)
        self.kind = kind
        size = self.out_features * self._row_bytes
        self.register_buffer("qweight", torch.empty(size, dtype=torch.uint8, device="meta"))

    @property
    def _row_bytes(self) -> int:
        return self.in_features // self.kind.size * self.kind.bytes

    @classmethod
    def from_blocks(cls, layer: nn.Linear, blocks: np.ndarray, kind: BlockType) -> "PackedLinear":
        """A layer with these blocks, uint8 (outputs, bytes of a row). Raises ValueError for another shape."""
        made = cls(layer, kind)
        made.put(blocks)
        return made

    @classmethod
    def quantized(cls, layer: nn.Linear) -> "PackedLinear":
        """A layer with the quantized weights of another. Raises ValueError if they fit no type, or QuantizeError if they are not finite."""
        kind = kind_of(layer.in_features)
        weight = np.ascontiguousarray(layer.weight.detach().float().cpu().numpy())
        blocks = kernels.quantize(weight, kind=kind)
        made, norm = cls.from_blocks(layer, blocks, kind), float(np.linalg.norm(weight))
        made.lost = float(np.linalg.norm(kernels.dequantize(blocks, kind=kind) - weight)) / norm if norm else 0.0
        return made

    def put(self, blocks: np.ndarray, device: torch.device | str | int | None = None) -> None:
        """Repack these blocks, uint8 (outputs, bytes of a row), on a device, by default the one where the layer is.

        Raises ValueError for another dtype or shape, or if a scale is negative or not finite.
        """
        shape = self.out_features, self._row_bytes
        if blocks.dtype != np.uint8 or blocks.shape != shape:
            raise ValueError(
                f"{blocks.dtype} {blocks.shape} instead of uint8 {shape}, {self.kind.name} blocks of {self.in_features} weights"
            )
        d = np.ascontiguousarray(blocks.reshape(-1, self.kind.bytes)[:, -2:]).view("<f2")
        if (bad := ~np.isfinite(d) | np.signbit(d)).any():
            raise ValueError(
                f"a scale of row {bad.argmax() // (shape[1] // self.kind.bytes)} is {d[bad][0]}, which no {self.kind.name} has"
            )
        repacked = torch.from_numpy(kernels.repack(np.ascontiguousarray(blocks), self.kind))
        self.qweight = repacked.to(self._zero.device if device is None else device)

    def blocks(self) -> np.ndarray:
        """The plain blocks, uint8 (outputs, bytes of a row)."""
        return Matrix(self.qweight.cpu().numpy(), self.out_features, self.in_features, self.kind).blocks()

    def dequantized(self) -> nn.Linear:
        """An ordinary layer with the same weights, in the dtype of this one."""
        args = self.out_features, self.in_features
        weight = decode(self.qweight, self.kind, *args)
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return layer.train(self.training)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tiles = destination[f"{prefix}qweight"]
        if tiles.is_meta:
            plain = tiles.new_empty(self.out_features, self._row_bytes)
        else:
            plain = torch.from_numpy(self.blocks()).to(tiles.device)
        destination[f"{prefix}qweight"] = plain

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        state_dict = dict(state_dict)
        key = f"{prefix}qweight"
        if (plain := state_dict.pop(key, None)) is not None:
            try:
                self.put(plain.detach().cpu().numpy())
            except ValueError as e:
                error_msgs.append(f"{key}: {e}")
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != key or plain is None]

    @property
    def _matrix(self) -> tuple[torch.Tensor, str, int, int]:
        return self.qweight, self.kind.name, self.out_features, self.in_features

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return operators.packed_linear(x, *self._matrix)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        return operators.packed_linear_transposed(grad, *self._matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind.name}"
