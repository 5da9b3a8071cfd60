#!/usr/bin/env python3
"""Measure what each choice in `sherry-gguf calibrate` brings: every variant differs from a base in what its name says.

A variant calibrates the layers in its own way, or distils the base's layers in its own way. Each is then measured on --evaluate:
perplexity by llama-perplexity's protocol. The base is not what calibrate does by default: it has --passes 1, --batch 2 and --train weights.
Finished variants are kept in --work; the same command continues. A --work is for one model, one text and one way to measure.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in sherry_gguf.programs.run_with_torch

ROOT = Path(__file__).resolve().parents[2]

from quality_report import grid
from real_training_runs import MILD, PUBLISHED
from study_runs import SETTINGS, Kept, Runs, compare, suffixed

from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.programs import HelpWithDefaults, call
from sherry_gguf.ternary import GROUP
from sherry_gguf.training.files import differences, undamaged, write

BASE = "base"
WEIGHTS = "*.safetensors"  # of a model
PROMPTED = ("--generated", "0.5", "--prompts", str(ROOT / "examples/prompts/encyclopedia.txt"))
SHORT = ("--context", "×0.5", "--steps", "×2")


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a calibration differs from the base.

    Attributes:
        label: for people.
        flags: of `sherry-gguf calibrate`; those of sizes are multiples of the base's, as in `--steps ×2`.
        own: calibrate the layers again; otherwise distil those of the base.
        change: what no flag changes, as `changed` knows it.
    """

    label: str
    flags: tuple[str, ...] = ()
    own: bool = True
    change: str = ""


VARIANTS = {
    BASE: Variant("base"),
    "seed": Variant("base, another seed", ("--seed", "1")),
    "rounding": Variant("rounding, not trained", ("--start", "rounding", "--passes", "0")),
    "feedback": Variant("error feedback, not trained", ("--passes", "0")),
    "from-rounding": Variant("from rounding, trained", ("--start", "rounding")),
    "zeros-magnitude": Variant("error feedback with zeros by magnitude, not trained", ("--passes", "0"), change="zeros-magnitude"),
    "from-zeros-magnitude": Variant("from error feedback with zeros by magnitude, trained", change="zeros-magnitude"),
    "any-order": Variant("layers from full-precision inputs", ("--inputs", "full")),
    "any-order-seed": Variant("layers from full-precision inputs, another seed", ("--inputs", "full", "--seed", "1")),
    "rate-half": Variant("layers, half the rate", ("--rate", "0.01")),
    "rate-twice": Variant("layers, twice the rate", ("--rate", "0.04")),
    "tokens": Variant("layers, 4 times the tokens", ("--tokens", "×4")),
    "passes": Variant("layers, two passes", ("--passes", "2")),
    "generated": Variant("half of the text generated", ("--generated", "0.5")),
    "prompted": Variant("half of the text generated, each time from the beginning of an article", PROMPTED),
    "short": Variant("sequences of half the length, twice the steps", SHORT),
    "prompted-short": Variant("both: from the beginning of an article, half the length", (*PROMPTED, *SHORT)),
    "layers-mild": Variant("layers with mild Arenas", change="layers-mild"),
    "layers-published": Variant("layers with Arenas as published", change="layers-published"),
    "scales": Variant("distillation of scales and norms", ("--train", "scales"), own=False),
    "batch-2": Variant("distillation, 2 sequences a step", ("--distill-batch", "2", "--steps", "×0.5"), own=False),
    "distill-half": Variant("distillation, half the rate", ("--distill-rate", "0.005"), own=False),
    "distill-twice": Variant("distillation, twice the rate", ("--distill-rate", "0.02"), own=False),
    "distill-mild": Variant("distillation with mild Arenas", own=False, change="distill-mild"),
    "distill-published": Variant("distillation with Arenas as published", own=False, change="distill-published"),
    "steps-2": Variant("distillation, twice the tokens", ("--steps", "×2"), own=False),
    "steps-4": Variant("distillation, 4 times the tokens", ("--steps", "×4"), own=False),
}


@dataclasses.dataclass(frozen=True)
class Run(Kept):
    """One variant at the sizes of the study."""

    variant: str
    tokens: int
    steps: int
    context: int

    def __str__(self) -> str:
        return VARIANTS[self.variant].label


def flags(run: Run) -> list[str]:
    """The run's flags, with its sizes in them."""
    sizes = {"--tokens": run.tokens, "--steps": run.steps, "--context": run.context}
    found = ["--tokens", str(run.tokens), "--passes", "1", "--batch", "2", "--steps", str(run.steps), "--train", "weights",
             "--context", str(run.context)]  # fmt: skip
    for name, value in zip(VARIANTS[run.variant].flags[::2], VARIANTS[run.variant].flags[1::2]):
        found += [name, str(round(float(value[1:]) * sizes[name])) if value.startswith("×") else value]
    return found


@contextlib.contextmanager
def changed(change: str) -> Iterator[None]:
    """Within the block, calibration does what no flag asks for."""
    from sherry_gguf.calibration import distillation, feedback, training

    if not change:
        yield
        return
    where, _, how = change.partition("-")
    owner: Any
    owner, name, replaced = {
        "zeros": (feedback, "choose", choose_by),
        "layers": (training.Task, "train", layers_with),
        "distill": (distillation, "distil", distil_with),
    }[where]
    before = getattr(owner, name)
    setattr(owner, name, replaced(before, how))
    try:
        yield
    finally:
        setattr(owner, name, before)


def choose_by(choose: Any, how: str) -> Any:
    """`feedback.choose` with the zero at the smallest magnitude, so that only the signs are chosen by their error."""
    import torch

    def changed_choose(weight, factor, patterns, d):
        smallest = weight.abs().argmin(-1)
        codes, errors = torch.empty_like(smallest), torch.empty_like(weight)
        for lane in range(GROUP):
            rows, fitting = smallest == lane, (patterns[:, lane] == 0).nonzero().squeeze(-1)
            found, errors[rows] = choose(weight[rows], factor, patterns[fitting], d[rows])
            codes[rows] = fitting[found]
        return codes, errors

    return changed_choose


def residual(module: Any, how: str, steps: int):
    """A function of the steps that are done, which sets λ of Arenas for the next one."""
    from sherry_gguf.qat.arenas import Arenas
    from sherry_gguf.qat.linear import quantized_layers, set_residual

    settings: dict[str, Any] = dict({"mild": MILD, "published": PUBLISHED}[how])
    arenas = Arenas(**settings)

    def move(done: int) -> None:
        set_residual(module, arenas.at(done, steps) if done < steps else 0.0, arenas.rescale)
        for m in quantized_layers(module).values():
            m.training = done < steps  # λ is used in training alone. The other modules stay as they are: there may be dropout

    move(0)
    return move


def layers_with(train: Any, how: str) -> Any:
    """`training.Task.train` with Arenas."""

    def changed_train(task, rate, passes, seed, advance):
        move, done = residual(task.layer.module, how, task.steps(passes)), iter(range(1, task.steps(passes) + 1))

        def step(loss: float) -> None:
            move(next(done))
            advance(loss)

        train(task, rate, passes, seed, step)

    return changed_train


def distil_with(distil: Any, how: str) -> Any:
    """`distillation.distil` with Arenas."""

    def changed_distil(model, head, fixed, ids, states, d, saved, advance):
        move = residual(model, how, d.steps)

        def step(done: int, loss: float) -> None:
            move(done)
            advance(done, loss)

        distil(model, head, fixed, ids, states, d, saved, step)

    return changed_distil


def train(run: Run, a: dict) -> dict:
    """Calibrate and measure one variant in this process.

    Returns its report; `choice` is the loss on --evaluate in nats a token, infinite if the distillation diverged.
    Raises Stop, also if the base's distillation diverged.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    from sherry_gguf.calibration import command
    from sherry_gguf.calibration.distillation import Diverged
    from sherry_gguf.calibration.run import DISTILLED, REPORT
    from sherry_gguf.calibration.run import run as calibrate

    began, v, work = time.monotonic(), VARIANTS[run.variant], Path(a["work"])
    output = work / f"{run.variant}.hf"
    layers = work / f"{run.variant if v.own else BASE}.layers"
    shutil.rmtree(output, ignore_errors=True)
    (layers / DISTILLED).unlink(missing_ok=True)  # another variant's, or one that was cut off
    arguments = [a["model"], "--text", *a["texts"], "--output", str(output), "--work", str(layers), "--bf16", a["bf16"],
                 "--device", a["device"]]  # fmt: skip
    result = {"run": dataclasses.asdict(run), "machine": a["machine"]}
    try:
        with changed(v.change):
            calibrate(command.parse([*arguments, *flags(run)], "calibrate"))
    except Diverged as e:
        if run.variant == BASE:
            raise
        return result | {"choice": math.inf, "failed": str(e), "seconds": round(time.monotonic() - began, 1)}
    finally:
        if run.variant != BASE and v.own:
            shutil.rmtree(layers, ignore_errors=True)
    found = json.loads((output / REPORT).read_text())
    seconds, measured = time.monotonic() - began, work / f"{run.variant}.json"
    call(sys.executable, ROOT / "scripts/evaluate.py", output, "--text", a["evaluate"], "--context", run.context, "--chunks", a["chunks"],
         "--output", measured)  # fmt: skip
    text = json.loads(measured.read_text())["models"][0]["text"]
    shutil.rmtree(output)
    last = found["layers"][-1]
    return result | {"choice": text["nats"], "perplexity": text["perplexity"], "scored": text["scored"],
                     "error": last["errors"][last["kept"]], "distillation": found["distillation"], "layers": found["layers"],
                     "seconds": round(seconds, 1)}  # fmt: skip


def identity(*names: str | Path, pattern: str = "*") -> str:
    """What tells files, and those of the pattern in directories, from others. It does not read them: that would take long."""
    paths, stats = [Path(name).resolve() for name in names], []
    for path in paths:
        for file in sorted(p for p in path.rglob(pattern) if p.is_file()) if path.is_dir() else [path]:
            s = file.stat()
            stats.append((str(file), s.st_size, s.st_mtime_ns))
    return f"{', '.join(map(str, paths))} (files {hashlib.sha256(repr(stats).encode()).hexdigest()[:12]})"


def check_settings(a: argparse.Namespace) -> None:
    """Keep in --work what all runs depend on. If a.bf16 is `auto`, it becomes what the first call found.

    Raises Stop if --work was begun with other settings, and OSError if a text is not there.
    """
    from sherry_gguf.qat.trainer import bf16_is_faster

    if not any(Path(a.model).glob(WEIGHTS)):
        raise Stop(f"{a.model} has no {WEIGHTS}")
    now = {"model": identity(a.model, pattern=WEIGHTS), "text": identity(*a.texts), "evaluate": identity(a.evaluate),
           "chunks": a.chunks, "device": a.device, "bf16": a.bf16}  # fmt: skip
    mark, then = a.work / SETTINGS, {}
    if mark.exists():
        with undamaged(mark, f"remove {a.work} to start over"):
            then = dict(json.loads(mark.read_text()))
            if a.bf16 == "auto":
                now["bf16"] = then["bf16"]
        if other := differences(then, now):
            raise Stop(f"{a.work} was begun with other settings ({other}): choose another --work")
    elif a.bf16 == "auto":
        # as calibrate decides it, but once for all variants: it is a measurement, which may come out differently
        now["bf16"] = str(a.device.partition(":")[0] != "cpu" or bf16_is_faster()).lower()
    a.bf16 = now["bf16"]
    write(mark, json.dumps(now, indent=1) + "\n")


def study(a: argparse.Namespace) -> None:
    """Run the variants that are not done, and report. Raises Stop, OSError."""
    check_settings(a)
    runs_of = {name: Run(name, a.tokens, a.steps, a.context) for name in VARIANTS if name in a.variants}
    a.jobs, a.machine = 1, cpu_name()
    with Runs(a, Run, train) as runs:
        runs.need(list(runs_of.values()))
        report(a, [runs[run] for run in runs_of.values()])


def report(a: argparse.Namespace, results: list[dict]) -> None:
    """Write out.md, .json and .png."""
    a.out.parent.mkdir(parents=True, exist_ok=True)
    shown = [r | {"choice": None} if "failed" in r else r for r in results]  # JSON has no infinity
    write(suffixed(a.out, ".json"), json.dumps(shown, indent=1, allow_nan=False) + "\n")
    write(suffixed(a.out, ".md"), table(results) + "\n")
    plot(results, suffixed(a.out, ".png"))


def table(results: list[dict]) -> str:
    """The results in Markdown."""
    # What calibrate itself measures is in the JSON alone: variants differ in the text that they hold out, and in their layers' inputs.
    base = results[0]
    run, seed = base["run"], VARIANTS["seed"].label
    chance = f'"{seed}" shows how large a difference chance makes. ' * any(r["run"]["variant"] == "seed" for r in results)
    about = (f"Base: layers on {run['tokens']} tokens in one pass, then {run['steps']} steps of a sequence of {run['context']} tokens. "
             "All variants are distilled; \"trained\" is said of the layers. Loss (nats a token) and perplexity are of "
             f"{base['scored']} other tokens. Minutes are those of calibrate. A variant whose name begins with \"distillation\" has the "
             f"base's layers, and its minutes leave them out. {chance}{base['machine']}.")  # fmt: skip
    rows = []
    for r in results:
        measured = ["diverged", "–", "–"]
        if "failed" not in r:
            difference = f"{r['choice'] - base['choice']:+.3f}" if r is not base else "–"
            measured = [f"{r['choice']:.3f}", difference, f"{r['perplexity']:.0f}"]
        rows.append([VARIANTS[r["run"]["variant"]].label, *measured, f"{r['seconds'] / 60:.1f}"])
    return f"{about}\n\n{grid(['variant', 'loss', 'against the base', 'perplexity', 'minutes'], rows)}"


def plot(results: list[dict], path: Path) -> None:
    """A bar for each variant: how much its loss differs from the base's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = results[0]["choice"]
    others = [r for r in results[:0:-1] if "failed" not in r]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(others)), layout="constrained")
    differences = [r["choice"] - base for r in others]
    colors = ["tab:red" if d > 0 else "tab:green" for d in differences]
    axes.barh([VARIANTS[r["run"]["variant"]].label for r in others], differences, color=colors)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlabel=f"nats a token more than the base,\nwhich has {base:.2f} (less is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("model", metavar="MODEL", help="Hugging Face directory of a trained model")
    p.add_argument("--text", nargs="+", required=True, dest="texts", metavar="PATH", help="text to calibrate on, as for calibrate")
    p.add_argument("--evaluate", type=Path, required=True, metavar="FILE", help="text to measure on, as for evaluate --text")
    p.add_argument("--work", type=Path, default=ROOT / "build/real/calibration", metavar="DIR", help="directory for all that is kept")
    p.add_argument("--out", type=Path, default=ROOT / "scripts/results/calibration", metavar="PATH", help="writes PATH.md, .json and .png")
    p.add_argument("--variants", default="", metavar="A,B", help=f"besides {BASE}, of {', '.join(VARIANTS)}; empty: all")
    p.add_argument("--tokens", type=int, default=1 << 15, metavar="N", help="tokens for the base's layers")
    p.add_argument("--steps", type=int, default=96, metavar="N", help="steps of the base's distillation")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a sequence, and of a chunk to measure on")
    p.add_argument("--chunks", type=int, default=32, metavar="N", help="chunks to measure on")
    p.add_argument("--device", default="cpu", help="where to compute")
    p.add_argument("--bf16", choices=["auto", "true", "false"], default="auto", help="multiply in bfloat16; auto: where it is faster")
    a = p.parse_args(argv)
    a.variants = {BASE, *([name for name in a.variants.split(",") if name] or VARIANTS)}
    if unknown := a.variants - set(VARIANTS):
        p.error(f"--variants {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    for name, least in {"tokens": 1, "steps": 2, "context": 2, "chunks": 1}.items():  # a variant has half of them
        if getattr(a, name) < least:
            p.error(f"--{name} {getattr(a, name)}: at least {least}")
    a.model = str(Path(a.model).resolve())
    return compare("calibration_choices.py", a, study)


if __name__ == "__main__":
    sys.exit(main())
