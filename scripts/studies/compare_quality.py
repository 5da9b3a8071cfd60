#!/usr/bin/env python3
"""Compare the held-out losses of every training method, each with the same budget, on this machine's Python standard library.

There are two settings: `pretrained`, quantization-aware training that starts from a trained full-precision model, as in the
paper, and `scratch`. To be fair, the learning rate of every method is swept with seed 0, by factors of 2 until the best lies
between two worse ones, judged on one half of the held-out text; so are Arenas' settings. Then every method trains with other
seeds at its best rate, and the report shows their loss on the other half. If a second choice comes too close for one seed to
tell, both train with these seeds, and their losses on the half for choices decide.

Finished runs are kept in --work: an interrupted comparison resumes there, and a larger one reuses them.
"""

import argparse
import json
import math
import os
import sys
import sysconfig
from pathlib import Path

# As in sherry_gguf.training.command; the processes that train inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python_corpus.py

import numpy as np
from quality_report import report
from quality_runs import LENGTHS, PUBLISHED, RATES, Comparison, Run, train
from study_runs import Runs, compare

from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.programs import HelpWithDefaults
from sherry_gguf.training.files import differences, undamaged, write

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "compare_quality.py"


def prepare(a: argparse.Namespace) -> dict:
    """Put the tokens into --work; returns their figures for the report. Raises Stop."""
    import python_corpus

    python_corpus.check_sizes(a.hidden, a.intermediate)
    a.work.mkdir(parents=True, exist_ok=True)
    sizes = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()
             if k not in ("out", "work", "jobs", "threads", "seeds", "settings", "steps", "explored", "lengths")}  # fmt: skip
    mark = a.work / "sizes.json"
    if mark.is_file():
        with undamaged(mark, f"remove {a.work}, with the runs in it"):
            other = differences(json.loads(mark.read_text(encoding="utf-8")), sizes)
        if other:
            raise Stop(f"{a.work} was begun with other settings ({other}): choose another --work, or remove it")
    tokens = a.work / "tokens.npz"
    if not tokens.is_file() or not mark.is_file():  # without the mark they may come from other settings
        train_texts, held_out = python_corpus.read(a.corpus, a.corpus_bytes, everything=True)
        model = python_corpus.train_tokenizer(train_texts, a.vocab)
        (a.work / "tokenizer.model").write_bytes(model)
        part = a.work / "part.npz"
        np.savez(part, train=python_corpus.encode(model, train_texts), held_out=python_corpus.encode(model, held_out))
        os.replace(part, tokens)
    with undamaged(tokens, "remove it to make it again"), np.load(tokens) as z:
        size, held_out = len(z["train"]), len(z["held_out"]) // (a.context - 1)
    if held_out < 2 or size < a.batch * a.context:
        raise Stop(f"{a.corpus} gives {size} tokens to train on and {held_out} held-out blocks: use a larger --corpus")
    if not mark.is_file():
        write(mark, json.dumps(sizes, indent=1) + "\n")
    corpus = a.corpus.resolve()
    stdlib = corpus == Path(sysconfig.get_path("stdlib")).resolve()
    return {"tokens": size, "held_out": min(a.eval_blocks, held_out // 2) * (a.context - 1),
            "corpus": "the standard library" if stdlib else corpus.name}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    import python_corpus

    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--out", type=Path, default=ROOT / "scripts/results/quality", help="writes OUT.md, .json and .png")
    p.add_argument("--work", type=Path, default=ROOT / "build/quality", help="directory for tokens and finished runs")
    python_corpus.add_corpus(p, 60_000_000)
    python_corpus.add_sizes(p, context=128)
    p.add_argument("--settings", default="pretrained,scratch", help="settings to compare in")
    p.add_argument("--explored", metavar="JSON", default=argparse.SUPPRESS, help="""try these settings of Arenas instead of ours: a
        list of their differences from the published ones, such as '[{"peak": 0.1, "end": 0.5}]'""")  # fmt: skip
    p.add_argument("--lengths", metavar="X,Y", default=argparse.SUPPRESS, help="""also compare Arenas with none in runs of these multiples
        of --steps, or '' (default: 0.25,4 from a trained model, 0.25 from scratch)""")  # fmt: skip
    p.add_argument("--steps", type=int, default=600, help="steps of every run")
    p.add_argument("--base-steps", type=int, default=3000, help="steps of the full-precision model that `pretrained` starts from")
    p.add_argument("--base-batch", type=int, default=16, help="its sequences per step")
    p.add_argument("--base-lr", type=float, default=3e-3, help="its highest learning rate")
    p.add_argument("--seeds", type=int, default=3, help="number of seeds to report")
    p.add_argument("--eval-blocks", type=int, default=256, help="held-out sequences for choices, and as many for the report")
    p.add_argument("--jobs", type=int, default=1 if gpu() else os.cpu_count(), help="runs at a time")
    p.add_argument("--threads", type=int, default=1, help="threads per run")
    p.add_argument("--float32", dest="bf16", action="store_false", help="train with float32 products, not bfloat16")
    a = p.parse_args(argv)
    a.settings = [s for s in a.settings.split(",") if s]
    a.explored = explored(a.explored, p) if "explored" in a else None
    a.lengths = lengths(a.lengths, p) if "lengths" in a else None
    shortest = min(min(x, default=1) for x in (LENGTHS.values() if a.lengths is None else [a.lengths]))
    least = {"layers": 1, "context": 2, "batch": 1, "steps": math.ceil(1 / min(1, shortest)), "base_steps": 1,
             "base_batch": 1, "seeds": 1, "eval_blocks": 1, "jobs": 1, "threads": 1, "corpus_bytes": 1}  # fmt: skip
    for name, n in least.items():
        if getattr(a, name) < n:
            p.error(f"--{name.replace('_', '-')} {getattr(a, name)}: at least {n}")
    if not a.settings:
        p.error(f"--settings: choose from {', '.join(RATES)}")
    if unknown := set(a.settings) - set(RATES):
        p.error(f"--settings {', '.join(sorted(unknown))}: choose from {', '.join(RATES)}")
    return a


def explored(text: str, p: argparse.ArgumentParser) -> list[dict]:
    """The settings of --explored. Wrong ones end the program."""
    from sherry_gguf.qat import Arenas

    try:
        settings = json.loads(text)
        if not isinstance(settings, list) or not settings:
            raise ValueError("it must be a non-empty list")
        for changed in settings:
            if not isinstance(changed, dict) or not changed.keys() <= PUBLISHED.keys():
                raise ValueError(f"{json.dumps(changed)} must be an object of {', '.join(PUBLISHED)}")
            for key, value in changed.items():
                wanted = (int, float) if isinstance(PUBLISHED[key], float) else type(PUBLISHED[key])
                if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                    raise ValueError(f"{key} is {json.dumps(value)}: it must be like {json.dumps(PUBLISHED[key])}")
            Arenas(**(PUBLISHED | changed))
    except (ValueError, RecursionError, OverflowError) as e:
        p.error(f"--explored {text}: {e}")
    return settings


def lengths(text: str, p: argparse.ArgumentParser) -> list[float]:
    """The numbers of --lengths. Wrong ones end the program."""
    try:
        multiples = [float(x) for x in text.split(",") if x]
    except ValueError:
        multiples = [math.nan]
    if not all(1e-3 <= x <= 1e3 for x in multiples):
        p.error(f"--lengths {text}: numbers from 0.001 to 1000, separated by commas")
    return multiples


def gpu() -> str:
    """The GPU's name, or ""."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def main(argv: list[str] | None = None) -> int:
    return compare(PROGRAM, parse(argv), run)


def run(a: argparse.Namespace) -> None:
    figures = prepare(a)
    sizes = {k: v for k, v in vars(a).items() if isinstance(v, int)}
    results = {"sizes": sizes, "machine": gpu() or cpu_name(), **figures, "settings": {}}
    with Runs(a, Run, train) as runs:
        if "pretrained" in a.settings:
            base = Run("base", "full", a.base_lr, 0, (), a.base_steps)
            if not (a.work / "base/config.json").is_file():
                runs.done.pop(base.key(), None)  # its model is gone
            print(f"pretrained: the full-precision model, {a.base_steps} steps", flush=True)
            runs.need([base])
            results["base"] = runs[base]
        for setting in a.settings:
            results["settings"][setting] = Comparison(runs, setting, a).result()
            results["parameters"] = next(iter(runs.done.values()))["parameters"]
            report(results, a.out)


if __name__ == "__main__":
    sys.exit(main())
