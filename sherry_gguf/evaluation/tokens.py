"""Do the models split the inputs alike? Compared before anything is measured."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm_eval.models.utils import has_bos_prefix

from ..errors import NotBuilt, Stop
from ..report import counted
from . import models
from .scoring import scorer

SAMPLE = 100  # documents of each task that are compared; measuring compares all
Tokenize = Callable[[list[str], bool], list[list[int]]]  # texts, and whether names of special tokens in them are these tokens


def sample(tasks: dict[str, Any]) -> list[str]:
    """The beginning of each task, as text: the requests of its first documents."""
    found = []
    for task in tasks.values():
        for instance in task.instances:
            if instance.doc_id < SAMPLE:
                found.append("".join(x for x in instance.args if isinstance(x, str)))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def tokenizer(path: Path) -> Iterator[Tokenize]:
    """A model's tokenizer; tokens around a text, such as BOS, are added unless it begins with them. Raises Stop, NotBuilt."""
    if path.is_dir():
        own = models.load_tokenizer(path)
        first = own.bos_token or own.eos_token

        def split(texts: list[str], parse: bool) -> list[list[int]]:
            begun = [parse and has_bos_prefix(t, first) for t in texts]  # names of special tokens are text for llama-perplexity
            return [own.encode(t, add_special_tokens=not b, split_special_tokens=not parse) for t, b in zip(texts, begun)]

        yield split
    else:
        with scorer(path, 1, 1, weights=False) as loaded:
            first = loaded.bos_text or loaded.eos_text

            def split_by_llama_cpp(texts: list[str], parse: bool) -> list[list[int]]:
                begun = [parse and has_bos_prefix(t, first) for t in texts]
                groups = {b: iter(loaded.tokenize([t for t, c in zip(texts, begun) if c == b], not b, parse)) for b in set(begun)}
                return [next(groups[b]) for b in begun]

            yield split_by_llama_cpp


def split_all(a: argparse.Namespace, content: str | None, texts: list[str]) -> list[tuple[list[int], list[list[int]]] | Stop | NotBuilt]:
    """For each model: the text's tokens and each sample's, or why it has none."""
    found: list[Any] = []
    for path in a.models:
        try:
            with tokenizer(Path(path)) as tokenize:
                (ids,) = tokenize([content], False) if content is not None else ([],)
                found.append((ids, tokenize(texts, True)))
        except (Stop, NotBuilt) as e:
            found.append(e)
    return found


def report(paths: list[str], texts: list[str], split: list[Any]) -> Iterator[str]:
    """What to say about the samples: how long a token is, and which models split them otherwise than the first."""
    good = [(path, found[1]) for path, found in zip(paths, split) if isinstance(found, tuple)]
    if not texts or not good:
        return
    size = sum(len(t.encode()) for t in texts)
    first, wanted = good[0]
    alike = True
    for path, found in good[1:]:
        if unlike := [i for i, (x, y) in enumerate(zip(wanted, found)) if x != y]:
            alike = False
            i = min(unlike, key=lambda i: len(texts[i]))
            yield (f"DIFFERENT TOKENS: {path} splits {len(unlike)} of {len(texts)} samples otherwise than {first}, such as "
                   f"{texts[i][-60:]!r}: {describe(wanted[i], found[i])}")  # fmt: skip
    tokens = sum(map(len, wanted))
    everyone = f", and {counted(len(good), 'model')} split them alike" * (alike and len(good) > 1)
    yield f"tokens: {first} has {size / tokens:.2f} bytes a token in {counted(len(texts), 'sample')} of the tasks{everyone}"


def describe(wanted: list[int], found: list[int]) -> str:
    """Where two splits of a text differ."""
    at = next((i for i, (x, y) in enumerate(zip(wanted, found)) if x != y), min(len(wanted), len(found)))
    part = slice(at, at + 4)
    return f"{len(wanted)} and {len(found)} tokens; from number {at + 1} on {wanted[part]} and {found[part]}"
