"""Models and tokenizers for training, and errors in words."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from sherry_gguf.errors import Stop


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def load_tokenizer(name: str):
    """Raises Stop."""
    if os.path.isdir(name) and not any(p.name.startswith(("tokenizer", "vocab")) for p in Path(name).iterdir()):
        raise Stop(f"{name} has no tokenizer: name its directory with --tokenizer")
    with stop_at_errors(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name)


def repair_generation_config(model) -> None:
    """Make generation_config.json one that transformers saves. It refuses those of some checkpoints, such as Llama 2."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    with contextlib.suppress(ValueError):
        generation.validate(strict=True)
        return
    generation.do_sample = True  # a temperature or a top_p implies it
    try:
        generation.validate(strict=True)
    except ValueError as e:
        raise Stop(f"the model's generation_config.json is wrong and cannot be saved: {e}") from e


def positions(model) -> float:
    """How many tokens the model can see."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@contextlib.contextmanager
def stop_at_errors(name: str) -> Iterator[None]:
    """Raise any error of loading `name` as Stop."""
    try:
        yield
    except Stop:
        raise
    except Exception as e:
        raise Stop(f"{name}: {type(e).__name__}: {' '.join(str(e).split())}") from e
