"""Writes the planned tensors to the target, whole or not at all, and says where the target is."""

import collections
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic, tq1_25, tq1_25_64
from ..errors import ConvertError
from ..report import progress_bar, starred
from . import metadata
from .checkpoint import Grouping, name_of
from .encode import Encoder
from .options import Options
from .tensor import Tensor

# ---- places ----


def target_of(model_dir: Path, options: Options) -> Path:
    """The file to write; a split derives its names from it. Raises ConvertError."""
    kind = "vocab" if options.vocab_only else tq1_25.NAME
    target = options.outfile or model_dir
    if os.path.isdir(target):
        target = target / f"{name_of(model_dir)}-{kind}.gguf"
    name = re.sub(r"\{(ftype|outtype)\}", kind.lower(), target.name)
    return _not_of_checkpoint(model_dir, target.with_name(name.replace("{FTYPE}", kind.upper())))


def files_of(model_dir: Path, target: Path, names: list[Path]) -> list[Path]:
    """Where the files with these names go. Raises ConvertError."""
    files = [_not_of_checkpoint(model_dir, f) for f in names]
    if len(set(files)) < len(files):
        raise ConvertError(f"cannot write {target}: two files of the split are symbolic links to the same place")
    return files


def _not_of_checkpoint(model_dir: Path, target: Path) -> Path:
    target = atomic.writable(target)
    if target.exists() and any(f.is_file() and f.suffix != ".gguf" and f.samefile(target) for f in model_dir.iterdir()):
        raise ConvertError(f"cannot write {target}: it is a file of the checkpoint itself. Name another --outfile")
    return target


def other_splits(target: Path, names: list[Path]) -> list[str]:
    """Names of files beside the target that another split of the same model left."""
    pattern = re.compile(re.escape(target.stem) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(f.name for f in target.parent.iterdir() if pattern.fullmatch(f.name) and f not in names)


# ---- writing ----


def set_tensors(writer: Any, plan: list[Tensor], options: Options):
    """Give upstream's writer the plan instead of its own tensors. Only now does it split, by the final sizes."""
    writer.tensors = [{} for _ in range(1 + options.no_tensor_first_split)]
    writer.split_max_tensors, writer.split_max_size = options.split_max_tensors, options.split_max_size
    for t in plan:
        writer.add_tensor_info(t.name, t.shape, np.float32, t.nbytes, raw_dtype=t.type)


class _Stream:
    """What upstream's writer takes for a tensor's data."""

    def __init__(self, t: Tensor, encoder: Encoder, bar: Any):
        self.nbytes, self.t, self.encoder, self.bar = t.nbytes, t, encoder, bar

    def tofile(self, file: Any):
        for weights, data in self.encoder.chunks(self.t):
            file.write(data)
            self.bar.update(weights)
        self.t.data = None


def write(model: Any, plan: list[Tensor], target: Path, files: list[Path], encoder: Encoder, grouping: Grouping, options: Options):
    """Encode the tensors to a staged file or split, check it, and move it to `files`. Raises ConvertError, NotBuilt."""
    with atomic.staging(target, sum(t.nbytes for t in plan)) as staging:
        writer = model.gguf_writer
        by_name = {t.name: t for t in plan}
        quantized = [t for t in plan if t.kind]
        offset = metadata.add_sherry(writer, quantized, grouping) if quantized else 0
        with (
            contextlib.closing(writer),
            progress_bar(options.progress, total=sum(t.weights for t in plan), unit=" weights", unit_scale=True) as bar,
        ):
            for part in writer.tensors:
                for name, info in part.items():
                    info.tensor = _Stream(by_name[name], encoder, bar)
            staged = writer.format_shard_names(staging / target.name)
            layout = [list(part) for part in writer.tensors]
            metadata.write_header(writer, model, staging / target.name)
            writer.write_tensors_to_file(progress=False)
        if options.require_exact:
            check_exact(model, quantized, grouping)
        if quantized:
            with open(staged[0], "r+b") as f:  # what is exact is known only now
                f.seek(offset)
                f.write(metadata.sherry_bytes(writer, quantized, grouping))
        for path, names in zip(staged, layout):
            atomic.reread(path, [by_name[n] for n in names])
        metadata.check_tokenizer(model, options, staged[0])
        atomic.commit(staged, files)


def check_exact(model: Any, quantized: list[Tensor], grouping: Grouping):
    """Raise ConvertError if a tensor does not hold the checkpoint's values."""
    if changed := [t for t in quantized if t.changed]:
        raise ConvertError(
            f"--require-exact: {len(changed)} of {len(quantized)} tensors do not hold the checkpoint's values: "
            f"{'; '.join(changes(model, changed))}. Nothing was written"
        )
    if inexact := [t for t in quantized if not t.is_exact]:
        groups = grouping.described(t.group for t in inexact)
        remedy = needing_64(inexact, grouping)
        if rest := [t for t in inexact if not t.needs_64]:
            remedy += [f"--keep keeps {'the others' if remedy else 'them'} unquantized" + f": {starred(rest)}" * bool(remedy)]
        raise ConvertError(
            f"--require-exact: {len(inexact)} of {len(quantized)} tensors are not 3:4 sparse ternary with fp16 scales "
            f"in {groups}, bit for bit (relative error up to {max(t.relative_error for t in inexact):.2g}): {starred(inexact)}. "
            f"{'. '.join(remedy)}. Nothing was written"
        )


def needing_64(tensors: list[Tensor], grouping: Grouping) -> list[str]:
    """Advice on matrices that are exact only in groups of 64: one text, or none."""
    if not (found := [t for t in tensors if t.kind and t.needs_64]):
        return []
    small = tq1_25_64.TYPE.size
    flags = f"--group-size {small}" + " --granularity per_group" * (grouping.granularity != "per_group")
    return [f"exact in groups of {small}, but not in {grouping.described(t.group for t in found)}: {starred(found)}. Pass {flags}"]


def changes(model: Any, tensors: list[Tensor]) -> Iterator[str]:
    """How upstream changes tensors, in words: a text for each kind of change."""
    by_change = collections.defaultdict(list)
    for t in tensors:
        by_change[t.changed].append(t)
    for change, changed in by_change.items():
        yield f"llama.cpp's {type(model).__name__} changes {starred(changed)}: {change}"
