"""Registers this package with others when they are imported: the types with `gguf`, packed checkpoints with transformers.

So `import sherry_gguf` needs neither of them, and its place before or after theirs does not matter.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import threading
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# A module, and the function here that is called once it is imported.
PLUGINS = {"gguf": "gguf_type:register", "transformers.quantizers.auto": "packed.quantizer:register"}


def _register(name: str) -> None:
    if name.startswith("transformers.") and not importlib.util.find_spec("torch"):
        return  # then transformers has tokenizers alone
    module, _, function = PLUGINS[name].partition(":")
    try:
        imported = importlib.import_module(f".{module}", __package__)
        if register := getattr(imported, function, None):  # else it is being imported, and registers when it is done
            register()
    except (ImportError, AttributeError, ValueError) as e:  # another version; most programs need no more of it
        warnings.warn(f"sherry_gguf is not registered with {name}, which does not fit: {e}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of PLUGINS as the other finders do, and registers after their code has run."""

    def __init__(self) -> None:
        self._own = threading.local()  # what this thread searches: others may import the same

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        searching = self._own.__dict__.setdefault("names", set())
        if name not in PLUGINS or name in searching:
            return None
        searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            searching.remove(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(name)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with what is imported already, and with the others once they are. Idempotent."""
    ours = (_Finder.__module__, _Finder.__qualname__)  # by name: this module may have been imported before
    if not any((type(finder).__module__, type(finder).__qualname__) == ours for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in PLUGINS:
        if name in sys.modules:
            _register(name)
