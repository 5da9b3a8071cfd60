"""What commands print: progress bars, tables, and names of tensors."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from . import patterns


def counted(n: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def progress_bar(wanted: bool, **settings) -> tqdm:
    """A tqdm on standard error, shown if `wanted` and on a terminal; `settings` go to tqdm."""
    return tqdm(disable=None if wanted and sys.stderr else True, **settings)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table. The columns in `left` are left-aligned, the others right-aligned."""
    aligned = ["left" if i in left else "right" for i in range(len(head))]
    text = tabulate([head, *rows], tablefmt="plain", colalign=aligned, disable_numparse=True)  # tabulate would widen a header
    return [line.rstrip() for line in text.splitlines()]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown: the first column left-aligned, the others right-aligned."""
    aligned = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, tablefmt="github", colalign=aligned, disable_numparse=True)


def sizes(tensors: Iterable[Any]) -> tuple[str, str, str]:
    """Weights, bytes and bits per weight of tensors that have `weights` and `nbytes`, as cells of a table."""
    tensors = list(tensors)
    weights, size = sum(t.weights for t in tensors), sum(t.nbytes for t in tensors)
    return f"{weights:,}", f"{size:,}", f"{8 * size / weights:.3f}" if weights else ""


def type_names(tensors: Iterable[Any]) -> str:
    """The names of the tensors' types: "TQ1_25 and TQ1_25_64"."""
    return " and ".join(sorted({t.type.name for t in tensors}))


def starred(tensors: Iterable[Any]) -> str:
    """The tensors' names; those that differ only in the block's number appear as one."""
    return patterns.starred(t.name for t in tensors)
