"""One run: every model on every task and on the text, and the JSON report."""

import argparse
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..errors import NotBuilt, Stop
from . import comparison, models, say, tasks, text


def run(a: argparse.Namespace) -> int:
    """Measure everything, print the tables and return the exit code.

    Raises:
        Stop: an argument cannot be used, or no task has data.
        OSError: the report cannot be written.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in "datasets", "lm_eval":
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(a.threads)
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")

    for path in a.models:
        _check_model(Path(path))
    _check_output(a)
    content = _read(a.text) if a.text else None
    loaded, missing = tasks.load(a.tasks, a.include_path, a.num_fewshot, a.data)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "output"}
    report: dict[str, Any] = {"settings": settings, "missing": missing, "models": [], "compared": []}
    _save(a.output, report)  # fail now rather than after hours of work
    if a.tasks and not loaded and not a.text:
        raise Stop("no task has data: nothing was measured")
    inputs = []
    for path in a.models:
        result: dict[str, Any] = {"model": path, "tasks": {}}
        report["models"].append(result)
        inputs.append(comparison.Inputs())
        try:
            _measure_model(a, Path(path), content, loaded, result, inputs[-1], lambda: _save(a.output, report))
        except (Stop, NotBuilt) as e:  # the other models are still worth measuring
            result["error"] = str(e)
            say(f"{path}: {e}")
    report["compared"] = [comparison.compare(report["models"], inputs, i) for i in range(1, len(a.models))]
    _save(a.output, report)
    for line in comparison.doubts(report["models"]):
        say(line)
    for line in comparison.summary(report):
        print(line)
    return int(bool(missing) or any("error" in m for m in report["models"]))


def _measure_model(a, path: Path, content: str | None, loaded: dict, result: dict, inputs: comparison.Inputs, save: Callable) -> None:
    """Fill in a model's `result` and `inputs`; call `save` after the text and after each task. Raises Stop, NotBuilt."""
    checkpoint = models.load(path, a.device, a.dtype) if path.is_dir() else None
    if content is not None:
        say(f"{path}: the text {a.text}")
        loss, ids, vocabulary = text.torch_text(*checkpoint, content, a) if checkpoint else text.gguf_text(path, content, a)
        per_token = len(content.encode()) / loss.tokens
        result["text"] = dataclasses.asdict(loss) | {
            "perplexity": loss.perplexity, "bytes_per_token": per_token, "nats_per_byte": loss.nats / per_token,
            "vocabulary": vocabulary, "guessing": math.log(vocabulary)}  # fmt: skip
        inputs.text = ids
        save()
    if not loaded:
        return
    with models.open_lm(path, checkpoint, a) as lm:
        for name, task in loaded.items():
            say(f"{path}: {name}")
            result["tasks"][name] = tasks.measure(lm, name, task, a.limit)
            inputs.requests |= lm.requests
            save()
        if lm.truncated:
            say(f"{path}: {lm.truncated} requests exceeded {lm.max_length} tokens and lost their beginning (--max-length)")


def _check_model(path: Path) -> None:
    """Raise Stop unless the path is a checkpoint or a file."""
    if not path.exists():
        raise Stop(f"{path}: no such file or directory; name a Hugging Face directory or a GGUF on this machine")
    if path.is_dir() and not (path / "config.json").is_file():
        raise Stop(f"{path}: not a Hugging Face checkpoint: it has no config.json")


def _check_output(a: argparse.Namespace) -> None:
    """Raise Stop if the report would overwrite an input."""
    if not a.output:
        return
    if a.output.is_dir():
        raise Stop(f"--output {a.output} is a directory; name a file")
    for path in (*map(Path, a.models), *([a.text] if a.text else ())):
        if a.output.exists() and path.exists() and os.path.samefile(a.output, path):
            raise Stop(f"--output {a.output} is also an input; name another file")


def _read(path: Path) -> str:
    """The text as llama-perplexity reads it: without one final newline. Raises Stop."""
    try:
        return path.read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise Stop(f"--text {path}: byte {e.start} is not valid UTF-8") from None
    except OSError as e:
        raise Stop(f"--text {path}: {e.strerror}") from None


def _save(path: Path | None, report: dict) -> None:
    """Replace the report's file. Raises OSError, which ends the run: results that cannot be saved are useless."""
    if not path:
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise OSError(f"--output {path}: {e.strerror}") from None
