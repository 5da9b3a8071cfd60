"""How a packed checkpoint says which layers are packed: `quantization_config` in config.json.

    "quantization_config": {"quant_method": "sherry", "modules": {"TQ1_25": ["model.layers.*.mlp.up_proj", ...]}}

A `*` stands for any number. The weights of each such layer are the tensor LAYER.qweight instead of LAYER.weight: the type's blocks,
uint8 (outputs, bytes of a row), in the order of docs/format.md.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from sherry_gguf import tq1_25, tq1_25_64
from sherry_gguf.blocks import BlockType
from sherry_gguf.patterns import star

METHOD = "sherry"
TENSOR = "qweight"
KINDS = {kind.name: kind for kind in (tq1_25.TYPE, tq1_25_64.TYPE)}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether this config.json is a packed checkpoint's."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == METHOD


def modules_of(packed: Mapping[str, BlockType], others: Iterable[str]) -> dict[str, list[str]]:
    """`modules` for these layers, as short as it can be without naming one of the `others`, which are not packed."""
    kinds: dict[str, set[str]] = collections.defaultdict(set)
    for name in others:
        kinds[star(name)].add("")
    for name, kind in packed.items():
        kinds[star(name)].add(kind.name)
    modules: dict[str, dict[str, None]] = {}
    for name, kind in packed.items():
        modules.setdefault(kind.name, {})[star(name) if len(kinds[star(name)]) == 1 else name] = None
    return {kind: list(names) for kind, names in modules.items()}


class Modules:
    """The layers that `modules` names. Raises ValueError if it is not as described above."""

    def __init__(self, modules: Any):
        if not isinstance(modules, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in modules.values()
        ):
            raise ValueError(f"quantization_config has modules {modules!r}, not an object of types and lists of layers")
        if unknown := modules.keys() - KINDS.keys():
            raise ValueError(f"quantization_config has layers of the type {unknown.pop()!r}; known are {', '.join(KINDS)}")
        self._kinds = {name: KINDS[kind] for kind, names in modules.items() for name in names}

    def kind(self, name: str) -> BlockType | None:
        """The type of a layer's blocks; None if it is not packed."""
        return self._kinds.get(name) or self._kinds.get(star(name))
