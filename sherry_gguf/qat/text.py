"""The training command's text: documents from files and data sets, tokenized and packed into blocks of one length."""

import dataclasses
import hashlib
from typing import Any

import datasets
import numpy as np
import torch

from sherry_gguf.errors import Stop
from sherry_gguf.training.texts import Column, documents

from .arguments import SherryArguments
from .data import labelled, pack

DOCUMENTS = 1000  # tokenized at a time; what is left of each batch after its last full block is dropped


@dataclasses.dataclass
class Texts:
    """Blocks of tokens to train on and to evaluate."""

    train: datasets.Dataset  # with the column input_ids, lists of `context` tokens
    held_out: datasets.Dataset  # the same, a sample
    digest: str  # a hash of all tokens: a resumed run must see those it began with
    bytes_per_token: dict[str, float]  # UTF-8 bytes of text per token in each, without BOS and EOS


def load(s: SherryArguments, tokenizer) -> Texts:
    """Raises Stop if the text cannot be read or is too short."""
    train, held_out = (blocks(table, tokenizer, s) for table in documents(s, Column(s.text_column)))
    for what, table in ("to train on", train), ("held out", held_out):
        if not len(table):
            raise Stop(f"the text {what} is shorter than one context of {s.context} tokens: give more, or a smaller --context")
    sample = held_out.shuffle(seed=0).select(range(max(1, min(len(held_out), s.eval_tokens // s.context))))
    found = {"train": train, "held_out": held_out}
    density = {name: float(np.mean(table.data.column("bytes_per_token").to_numpy())) for name, table in found.items()}
    return Texts(train, sample, digest(train, held_out), density)


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
