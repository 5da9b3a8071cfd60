"""The training command's text: documents, tokenized and packed into blocks of one length."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import datasets
import numpy as np
import torch

from sherry_gguf.errors import Stop

from . import text
from .arguments import SherryArguments
from .data import labelled, pack

DOCUMENTS = 1000  # tokenized at a time; what is left of each batch after its last full block is dropped


@dataclasses.dataclass
class Texts:
    """Blocks of tokens to train on and to evaluate.

    Attributes:
        train, held_out: datasets with the column input_ids, lists of `context` tokens. held_out is a sample.
        digest: a hash of all their tokens. A resumed run must see the tokens it began with.
        bytes_per_token: UTF-8 bytes of text per token in each, without the tokens that begin and end documents.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    digest: str
    bytes_per_token: dict[str, float]


def load(s: SherryArguments, tokenizer) -> Texts:
    """Raises Stop if the text cannot be read or is too short."""
    train, held_out = (blocks(documents_, tokenizer, s) for documents_ in documents(s))
    for what, found in ("to train on", train), ("held out", held_out):
        if not len(found):
            raise Stop(f"the text {what} is shorter than one context of {s.context} tokens: give more, or a smaller --context")
    sample = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    return Texts(train, sample, digest(train, held_out), {"train": bytes_per_token(train), "held_out": bytes_per_token(held_out)})


def documents(s: SherryArguments) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and the held-out documents, with one column of text. Raises Stop."""
    datasets.disable_progress_bars()
    if bool(s.train) == bool(s.dataset):
        raise Stop("give text to train on: --train FILE_OR_DIRECTORY ..., or --dataset NAME")
    train, held_out = hub_data_set(s) if s.dataset else (text.load(s.train, s.text_column), None)
    if s.validation:
        held_out = text.load(s.validation, s.text_column)
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
    except Exception as e:  # no network, no such name, or anything else that a hub answers
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


def bytes_per_token(table: datasets.Dataset) -> float:
    return float(np.mean(table.data.column("bytes_per_token").to_numpy()))


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return labelled(torch.tensor([row["input_ids"] for row in rows]))
