"""llama-cpp-python's class Llama on the built libraries, which know our types."""

import ctypes
import importlib
import logging
import os
from importlib import metadata
from pathlib import Path

from . import llama_cpp
from .errors import NotBuilt

VERSION = "0.3.36"  # the pinned llama.cpp's: bindings of another one do not fit the libraries
INSTALL = f"SKBUILD_WHEEL_CMAKE=false pip install --no-cache-dir llama-cpp-python=={VERSION}"  # without libraries, so needs no compiler


def _llama() -> type:
    """Import the package llama_cpp. Raises ImportError, NotBuilt."""
    library = llama_cpp.library("llama")
    try:
        installed = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"llama-cpp-python is not installed: {INSTALL}", name="llama_cpp") from None
    if installed != VERSION:
        raise ImportError(f"llama-cpp-python {installed} does not fit {library}: {INSTALL}", name="llama_cpp")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library.parent)  # children of this process need it too
    package = importlib.import_module("llama_cpp")
    loaded = getattr(getattr(getattr(package, "llama_cpp", None), "_lib", None), "_name", None)
    if not loaded:
        raise ImportError(f"another package named llama_cpp was imported, from {getattr(package, '__file__', 'nowhere')}", name="llama_cpp")
    if not os.path.samefile(loaded, library):
        raise ImportError(
            f"llama_cpp was imported before with {loaded}, which does not know our types: import Llama from sherry_gguf first, "
            "or from nothing else",
            name="llama_cpp",
        )
    _load_backends(library.parent)
    return package.Llama


def _load_backends(directory: Path) -> None:
    """Load ggml's backends if the build has them as files: by itself ggml looks for them beside Python. Raises NotBuilt."""
    ggml = ctypes.CDLL(str(llama_cpp.library("ggml")))
    if not ggml.ggml_backend_dev_count():
        logger = logging.getLogger("llama-cpp-python")
        level = logger.level
        logger.setLevel(logging.ERROR)  # no lines on stderr for an import
        ggml.ggml_backend_load_all_from_path(os.fsencode(directory))
        logger.setLevel(level)
        if not ggml.ggml_backend_dev_count():
            raise NotBuilt(f"{directory} has no libggml-cpu that runs on this CPU")


Llama = _llama()


def __getattr__(name: str) -> object:
    """The package's other names, such as LlamaGrammar: they may stand in a sorted list of imports, as llama_cpp's may not."""
    if name.startswith("__"):  # with the package's __path__, its modules would be imported a second time
        raise AttributeError(name)
    return getattr(importlib.import_module("llama_cpp"), name)
