"""A frozen linear layer whose weights and activations are quantized: what all of them share."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class _Product(torch.autograd.Function):
    """y = layer.product(x), whose gradient is that of x W^T, straight through. Nothing of x is saved."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: "FrozenLinear") -> torch.Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        return ctx.layer.transposed_product(grad.reshape(-1, grad.shape[-1])).to(grad.dtype), None


class NoWeight(torch.Tensor):
    """What `weight` is for a layer without one: peft asks for its shape, dtype and device. Its values are refused."""

    @property
    def data(self):
        raise RuntimeError(
            "a quantized layer has no floating-point weight: an adapter cannot be merged into it, nor made from it. "
            "Merge it into the full-precision model, or keep it beside the quantized one"
        )


class FrozenLinear(nn.Linear):
    """`nn.Linear` with weights that never train, in the subclass's format. peft's adapters wrap it as they wrap nn.Linear.

    `qweight` is the buffer with the quantized weights. `weight` only has a shape: an adapter cannot be merged into it.
    """

    _zero: torch.Tensor

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("_zero", layer.weight.detach().new_zeros(()), persistent=False)
        bias = layer.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
        self.train(layer.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self._zero.expand(self.out_features, self.in_features).as_subclass(NoWeight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, inputs) times the weights, without the bias: (tokens, outputs), of x's dtype."""
        raise NotImplementedError

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        """grad (tokens, outputs) times the transposed weights: (tokens, inputs)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., inputs) to (..., outputs), of x's dtype, or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        shape = *x.shape[:-1], self.out_features
        if not x.numel():
            return x.new_zeros(shape)
        flat = x.reshape(-1, self.in_features)
        y = _Product.apply(flat, self) if flat.requires_grad else self.product(flat)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(shape)
