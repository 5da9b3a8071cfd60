"""Train the whole quantized model to give the full-precision model's probabilities.

Both have the same head, so the full-precision model's hidden states before it are all that is needed of that model. They are on the disk.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sherry_gguf.qat.linear import QuantizedLayer, quantized_layers
from sherry_gguf.training.files import undamaged

from .layers import Head
from .training import parameter_groups, precision, schedule

ROWS = 512  # tokens whose logits are computed at a time


class Scaled(nn.Module):
    """A parametrization: a quantized weight whose codes are fixed, and whose scales train.

    Attributes:
        codes: int8 (out, groups, group size) of -1, 0, +1.
        scale: float32 (out, groups).
    """

    codes: torch.Tensor

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        weight = layer.rows(layer.quantized_weight().detach())
        groups = weight.reshape(len(weight), -1, int(layer.quant.group_size))
        self.layer = [layer]  # not a submodule
        self.register_buffer("codes", groups.sign().to(torch.int8), persistent=False)
        self.scale = nn.Parameter(groups.abs().amax(-1))

    def weight(self) -> torch.Tensor:
        layer = self.layer[0]
        return layer.rows((self.codes * self.scale.abs().unsqueeze(-1)).reshape(len(self.codes), -1))


@dataclasses.dataclass
class Distillation:
    """What to distil.

    Attributes:
        steps, batch: of `batch` sequences each.
        rate: as in `training.train_layer`.
        train: `scales` (and norms) or `weights`, all latent weights as well.
        bf16: multiply in bfloat16.
        seed: of the order of the sequences.
        save_every: steps between two saves.
    """

    steps: int
    batch: int
    rate: float
    train: str
    bf16: bool
    seed: int
    save_every: int = 50


def divergence(head: Head, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean KL(full precision, quantized) in nats a token, over the head's tokens.

    found, wanted: hidden states after the norm (batch, context, hidden), of the quantized and the full-precision model.
    """
    total = found.new_zeros((), dtype=torch.float32)
    found, wanted = found.flatten(0, 1), wanted.flatten(0, 1)
    for i in range(0, len(found), ROWS):
        with torch.no_grad():
            target = head(wanted[i : i + ROWS].float()).float().log_softmax(-1)
        mine = head(found[i : i + ROWS]).float().log_softmax(-1)
        total = total + F.kl_div(mine, target, reduction="sum", log_target=True)
    return total / len(found)


@torch.no_grad()
def mean_divergence(model: Any, head: Head, ids: torch.Tensor, states: torch.Tensor, d: Distillation) -> float:
    """`divergence` over sequences of tokens (n, context) and their states (n, context, hidden)."""
    total = 0.0
    for i in range(0, len(ids), d.batch):
        with precision(model.device, d.bf16):
            found = head.hidden(ids[i : i + d.batch].to(model.device))
            total += float(divergence(head, found, states[i : i + d.batch].to(model.device))) * len(ids[i : i + d.batch])
    return total / len(ids)


def distil(model: Any, head: Head, ids: torch.Tensor, states: torch.Tensor, d: Distillation, saved: Path,
           advance: Callable[[int, float], object]) -> None:  # fmt: skip
    """Train in place, continuing what `saved` holds; the file is kept up to date.

    Args:
        model: in float32, after `prepare`; parameters that need no gradient stay.
        head: what comes after its last layer.
        ids, states: tokens (n, context), and the full-precision model's hidden states after its norm, (n, context, hidden).
        saved: a file for parameters and optimizer.
        advance: called with the number of steps that are done, and the last one's divergence.
    """
    fixed: dict[str, Scaled] = {}
    if d.train == "scales":
        for name, m in quantized_layers(model).items():
            fixed[name] = Scaled(m)
            m.weight.requires_grad_(False)
    groups = parameter_groups(model, d.rate)
    for s in fixed.values():
        groups.append({"params": [s.scale], "lr": d.rate * float(s.scale.detach().abs().mean()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rates = schedule(optimizer, d.steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    done = 0
    if saved.exists():
        with undamaged(saved, "remove it to distil from the calibrated layers again"):
            state = torch.load(saved, weights_only=True)
            for p, value in zip(trained, state["trained"], strict=True):
                p.data.copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            rates.load_state_dict(state["rates"])
            done = state["done"]
    advance(done, float("nan"))
    random = torch.Generator().manual_seed(d.seed)
    passes = -(-d.steps * d.batch // len(ids))
    order = torch.cat([torch.randperm(len(ids), generator=random) for _ in range(passes)])
    for step in range(done, d.steps):
        rows = order[step * d.batch : (step + 1) * d.batch]
        with _fixed_codes(fixed), precision(model.device, d.bf16):
            found = head.hidden(ids[rows].to(model.device))
            loss = divergence(head, found, states[rows].to(model.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % d.save_every == 0 or step + 1 == d.steps:
            _save(saved, {"done": step + 1, "trained": [p.detach().cpu() for p in trained], "optimizer": optimizer.state_dict(),
                          "rates": rates.state_dict()})  # fmt: skip
        advance(step + 1, float(loss.detach()))
    for name, m in quantized_layers(model).items():
        if name in fixed:
            m.weight.data = fixed[name].weight().detach().contiguous()
            m.weight.requires_grad_(True)


class _fixed_codes:
    """Within the block, layers multiply by their `Scaled` weights."""

    def __init__(self, fixed: dict[str, Scaled]):
        self.fixed = fixed

    def __enter__(self):
        for s in self.fixed.values():
            s.layer[0].quantized_weight = lambda weight=None, s=s: s.weight()  # type: ignore[method-assign]

    def __exit__(self, *_):
        for s in self.fixed.values():
            del s.layer[0].quantized_weight


def _save(path: Path, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
