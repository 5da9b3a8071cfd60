"""The sequences of tokens to calibrate on: from the user's text, and written by the model itself."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.qat.data import pack
from sherry_gguf.training import texts
from sherry_gguf.training.files import undamaged

from . import generation

PART = 1 << 14  # characters of a document that are taken at a time


class Source:
    """Where sequences come from.

    Attributes:
        a: the command's arguments.
        bytes_per_token: of the text that was read.
        written: how many sequences the model wrote.
    """

    def __init__(self, a: argparse.Namespace, tokenizer: Any, load: Callable[[], Any]):
        """load: gives the full-precision model, to generate with."""
        self.a, self.tokenizer, self.load = a, tokenizer, load
        self.bytes_per_token, self.written = 0.0, 0
        self.writer: Writer | None = None
        self.documents = texts.read(a.text, texts.Column(a.text_column))[a.text_column] if a.text else []

    def __str__(self) -> str:
        parts = [f"{self.bytes_per_token:.2f} bytes a token"] if self.a.text else []
        return "; ".join([*parts, f"{self.written} written by the model"] if self.written else parts)

    def take(self, count: int, used: torch.Tensor | None = None) -> torch.Tensor:
        """int64 (sequences, context), each with BOS first: `count`, or fewer if the text is short. Raises Stop.

        used: what an earlier call returned; others are taken, if the text has half as many as wanted.
        """
        own, before = round(self.a.generated * count), self.written
        parts = [self._from_text(count - own, used)] if count > own else []
        if own:
            parts.append(self._generated(before + own)[before:])
            self.written += own
        ids = torch.cat(parts)
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.a.seed))]

    def _from_text(self, sequences: int, used: torch.Tensor | None) -> torch.Tensor:
        """From all over the text."""
        a, tokenizer = self.a, self.tokenizer
        taken = {row.numpy().tobytes() for row in used} if used is not None else set()
        share = -(-(len(taken) + sequences) * a.context // len(self.documents)) + a.context  # of each document: all of them are heard
        random, found, size, count = np.random.default_rng(a.seed), [], 0, 0
        for text in self.documents:
            own = 0
            for part in random.permutation(-(-len(text) // PART)):
                piece = text[part * PART : (part + 1) * PART]
                ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
                size, own = size + len(piece.encode("utf-8", "surrogatepass")), own + len(ids)
                found.append(pack(np.array(ids, np.int64), a.context, tokenizer.bos_token_id))
                if own > share:
                    break
            count += own
        blocks = np.concatenate(found)
        if len(blocks) < 2:
            raise Stop(f"the text has {count} tokens, less than two sequences of {a.context}: give more, or a smaller --context")
        self.bytes_per_token = size / count
        new = [row for row in blocks if row.tobytes() not in taken]
        pool = new if len(new) >= max(2, sequences // 2) else list(blocks)
        chosen = random.permutation(len(pool))[: max(2, sequences)]
        return torch.from_numpy(np.stack([pool[i] for i in chosen]))

    def _generated(self, sequences: int) -> torch.Tensor:
        """The first sequences that the model writes. Those that it has written are in --work, a file for each batch."""
        found: list[np.ndarray] = []
        with tqdm(desc="writing", unit="token", unit_scale=True, leave=False) as bar:
            while (count := sum(map(len, found))) < sequences:
                path = self.a.work / f"written-{len(found):03}.npy"
                if not path.exists():
                    self.writer = self.writer or Writer(self.load(), self.tokenizer, set().union(*self.documents))
                    bar.total = bar.total or (sequences - count) * (self.a.context - 1)
                    _save(path, self.writer.write(sequences - count, self.a.context, self.a.seed + len(found), bar.update))
                with undamaged(path, f"remove {self.a.work} to start over"):
                    found.append(np.load(path))
        self.writer = None
        return torch.from_numpy(np.concatenate(found)[:sequences].astype(np.int64))


class Writer:
    """The full-precision model, and which tokens it may write: those made of `characters`, or all if there are none."""

    def __init__(self, model: Any, tokenizer: Any, characters: set[str]):
        self.model, self.bos, self.config = model, tokenizer.bos_token_id, model.config.get_text_config()
        self.allowed = generation.candidates(tokenizer, characters, self.config.vocab_size)

    def write(self, most: int, context: int, seed: int, advance: Callable[[int], object]) -> np.ndarray:
        """As many sequences as fit the memory, `most` at most: int32 (sequences, context)."""
        batch = min(most, generation.batch_size(self.config, context))
        ids = generation.generate(self.model, self.allowed, self.bos, batch, context, seed, lambda: advance(batch))
        return ids.numpy().astype(np.int32)


def _save(path: Path, ids: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb") as file:  # np.save would change the name
        np.save(file, ids)
    part.replace(path)
