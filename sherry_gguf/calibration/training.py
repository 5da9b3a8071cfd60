"""Train one layer's latent weights until the quantized layer gives the full-precision layer's outputs."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sherry_gguf.qat.linear import QuantizedLayer, full_precision, quantized_layers

from . import feedback
from .layers import Layer

NORM_RATE = 0.25  # of the rate, for parameters that are not quantized
WARMUP = 0.05  # share of the steps
LAST = 0.05  # share of the rate that is left in the end


def let_train(module: nn.Module, matrices: bool = True) -> None:
    """Let a layer's vectors train, such as norms and biases, and the matrices that are quantized. A router's and those to keep do not."""
    quantized = {id(m.weight) for m in module.modules() if isinstance(m, QuantizedLayer)}
    for p in module.parameters():
        p.requires_grad_(p.ndim < 2 or (matrices and id(p) in quantized))


def parameter_groups(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Groups for AdamW. Each parameter's rate is a share of its mean magnitude: what matters is how soon signs and zeros change."""
    quantized = {id(m.weight) for m in module.modules() if isinstance(m, QuantizedLayer)}
    groups = []
    for p in module.parameters():
        if p.requires_grad:
            scale = float(p.detach().abs().mean()) or 1e-3
            groups.append({"params": [p], "lr": rate * scale * (1 if id(p) in quantized else NORM_RATE), "weight_decay": 0.0})
    return groups


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise, then half a cosine down to LAST."""
    warmup = max(1, round(WARMUP * steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return LAST + (1 - LAST) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def error(found: torch.Tensor, wanted: torch.Tensor, floor: float) -> torch.Tensor:
    """Mean over tokens of |found - wanted|² / |wanted|².

    Without it, a few tokens with a hundred times larger hidden states, such as BOS, would be all that counts. The divisor is at least
    `floor`: otherwise it would be those with the smallest ones.
    """
    difference = (found.float() - wanted.float()).square().sum(-1)
    return (difference / wanted.float().square().sum(-1).clamp(min=floor)).mean()


@torch.no_grad()
def typical(wanted: torch.Tensor) -> float:
    """The median of |wanted|² over the tokens of sequences (n, context, hidden)."""
    return float(torch.cat([x.float().square().sum(-1) for x in wanted.split(16)]).median()) or 1.0


def precision(device: torch.device, bf16: bool) -> Any:
    """The context that products run in."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@dataclasses.dataclass
class Task:
    """A layer, and what it should give.

    Attributes:
        layer: with QuantizedLayers in float32.
        x, wanted: its inputs and outputs, (n, context, hidden) in any float dtype and on any device.
        trained: how many of the n sequences train; the rest is held out.
        batch: sequences in a step.
        bf16: multiply in bfloat16.
        device: where to compute.
    """

    layer: Layer
    x: torch.Tensor
    wanted: torch.Tensor
    trained: int
    batch: int
    bf16: bool
    device: torch.device

    def __post_init__(self):
        self.floor = typical(self.wanted[: self.trained])

    def steps(self, passes: float) -> int:
        """Steps that see each sequence so often, at least."""
        return math.ceil(passes * self.trained / self.batch)

    @torch.no_grad()
    def held_out_error(self) -> float:
        """`error` over the held-out sequences."""
        x, wanted = self.x[self.trained :], self.wanted[self.trained :]
        total = 0.0
        for i in range(0, len(x), self.batch):
            with precision(self.device, self.bf16):
                found = self.layer(x[i : i + self.batch].to(self.device).float())
            total += float(error(found, wanted[i : i + self.batch].to(self.device), self.floor)) * len(x[i : i + self.batch])
        return total / len(x)

    @torch.no_grad()
    def start_from_feedback(self, advance: Callable[[], object]) -> None:
        """Replace the latent weights by those of `feedback.quantize`, whose inputs are those of the layer without quantization in it."""
        modules = list(quantized_layers(self.layer.module).values())
        moments: dict[nn.Module, torch.Tensor] = {}
        owners: dict[nn.Module, nn.Module] = {}  # modules with the same inputs, such as q, k and v, share the moments of one
        seen: list[tuple[torch.Tensor, nn.Module]] = []  # in this forward pass

        def note(module, args):
            owner = owners.setdefault(module, next((other for x, other in seen if x is args[0]), module))
            if owner is not module:
                return
            seen.append((args[0], module))
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            with torch.autocast(x.device.type, enabled=False):
                product = x.t() @ x
            moments[module] = moments[module] + product if module in moments else product

        with contextlib.ExitStack() as stack:
            for m in modules:
                stack.callback(m.register_forward_pre_hook(note).remove)
            stack.enter_context(full_precision(self.layer.module))
            stack.enter_context(precision(self.device, self.bf16))
            for i in range(0, self.trained, self.batch):
                seen.clear()
                self.layer(self.x[i : min(i + self.batch, self.trained)].to(self.device).float())
                advance()
        for m in modules:
            if m in owners:  # an expert may have had no tokens
                weight, size = m.rows(m.weight.data), int(m.quant.group_size)
                found = feedback.quantize(weight, moments[owners[m]], size)
                m.weight.data = m.rows(feedback.latent(weight.float(), found, size)).contiguous()

    @torch.enable_grad()
    def train(self, rate: float, passes: float, seed: int, advance: Callable[[float], object]) -> None:
        """Train the layer in place.

        rate: the highest, a share of each matrix's mean magnitude. passes: how often each sequence is seen. seed: of their order.
        advance: called after each step with its error.
        """
        let_train(self.layer.module)
        random, steps = torch.Generator().manual_seed(seed), self.steps(passes)
        optimizer = torch.optim.AdamW(parameter_groups(self.layer.module, rate), betas=(0.9, 0.95), fused=True)
        rates = schedule(optimizer, steps)
        order = torch.cat([torch.randperm(self.trained, generator=random) for _ in range(math.ceil(passes) + 1)])
        for step in range(steps):
            rows = order[step * self.batch : (step + 1) * self.batch]
            with precision(self.device, self.bf16):
                found = self.layer(self.x[rows].to(self.device).float())
            loss = error(found, self.wanted[rows].to(self.device), self.floor)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rates.step()
            advance(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        self.layer.module.requires_grad_(False)
