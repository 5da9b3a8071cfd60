"""Quaff (Huang & Wu, ACL 2025): fine-tune adapters on a frozen model whose weights and activations are quantized.

    channels = calibrate(model, batches)  # before adapters are put in; batches: dicts of tensors
    model = quantize_for_finetuning(model, channels, base="int8")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))

A few input channels of each layer carry outliers, the same ones throughout training. Only these are scaled down, and a small copy of their
weights in floating point makes up for it:

    x' = x / s          y = int8(x') int8(W)^T + x'[:, O] ((s - 1) W[:, O])^T

where s is 1 outside the channels O.

    Channels                   outlier channels by layer, saved and loaded as safetensors
    calibrate                  find them
    quantize_for_finetuning    put quantized layers into a model
    load_gguf                  a model with packed layers from a GGUF, and its tokenizer
    gguf_config                its configuration alone
    save_factors, load_factors  the factors s of a model, as safetensors

PyTorch is imported when one of these names is first used, because the commands answer --help without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sherry_gguf.packed import gguf_config, load_gguf

    from .channels import Channels, calibrate
    from .models import METHODS, quantize_for_finetuning
    from .scaling import load_factors, save_factors

__all__ = [
    "METHODS", "Channels", "calibrate", "gguf_config", "load_factors", "load_gguf", "quantize_for_finetuning", "save_factors",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for room in ".channels", "sherry_gguf.packed.gguf_model", ".models", ".scaling":
        globals().update({k: v for k, v in vars(import_module(room, __name__)).items() if k in __all__})
    return globals()[name]
