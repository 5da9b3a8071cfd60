"""Linear layers that train quantized weights, with Arenas' residual; `prepare` puts them into a model."""

import collections
import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sherry_gguf import patterns
from sherry_gguf.ternary import GROUP, KEPT

from . import quantizer

logger = logging.getLogger(__name__)

# Layers that neither training nor the converter quantizes: the head, and the routers of a mixture of experts.
KEEP = r"(^|\.)(lm_head|router|gate|shared_expert_gate)$"

AUTO = "auto"  # as a group size

# What wrappers for distributed training and checkpointing add to module names.
_WRAPPED = re.compile(r"(^module\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.)")


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How to quantize weights: the arguments of `quantizer.fake_quantize`. Raises ValueError for impossible ones.

    With the group size `auto`, `prepare` gives each layer its own. A layer's `quant` always has a number.
    """

    method: str = "sherry"
    granularity: str = "per_group"
    group_size: int | str = AUTO

    def __post_init__(self):
        size: Any = quantizer.GROUP_SIZE if self.group_size == AUTO else self.group_size
        quantizer.check((size,), self.method, self.granularity, size)

    def of_layer(self, inputs: int, trained: int | None = None) -> "QuantConfig":
        """This configuration for a layer: `auto` becomes the first of `trained` (which may be None), 128 and 64 that divides its inputs.

        If none does, it becomes 64.
        """
        if self.group_size != AUTO:
            return self
        sizes = (trained or quantizer.GROUP_SIZE, *quantizer.GROUP_SIZES)
        return dataclasses.replace(self, group_size=next((n for n in sizes if inputs % n == 0), sizes[-1]))


class QuantizedLayer(nn.Module):
    """A mixin for layers: `weight` is the latent weight that trains, `quantized_weight()` the one that evaluation uses.

    Attributes:
        quant: a QuantConfig.
        residual: λ of Arenas, used only in training (`set_residual`).
        rescale: whether training divides by 1 + λ.
        probe: called with (layer, x, used weight) in each forward pass (`monitor.TrainingMonitor`).
    """

    weight: torch.Tensor
    quant: QuantConfig
    residual: float = 0.0
    rescale: bool = False
    probe: Callable | None = None
    transposed = False  # weight is (in, out)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer as (out, in)."""
        return weight.t() if self.transposed else weight

    def quantized_weight(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that evaluation multiplies by, from the layer's latent weight or the given one, in the same shape."""
        weight = self.weight if weight is None else weight
        return self.rows(quantizer.fake_quantize(self.rows(weight), **dataclasses.asdict(self.quant)))

    def _used_weight(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.residual:
            used = self.rows(quantizer.fake_quantize(self.rows(self.weight), **dataclasses.asdict(self.quant),
                                                     residual=self.residual, rescale=self.rescale))  # fmt: skip
        else:
            used = self.quantized_weight()
        if self.probe is not None:
            self.probe(self, x, used)
        return used

    def extra_repr(self) -> str:
        quant = self.quant
        size = f", group_size={quant.group_size}" if quant.granularity == "per_group" else ""
        return f"{super().extra_repr()}, {quant.method} {quant.granularity}{size}"


class QuantLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` that multiplies by its quantized weight: Y = X·(T*a + λ·W) (Sherry, Eq. 7)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, quant: QuantConfig = QuantConfig(), **kwargs):
        """Raises ValueError if the inputs do not fit `quant`; the other arguments are those of nn.Linear."""
        quant = quant.of_layer(in_features)
        quantizer.check((out_features, in_features), **dataclasses.asdict(quant))
        super().__init__(in_features, out_features, bias, **kwargs)
        self.quant = quant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self._used_weight(x), self.bias)


class QuantConv1D(QuantizedLayer, Conv1D):
    """`QuantLinear` for transformers' Conv1D (GPT-2), whose weight is (in, out)."""

    transposed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self._used_weight(x)).view(*x.shape[:-1], self.nf)


_LAYERS = {nn.Linear: QuantLinear, Conv1D: QuantConv1D}


def _quantized_class(m: nn.Module) -> type | None:
    """The class that `prepare` gives a layer. None for unknown classes: a subclass of nn.Linear may compute something else."""
    return QuantLinear if type(m).__name__ == "FalconLinear" else _LAYERS.get(type(m))  # FalconLinear computes the same


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def prepare(model: nn.Module, quant: QuantConfig = QuantConfig(), keep: str = "", only: str = "") -> list[str]:
    """Make the linear layers of `model` train quantized weights, in place; the parameters stay the same objects.

    Call it before the model is wrapped (DDP, FSDP, DeepSpeed) and before the optimizer is made. With Sherry, checkpoints saved
    afterwards say in config.json that their weights are latent, so that the converter accepts them. bfloat16 weights are the
    exception: training rounds their scales further than the converter would.

    Args:
        model: any module with nn.Linear or transformers' Conv1D.
        quant: how to quantize; the method `full` changes nothing, for a comparison with full precision. The group size `auto` is
            the one that the model's config.json says a layer was trained in (`sherry_config`); without it, 128 if the layer's
            inputs are a multiple of 128, and 64 otherwise.
        keep: regular expression; layers whose dotted name matches stay as they are, as do those of `KEEP` and the head that
            `get_output_embeddings()` names. The checkpoint tells the converter.
        only: regular expression; layers whose name does not match stay as they are.

    Returns:
        The names of the layers that now train quantized weights.

    Raises:
        ValueError: there are none, the inputs of one do not fit `quant`, or one is already quantized in another way. The model
            is unchanged then.
    """
    already = quantized_layers(model)
    for name, m in already.items():
        if m.quant != quant.of_layer(_inputs(m), _trained_size(model, name)):
            raise ValueError(f"{name} is quantized already, by {m.quant}: a checkpoint can state only one method")
    head = _head(model)
    found: dict[str, Any] = {
        name: m for name, m in model.named_modules()
        if _quantized_class(m) and name and m is not head
        and not re.search(KEEP, name) and not (keep and re.search(keep, name)) and re.search(only, name)
    }  # fmt: skip
    if quant.method == "full":
        found = {}
    elif not found:
        besides = f", besides the {len(already)} that are quantized already" * bool(already)
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize (keep {keep!r}, only {only!r}){besides}")
    quants = {name: quant.of_layer(_inputs(m), _trained_size(model, name)) for name, m in found.items()}
    if misfits := [name for name, m in found.items() if _inputs(m) % _divisor(quants[name])]:
        raise ValueError(_misfits(found, misfits, quant, keep))
    config: Any = getattr(model, "config", None)
    if config is not None:  # training may start from a Sherry checkpoint
        config.__dict__.pop("sherry_config", None)
    if not found:
        return []
    for name, m in found.items():
        m.__class__ = _quantized_class(m)  # keeps parameters, hooks, names and everything else attached to the layer
        m.quant = quants[name]
    owned = {id(p) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding)) for p in m.parameters()}
    if rest := [name for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in owned]:
        logger.warning("not in a linear layer, so left in full precision: %s", ", ".join(rest))
    if config is not None and all(m.weight.dtype != torch.bfloat16 for m in found.values()):
        if sherry := sherry_config(model, "latent"):
            config.sherry_config = sherry
    return list(found)


def _trained_size(model: Any, name: str) -> int | None:
    """The group size that a layer was trained in, as the model's config.json says. None if it names none, or an impossible one."""
    said = getattr(getattr(model, "config", None), "sherry_config", None)
    if not isinstance(said, dict) or said.get("granularity", "per_group") != "per_group":
        return None
    kept, sizes = said.get("kept"), said.get("group_sizes")
    if isinstance(kept, list) and f"{name}.weight" in kept:
        return None
    size = (sizes if isinstance(sizes, dict) else {}).get(name, said.get("group_size"))
    return size if type(size) is int and size > 0 and size % GROUP == 0 else None


def _inputs(m: Any) -> int:
    return m.weight.shape[0 if isinstance(m, Conv1D) else 1]


def _divisor(quant: QuantConfig) -> int:
    return quantizer.divisor(**dataclasses.asdict(quant))


def _misfits(layers: dict[str, Any], misfits: list[str], quant: QuantConfig, keep: str) -> str:
    """The error message about layers whose inputs do not fit, with the flags that help; `keep` then matches exactly these."""
    sizes = collections.defaultdict(list)
    for name in misfits:
        sizes[_inputs(layers[name])].append(name)
    listed = "; ".join(f"{n} inputs: {patterns.starred(names)}" for n, names in sorted(sizes.items()))
    needs = f"a multiple of {_divisor(quant.of_layer(min(sizes)))}, as {quant.method} {quant.granularity} needs"
    message = f"{len(misfits)} of {len(layers)} layers have inputs that are not {needs} ({listed})"

    def keeping(names: list[str]) -> str:
        return f"--keep '{f'{keep}|' * bool(keep)}{patterns.matching(names, set(layers) - set(names))}'"

    ways = []
    small = quantizer.SMALL_GROUP_SIZE
    if quant.granularity == "per_group" and quant.group_size not in (AUTO, small) and any(n % small == 0 for n in sizes):
        rest = [name for name, m in layers.items() if _inputs(m) % small]
        also = f" {keeping(rest)}" if rest else ""
        ways += [f"--group_size {AUTO}{also}  ({small} where {quantizer.GROUP_SIZE} does not fit)",
                 f"--group_size {small}{also}  (everywhere)"]  # fmt: skip
    if len(misfits) < len(layers):
        ways.append(f"{keeping(misfits)}  (leaves them in full precision)")
    if not ways:
        return f"{message}. None is left to quantize"
    return "\n  ".join([f"{message}. Pass{' one of these' * (len(ways) > 1)}:", *ways])


def sherry_config(model: nn.Module, weights: str) -> dict | None:
    """`sherry_config` in config.json for a model that went through `prepare`; None if its weights are not Sherry's.

    weights: `latent` or `fake_quantized`.
    """
    layers = quantized_layers(model)
    quant = next((m.quant for m in layers.values()), None)
    if quant is None or quant.method != "sherry":
        return None
    head = _head(model)
    kept = [f"{_WRAPPED.sub('', name)}.weight" for name, m in model.named_modules()
            if isinstance(m, tuple(_LAYERS)) and not isinstance(m, QuantizedLayer) and m is not head]  # fmt: skip
    size: dict[str, Any] = {}
    if quant.granularity == "per_group":
        size["group_size"] = largest = max(int(m.quant.group_size) for m in layers.values())
        if others := {name: m.quant.group_size for name, m in layers.items() if m.quant.group_size != largest}:
            size["group_sizes"] = others
    return {"method": "sparse_absmean", "granularity": quant.granularity, **size, "n": KEPT, "m": GROUP,
            "weights": weights, **({"kept": kept} if kept else {})}  # fmt: skip


def lossy_sizes(model: nn.Module) -> str:
    """The group sizes of Sherry's layers that no block can hold, as text: "32, 96"; "" if there are none."""
    sizes = {int(m.quant.group_size) for m in quantized_layers(model).values()
             if (m.quant.method, m.quant.granularity) == ("sherry", "per_group")}  # fmt: skip
    return ", ".join(str(n) for n in sorted(sizes) if n % quantizer.SMALL_GROUP_SIZE)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers that `prepare` quantized, by their names before any wrapping (DDP, FSDP, ...)."""
    return {_WRAPPED.sub("", name): m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within the block, quantized layers multiply by their latent weights."""
    before = {m: m.quant for m in quantized_layers(model).values()}
    try:
        for m in before:
            m.quant = dataclasses.replace(m.quant, method="full")
        yield
    finally:
        for m, quant in before.items():
            m.quant = quant


def set_residual(model: nn.Module, residual: float, rescale: bool = False) -> None:
    """Set λ of every layer (Sherry, Eq. 7); it acts in training only."""
    for m in quantized_layers(model).values():
        m.residual, m.rescale = residual, rescale
