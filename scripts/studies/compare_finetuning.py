#!/usr/bin/env python3
"""Compare ways to fine-tune a frozen quantized model: Quaff, what it is compared with, and full precision.

Each method trains LoRA adapters on questions of ARC-easy, with the loss on the answers. Its learning rate is swept with seed 0,
by factors of 2 until the best lies between two worse ones, judged on one half of the held-out questions; then it trains with
other seeds at its best rate. The report shows their loss on the other half and lm-eval's accuracy on test questions. While
full precision and Quaff train, the outliers are counted, and how many lie in the channels that calibration found before.

Finished runs are kept in --work: an interrupted comparison resumes there, and a larger one reuses them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# As in sherry_gguf.training.command; the processes that train inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # python_corpus, which other studies need

from finetune_report import calibrated, report
from finetune_runs import METHODS, QUESTIONS, WATCHED, Run, compared, hit_rates, outliers_of, train
from study_runs import Runs, compare

from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.programs import HelpWithDefaults
from sherry_gguf.training.files import differences, undamaged, write

PROGRAM = "compare_finetuning.py"
BOOKS = "books"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    add = p.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face directory of the model")
    add("--gguf-file", metavar="NAME", help="a GGUF in that directory to load instead, as transformers does")
    add("--data", type=Path, required=True, metavar="DIR", help="directory with arc_easy.{train,dev,test}.jsonl, plain or .xz, in the "
        "fields of Hugging Face's ARC data set; with books.train.jsonl there, calibration is also tried on books")  # fmt: skip
    add("--out", type=Path, default=ROOT / "scripts/results/finetuning", help="writes OUT.md, .json and .png")
    add("--work", type=Path, default=ROOT / "build/finetuning", help="directory for channels and finished runs")
    add("--methods", default=",".join(METHODS), help="methods to compare")
    add("--outliers", default="100:0.01,20:0.05,100:0.05,50:0.01,20:0.01", metavar="T:B,...", help="thresholds and budgets to calibrate "
        "with; Quaff uses the first pair, the method quaff-more the second, and outliers are counted for each")  # fmt: skip
    add("--steps", type=int, default=32, help="steps of every run")
    add("--warmup", type=int, default=4, help="steps during which the learning rate rises")
    add("--batch", type=int, default=8, help="questions per step")
    add("--seeds", type=int, default=3, help="number of seeds to report")
    add("--calibration", type=int, default=256, metavar="N", help="questions to calibrate with")
    add("--held-out", type=int, default=128, metavar="N", help="held-out questions for choices, and as many for the report")
    add("--test-questions", type=int, default=200, metavar="N", help="test questions for the accuracy")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    add("--threads", type=int, default=1, help="threads per run")
    a = p.parse_args(argv)
    a.methods = [m for m in a.methods.split(",") if m]
    if not a.methods or set(a.methods) - METHODS.keys():
        p.error(f"--methods {','.join(a.methods)}: choose from {', '.join(METHODS)}")
    try:
        outliers_of(a.outliers)
    except ValueError as e:
        p.error(f"--outliers {a.outliers}: {e}")
    for name in "steps", "batch", "seeds", "calibration", "held_out", "test_questions", "jobs", "threads":
        if getattr(a, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(a, name)}: at least 1")
    return a


def prepare(a: argparse.Namespace) -> dict:
    """Calibrate into --work; returns what was found, and the errors of layers, for the report. Raises Stop."""
    import torch
    from finetune_runs import batches, books, calibrations, channels_file, encoded, gradient_errors, layer_errors, load, questions

    from sherry_gguf import quaff

    sizes = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()
             if k not in ("out", "work", "jobs", "threads", "seeds", "methods", "steps")}  # fmt: skip
    mark = a.work / "sizes.json"
    if mark.is_file():
        with undamaged(mark, f"remove {a.work}, with the runs in it"):
            other = differences(json.loads(mark.read_text(encoding="utf-8")), sizes)
        if other:
            raise Stop(f"{a.work} was begun with other settings ({other}): choose another --work, or remove it")
    for split, count in ("dev", 2 * a.held_out), ("test", a.test_questions):
        if len(found := questions(a.data, split, count)) < count:
            raise Stop(f"--data {a.data} has {len(found)} questions for {split}, of {count}: lower --held-out or --test-questions")
    write(mark, json.dumps(sizes, indent=1) + "\n")
    examples = questions(a.data, "train", a.calibration)
    texts = {QUESTIONS: lambda tokenizer: encoded(tokenizer, examples)}
    if any((a.data / f"books.train.jsonl{end}").is_file() for end in ("", ".xz")):
        texts[BOOKS] = lambda tokenizer: books(a.data, tokenizer, a.calibration)
    errors = a.work / "errors.json"
    wanted = [(text, pair) for text in texts for pair in outliers_of(a.outliers) if not channels_file(a.work, text, pair).is_file()]
    if wanted or not errors.is_file():
        torch.set_num_threads(a.threads * a.jobs)
        model, tokenizer = load(vars(a))
        for text in dict.fromkeys(text for text, _ in wanted):
            print(f"calibrating on {text}", flush=True)
            data = batches(texts[text](tokenizer), tokenizer, a.batch)
            for pair, channels in calibrations(model, data, outliers_of(a.outliers)).items():
                channels.save(channels_file(a.work, text, pair))
    found = {text: [quaff.Channels.load(channels_file(a.work, text, pair)) for pair in outliers_of(a.outliers)] for text in texts}
    if not errors.is_file():
        batch = batches(encoded(tokenizer, questions(a.data, "dev", a.batch)), tokenizer, a.batch)[0]
        of_layers = layer_errors(model, batch, found[QUESTIONS])
        del model
        of_gradients = gradient_errors(vars(a), batch, found[QUESTIONS])
        write(errors, json.dumps({m: of_kind | of_gradients[m] for m, of_kind in of_layers.items()}) + "\n")
    agreed = {text: [calibrated(x, on_questions) for x, on_questions in zip(of_text, found[QUESTIONS])] for text, of_text in found.items()}
    with undamaged(errors, "remove it to make it again"):
        return {"calibration": agreed, "errors": json.loads(errors.read_text(encoding="utf-8"))}


def main(argv: list[str] | None = None) -> int:
    return compare(PROGRAM, parse(argv), run)


def run(a: argparse.Namespace) -> None:
    sizes = {k: v for k, v in vars(a).items() if isinstance(v, int)}
    pairs = outliers_of(a.outliers)
    results = {"sizes": sizes, "machine": cpu_name(), "model": Path(a.gguf_file or a.model).name, "outliers": pairs}
    results |= prepare(a)
    with Runs(a, Run, train) as runs:
        for rows in compared(runs, a.methods, a.steps, a.seeds):
            watched = {m: runs[Run(m, rows[m]["lr"], 1, a.steps)] for m in WATCHED if m in rows}
            results["hits"] = {m: [hit_rates(result, i) for i in range(len(pairs))] for m, result in watched.items()}
            results["methods"] = rows
            report(results, a.out)


if __name__ == "__main__":
    sys.exit(main())
