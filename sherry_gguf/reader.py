"""Opens GGUF files that nobody should trust: gguf's own reader, with each length, place and type looked at before it is used."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np

from . import gguf_type, stq1_0
from .convert import ConvertError

MAX_DIMS = 4  # GGML_MAX_DIMS


@dataclasses.dataclass
class Entry:
    """A tensor as a file's table has it: `type_at` is where in the file its type's number is, `start` where its data is."""

    name: str
    shape: tuple[int, ...]  # GGUF's order: the row's length first
    type_id: int
    type_at: int
    start: int


def open_gguf(path: Path, types: bool = True):
    """A gguf.GGUFReader of a file, with its tensors as `table`, a list of Entry. Raises ConvertError.

    With `types` each tensor is known to be within the file, whole, aligned, apart from the others and of a known type; without,
    types are not looked at, and neither are `tensors` there nor is anything known of the table but that it is one.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: {'not an ordinary file' if path.exists() else 'no such file'}")
    try:
        return _reader()(path, types)
    except _Problem as e:
        raise ConvertError(f"{path}: {e}") from e
    except Exception as e:  # gguf's reader fails in as many ways as there are bytes
        raise ConvertError(f"{path} is not a GGUF file, or is truncated or damaged: {type(e).__name__}: {e}") from e


class _Problem(Exception):
    """What is wrong with a tensor: its name and the cause."""


@functools.cache
def _reader():
    gguf = gguf_type.register()

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Path, types: bool):
            self.types, self.table = types, []
            super().__init__(path)
            if self.byte_order == "S":
                raise _Problem("it is of the other byte order, which the blocks of 3:4 sparse ternary weights are not made for")

        def _get(self, offset, dtype, count=1, override_order=None):
            # gguf's takes what there is, so that a count beyond the file's end is counted to in vain
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise EOFError(f"what begins at byte {int(offset)} would end at byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs, fields):
            for field in fields:
                shape = tuple(int(n) for n in field.parts[3])
                type_at = int(field.offset) + sum(int(part.nbytes) for part in field.parts[:4])
                self.table.append(Entry(field.name, shape, int(field.parts[4][0]), type_at, int(start_offs) + int(field.parts[5][0])))
            if self.types:
                self._check()
                super()._build_tensors(start_offs, fields)

        def _check(self):
            size, ends = len(self.data), []
            for e in self.table:
                tensor = f"tensor {e.name}" + f" ({' x '.join(map(str, e.shape))})" * bool(e.shape)
                if not 1 <= len(e.shape) <= MAX_DIMS:
                    raise _Problem(f"{tensor} has {len(e.shape)} dimensions, not 1 to {MAX_DIMS}")
                if e.type_id not in gguf.GGMLQuantizationType._value2member_map_:
                    old = f": if the file is of STQ1_0 as it was first, `sherry-gguf retag` mends it" * (e.type_id == stq1_0.OLD_TYPE_ID)
                    raise _Problem(f"{tensor} is of type {e.type_id}, which is none that is known here{old}")
                qtype = gguf.GGMLQuantizationType(e.type_id)
                block, nbytes = gguf.GGML_QUANT_SIZES[qtype]
                if e.shape[0] % block:
                    raise _Problem(f"{tensor} is {qtype.name}, in blocks of {block}: its rows are no whole blocks")
                if math.prod(e.shape) >= 1 << 63 or math.prod(n for n in e.shape if n) >= 1 << 63:
                    raise _Problem(f"{tensor} has more weights than 64 bits count")
                if e.start % self.alignment:
                    raise _Problem(f"{tensor} begins at byte {e.start}, not a multiple of the file's alignment, {self.alignment}")
                end = e.start + math.prod(e.shape) // block * nbytes
                if end > size:
                    raise _Problem(f"{tensor} would end at byte {end}, the file has {size}: it is truncated, or damaged")
                ends.append((e.start, end, e.name))
            ends.sort()
            for (_, end, one), (start, _, other) in zip(ends, ends[1:]):
                if start < end:
                    raise _Problem(f"tensors {one} and {other} overlap: one ends at byte {end}, the other begins at {start}")

    return Reader
