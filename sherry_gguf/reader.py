"""Opens GGUF files that nobody should trust: gguf's own reader, with each length, place and type looked at before it is used."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path

import numpy as np

from . import gguf_type, stq1_0
from .errors import ConvertError

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
    types are not looked at, and neither are `tensors` there nor is anything known of the table but that it is one: `problem`
    of the reader says what is wrong with it.
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


@functools.cache
def _reader():
    gguf = gguf_type.register()

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Path, types: bool):
            self.path, self.types, self.table, self.entries, self.data_start = path, types, [], 0, 0
            super().__init__(path)
            if self.byte_order == "S":
                raise ConvertError(f"{path} is of the other byte order, which the blocks of 3:4 sparse ternary weights are not made for")

        def _get(self, offset, dtype, count=1, override_order=None):
            # gguf's takes what there is, so that a count beyond the file's end is counted to in vain
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise EOFError(f"what begins at byte {int(offset)} would end at byte {end} of {len(self.data)}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            V = gguf.GGUFValueType
            kind = self._get(orig_offs, np.uint32) if raw_type == V.ARRAY else None
            if kind is None or kind[0] not in (V.STRING, *self.gguf_scalar_to_np):
                return super()._get_field_parts(orig_offs, raw_type)
            count = self._get(orig_offs + 4, np.uint64)
            types = [V.ARRAY] + [V(int(kind[0]))] * bool(count[0])
            # gguf's makes an array or two of each element: 15 us and 700 bytes a number, 20 us and 1700 bytes a text
            if kind[0] != V.STRING:
                values = self._get(orig_offs + 12, self.gguf_scalar_to_np[V(int(kind[0]))], count[0])
                return 12 + values.nbytes, [kind, count, values], [2], types
            parts, at, data = [kind, count], int(orig_offs) + 12, memoryview(self.data)
            order = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            for _ in range(int(count[0])):
                end = at + 8 + int.from_bytes(data[at : at + 8], order)
                if at + 8 > len(data) or end > len(data):
                    raise EOFError(f"what begins at byte {at} would end at byte {max(end, at + 8)} of {len(data)}")
                parts.append(data[at + 8 : end])
                at = end
            return at - int(orig_offs), parts, list(range(2, len(parts))), types

        def _get_tensor_info_field(self, orig_offs):
            length, name = self._get_str(orig_offs)
            count = int(self._get(orig_offs + int(length.nbytes) + int(name.nbytes), np.uint32)[0])
            self.entries += 1
            if not 1 <= count <= MAX_DIMS:
                raise ValueError(
                    f"tensor {self.entries} of its table, {bytes(name).decode(errors='replace')!r}, has {count} dimensions, not 1 to {MAX_DIMS}"
                )
            return super()._get_tensor_info_field(orig_offs)

        def _build_tensors(self, start_offs, fields):
            self.data_start = int(start_offs)
            for field in fields:
                shape = tuple(int(n) for n in field.parts[3])
                type_at = int(field.offset) + sum(int(part.nbytes) for part in field.parts[:4])
                self.table.append(Entry(field.name, shape, int(field.parts[4][0]), type_at, int(start_offs) + int(field.parts[5][0])))
            if self.types:
                if problem := self.problem():
                    raise ConvertError(f"{self.path}: {problem}")
                super()._build_tensors(start_offs, fields)

        def file_type_at(self) -> int | None:
            """Where in the file general.file_type's 32 bits are; None where it is missing or of another type."""
            field = self.fields.get("general.file_type")
            if field is None or field.types not in ([gguf.GGUFValueType.UINT32], [gguf.GGUFValueType.INT32]):
                return None
            return int(field.offset) + sum(int(part.nbytes) for part in field.parts[:-1])

        def problem(self, old: bool = False) -> str:
            """What is wrong with a tensor, by name, or ""; with `old` the number 42 is believed to be STQ1_0's."""
            size, ends, names, alignment = len(self.data), [], set(), int(self.alignment)
            for e in self.table:
                tensor = f"tensor {e.name}" + f" ({' x '.join(map(str, e.shape))})" * bool(e.shape)
                type_id = stq1_0.TYPE.type_id if old and e.type_id == stq1_0.OLD_TYPE_ID else e.type_id
                hint = ("; `sherry-gguf retag` mends the file if that is STQ1_0 as it was first, and tells if it is upstream's Q2_0"
                        * (type_id == stq1_0.OLD_TYPE_ID))  # fmt: skip
                if e.name in names:
                    return f"{tensor} is there twice"
                names.add(e.name)
                if type_id not in gguf.GGMLQuantizationType._value2member_map_:
                    return f"{tensor} is of type {type_id}, which is not known here{hint}"
                qtype = gguf.GGMLQuantizationType(type_id)
                block, nbytes = gguf.GGML_QUANT_SIZES[qtype]
                if e.shape[0] % block:
                    return f"{tensor} is {qtype.name}, in blocks of {block}: its rows are not whole blocks"
                if math.prod(n for n in e.shape if n) >= 1 << 63:
                    return f"{tensor} has more weights than 64 bits count"
                if e.start % alignment:
                    return f"{tensor} begins at byte {e.start}, not a multiple of the file's alignment, {alignment}"
                end = e.start + math.prod(e.shape) // block * nbytes
                if end > size:
                    return f"{tensor} would end at byte {end}, the file has {size}: it is truncated, or damaged{hint}"
                ends.append((e.start, end, e.name, hint, qtype.name))
            ends.sort()
            for (_, end, one, hint, _), (start, _, other, *_) in zip(ends, ends[1:]):
                if start < end:
                    return f"tensors {one} and {other} overlap: one ends at byte {end}, the other begins at {start}{hint}"
            return self._wrong_room(ends, alignment)

        def _wrong_room(self, ends: list[tuple], alignment: int) -> str:
            """Which tensor has more bytes in the file than its type takes: its number stands for another type, maybe of a fork.

            llama.cpp is as strict but in two points. Tensors may lie in another order than in the table here. And llama.cpp passes
            over junk behind the last tensor, which is refused here: nothing else tells that tensor's type.
            """
            if ends and ends[0][0] != self.data_start:
                start, _, name, *_ = ends[0]
                return f"the tensors' data begins at byte {self.data_start}, but the first of them, {name}, at byte {start}"
            for i, (start, end, name, hint, qtype) in enumerate(ends):
                last = i + 1 == len(ends)
                room = (len(self.data) if last else ends[i + 1][0]) - start
                if room > -(-(end - start) // alignment) * alignment:  # less: the last tensor lacks padding
                    return (f"tensor {name} takes {end - start} bytes as {qtype}, and has {room} up to the {'end of the file' if last else 'next tensor'}: "
                            f"it was written as another type of this number, or the file is damaged{hint}")  # fmt: skip
            return ""

    return Reader
