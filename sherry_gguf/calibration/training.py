"""Train one layer's latent weights until the quantized layer gives the full-precision layer's outputs."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sherry_gguf.qat.linear import QuantizedLayer

from . import feedback
from .layers import Layer

NORM_RATE = 0.25  # of the rate, for parameters that are not quantized
WARMUP = 0.05  # share of the steps
LAST = 0.05  # share of the rate that is left in the end


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


@torch.no_grad()
def mean_error(layer: Layer, x: torch.Tensor, wanted: torch.Tensor, floor: float, batch: int, bf16: bool, device: torch.device) -> float:
    """`error` over sequences (n, context, hidden)."""
    total = 0.0
    for i in range(0, len(x), batch):
        with precision(device, bf16):
            found = layer(x[i : i + batch].to(device).float())
        total += float(error(found, wanted[i : i + batch].to(device), floor)) * len(x[i : i + batch])
    return total / len(x)


@torch.no_grad()
def start_from_feedback(layer: Layer, batches: Iterator[torch.Tensor], advance: Callable[[], object]) -> None:
    """Replace the latent weights by those of `feedback.quantize`, with the layer's inputs as they are without quantization in it.

    batches: inputs of the layer, float (batch, context, hidden). The layer's methods must be `full` meanwhile.
    """
    modules = [m for m in layer.module.modules() if isinstance(m, QuantizedLayer)]
    moments: dict[nn.Module, torch.Tensor] = {}

    def note(module, args):
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        with torch.autocast(x.device.type, enabled=False):
            product = x.t() @ x
        moments[module] = moments[module] + product if module in moments else product

    hooks = [m.register_forward_pre_hook(note) for m in modules]
    try:
        for x in batches:
            layer(x)
            advance()
    finally:
        for hook in hooks:
            hook.remove()
    for m in modules:
        if m in moments:  # an expert may have had no tokens
            weight, size = m.rows(m.weight.data), int(m.quant.group_size)
            found = feedback.quantize(weight, moments.pop(m), size)
            m.weight.data = m.rows(feedback.latent(weight.float(), found, size)).contiguous()


def train_layer(layer: Layer, x: torch.Tensor, wanted: torch.Tensor, floor: float, *, rate: float, passes: float, batch: int, bf16: bool,
                device: torch.device, seed: int, advance: Callable[[float], object]) -> None:  # fmt: skip
    """Train in place.

    Args:
        layer: with QuantizedLayers in float32.
        x, wanted: inputs and outputs, (n, context, hidden) in any float dtype and on any device.
        floor: as in `error`.
        rate: highest rate, a share of each matrix's mean magnitude.
        passes: how often each sequence is seen, at least.
        batch: sequences a step.
        bf16: multiply in bfloat16.
        advance: called after each step with its error.
    """
    random = torch.Generator().manual_seed(seed)
    steps = max(1, math.ceil(passes * len(x) / batch))
    optimizer = torch.optim.AdamW(parameter_groups(layer.module, rate), betas=(0.9, 0.95))
    rates = schedule(optimizer, steps)
    order = torch.cat([torch.randperm(len(x), generator=random) for _ in range(math.ceil(steps * batch / len(x)))])
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        with precision(device, bf16):
            found = layer(x[rows].to(device).float())
        loss = error(found, wanted[rows].to(device), floor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rates.step()
        advance(float(loss.detach()))
    optimizer.zero_grad(set_to_none=True)
