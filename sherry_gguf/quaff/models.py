"""Quantized layers into a model."""

import logging
import re
from collections.abc import Iterable

import torch
import transformers
from torch import nn

from sherry_gguf.packed.frozen import FrozenLinear
from sherry_gguf.packed.linear import PackedLinear, kind_of
from sherry_gguf.patterns import starred

from . import packed as scaled
from .channels import KEEP, NO_LAYERS, Channels, linear_layers
from .int8 import DynamicLinear, Int8Linear, MixedLinear, QuaffLinear, StaticLinear
from .scaling import GAMMA, Targeted

logger = logging.getLogger(__name__)

UNQUANTIZED = {"full": torch.float32, "bf16": torch.bfloat16}
METHODS = "quaff", "naive", "static", "dynamic", "mixed", *UNQUANTIZED
BASES = "int8", "tq1_25"
LOST = 1e-3  # a relative error of the weights from which a warning says that they were not ternary
OF_PACKED = "quaff", "naive"
EXPERTS = r"(^|\.)experts\."
SENT = r"\.(factors|started)$"  # buffers that DistributedDataParallel sends from its first process to the others at each step


def quantize_for_finetuning(
    model: nn.Module,
    channels: Channels | None = None,
    base: str = "int8",
    *,
    method: str = "quaff",
    granularity: str = "channel",
    gamma: float = GAMMA,
    keep: str = KEEP,
) -> nn.Module:
    """Replace a model's linear layers by frozen quantized ones, in place, and freeze all other parameters; returns the model.

    Afterwards peft's adapters work as on any model, except for merging them.

    channels: of `calibrate` for this model. `quaff` and `static` need them.
    base: how quantized weights are stored: "int8", or "tq1_25", packed in TQ1_25, or in TQ1_25_64 where rows are a multiple of 64 only.
        The model's weights should be 3:4 sparse ternary, as training with Sherry leaves them: a warning says how much others lose.
        A model of `load_gguf` is packed already: only "tq1_25" is possible, and its other layers stay as they are.
    method: "quaff", or what it is compared with: "naive" (no scaling), "static" (SmoothQuant), "dynamic" (all channels, each step),
        "mixed" (LLM.int8()), or not quantized: "full" (float32), "bf16".
    granularity: one scale of weights per output "channel" or per "tensor" (as the authors' scripts run).
    gamma: the share that a factor keeps in each step.
    keep: a regular expression for layers that stay as they are.

    Raises ValueError for unknown options, without channels where they are needed, if they are another model's, or for another base
    or method if the model is packed.
    """
    if base not in BASES:
        raise ValueError(f"base {base}: must be {' or '.join(BASES)}")
    if method not in METHODS:
        raise ValueError(f"method {method}: must be one of {', '.join(METHODS)}")
    if base == "tq1_25" and method not in (*OF_PACKED, *UNQUANTIZED):
        raise ValueError(f"method {method} with base tq1_25: must be {' or '.join(OF_PACKED)}")
    layers = linear_layers(model, keep)
    if not layers:
        raise ValueError(NO_LAYERS)
    packed: dict[str, nn.Linear] = {name: layer for name, layer in layers.items() if isinstance(layer, PackedLinear)}
    if packed and (base != "tq1_25" or method not in OF_PACKED):
        raise ValueError(f"base {base}, method {method}: the model is packed already, use base tq1_25 and {' or '.join(OF_PACKED)}")
    if method in UNQUANTIZED:
        return _frozen(model.to(UNQUANTIZED[method]))
    layers = packed or layers
    if base == "tq1_25":
        for name, layer in layers.items():
            try:
                kind_of(layer.in_features)
            except ValueError as e:
                raise ValueError(f"{name}: {e}; name it in `keep`, or use base int8") from e
    if method in ("quaff", "static"):
        _check(channels, layers, method)
    names = list(layers)
    for name in names:  # drop each layer before the next is made, so that only one exists in both forms
        made = _quantized(name, layers.pop(name), channels, base, method, granularity, gamma)
        if isinstance(made, Targeted):
            made.scaling.shared = not re.search(EXPERTS, name)
        model.set_submodule(name, made)
    model._ddp_params_and_buffers_to_ignore = _unsent(model)  # type: ignore[assignment]
    _warn_of_losses(model, names)
    _release_files(model)
    return _frozen(model)


def _release_files(model: nn.Module) -> None:
    """Copy what is left of the model: transformers maps a float32 checkpoint, and one view of it keeps all of its weights in memory."""
    for p in model.parameters():
        if p.device.type == "cpu":
            p.data = p.data.clone()


def _unsent(model: nn.Module) -> list[str]:
    """The buffers of quantized layers that DistributedDataParallel need not send at each step, by their names in peft's models too."""
    return [
        f"{outer}{name}{inner}.{buffer}"
        for name, layer in model.named_modules()
        if isinstance(layer, FrozenLinear)
        for buffer, _ in layer.named_buffers()
        if not re.search(SENT, f".{buffer}")
        for outer in ("", "base_model.", "base_model.model.")
        for inner in ("", ".base_layer")
    ]


def _warn_of_losses(model: nn.Module, names: Iterable[str]) -> None:
    lost = {name: layer.lost for name in names if isinstance(layer := model.get_submodule(name), PackedLinear) and layer.lost > LOST}
    if lost:
        logger.warning("%d layers are not 3:4 sparse ternary; packing them loses %.1f to %.1f %% of their weights' norm: %s", len(lost),
                       100 * min(lost.values()), 100 * max(lost.values()), starred(lost))  # fmt: skip


def _frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    if isinstance(model, transformers.PreTrainedModel):
        model.enable_input_require_grads()  # a checkpointed layer has no gradient if no input needs one
    return model


def _check(channels: Channels | None, layers: dict[str, nn.Linear], method: str) -> None:
    if channels is None:
        raise ValueError(f"method {method} needs channels: run calibrate on the full-precision model first")
    for name, layer in layers.items():
        if name not in channels.channels or name not in channels.maxima:
            raise ValueError(f"{name} is not in the channels, which name {len(channels.channels)} layers: calibrate this model")
        most = channels.maxima[name]
        of_layer = channels.channels[name]
        if most.shape != (layer.in_features,) or (len(of_layer) and not 0 <= int(of_layer.min()) <= int(of_layer.max()) < len(most)):
            raise ValueError(f"{name} has {layer.in_features} inputs, its channels are of {tuple(most.shape)}: calibrate this model")


def _quantized(name: str, layer: nn.Linear, channels: Channels | None, base: str, method: str, granularity: str, gamma: float) -> nn.Module:
    if base == "tq1_25":
        of_layer, maxima = torch.zeros(0, dtype=torch.int64), torch.zeros(layer.in_features)
        if method != "naive" and channels is not None:
            of_layer, maxima = channels.channels[name], channels.maxima[name]
        return scaled.PackedLinear.of(layer, of_layer, maxima, gamma)
    if method == "naive":
        return Int8Linear(layer, granularity)
    if method == "mixed":
        return MixedLinear(layer, granularity)
    if method == "dynamic":
        return DynamicLinear(layer, granularity)
    assert channels is not None
    if method == "static":
        return StaticLinear(layer, channels.maxima[name], granularity)
    return QuaffLinear(layer, channels.channels[name], channels.maxima[name], granularity, gamma)
