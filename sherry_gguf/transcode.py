"""Changes the type of a GGUF file's ternary tensors and copies the rest, byte for byte.

TQ1_25, TQ1_25_64, STQ1_0, TQ1_0 and TQ2_0 tensors are ternary. So are F32, F16, BF16 and Q8_0 matrices if blocks of the new type hold all
their values, so that a Sherry model comes back from these types. Exact means that every value decodes to what it was.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import atomic, gguf_type, tq1_25, tq1_25_64
from .blocks import NOT_FINITE
from .errors import ConvertError, QuantizeError
from .gguf_file import Stored, bad_row, check_scales, check_shard, is_shard, split_files
from .reader import open_gguf, padded, part_at
from .report import counted, progress_bar, starred

TARGETS = ("tq1_25", "tq1_25_64", "stq1_0", "tq2_0", "q8_0", "f16")
TERNARY = (*gguf_type.TYPES, "TQ1_0", "TQ2_0")
OTHERS = ("F32", "F16", "BF16", "Q8_0")  # types that may hold ternary weights
FILE_TYPES = {"tq2_0": 37, "q8_0": 7, "f16": 1}  # general.file_type; the sparse types have their own
_CHUNK = 1 << 20  # weights encoded at a time, about
_COPY = 1 << 24  # bytes copied at a time


@dataclasses.dataclass
class Transcoded:
    """A tensor of the new file."""

    name: str
    shape: tuple[int, ...]  # NumPy's order
    type: Any  # gguf.GGMLQuantizationType
    nbytes: int
    source: Stored
    why: str = ""  # a ternary tensor keeps its type, or becomes TQ1_25_64 instead of TQ1_25
    # Known once a tensor whose type changes is written:
    blocks: int = 0  # of the new type
    exact: int = 0  # of the blocks
    squared_error: float = 0.0
    squares: float = 0.0
    sha256: bytes = b""

    @property
    def changes(self) -> bool:
        return self.type != self.source.type

    @property
    def relative_error(self) -> float:
        """|new - old| / |old|, Frobenius."""
        return math.sqrt(self.squared_error / self.squares) if self.squares else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] --to TYPE GGUF OUTPUT"
    parser.description = (
        "Change the type of a GGUF file's ternary tensors, exactly where the new type can hold the values, and list the tensors that lose "
        "precision. Everything else is copied."
    )
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="the file to read; for a split, run the command once for each file")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write")
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="TYPE", help=f"the new type: {', '.join(TARGETS)}")
    parser.add_argument("--require-exact", action="store_true", help="fail if any value would change")


def run(args: argparse.Namespace) -> int:
    for line in summary(*transcode(args.gguf, args.output, args.to, args.require_exact, progress=True)):
        print(line)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")
    return 0


def transcode(source: Path, target: Path, to: str, require_exact: bool = False, progress: bool = False) -> tuple[list[Transcoded], int]:
    """Write `source` with its ternary tensors as `to`, one of `TARGETS`.

    Handles one file, also of a split. Returns its tensors, and how many tensors in the split's other files lost their exactness flag: the
    first file has the flags of all tensors, but only its own can be checked.

    Raises ConvertError if there is nothing to transcode, for values that the type cannot hold, and with `require_exact` for those that
    it cannot hold exactly; then the target is as it was.
    """
    gguf = gguf_type.register()
    if to not in TARGETS:
        raise ConvertError(f"--to {to}: one of {', '.join(TARGETS)}")
    source, target = Path(source), Path(target)
    check_shard(source, target)
    target = atomic.writable(target)
    wanted = gguf.GGMLQuantizationType[to.upper()]
    reader = open_gguf(source)
    plan = [_planned(Stored.of(t, source), wanted, gguf) for t in reader.tensors]
    if not any(t.changes for t in plan) and not is_shard(source):  # a split's file is copied without any, so that the split stays whole
        types = sorted({t.source.type.name for t in plan})
        kept = "".join(f"; {line}" for line in _kept(plan))
        raise ConvertError(f"{source} has no tensor that could be {wanted.name} instead, of {', '.join(types)}{kept}")
    if target.exists() and target.samefile(source):
        raise ConvertError(f"{target} is the input file: name another one to write")
    lossy = is_shard(source) and wanted.name in TERNARY
    describes = "sherry.tensor.names" in reader.fields or reader.file_type_at() is not None  # the other files too
    elsewhere = list(_elsewhere(source)) if lossy and describes else []
    head = _head(reader, plan, to, (_planned(stored, wanted, gguf) for stored in elsewhere))
    alignment = int(reader.alignment)
    start = padded(len(head), alignment) if plan else len(head)
    needed = start + sum(padded(t.nbytes, alignment) for t in plan)
    stat = source.stat()
    holes = max(0, stat.st_size - 512 * getattr(stat, "st_blocks", stat.st_size))  # most of them stay
    with atomic.staging(target, needed, holes) as staging:
        new = staging / target.name
        with open(new, "wb") as out, progress_bar(progress, total=needed, unit="B", unit_scale=True) as bar:
            out.write(head)
            out.seek(start)  # padding is a hole, which reads as zeros
            bar.update(start)
            for t in plan:
                _write(out, t, alignment, bar, gguf)
            out.truncate()
            known = {t.name for t in plan} | {t.name for t in elsewhere if not _may_lose(t.type, wanted)}
            others = _clear_flags(reader, plan, out, known if lossy else None)
        if require_exact and (inexact := [t for t in plan if t.exact < t.blocks]):
            first = inexact[0]
            raise ConvertError(
                f"--require-exact: {len(inexact)} tensors have blocks that {wanted.name} cannot hold, such as {first.name} with "
                f"{first.blocks - first.exact} of {first.blocks}. Nothing was written"
            )
        atomic.reread(new, plan)
        atomic.commit([new], [target])
    return plan, others


def _elsewhere(source: Path) -> Iterator[Stored]:
    """The tensors in the other files of a split, without those of files that are missing or damaged."""
    for path in split_files(source):
        if path != source and path.exists():
            try:
                yield from [Stored.of(t, path) for t in open_gguf(path).tensors]
            except ConvertError:  # the user learns it when it is transcoded
                continue


def _may_lose(old, new) -> bool:
    """Whether `_planned` may turn a tensor of the type `old` into the ternary type `new` with loss."""
    return old != new and old.name in TERNARY and not {old.name, new.name} <= {tq1_25.NAME, tq1_25_64.TYPE.name}


def _planned(stored: Stored, wanted, gguf) -> Transcoded:
    t = Transcoded(stored.name, stored.shape, stored.type, stored.nbytes, stored)
    ternary = stored.type.name in TERNARY
    if stored.type == wanted or not (ternary or stored.type.name in OTHERS) or not stored.weights:
        return t
    if len(stored.shape) < 2 and not ternary:
        return t
    if not ternary and wanted.name in ("F16", "Q8_0"):
        return t
    n, size, small = stored.shape[-1], gguf.GGML_QUANT_SIZES[wanted][0], gguf.GGMLQuantizationType[tq1_25_64.TYPE.name]
    why = f"rows of {n} weights are not a multiple of {size}" if n % size else ""
    may_be_small = wanted.name == tq1_25.NAME and n % tq1_25_64.TYPE.size == 0
    if ternary and why:
        t.why = why
        return t
    if (not ternary or (may_be_small and stored.type == small)) and (why or not _fits(stored, wanted, gguf)):
        if not may_be_small or (stored.type != small and not _fits(stored, small, gguf)):
            return t
        wanted, why = small, why or f"scales differ within blocks of {size} weights"
    block, nbytes = gguf.GGML_QUANT_SIZES[wanted]
    t.type, t.nbytes, t.why = wanted, stored.weights // block * nbytes, why
    return t


def _write(out: BinaryIO, t: Transcoded, alignment: int, bar, gguf) -> None:
    digest = hashlib.sha256()
    for data in _data(t, gguf):
        digest.update(data)
        if len(data) == _COPY and not np.frombuffer(data, np.uint64).any():
            out.seek(_COPY, os.SEEK_CUR)  # zeros stay a hole
        else:
            out.write(data)
        bar.update(len(data))
    t.sha256 = digest.digest()
    out.seek(padded(t.nbytes, alignment) - t.nbytes, os.SEEK_CUR)


def _fits(stored: Stored, wanted, gguf) -> bool:
    """Whether blocks of the wanted type hold a matrix exactly. All zeros of a type that is not ternary are an unused matrix.

    Raises ConvertError for a damaged ternary matrix.
    """
    used = ternary = stored.type.name in TERNARY
    try:
        for x, _, exact, _ in _encoded(stored, wanted, gguf):
            if not exact.all():
                return False
            used = used or bool(x.any())
        return used
    except ConvertError:  # NaN, or too large
        if ternary:
            raise
        return False


def _encoded(stored: Stored, wanted, gguf) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """For each chunk of rows: float32 values, encoded bytes, which blocks are exact, decoded values."""
    size = gguf.GGML_QUANT_SIZES[wanted][0]
    n, rows = stored.shape[-1], math.prod(stored.shape[:-1])
    step = max(1, _CHUNK // n)
    for start in range(0, rows, step):
        raw = stored.read(start, step)
        if stored.type.name in gguf_type.TYPES:
            check_scales(stored, start, raw, gguf_type.TYPES[stored.type.name])
        with np.errstate(all="ignore"):  # NaN and infinities are found below
            x = gguf.quants.dequantize(raw, stored.type).reshape(-1, n)
        _check_finite(stored, start, x, NOT_FINITE)
        try:
            data = _encode(x, wanted, gguf)
        except QuantizeError as e:
            raise bad_row(stored, start + e.row, e.cause) from e
        back = gguf.quants.dequantize(data, wanted).reshape(x.shape)
        _check_finite(stored, start, back, f"a weight is beyond what {wanted.name} holds")
        yield x, data, (back == x).reshape(-1, size).all(axis=1), back


def _check_finite(stored: Stored, start: int, x: np.ndarray, cause: str) -> None:
    if not (finite := np.isfinite(x).all(axis=1)).all():
        raise bad_row(stored, start + int(finite.argmin()), cause)


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
    """ggml's Q8_0, but exact for ternary blocks, which its scale, a 127th of the largest value, would round."""
    data = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    blocks, out = x.reshape(-1, 32), data.reshape(-1, 34)
    d = np.abs(blocks).max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        half = d.astype(np.float16)
    ternary = ((np.abs(blocks) == d) | (blocks == 0)).all(axis=1) & (half == d)[:, 0]
    out[ternary, :2] = half[ternary].view(np.uint8).reshape(-1, 2)
    out[ternary, 2:] = np.sign(blocks[ternary]).astype(np.int8).view(np.uint8)
    return data


def _data(t: Transcoded, gguf) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in the new file; counts its exact blocks."""
    if not t.changes:
        with open(t.source.path, "rb") as f:
            f.seek(t.source.offset)
            left = t.nbytes
            while left:
                if not (data := f.read(min(left, _COPY))):
                    raise ConvertError(f"{t.source.path} ends within the tensor {t.name}")
                left -= len(data)
                yield data
        return
    for x, encoded, exact, back in _encoded(t.source, t.type, gguf):
        t.blocks += exact.size
        t.exact += int(exact.sum())
        t.squared_error += float(np.square(back.astype(np.float64) - x).sum())
        t.squares += float(np.square(x, dtype=np.float64).sum())
        yield np.ascontiguousarray(encoded).data.cast("B")


def _head(reader, plan: list[Transcoded], to: str, elsewhere: Iterator[Transcoded]) -> bytes:
    """The file's bytes before the tensors' data: the old metadata with the new file type, and a new table.

    elsewhere: what becomes of the tensors in a split's other files.
    """
    first = min((int(t.field.offset) for t in reader.tensors), default=len(reader.data))
    head = bytearray(reader.data[:first].tobytes())
    if (at := reader.file_type_at()) is not None:
        kind = gguf_type.TYPES.get(to.upper())
        if kind is tq1_25.TYPE:
            types = set()
            for t in itertools.chain(plan, elsewhere):
                types.add(t.type.name)
                if tq1_25.NAME in types:  # spares reading the rest
                    break
            if tq1_25.NAME not in types and tq1_25_64.TYPE.name in types:
                kind = tq1_25_64.TYPE
        head[at : at + 4] = struct.pack("<I", kind.file_type if kind else FILE_TYPES[to])
    offset = 0
    for old, new in zip(reader.tensors, plan):
        for part in old.field.parts[:4]:  # name and shape
            head += part.tobytes()
        head += struct.pack("<IQ", int(new.type), offset)
        offset += padded(new.nbytes, int(reader.alignment))
    return bytes(head)


def _clear_flags(reader, plan: list[Transcoded], out: BinaryIO, known: set[str] | None) -> int:
    """Clear the converter's exactness flags that this transcode invalidates, and update the relative errors.

    known: tensors that are in this file, or that lose nothing in a split's other files. The flags of all others are cleared too, and their
    errors become NaN. None: no other file loses anything. Returns the number of tensors cleared outside this file.
    """
    keys = ("tensor.names", "tensor.exact", "tensor.relative_error", "exact")
    names, exact, errors, every = (reader.fields.get(f"sherry.{key}") for key in keys)
    if names is None or exact is None or exact.parts[-1].dtype != np.bool_:
        return 0
    try:
        listed = list(names.contents())
    except (TypeError, ValueError):  # not a list, or not UTF-8: not the converter's
        return 0
    unknown = [name for name, flag in zip(listed, exact.parts[-1]) if known is not None and flag and name not in known]
    error_of = {t.name: t.relative_error for t in plan if t.exact < t.blocks} | dict.fromkeys(unknown, math.nan)
    for i, name in enumerate(listed[: len(exact.parts[-1])]):
        if name in error_of:
            out.seek(part_at(exact, -1) + i)
            out.write(b"\0")
            if errors is not None and errors.parts[-1].dtype == np.float32 and i < len(errors.parts[-1]):
                out.seek(part_at(errors, -1) + 4 * i)
                out.write(struct.pack("<f", math.hypot(errors.parts[-1][i], error_of[name])))  # as if the errors were independent
            if every is not None and every.parts[-1].dtype == np.bool_:
                out.seek(part_at(every, -1))
                out.write(b"\0")
    return len(unknown)


def summary(plan: list[Transcoded], others: int = 0) -> Iterator[str]:
    """Lines that describe what `transcode` returned."""
    changed = [t for t in plan if t.changes]
    if changed:
        exact = sum(t.exact == t.blocks for t in changed)
        counts = sorted(collections.Counter(t.type.name for t in changed).items())
        to = " and ".join(f"{name} ({n})" if len(counts) > 1 else name for name, n in counts)
        yield f"Converted {len(changed)} of {len(plan)} tensors to {to}, {exact} exactly; copied the rest unchanged."
    else:
        yield f"Converted none of {len(plan)} tensors; copied the file to go with the others of its split."
    for t in changed:
        if t.exact < t.blocks:
            yield f"not exact: {t.name}, {t.blocks - t.exact} of {t.blocks} blocks, relative error {t.relative_error:.4f}"
    if others:
        cleared = counted(others, "tensor")
        yield f"Cleared the exactness flags of {cleared} in the split's other files; transcoding those files shows what they lose."
    yield from _kept(plan)


def _kept(plan: list[Transcoded]) -> Iterator[str]:
    """Which tensors do not have the type that was asked for, and why."""
    by_why = collections.defaultdict(list)
    for t in plan:
        if t.why:
            by_why["stored" if t.changes else "kept", t.type.name, t.why].append(t)
    for (how, name, why), tensors in by_why.items():
        yield f"{how} as {name}, {why}: {starred(tensors)}"
