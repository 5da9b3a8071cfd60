"""Do the models split the inputs alike? Compared before anything is measured."""

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


def split_all(paths: list[str], content: str | None, texts: list[str]) -> list[Any]:
    """For each model: the tokens of the text, if any, and those of each sample; or the Stop or NotBuilt that says why it has none."""
    found: list[Any] = []
    for path in paths:
        try:
            with tokenizer(Path(path)) as tokenize:
                (ids,) = tokenize([content], False) if content is not None else ([],)
                found.append((ids, tokenize(texts, True)))
        except (Stop, NotBuilt) as e:
            found.append(e)
    return found


def report(paths: list[str], content: str | None, texts: list[str], split: list[Any]) -> Iterator[str]:
    """What to say about the tokens: how long they are by the first model, and which models split text and samples otherwise.

    The arguments and the result of `split_all`.
    """
    good = [(path, *found) for path, found in zip(paths, split) if isinstance(found, tuple)]
    if not good:
        return
    names = [path for path, _, _ in good]
    if content is not None:
        yield from _compared("the text", names, [content], [[ids] for _, ids, _ in good])
    if texts:
        yield from _compared(f"{counted(len(texts), 'sample')} of the tasks", names, texts, [found for _, _, found in good])


def _compared(what: str, names: list[str], texts: list[str], found: list[list[list[int]]]) -> Iterator[str]:
    wanted, alike = found[0], len(names) > 1
    for name, other in zip(names[1:], found[1:]):
        if unlike := [i for i, (x, y) in enumerate(zip(wanted, other)) if x != y]:
            alike = False
            i = min(unlike, key=lambda i: len(texts[i]))
            which = f"{len(unlike)} of {what}, such as {texts[i][-60:]!r}," if len(texts) > 1 else what
            yield f"DIFFERENT TOKENS: {name} splits {which} otherwise than {names[0]}: {_describe(wanted[i], other[i])}"
    rate = sum(len(t.encode()) for t in texts) / max(sum(map(len, wanted)), 1)
    yield f"{what}: {rate:.2f} bytes a token by {names[0]}" + f"; all {len(names)} models split it alike" * alike


def _describe(wanted: list[int], found: list[int]) -> str:
    """Where two splits of a text differ."""
    at = next((i for i, (x, y) in enumerate(zip(wanted, found)) if x != y), min(len(wanted), len(found)))
    part = slice(at, at + 4)
    return f"{len(found)} tokens, not {len(wanted)}; from number {at + 1} on {found[part]}, not {wanted[part]}"
