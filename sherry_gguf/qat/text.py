"""Text files as documents: plain text, JSON lines and Parquet, as a `datasets.Dataset` on disk."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sherry_gguf.errors import Stop

TEXT = (".txt", ".md", ".rst", ".py")  # suffixes that a directory is searched for, besides these:
TABLES = (".jsonl", ".json", ".parquet")
NO_TEXT = (".csv", ".tsv", ".arrow", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".tgz", ".pt", ".safetensors", ".gguf")


class TextError(Stop):
    """A file cannot be read as text."""


def load(names: Sequence[str | os.PathLike], column: str = "text"):
    """The documents in files and in all text files below directories, each directory's in order of names.

    A plain text file is one document, whatever its suffix. A table has a document in each row: `.jsonl`, `.json` (lines or one
    array of objects) and `.parquet`. Rows without text (null) are skipped. Files are UTF-8; all but Parquet may be compressed
    (`.gz`). `datasets` caches the documents and reads a file again once it has changed.

    Args:
        names: files and directories.
        column: name of the text's column, in tables and in the result.

    Returns:
        A datasets.Dataset with only that column, of strings.

    Raises:
        TextError: a file does not exist, has no text, or holds something else.
    """
    import datasets

    files = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if _suffix(p) in (*TEXT, *TABLES) and p.is_file())
            if not found:
                raise TextError(f"{path} has no files of text: {', '.join((*TEXT, *TABLES))}")
            files += found
        elif not path.is_file():
            raise TextError(f"{path}: no such file or directory")
        elif _suffix(path) in NO_TEXT or path.suffix.lower() in NO_TEXT:
            raise TextError(f"{path}: {path.suffix} files are not supported: make it plain text, .jsonl or .parquet")
        else:
            files.append(path)
    # the last three for the cache: a changed file may keep its name, its size and even its modification time
    stats = [(p, p.stat()) for p in files]
    known = tuple((str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats)  # datasets would split a list up
    try:
        return datasets.Dataset.from_generator(
            _rows, gen_kwargs={"files": known, "column": column},
            features=datasets.Features({column: datasets.Value("large_string")}))  # fmt: skip
    except datasets.exceptions.DatasetGenerationError as e:
        cause = e.__cause__ or e
        raise TextError(str(cause)) from cause


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _rows(files: tuple[tuple, ...], column: str) -> Iterator[dict[str, str]]:
    rows = 0
    for name, *_ in files:
        try:
            for where, text in _READERS.get(_suffix(Path(name)), _plain)(name, column):
                if isinstance(text, str):
                    rows += 1
                    yield {column: text}
                elif text is not None:
                    raise TextError(f"{where}: {column!r} is {type(text).__name__}, and not a string")
        except UnicodeDecodeError as e:
            raise TextError(f"{name}: byte {e.start} is not UTF-8") from e
        except TextError as e:
            raise TextError(f"{name}: {e}") from e
        except Exception as e:  # from gzip, json, pyarrow or the operating system
            raise TextError(f"{name}: {type(e).__name__}: {e}") from e
    if not rows:  # for which datasets has another message
        raise TextError(f"{files[0][0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: there is no text in it")


# Readers take a file's name and the column, and yield where each row is and its text.


def _open(name: str):
    return (gzip.open if name.lower().endswith(".gz") else open)(name, "rt", encoding="utf-8-sig")


def _plain(name: str, column: str) -> Iterator[tuple[str, object]]:
    with _open(name) as f:
        yield "", f.read()


def _json(name: str, column: str) -> Iterator[tuple[str, object]]:
    with _open(name) as f:
        beginning = ""
        while not beginning and (line := f.readline()):
            beginning = line.lstrip()
        f.seek(0)
        if beginning.startswith("["):
            for i, row in enumerate(json.load(f), 1):
                yield f"row {i}", _value(row, column, f"row {i}")
            return
        for i, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise TextError(f"line {i}: {e}") from e
                yield f"line {i}", _value(row, column, f"line {i}")


def _value(row: object, column: str, where: str) -> object:
    if not isinstance(row, dict):
        raise TextError(f"{where} is not an object")
    if column not in row:
        raise TextError(f"{where} has no column {column!r}, only {', '.join(map(repr, row)) or 'none'}")
    return row[column]


def _parquet(name: str, column: str) -> Iterator[tuple[str, object]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(name) as file:
        if column not in file.schema_arrow.names:
            raise TextError(f"it has no column {column!r}, only {', '.join(map(repr, file.schema_arrow.names))}")
        row = 0
        for batch in file.iter_batches(batch_size=1000, columns=[column]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield f"row {row}", text


_READERS = {".jsonl": _json, ".json": _json, ".parquet": _parquet}
