"""Train the whole quantized model to give the full-precision model's probabilities.

Both have the same head, so the full-precision model's hidden states before it are all that is needed of that model. They are on the disk.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sherry_gguf.errors import Stop
from sherry_gguf.qat.linear import QuantizedLayer, quantized_layers
from sherry_gguf.training.files import replacing, undamaged

from .layers import Head, find
from .training import parameter_groups, precision, schedule

LOGITS = 1 << 22  # how many are computed at a time: what the caches of a CPU hold; twice as fast as 1 << 25
MOST = 1 << 15  # tokens of the text that count: the frequent ones, nearly all of it. Half of the others occur once or twice
LIKELY = 32  # tokens that count besides those of the text: so many of the full-precision model's likeliest at each place


class Diverged(Stop):
    """The distillation made the model worse, or its divergence is not a finite number."""


class Scaled(nn.Module):
    """A quantized weight whose codes are fixed, and whose scales train. It replaces the layer's latent weight.

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
        self.scale = nn.Parameter(groups.abs().amax(-1).float())
        layer.weight.data = layer.weight.data.new_empty(0)
        layer.quantized_weight = lambda weight=None: self.weight()  # type: ignore[method-assign]

    def weight(self) -> torch.Tensor:
        layer = self.layer[0]
        return layer.rows((self.codes * self.scale.abs().unsqueeze(-1)).reshape(len(self.codes), -1))


def fix_codes(model: Any) -> dict[str, Scaled]:
    """Give each quantized layer a Scaled; returns them by the layers' names."""
    return {name: Scaled(m) for name, m in quantized_layers(model).items()}


def round_scales(fixed: dict[str, Scaled]) -> None:
    """Make the scales numbers of float16, which is what is exported."""
    for s in fixed.values():
        s.scale.data = s.scale.data.half().float()


def release(fixed: dict[str, Scaled]) -> None:
    """Give the layers their weights back, in float16."""
    for s in fixed.values():
        layer = s.layer[0]
        layer.weight.data = s.weight().detach().half().contiguous()
        del layer.quantized_weight, s.codes


@dataclasses.dataclass
class Distillation:
    """What to distil.

    Attributes:
        steps, batch: of `batch` sequences each.
        rate: as in `training.Task.train`.
        bf16: multiply in bfloat16.
        seed: of the order of the sequences.
        save_every: steps between two saves.
    """

    steps: int
    batch: int
    rate: float
    bf16: bool
    seed: int
    save_every: int = 50


def divergence(head: Head, found: torch.Tensor, wanted: torch.Tensor, backward: bool = False) -> float:
    """Mean KL(full precision, quantized) in nats a token, over the head's tokens.

    found, wanted: hidden states after the norm (batch, context, hidden), of the quantized and the full-precision model. backward: add
    the gradients to what gave `found`. A part of the logits is in memory at a time.
    """
    total, rows = 0.0, max(1, LOGITS // len(head.weight))
    leaf, wanted = found.detach().flatten(0, 1).requires_grad_(backward), wanted.flatten(0, 1)
    for i in range(0, len(leaf), rows):
        with torch.no_grad():
            target = head(wanted[i : i + rows].to(leaf.dtype)).float().log_softmax(-1)
        with torch.set_grad_enabled(backward):
            mine = head(leaf[i : i + rows]).float().log_softmax(-1)
            loss = F.kl_div(mine, target, reduction="sum", log_target=True) / len(leaf)
            if backward:
                loss.backward()
        total += float(loss.detach())
    if leaf.grad is not None:
        found.backward(leaf.grad.view_as(found))
    return total


@torch.no_grad()
def likely(head: Head, states: torch.Tensor) -> torch.Tensor:
    """The tokens that are among the LIKELY likeliest after any of these states (n, context, hidden): int64 (m,)."""
    rows, found = max(1, LOGITS // len(head.weight)), []
    for part in states.flatten(0, 1).split(rows):
        logits = head(part.to(head.weight.device, head.weight.dtype))
        found.append(logits.topk(min(LIKELY, logits.shape[-1]), sorted=False).indices.unique())
    return torch.cat(found).unique()


def vocabulary(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The MOST most frequent tokens of the text, and others: int64 (n,), sorted."""
    found, counts = torch.unique(ids, return_counts=True)
    return torch.cat([found[counts.argsort(descending=True, stable=True)[:MOST]], *others]).unique()


@torch.no_grad()
def mean_divergence(model: Any, head: Head, ids: torch.Tensor, states: torch.Tensor, d: Distillation) -> float:
    """`divergence` over sequences of tokens (n, context) and their states (n, context, hidden)."""
    total = 0.0
    for i in range(0, len(ids), d.batch):
        with precision(model.device, d.bf16):
            found = head.hidden(ids[i : i + d.batch].to(model.device))
            total += divergence(head, found, states[i : i + d.batch].to(model.device)) * len(found)
    return total / len(ids)


def distil(model: Any, head: Head, fixed: dict[str, Scaled], ids: torch.Tensor, states: torch.Tensor, d: Distillation, saved: Path,
           advance: Callable[[int, float], object]) -> None:  # fmt: skip
    """Train in place, continuing what `saved` holds; the file is kept up to date.

    Args:
        model: in float32, after `prepare`; parameters that need no gradient stay.
        head: what comes after its last layer.
        fixed: of `fix_codes`, whose scales train. Each layer is then computed again for its gradients, so that only one layer's
            weights and activations are in memory. {}: the layers' latent weights train.
        ids, states: tokens (n, context), and the full-precision model's hidden states after its norm, (n, context, hidden).
        saved: a file for parameters and optimizer.
        advance: called with the number of steps that are done, and the last one's divergence.

    Raises:
        Diverged: the divergence is not a finite number.
        Stop: `saved` is damaged.
    """
    for s in fixed.values():
        s.layer[0].weight.requires_grad_(False)
    groups = parameter_groups(model, d.rate)
    for s in fixed.values():
        groups.append({"params": [s.scale], "lr": d.rate * float(s.scale.detach().abs().mean()), "weight_decay": 0.0})
    # Gemma-3-270m, 49152 tokens, half generated; divergence on other books, WikiText-2. A sequence a step: 1.796, 3.205; two: 1.936, 3.425.
    # With one, a second moment of 0.99 instead of 0.95: 1.791, 3.185. Of no use: twice the rate (1.805, 3.278), norms at the whole rate
    # (1.796, 3.186), embeddings trained too (1.767, 3.203). With two: every layer's states matched as well (1.938, 3.411), weights that
    # move from latent to quantized over 60 % of the steps (2.033, 3.515), generated text alone (2.343, 3.508).
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
    rates = schedule(optimizer, d.steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    done = 0
    if saved.exists():
        with undamaged(saved, "remove it to distil from the calibrated layers again"):
            state = torch.load(saved, map_location="cpu", weights_only=True)
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
        optimizer.zero_grad(set_to_none=True)
        with _computed_again(model) if fixed else contextlib.nullcontext(), precision(model.device, d.bf16):
            found = head.hidden(ids[rows].to(model.device))
            loss = divergence(head, found, states[rows].to(model.device), backward=True)
        if not math.isfinite(loss):
            raise Diverged(f"the divergence is {loss} in step {step + 1} of the distillation: use a smaller --distill-rate, and "
                           f"remove {saved}")  # fmt: skip
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % d.save_every == 0 or step + 1 == d.steps:
            _save(saved, {"done": step + 1, "trained": [p.detach().cpu() for p in trained], "optimizer": optimizer.state_dict(),
                          "rates": rates.state_dict()})  # fmt: skip
        advance(step + 1, loss)


@contextlib.contextmanager
def _computed_again(model: Any) -> Iterator[None]:
    """Within the block, layers keep no activations but compute them again for their gradients."""
    modules = find(model)
    for m in modules:
        m.forward = functools.partial(checkpoint, m.forward, use_reentrant=False)
    try:
        yield
    finally:
        for m in modules:
            del m.forward


def _save(path: Path, state: dict) -> None:
    with replacing(path) as part:
        torch.save(state, part)
