"""What an earlier run has measured, so that a run that was interrupted continues where it ended."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import __version__, llama_cpp
from ..errors import NotBuilt

Request = tuple[str, str]  # context, continuation
FREE = "models", "output", "tasks", "data", "include_path", "limit", "num_fewshot", "text", "threads", "batch_size"  # see `settings`
PACKAGES = "lm_eval", "torch", "transformers"


def settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a result depends on. Those that choose the inputs do not count: `digest` sees the inputs themselves."""
    return {k: v for k, v in arguments.items() if k not in FREE}


def identity(path: Path, skip: Iterable[Path] = ()) -> list[Any]:
    """What changes if a model or a program that runs it changes: names, sizes and times of files, versions. `skip`: files of our own."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else _split(path)
    ours = {p.resolve() for p in skip}
    found = [_stat(p) for p in files if p.resolve() not in ours]
    versions = [__version__, *(importlib.metadata.version(name) for name in PACKAGES)]
    if path.is_dir():
        return [found, versions]
    try:
        libraries = llama_cpp.library("llama").parent.iterdir()
        programs = sorted({_stat(p.resolve()) for p in libraries if re.match(r"(lib)?(llama|ggml)\b", p.name)})
    except NotBuilt:  # measuring will say so
        programs = []
    return [found, versions, programs]


def _stat(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def _split(path: Path) -> list[Path]:
    """All files of a split GGUF, or the one file."""
    if found := re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name):
        return sorted(p for p in path.parent.iterdir() if re.fullmatch(rf"{re.escape(found[1])}-\d{{5}}-of-{found[2]}\.gguf", p.name))
    return [path]


def digest(*parts: Any) -> str:
    """A hash of anything that JSON can express, or that has a text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Earlier:
    """The results in a report, by model and key. Of a report that cannot be read, none."""

    def __init__(self, path: Path | None):
        self._found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}  # the result, and its entry in `others`
        self._wanted: set[tuple[str, str]] = set()
        self.used = 0  # how many were asked for and there
        try:
            report = json.loads(path.read_text("utf-8")) if path and path.is_file() else {"models": []}
            for model in (*report["models"], *report.get("earlier", [])):
                source = {"settings": model.get("settings", report.get("settings")), "model": model["model"]}
                for name, result in model["tasks"].items():
                    self._found[model["model"], result["key"]] = result, source | {"tasks": {name: result}}
                if text := model.get("text"):
                    self._found[model["model"], text["key"]] = text, source | {"tasks": {}, "text": text}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # another file, or another version's
            self._found.clear()

    def get(self, model: str, key: str) -> dict[str, Any] | None:
        """A result of a model that was measured with `key`, or None."""
        if (found := self._found.get((model, key))) is None:
            return None
        self.used += 1
        self._wanted.add((model, key))
        return found[0]

    def others(self) -> list[dict[str, Any]]:
        """The results that nobody asked for, an entry each: "settings" of the run that measured it, "model", "tasks", "text"."""
        return [entry for key, (_, entry) in self._found.items() if key not in self._wanted]


def answers_files(report: Path | None) -> list[Path]:
    """The files of answers beside a report."""
    if not report or not report.parent.is_dir():
        return []
    name = re.compile(rf"{re.escape(report.name)}\.[0-9a-f]{{12}}\.answers")
    return sorted(p for p in report.parent.iterdir() if name.fullmatch(p.name))


def remove_answers(report: Path | None, done: Iterable[tuple[str, str]]) -> None:
    """Remove other answers to what is done, as given before a model's files or a flag changed. done: models, hashes of documents."""
    pairs = set(done)
    for path in answers_files(report):
        with contextlib.suppress(OSError, ValueError, TypeError):  # not ours, or removed by another run
            with open(path, encoding="utf-8") as file:
                _, model, documents = json.loads(file.readline())
            if (model, documents) in pairs:
                path.unlink()


class Answers:
    """A task's answers so far, in a file beside the report until the task is done; without a report, nowhere.

    report: the report's file, or None. key: what the answers depend on. model, documents: who answers, and a hash of what. A file for
    each of these, so that a model or a task that fails keeps its answers while others are measured.
    """

    def __init__(self, report: Path | None, key: str, model: str = "", documents: str = ""):
        self._known: dict[str, tuple[float, bool]] = {}
        head = [key, model, documents]
        self._path = report.with_name(f"{report.name}.{digest(head)[:12]}.answers") if report else None
        self._file = None
        if not self._path:
            return
        lines = self._path.read_text("utf-8", errors="replace").splitlines() if self._path.is_file() else []
        if lines and lines[0] == json.dumps(head):
            for line in lines[1:]:
                with contextlib.suppress(ValueError):  # the last line may be cut off
                    name, logprob, greedy = json.loads(line)
                    self._known[name] = logprob, greedy
        self._file = open(self._path, "w", encoding="utf-8")  # anew, so that each line is whole
        self._write(head)
        for name, answer in self._known.items():
            self._write([name, *answer])
        self._file.flush()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, request: Request | None) -> tuple[float, bool] | None:
        """An earlier run's answer: the log-likelihood, and whether it is the greedy one."""
        return self._known.get(_name(request)) if request and self._known else None

    def add(self, request: Request, answer: tuple[float, bool]) -> None:
        """Keep an answer for a later run."""
        if self._file:
            self._write([_name(request), float(answer[0]), bool(answer[1])])

    def close(self, done: bool) -> None:
        """Keep the file for a later run, or remove it if the task is done."""
        if self._path and self._file:
            self._file.close()
            if done:
                self._path.unlink()

    def _write(self, value: Any) -> None:
        assert self._file
        self._file.write(json.dumps(value) + "\n")


def _name(request: Request) -> str:
    return hashlib.blake2b("\0".join(request).encode(), digest_size=12).hexdigest()
