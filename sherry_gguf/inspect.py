"""Describes a GGUF file: its metadata, types and sizes, and which tensors are exact."""

import argparse
import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import gguf_type, tq1_25, tq1_25_64
from .gguf_file import Gguf, Stored, read_gguf
from .report import counted, sizes, table, type_names

_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.pre")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] GGUF"
    parser.description = "Show what is in a GGUF: metadata, types, sizes, and which tensors are exact."
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="the GGUF; for a split, any of its files")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(args: argparse.Namespace) -> int:
    for text in inspect(args.gguf, args.tensors):
        print(text)
    return 0


def inspect(path: Path, tensors: bool = False) -> Iterator[str]:
    """Lines and tables that describe a GGUF file, or the split that it belongs to; `tensors`: list each tensor, too.

    Needs neither llama.cpp nor PyTorch. Raises ConvertError.
    """
    model = read_gguf(path)
    megabytes = sum(f.stat().st_size for f in model.files) / 1e6
    yield f"{path}: {megabytes:.1f} MB in {counted(len(model.files), 'file')}"
    arch = model.fields.get("general.architecture", "?")
    for key, value in model.fields.items():
        if key.startswith(("general.", f"{arch}.", "sherry.", "split.")) or key in _TOKENIZER:
            yield f"  {key:45} {_short(value)}"
    tokens = model.fields.get("tokenizer.ggml.tokens", [])
    count = f"{len(tokens)} tokens" if isinstance(tokens, list) else _short(tokens)
    yield f"  {'tokenizer.ggml.tokens':45} {count}"
    exact = _exact_flags(model)
    if exact:
        marked = sum(flag is True for flag in exact.values())
        names = type_names(model.tensors[name] for name in exact)
        yield f"  {marked} of {len(exact)} {names} tensors are marked exact: bit for bit the checkpoint's"
    yield ""
    by_type = collections.defaultdict(list)
    for t in model.tensors.values():
        by_type[t.type.name].append(t)
    rows = [(name, len(ts), *sizes(ts)) for name, ts in by_type.items()]
    rows.append(("total", len(model.tensors), *sizes(model.tensors.values())))
    yield from table(("type", "tensors", "weights", "bytes", "bits/weight"), rows)
    if tensors:
        yield ""
        flags = {name: {True: "yes", False: "no"}.get(flag, "") for name, flag in exact.items()}
        rows = [(t.name, t.type.name, " x ".join(map(str, t.shape)), flags.get(t.name, ""), _scales(t)) for t in model.tensors.values()]
        yield from table(("tensor", "type", "shape", "exact", "least and largest scale"), rows)


def _exact_flags(model: Gguf) -> dict[str, Any]:
    """The converter's exactness flags that still hold: other programs copy the flags when they change a type (docs/format.md)."""
    names, flags, sizes = (model.fields.get(f"sherry.tensor.{key}") for key in ("names", "exact", "group_size"))
    if not (isinstance(names, list) and isinstance(flags, list)):
        return {}
    if not isinstance(sizes, list):
        sizes = [model.fields.get("sherry.group_size", tq1_25.BLOCK)] * len(names)
    found = {}
    for name, flag, size in zip(names, flags, sizes):
        kind = model.tensors[name].type.name if name in model.tensors else ""
        if kind == tq1_25_64.TYPE.name or (kind == tq1_25.NAME and isinstance(size, int) and size % tq1_25.BLOCK == 0):
            found[name] = flag
    return found


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(_short, value[:3]))
        return f"[{shown}{', ...' if len(value) > 3 else ''}] ({len(value)})"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 70 else text[:67].replace("\n", " ") + "..."


def _scales(t: Stored) -> str:
    if t.type.name not in gguf_type.TYPES or not t.weights:
        return ""
    d = t.read().reshape(-1, gguf_type.TYPES[t.type.name].bytes)[:, -2:].copy().view("<f2")
    return f"{d.min():.4g} {d.max():.4g}"
