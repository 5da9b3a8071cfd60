"""Sherry's 3:4 sparse ternary weights, as NumPy arrays and in GGUF models.

    packed = sherry_gguf.quantize(weights)  # float32 (rows, n) to uint8 (rows, n / 128 * 22)
    tensors = sherry_gguf.read_gguf("model-TQ1_25.gguf").tensors  # name to Stored

Arrays:
    TQ1_25, TQ1_25_64, STQ1_0
                            block types in NumPy, the reference: quantize, dequantize, is_exact, pack, unpack, vec_dot
    quantize, dequantize    the same by the C kernels, for the `kind` TQ1_25 (default), TQ1_25_64 or STQ1_0

Models:
    read_gguf               a GGUF, or all files of a split: a Gguf of metadata and Stored tensors
    convert.convert         a Hugging Face model directory to a ternary GGUF, with Options
    verify.verify           compare such a GGUF with the directory
    inspect.inspect         describe a GGUF
    retag.retag             renumber the type of an old STQ1_0 file
    transcode.transcode     ternary tensors to another type
    Llama                   llama-cpp-python's class on the built libraries; not among the names of `import *`
    gguf_type.register      teach the `gguf` package the types

Errors:
    ConvertError            a file cannot be written, read or verified
    QuantizeError           a block cannot hold these weights; a ValueError
    NotBuilt                a part of the patched llama.cpp is missing; a FileNotFoundError

Training is in `sherry_gguf.qat`. Names load when they are first used: the import alone needs nothing. After it, transformers loads packed
checkpoints (docs/transformers.md) and the `gguf` package knows the types, whichever is imported first (`plugins`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import plugins as _plugins

if TYPE_CHECKING:
    from . import convert, gguf_type, inspect, kernels, llama_cpp, retag, transcode, verify
    from .convert import Options
    from .errors import ConvertError, NotBuilt, QuantizeError
    from .gguf_file import Gguf, Stored, read_gguf
    from .kernels import dequantize, quantize
    from .llama_cpp_python import Llama as Llama
    from .stq1_0 import TYPE as STQ1_0
    from .tq1_25 import TYPE as TQ1_25
    from .tq1_25_64 import TYPE as TQ1_25_64

    __version__: str

__all__ = [
    "STQ1_0", "TQ1_25", "TQ1_25_64", "ConvertError", "Gguf", "NotBuilt", "Options", "QuantizeError", "Stored", "__version__", "convert",
    "dequantize", "gguf_type", "inspect", "kernels", "llama_cpp", "quantize", "read_gguf", "retag", "transcode", "verify",
]  # fmt: skip

_MODULE_OF = {"Options": "convert", "ConvertError": "errors", "NotBuilt": "errors", "QuantizeError": "errors", "Gguf": "gguf_file",
              "Stored": "gguf_file", "read_gguf": "gguf_file", "dequantize": "kernels", "quantize": "kernels",
              "Llama": "llama_cpp_python"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("sherry-gguf")
    elif name in ("TQ1_25", "TQ1_25_64", "STQ1_0"):
        value = importlib.import_module(f".{name.lower()}", __name__).TYPE
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    elif name in __all__:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


_plugins.install()


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
