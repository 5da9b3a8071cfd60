"""Packed checkpoints for transformers: `from_pretrained`, `save_pretrained`, `dequantize`."""

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sherry_gguf.blocks import BlockType
from sherry_gguf.errors import ConvertError

from .layout import METHOD, TENSOR, Modules


class SherryConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint (layout.py).

    modules: a type's name to the names of its layers. Raises ConvertError for anything else, and for settings of a later version.
    """

    def __init__(self, modules: dict[str, list[str]] | None = None, **others: Any):
        self.quant_method = others.pop("quant_method", METHOD)
        self.modules = modules
        try:
            Modules(modules)
        except ValueError as e:
            raise ConvertError(f"{e}: `sherry-gguf pack` writes packed checkpoints") from e
        if others:
            raise ConvertError(f"quantization_config has {', '.join(others)}, which this version of sherry-gguf does not know: update it")


class SherryQuantizer(HfQuantizer):
    """Puts packed layers into a model and the checkpoint's blocks into these."""

    requires_parameters_quantization = True
    required_packages = ["accelerate"]  # type: ignore[assignment]

    def __init__(self, quantization_config: SherryConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ConvertError("SherryConfig is for packed checkpoints; `sherry-gguf pack DIR` makes one from a Sherry checkpoint")
        self._modules = Modules(quantization_config.modules)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = {str(d) for d in (device_map.values() if isinstance(device_map, dict) else [device_map])}
        if nowhere := devices & {"disk", "meta"}:
            raise ConvertError(f"packed layers cannot be on the device {nowhere.pop()}: choose another device_map, such as cpu")

    def _kind(self, model: Any, name: str) -> BlockType | None:
        """The checkpoint's type of a layer. A model without its head has names without the prefix."""
        prefix = f"{model.base_model_prefix}."
        return next(filter(None, map(self._modules.kind, (name, prefix + name, name.removeprefix(prefix)))), None)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from .linear import PackedLinear  # needs the compiled kernels

        if model.dtype not in (torch.float32, torch.bfloat16):
            raise ConvertError(f"packed layers do not multiply {model.dtype}: pass dtype=torch.float32 or dtype=torch.bfloat16")
        found = 0
        for name, layer in [*model.named_modules()]:
            if (kind := self._kind(model, name)) is None:
                continue
            if not isinstance(layer, nn.Linear):
                raise ConvertError(f"quantization_config has {name}, which is a {type(layer).__name__} here, not a linear layer")
            try:
                model.set_submodule(name, PackedLinear(layer, kind))
            except ValueError as e:
                raise ConvertError(f"{name}: {e}: config.json is damaged, or belongs to another model") from e
            found += 1
        if not found:
            raise ConvertError(f"no layer of {type(model).__name__} is in quantization_config: config.json belongs to another model")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name.endswith(f".{TENSOR}")

    def create_quantized_param(self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, **kwargs: Any) -> None:
        layer = model.get_submodule(param_name.removesuffix(f".{TENSOR}"))
        try:
            layer.put(param_value.cpu().numpy(), target_device)
        except ValueError as e:
            raise ConvertError(f"the tensor {param_name} is damaged, download the checkpoint again: {e}") from e

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        same = type(model).__name__ in (model.config.architectures or ())  # else a new head may be drawn at random
        known = "|".join(model._keys_to_ignore_on_load_missing or ["(?!)"])
        if lacking := [n for n in missing_keys if n.endswith(f".{TENSOR}") or (same and not re.search(known, n))]:
            raise ConvertError(f"the checkpoint lacks {len(lacking)} of its tensors, the first {lacking[0]}: download it again")
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _dequantize(self, model: Any) -> Any:
        from .linear import PackedLinear

        for name, layer in [*model.named_modules()]:
            if isinstance(layer, PackedLinear):
                model.set_submodule(name, layer.dequantized())
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Register both classes with transformers, also if older ones of the same name are registered."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(SherryConfig)
    auto.register_quantizer(METHOD)(SherryQuantizer)


register()
