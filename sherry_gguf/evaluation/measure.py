"""One run: every model on every task and on the text, and the JSON report."""

import argparse
import dataclasses
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..errors import NotBuilt, Stop
from ..report import counted
from . import comparison, models, resume, say, tasks, text, tokens


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
    hashes, failed = tasks.prepare(loaded, a.limit)
    missing |= failed
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "output"}
    report: dict[str, Any] = {"settings": settings, "missing": missing, "models": [], "compared": [], "earlier": []}
    earlier = resume.Earlier(a.output)
    if a.tasks and not loaded and not a.text:
        raise Stop("no task has data: nothing was measured")
    runs = [_Run(a, path, content, loaded, hashes, earlier, report) for path in a.models]
    if earlier.used:
        found = counted(earlier.used, "result")
        say(f"{a.output}: {found} of an earlier run, with the same files and arguments; delete it to measure again")
    report["earlier"] = earlier.others()  # a later run may ask for them
    if report["earlier"]:
        found = counted(len(report["earlier"]), "result")
        say(f'{a.output}: {found} of other files or arguments, kept in "earlier"')
    _save(a.output, report)
    samples = tokens.sample(loaded)
    split = tokens.split_all(a.models, content, samples)
    for line in tokens.report(a.models, content, samples, split):
        say(line)
    for each, ids in zip(runs, split):
        try:  # the other models are still worth measuring
            if not isinstance(ids, tuple):
                raise ids
            each.inputs.text = ids[0]
            each.measure()
        except (Stop, NotBuilt) as e:
            each.result["error"] = str(e)
            say(f"{each.path}: {e}")
    report["compared"] = [comparison.compare(report["models"], [each.inputs for each in runs], i) for i in range(1, len(runs))]
    _save(a.output, report)
    resume.remove_answers(a.output, ((m["model"], hashes[name]) for m in report["models"] for name in m["tasks"]))
    for line in comparison.doubts(report["models"]):
        say(line)
    for line in comparison.summary(report):
        print(line)
    return int(bool(missing) or any("error" in m for m in report["models"]))


class _Run:
    """What is measured of a model, and its part of the report, `result`; begins with what an earlier run has measured."""

    def __init__(self, a: argparse.Namespace, path: str, content: str | None, loaded: dict[str, Any], hashes: dict[str, str],
                 earlier: resume.Earlier, report: dict[str, Any]):  # fmt: skip
        self.a, self.path, self.content, self.loaded, self.report = a, Path(path), content, loaded, report
        self.documents = hashes
        self.inputs = comparison.Inputs()
        self.result: dict[str, Any] = {"model": path, "tasks": {}}
        report["models"].append(self.result)
        model = resume.identity(self.path, [a.output, *resume.answers_files(a.output)] if a.output else [])
        settings = resume.settings(vars(a))
        self.keys = {name: resume.digest(model, settings, hashes[name]) for name in loaded}
        self.text_key = resume.digest(model, settings, a.context, a.chunks, content)
        if content is not None and (known := earlier.get(path, self.text_key)):
            self.result["text"] = known
        for name, key in self.keys.items():
            if known := earlier.get(path, key):
                self._keep(name, known)

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        self.result["tasks"][name] = found
        self.inputs.requests |= dict(zip(tasks.requests(self.loaded[name]), found["tokens"]))

    def measure(self) -> None:
        """Measure what is missing; save the report after the text and after each task. Raises Stop, NotBuilt."""
        a, path = self.a, self.path
        wanted = [name for name in self.loaded if name not in self.result["tasks"]]
        with_text = self.content is not None and "text" not in self.result
        checkpoint = models.load(path, a.device, a.dtype) if path.is_dir() and (wanted or with_text) else None
        if with_text:
            self._text(checkpoint)
        if wanted:
            with models.open_lm(path, checkpoint, a) as lm:
                for name in wanted:
                    self._task(lm, name)
                if lm.truncated:
                    say(f"{path}: {lm.truncated} requests exceeded {lm.max_length} tokens and lost their beginning (--max-length)")
        self.result["tasks"] = {name: self.result["tasks"][name] for name in self.loaded}  # in the order of --tasks

    def _text(self, checkpoint: tuple[Any, Any] | None) -> None:
        a, ids = self.a, self.inputs.text
        say(f"{self.path}: the text {a.text}")
        loss, vocabulary = text.torch_text(*checkpoint, ids, a) if checkpoint else text.gguf_text(self.path, ids, a)
        assert self.content is not None
        per_token = len(self.content.encode()) / loss.tokens
        self.result["text"] = dataclasses.asdict(loss) | {
            "perplexity": loss.perplexity, "bytes_per_token": per_token, "nats_per_byte": loss.nats / per_token,
            "vocabulary": vocabulary, "guessing": math.log(vocabulary), "key": self.text_key}  # fmt: skip
        _save(a.output, self.report)

    def _task(self, lm: models.TorchLM | models.GgufLM, name: str) -> None:
        task, key = self.loaded[name], self.keys[name]
        lm.answers = answers = resume.Answers(self.a.output, key, self.result["model"], self.documents[name])
        say(f"{self.path}: {name}" + f", {len(answers)} requests of an earlier run" * bool(len(answers)))
        done = False
        try:
            found = tasks.measure(lm, name, task, self.a.limit)
            self._keep(name, found | {"tokens": [lm.requests[request] for request in tasks.requests(task)], "key": key})
            _save(self.a.output, self.report)
            done = True
        finally:
            answers.close(done)


def _check_model(path: Path) -> None:
    """Raise Stop unless the path is a checkpoint or a file."""
    if not path.exists():
        raise Stop(f"{path}: no such file or directory; name a Hugging Face directory or a GGUF on this machine")
    if path.is_dir() and not (path / "config.json").is_file():
        raise Stop(f"{path}: not a Hugging Face checkpoint: it has no config.json")


def _check_output(a: argparse.Namespace) -> None:
    """Raise Stop if the report would overwrite an input, OSError if it cannot be written: now rather than after hours of work."""
    if not a.output:
        return
    if a.output.is_dir():
        raise Stop(f"--output {a.output} is a directory; name a file")
    for path in (*map(Path, a.models), *([a.text] if a.text else ())):
        if a.output.exists() and path.exists() and os.path.samefile(a.output, path):
            raise Stop(f"--output {a.output} is also an input; name another file")
    _write(a.output, "").unlink()


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
    if path:
        os.replace(_write(path, json.dumps(report, indent=1) + "\n"), path)


def _write(path: Path, text: str) -> Path:
    """Write a file beside the report, and return its path. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
    except OSError as e:
        raise OSError(f"--output {path}: {e.strerror}") from None
    return part
