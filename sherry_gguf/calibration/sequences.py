"""The sequences of tokens to calibrate on: from the user's text, and written by the model itself."""

import argparse
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.qat.data import pack
from sherry_gguf.training import texts
from sherry_gguf.training.files import replacing, undamaged
from sherry_gguf.training.models import warn

from . import generation

ENOUGH = 4  # times the tokens that are wanted: so many of a large text are looked at
PART = 1 << 14  # characters of a document that are taken at a time, or more for a long context


class Source:
    """Where sequences come from.

    Attributes:
        a: the command's arguments.
        bytes_per_token: of the text that was read.
        documents: the text.
        generated: how many sequences of the model's own writing the layers and the distillation get.
    """

    def __init__(self, a: argparse.Namespace, tokenizer: Any, model: str):
        """model: what identifies the model that writes."""
        self.a, self.tokenizer = a, tokenizer
        self.bytes_per_token = 0.0
        self.documents = texts.read(a.text, texts.Column(a.text_column))[a.text_column] if a.text else []
        if a.text and not any(self.documents):
            raise Stop(f"--text: there is no text in {', '.join(a.text)}")
        self.counts = max(2, a.tokens // a.context), max(2, a.steps * a.distill_batch) if a.steps else 0
        self.generated = tuple(round(a.generated * count) for count in self.counts)
        self.characters: set[str] = set()
        for text in self.documents if a.generated else []:
            self.characters.update(text)
        self.prompts = self._prompts() if a.prompts else []
        said = [model, a.context, a.seed, "".join(sorted(self.characters)), tokenizer.bos_token_id, *self.prompts]
        self.key = hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def for_layers(self) -> torch.Tensor:
        """int64 (sequences, context), each with BOS first; fewer than asked for if the text is short. Raises Stop."""
        return self._mixed(self.text_for_layers, 0, self.generated[0])

    @functools.cached_property
    def text_for_layers(self) -> torch.Tensor:
        """Those of them that are from the text. Raises Stop."""
        return self._from_text(self.counts[0] - self.generated[0], set())

    def for_distillation(self, used: torch.Tensor) -> torch.Tensor:
        """Others than those of the layers, `used`, if the text has half as many as wanted; these come first. Raises Stop."""
        taken = _rows(used)
        ids = self._mixed(self._from_text(self.counts[1] - self.generated[1], taken), self.generated[0], self.generated[1])
        new = torch.tensor([row.numpy().tobytes() not in taken for row in ids])
        return torch.cat([ids[new], ids[~new]])

    def _mixed(self, text: torch.Tensor, begin: int, count: int) -> torch.Tensor:
        ids = torch.cat([text, self.written()[begin : begin + count]]) if count else text
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(self.a.seed))]

    def _from_text(self, sequences: int, taken: set[bytes]) -> torch.Tensor:
        """From all over the text, others than `taken` as far as there are. What remains of the parts, less than a sequence each, is joined.

        With another number of sequences it visits the same parts in the same order, so that those that are taken are found again.
        """
        a, tokenizer = self.a, self.tokenizer
        if not sequences:
            return torch.empty(0, a.context, dtype=torch.int64)
        wanted = (len(taken) + sequences) * a.context
        share = -(-wanted // len(self.documents)) + a.context  # of each document: all of them are heard
        size_of_part = max(PART, 16 * a.context)
        whole = a.context - (tokenizer.bos_token_id is not None)
        random, found, rest, size, count = np.random.default_rng(a.seed), [], [], 0, 0
        for document in random.permutation(len(self.documents)):
            if count > ENOUGH * wanted:
                break
            text, own = self.documents[int(document)], 0
            for part in random.permutation(-(-len(text) // size_of_part)):
                piece = text[part * size_of_part : (part + 1) * size_of_part]
                ids = np.array(tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"], np.int64)
                size, own = size + len(piece.encode("utf-8", "surrogatepass")), own + len(ids)
                found.append(pack(ids, a.context, tokenizer.bos_token_id))
                rest.append(ids[len(ids) // whole * whole :])
                if own > share:
                    break
            count += own
        blocks = np.concatenate([*found, pack(np.concatenate(rest), a.context, tokenizer.bos_token_id)])
        if len(blocks) < 2:
            raise Stop(f"the text has {count} tokens, less than two sequences of {a.context}: give more, or a smaller --context")
        self.bytes_per_token = size / count
        new = [row for row in blocks if row.tobytes() not in taken]
        pool = [new[i] for i in random.permutation(len(new))]
        if len(new) < max(2, sequences // 2):
            warn("the text is short: the distillation reads what the layers were trained on")
            pool += [row for row in random.permutation(blocks) if row.tobytes() in taken]
        return torch.from_numpy(np.stack(pool[: max(2, sequences)]))

    # ---- the model's own writing: files in --work, one for each batch ----

    def _prompts(self) -> list[list[int]]:
        """The tokens of each line of --prompts, in which \\n stands for a line break. Raises Stop."""
        a, found = self.a, []
        try:
            lines = a.prompts.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as e:
            raise Stop(f"--prompts {a.prompts} is not UTF-8: {e}") from None
        for number, line in enumerate(lines, 1):
            text = line.replace("\\n", "\n")
            ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
            if len(ids) > a.context // 2:
                raise Stop(f"--prompts {a.prompts}: line {number} has {len(ids)} tokens, more than half a sequence of {a.context}")
            found += [ids] * bool(line.strip())
        if not found:
            raise Stop(f"--prompts {a.prompts} is empty: write a prompt in each line")
        return found

    def lacks(self) -> int:
        """How many sequences are still to be written."""
        return max(0, sum(self.generated) - len(self.written()))

    def written(self) -> torch.Tensor:
        """What has been written, int64 (sequences, context). Raises Stop."""
        found = [np.empty((0, self.a.context), np.int32)]
        while (path := self._path(len(found) - 1)).exists():
            with undamaged(path, "remove it, and it is written again"):
                found.append(np.load(path).reshape(-1, self.a.context))
        return torch.from_numpy(np.concatenate(found).astype(np.int64))

    def write(self, model: Any) -> None:
        """Let the full-precision model write what is lacking."""
        a, config, bos = self.a, model.config.get_text_config(), self.tokenizer.bos_token_id
        allowed = generation.candidates(self.tokenizer, self.characters, config.vocab_size)
        most = generation.batch_size(config, a.context, model.dtype.itemsize)
        number = 0
        while self._path(number).exists():
            number += 1
        with tqdm(desc="writing", total=self.lacks() * (a.context - 1), unit="token", unit_scale=True, leave=False) as bar:
            while lacking := self.lacks():
                n = min(most, lacking)
                ids = generation.generate(model, allowed, bos, n, a.context, a.seed + number, functools.partial(bar.update, n),
                                          self.prompts)  # fmt: skip
                _save(self._path(number), ids.numpy().astype(np.int32))
                number += 1

    def _path(self, number: int) -> Path:
        return self.a.work / f"written-{self.key}-{number:03}.npy"


def _rows(ids: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in ids}


def _save(path: Path, ids: np.ndarray) -> None:
    with replacing(path) as part, open(part, "wb") as file:  # np.save would change the name
        np.save(file, ids)
