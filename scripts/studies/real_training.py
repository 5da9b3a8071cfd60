#!/usr/bin/env python3
"""Train a real model with every method: held-out loss and accuracies against the tokens seen.

Three steps, so that the second needs neither a network nor a build, and can be another machine with a GPU:

  real_training.py prepare --data DIR   text, tasks and weights, into --work
  real_training.py run --minutes 9      train until the time is up; call again
  real_training.py report               tables and a plot of what is done

`prepare` also copies all that `run` needs into --work/parts, in files of at most
--part-size. `run` puts them together again. It reports what is done, and says
if there is more to do.

Each method's learning rate is swept with seed 0, by factors of 2 until the best lies between two worse ones, on one half of the held-out
text. Then it trains with other seeds at its best rate; the report shows these seeds' losses on the other half.

Two machines can share the work: copy --work/parts to both, and give the report of
one, OUT.json, to the other's `run --merge`.

--data names a directory with books.train.jsonl.xz and books.heldout.jsonl.xz (a document in each line's field `text`) and the tasks' files
(examples/tasks/README.md).
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path

# As in sherry_gguf.programs.run_with_torch; the processes that train inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]  # on a machine where nothing is installed

from real_training_report import report
from real_training_runs import METHODS, Run, all_runs, memory, train
from study_runs import SETTINGS, Paused, Runs

from sherry_gguf.errors import NotBuilt, Stop
from sherry_gguf.programs import HelpWithDefaults
from sherry_gguf.training.files import differences, locked, undamaged, write

PROGRAM = "real_training.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("step", choices=["prepare", "run", "report"], help="what to do")
    p.add_argument("--work", type=Path, default=ROOT / "build/real/training", help="directory for all that is kept")
    p.add_argument("--out", type=Path, default=ROOT / "scripts/results/real-training", help="writes OUT.md, .json and .png")
    g = p.add_argument_group("prepare")
    g.add_argument("--data", type=Path, metavar="DIR", help="directory of the texts and tasks")
    g.add_argument("--model", choices=["gemma", "smollm2"], default="gemma", help="the model")
    g.add_argument("--source", type=Path, metavar="DIR", help="another Hugging Face directory instead")
    g.add_argument("--tokens", type=int, default=1 << 22, metavar="N", help="tokens of the text, at most")
    g.add_argument("--held-out-tokens", type=int, default=1 << 18, metavar="N", help="of the held-out text, at most")
    g.add_argument("--tasks", default="arc_easy,arc_challenge,piqa,winogrande,hellaswag", help="tasks; empty: none")
    g.add_argument("--limit", type=int, default=200, metavar="N", help="documents of each task")
    g.add_argument("--part-size", type=int, default=40, metavar="MB", help="size of a part, at most")
    g = p.add_argument_group("run")
    g.add_argument("--minutes", type=float, default=0.0, metavar="N", help="stop after N minutes; 0: when all is done")
    g.add_argument("--methods", default="", metavar="A,B", help=f"methods to train, of {', '.join(METHODS)}; empty: all")
    g.add_argument("--granularity", choices=["per_group", "per_channel"], default="per_group", help="which weights share a scale")
    g.add_argument("--steps", type=int, default=300, metavar="N", help="steps of a run")
    g.add_argument("--batch", type=int, default=1, metavar="N", help="sequences in a step; fewer learn more from the same text")
    g.add_argument("--micro", type=int, default=1, metavar="N", help="sequences at a time; more are faster on a GPU")
    g.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a sequence")
    g.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds to report")
    g.add_argument("--eval-blocks", type=int, default=48, metavar="N", help="held-out sequences for choices, and as many for the report")
    g.add_argument("--task-looks", type=int, default=4, metavar="N", help="""how often a reported run answers the tasks after
        its start; 0: only at its end. By default a look reads 114,000 tokens, while a run trains on 154,000""")  # fmt: skip
    g.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time; 0: one on a GPU, else what CPUs and memory allow")
    g.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads of a run; 0: the CPUs divided by --jobs")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to train")
    g.add_argument("--merge", type=Path, metavar="FILE", help="also take the finished runs of another machine's OUT.json")
    g.add_argument("--float32", dest="bf16", action="store_false", help="train with float32 products, not bfloat16")
    a = p.parse_args(argv)
    a.methods = [name for name in a.methods.split(",") if name] or list(METHODS)
    if unknown := set(a.methods) - set(METHODS):
        p.error(f"--methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    if a.step == "prepare" and not a.data:
        p.error("the following arguments are required: --data")
    for name in "tokens", "held_out_tokens", "limit", "part_size", "steps", "batch", "micro", "seeds", "eval_blocks":
        if getattr(a, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(a, name)}: at least 1")
    for name in "jobs", "threads", "task_looks":
        if getattr(a, name) < 0:
            p.error(f"--{name.replace('_', '-')} {getattr(a, name)}: at least 0")
    return a


def prepare(a: argparse.Namespace) -> None:
    """Raises Stop, ConvertError, OSError."""
    import real_files
    import real_training_files as files

    lacking = [name for name in files.TEXTS if not (a.data / name).is_file()]
    if lacking:
        raise Stop(f"--data {a.data} lacks {', '.join(lacking)}: English books, a document in each line's field `text`")
    if (a.work / files.COMPLETE).exists():
        raise Stop(f"{a.work} is prepared: choose another --work, or remove it, with the runs in it")
    model, real = real_files.MODELS[a.model], ROOT / "build/real"
    if a.source:
        source, name = a.source, a.source.resolve().name
        print("--source: token ids are not compared with llama.cpp's, which needs a GGUF of the same model", flush=True)
    else:
        print(real_files.terms(model, real), flush=True)
        source, name = real_files.directory(model, real), f"{model.name} (the weights of {model.file})"
        try:
            real_files.check_tokens(source, real_files.f16(model, real), "".join(files.texts(a.data / files.TEXTS[1])))
        except NotBuilt as e:
            print(f"token ids are not compared with llama.cpp's: {e}", flush=True)
    files.prepare(source, name, a)
    parts = list((a.work / files.PARTS).glob("*.part"))
    print(f"{a.work / files.PARTS} is all that `run` needs elsewhere: {len(parts)} parts, {sum(f.stat().st_size for f in parts) >> 20} MiB")


def run(a: argparse.Namespace) -> bool:
    """Train; whether all is done. Raises Stop, OSError."""
    import psutil
    import real_training_files as files
    import torch

    from sherry_gguf.training.run import SLOW_BF16, bf16_time

    figures = files.load(a.work, a.context)[0]
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.device == "cpu" and a.bf16 and (slower := bf16_time()) > SLOW_BF16:
        print(f"{PROGRAM}: on this CPU bfloat16 products take {slower:.3g} times as long as float32: add --float32", file=sys.stderr)
    a.machine = torch.cuda.get_device_name() if a.device == "cuda" else cpu_name()
    a.deadline = time.time() + 60 * a.minutes if a.minutes else float("inf")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fit = max(1, int(psutil.virtual_memory().available / memory(figures, a.methods)))
    a.jobs = a.jobs or (1 if a.device == "cuda" else min(cpus, fit))  # two runs of one thread: 1.4 times the steps of one run with two
    a.threads = a.threads or max(1, cpus // a.jobs)
    settings = {name: getattr(a, name) for name in ("bf16", "micro", "eval_blocks", "task_looks")} | {"data": figures["data"]}
    mark = a.work / SETTINGS
    if mark.exists():
        with undamaged(mark, "remove it, and runs.jsonl, start-*.json and checkpoints beside it"):
            other = differences(json.loads(mark.read_text()), settings)
        if other:
            raise Stop(f"{a.work} was begun with other settings ({other}): choose another --work")
    write(mark, json.dumps(settings) + "\n")
    merged = finished(a.merge, settings) if a.merge else []
    with Runs(a, Run, train) as runs:
        if a.merge:
            print(f"{runs.add(merged)} runs from {a.merge}", flush=True)
        try:
            all_runs(runs, a)
        except Paused:
            return False
    return True


def finished(path: Path, settings: dict) -> list[dict]:
    """The runs of another machine's report. Raises Stop if it trained on other data or with other settings."""
    if not path.is_file():
        raise Stop(f"--merge {path} is not there")
    with undamaged(path, "copy it again"):
        report = json.loads(path.read_text())
        then, results = dict(report["settings"]), list(report["runs"])
        for result in results:
            Run.saved(result["run"])
    if other := differences(then, settings):
        raise Stop(f"--merge {path} was made with other settings ({other})")
    return results


def cpu_name() -> str:
    """Imported late: what names a CPU needs the package's libraries, which a machine that only trains may lack."""
    try:
        from sherry_gguf.bench import cpu_name as named

        return named()
    except ImportError:
        return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker too
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        with locked(a.work, "--work") if a.step != "report" else contextlib.nullcontext():
            if a.step == "prepare":
                prepare(a)
                return 0
            done = run(a) if a.step == "run" else True
        reported = report(a.work, a.out)
        if not reported and done:
            raise Stop(f"no run is complete in {a.work}")
        if reported:
            print(f"wrote {a.out}{', '.join(reported)}")
        if not done:
            print("the time is up: run the same command again to go on")
        return 0
    except (Stop, OSError, ValueError) as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; run the same command again to resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
