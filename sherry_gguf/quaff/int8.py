"""int8 weights times int8 activations: Quaff's base, and the methods that it is compared with."""

import torch
from torch import nn

from sherry_gguf.packed.frozen import FrozenLinear

from .scaling import GAMMA, Targeted, TargetedScaling

EXACT = 1024  # products of int8 whose sum float32 holds exactly: 1024 * 127**2 < 2**24
CHUNK = 4 << 20  # bytes of activations that are scaled at a time. Less takes longer: each step on a chunk wakes the threads
LEVELS = 127.0
OUTLIER = 6.0  # of LLM.int8() (Dettmers et al. 2022)
GRANULARITIES = "channel", "tensor"


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) times b (k, n), int8, as int32. Pads with zeros to the sizes that a GPU's kernel needs."""
    if not (a.numel() and b.numel()):
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int32)
    if not a.is_cuda:
        # Without oneDNN, PyTorch's own loop takes 134 ms for 256 x 576 by 576 x 1536, float32 6 ms; with it 1.3 ms (AMD EPYC, Zen 4)
        return torch._int_mm(a, b) if torch.backends.mkldnn.is_available() else float_product(a, b)
    m, n = a.shape[0], b.shape[1]
    rows, inner, columns = max(0, 17 - m), -a.shape[1] % 8, -n % 8
    if rows or inner:
        a = nn.functional.pad(a, (0, inner, 0, rows))
    if inner or columns:
        b = nn.functional.pad(b, (0, columns, 0, inner))
    return torch._int_mm(a, b)[:m, :n]


def float_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same as int8_product, in float32: exact parts, which are added as int32."""
    parts = ((a[:, k : k + EXACT].float(), b[k : k + EXACT].float()) for k in range(0, a.shape[1], EXACT))
    first, second = next(parts)
    out = (first @ second).to(torch.int32)
    for first, second in parts:
        out += (first @ second).to(torch.int32)
    return out


def scaled(product: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """An int32 product as float32 times scales, in the product's own memory: other copies of it cost time, and holes in the heap."""
    return product.view(torch.float32).copy_(product).mul_(scales)


def quantize_weight(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (outputs, inputs) as int8, symmetric, and float32 scales: (outputs, 1), or (1, 1) for the granularity `tensor`.

    Raises ValueError for another granularity and for weights that are not finite.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity {granularity}: must be {' or '.join(GRANULARITIES)}")
    weight = weight.float()
    most = weight.abs().amax(1, keepdim=True) if granularity == "channel" else weight.abs().amax().reshape(1, 1)
    if not bool(torch.isfinite(most).all()):
        raise ValueError("weights are not finite")
    inverse = torch.where(most > 0, LEVELS / most, 0.0)
    return (weight * inverse).round_().to(torch.int8), most / LEVELS


def quantize_rows(x: torch.Tensor, channels: torch.Tensor | None = None, factors: torch.Tensor | None = None,
                  every: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x (tokens, inputs) as int8 with a float32 scale (tokens, 1) for each token. Rows of zeros stay zero.

    channels, factors: these channels (k,) are divided by these factors first. every: all channels are multiplied by these (inputs,).
    """
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((len(x), 1), device=x.device)
    rows = min(max(CHUNK // (4 * max(x.shape[1], 1)), 1), len(x))
    scratch = torch.empty((rows, x.shape[1]), device=x.device)
    for at in range(0, len(x), max(rows, 1)):
        part = x[at : at + rows]
        part = scratch[: len(part)].copy_(part)
        if every is not None:
            part *= every
        if channels is not None and factors is not None and len(channels):
            part[:, channels] /= factors
        most = part.abs().amax(1, keepdim=True)
        q[at : at + rows] = part.mul_(torch.where(most > 0, LEVELS / most, 0.0)).round_()
        scales[at : at + rows] = most / LEVELS
    return q, scales


class Int8Linear(FrozenLinear):
    """Naive int8: one scale for each token, and one for each output channel or for all weights.

    Buffers: qweight int8 (outputs, inputs); scale float32 (outputs, 1) or (1, 1).
    """

    qweight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: nn.Linear, granularity: str = "channel"):
        super().__init__(layer)
        qweight, scale = quantize_weight(self.prepared(layer.weight.detach()), granularity)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)

    def prepared(self, weight: torch.Tensor) -> torch.Tensor:
        """What is stored in int8 instead of `weight` (outputs, inputs)."""
        return weight

    def _apply(self, fn, recurse=True):
        exact = self.scale
        super()._apply(fn, recurse)
        self.scale = exact.to(self.scale.device)  # also after model.bfloat16()
        return self

    def multiply(self, q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """q int8 (tokens, inputs), scales float32 (tokens, 1), times the weights: (tokens, outputs) of `dtype`."""
        return scaled(int8_product(q, self.qweight.t()), scales).mul_(self.scale.t()).to(dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(*quantize_rows(x), x.dtype)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        # the scales of output channels lie on the axis that is summed over: they go into the gradient before it is quantized
        q, scales = quantize_rows(grad, every=self.scale.t())
        return scaled(int8_product(q, self.qweight), scales)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8 per {'tensor' if self.scale.numel() == 1 else 'channel'}"


class QuaffLinear(Targeted, Int8Linear):
    """Quaff. Buffers besides Int8Linear's: outlier_weight (outputs, k) in the model's dtype, and those of `scaling`.

    channels: int64 (k,). maxima: float32 (inputs,), calibration's largest |x|.
    """

    outlier_weight: torch.Tensor

    def __init__(self, layer: nn.Linear, channels: torch.Tensor, maxima: torch.Tensor, granularity: str = "channel", gamma: float = GAMMA):
        super().__init__(layer, granularity)
        channels = channels.to(layer.weight.device)
        self.register_buffer("outlier_weight", layer.weight.detach()[:, channels].clone())
        self.scaling = TargetedScaling(channels, gamma).train(layer.training)
        if len(channels):
            self.scaling.start(maxima[channels.to(maxima.device)], self.outlier_weight.abs().amax(0))

    def outlier_weights(self) -> torch.Tensor:
        return self.outlier_weight

    def scaled_product(self, x: torch.Tensor, channels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return self.multiply(*quantize_rows(x, channels, factors), x.dtype)


class StaticLinear(Int8Linear):
    """SmoothQuant (Xiao et al. 2023), alpha 0.5: all channels are scaled by calibration's maxima, once; W holds the factors."""

    factors: torch.Tensor

    def __init__(self, layer: nn.Linear, maxima: torch.Tensor, granularity: str = "channel"):
        """maxima: float32 (inputs,)."""
        self.maxima = maxima  # for `prepared`
        super().__init__(layer, granularity)
        del self.maxima

    def prepared(self, weight: torch.Tensor) -> torch.Tensor:
        most = weight.float().abs().amax(0)
        factors = (self.maxima.to(most.device) / most).sqrt()
        self.register_buffer("factors", torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0))
        return weight.float() * self.factors

    def _apply(self, fn, recurse=True):
        exact = self.factors
        super()._apply(fn, recurse)
        self.factors = exact.to(self.factors.device)
        return self

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(*quantize_rows(x, every=1 / self.factors), x.dtype)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        return super().transposed_product(grad) / self.factors


class DynamicLinear(FrozenLinear):
    """All channels scaled anew at each step, with the weights in full precision: W is quantized again each time.

    Buffer: qweight (outputs, inputs) in the model's dtype.
    """

    qweight: torch.Tensor

    def __init__(self, layer: nn.Linear, granularity: str = "channel"):
        super().__init__(layer)
        self.granularity = granularity
        quantize_weight(layer.weight.detach()[:1], granularity)  # checks it
        self.register_buffer("qweight", layer.weight.detach().clone())

    def product(self, x: torch.Tensor) -> torch.Tensor:
        factors = (x.abs().amax(0).float() / self.qweight.abs().amax(0).float()).sqrt()
        factors = torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0)
        weight, scale = quantize_weight(self.qweight.float() * factors, self.granularity)
        q, scales = quantize_rows(x, every=1 / factors)
        return scaled(int8_product(q, weight.t()), scales).mul_(scale.t()).to(x.dtype)

    def transposed_product(self, grad: torch.Tensor) -> torch.Tensor:
        weight, scale = quantize_weight(self.qweight, self.granularity)
        q, scales = quantize_rows(grad, every=scale.t())
        return scaled(int8_product(q, weight), scales)


class MixedLinear(Int8Linear):
    """LLM.int8() (Dettmers et al. 2022): channels in which a token exceeds 6.0 are multiplied in floating point."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        channels = (x.abs().amax(0) > OUTLIER).nonzero().reshape(-1)
        if not len(channels):
            return super().product(x)
        q, scales = quantize_rows(x, channels, torch.full((len(channels),), torch.inf, device=x.device))
        y = self.multiply(q, scales, x.dtype)
        return y.addmm_(x[:, channels], (self.qweight[:, channels].float() * self.scale).to(x.dtype).t())
