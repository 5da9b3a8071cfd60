"""What a GGUF model holds: the metadata and tensors of one file or of all files of a split."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import BlockType
from .errors import ConvertError
from .reader import open_gguf

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclasses.dataclass
class Stored:
    """A tensor in a GGUF file."""

    name: str
    type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # NumPy's order: the row's length last
    path: Path
    offset: int  # in the file, bytes
    nbytes: int

    @classmethod
    def of(cls, tensor: Any, path: Path) -> Stored:
        """From a tensor of a gguf.GGUFReader."""
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return cls(tensor.name, tensor.tensor_type, shape, path, int(tensor.data_offset), int(tensor.n_bytes))

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """Read `count` rows (default: all) from row `start` without mapping the file: uint8 (rows, bytes per row).

        Raises ConvertError if the file is too short.
        """
        rows = math.prod(self.shape[:-1])
        row_bytes = self.nbytes // max(rows, 1)
        count = rows - start if count is None else min(count, rows - start)
        data = np.fromfile(self.path, np.uint8, count * row_bytes, offset=self.offset + start * row_bytes)
        if data.size != count * row_bytes:
            raise ConvertError(f"{self.path} ends within the tensor {self.name}: the file changed while it was read")
        return data.reshape(count, row_bytes)


@dataclasses.dataclass
class Gguf:
    """A GGUF model: one file, or all files of a split."""

    files: list[Path]
    fields: dict[str, Any]  # metadata: key to value
    types: dict[str, tuple]  # key to (GGUFValueType,), for arrays (ARRAY, type of the elements)
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> Gguf:
    """Read a model's metadata and tensor tables; `path`: the file, or any file of a split. Raises ConvertError."""
    path = Path(path)
    files = split_files(path)
    model = Gguf(files, {}, {}, {})
    for file in files:
        reader = open_gguf(file)
        fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        try:
            values = {name: f.contents() for name, f in fields.items()}
        except Exception as e:  # not UTF-8, or anything else that bytes can be
            raise ConvertError(f"{file} is damaged: its metadata: {e}") from e
        model.fields = values | model.fields  # a split's later files hold only split.*
        model.types = {name: tuple(f.types) for name, f in fields.items()} | model.types
        for tensor in reader.tensors:
            if tensor.name in model.tensors:
                raise ConvertError(f"{file} repeats the tensor {tensor.name}")
            model.tensors[tensor.name] = Stored.of(tensor, file)
    expected = model.fields.get("split.tensors.count", len(model.tensors))
    if expected != len(model.tensors):
        names = ", ".join(f.name for f in files)
        raise ConvertError(f"{path} belongs to a split with {expected} tensors, but {names} have {len(model.tensors)}")
    return model


def bad_row(stored: Stored, row: int, cause: str) -> ConvertError:
    """An error that names a tensor's row."""
    return ConvertError(f"{stored.path}: tensor {stored.name}, row {row}: {cause}")


def check_scales(stored: Stored, start: int, rows: np.ndarray, kind: BlockType) -> None:
    """Raise ConvertError if a scale is negative or not finite in rows of blocks, uint8 (rows, bytes), from row `start` on."""
    d = rows.reshape(len(rows), -1, kind.bytes)[..., -2:].copy().view("<f2")[..., 0]
    if (bad := ~np.isfinite(d) | np.signbit(d)).any():
        row, block = np.argwhere(bad)[0]
        cause = f"the scale of block {block} is {d[row, block]}, which no {kind.name} has: the file is damaged"
        raise bad_row(stored, start + row, cause)


def is_shard(path: Path) -> bool:
    """Whether the name is that of a split's file."""
    return bool(_SHARD.search(path.name))


def check_shard(source: Path, target: Path) -> None:
    """Raise ConvertError if `source` is a split's file and `target` is not named like it."""
    shard, named = _SHARD.search(source.name), _SHARD.search(target.name)
    if shard and not (named and named[0] == shard[0]):
        raise ConvertError(
            f"{source} is file {int(shard[1])} of {int(shard[2])} of a split. Name the output so that it ends with {shard[0]}, "
            f"not {target.name}, and run the command once for each file"
        )


def split_files(path: Path) -> list[Path]:
    """All files of the split that the name belongs to, or the file alone."""
    if split := _SHARD.search(path.name):
        stem = path.name[: split.start()]
        named = [path.with_name(f"{stem}-{i + 1:05d}-of-{split[2]}.gguf") for i in range(int(split[2]))]
        if path in named:
            return named
    return [path]
