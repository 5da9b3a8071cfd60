"""Models whose weights stay packed: PyTorch operators on TQ1_25 and its relatives, layers, and models from GGUFs.

    SherryConfig   transformers' configuration of packed checkpoints, which `sherry-gguf pack` makes
    PackedLinear   a frozen torch.nn.Linear on packed weights
    load_gguf      a model with packed layers from a GGUF, and its tokenizer
    gguf_config    its configuration alone

PyTorch is imported when one of these names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gguf_model import gguf_config, load_gguf
    from .linear import PackedLinear
    from .quantizer import SherryConfig

__all__ = ["PackedLinear", "SherryConfig", "gguf_config", "load_gguf"]

_MODULE_OF = {"PackedLinear": "linear", "SherryConfig": "quantizer", "gguf_config": "gguf_model", "load_gguf": "gguf_model"}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
