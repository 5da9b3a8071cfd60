"""Which input channels of a model's linear layers carry outliers: counted on the full-precision model, before adapters are put in."""

import collections
import dataclasses
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn

from sherry_gguf.training.files import write

FORMAT = "sherry-gguf outlier channels 1"
# The authors' code has 100 and 0.01, which find nothing in most layers of SmolLM2-135M: docs/benchmarks.md, "Loss and accuracy"
THRESHOLD = 20.0
BUDGET = 0.05
MULTIPLE = 4  # of channels in a layer's budget

# Layers that stay as they are: the head, and the routers of a mixture of experts.
KEEP = r"(^|\.)(lm_head|embed_out|score|router|gate|shared_expert_gate)$"

NO_LAYERS = "the model has no layers to quantize: `keep` names all of them, or they are no torch.nn.Linear, as GPT-2's Conv1D"


@dataclasses.dataclass
class Channels:
    """The outlier channels of linear layers.

    Attributes:
        channels: layer name to int64 (k,), ascending; k may be 0.
        maxima: layer name to float32 (inputs,), the largest |x| that calibration saw in each channel.
        settings: how they were found: threshold, budget, budgets, batches, tokens.
    """

    channels: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all. Raises OSError.

        Its tensors are LAYER.channels and LAYER.maxima; the metadata hold `format` and, as JSON, `settings`.
        """
        tensors = {f"{name}.{what}": tensor.contiguous() for what, by_layer in
                   (("channels", self.channels), ("maxima", self.maxima)) for name, tensor in by_layer.items()}  # fmt: skip
        write(Path(path), safetensors.torch.save(tensors, {"format": FORMAT, "settings": json.dumps(self.settings)}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Channels":
        """Read what `save` wrote. Raises ValueError for another file, OSError."""
        with open(path, "rb"):  # an error that names the file
            pass
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path}: not a file of outlier channels ({FORMAT!r}), but {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except safetensors.SafetensorError as e:
            raise ValueError(f"{path}: not a safetensors file: {e}") from e
        by: dict[str, dict[str, torch.Tensor]] = {"channels": {}, "maxima": {}}
        for name, tensor in tensors.items():
            layer, _, what = name.rpartition(".")
            if what not in by or tensor.ndim != 1 or tensor.is_floating_point() is (what == "channels"):
                raise ValueError(f"{path} is damaged: it has a tensor {name} of {tensor.dtype} {tuple(tensor.shape)}")
            by[what][layer] = tensor
        return cls(by["channels"], by["maxima"], json.loads(metadata.get("settings", "{}")))


def linear_layers(model: nn.Module, keep: str = KEEP) -> dict[str, nn.Linear]:
    """The linear layers to quantize, by name: all but those whose names `keep` finds and the output embeddings."""
    head = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not re.search(keep, name)
    }


def budget_of(name: str, inputs: int, budget: float, budgets: Mapping[str, float]) -> int:
    """The most channels that a layer may keep: its share of its inputs, rounded down to a multiple of four.

    budgets: regular expressions for names to shares, the first pattern that matches counts; otherwise `budget`.
    """
    share = next((share for pattern, share in budgets.items() if re.search(pattern, name)), budget)
    return int(inputs * share // MULTIPLE * MULTIPLE)


class Counter:
    """Counts outliers at the inputs of layers, as forward hooks.

    Attributes:
        mask: (batch, tokens), 0 for padding, or None.
        counts: layer name to int64 (inputs,). maxima: to float32 (inputs,), the largest |x|.
    """

    def __init__(self, layers: Mapping[str, nn.Module], threshold: float):
        self.threshold = threshold
        self.mask: torch.Tensor | None = None
        self.counts: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, torch.Tensor] = {}
        self._handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def see(_, args):
            self.see(name, args[0].detach())

        return see

    def see(self, name: str, x: torch.Tensor) -> None:
        """Count the elements of x (..., inputs) above `threshold` times the mean magnitude of x. Padding counts nowhere."""
        x = x.reshape(-1, x.shape[-1]).abs().float()
        if self.mask is not None and self.mask.numel() == len(x):  # experts see tokens in another shape: never padding alone
            x = x[self.mask.reshape(-1).to(device=x.device, dtype=torch.bool)]
        if not x.numel():
            return
        count = (x > self.threshold * x.mean()).sum(0)
        most = x.amax(0)
        if name in self.counts:
            self.counts[name] += count
            torch.maximum(self.maxima[name], most, out=self.maxima[name])
        else:
            self.counts[name], self.maxima[name] = count, most


def chosen(counts: torch.Tensor, budget: int) -> torch.Tensor:
    """The channels of the highest counts, at most `budget` and only those that fired, int64 ascending; of equals the first."""
    order = torch.argsort(counts, descending=True, stable=True)[:budget]
    return order[counts[order] > 0].sort().values


def _check(layers: Mapping[str, nn.Module], threshold: float, budget: float, budgets: Mapping[str, float]) -> None:
    if not threshold > 0:
        raise ValueError(f"threshold {threshold}: must be above 0")
    for share in (budget, *budgets.values()):
        if not 0 <= share <= 1:
            raise ValueError(f"a budget of {share}: must be a share of the inputs, from 0 to 1")
    if not layers:
        raise ValueError(NO_LAYERS)
    for pattern in budgets:
        if not any(re.search(pattern, name) for name in layers):
            raise ValueError(f"a budget for {pattern!r}: no layer to quantize has such a name; one is {next(iter(layers))}")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    data: Iterable[Mapping[str, torch.Tensor]],
    *,
    threshold: float = THRESHOLD,
    budget: float = BUDGET,
    budgets: Mapping[str, float] | None = None,
    keep: str = KEEP,
) -> Channels:
    """Find the outlier channels of a model's linear layers.

    At a layer's input, an element counts where |x| > threshold * mean |x|, the mean over a batch's elements without padding. The channels
    with the highest counts over all batches are the layer's (the rule of Quaff's public code).

    model: in full precision, without adapters. It runs in evaluation mode and is left as it was.
    data: batches as keyword arguments of the model; `attention_mask` (batch, tokens) marks padding with 0.
    budget: the share of a layer's inputs that may be outlier channels. budgets: other shares, by regular expressions for names.
    keep: a regular expression for layers that are not quantized.

    Raises ValueError without a batch, without linear layers, for a threshold or share out of range, for a name in `budgets` that no layer
    has, or if activations are not finite.
    """
    budgets, layers = dict(budgets or {}), linear_layers(model, keep)
    _check(layers, threshold, budget, budgets)
    was_training, device = model.training, next(model.parameters()).device
    counter = Counter(layers, threshold)
    # no logits: those of long batches would take more memory than the model
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    found: collections.Counter[str] = collections.Counter()
    try:
        model.eval()
        for batch in data:
            inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
            counter.mask = inputs.get("attention_mask")
            model(**{name: value for name, value in inputs.items() if name != "labels"}, **least)
            found["batches"] += 1
            seen = counter.mask if counter.mask is not None else inputs.get("input_ids")
            found["tokens"] += 0 if seen is None else int(seen.sum()) if seen is counter.mask else seen.numel()
    finally:
        counter.remove()
        model.train(was_training)
    if not found["batches"]:
        raise ValueError("no data to calibrate with")
    channels, maxima = {}, {}
    for name, layer in layers.items():
        counts = counter.counts.get(name, torch.zeros(layer.in_features, dtype=torch.int64))  # an expert that no token chose
        most = counter.maxima.get(name, torch.zeros(layer.in_features))
        if not bool(torch.isfinite(most).all()):
            raise ValueError(f"{name}: its inputs are not finite; calibrate in float32 or bfloat16")
        channels[name] = chosen(counts, budget_of(name, layer.in_features, budget, budgets)).cpu()
        maxima[name] = most.cpu()
    return Channels(channels, maxima, {"threshold": threshold, "budget": budget, "budgets": budgets, **found})
