"""A GGUF file's ternary tensors in another type, tensor by tensor; everything else as it is, byte for byte.

What is ternary by its type (TQ1_25, STQ1_0, TQ1_0, TQ2_0) is transcoded; F32, F16, BF16 and Q8_0 matrices are where every block
of the target holds their values, which brings back what was ternary once. Exact means that each value decodes to what it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import atomic, gguf_type
from .blocks import NOT_FINITE, BlockType
from .errors import ConvertError, QuantizeError
from .gguf_file import Stored, check_shard, is_shard, padded
from .reader import open_gguf
from .report import progress_bar

TARGETS = ("tq1_25", "stq1_0", "tq2_0", "q8_0", "f16")
TERNARY = (*gguf_type.TYPES, "TQ1_0", "TQ2_0")
OTHERS = ("F32", "F16", "BF16", "Q8_0")  # that may hold ternary weights
FILE_TYPES = {"tq2_0": 37, "q8_0": 7, "f16": 1}  # general.file_type; the sparse types have their own
_ROWS = 1 << 20  # weights handled at a time, about
_COPY = 1 << 24  # bytes


@dataclasses.dataclass
class Moved:
    """A tensor of the new file, in the terms of `atomic.reread`."""

    name: str
    old: Any  # gguf.GGMLQuantizationType
    type: Any
    shape: tuple[int, ...]  # NumPy's order
    nbytes: int
    source: Stored
    blocks: int = 0  # of the target's, where the type changed
    exact: int = 0
    squared_error: float = 0.0
    squares: float = 0.0
    why: str = ""  # it stayed as it is, where one might have thought otherwise
    sha256: bytes = b""

    @property
    def relative_error(self) -> float:
        """|new - old| / |old|, Frobenius."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0


def transcode(source: Path, target: Path, to: str, require_exact: bool = False, progress: bool = False) -> tuple[list[Moved], int]:
    """Write `source` with its ternary tensors as `to`, one of `TARGETS`; what became of each tensor, and how many there are of other
    files that no longer count as exact: the first file of a split says of all its tensors which are, and knows of its own alone.

    Of a split one file is handled, not all. The target is there whole, or as it was before. Raises ConvertError, also where
    there is nothing to transcode, and with `require_exact` where a block's values cannot be held.
    """
    gguf = gguf_type.register()
    if to not in TARGETS:
        raise ConvertError(f"--to {to}: one of {', '.join(TARGETS)}")
    source, target = Path(source), Path(target)
    check_shard(source, target)
    target = atomic.writable(target)
    wanted = gguf.GGMLQuantizationType[to.upper()]
    reader = open_gguf(source)
    plan = [_plan(t, source, wanted, gguf) for t in reader.tensors]
    if not any(m.type != m.old for m in plan) and not is_shard(source):  # of a split, one without any goes along
        held = sorted({m.old.name for m in plan})
        raise ConvertError(f"{source} has no tensor that could be {wanted.name} instead, of {', '.join(held)}")
    if target.exists() and target.samefile(source):
        raise ConvertError(f"{target} is the file itself: name another one to write")
    head = _head(reader, plan, to)
    start = padded(len(head), int(reader.alignment)) if plan else len(head)
    needed = start + sum(padded(m.nbytes, int(reader.alignment)) for m in plan)
    holes = max(0, source.stat().st_size - 512 * getattr(source.stat(), "st_blocks", math.inf))  # most of them stay
    with atomic.staging(target, needed, holes) as staging:
        new = staging / target.name
        with open(new, "wb") as out, progress_bar(progress, total=needed, unit="B", unit_scale=True) as bar:
            out.write(head)
            out.seek(start)  # padding is zeros, as a hole
            bar.update(start)
            for m in plan:
                digest = hashlib.sha256()
                for data in _data(m, gguf):
                    digest.update(data)
                    if len(data) == _COPY and not np.frombuffer(data, np.uint64).any():
                        out.seek(_COPY, os.SEEK_CUR)  # a hole stays one
                    else:
                        out.write(data)
                    bar.update(len(data))
                m.sha256 = digest.digest()
                out.seek(padded(m.nbytes, int(reader.alignment)) - m.nbytes, os.SEEK_CUR)
            out.truncate()
            unknown = _correct(reader, plan, out, is_shard(source) and wanted.name in TERNARY)
        if require_exact and (inexact := [m for m in plan if m.exact < m.blocks]):
            raise ConvertError(
                f"--require-exact: {len(inexact)} tensors have blocks that {wanted.name} cannot hold, {inexact[0].name} "
                f"{inexact[0].blocks - inexact[0].exact} of {inexact[0].blocks}. Nothing was written"
            )
        atomic.reread(new, plan)
        atomic.commit([new], [target])
    return plan, unknown


def _plan(t, path: Path, wanted, gguf) -> Moved:
    stored = Stored.of(t, path)
    m = Moved(t.name, t.tensor_type, t.tensor_type, stored.shape, stored.nbytes, stored)
    ternary = t.tensor_type.name in TERNARY
    if t.tensor_type == wanted or not (ternary or t.tensor_type.name in OTHERS) or not stored.weights:
        return m
    if len(stored.shape) < 2 and not ternary:
        return m
    size, nbytes = gguf.GGML_QUANT_SIZES[wanted]
    if stored.shape[-1] % size:
        m.why = f"rows of {stored.shape[-1]} are not whole blocks of {size}" if ternary else ""
        return m
    if not ternary and (wanted.name in ("F16", "Q8_0") or not _fits(stored, wanted, gguf)):
        return m
    m.type, m.nbytes = wanted, stored.weights // size * nbytes
    return m


def _fits(stored: Stored, wanted, gguf) -> bool:
    try:
        zero = True
        for x, _, exact, _ in _encoded(stored, wanted, gguf):
            if not exact.all():
                return False
            zero = zero and not x.any()
        return not zero  # which is no ternary matrix, but one that is not used, or a bias
    except ConvertError:  # NaN, or too large
        return False


def _encoded(stored: Stored, wanted, gguf) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of some rows at a time: values, bytes, which blocks are exact, what they decode to."""
    size = gguf.GGML_QUANT_SIZES[wanted][0]
    n, rows = stored.shape[-1], math.prod(stored.shape[:-1])
    step = max(1, _ROWS // n)
    for start in range(0, rows, step):
        raw = stored.read(start, step)
        if stored.type.name in gguf_type.TYPES:
            _check_scales(stored, start, raw, gguf_type.TYPES[stored.type.name])
        with np.errstate(all="ignore"):  # what is no number is looked for below
            x = gguf.quants.dequantize(raw, stored.type).reshape(-1, n)
        if not (finite := np.isfinite(x).all(axis=1)).all():
            raise ConvertError(f"{stored.path}: tensor {stored.name}, row {start + int(finite.argmin())}: {NOT_FINITE}")
        try:
            data = _encode(x, wanted, gguf)
        except QuantizeError as e:
            raise ConvertError(f"{stored.path}: tensor {stored.name}, row {start + e.row}: {e.cause}") from e
        back = gguf.quants.dequantize(data, wanted).reshape(x.shape)
        if not (finite := np.isfinite(back).all(axis=1)).all():
            raise ConvertError(
                f"{stored.path}: tensor {stored.name}, row {start + int(finite.argmin())}: a weight is beyond what {wanted.name} holds"
            )
        yield x, data, (back == x).reshape(-1, size).all(axis=1), back


def _check_scales(stored: Stored, start: int, rows: np.ndarray, kind: BlockType):
    d = rows.reshape(len(rows), -1, kind.bytes)[..., -2:].copy().view("<f2")[..., 0]
    if (bad := ~np.isfinite(d) | np.signbit(d)).any():
        row, block = np.argwhere(bad)[0]
        raise ConvertError(
            f"{stored.path}: tensor {stored.name}, row {start + row}, block {block}: its scale is {d[row, block]}, which no "
            f"{kind.name} has: the file is damaged"
        )


def _encode(x: np.ndarray, wanted, gguf) -> np.ndarray:
    if wanted.name in gguf_type.TYPES:
        from . import kernels

        return kernels.quantize(x, kind=gguf_type.TYPES[wanted.name])
    if wanted.name == "F16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint8)
    if wanted.name == "Q8_0":
        return _q8_0(x, gguf)
    return gguf.quants.quantize(x, wanted)


def _q8_0(x: np.ndarray, gguf) -> np.ndarray:
    """As usual, but where a block is ternary: the usual scale, a 127th of the largest value, would round it."""
    data = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    blocks, out = x.reshape(-1, 32), data.reshape(-1, 34)
    d = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        half = d.astype(np.float16)
    ternary = ((np.abs(blocks) == d) | (blocks == 0)).all(axis=1) & (half == d)[:, 0]
    out[ternary, :2] = half[ternary].view(np.uint8).reshape(-1, 2)
    out[ternary, 2:] = np.sign(blocks[ternary]).astype(np.int8).view(np.uint8)
    return data


def _data(m: Moved, gguf) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in the new file; counts what is exact."""
    if m.type == m.old:
        with open(m.source.path, "rb") as f:
            f.seek(m.source.offset)
            left = m.nbytes
            while left:
                data = f.read(min(left, _COPY))
                if not data:
                    raise ConvertError(f"{m.source.path} ends within the tensor {m.name}")
                left -= len(data)
                yield data
        return
    for x, data, exact, back in _encoded(m.source, m.type, gguf):
        m.blocks += exact.size
        m.exact += int(exact.sum())
        m.squared_error += float(np.square(back.astype(np.float64) - x).sum())
        m.squares += float(np.square(x, dtype=np.float64).sum())
        yield memoryview(np.ascontiguousarray(data)).cast("B")


def _head(reader, plan: list[Moved], to: str) -> bytes:
    """All before the tensors' data: the metadata as it is, but for the file type; the table anew."""
    first = min((int(t.field.offset) for t in reader.tensors), default=len(reader.data))
    head = bytearray(reader.data[:first].tobytes())
    if (at := reader.file_type_at()) is not None:
        head[at : at + 4] = struct.pack("<I", gguf_type.TYPES[to.upper()].file_type if to.upper() in gguf_type.TYPES else FILE_TYPES[to])
    offset, alignment = 0, int(reader.alignment)
    for t, m in zip(reader.tensors, plan):
        for part in t.field.parts[:4]:  # name and shape
            head += part.tobytes()
        head += struct.pack("<IQ", int(m.type), offset)
        offset += padded(m.nbytes, alignment)
    return bytes(head)


def _correct(reader, plan: list[Moved], out: BinaryIO, doubt: bool) -> int:
    """What the converter wrote of its tensors' exactness, where it is so no more; with `doubt` also of tensors that are not in this
    file, with a relative error that is no number. How many these are.
    """
    names, exact, errors, every = (
        reader.fields.get(f"sherry.{k}") for k in ("tensor.names", "tensor.exact", "tensor.relative_error", "exact")
    )
    here = {m.name for m in plan}
    of_name = {m.name: m.relative_error for m in plan if m.exact < m.blocks}
    if names is None or exact is None or exact.parts[-1].dtype != np.bool_:
        return 0
    try:
        listed = list(names.contents())
    except (TypeError, ValueError):  # no list, or no text: none of the converter's
        return 0
    unknown = [name for name, flag in zip(listed, exact.parts[-1]) if doubt and flag and name not in here]
    of_name |= dict.fromkeys(unknown, math.nan)

    def last_part(field) -> int:
        return int(field.offset) + sum(int(p.nbytes) for p in field.parts[:-1])

    for i, name in enumerate(listed[: len(exact.parts[-1])]):
        if name in of_name:
            out.seek(last_part(exact) + i)
            out.write(b"\0")
            if errors is not None and errors.parts[-1].dtype == np.float32 and i < len(errors.parts[-1]):
                out.seek(last_part(errors) + 4 * i)  # as if they were independent, if there was one before
                out.write(struct.pack("<f", math.hypot(errors.parts[-1][i], of_name[name])))
            if every is not None and every.parts[-1].dtype == np.bool_:
                out.seek(last_part(every))
                out.write(b"\0")
    return len(unknown)


def summary(plan: list[Moved], unknown: int = 0) -> Iterator[str]:
    """The lines that say what became of the tensors: `transcode`'s results."""
    moved = [m for m in plan if m.type != m.old]
    exact = [m for m in moved if m.exact == m.blocks]
    if moved:
        yield (
            f"{len(moved)} of {len(plan)} tensors are {moved[0].type.name} now, {len(exact)} of them exact: each value as it was; the "
            "others' bytes are the same"
        )
    else:
        yield f"none of {len(plan)} tensors is another type now: a copy, that goes with the other files of its split"
    for m in moved:
        if m.exact < m.blocks:
            yield f"not exact: {m.name}, {m.blocks - m.exact} of {m.blocks} blocks, relative error {m.relative_error:.4f}"
    if unknown:
        yield f"{unknown} tensors of the split's other files no longer count as exact in sherry.tensor.exact; their files' calls say what they are"
    for m in plan:
        if m.why:
            yield f"left as it is: {m.name}, {m.old.name}: {m.why}"
