"""Rows to fine-tune on: chats, prompts with their completions, and text, as tokens with labels."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import jinja2
import numpy as np
import torch
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.training.texts import TextError, documents

from .arguments import FinetuneArguments

IGNORED = -100  # a label that counts in no loss
AT_A_TIME = 1000  # rows that are tokenized at a time


# ---------------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table as JSON: {"messages"}, {"prompt", "completion"} or {"text"}."""

    text_column: str = "text"
    column: str = "row"

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.text_column, "messages", "prompt", "completion"

    def check(self, columns: Mapping[str, Any]) -> str:
        if "messages" in columns or self.text_column in columns or {"prompt", "completion"} <= set(columns):
            return ""
        return f" has neither 'messages', nor 'prompt' and 'completion', nor {self.text_column!r}, only {', '.join(columns)}"

    def __call__(self, row: Mapping[str, Any], where: str) -> str | None:
        prompt, completion = row.get("prompt"), row.get("completion")
        if row.get("messages") is not None:
            found: dict[str, Any] = {"messages": _messages(row["messages"], f"{where}: 'messages'")}
        elif prompt is not None and completion is not None:
            if isinstance(prompt, str) != isinstance(completion, str):
                raise TextError(f"{where}: 'prompt' and 'completion' must both be strings, or both lists of messages")
            both = {"prompt": prompt, "completion": completion}
            found = both if isinstance(prompt, str) else {k: _messages(v, f"{where}: {k!r}") for k, v in both.items()}
        elif self.text_column in row:
            if (text := row[self.text_column]) is None:
                return None
            if not isinstance(text, str):
                raise TextError(f"{where}: {self.text_column!r} must be a string, not {type(text).__name__}")
            found = {"text": text}
        elif wrong := self.check(row):
            raise TextError(f"{where}{wrong}")
        else:
            return None
        try:
            return json.dumps(found, ensure_ascii=False).encode().decode()
        except UnicodeEncodeError as e:  # JSON can name it, and no tokenizer takes it
            raise TextError(f"{where}: {e.object[e.start]!a} is half a character (a lone surrogate): correct or remove it") from e


def _messages(messages: object, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise TextError(f"{where} must be a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise TextError(f"{where} must be a list of messages, each with a role and a content, both strings")
    return [{k: v for k, v in message.items() if v is not None} for message in messages]  # templates may use other keys


# ------------------------------------------------------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    """A sequence: its tokens, their labels, and whether it was cut at its end."""

    ids: list[int]
    labels: list[int]
    cut: bool = False


class Encoder:
    """Tokens and labels of rows.

    context: most tokens of a sequence. answers: whether only answers have labels, in chats and prompts.
    Raises Stop for a tokenizer that does not say where in the text its tokens are.
    """

    def __init__(self, tokenizer, context: int, answers: bool = True):
        if not tokenizer.is_fast:
            raise Stop("the tokenizer has no fast version (tokenizer.json), which tells where in the text a token is: make one with "
                       "AutoTokenizer.from_pretrained and save_pretrained")  # fmt: skip
        self.tokenizer, self.context, self.answers = tokenizer, context, answers

    def __call__(self, row: dict[str, Any]) -> list[Tokens]:
        """A row's sequences: one, or for a long text several. Raises Stop."""
        if "text" in row:
            return self._text(row["text"])
        if "messages" in row or isinstance(row["prompt"], list):
            text, answers = self._chat(row.get("messages") or row["prompt"] + row["completion"], len(row.get("prompt", ())))
            ids, spans = self._encode(text, False)
        else:
            text = row["prompt"] + row["completion"]
            answers = [(len(row["prompt"]), len(text) + 1)]
            ids, spans = self._encode(text, True)
            if (end := self.tokenizer.eos_token_id) is not None:  # which some tokenizers add
                ids, spans = ids[: -1 if ids[-1:] == [end] else None], spans[: -1 if ids[-1:] == [end] else None]
                ids, spans = [*ids, end], [*spans, (len(text), len(text) + 1)]
        if not self.answers:
            answers = [(0, len(text) + 1)]
        labels = [t if any(end > a and begin < b for a, b in answers) and end > begin else IGNORED for t, (begin, end) in zip(ids, spans)]
        return [Tokens(ids[: self.context], [IGNORED, *labels[1 : self.context]], len(ids) > self.context)]

    def _encode(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
                               return_special_tokens_mask=True, verbose=False)  # fmt: skip
        ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
        for i, (begin, end) in enumerate(spans):  # some tokenizers trim spaces off, so that a token of spaces has nothing
            if begin == end and not found["special_tokens_mask"][i]:
                spans[i] = (spans[i - 1][1] if i else 0, max(end, next((b for b, e in spans[i + 1 :] if e > b), len(text))))
        return ids, spans

    def _text(self, text: str) -> list[Tokens]:
        bos, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = [*self._encode(text, False)[0], *([end] if end is not None else [])]
        begin = [bos] if bos is not None else []
        step = self.context - len(begin)
        pieces = [[*begin, *ids[at : at + step]] for at in range(0, len(ids), step)]
        return [Tokens(piece, [IGNORED, *piece[1:]]) for piece in pieces if len(piece) > 1]

    def _chat(self, messages: list[dict[str, str]], first: int) -> tuple[str, list[tuple[int, int]]]:
        """A chat as text, and where its answers are: what the template adds for each message of the assistant from `first` on."""
        text = self._render(messages, False)
        answers: list[tuple[int, int]] = []
        if not self.answers:
            return text, answers
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i >= first:
                before, after = self._render(messages[:i], True) if i else "", self._render(messages[: i + 1], False)
                if not text.startswith(before) or not after.startswith(before) or (i + 1 < len(messages) and not text.startswith(after)):
                    raise Stop("the chat template changes earlier messages when later ones are added, so the answers cannot be told apart: "
                               "train all tokens with --loss_on all, or give rows of prompt and completion")  # fmt: skip
                answers.append((len(before), len(after)))
        return text, answers

    def _render(self, messages: list[dict[str, str]], open: bool) -> str:
        if not self.tokenizer.chat_template:
            raise Stop("the tokenizer has no chat template, which rows with messages need: give one with --chat_template FILE, or rows of "
                       "prompt and completion")  # fmt: skip
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open)
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            roles = ", ".join(m["role"] for m in messages)
            raise Stop(f"the chat template does not take these messages (roles {roles}): {e}") from e


# ------------------------------------------------------------------------------------------------------------ data sets


@dataclasses.dataclass
class Rows:
    """Sequences to train on and to evaluate: tables with the columns input_ids and labels."""

    train: datasets.Dataset
    held_out: datasets.Dataset  # a sample
    digest: str  # a hash of all tokens: a resumed run must see those it began with
    cut: int  # sequences to train on that were cut
    empty: int  # rows to train on that were left out, as nothing in them has a label


def load(s: FinetuneArguments, tokenizer) -> Rows:
    """Raises Stop if rows cannot be read, or nothing is left of them."""
    encoder = Encoder(tokenizer, s.context, s.loss_on == "answers")
    tables = [sequences(table, encoder) for table in documents(s, Row(s.text_column))]
    kept = [table.filter(lambda n: n > 0, input_columns="labelled") for table in tables]
    for what, table in zip(("to train on", "held out"), kept):
        if not len(table):
            raise Stop(f"of the rows {what}, none has a token to train within --context {s.context}: are there answers in them?")
    sample = first(kept[1].shuffle(seed=0), s.eval_tokens)
    return Rows(kept[0], sample, digest(*kept), sum(kept[0]["cut"]), len(tables[0]) - len(kept[0]))


def first(table: datasets.Dataset, tokens: int) -> datasets.Dataset:
    """The first rows with at most this many tokens together, but at least one."""
    lengths = np.cumsum([len(ids) for ids in table["input_ids"]])
    return table.select(range(max(1, int(np.searchsorted(lengths, tokens, "right")))))


def sequences(table: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Rows as sequences, with the columns input_ids, labels, labelled (how many labels count) and cut."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        found = [tokens for row in batch["row"] for tokens in encoder(json.loads(row))]
        return {"input_ids": [tokens.ids for tokens in found], "labels": [tokens.labels for tokens in found],
                "labelled": [sum(label != IGNORED for label in tokens.labels) for tokens in found],
                "cut": [tokens.cut for tokens in found]}  # fmt: skip

    return table.map(encode, batched=True, batch_size=AT_A_TIME, remove_columns=table.column_names, load_from_cache_file=False)


def digest(*tables: datasets.Dataset) -> str:
    """A hash of all tokens and labels."""
    hash = hashlib.blake2b(digest_size=16)
    for table in tables:
        hash.update(b"%d" % len(table))
        for batch in table.with_format("numpy").iter(AT_A_TIME):
            for name in "input_ids", "labels":
                for row in batch[name]:
                    hash.update(np.asarray(row, np.int64).tobytes())
    return hash.hexdigest()


@dataclasses.dataclass
class Collate:
    """Rows of tokens as a batch: input_ids, attention_mask and labels, int64 (rows, tokens), padded on the right."""

    pad: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

        ids = padded("input_ids", self.pad)
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths).long(), "labels": padded("labels", IGNORED)}


def batches(table: datasets.Dataset, collate: Collate, size: int, what: str) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `size` rows of about the same length, with a progress bar."""
    order = np.argsort([len(ids) for ids in table["input_ids"]], kind="stable")
    for at in tqdm(range(0, len(order), size), desc=what, leave=False, mininterval=1, disable=None):
        yield collate([table[int(i)] for i in order[at : at + size]])


@torch.no_grad()
def mean_loss(model, table: datasets.Dataset, collate: Collate, size: int) -> float:
    """Mean loss in nats over all tokens with a label, with the model in evaluation mode."""
    training, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    for batch in batches(table, collate, size, "evaluating"):
        labelled = int((batch["labels"] != IGNORED).sum())
        total += model(**{name: value.to(device) for name, value in batch.items()}).loss.item() * labelled
        count += labelled
    model.train(training)
    return total / count
