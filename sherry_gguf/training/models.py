"""Models and tokenizers for training, and errors in words."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.errors import ConvertError, Stop


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_name(name: str) -> None:
    """Raises Stop if a name can only be that of a directory, which does not exist: a hub would say that this is not a name."""
    if not Path(name).exists() and (Path(name).is_absolute() or name.startswith(".") or Path(name).suffix or name.count("/") > 1):
        raise Stop(f"{name}: no such file or directory")


def load_float32(name: str) -> Any:
    """A causal language model in float32. Raises Stop, also if the checkpoint lacks some of its tensors."""
    model = load(name, torch.float32)
    return model.float() if any(p.dtype != torch.float32 for p in model.parameters()) else model  # MXFP4 is decoded to bfloat16


def load(name: str, dtype: torch.dtype | str) -> Any:
    """A causal language model; dtype: as for `from_pretrained`. Raises Stop, also if the checkpoint lacks some of its tensors."""
    check_name(name)
    with stop_at_errors(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    model, info = loaded
    if lacking := [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]:
        first = sorted(lacking)[0]
        raise Stop(f"{name} lacks {len(lacking)} of the model's tensors, or has them in other shapes, the first {first}")
    return model


def check_fit(model: Any, tokenizer, name: str, context: int, default: int) -> None:
    """Raises Stop if the tokenizer `name` has more tokens than the model, or --context (by default `default`) is too long for it."""
    if (n := len(tokenizer)) > (m := model.get_input_embeddings().num_embeddings):
        raise Stop(f"the tokenizer {name} has {n} tokens, the model only {m} embeddings: they do not belong together")
    if context > (most := positions(model)):
        said = " (the default)" * (context == default)
        raise Stop(f"--context {context}{said}: the model's positions end at {most}. Pass --context {most}, or less")


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
    except ConvertError as e:  # names the file
        raise Stop(str(e)) from e
    except Exception as e:
        raise Stop(f"{name}: {type(e).__name__}: {' '.join(str(e).split())}") from e
