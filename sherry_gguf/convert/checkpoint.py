"""What a model directory holds: whether it is whole, and how its weights were trained."""

import dataclasses
import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import gguf_type, ternary, tq1_25, tq1_25_64
from ..errors import ConvertError
from . import vocabulary
from .options import STORED_TYPES, Options
from .upstream import convert_errors, hparams, read_json, upstream


def name_of(model_dir: Path) -> str:
    """The model's name: that of its directory, or of the repository for a snapshot in the Hugging Face cache."""
    model_dir = model_dir.resolve()
    repository = model_dir.parent.parent.name
    if model_dir.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return model_dir.name


def check_input(model_dir: Path, options: Options):
    """Check the directory and the options' types as far as possible before anything is loaded. Raises ConvertError."""
    if not model_dir.is_dir():
        raise ConvertError(f"{model_dir} {'is not a directory' if model_dir.exists() else 'does not exist'}")
    with convert_errors(str(model_dir)):
        vocabulary.check_files(model_dir)
    for name in (options.token_embedding_type, options.output_tensor_type, options.fallback_type):
        if name is not None and name.upper() not in STORED_TYPES:
            raise ConvertError(f"unknown tensor type {name or repr(name)}: choose from {', '.join(STORED_TYPES)}")
    if options.fallback_type and options.fallback_type.upper() in gguf_type.TYPES:
        raise ConvertError(
            f"--fallback-type {options.fallback_type}: it is for the matrices that neither {tq1_25.NAME} nor {tq1_25_64.TYPE.name} fits. "
            "Choose another type"
        )


def check_checkpoint(model_dir: Path) -> dict[str, Path]:
    """The file of each tensor, after a check that all weight files that upstream will read are there and whole.

    Upstream reads the files that an index names, or without an index every file with such a name. If several files have a tensor, it
    takes the last one. Raises ConvertError.
    """
    hparams(model_dir)  # its error is the better one if this is not a model at all
    names = upstream().ModelBase.get_model_part_names
    for prefix, suffix in ("model", ".safetensors"), ("pytorch_model", ".bin"):
        index = model_dir / f"{prefix}{suffix}.index.json"
        if (parts := names(model_dir, prefix, suffix)) or index.is_file():
            break
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _weight_map(index)
        parts = list(weight_map.values())
    else:
        for part in list(parts):
            if n := re.search(r"-\d{5}-of-(\d{5})\.", part):
                parts += [f"{part[: n.start()]}-{i + 1:05}-of-{n[1]}{suffix}" for i in range(int(n[1]))]
    parts = sorted(set(parts))
    if not parts:
        raise ConvertError(f"{model_dir} has no weights: neither model*.safetensors nor pytorch_model*.bin")
    if missing := [n for n in parts if not (model_dir / n).is_file()]:
        raise ConvertError(f"{model_dir} lacks {', '.join(missing)}: {len(missing)} of {len(parts)} weight files. Download the rest")
    found: dict[str, str] = {}
    for part in parts:
        for name in _tensor_names(model_dir / part):
            if name in found:
                raise ConvertError(
                    f"{model_dir}: the tensor {name} is in {found[name]} and in {part}: remove the file that does not belong to the model"
                )
            if weight_map.get(name, part) != part:
                raise ConvertError(f"{index} has {name} in {weight_map[name]}, but it is in {part}: download the index and both again")
            found[name] = part
    return {name: model_dir / part for name, part in found.items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConvertError(f"{index} has no weight_map of tensors to files: download it again")
    return weight_map


def _tensor_names(path: Path) -> list[str]:
    broken = f"{path} ({path.stat().st_size} bytes) is truncated or damaged, download it again: "
    if path.suffix == ".safetensors":
        import safetensors

        try:
            with safetensors.safe_open(path, "np") as f:  # checks that the header and the file's length agree
                return list(f.keys())
        except safetensors.SafetensorError as e:
            raise ConvertError(broken + str(e)) from e
    import torch

    if not zipfile.is_zipfile(path):
        raise ConvertError(broken + "it is not a PyTorch zip archive (if it was saved before PyTorch 1.6, load it and save it again)")
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:
        cause = type(e).__name__
        raise ConvertError(f"{path} is damaged, or could only be read by running code in it: {cause}") from e
    if not isinstance(tensors, dict):
        raise ConvertError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    if other := {name: type(t).__name__ for name, t in tensors.items() if not isinstance(t, torch.Tensor)}:
        name = next(iter(other))
        raise ConvertError(
            f"{path} holds more than tensors by name: {name!r} is of type {other[name]}. Save the model's state_dict() alone"
        )
    return list(tensors)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which weights of a row share a scale, as the checkpoint was trained (config.json, key sherry_config)."""

    granularity: str = "per_group"  # or per_channel, per_tensor
    group_size: int = tq1_25.BLOCK  # of per_group
    group_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the modules that have another one
    weights: str = ""  # latent, fake_quantized, or "" if unknown
    kept: frozenset[str] = frozenset()  # the checkpoint's names of matrices that training kept in full precision

    def size_of(self, sources: Iterable[str]) -> int:
        """per_group: the weights that share a scale in a tensor of these tensors of the checkpoint.

        If they differ, as a stack of experts might, it is their greatest common divisor: its groups lie within those of all.
        """
        return math.gcd(*(self.group_sizes.get(name.removesuffix(".weight"), self.group_size) for name in sources)) or self.group_size

    def described(self, groups: Iterable[int]) -> str:
        """ "groups of 128", or the granularity; `groups`: those of the tensors that the text is about."""
        return f"groups of {' or '.join(map(str, sorted(set(groups))))}" if self.granularity == "per_group" else self.granularity


def read_grouping(model_dir: Path, options: Options) -> Grouping:
    """The checkpoint's sherry_config, which the options override. Raises ConvertError for what no block can hold."""
    config = read_json(path) if (path := model_dir / "config.json").is_file() else {}
    text = config.get("text_config")
    found = config.get("sherry_config") or (text.get("sherry_config") if isinstance(text, dict) else None) or {}
    if not isinstance(found, dict):
        raise ConvertError(f"{path}: sherry_config is {found!r}, not an object")
    where = f"{path}: sherry_config has "
    if (method := found.get("method", "sparse_absmean")) != "sparse_absmean":
        raise ConvertError(f"{where}method {method!r}; TQ1_25 stores sparse_absmean")
    if (pattern := (found.get("n", ternary.KEPT), found.get("m", ternary.GROUP))) != (ternary.KEPT, ternary.GROUP):
        raise ConvertError(f"{where}the sparsity {pattern[0]!r}:{pattern[1]!r}; TQ1_25 stores 3:4")
    if (weights := found.get("weights", "")) not in ("", "latent", "fake_quantized"):
        raise ConvertError(f"{where}weights {weights!r}, neither latent nor fake_quantized")
    kept = found.get("kept", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ConvertError(f"{where}kept {kept!r}, not a list of tensor names")
    granularity, size, sizes = found.get("granularity", "per_group"), found.get("group_size", tq1_25.BLOCK), found.get("group_sizes", {})
    if options.group_size is not None:
        where, granularity, size, sizes = "--group-size is given: ", "per_group", options.group_size, {}
    if options.granularity is not None:
        where, granularity = "--granularity is given: ", options.granularity
    if granularity not in ("per_group", "per_channel", "per_tensor"):
        raise ConvertError(f"{where}granularity {granularity!r}, not per_group, per_channel or per_tensor")
    if granularity != "per_group":
        return Grouping(granularity, weights=weights, kept=frozenset(kept))
    _check_size(f"{where}group_size {size!r}", size)
    if not isinstance(sizes, dict):
        raise ConvertError(f"{where}group_sizes {sizes!r}, not an object of modules and their group sizes")
    for name, of_module in sizes.items():
        _check_size(f"{where}group_sizes with {of_module!r} for {name}", of_module)
    return Grouping(granularity, size, sizes, weights, frozenset(kept))


def _check_size(what: str, size: Any):
    least = tq1_25_64.TYPE.size
    if type(size) is not int:
        raise ConvertError(f"{what}, not an integer: correct it, or pass the group size of training as --group-size")
    if size <= 0 or size % least:
        raise ConvertError(
            f"{what}. A TQ1_25 block holds {tq1_25.BLOCK} weights under one scale, a TQ1_25_64 block {least}, so groups must be a multiple "
            f"of {least}: train with such a group size, or pass --group-size {least} to quantize these weights again, with loss"
        )
