"""Proves that a GGUF of TQ1_25 and TQ1_25_64 holds what its checkpoint holds.

The conversion code says which type each tensor must have, and upstream's classes make the tensors, whole, as for an F32 file. The NumPy
reference decodes the file's blocks, or quantizes the tensor to the bytes that must be there. It trusts nothing that the file says about
itself.
"""

import argparse
import collections
import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import gguf_type, llama_cpp, ternary, tq1_25, tq1_25_64
from .blocks import NOT_FINITE, OVERFLOW
from .convert import Options, command
from .convert.checkpoint import Grouping, check_checkpoint, check_input, read_grouping
from .convert.metadata import add_metadata, check_token_count, sherry_metadata, tokenizer_problem
from .convert.plan import check_blocks, make_plan
from .convert.provenance import Checkpoint
from .convert.rows import CHUNK, computing
from .convert.tensor import Tensor, first_bad
from .convert.upstream import collect, instantiate, upstream
from .errors import QuantizeError
from .gguf_file import Gguf, Stored, read_gguf
from .report import progress_bar, starred


@dataclasses.dataclass
class Verdict:
    """What the comparison found. The file holds what the checkpoint holds if `problems` is empty."""

    exact: int = 0  # ternary tensors
    quantized: int = 0
    types: set[str] = dataclasses.field(default_factory=set)  # of these
    kept: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # other tensors by type
    changed: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)  # kept tensors that upstream changed, by how
    problems: list[str] = dataclasses.field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] GGUF MODEL_DIR"
    parser.description = (
        "Prove, tensor by tensor, that a converted GGUF holds what a model directory holds. Pass the same flags as for the conversion."
    )
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="the GGUF; for a split, any of its files")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="the model directory that it was made from")
    command.add_checkpoint_arguments(parser)


def run(args: argparse.Namespace) -> int:
    verdict = verify(args.gguf, args.model, command.options(args))
    for problem in verdict.problems:
        print(f"differs: {problem}")
    for change, tensors in verdict.changed.items():
        print(f"note: {change}, as llama.cpp stores it: {starred(tensors)}")
    by_type = ", ".join(f"{n} {qtype}" for qtype, n in sorted(verdict.kept.items()))
    kept = f"{verdict.kept.total()} kept in another type{f' ({by_type})' * bool(by_type)}"
    differences = f"{len(verdict.problems) or 'no'} difference{'s' * (len(verdict.problems) != 1)}"
    print(
        f"{verdict.exact} {' and '.join(sorted(verdict.types)) or tq1_25.NAME} tensors bit for bit as in the checkpoint, "
        f"{verdict.quantized} as the reference quantizes them, {kept}; {differences}"
    )
    return 1 if verdict.problems else 0


def verify(path: Path, model_dir: Path, options: Options | None = None) -> Verdict:
    """Compare a GGUF of TQ1_25 and TQ1_25_64 with its checkpoint, tensor by tensor and key by key.

    options: those of the conversion that change tensors or the tokenizer.

    Each tensor must have the type that conversion gives it. Ternary tensors must decode to the checkpoint's values or be the reference
    quantization of them, byte for byte; kept tensors must be the values rounded to their type. The values must be those in the
    checkpoint's files. Upstream's classes may move them, and may change those of kept tensors (`Verdict.changed`). The sherry.* keys must
    match what is found here, and all others what upstream makes of the checkpoint, except for names and authorship (general.*), which
    flags can set.

    Raises ConvertError, NotBuilt.
    """
    options = options or Options()
    upstream()  # before gguf is imported from elsewhere
    model_dir = Path(model_dir)
    stored = read_gguf(path)
    check_input(model_dir, options)
    import torch

    grouping = read_grouping(model_dir, options)
    verdict = Verdict()
    with torch.inference_mode():
        check_checkpoint(model_dir)
        plan = make_plan(instantiate(model_dir, options, "MOSTLY_F16"), options, grouping)
        model = instantiate(model_dir, options, "ALL_F32")
        expected = collect(model)
        checkpoint = Checkpoint(model)
        sources = {name: checkpoint.sources(name, info.tensor) for name, info in expected.items()}
        add_metadata(model, plan)
        check_blocks(model, plan, options)
        check_token_count(model, plan)
        for name in stored.tensors.keys() - expected.keys():
            verdict.problems.append(f"{name} is in the file and not in the checkpoint")
        sound = True  # all ternary tensors are as they must be
        with progress_bar(options.progress, iterable=plan, unit=" tensors") as bar:
            for t in bar:
                info, found = expected.pop(t.name), stored.tensors.get(t.name)
                if not t.raw:
                    info.tensor = model.wide.pop(t.name, info.tensor)
                    t.changed = checkpoint.change(sources[t.name], functools.partial(_values, info.tensor, t))
                if problem := _compare(model, info.tensor, t, found, grouping, verdict):
                    verdict.problems.append(t.name + problem)
                    sound = sound and not t.kind and (found or t).type.name not in gguf_type.TYPES
                t.data = info.tensor = None
        wanted = {key: (v.value, v.type, v.sub_type) for key, v in model.gguf_writer.kv_data[0].items()}
        wanted |= sherry_metadata([t for t in plan if t.kind], grouping)
        _compare_metadata(wanted, stored, sound, verdict)
        if problem := tokenizer_problem(model, stored.files[0], options):
            verdict.problems.append(f"tokenizer: {problem}")
    return verdict


_FIXED = tuple(f"general.{k}" for k in ("architecture", "type", "file_type", "alignment", "quantization_version"))
# Known only if every ternary tensor is as it must be.
_FOUND = ("sherry.exact", *(f"sherry.tensor.{k}" for k in ("names", "exact", "relative_error")))


def _compare_metadata(wanted: dict[str, tuple], stored: Gguf, sound: bool, verdict: Verdict):
    """wanted: key to value, type and, for arrays, type of the elements or None."""
    for key in dict.fromkeys([*wanted, *stored.fields]):
        if key.startswith("split.") or (key.startswith("general.") and key not in _FIXED):
            continue
        if key in _FOUND and not sound:
            continue
        # Summing the same numbers in another order may give the next float32.
        close = 2e-7 if key == "sherry.tensor.relative_error" else 0.0
        if key not in stored.fields:
            verdict.problems.append(f"{key} is missing from the file's metadata")
        elif key not in wanted:
            verdict.problems.append(f"{key} is in the file's metadata and not in the checkpoint")
        elif difference := _difference(stored.fields[key], stored.types[key], *wanted[key], close=close):
            verdict.problems.append(key + difference)


def _difference(stored: Any, types: tuple, wanted: Any, kind, element=None, *, close: float) -> str:
    """How a value differs from the wanted one, or ""; `close`: the relative difference that a float may have."""
    from gguf import GGUFValueType as V

    if kind == V.ARRAY:
        element = element or (V.UINT8 if isinstance(wanted, bytes) else V.get_type(wanted[0]))
        if types != (kind, element):
            return f" is of type {'/'.join(t.name for t in types)}, the checkpoint has {kind.name}/{element.name}"
        if len(stored) != len(wanted):
            return f" has {len(stored)} values, the checkpoint has {len(wanted)}"
        for i, (a, b) in enumerate(zip(stored, wanted)):
            if difference := _difference(a, (element,), b, element, close=close):
                return f"[{i}]{difference}"
        return ""
    if types != (kind,):
        return f" is of type {'/'.join(t.name for t in types)}, the checkpoint has {kind.name}"
    wanted = bytes(wanted).decode("utf-8") if isinstance(wanted, (bytes, bytearray)) else wanted
    same = math.isclose(stored, np.float32(wanted), rel_tol=close) if kind == V.FLOAT32 else stored == wanted
    return "" if same else f" is {_quoted(stored)}, the checkpoint has {_quoted(wanted)}"


def _quoted(value: Any) -> str:
    text = repr(value.value if isinstance(value, enum.Enum) else value)
    return text if len(text) <= 200 else text[:200] + "..."


def _compare(model, tensor, t: Tensor, found: Stored | None, grouping: Grouping, verdict: Verdict) -> str:
    """What is wrong with a tensor, or ""; counts it in the verdict, and its blocks in `t`."""
    if found is None:
        return " is missing from the file"
    if problem := _compare_data(tensor, t, found, grouping, verdict):
        return f": {problem}"
    if t.changed and t.kind:
        return f": llama.cpp's {type(model).__name__} changes the checkpoint's values: {t.changed}"
    if t.changed:
        verdict.changed.setdefault(t.changed, []).append(t)
    return ""


def _compare_data(tensor, planned: Tensor, t: Stored, grouping: Grouping, verdict: Verdict) -> str:
    import gguf

    if t.shape != planned.shape:
        return f"shape {t.shape}, the checkpoint has {planned.shape}"
    if t.type != planned.type:
        by_groups = {t.type.name, planned.type.name} == {tq1_25.NAME, tq1_25_64.TYPE.name} and not planned.why.startswith("as asked")
        flags = "--group-size or --granularity" if by_groups else "--keep, --output-tensor-type or --fallback-type"
        return (
            f"stored as {t.type.name}, but conversion with these flags stores {planned.type.name}. Pass the same flags as for the "
            f"conversion, such as {flags}"
        )
    if planned.raw:  # upstream packs it
        verdict.kept[t.type.name] += 1
        wanted = np.ascontiguousarray(gguf.LazyNumpyTensor.to_eager(tensor)).reshape(-1).view(np.uint8)
        return "" if np.array_equal(t.read().reshape(-1), wanted) else f"not the {t.type.name} data of llama.cpp"
    if planned.kind:
        return _compare_blocks(tensor, planned, t, grouping, verdict)
    verdict.kept[t.type.name] += 1
    for start, x in _rows(tensor, planned):
        if (stored := t.read(start, len(x))).tobytes() != _round(x.astype(np.float32), t.type).tobytes():
            return f"rows {start} to {start + len(stored) - 1} are not the checkpoint's values as {t.type.name}"
    return ""


def _compare_blocks(tensor, planned: Tensor, t: Stored, grouping: Grouping, verdict: Verdict) -> str:
    kind, size = gguf_type.TYPES[t.type.name], planned.group
    verdict.types.add(kind.name)
    scale = None
    for start, x in _rows(tensor, planned):
        blocks = t.read(start, len(x))
        y = kind.dequantize(blocks)
        same = (y == x).reshape(-1, kind.size).all(axis=1)
        error, x64, y64 = (a.astype(np.float64).reshape(-1) for a in (x - y, x, y))
        sums = np.array([error @ error, x64 @ x64, y64 @ y64, x64 @ y64])
        planned.add(same.size, int(same.sum()), 0, sums)
        if same.all():
            continue
        x = x.astype(np.float32)
        if size == kind.size and grouping.granularity != "per_tensor":
            try:
                reference = kind.quantize(x)
            except QuantizeError as e:
                raise planned.bad_row(start + e.row, e.cause) from e
        else:
            lanes, d = ternary.sparse_absmean(x, size)
            if grouping.granularity == "per_tensor":
                scale = _matrix_scales(tensor, planned) if scale is None else scale
                d = scale[start : start + len(x), None]
            if (large := (d >= 65520).any(axis=1)).any():
                raise planned.bad_row(start + int(large.argmax()), OVERFLOW)
            reference = kind.pack(lanes, np.repeat(d.astype(np.float16), size // kind.size, axis=-1))
        exact = same.reshape(len(x), -1).all(axis=1)
        if (wrong := (reference != blocks).any(axis=1) & ~exact).any():
            row, groups = start + int(wrong.argmax()), grouping.described([size])
            return f"row {row} holds neither the checkpoint's values nor their Sparse-AbsMean in {groups}"
    verdict.exact += planned.is_exact
    verdict.quantized += not planned.is_exact and not planned.changed
    return ""


def _matrix_scales(tensor, t: Tensor) -> np.ndarray:
    rows = [ternary.sparse_absmean(x.astype(np.float32), t.shape[-1])[1][:, 0] for _, x in _rows(tensor, t)]
    return np.concatenate(rows).reshape(-1, t.shape[-2]).mean(axis=1).repeat(t.shape[-2])


def _values(tensor, t: Tensor) -> Iterator[np.ndarray]:
    return (x for _, x in _rows(tensor, t))


def _rows(tensor, t: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, array (rows, width)) of each chunk of upstream's tensor: float32, or float64 if it is made from that."""
    import gguf

    width = t.shape[-1] if t.shape else 1
    start, step = 0, max(1, CHUNK // width)
    chunked = isinstance(tensor, gguf.LazyChunkedTensor)
    loaders: Iterable[Callable] = tensor._chunks if chunked else [lambda: gguf.LazyNumpyTensor.to_eager(tensor)]
    for load in loaders:
        with computing(t):
            piece = load()
        piece = np.asarray(piece).reshape(-1, width)
        for i in range(0, len(piece), step):
            x = piece[i : i + step]
            x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
            with np.errstate(over="ignore"):
                bad = first_bad(x.astype(np.float32, copy=False))
            if bad is not None:
                raise t.bad_row(start + i + bad, NOT_FINITE)
            yield start + i, x
        start += len(piece)


def _round(x: np.ndarray, qtype) -> np.ndarray:
    import gguf

    if qtype.name in ("F32", "F16", "BF16", "Q8_0"):
        return gguf.quants.quantize(x, qtype)
    return llama_cpp.ggml().quantize(qtype.name, x)
