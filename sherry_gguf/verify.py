"""Reads a TQ1_25 GGUF back: shows what is in it, and proves it against the checkpoint that it was made from.

The proof shares no step with the conversion but upstream's classes: they make the tensors as for an F32 file, whole,
and the NumPy reference decodes the file's blocks, or quantizes the tensor and gives the bytes that must be there.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from . import convert, gguf_type, llama_cpp, ternary, tq1_25
from .convert import ConvertError, Grouping, Options

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclasses.dataclass
class Stored:
    """A tensor in a GGUF file."""

    name: str
    type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # NumPy's order
    path: Path
    offset: int
    nbytes: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int = 0, count: int | None = None) -> np.ndarray:
        """uint8 (rows, bytes of a row) of `count` rows, by default all, read without mapping the file."""
        rows = math.prod(self.shape[:-1])
        row_bytes = self.nbytes // rows
        count = rows - start if count is None else min(count, rows - start)
        data = np.fromfile(self.path, np.uint8, count * row_bytes, offset=self.offset + start * row_bytes)
        return data.reshape(count, row_bytes)


@dataclasses.dataclass
class Gguf:
    """A GGUF model: one file, or all of a split."""

    files: list[Path]
    fields: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf(path: Path) -> Gguf:
    """Read the metadata and the tensor table; of a split, any file stands for all. Raises ConvertError."""
    gguf = gguf_type.register()
    path = Path(path)
    files = [path]
    if split := _SHARD.search(path.name):
        stem = path.name[: split.start()]
        files = [path.with_name(f"{stem}-{i + 1:05d}-of-{split[2]}.gguf") for i in range(int(split[2]))]
    model = Gguf(files, {}, {})
    for file in files:
        if not file.is_file():
            raise ConvertError(f"{file}: no such file")
        try:
            reader = gguf.GGUFReader(file)
            fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
            tensors = [
                Stored(t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)), file, t.data_offset, t.n_bytes)
                for t in reader.tensors
            ]
        except Exception as e:  # the reader fails in as many ways as there are bytes
            raise ConvertError(f"{file} is not a GGUF file, or is truncated or damaged: {type(e).__name__}: {e}") from e
        model.fields = fields | model.fields  # a split's later files hold only split.*
        for t in tensors:
            if t.name in model.tensors:
                raise ConvertError(f"{file} repeats the tensor {t.name}")
            model.tensors[t.name] = t
    expected = model.fields.get("split.tensors.count", len(model.tensors))
    if expected != len(model.tensors):
        raise ConvertError(
            f"{path} belongs to a split with {expected} tensors, {len(model.tensors)} are in "
            f"{', '.join(f.name for f in files)}"
        )
    return model


# ---- inspect ----


def inspect(path: Path, tensors: bool = False) -> Iterator[str]:
    """The lines that describe a GGUF file. Needs neither llama.cpp nor PyTorch. Raises ConvertError."""
    model = read_gguf(path)
    arch = model.fields.get("general.architecture", "?")
    yield f"{path}: {sum(f.stat().st_size for f in model.files) / 1e6:.1f} MB in {len(model.files)} file(s)"
    for key, value in model.fields.items():
        if key.startswith(("general.", f"{arch}.", "sherry.", "split.")) or key in _TOKENIZER:
            yield f"  {key:45} {_short(value)}"
    yield f"  {'tokenizer.ggml.tokens':45} {len(model.fields.get('tokenizer.ggml.tokens', ()))} tokens"
    names, flags = (model.fields.get(f"sherry.tensor.{k}", []) for k in ("names", "exact"))
    if names:
        yield f"  {sum(flags)} of {len(names)} {tq1_25.NAME} tensors are exact: bit for bit those of the checkpoint"
    yield ""
    rows = collections.defaultdict(list)
    for t in model.tensors.values():
        rows[t.type.name].append(t)
    yield from table(
        ("type", "tensors", "weights", "bytes", "bits/weight"),
        [(name, len(ts), *_sizes(ts)) for name, ts in rows.items()]
        + [("total", len(model.tensors), *_sizes(model.tensors.values()))],
    )
    if tensors:
        exact = dict(zip(names, flags))
        yield ""
        yield from table(
            ("tensor", "type", "shape", "exact", "scales, from to"),
            [
                (
                    t.name,
                    t.type.name,
                    " x ".join(map(str, t.shape)),
                    {True: "yes", False: "no"}.get(exact.get(t.name), ""),
                    _scales(t),
                )
                for t in model.tensors.values()
            ],
        )


_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.pre")


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value[:3]))}{', ...' * (len(value) > 3)}] ({len(value)})"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 70 else text[:67].replace("\n", " ") + "..."


def _sizes(tensors) -> tuple[str, str, str]:
    weights, size = sum(t.weights for t in tensors), sum(t.nbytes for t in tensors)
    return f"{weights:,}", f"{size:,}", f"{8 * size / weights:.3f}" if weights else ""


def _scales(t: Stored) -> str:
    if t.type.name != tq1_25.NAME:
        return ""
    d = t.read().reshape(-1, tq1_25.BLOCK_BYTES)[:, 20:].copy().view("<f2")
    return f"{d.min():.4g} {d.max():.4g}"


def table(head: tuple, rows: list[tuple]) -> Iterator[str]:
    """Lines of a table: the first column left-aligned, the others right."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()


# ---- verify ----


@dataclasses.dataclass
class Verdict:
    """What the comparison found; `problems` is empty where the file holds what the checkpoint holds."""

    exact: int = 0
    quantized: int = 0
    kept: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


def verify(path: Path, model_dir: Path, options: Options = Options()) -> Verdict:
    """Compare a TQ1_25 GGUF with its checkpoint, tensor by tensor and key by key.

    TQ1_25 tensors must decode to the checkpoint's values, or else be the bytes of the reference quantization of them;
    kept ones must be the values rounded to the stored type. Metadata must be what upstream makes of the checkpoint,
    but for names and authorship (general.*), which flags can set. `options`: what conversion was given, as far as it
    changes tensors or tokenizer. Raises ConvertError, llama_cpp.NotBuilt.
    """
    convert.upstream()  # before gguf is imported from elsewhere
    model_dir = Path(model_dir)
    stored = read_gguf(path)
    if not model_dir.is_dir():
        raise ConvertError(f"{model_dir}: no such directory")
    import torch
    from tqdm import tqdm

    grouping = Grouping(
        stored.fields.get("sherry.granularity", "per_group"), stored.fields.get("sherry.group_size", tq1_25.BLOCK)
    )
    claims = dict(zip(stored.fields.get("sherry.tensor.names", ()), stored.fields.get("sherry.tensor.exact", ())))
    verdict = Verdict()
    with torch.inference_mode():
        convert.check_checkpoint(model_dir, options.mistral_format)
        model = convert.instantiate(model_dir, options, "ALL_F32", convert._Recorder)
        expected = convert.collect(model)
        _compare_metadata(model, stored, verdict)
        for name in stored.tensors.keys() - expected.keys():
            verdict.problems.append(f"{name} is in the file and not in the checkpoint")
        for name, info in tqdm(expected.items(), unit=" tensors", disable=None if options.progress else True):
            if name not in stored.tensors:
                verdict.problems.append(f"{name} is missing from the file")
                continue
            if problem := _compare(info, stored.tensors[name], grouping, claims.get(name), verdict):
                verdict.problems.append(f"{name}: {problem}")
            info.tensor = None
    return verdict


def _compare_metadata(model, stored: Gguf, verdict: Verdict):
    convert.add_metadata(model)
    wanted = {key: v.value for key, v in model.gguf_writer.kv_data[0].items()}
    ours = ("sherry.", "split.")
    for key in dict.fromkeys([*wanted, *stored.fields]):
        if key.startswith(ours) or (key.startswith("general.") and key not in _FIXED):
            continue
        if key not in stored.fields:
            verdict.problems.append(f"{key} is missing from the file's metadata")
        elif key not in wanted:
            verdict.problems.append(f"{key} is in the file's metadata and not in the checkpoint")
        elif not _same(stored.fields[key], wanted[key]):
            verdict.problems.append(f"{key} is {_short(stored.fields[key])}, the checkpoint has {_short(wanted[key])}")


_FIXED = ("general.architecture", "general.type", "general.file_type", "general.alignment")


def _same(stored: Any, wanted: Any) -> bool:
    if isinstance(wanted, (str, bytes)) or isinstance(stored, str):
        return stored == (wanted.decode("utf-8") if isinstance(wanted, bytes) else wanted)
    if isinstance(stored, list):
        return len(stored) == len(wanted) and all(map(_same, stored, wanted))
    return stored == wanted or (isinstance(stored, float) and np.float32(stored) == np.float32(wanted))


def _compare(info, t: Stored, grouping: Grouping, claim: bool | None, verdict: Verdict) -> str:
    """What is wrong with a tensor, or ""; counts it in the verdict."""
    import gguf

    shape = tuple(int(n) for n in info.shape)
    if t.shape != shape:
        return f"shape {t.shape}, the checkpoint has {shape}"
    if info.dtype != gguf.GGMLQuantizationType.F32:  # what upstream packs itself
        verdict.kept += 1
        wanted = np.ascontiguousarray(gguf.LazyNumpyTensor.to_eager(info.tensor)).reshape(-1).view(np.uint8)
        same = t.type == info.dtype and np.array_equal(t.read().reshape(-1), wanted)
        return "" if same else f"not the {info.dtype.name} data that llama.cpp makes of it"
    if t.type.name == tq1_25.NAME:
        return _compare_blocks(info.tensor, t, grouping, claim, verdict)
    verdict.kept += 1
    for start, x in _rows(info.tensor, t.shape[-1] if t.shape else 1):
        if (stored := t.read(start, len(x))).tobytes() != _round(x, t.type).tobytes():
            return f"rows {start} to {start + len(stored) - 1} are not the checkpoint's values as {t.type.name}"
    return ""


def _compare_blocks(tensor, t: Stored, grouping: Grouping, claim: bool | None, verdict: Verdict) -> str:
    exact = True
    size = t.shape[-1] if grouping.granularity != "per_group" else grouping.group_size
    scale = None
    for start, x in _rows(tensor, t.shape[-1]):
        blocks = t.read(start, len(x))
        same = tq1_25.dequantize(blocks) == x
        if same.all():
            continue
        exact = False
        if size == tq1_25.BLOCK:
            reference = tq1_25.quantize(x)
        else:
            lanes, d = ternary.sparse_absmean(x, size)
            if grouping.granularity == "per_tensor":
                scale = _matrix_scales(tensor, t) if scale is None else scale
                d = scale[start : start + len(x), None]
            reference = tq1_25.pack(lanes, np.repeat(d.astype(np.float16), size // tq1_25.BLOCK, axis=-1))
        if (wrong := (reference != blocks).any(axis=1) & ~same.all(axis=1)).any():
            return (
                f"row {start + int(wrong.argmax())} holds neither the checkpoint's values nor their Sparse-AbsMean "
                f"in {grouping}"
            )
    verdict.exact += exact
    verdict.quantized += not exact
    if claim is not None and claim != exact:
        return f"sherry.tensor.exact says {claim}, it is {'' if exact else 'not '}exact"
    return ""


def _matrix_scales(tensor, t: Stored) -> np.ndarray:
    rows = [ternary.sparse_absmean(x, t.shape[-1])[1][:, 0] for _, x in _rows(tensor, t.shape[-1])]
    return np.concatenate(rows).reshape(-1, t.shape[-2]).mean(axis=1).repeat(t.shape[-2])


def _rows(tensor, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 (rows, width)) of what upstream makes of a tensor."""
    import gguf

    start, step = 0, max(1, convert.CHUNK // width)
    pieces = (
        (load() for load in tensor._chunks)
        if isinstance(tensor, gguf.LazyChunkedTensor)
        else (gguf.LazyNumpyTensor.to_eager(t) for t in (tensor,))
    )
    for piece in pieces:
        piece = piece.reshape(-1, width)
        for i in range(0, len(piece), step):
            yield start + i, piece[i : i + step].astype(np.float32, copy=False)
        start += len(piece)


def _round(x: np.ndarray, qtype) -> np.ndarray:
    import gguf

    if qtype.name in ("F32", "F16", "BF16", "Q8_0"):
        return gguf.quants.quantize(x, qtype)
    return llama_cpp.quantize_rows(x, qtype.name)
