"""What training does to the weights: effective rank, closeness to a boundary, flips. Shows weight trapping (Sherry, 3.2)."""

import re

import torch
from transformers import TrainerCallback

from sherry_gguf.ternary import GROUP

from .linear import quantized_layers
from .quantizer import scale_size

ROWS = 4096  # look at the activations of at most this many tokens
NEAR = 0.1  # closer to a boundary than this share of the scale counts as near


def effective_rank(x: torch.Tensor) -> float:
    """exp of the entropy of the singular values of x (m, n), normalized to a sum of 1 (Roy and Vetterli, 2007).

    Between 0 (x is zero) and min(m, n). NaN if x is not finite.
    """
    x = x.detach().double()
    if not torch.isfinite(x).all():
        return float("nan")
    # Squaring saves time (on a GPU, four fifths) and loses half of float64's digits, which leaves float32's precision.
    square = x @ x.mT if x.shape[0] < x.shape[1] else x.mT @ x
    s = torch.linalg.eigvalsh(square).clamp_(min=0).sqrt_()
    if not s.sum():
        return 0.0
    p = s / s.sum()
    return torch.exp(torch.special.entr(p).sum()).item()


def near_zeroing(weight: torch.Tensor, scale: torch.Tensor) -> float:
    """Share of groups of four whose two smallest magnitudes differ by less than `NEAR` scales: the zero may move between them.

    weight: (n, size), latent; scale: (n, 1), of each row.
    """
    two = weight.abs().view(len(weight), -1, GROUP).sort(-1).values[..., :2]
    return (two[..., 1] - two[..., 0] < NEAR * scale).float().mean().item()


class TrainingMonitor(TrainerCallback):
    """Looks at one optimizer step in `every`, in the layers' own forward pass, where weights are whole under FSDP too.

    `latest` holds, for SherryTrainer to log, means over the monitored layers in the last step looked at:

        gradient_rank      effective rank of the loss's gradient by the used weight (one micro-batch, this process)
        activation_rank    effective rank of the layers' input (at most `ROWS` tokens of it)
        near_zeroing       share of groups of four near another choice of the zero (only with Sherry)
        near_sign          share of latent weights within `NEAR` scales of 0
        flips              share of weights whose ternary value changed in the optimizer step
        sign_flips         share that went from + to - or back

    Weights are trapped if the ranks fall and few weights are near a boundary or still flip.

    Args:
        every: optimizer steps between two looks, at least 2; each costs two eigenvalue decompositions a layer.
        only: regular expression; looks only at layers whose name it finds.
        layers: looks at no more than this many, evenly spread.
    """

    def __init__(self, every: int = 50, only: str = "", layers: int = 8):
        if every < 2 or layers < 1:
            raise ValueError(f"every is {every} and layers {layers}: they must be at least 2 and 1")
        self.every, self.only, self.layers = every, only, layers
        self.latest: dict[str, float] = {}
        self._looks: dict[str, _Look] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        found = {name: m for name, m in quantized_layers(model).items() if re.search(self.only, name)}
        if not found:
            raise ValueError(f"the model has no quantized layer {self.only!r} to monitor: call prepare(model) first")
        names = list(found)
        n = min(self.layers, len(names))
        self._looks = {names[i * len(names) // n]: _Look() for i in range(n)}
        self._modules = {name: found[name] for name in self._looks}

    def on_step_begin(self, args, state, control, **kwargs):
        for name, look in self._looks.items():
            if state.global_step % self.every == 0:
                look.clear()  # an expert may have seen no token in the second step
            first = state.global_step % self.every == 0 and state.global_step + 1 < state.max_steps
            second = look.before is not None
            self._modules[name].probe = look.first if first else look.second if second else None

    def on_optimizer_step(self, args, state, control, **kwargs):
        for module in self._modules.values():
            module.probe = None
        looks = [look for look in self._looks.values() if look.flips is not None]
        if looks:
            figures = [look.figures | look.flips for look in looks]
            for key in sorted(set().union(*figures)):  # a frozen layer has no gradient
                values = [f[key] for f in figures if key in f]
                self.latest[key] = sum(values) / len(values)
            for look in looks:
                look.clear()

    def on_train_end(self, args, state, control, **kwargs):
        for module in self._modules.values():
            module.probe = None


class _Look:
    """A look at one layer, in two consecutive optimizer steps."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.figures: dict[str, float] = {}
        self.flips: dict[str, float] | None = None
        self.before: torch.Tensor | None = None  # int8 (out, in), the ternary values

    @torch.no_grad()  # gradient checkpointing counts the tensors that are saved for the gradient
    def first(self, layer, x: torch.Tensor, used: torch.Tensor) -> None:
        # The first pass of gradient checkpointing has no gradient.
        if used.requires_grad and "gradient_rank" not in self.figures:
            self.figures["gradient_rank"] = 0.0
            used.register_hook(self._gradient)
        if self.before is not None:
            return
        weight, ternary, scale = _ternary(layer)
        self.before = ternary
        self.figures["activation_rank"] = effective_rank(x.reshape(-1, x.shape[-1])[:ROWS])
        if layer.quant.method == "sherry":
            self.figures["near_zeroing"] = near_zeroing(weight, scale)
        self.figures["near_sign"] = (weight.abs() < NEAR * scale).float().mean().item()

    def _gradient(self, gradient: torch.Tensor) -> None:
        self.figures["gradient_rank"] = effective_rank(gradient)

    @torch.no_grad()
    def second(self, layer, x: torch.Tensor, used: torch.Tensor) -> None:
        if self.flips is None:
            now, before = _ternary(layer)[1], self.before
            assert before is not None  # `first` came first
            self.flips = {"flips": now.ne(before).float().mean().item(), "sign_flips": (now * before < 0).float().mean().item()}


def _ternary(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer's latent weight (n, size), its ternary values int8 (n, size) and scales (n, 1)."""
    latent = layer.rows(layer.weight)
    size = scale_size(latent.shape, layer.quant.granularity, int(layer.quant.group_size))
    quantized = layer.rows(layer.quantized_weight()).reshape(-1, size)
    return latent.reshape(-1, size).float(), quantized.sign().to(torch.int8), quantized.abs().amax(-1, keepdim=True)
