"""Documents from files, directories and data sets: what training commands read."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets

from sherry_gguf.errors import Stop

TEXT = (".txt", ".md", ".rst", ".py")  # suffixes that a directory is searched for, besides these:
TABLES = (".jsonl", ".json", ".parquet")
COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
NO_TEXT = (".csv", ".tsv", ".arrow", ".zip", ".zst", ".7z", ".tar", ".tgz", ".pt", ".safetensors", ".gguf")


class TextError(Stop):
    """A file cannot be read as text."""


class Flags(Protocol):
    """The flags that say what to read."""

    train: list[str]
    validation: list[str]
    dataset: str
    dataset_config: str
    validation_share: float


class Take(Protocol):
    """How to turn a table's row into a document, a string."""

    @property
    def column(self) -> str:
        """The name of the result's column."""
        ...

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to read; the first holds the text of a plain file."""
        ...

    def check(self, columns: Mapping[str, Any]) -> str:
        """What is wrong with a data set of these columns, name to feature; or ""."""
        ...

    def __call__(self, row: Mapping[str, Any], where: str) -> str | None:
        """The document of a row; None to skip it. Raises TextError, which names the place."""
        ...


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of text is the document."""

    column: str = "text"

    @property
    def wanted(self) -> tuple[str, ...]:
        return (self.column,)

    def check(self, columns: Mapping[str, Any]) -> str:
        if self.column not in columns:
            return f" has no column {self.column!r}, only {', '.join(columns)}: see --text_column"
        if (kind := getattr(columns[self.column], "dtype", "not a string")) not in ("string", "large_string"):
            return f": the column {self.column!r} is {kind}: see --text_column"
        return ""

    def __call__(self, row: Mapping[str, Any], where: str) -> str | None:
        if self.column not in row:
            raise TextError(f"{where} has no column {self.column!r}, only {', '.join(map(repr, row)) or 'none'}")
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise TextError(f"{where}: {self.column!r} must be a string, not {type(text).__name__}")
        return text


def documents(s: Flags, take: Take) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and the held-out documents, each with the one column of `take`. Raises Stop."""
    datasets.disable_progress_bars()
    if bool(s.train) == bool(s.dataset):
        raise Stop("give text to train on: --train FILE_OR_DIRECTORY ..., or --dataset NAME")
    train, held_out = hub_data_set(s, take) if s.dataset else (read(s.train, take), None)
    if s.validation:
        held_out = read(s.validation, take)
    if held_out is None:
        if len(train) < 2:
            raise Stop("one document cannot be both trained on and held out: give --validation text as well")
        share = max(1, round(len(train) * s.validation_share))
        split = train.train_test_split(min(share, len(train) - 1), seed=0)
        train, held_out = split["train"], split["test"]
    return train, held_out


def hub_data_set(s: Flags, take: Take) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The splits `train` and `validation` (or None) of --dataset. Raises Stop."""
    try:
        found = datasets.load_dataset(s.dataset, s.dataset_config or None)
    except Exception as e:  # no network, an unknown name, or any other answer of a hub
        raise Stop(f"--dataset {s.dataset}: {type(e).__name__}: {e}") from e
    if "train" not in found:
        raise Stop(f"--dataset {s.dataset} has no split 'train', only {', '.join(found)}")
    splits = {}
    for split in found.keys() & {"train", "validation"}:
        if wrong := take.check(found[split].features):
            raise Stop(f"--dataset {s.dataset}{wrong}")
        if isinstance(take, Column):
            table = found[split].select_columns([take.column])
        else:
            table = found[split].map(lambda row, i: {take.column: take(row, f"--dataset {s.dataset}: row {i + 1}")}, with_indices=True,
                                     remove_columns=found[split].column_names)  # fmt: skip
        splits[split] = table.filter(lambda text: text is not None, input_columns=take.column)
        if not len(splits[split]):
            raise Stop(f"--dataset {s.dataset}: its split {split!r} has no text")
    return splits["train"], splits.get("validation")


def read(names: Sequence[str | os.PathLike], take: Take = Column()):
    """The documents in files and in all text files below directories, each directory's in order of names.

    A plain text file is one document, whatever its suffix. A table has a document in each row: `.jsonl`, `.json` (lines or one
    array of objects) and `.parquet`. Rows without text (null) are skipped. Files are UTF-8; all but Parquet may be compressed
    (`.gz`, `.xz`, `.bz2`). `datasets` caches the documents and reads a file again once it has changed.

    Args:
        names: files and directories.
        take: what of a row is its document.

    Returns:
        A datasets.Dataset with only the column of `take`, of strings.

    Raises:
        TextError: a file does not exist, has no text, or holds something else.
    """
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
    # Size and times are for the cache: a changed file may keep its name, its size and even its modification time.
    stats = [(p, p.stat()) for p in files]
    known = tuple((str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats)  # datasets would split a list
    features = datasets.Features({take.column: datasets.Value("large_string")})
    try:
        return datasets.Dataset.from_generator(_rows, gen_kwargs={"files": known, "take": take}, features=features)
    except datasets.exceptions.DatasetGenerationError as e:
        cause = e.__cause__ or e
        raise TextError(str(cause)) from cause


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return Path(name.removesuffix(next(filter(name.endswith, COMPRESSED), ""))).suffix


def _rows(files: tuple[tuple, ...], take: Take) -> Iterator[dict[str, str]]:
    rows = 0
    for name, *_ in files:
        try:
            for where, row in _READERS.get(_suffix(Path(name)), _plain)(name, take.wanted):
                text = take(row, where)
                if text is not None:
                    rows += 1
                    yield {take.column: text}
        except UnicodeDecodeError as e:
            raise TextError(f"{name}: byte {e.start} is not UTF-8") from e
        except TextError as e:
            raise TextError(f"{name}: {e}") from e
        except Exception as e:  # from gzip, json, pyarrow or the operating system
            raise TextError(f"{name}: {type(e).__name__}: {e}") from e
    if not rows:  # the message of `datasets` would not help
        raise TextError(f"{files[0][0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: there is no text in it")


# A reader takes a file's name and the wanted columns, and yields each row and its place.


def _open(name: str):
    return COMPRESSED.get(Path(name).suffix.lower(), open)(name, "rt", encoding="utf-8-sig")


def _plain(name: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    with _open(name) as f:
        yield "", {wanted[0]: f.read()}


def _json(name: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    with _open(name) as f:
        beginning = ""
        while not beginning and (line := f.readline()):
            beginning = line.lstrip()
        f.seek(0)
        if beginning.startswith("["):
            for i, row in enumerate(json.load(f), 1):
                yield f"row {i}", _object(row, f"row {i}")
            return
        for i, line in enumerate(f, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise TextError(f"line {i}: {e}") from e
                yield f"line {i}", _object(row, f"line {i}")


def _object(row: object, where: str) -> dict:
    if not isinstance(row, dict):
        raise TextError(f"{where} is not an object")
    return row


def _parquet(name: str, wanted: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(name) as file:
        there = file.schema_arrow.names
        if not (columns := [column for column in wanted if column in there]):
            raise TextError(f"it has no column {' or '.join(map(repr, wanted))}, only {', '.join(map(repr, there))}")
        row = 0
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            for found in batch.to_pylist():
                row += 1
                yield f"row {row}", found


_READERS = {".jsonl": _json, ".json": _json, ".parquet": _parquet}
