#!/usr/bin/env python3
"""Evaluate Hugging Face checkpoints and GGUFs side by side: tasks of lm-eval, and the loss on a text.

Without --tasks and --text: the five tasks of the Sherry paper, zero-shot, and the mean of their accuracies. A directory
is run by PyTorch through lm-eval's own class, a GGUF by the built llama-server, which gets the same tokens.
Exit code: 0 if all that was asked for was measured, 1 if anything could not be, 2 for wrong arguments, 128 and the
signal's number when interrupted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import glob
import http.client
import itertools
import json
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

PAPER = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "tasks"  # those five with local data


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    p.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a Hugging Face directory or a GGUF; each is a column, and the first is what the others are compared with",
    )
    p.add_argument("--tasks", type=names, help=f"tasks of lm-eval, by commas (default: {','.join(PAPER)})")
    p.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the five tasks' data are files in DIR, as examples/tasks/README.md lists them; nothing is downloaded for them",
    )
    p.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="more tasks: a directory of lm-eval's YAML files, "
        "which go before lm-eval's own; relative data_files are in --data, or else in the current directory",
    )
    p.add_argument("--limit", type=positive, metavar="N", help="only the first N documents of each task")
    p.add_argument("--num-fewshot", type=int, default=0, metavar="N", help="examples before each question (0)")
    p.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="requests at a time: PyTorch's batch, llama-server's slots (4)"
    )
    p.add_argument(
        "--max-length",
        type=positive,
        default=2048,
        metavar="N",
        help="tokens that a model sees at most, less where it was trained on fewer (2048)",
    )
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure the loss on this text as llama-perplexity does, and no tasks unless --tasks names some",
    )
    p.add_argument("--context", type=positive, default=256, metavar="N", help="tokens of a chunk of the text (256)")
    p.add_argument("--chunks", type=positive, metavar="N", help="only the first N chunks of the text")
    p.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON, after each task")
    p.add_argument("--threads", type=positive, default=cores, metavar="N", help=f"CPU threads ({cores})")
    p.add_argument("--device", help="where PyTorch runs a directory: cpu, cuda, cuda:1, ... (cuda where there is one)")
    p.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "auto"],
        default="float32",
        help="PyTorch's, for a directory; auto: as in the checkpoint (float32)",
    )
    a = p.parse_args(argv)
    if a.num_fewshot < 0:
        p.error("argument --num-fewshot: it cannot be negative")
    if a.context < 4:
        p.error("argument --context: at least 4 tokens, of which the second half is scored")
    if a.tasks is None:
        a.tasks = [] if a.text else list(PAPER)
    return a


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse: "invalid positive number value"


def names(text: str) -> list[str]:
    found = [t.strip() for t in text.split(",") if t.strip()]
    if not found:
        raise argparse.ArgumentTypeError("no task is named")
    return list(dict.fromkeys(found))


def interrupted(number: int) -> int:
    print("evaluate: interrupted", file=sys.stderr, flush=True)
    return 128 + number


if __name__ == "__main__":  # the imports take seconds
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # an exception would come out of their middle
        signal.signal(signal.SIGINT, lambda number, _: os._exit(interrupted(number)))
    parse(None)  # --help and wrong arguments need not wait for them
    # lm-eval imports a package that is named as this file is.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    # PyTorch's threads wait for each other by spinning, which costs much beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where a process is started

import datasets
import huggingface_hub
import lm_eval.tasks
import torch
import torch.nn.functional as F
import transformers
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sherry_gguf import llama_cpp
from sherry_gguf.errors import NotBuilt

FOLDERS = ("piqa", "arc", "hellaswag", "winogrande")  # of lm-eval, that define them; to read all takes seconds
SURE = 1e9  # a bias on a token's logit that makes it the next one
TRIES, PATIENCE = 3, 30.0  # runs of a llama-perplexity that loses its last lines, at least, and seconds
FLOOR = -104.0  # llama-server's probabilities are floats; e^-104 is none any more
# Of ln(vocabulary), the loss of guessing. The frequencies of tokens alone bring it to 0.64 to 0.86 of that (counted on
# English and on Python, byte-level BPE of 300 to 32000 tokens): a model above 0.9 has not learned even those.
NEAR_GUESSING = 0.9
# Good tokenizers of 32000 tokens and more differ by up to a third on ordinary text.
OTHER_COUNT = 1.5


class Stop(Exception):
    """What a person can mend; the message says how."""


class Unwritable(Exception):
    """The report cannot be written, so that to go on is useless."""


class Interrupted(BaseException):
    def __init__(self, number: int):
        self.number = number


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) != signal.SIG_IGN}

    def interrupt(number, _):
        for s in previous:  # what cleans up is not to be interrupted again
            signal.signal(s, signal.SIG_IGN)
        raise Interrupted(number)

    try:
        for s in previous:
            signal.signal(s, interrupt)
        return run(a)
    except (Stop, Unwritable, OSError, MemoryError) as e:  # OSError: NotBuilt, too
        print(f"evaluate: {e or type(e).__name__}", file=sys.stderr)
        return 1
    except Interrupted as e:
        return interrupted(e.number)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def say(text: str) -> None:
    tqdm.write(f"evaluate: {text}", file=sys.stderr)  # not into a bar


def first_line(e: BaseException) -> str:
    """What an exception of another's code says, in one line."""
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__


def run(a: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(a.threads)
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")

    for path in a.models:
        check(Path(path))
    check_output(a)
    text = read(a.text) if a.text else None
    tasks, missing = load_tasks(a.tasks, a.include_path, a.num_fewshot, a.data)
    report = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "output"},
              "missing": missing, "models": [], "compared": []}  # fmt: skip
    save(a.output, report)  # or an error, before hours of work
    if a.tasks and not tasks and not a.text:
        raise Stop("no task has its data: nothing was measured")
    asked, ids = [], []
    for path in a.models:
        result: dict[str, Any] = {"model": path, "tasks": {}}
        report["models"].append(result)
        requests: dict[tuple[str, str], int] = {}
        tokens: list[int] = []
        try:
            measure_all(Path(path), a, text, tasks, result, requests, tokens, lambda: save(a.output, report))
        except (Stop, NotBuilt) as e:  # the other models are still worth measuring
            result["error"] = str(e)
            say(f"{path}: {e}")
        asked.append(requests)
        ids.append(tokens)
    report["compared"] = [compare(report["models"], asked, ids, i) for i in range(1, len(a.models))]
    save(a.output, report)
    for line in doubts(report["models"]):
        say(line)
    for line in summary(report):
        print(line)
    return int(bool(missing) or any("error" in m for m in report["models"]))


def measure_all(
    path: Path,
    a: argparse.Namespace,
    text: str | None,
    tasks: dict[str, Any],
    result: dict[str, Any],
    requests: dict[tuple[str, str], int],
    tokens: list[int],
    step: Callable[[], None],
) -> None:
    """Fill in a model's `result`, the `tokens` of the text and hashes of those of the `requests`, and tell each `step`.

    Raises Stop, NotBuilt.
    """
    loaded = load(path, a.device, a.dtype) if path.is_dir() else None
    if text is not None:
        say(f"{path}: the text {a.text}")
        loss, ids, vocabulary = torch_text(*loaded, text, a) if loaded else gguf_text(path, text, a)
        per_token = len(text.encode()) / loss.tokens
        result["text"] = dataclasses.asdict(loss) | {
            "perplexity": loss.perplexity, "bytes_per_token": per_token, "nats_per_byte": loss.nats / per_token,
            "vocabulary": vocabulary, "guessing": math.log(vocabulary)}  # fmt: skip
        tokens += ids
        step()
    if not tasks:
        return
    with torch_lm(*loaded, a) if loaded else server_lm(path, a) as lm:
        for name, task in tasks.items():
            say(f"{path}: {name}")
            result["tasks"][name] = measure(lm, name, task, a.limit)
            requests |= lm.asked
            step()
        if lm.cut:
            say(f"{path}: {lm.cut} requests were longer than {lm.max_length} tokens and lost their beginning (--max-length)")


def check(path: Path) -> None:
    """Raise Stop where neither a checkpoint nor a file is."""
    if not path.exists():
        raise Stop(f"{path}: no such file or directory; name a Hugging Face directory or a GGUF on this machine")
    if path.is_dir() and not (path / "config.json").is_file():
        raise Stop(f"{path}: no Hugging Face checkpoint, there is no config.json in it")


def check_output(a: argparse.Namespace) -> None:
    """Raise Stop where the report would take the place of what it is about."""
    if not a.output:
        return
    if a.output.is_dir():
        raise Stop(f"--output {a.output} is a directory; name a file")
    for path in (*map(Path, a.models), *([a.text] if a.text else ())):
        if a.output.exists() and path.exists() and os.path.samefile(a.output, path):
            raise Stop(f"--output {a.output} is to be evaluated itself; name another file")


def read(path: Path) -> str:
    """The text as llama-perplexity takes it: without a newline at its end. Raises Stop."""
    try:
        return path.read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
        raise Stop(f"--text {path}: byte {e.start} is no UTF-8") from None
    except OSError as e:
        raise Stop(f"--text {path}: {e.strerror}") from None


def save(path: Path | None, report: dict) -> None:
    if not path:
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise Unwritable(f"--output {path}: {e.strerror}") from None


# -------------------------------------------------------------------------------------------------------------- tasks


class LocalFactory(TaskFactory):
    """lm-eval's maker of tasks, for which data_files are in `directory`, plain or compressed."""

    FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of local files, not of a data set on the hub

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory.absolute()

    def _load_full_config(self, *args, **kwargs) -> dict[str, Any]:
        config = super()._load_full_config(*args, **kwargs)
        more = config.get("dataset_kwargs") or {}
        if config.get("dataset_path") in self.FORMATS and more.get("data_files"):
            config["dataset_kwargs"] = more | {"data_files": self.located(more["data_files"])}
        return config

    def located(self, files):
        """The same string, list, or dictionary by split, with absolute paths."""
        if isinstance(files, dict):
            return {split: self.located(f) for split, f in files.items()}
        if not isinstance(files, str):
            return [self.located(f) for f in files]
        if "://" in files:
            return files
        for end in "", ".xz", ".gz", ".bz2":
            if os.path.isfile(path := f"{self.directory / files}{end}"):
                return glob.escape(path)  # of which datasets makes a pattern
        return files if os.path.isabs(files) else os.path.join(glob.escape(str(self.directory)), files)


def load_tasks(wanted: list[str], include: Path | None, shots: int,
               data: Path | None = None) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """The tasks by name with their data, and why the others have none. Raises Stop for a name that is no task's.

    data: the directory of local data, with which the tasks in EXAMPLES go before lm-eval's own.
    """
    if not wanted:
        return {}, {}
    for flag, directory in ("--include-path", include), ("--data", data):
        if directory and not directory.is_dir():
            raise Stop(f"{flag} {directory}: no such directory")
    more = [EXAMPLES] * bool(data) + [include] * bool(include)
    folders = [Path(lm_eval.tasks.__file__).parent / f for f in FOLDERS] + more
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    if not set(wanted) <= manager.task_index.keys():
        manager = lm_eval.tasks.TaskManager(include_path=more)
    manager._factory = LocalFactory(data or Path())
    unknown = [name for name in wanted if name not in manager.task_index]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        raise Stop(
            f"--tasks {unknown[0]}: no such task in lm-eval"
            + f" or {include}" * bool(include)
            + f"; there is {', '.join(near)}" * bool(near)
            + "".join(unreadable(include))
        )

    sources = {name: source(name, manager.task_index[name].cfg or {}) for name in wanted}
    unreachable = hub_unreachable() if any(hub for hub, _ in sources.values()) else None
    tasks, missing = {}, {}
    for name in wanted:
        hub, files = sources[name]
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as e:  # data sets fail in many ways
            if not hub:
                missing[name] = f"it could not be loaded with its data {files}: {first_line(e)}"
            else:
                if isinstance(e, ConnectionError) and not unreachable:
                    unreachable = offline(f"the hub {huggingface_hub.constants.ENDPOINT} does not answer")
                missing[name] = (
                    f"its data set {files} could not be had: {unreachable or first_line(e)}, and it is "
                    f"not in the cache {datasets.config.HF_DATASETS_CACHE}"
                )
            say(f"{name}: {missing[name]}")
            continue
        for task_name, task in loaded.items():
            task.set_config("num_fewshot", shots)
            tasks[task_name] = task
    if any(sources[name][0] for name in missing):
        say(
            "run this once where the hub can be reached, then copy that machine's cache here and let HF_DATASETS_CACHE "
            "name it; or have the data as files: --data, and examples/tasks/README.md"
        )
    return tasks, missing


def unreadable(include: Path | None) -> Iterator[str]:
    """lm-eval passes over files that it cannot read."""
    for path in sorted(include.rglob("*.yaml")) if include else []:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as e:
            yield f"; {path} cannot be read: {' '.join(str(e).split())}"


def source(name: str, config: dict) -> tuple[bool, str]:
    """Whether the data of the task `name` come from the hub, as far as one sees, and what they are called."""
    path, more = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = more.get("data_files") or more.get("data_dir")
    if files:
        files = list(files.values()) if isinstance(files, dict) else files
        return False, files if isinstance(files, str) else ", ".join(map(str, files))
    return not (path and Path(path).exists()), " ".join(filter(None, (path or name, config.get("dataset_name"))))


def hub_unreachable() -> str | None:
    """Why the hub cannot be reached, decided in seconds; what is in the cache is then used without asking it."""
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE)"
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=5)
        return None
    except OSError as e:
        return offline(f"the hub {constants.ENDPOINT} cannot be reached ({type(e).__name__})")


def offline(why: str) -> str:
    """Ask the hub no more: each data set would be asked for six times over 23 seconds."""
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.utils.reset_sessions()
    return why


def measure(lm: TemplateLM, name: str, task: Any, limit: int | None) -> dict[str, Any]:
    """Run a task. Raises Stop.

    Returns "documents", "acc", "acc_stderr", ... as lm-eval has them (fractions), "seconds", and for multiple choice
    "choices": of each document the log-likelihoods of its choices, in nats.
    """
    begun = time.monotonic()
    task.set_fewshot_seed(1234)  # each model gets the same examples
    try:
        out = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=1000)
    except Stop:
        raise
    except Exception as e:  # of lm-eval, of the task's own code, of PyTorch
        raise Stop(f"{name}: {type(e).__name__}: {first_line(e)}") from e
    samples = out["samples"][name]
    result: dict[str, Any] = {"documents": len(samples), "seconds": round(time.monotonic() - begun, 1)}
    for key, value in out["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, (int, float)):
            result[metric if filtered == "none" else f"{metric} ({filtered})"] = value
    if task.OUTPUT_TYPE == "multiple_choice":
        result["choices"] = [[r[0] for r in s["filtered_resps"]] for s in samples]
    return result


# ----------------------------------------------------------------------------------------------------- loss on a text


@dataclasses.dataclass
class Loss:
    """nats: the mean loss of the scored tokens. tokens: of the whole text; chunks: whole pieces of it."""

    nats: float
    scored: int
    chunks: int
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf


def chunks_of(tokens: int, context: int, most: int | None = None) -> tuple[int, int]:
    """Chunks, and scored tokens of all of them, as llama-perplexity counts. Raises Stop for a short text."""
    if tokens < 2 * context:  # as there
        raise Stop(f"the text has {tokens} tokens, and chunks of {context} need {2 * context}: give a longer text, or a smaller --context")
    chunks = min(tokens // context, most or tokens)
    return chunks, chunks * (context - context // 2 - 1)


@torch.no_grad()
def held_out_loss(model, ids: Sequence[int], context: int, bos: int | None, chunks: int | None = None) -> Loss:
    """The loss on a text by llama-perplexity's protocol.

    The tokens are cut into chunks; what is left over at the end is not used. In each chunk the first token gives way to
    BOS, and tokens context/2 + 1 and on are scored, so that each is predicted from context/2 others at least.

    Args:
        model: a causal language model of transformers.
        ids: the text's tokens, with BOS in front where the vocabulary wants it, as its tokenizer gives them.
        context: tokens of a chunk.
        bos: its id, or None where the vocabulary does not want it.
        chunks: use only the first so many.

    Raises:
        Stop: the text is shorter than two chunks, or a loss is not finite.
    """
    count, scored = chunks_of(len(ids), context, chunks)
    first, total = context // 2, 0.0
    training = model.training
    model.eval()
    for i in tqdm(range(count), desc="Running chunks", unit="chunk", mininterval=0.5):
        x = torch.tensor(ids[i * context : (i + 1) * context], device=model.device)[None]  # (1, context)
        if bos is not None:
            x[0, 0] = bos
        logits = model(input_ids=x, use_cache=False).logits[0, first:-1].float()
        total += F.cross_entropy(logits, x[0, first + 1 :], reduction="none").double().sum().item()
    model.train(training)
    if not math.isfinite(total):
        raise Stop(f"the loss is {total}")
    return Loss(total / scored, scored, count, len(ids))


def torch_text(model, tokenizer, text: str, a: argparse.Namespace) -> tuple[Loss, list[int], int]:
    """A checkpoint's loss on the text, the text's tokens, and how many tokens the vocabulary has. Raises Stop."""
    ids = tokenizer.encode(text, split_special_tokens=True)  # as llama-perplexity, which takes "</s>" for text
    bos = tokenizer.bos_token_id if tokenizer.encode("a")[0] == tokenizer.bos_token_id else None
    within(a.context, resolve_max_length(model.config, tokenizer))
    try:
        return held_out_loss(model, ids, a.context, bos, a.chunks), ids, model.config.get_text_config().vocab_size
    except (RuntimeError, IndexError) as e:
        raise Stop(f"PyTorch: {first_line(e)}") from e


def gguf_text(path: Path, text: str, a: argparse.Namespace) -> tuple[Loss, list[int], int]:
    """A GGUF's. Raises Stop, NotBuilt."""
    with serve(path, 1, a.context, a.threads, "--no-repack") as server:  # it only splits the text: keep it small
        ids = server.tokenize(text, special=True, parse=False)
        within(a.context, server.trained)
    return perplexity(path, a.text, len(ids), a), ids, server.vocabulary


def within(context: int, trained: int) -> None:
    if context > trained:
        raise Stop(f"--context {context}: the model was trained on {trained} tokens")


def perplexity(model: Path, text: Path, tokens: int, a: argparse.Namespace) -> Loss:
    """`held_out_loss` of a GGUF, by llama-perplexity; `tokens`: of the text. Raises Stop, NotBuilt."""
    chunks, scored = chunks_of(tokens, a.context, a.chunks)
    began, tries = time.monotonic(), 0
    while True:  # its log is written by a thread of its own, for which it does not wait at its end
        with tool("llama-perplexity", "-m", model, "-f", text, "-c", a.context, "-t", a.threads, "--chunks", chunks,
                  "-b", min(2048, 256 * a.context), "--ppl-output-type", 1, "-fit", "off") as t, \
             tqdm(total=chunks, desc="Running chunks", unit="chunk", mininterval=0.5) as bar:  # fmt: skip
            means = []
            for line in t.lines():  # so far: tokens, perplexity, mean of the loss, its deviation
                if m := re.match(r"\s*\d+\s+{0}\s+({0})\s+{0}$".format(r"-?(?:\d+\.\d+|nan|inf)"), line):
                    means.append(float(m[1]))
                    bar.update()
            if t.process.wait():
                raise Stop(f"llama-perplexity: {t.words()}")
        tries += 1
        if len(means) == chunks:
            break
        if tries >= TRIES and time.monotonic() - began > PATIENCE:
            raise Stop(f"llama-perplexity printed {len(means)} of {chunks} chunks: {t.words()}")
    if not math.isfinite(means[-1]):
        raise Stop(f"the loss is {means[-1]}")
    return Loss(means[-1], scored, chunks, tokens)


# ------------------------------------------------------------------------------------------------- llama.cpp's programs

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Tool:
    """A tool of the built llama.cpp that runs: `process`, and the last of what it printed."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.last: collections.deque[str] = collections.deque(maxlen=500)

    def lines(self) -> Iterator[str]:
        for line in self.process.stdout:
            self.last.append(line.rstrip())
            yield line

    def words(self) -> str:
        """What it said of its failure, in one line, and how it ended."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            code = None
        mine = [re.sub(r"^\d+\.\d\d\.\d{3}\.\d{3} (?=[A-Z] )", "", line) for line in list(self.last) if line]
        errors = list(dict.fromkeys(line[2:] for line in mine if line.startswith("E ")))[:2]
        other = [line for line in mine if not re.match("[DIW] ", line)]  # of an abort, which a debugger's lines follow
        errors = errors or [line for line in other if re.search(r"GGML_|what\(\)|[Ee]rror", line)][:1] or other[-3:]
        how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{'; '.join(errors) or 'it said nothing'} ({how})"


@contextlib.contextmanager
def tool(name: str, *args: object) -> Iterator[Tool]:
    """Start a tool, and end it with the block. Raises NotBuilt.

    Ctrl-C does not reach it, only us; if we are killed, so is it. Settings of llama.cpp in the environment are not
    passed on: figures must not depend on them, and a key would lock us out.
    """

    def die_with_parent():
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    command = [str(llama_cpp.tool(name)), *map(str, args)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", env=environment, start_new_session=True,
                               preexec_fn=die_with_parent)  # fmt: skip
    try:
        yield Tool(process)
    finally:
        process.kill()  # a server forgets a SIGTERM that comes as it starts, and none of them has anything to save
        process.wait()
        process.stdout.close()


class Server:
    """A llama-server that is ready: tokens, and the probability of a token after others.

    Args:
        process: the tool that runs.
        port: where it listens.
        slots: sequences that it holds at once.
    """

    def __init__(self, process: Tool, port: int, slots: int):
        self.tool = process
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(slots):
            self.slots.put(i)
        # One connection for each slot and one besides: more of them would wait until the server gave an idle one up.
        self._http = {i: http.client.HTTPConnection("127.0.0.1", port) for i in (None, *range(slots))}
        properties = self.ask("GET", "/props")
        self.length = properties["default_generation_settings"]["n_ctx"] - 1  # it keeps room for what it predicts
        about = self.ask("GET", "/v1/models")["data"][0]["meta"]
        self.vocabulary, self.trained = about["n_vocab"], about["n_ctx_train"]
        self.bos, self.eos = (properties[f"{name}_token"] for name in ("bos", "eos"))  # as text
        self._letter = self.tokenize("a", special=False)[-1]

    def ask(self, method: str, path: str, **body: object) -> dict:
        """The answer to a request. Only one thread at a time may ask for a slot, and for none. Raises Stop."""
        connection, data = self._http[body.get("id_slot")], json.dumps(body) if body else None
        for attempt in range(2):  # it closes a connection that was idle for some seconds
            try:
                connection.request(method, path, data, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                if attempt or self.tool.process.poll() is not None:
                    raise Stop(f"llama-server does not answer ({type(e).__name__}): {self.tool.words()}") from None
                continue
            if response.status != 200:
                raise Stop(f"llama-server refuses a request: {answer.get('error', {}).get('message', answer)}")
            return answer

    def close(self) -> None:
        for connection in self._http.values():
            connection.close()

    def tokenize(self, text: str, special: bool, parse: bool = True) -> list[int]:
        """special: with BOS where the vocabulary wants it; parse: text such as "</s>" is one token."""
        return self.ask("POST", "/tokenize", content=text, add_special=special, parse_special=parse)["tokens"]

    def score(self, slot: int, prompt: list[int], token: int) -> tuple[float, bool]:
        """The natural logarithm of the probability of `token` after `prompt`, and whether no other is likelier.

        The server reports probabilities of the token that it chose and of the likeliest ones, both from the logits
        before any bias and over the whole vocabulary: a bias makes it choose ours. What of the prompt the slot had
        before is not computed again. Nothing is less than FLOOR.
        """
        chosen = self._predict(slot, prompt, token, n_probs=1)
        if chosen:
            logprob, best = chosen["logprob"], chosen["top_logprobs"][0]["id"]
        else:  # it reports none where a character is incomplete, so let it choose another and list ours
            for n in dict.fromkeys((min(256, self.vocabulary), self.vocabulary)):
                likely = self._predict(slot, prompt, self._letter, n_probs=n)["top_logprobs"]
                logprob, best = next((p["logprob"] for p in likely if p["id"] == token), None), likely[0]["id"]
                if logprob is not None:
                    break
        if logprob is None:
            raise Stop("the model gives probabilities that are no numbers")
        return max(logprob, FLOOR), best == token

    def _predict(self, slot: int, prompt: list[int], token: int, n_probs: int) -> dict | None:
        """What the server tells of the token after `prompt`, which it makes `token`."""
        answer = self.ask("POST", "/completion", prompt=prompt, id_slot=slot, cache_prompt=True, n_predict=1,
                          logit_bias=[[token, SURE]], samplers=["top_k"], top_k=1, n_probs=n_probs,
                          response_fields=["completion_probabilities"])  # fmt: skip
        return next(iter(answer.get("completion_probabilities") or []), None)


@contextlib.contextmanager
def serve(model: Path, slots: int, length: int, threads: int, *more: object) -> Iterator[Server]:
    """Run llama-server with a GGUF for `slots` sequences of `length` tokens each, or as many as it was trained on, on a
    free port of this machine alone, and wait until it is ready. `more`: flags of it. Raises Stop, NotBuilt."""
    with tool("llama-server", "-m", model, "--host", "127.0.0.1", "--port", 0, "-np", slots,
              "-c", slots * (length + 1), "-t", threads, "-fit", "off", "--swa-full", "--cache-ram", 0, "--no-warmup",
              "--no-webui", "--no-jinja", "--chat-template", "chatml",  # a model's own may be broken
              *more) as t:  # fmt: skip
        ports: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def drain():
            for line in t.lines():  # to the end, or it would block
                if m := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                    ports.put(int(m[1]))
            ports.put(None)

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        try:
            port = ports.get()
            if port is None:
                raise Stop(f"llama-server cannot run it: {t.words()}")
            with contextlib.closing(Server(t, port, slots)) as server:
                yield server
        finally:
            t.process.kill()
            reader.join()


# ------------------------------------------------------------------------------------------------------------- models


class Asked:
    """What a model was asked, to compare with another: hashes of the tokens by context and continuation; and how many
    requests were too long for it."""

    cut = 0
    max_length: int

    @functools.cached_property
    def asked(self) -> dict[tuple[str, str], int]:
        return {}

    def note(self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]]) -> None:
        for key, context, continuation in requests:
            self.cut += len(context) + len(continuation) > self.max_length + 1
            if len(continuation) > self.max_length:
                raise Stop(f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}")
            if key:
                self.asked[key] = hash((tuple(context), tuple(continuation)))


class TorchLM(Asked, HFLM):
    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        self.note(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


class ServerLM(Asked, TemplateLM):
    """lm-eval's view of a llama-server; text is split into tokens, and those are cut, as HFLM does it.

    Args:
        server: a server that is ready.
        max_length: tokens that the model sees at most, less where the server's slots hold fewer.
    """

    max_gen_toks = 256  # as HFLM's

    def __init__(self, server: Server, max_length: int):
        super().__init__()
        self.server = server
        self.max_length = min(max_length, server.length)
        self._tokenize = functools.lru_cache(1 << 12)(server.tokenize)  # the choices of a document share a context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.server.bos or self.server.eos)
        return list(self._tokenize(string, add_special_tokens))

    @functools.cached_property
    def eot_token_id(self) -> int:
        return self.server.tokenize(self.server.eos, special=False)[0]

    @functools.cached_property
    def prefix_token_id(self) -> int:
        return self.server.tokenize(self.server.bos or self.server.eos, special=False)[0]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        self.note(requests)

        def score(slot: int, i: int) -> tuple[float, bool]:
            _, context, continuation = requests[i]
            tokens = (context + continuation)[-(self.max_length + 1) :]
            total, greedy = 0.0, True
            for j in range(len(tokens) - len(continuation), len(tokens)):
                logprob, best = self.server.score(slot, tokens[:j], tokens[j])
                total, greedy = total + logprob, greedy and best
            return total, greedy

        # Requests that begin alike go to a slot one after the other, the longest first: so no estimate is too low.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1:]))
        groups = [list(g) for _, g in itertools.groupby(order, key=lambda i: requests[i][1])]
        return self._in_slots(groups, score, len(requests), "Running loglikelihood requests", disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        def generate(slot: int, i: int) -> str:
            context, settings = requests[i].args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            stop, most = handle_stop_sequences(settings["until"], eos=None), settings["max_gen_toks"]
            if most >= self.max_length:
                raise Stop(f"a task wants {most} tokens: the model takes {self.max_length} with the question")
            sampled = settings["do_sample"] and settings.get("temperature", 1.0) > 0
            answer = self.server.ask(
                "POST", "/completion", prompt=prompts[i][-(self.max_length - most) :], n_predict=most, id_slot=slot,
                stop=[s for s in stop if s], cache_prompt=True, seed=1234, samplers=["top_k", "top_p", "temperature"],
                temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_k=settings.get("top_k", 50) if sampled else 1, top_p=settings.get("top_p", 1.0),
                response_fields=["content"])  # fmt: skip
            return postprocess_generated_text(answer["content"], stop, None)

        prompts = [self.tok_encode(r.args[0]) for r in requests]
        groups = [[i] for i in range(len(requests))]
        return self._in_slots(groups, generate, len(requests), "Running generate_until requests", disable_tqdm)

    def _in_slots(self, groups: list[list[int]], work, count: int, label: str, quiet: bool) -> list:
        """`work(slot, i)` for every i; those of a group one after the other in one slot. The first error ends it."""
        results, over = [None] * count, threading.Event()

        def run_group(group: list[int]) -> int:
            slot = self.server.slots.get()
            try:
                for i in group:
                    if not over.is_set():
                        results[i] = work(slot, i)
            finally:
                self.server.slots.put(slot)
            return len(group)

        with ThreadPoolExecutor(self.server.slots.qsize()) as pool, tqdm(total=count, desc=label, disable=quiet) as bar:
            try:
                for done in as_completed([pool.submit(run_group, g) for g in groups]):
                    bar.update(done.result())
            except BaseException as e:
                over.set()
                if not isinstance(e, Exception):  # no one waits for what is still computed
                    self.server.tool.process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results


@contextlib.contextmanager
def torch_lm(model, tokenizer, a: argparse.Namespace) -> Iterator[TorchLM]:
    length = min(a.max_length, resolve_max_length(model.config, tokenizer) - 1)  # what a server's slot holds
    yield TorchLM(pretrained=model, tokenizer=tokenizer, batch_size=a.batch_size, max_length=length)


@contextlib.contextmanager
def server_lm(path: Path, a: argparse.Namespace) -> Iterator[ServerLM]:
    with serve(path, a.batch_size, a.max_length, a.threads) as server:
        yield ServerLM(server, a.max_length)


def load(path: Path, device: str, dtype: str):
    """A checkpoint and its tokenizer, complete. Raises Stop."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True,
                                                                        output_loading_info=True)  # fmt: skip
        model = model.to(device)
    except Exception as e:  # transformers, safetensors, PyTorch: each has its own
        raise Stop(f"transformers cannot load it: {first_line(e)}") from e
    lacking = [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]
    if lacking:  # transformers would go on with random weights
        raise Stop(f"the checkpoint lacks {len(lacking)} tensors of its model, {lacking[0]} among them")
    if (getattr(model.config, "sherry_config", None) or {}).get("weights") == "latent":
        say(f"{path}: its weights are latent, and PyTorch takes them unquantized; export the model to evaluate it as trained")
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------------------------------ summary


def compare(models: list[dict], asked: list[dict], ids: list[list[int]], i: int) -> dict[str, Any]:
    """Model i with the first.

    Returns "model", "with" and, where both have it: "tokens", what was split into other tokens, in words;
    "same_choice", the fraction of "documents" with the same likeliest choice; "log_likelihood", the mean absolute
    difference of the choices' log-likelihoods over their mean; "text", the relative difference of the losses per byte,
    which where the tokens are the same is that per token.
    """
    first, other = models[0], models[i]
    out: dict[str, Any] = {"model": other["model"], "with": first["model"]}
    notes = []
    if unlike := [key for key in asked[0].keys() & asked[i].keys() if asked[0][key] != asked[i][key]]:
        context, continuation = min(unlike)
        notes.append(f"{len(unlike)} of {len(asked[0])} requests, such as {context[-40:] + continuation!r}")
    if ids[0] and ids[i] and ids[0] != ids[i]:
        at = next((n for n, (x, y) in enumerate(zip(ids[0], ids[i])) if x != y), min(len(ids[0]), len(ids[i])))
        notes.append(f"the text is {len(ids[0])} tokens and {len(ids[i])}, not the same from number {at} on")
    if notes:
        out["tokens"] = "; ".join(notes)
    pairs = [(x, y) for name in first["tasks"].keys() & other["tasks"].keys() if "choices" in first["tasks"][name]
             for x, y in zip(first["tasks"][name]["choices"], other["tasks"][name]["choices"])]  # fmt: skip
    if pairs:
        likeliest = lambda x: max(range(len(x)), key=x.__getitem__)
        out["documents"] = len(pairs)
        out["same_choice"] = sum(likeliest(x) == likeliest(y) for x, y in pairs) / len(pairs)
        flat = [(u, v) for x, y in pairs for u, v in zip(x, y)]
        out["log_likelihood"] = sum(abs(u - v) for u, v in flat) / max(sum(abs(u) for u, _ in flat), 1e-30)
    if "text" in first and "text" in other:
        out["text"] = other["text"]["nats_per_byte"] / first["text"]["nats_per_byte"] - 1
    return out


def doubts(models: list[dict]) -> Iterator[str]:
    """What makes the losses on the text doubtful, a line each."""
    measured = [(m["model"], m["text"]) for m in models if "text" in m]
    for path, t in measured:
        if t["nats"] > NEAR_GUESSING * t["guessing"]:
            yield (f"{path}: guessing among its {t['vocabulary']} tokens costs {t['guessing']:.2f} nats each, and its "
                   f"loss on the text is {t['nats']:.2f}: it is untrained or damaged, or its tokenizer is another "
                   "model's")  # fmt: skip
    for path, t in measured[1:]:
        ratio = measured[0][1]["bytes_per_token"] / t["bytes_per_token"]
        if max(ratio, 1 / ratio) >= OTHER_COUNT:
            yield (f"{path} splits the text into {ratio:.2f} times as many tokens as {measured[0][0]}: one of the "
                   "tokenizers may be wrong; compare nats/byte, not nats/token")  # fmt: skip


def summary(report: dict) -> Iterator[str]:
    """The final tables."""
    models, rows = report["models"], []
    short = [Path(m["model"]).name for m in models]
    columns = short if len(set(short)) == len(short) and all(short) else [m["model"] for m in models]
    for name in dict.fromkeys(n for m in models for n in m["tasks"]):
        found = [m["tasks"].get(name, {}) for m in models]
        metrics = dict.fromkeys(k for f in found for k, v in f.items() if isinstance(v, float) and "_stderr" not in k)
        for i, metric in enumerate(m for m in metrics if m != "seconds"):
            head = ("", "") if i else (name, next(f["documents"] for f in found if f))
            rows.append((*head, metric, *(figure(f, metric) for f in found)))
    rows += [(name, "no data", "", *("-" for _ in models)) for name in report["missing"]]
    accuracies = [{n: t["acc"] for n, t in m["tasks"].items() if "acc" in t} for m in models]
    common = set.intersection(*(set(x) for x in accuracies if x)) if any(accuracies) else set()
    if len(common) > 1:
        means = (f"{100 * sum(x[n] for n in common) / len(common):.2f} %" if x else "-" for x in accuracies)
        asked = len({*report["missing"], *(n for m in models for n in m["tasks"])})
        rows.append((f"mean of {len(common)}" + f" of {asked}" * (asked > len(common)), "", "acc", *means))
    texts = [m.get("text") for m in models]
    if any(texts):
        counts = "/".join(dict.fromkeys(str(t["scored"]) for t in texts if t))
        rows.append(("text", f"{counts} tokens", "nats/token", *(f"{t['nats']:.4f}" if t else "-" for t in texts)))
        for metric, key, form in (("perplexity", "perplexity", ".3f"), ("bytes/token", "bytes_per_token", ".3f"),
                                  ("nats/byte", "nats_per_byte", ".4f")):  # fmt: skip
            rows.append(("", "", metric, *(f"{t[key]:{form}}" if t else "-" for t in texts)))
    if rows:
        yield from table(("task", "documents", "metric", *columns), rows)
    name = dict(zip((m["model"] for m in models), columns))
    for c in report["compared"]:
        told = []
        if "same_choice" in c:
            told.append(
                f"the same choice in {100 * c['same_choice']:.1f} % of {c['documents']} documents, "
                f"log-likelihoods {100 * c['log_likelihood']:.3f} % apart on average"
            )
        if "text" in c:
            told.append(f"loss on the text {100 * c['text']:+.3f} %" + " per byte" * ("tokens" in c))
        if "tokens" in c:
            told.append(f"OTHER TOKENS: {c['tokens']}")
        if told:
            yield f"{name[c['model']]} against {name[c['with']]}: {'; '.join(told)}"


def figure(found: dict, metric: str) -> str:
    value, error = found.get(metric), found.get(f"{metric}_stderr")
    if value is None:
        return "-"
    if not metric.startswith(("acc", "exact_match")):
        return f"{value:.4g}"
    return f"{100 * value:.2f} %" + (f" ± {100 * error:.2f}" if isinstance(error, float) else "")


def table(head: tuple, rows: list[tuple]) -> Iterator[str]:
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(c.ljust(w) if i in (0, 2) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
