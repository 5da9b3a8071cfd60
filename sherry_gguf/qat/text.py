"""The training command's text: documents from files and data sets, tokenized and packed into blocks of one length."""

import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from sherry_gguf.errors import Stop

from .arguments import SherryArguments
from .data import labelled, pack

DOCUMENTS = 1000  # tokenized at a time; what is left of each batch after its last full block is dropped
TEXT = (".txt", ".md", ".rst", ".py")  # suffixes that a directory is searched for, besides these:
TABLES = (".jsonl", ".json", ".parquet")
NO_TEXT = (".csv", ".tsv", ".arrow", ".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".tgz", ".pt", ".safetensors", ".gguf")


class TextError(Stop):
    """A file cannot be read as text."""


@dataclasses.dataclass
class Texts:
    """Blocks of tokens to train on and to evaluate."""

    train: datasets.Dataset  # with the column input_ids, lists of `context` tokens
    held_out: datasets.Dataset  # the same, a sample
    digest: str  # a hash of all tokens: a resumed run must see those it began with
    bytes_per_token: dict[str, float]  # UTF-8 bytes of text per token in each, without BOS and EOS


def load(s: SherryArguments, tokenizer) -> Texts:
    """Raises Stop if the text cannot be read or is too short."""
    train, held_out = (blocks(table, tokenizer, s) for table in documents(s))
    for what, table in ("to train on", train), ("held out", held_out):
        if not len(table):
            raise Stop(f"the text {what} is shorter than one context of {s.context} tokens: give more, or a smaller --context")
    sample = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    found = {"train": train, "held_out": held_out}
    density = {name: float(np.mean(table.data.column("bytes_per_token").to_numpy())) for name, table in found.items()}
    return Texts(train, sample, digest(train, held_out), density)


def documents(s: SherryArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and the held-out documents, with one column of text. Raises Stop."""
    datasets.disable_progress_bars()
    if bool(s.train) == bool(s.dataset):
        raise Stop("give text to train on: --train FILE_OR_DIRECTORY ..., or --dataset NAME")
    train, held_out = hub_data_set(s) if s.dataset else (read(s.train, s.text_column), None)
    if s.validation:
        held_out = read(s.validation, s.text_column)
    if held_out is None:
        if len(train) < 2:
            raise Stop("one document cannot be both trained on and held out: give --validation text as well")
        share = max(1, round(len(train) * s.validation_share))
        split = train.train_test_split(min(share, len(train) - 1), seed=0)
        train, held_out = split["train"], split["test"]
    return train, held_out


def hub_data_set(s: SherryArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The splits `train` and `validation` (or None) of --dataset. Raises Stop."""
    try:
        found = datasets.load_dataset(s.dataset, s.dataset_config or None)
    except Exception as e:  # no network, an unknown name, or any other answer of a hub
        raise Stop(f"--dataset {s.dataset}: {type(e).__name__}: {e}") from e
    if "train" not in found:
        raise Stop(f"--dataset {s.dataset} has no split 'train', only {', '.join(found)}")
    for split in found.keys() & {"train", "validation"}:
        features = found[split].features
        if s.text_column not in features:
            raise Stop(f"--dataset {s.dataset} has no column {s.text_column!r}, only {', '.join(features)}: see --text_column")
        if (kind := getattr(features[s.text_column], "dtype", "not a string")) not in ("string", "large_string"):
            raise Stop(f"--dataset {s.dataset}: the column {s.text_column!r} is {kind}: see --text_column")
    return found["train"], found.get("validation")


def blocks(texts: datasets.Dataset, tokenizer, s: SherryArguments) -> datasets.Dataset:
    """Blocks of `texts`: input_ids, lists of `context` tokens, and bytes_per_token of the text they come from."""
    column, context, split = s.text_column, s.context, not s.special_tokens
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id

    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer([text or "" for text in batch[column]], add_special_tokens=False, return_attention_mask=False,
                            split_special_tokens=split, verbose=False)  # fmt: skip
        ids = np.concatenate([np.array([*x, *([end] if end is not None else [])], np.int32) for x in encoded["input_ids"]])
        packed = pack(ids, context, bos)
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in batch[column] if text)
        mean = size / max(1, sum(map(len, encoded["input_ids"])))  # of the batch: blocks do not record where their tokens come from
        return {"input_ids": packed, "bytes_per_token": [mean] * len(packed)}

    return texts.map(tokenize, batched=True, batch_size=DOCUMENTS, remove_columns=texts.column_names)


def digest(*tables: datasets.Dataset) -> str:
    """A hash of all tokens in tables of blocks."""
    hash = hashlib.blake2b(digest_size=16)
    for table in tables:
        hash.update(b"%d" % len(table))
        for chunk in table.data.column("input_ids").chunks:
            hash.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).data)
    return hash.hexdigest()


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return labelled(torch.tensor([row["input_ids"] for row in rows]))


def read(names: Sequence[str | os.PathLike], column: str = "text"):
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
    features = datasets.Features({column: datasets.Value("large_string")})
    try:
        return datasets.Dataset.from_generator(_rows, gen_kwargs={"files": known, "column": column}, features=features)
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
                    raise TextError(f"{where}: {column!r} must be a string, not {type(text).__name__}")
        except UnicodeDecodeError as e:
            raise TextError(f"{name}: byte {e.start} is not UTF-8") from e
        except TextError as e:
            raise TextError(f"{name}: {e}") from e
        except Exception as e:  # from gzip, json, pyarrow or the operating system
            raise TextError(f"{name}: {type(e).__name__}: {e}") from e
    if not rows:  # the message of `datasets` would not help
        raise TextError(f"{files[0][0]}{f' and {len(files) - 1} more' * (len(files) > 1)}: there is no text in it")


# A reader takes a file's name and the column, and yields for each row its place and its text.


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
