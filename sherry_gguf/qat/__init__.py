"""Quantization-aware training of 3:4 sparse ternary weights in PyTorch.

    prepare(model)                    # every linear layer of the blocks becomes a SherryLinear
    ...                               # train as usual
    export(model, tokenizer, "out")   # a Hugging Face directory that converts to TQ1_25 without loss
"""

from .export import export
from .linear import SherryLinear, prepare
from .quantizer import sparse_absmean

__all__ = ["SherryLinear", "export", "prepare", "sparse_absmean"]
