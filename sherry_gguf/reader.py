"""Opens GGUF files from untrusted sources: gguf's own reader, with every length, offset and type checked before use."""

import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import gguf_type, stq1_0
from .errors import ConvertError

MAX_DIMS = 4  # GGML_MAX_DIMS
_RETAG = "; `sherry-gguf retag` repairs the file if this is STQ1_0 by its old number, and says so if it is upstream's Q2_0"


@dataclasses.dataclass
class Entry:
    """A tensor in a file's table."""

    name: str
    shape: tuple[int, ...]  # GGUF's order: the row's length first
    type_id: int
    type_at: int  # offset of the type's number in the file
    start: int  # offset of the data


def open_gguf(path: Path, types: bool = True):
    """A gguf.GGUFReader of a file, with its tensor table, `table`: a list of Entry. Raises ConvertError.

    Each tensor has a known type and lies whole within the file, aligned and apart from the others. With `types=False` only the table is
    parsed and there are no `tensors`; call `problem()` to validate it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: {'not an ordinary file' if path.exists() else 'no such file'}")
    try:
        return _reader()(path, types)
    except (ConvertError, MemoryError, ImportError):
        raise
    except OSError as e:
        raise ConvertError(f"cannot read {path}: {e.strerror or e}") from e
    except Exception as e:  # gguf's reader fails in as many ways as there are bytes
        raise ConvertError(f"{path} is not a GGUF file, or is truncated or damaged: {type(e).__name__}: {e}") from e


def part_at(field: Any, i: int) -> int:
    """The offset in the file of a part of a gguf.ReaderField."""
    return int(field.offset) + sum(int(part.nbytes) for part in field.parts[:i])


def padded(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment


class _Table:
    """A reader's tensor table, and its checks."""

    path: Path
    data: np.ndarray  # the file's bytes
    alignment: int
    fields: Any
    table: list[Entry]
    data_start: int  # offset of the tensors' data

    def file_type_at(self) -> int | None:
        """The offset of general.file_type's 32 bits in the file; None if it is missing or has another type."""
        from gguf import GGUFValueType as V

        field = self.fields.get("general.file_type")
        if field is None or field.types not in ([V.UINT32], [V.INT32]):
            return None
        return part_at(field, -1)

    def problem(self, old: bool = False) -> str:
        """What is wrong with a tensor, by name, or ""; `old` takes type 42 for STQ1_0."""
        import gguf

        ends, names, alignment = [], set(), int(self.alignment)
        for e in self.table:
            tensor = f"tensor {e.name} ({' x '.join(map(str, e.shape))})"
            type_id = stq1_0.TYPE.type_id if old and e.type_id == stq1_0.OLD_TYPE_ID else e.type_id
            hint = _RETAG if type_id == stq1_0.OLD_TYPE_ID else ""
            if e.name in names:
                return f"{tensor} appears twice"
            names.add(e.name)
            if type_id not in gguf.GGMLQuantizationType._value2member_map_:
                return f"{tensor} has the unknown type {type_id}{hint}"
            qtype = gguf.GGMLQuantizationType(type_id)
            block, nbytes = gguf.GGML_QUANT_SIZES[qtype]
            if e.shape[0] % block:
                return f"{tensor}: its rows are not a multiple of {block}, the block of {qtype.name}"
            if math.prod(n for n in e.shape if n) >= 1 << 63:
                return f"{tensor} has more weights than 64 bits can count"
            if e.start % alignment:
                return f"{tensor} begins at byte {e.start}, not a multiple of the file's alignment, {alignment}"
            end = e.start + math.prod(e.shape) // block * nbytes
            if end > len(self.data):
                return f"{tensor} would end at byte {end}, the file has {len(self.data)}: it is truncated or damaged{hint}"
            ends.append((e.start, end, e.name, hint, qtype.name))
        ends.sort()
        for (_, end, one, hint, _), (start, _, other, *_) in zip(ends, ends[1:]):
            if start < end:
                return f"tensors {one} and {other} overlap: one ends at byte {end}, the other begins at {start}{hint}"
        return self._wrong_space(ends, alignment)

    def _wrong_space(self, ends: list[tuple], alignment: int) -> str:
        """Which tensor has more bytes in the file than its type takes: its number stands for another type, perhaps a fork's; or "".

        llama.cpp is as strict, except that it wants the tensors in the table's order and ignores junk after the last one. Here junk is an
        error, since nothing else tells that tensor's type.
        """
        if ends and ends[0][0] != self.data_start:
            start, _, name, *_ = ends[0]
            return f"the tensors' data begins at byte {self.data_start}, but the first tensor, {name}, at byte {start}"
        for i, (start, end, name, hint, qtype) in enumerate(ends):
            last = i + 1 == len(ends)
            space = (len(self.data) if last else ends[i + 1][0]) - start
            if space > padded(end - start, alignment):  # less: the last tensor lacks padding
                until = "end of the file" if last else "next tensor"
                return (
                    f"tensor {name} takes {end - start} bytes as {qtype}, but there are {space} up to the {until}: "
                    f"it was written as another type with this number, or the file is damaged{hint}"
                )
        return ""


@functools.cache
def _reader():
    """The reader's class, made late because a converting process first chooses its gguf package."""
    gguf = gguf_type.register()

    class Reader(_Table, gguf.GGUFReader):
        def __init__(self, path: Path, types: bool):
            self.path, self.types, self.table, self.entries, self.data_start = path, types, [], 0, 0
            super().__init__(path)
            if self.byte_order == "S":
                raise ConvertError(f"{path} has the other byte order, which 3:4 sparse ternary blocks do not support")

        def _get(self, offset, dtype, count=1, override_order=None):
            # gguf's returns what there is, and then a count beyond the file's end loops on and on
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise EOFError(f"data from byte {int(offset)} would end at byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            V = gguf.GGUFValueType
            kind = self._get(orig_offs, np.uint32) if raw_type == V.ARRAY else None
            if kind is None or kind[0] not in (V.STRING, *self.gguf_scalar_to_np):
                return super()._get_field_parts(orig_offs, raw_type)
            count = self._get(orig_offs + 4, np.uint64)
            types = [V.ARRAY] + [V(int(kind[0]))] * bool(count[0])
            # gguf's makes one or two arrays for each element: 15 us and 700 bytes a number, 20 us and 1700 bytes a string
            if kind[0] != V.STRING:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[V(int(kind[0]))], count[0])
                return 12 + values.nbytes, [kind, count, values], [2], types
            parts, at, data = [kind, count], int(orig_offs) + 12, memoryview(self.data)
            order = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            for _ in range(int(count[0])):
                end = at + 8 + int.from_bytes(data[at : at + 8], order)
                if at + 8 > len(data) or end > len(data):
                    raise EOFError(f"data from byte {at} would end at byte {max(end, at + 8)} of {len(data)}")
                parts.append(data[at + 8 : end])
                at = end
            return at - int(orig_offs), parts, list(range(2, len(parts))), types

        def _get_tensor_info_field(self, orig_offs):
            length, name = self._get_str(orig_offs)
            count = int(self._get(orig_offs + int(length.nbytes) + int(name.nbytes), np.uint32)[0])
            self.entries += 1
            if not 1 <= count <= MAX_DIMS:
                name = bytes(name).decode(errors="replace")
                raise ValueError(f"tensor {self.entries} of its table, {name!r}, has {count} dimensions, not 1 to {MAX_DIMS}")
            return super()._get_tensor_info_field(orig_offs)

        def _build_tensors(self, start_offs, fields):
            self.data_start = int(start_offs)
            for field in fields:
                shape = tuple(int(n) for n in field.parts[3])
                type_id, start = int(field.parts[4][0]), self.data_start + int(field.parts[5][0])
                self.table.append(Entry(field.name, shape, type_id, part_at(field, 4), start))
            if self.types:
                if problem := self.problem():
                    raise ConvertError(f"{self.path}: {problem}")
                super()._build_tensors(start_offs, fields)

    return Reader
