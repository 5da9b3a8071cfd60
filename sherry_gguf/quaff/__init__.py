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
"""

from .channels import Channels, calibrate
from .gguf_model import gguf_config, load_gguf
from .models import METHODS, quantize_for_finetuning

__all__ = ["METHODS", "Channels", "calibrate", "gguf_config", "load_gguf", "quantize_for_finetuning"]
