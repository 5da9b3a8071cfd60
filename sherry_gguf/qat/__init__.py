"""Quantization-aware training of 3:4 sparse ternary weights, in PyTorch and on Hugging Face's Trainer.

prepare(model)                                            # the blocks' linear layers train ternary weights
SherryTrainer(model, args, arenas=Arenas(), ...).train()  # or any other loop: plain Trainer with ArenasCallback
export(model, "out", tokenizer)                           # a Hugging Face directory that converts without loss

PyTorch is imported when one of these names is first used, because `command` answers --help without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arenas import Arenas, ArenasCallback
    from .hf_export import export
    from .linear import QuantConfig, QuantConv1D, QuantLinear, full_precision, prepare, quantized_layers, set_residual
    from .monitor import TrainingMonitor, effective_rank
    from .quantizer import fake_quantize, sparse_absmean
    from .trainer import SherryTrainer, bf16_is_faster

__all__ = [
    "Arenas", "ArenasCallback", "QuantConfig", "QuantConv1D", "QuantLinear", "SherryTrainer", "TrainingMonitor",
    "bf16_is_faster", "effective_rank", "export", "fake_quantize", "full_precision", "prepare", "quantized_layers",
    "set_residual", "sparse_absmean",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for room in "arenas", "hf_export", "linear", "monitor", "quantizer", "trainer":
        globals().update({k: v for k, v in vars(import_module(f".{room}", __name__)).items() if k in __all__})
    return globals()[name]
