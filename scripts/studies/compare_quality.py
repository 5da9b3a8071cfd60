#!/usr/bin/env python3
"""Train every method with one budget on this machine's Python standard library, and compare the held-out losses.

Two settings: `pretrained`, quantization-aware training that starts from a trained full-precision model, as in the paper,
and `scratch`. Fair by this order: for every method the learning rate is swept with seed 0, by factors of 2 until the best
lies between two worse ones, and judged on one half of the held-out text; so are Arenas' settings. Then every method trains
with other seeds at its best rate, and what is reported is their loss on the other half. Where a second choice came so close
that one seed can't tell, both train with these seeds, and their losses on the half for choices decide.

Finished runs are kept in --work: an interrupted comparison goes on where it stopped, and a larger one reuses them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

# PyTorch's threads wait for each other by spinning, which beside other work makes a step five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / d) for d in (".", "bench")]

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
WARMUP = 0.05  # share of the steps in which the learning rate rises
EXTEND = 3  # times that a sweep is extended on either side, at most
METHODS = {
    "full": "full precision",
    "absmean": "absmean ternary",
    "twn": "TWN ternary",
    "sherry": "Sherry without Arenas",
    "arenas": "Sherry with Arenas",
    "arenas-published": "Sherry, Arenas as published",
    "binary": "binary",
}
PUBLISHED = dict(peak=1.0, warmup=0.1, decay="cosine", end=1.0, rescale=False)
# Arenas' settings that are tried, each by what makes it differ from the published one.
EXPLORED = {
    "pretrained": [
        dict(),
        dict(peak=0.5),
        dict(peak=0.25),
        dict(peak=0.1),
        dict(end=0.5),
        dict(peak=0.25, end=0.5),
        dict(peak=0.1, end=0.5),
        dict(warmup=0.0),
        dict(decay="linear"),
        dict(decay="exponential"),
        dict(rescale=True),
        dict(rescale=True, warmup=0.0, end=0.5),
        dict(rescale=True, warmup=0.0, end=0.25),
        dict(rescale=True, warmup=0.0, peak=4.0, end=0.5),
        dict(rescale=True, warmup=0.0, peak=0.25, end=0.5),
    ],
    "scratch": [
        dict(),
        dict(peak=0.25),
        dict(end=0.5),
        dict(peak=0.25, end=0.5),
        dict(rescale=True),
        dict(rescale=True, warmup=0.0, end=0.5),
    ],
}
RATES = {"pretrained": (5e-4, 1e-3, 2e-3), "scratch": (2e-3, 4e-3, 8e-3)}  # where a sweep begins
RATES_FULL = {"pretrained": (1.25e-4, 2.5e-4, 5e-4), "scratch": (2e-3, 4e-3, 8e-3)}
FINALISTS = 2  # of Arenas' settings explored, whose learning rate is swept
TIE, LEADERS = 3e-3, 2  # choices whose losses differ by less, as a seed's can, and how many of them get all seeds
# Multiples of the steps, in which Arenas is compared with none, at each's best rate there: does a longer run turn it?
LENGTHS = {"pretrained": [0.25, 4], "scratch": [0.25]}


class Stop(Exception):
    """What a person can mend; the message says how."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: all that its result depends on, besides the sizes that --work was begun with."""

    setting: str
    method: str  # of quantizer.METHODS
    lr: float
    seed: int
    arenas: tuple[tuple[str, object], ...] = ()  # of Arenas, in order; () is without
    steps: int = 0

    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def arenas(**changed) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((k, type(PUBLISHED[k])(v)) for k, v in (PUBLISHED | changed).items()))  # 1 and 1.0 are one run


# ------------------------------------------------------------------------------------------------------------ one run


def train(run: Run, a: dict) -> dict:
    """Train one run in this process; the losses (nats a token), the training's curve and its time in seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    import python_corpus
    import torch
    import transformers
    from transformers import LlamaForCausalLM, PrinterCallback, TrainingArguments

    from sherry_gguf import qat
    from sherry_gguf.qat.data import Blocks, mean_loss, pack

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(a["threads"])
    with np.load(Path(a["work"]) / "tokens.npz") as z:
        blocks = pack(z["train"], a["context"], 1)
        held_out = pack(z["held_out"], a["context"], 1)
    held_out = np.random.default_rng(0).permutation(held_out)[: a["eval_blocks"] * 2]  # halves alike
    if run.setting == "pretrained":
        model = LlamaForCausalLM.from_pretrained(Path(a["work"]) / "base", dtype=torch.float32)
    else:
        model = python_corpus.small_llama(a["vocab"], a["layers"], a["hidden"], a["intermediate"], a["context"], run.seed)
    qat.prepare(model, qat.QuantConfig(run.method))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = TrainingArguments(
        output_dir=str(Path(a["work"]) / "trainer"),
        max_steps=run.steps,
        per_device_train_batch_size=a["base_batch" if run.setting == "base" else "batch"],
        learning_rate=run.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(run.steps * WARMUP),
        weight_decay=0.0,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=a["bf16"],
        use_cpu=device == "cpu",
        seed=run.seed,
        data_seed=1000 if run.setting == "base" else 2000 + run.seed,  # not the blocks that the base saw first
        logging_steps=max(1, run.steps // 40),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
        average_tokens_across_devices=False,
    )
    looked_at = run.method != "full" and run.seed == 1  # of which `report` shows them
    monitor = qat.TrainingMonitor(max(2, run.steps // 20)) if looked_at else None
    trainer = qat.SherryTrainer(
        model, args, train_dataset=Blocks(blocks), monitor=monitor, arenas=qat.Arenas(**dict(run.arenas)) if run.arenas else None
    )
    trainer.remove_callback(PrinterCallback)
    at_once = 8 if device == "cpu" else 64
    before = mean_loss(model, held_out[1::2], at_once)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    result = {
        "run": dataclasses.asdict(run), "parameters": model.num_parameters(), "before": before,
        "choice": mean_loss(model, held_out[::2], at_once), "report": mean_loss(model, held_out[1::2], at_once),
        "seconds": round(seconds, 1), "curve": [
            {k: round(v, 6) for k, v in entry.items() if isinstance(v, (int, float))}
            for entry in trainer.state.log_history if "loss" in entry],
    }  # fmt: skip
    if run.setting == "base":
        part = Path(a["work"]) / "base.part"
        model.save_pretrained(part)
        shutil.rmtree(Path(a["work"]) / "base", ignore_errors=True)
        os.replace(part, Path(a["work"]) / "base")
    return result


# ----------------------------------------------------------------------------------------------------------- many runs


class Runs:
    """Runs, each trained once and kept in work/runs.jsonl; as a context, it ends its processes."""

    def __init__(self, a: argparse.Namespace):
        self.a, self.path = a, a.work / "runs.jsonl"
        self.pool = concurrent.futures.ProcessPoolExecutor(a.jobs, mp_context=multiprocessing.get_context("spawn"))
        self.done: dict[str, dict] = {}
        if self.path.is_file():
            whole = []
            for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    result = json.loads(line)
                    run = result["run"] | {"arenas": tuple(tuple(x) for x in result["run"]["arenas"])}
                    self.done[Run(**run).key()] = result
                    whole.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # the last line of a run that was cut off
                    print(f"compare_quality: line {number} of {self.path} is damaged; that run is repeated", flush=True)
            part = self.path.with_suffix(".part")
            part.write_text("".join(whole), encoding="utf-8")
            os.replace(part, self.path)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, kind, *_):
        if kind is not None:  # they ignore the signal, and would train to the end
            for process in list(self.pool._processes.values()):
                process.kill()
        self.pool.shutdown(cancel_futures=True)

    def __getitem__(self, run: Run) -> dict:
        return self.done[run.key()]

    def choice(self, run: Run) -> float:
        """The loss that choices are made by; infinite of a run that diverged, as NaN is not in order."""
        return ordered(self[run]["choice"])

    def __contains__(self, run: Run) -> bool:
        return run.key() in self.done

    def need(self, runs: list[Run]) -> None:
        """Train those that are not done yet, `jobs` at a time."""
        wanted = [run for run in dict.fromkeys(runs) if run not in self]
        if not wanted:
            return
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.a).items()}
        if wanted[0].setting == "base":  # alone
            settings["threads"] *= self.a.jobs
        futures = {self.pool.submit(train, run, settings): run for run in wanted}
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            result = future.result()
            self.done[futures[future].key()] = result
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(result) + "\n")
            print(f"  {n} of {len(wanted)}: {describe(futures[future])}: {result['choice']:.4f}, {result['seconds']:.0f} s", flush=True)


def ordered(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def describe(run: Run) -> str:
    text = f"{run.setting} {run.method} lr {run.lr:g} seed {run.seed}"
    if run.arenas:
        text += " Arenas " + arenas_text(dict(run.arenas))
    return text


def named(method: str, settings: dict) -> str:
    return METHODS[method] + (f" ({arenas_text(settings)})" if method == "arenas" else "")


def arenas_text(settings: dict) -> str:
    """How it differs from the published settings."""
    changed = [f"{k} {v}" for k, v in sorted(settings.items()) if PUBLISHED[k] != v]
    return ", ".join(changed) or "as published"


class Sweep:
    """The learning rate of one method in one setting, by factors of 2 until those that lead have a worse one on either side."""

    def __init__(self, runs: Runs, template: Run, rates: tuple[float, ...]):
        self.runs, self.template, self.rates = runs, template, sorted(rates)
        self.first = tuple(self.rates)

    def run(self, lr: float) -> Run:
        return dataclasses.replace(self.template, lr=lr)

    def open(self, lr: float) -> bool:
        """Whether a rate is at the edge of those that were trained."""
        return lr in (self.rates[0], self.rates[-1])

    def best(self) -> float:
        """The rate of the lowest loss on the half of the text that is for choices."""
        return leaders([self])[0].lr

    def wanted(self) -> list[Run]:
        """What is still to be trained; [] where the sweep is complete."""
        if missing := [r for r in map(self.run, self.rates) if r not in self.runs]:
            return missing
        lead = [run.lr for run in leaders([self])]
        lower, higher = self.first[0] / 2**EXTEND, self.first[-1] * 2**EXTEND
        if self.rates[0] in lead and self.rates[0] / 2 >= lower:
            self.rates.insert(0, self.rates[0] / 2)
        elif self.rates[-1] in lead and self.rates[-1] * 2 <= higher:
            self.rates.append(self.rates[-1] * 2)
        else:
            return []
        return self.wanted()


def leaders(sweeps: list[Sweep]) -> list[Run]:
    """The runs of the lowest losses, best first: one, or those that a seed's chance could have put before it."""
    runs = sweeps[0].runs
    trained = sorted((sweep.run(lr) for sweep in sweeps for lr in sweep.rates), key=runs.choice)
    return [run for run in trained[:LEADERS] if run is trained[0] or runs.choice(run) < runs.choice(trained[0]) * (1 + TIE)]


def complete(sweeps: list[Sweep]) -> None:
    while wanted := [run for sweep in sweeps for run in sweep.wanted()]:
        sweeps[0].runs.need(wanted)


def compare(runs: Runs, setting: str, a: argparse.Namespace) -> dict:
    """All runs of one setting; what `report` shows of it."""
    published = arenas()
    templates = {m: Run(setting, "sherry" if m.startswith("arenas") else m, 0.0, 0, (), a.steps) for m in METHODS}
    templates["arenas-published"] = dataclasses.replace(templates["sherry"], arenas=published)
    sweeps = {m: Sweep(runs, t, RATES_FULL[setting] if m == "full" else RATES[setting])
              for m, t in templates.items() if m != "arenas"}  # fmt: skip
    print(f"{setting}: learning rates", flush=True)
    complete(list(sweeps.values()))

    rates = sorted({run.lr for m in ("sherry", "arenas-published") for run in leaders([sweeps[m]])})
    print(f"{setting}: Arenas' settings, at the best rates without and with the published ones", flush=True)
    explored = {arenas(**changed): [Run(setting, "sherry", lr, 0, arenas(**changed), a.steps) for lr in rates]
                for changed in (EXPLORED[setting] if a.explored is None else a.explored)}  # fmt: skip
    without = [Run(setting, "sherry", lr, 0, (), a.steps) for lr in rates]
    runs.need(without + [run for of_setting in explored.values() for run in of_setting])
    best = sorted(explored, key=lambda settings: min(map(runs.choice, explored[settings])))
    finals = []
    for settings in best[:FINALISTS]:
        lr = min(explored[settings], key=runs.choice).lr
        finals.append(Sweep(runs, Run(setting, "sherry", 0.0, 0, settings, a.steps), (lr / 2, lr, lr * 2)))
    complete(finals)
    of_method = {m: [sweep] for m, sweep in sweeps.items()} | {"arenas": finals}

    print(f"{setting}: seeds 1 to {a.seeds} of what led", flush=True)
    fresh = {m: [[dataclasses.replace(run, seed=seed) for seed in range(1, a.seeds + 1)] for run in leaders(of_method[m])]
             for m in METHODS}  # fmt: skip
    # one seed of every method before the next: a comparison that is cut off has whole rows
    runs.need([seeds[i] for i in range(a.seeds) for m in METHODS for seeds in fresh[m]])
    reported = {m: min(fresh[m], key=lambda seeds: statistics.mean(map(runs.choice, seeds))) for m in METHODS}
    sweeps["arenas"] = next(sweep for sweep in finals if sweep.template.arenas == reported["arenas"][0].arenas)
    print(f"{setting}: shorter and longer runs", flush=True)
    # a sweep of its own for each: the best rate moves, upwards more often
    compared = {m: reported[m][0] for m in ("sherry", "arenas", "arenas-published")}
    lengths = {steps: {m: Sweep(runs, dataclasses.replace(run, steps=steps), (run.lr, run.lr * 2)) for m, run in compared.items()}
               for x in (LENGTHS[setting] if a.lengths is None else a.lengths) if (steps := round(a.steps * x)) != a.steps}  # fmt: skip
    complete([sweep for of_length in lengths.values() for sweep in of_length.values()])
    best_of = {steps: {m: sweep.run(sweep.best()) for m, sweep in of_length.items()} for steps, of_length in lengths.items()}
    return {
        "before": runs[reported["sherry"][0]]["before"],
        "methods": {m: {
            "lr": reported[m][0].lr, "open": sweeps[m].open(reported[m][0].lr), "arenas": dict(sweeps[m].template.arenas),
            "sweep": {f"{lr:g}": runs[sweeps[m].run(lr)]["choice"] for lr in sweeps[m].rates},
            "losses": [runs[run]["report"] for run in reported[m]], "choices": [runs[run]["choice"] for run in reported[m]],
            "led": [{"lr": seeds[0].lr, "arenas": dict(seeds[0].arenas), "choice": [runs[run]["choice"] for run in seeds],
                     "report": [runs[run]["report"] for run in seeds]} for seeds in fresh[m]],
            "curve": runs[reported[m][0]]["curve"],
        } for m in METHODS},
        "explored": [{"arenas": dict(settings), "losses": [runs[run]["choice"] for run in explored[settings]]}
                     for settings in best],
        "explored_rates": rates,
        "without": [runs[run]["choice"] for run in without],
        "lengths": {steps: {m: {"lr": run.lr, "open": (lengths[steps] if steps in lengths else sweeps)[m].open(run.lr),
                                "loss": runs[run]["report"]} for m, run in of_length.items()}
                    for steps, of_length in sorted((best_of | {a.steps: compared}).items())},
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- report


def report(results: dict, out: Path) -> None:
    """Writes out.json, out.md and out.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixed(out, ".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(table(results), encoding="utf-8")
    plot(results, suffixed(out, ".png"))


def suffixed(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)  # with_suffix would take the ".5" of a name away


def table(results: dict) -> str:
    a = results["sizes"]
    text = f"""# Held-out loss by method

{results["parameters"] / 1e6:.1f} M parameters ({a["layers"]} layers, hidden {a["hidden"]}, {a["vocab"]} tokens of vocabulary), \
{results["tokens"] / 1e6:.1f} M tokens of Python source ({results["corpus"]}), {results["machine"]}. A step is {a["batch"]} x {a["context"]} \
tokens. Loss in nats a token, on {results["held_out"]} held-out tokens; mean and standard deviation over {a["seeds"]} seeds that \
no rate was swept with. They spread by the training alone; how far other text moves the differences, the half for choices shows.
""".replace("\\\n", "")
    for setting, r in results["settings"].items():
        begin = (f"from a full-precision model of {a['base_steps']} steps of {a['base_batch']} x {a['context']} tokens (loss {results['base']['report']:.4f})"
                 if setting == "pretrained" else "from scratch")  # fmt: skip
        text += f"\n## {setting}: {a['steps']} steps {begin}\n\n"
        if setting == "pretrained":
            text += f"Quantized by Sparse-AbsMean and not trained at all it has a loss of {r['before']:.4f}.\n\n"
        text += ("| method | learning rate | held-out loss | against absmean, same seed | against Sherry without Arenas | "
                 "on the half for choices | each seed |\n|---|---|---|---|---|---|---|\n")  # fmt: skip
        for m, row in sorted(r["methods"].items(), key=lambda x: ordered(statistics.mean(x[1]["losses"]))):
            name = named(m, row["arenas"])
            deviation = f" ± {statistics.stdev(row['losses']):.4f}" if len(row["losses"]) > 1 else ""
            text += (f"| {name} | {row['lr']:g}{' (at the edge)' * row['open']} | {statistics.mean(row['losses']):.4f}{deviation} | "
                     f"{paired(row['losses'], r['methods']['absmean']['losses'])} | "
                     f"{paired(row['losses'], r['methods']['sherry']['losses'])} | {statistics.mean(row['choices']):.4f} | "
                     f"{', '.join(f'{x:.4f}' for x in row['losses'])} |\n")  # fmt: skip
        means = {m: ordered(statistics.mean(row["losses"])) for m, row in r["methods"].items()}
        if "full" in means and (ahead := [METHODS[m] for m in means if means[m] < means["full"]]):
            text += (f"\n**Too short a training**: full precision, which can do all that the others can, is behind ({', '.join(ahead)}). "
                     "Take more --steps before anything is read from this.\n")  # fmt: skip
        text += "\nLearning rates, seed 0, on the half of the text that choices are made on; in bold what was chosen:\n\n"
        rates = sorted({float(lr) for row in r["methods"].values() for lr in row["sweep"]})
        text += f"| method | {' | '.join(f'{lr:g}' for lr in rates)} |\n|---|{'---|' * len(rates)}\n"
        for m, row in r["methods"].items():
            cells = (row["sweep"].get(f"{lr:g}") for lr in rates)
            best = row["sweep"][f"{row['lr']:g}"]
            text += f"| {METHODS[m]} | {' | '.join('' if x is None else f'**{x:.4f}**' if x == best else f'{x:.4f}' for x in cells)} |\n"
        if tied := {m: row["led"] for m, row in r["methods"].items() if len(row["led"]) > 1}:
            text += (f"\nWhere a second choice came within {TIE:.1%}, both were trained with seeds 1 to {a['seeds']}; means on the half for "
                     "choices, which decides, and on the other:\n\n| method | learning rate | for choices | reported |\n|---|---|---|---|\n")  # fmt: skip
            for m, led in tied.items():
                for x in led:
                    text += f"| {named(m, x['arenas'])} | {x['lr']:g} | {statistics.mean(x['choice']):.4f} | {statistics.mean(x['report']):.4f} |\n"
        rates = r["explored_rates"]
        text += ("\nArenas' settings, seed 0, by what differs from the published ones (peak 1, warmup 0.1, cosine, end 1), best "
                 f"first; each at {' and '.join(f'{lr:g}' for lr in rates)}:\n\n| settings |"
                 f"{''.join(f' {lr:g} |' for lr in rates)} best, against none |\n|---|{'---|' * len(rates)}---|\n")  # fmt: skip
        none = min(map(ordered, r["without"]))
        text += f"| none | {' | '.join(f'{x:.4f}' for x in r['without'])} | |\n"
        for row in r["explored"]:
            text += f"| {arenas_text(row['arenas'])} | {' | '.join(f'{x:.4f}' for x in row['losses'])} | {min(map(ordered, row['losses'])) / none - 1:+.2%} |\n"
        text += ("\nState of training, seed 1, mean of the looks in the second and third quarter: effective ranks of the gradients and of "
                 "the layers' inputs, ternary values that a step changes, latent weights within a tenth of the scale of 0, groups "
                 "as near to another choice of their zero:\n\n| method | gradient rank | input rank | changed a step | near 0 | near "
                 "another zero |\n|---|---|---|---|---|---|\n")  # fmt: skip
        for m, row in r["methods"].items():
            if state := state_of(row["curve"]):
                near = f"{state['near_zeroing']:.1%}" if "near_zeroing" in state else ""
                text += (f"| {METHODS[m]} | {state['gradient_rank']:.1f} | {state['activation_rank']:.1f} | {state['flips']:.3%} | "
                         f"{state['near_sign']:.1%} | {near} |\n")  # fmt: skip
        text += ("\nShorter and longer runs, seed 1, each at its best learning rate (in brackets; swept for that length):\n\n| steps | "
                 "without Arenas | with | against without | as published | against without |\n|---|---|---|---|---|---|\n")  # fmt: skip
        for steps, of_length in r["lengths"].items():
            loss = {m: x["loss"] for m, x in of_length.items()}
            cell = {m: f"{x['loss']:.4f} ({x['lr']:g}{', at the edge' * x['open']})" for m, x in of_length.items()}
            text += (f"| {steps} | {cell['sherry']} | {cell['arenas']} | {loss['arenas'] / loss['sherry'] - 1:+.2%} | "
                     f"{cell['arenas-published']} | {loss['arenas-published'] / loss['sherry'] - 1:+.2%} |\n")  # fmt: skip
    return text


def state_of(curve: list[dict]) -> dict[str, float]:
    """The monitor's figures, averaged over the second and third quarter of its looks; {} where it did not look."""
    looks = [entry for entry in curve if "gradient_rank" in entry]
    looks = looks[len(looks) // 4 : -(len(looks) // 4) or None]
    keys = set.intersection(*map(set, looks)) if looks else ()
    return {key: statistics.mean(entry[key] for entry in looks) for key in keys}


def paired(losses: list[float], others: list[float]) -> str:
    """The mean of the relative differences at the same seed, and its standard error."""
    if losses == others:
        return ""
    differences = [a / b - 1 for a, b in zip(losses, others)]
    error = f" ± {100 * statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{100 * statistics.mean(differences):+.2f}{error} %"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = results["settings"]
    color = dict(zip(METHODS, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(len(settings), 3, figsize=(15, 4.4 * len(settings)), squeeze=False)
    for (setting, r), (dots, curves, state) in zip(settings.items(), axes):
        order = sorted(METHODS, key=lambda m: -ordered(statistics.mean(r["methods"][m]["losses"])))
        for y, m in enumerate(order):
            losses = r["methods"][m]["losses"]
            dots.plot(losses, [y] * len(losses), "o", color=color[m], alpha=0.6)
            dots.plot(statistics.mean(losses), y, "|", color=color[m], markersize=18, markeredgewidth=2)
        dots.set_yticks(range(len(order)), [METHODS[m] for m in order])
        for label, m in zip(dots.get_yticklabels(), order):  # the legend of the curves too
            label.set_color(color[m])
        dots.set_xlabel("held-out loss, nats a token (dots: seeds)")
        dots.set_title(f"{setting}, each at its best learning rate")
        dots.grid(axis="x", alpha=0.3)
        for m, row in r["methods"].items():
            curve = row["curve"][len(row["curve"]) // 8 :]
            curves.plot([c["step"] for c in curve], [c["loss"] for c in curve], color=color[m], lw=1.2)
        curves.set_xlabel("step")
        curves.set_title("training loss, seed 1, colors as on the left")
        second = state.twinx()
        for m in "sherry", "arenas", "arenas-published":
            looks = [c for c in r["methods"][m]["curve"] if "gradient_rank" in c]
            steps = [c["step"] for c in looks]
            state.plot(steps, [c["gradient_rank"] for c in looks], color=color[m], lw=1.4, label=METHODS[m])
            second.plot(steps, [100 * c["flips"] for c in looks], color=color[m], lw=1, ls=":")
        state.set_xlabel("step")
        state.set_ylabel("effective rank of gradients (lines)")
        second.set_ylabel("ternary values changed a step, % (dots)")
        second.set_yscale("log")
        state.set_title("state of training, seed 1")
        state.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- main


def prepare(a: argparse.Namespace) -> dict:
    """Tokens in the work directory; figures of them for the report."""
    import python_corpus

    python_corpus.check_sizes(a.hidden, a.intermediate)
    a.work.mkdir(parents=True, exist_ok=True)
    sizes = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()
             if k not in ("out", "work", "jobs", "threads", "seeds", "settings", "steps", "explored", "lengths")}  # fmt: skip
    mark = a.work / "sizes.json"
    if mark.is_file():
        try:
            then = dict(json.loads(mark.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as e:
            raise Stop(f"{mark} is damaged ({e}): remove {a.work}, with the runs in it") from e
        if other := ", ".join(f"{k}: {then.get(k)} then, {v} now" for k, v in sizes.items() if then.get(k) != v):
            raise Stop(f"{a.work} was begun with other settings ({other}): choose another --work, or remove it")
    tokens = a.work / "tokens.npz"
    if not tokens.is_file() or not mark.is_file():  # without the mark they may be those of other settings
        train_texts, held_out = python_corpus.read(a.corpus, a.corpus_bytes, everything=True)
        model = python_corpus.train_tokenizer(train_texts, a.vocab)
        (a.work / "tokenizer.model").write_bytes(model)
        part = a.work / "part.npz"
        np.savez(part, train=python_corpus.encode(model, train_texts), held_out=python_corpus.encode(model, held_out))
        os.replace(part, tokens)
    try:
        with np.load(tokens) as z:
            size, held_out = len(z["train"]), len(z["held_out"]) // (a.context - 1)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise Stop(f"{tokens} is damaged ({e}): remove it, and it is made again") from e
    if held_out < 2 or size < a.batch * a.context:
        raise Stop(f"{a.corpus} gives {size} tokens to train on and {held_out} held-out blocks: use a larger --corpus")
    if not mark.is_file():
        part = mark.with_suffix(".part")
        part.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        os.replace(part, mark)
    corpus = a.corpus.resolve()
    stdlib = corpus == Path(sysconfig.get_path("stdlib")).resolve()
    return {"tokens": size, "held_out": min(a.eval_blocks, held_out // 2) * (a.context - 1),
            "corpus": "the standard library" if stdlib else corpus.name}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "scripts/results/quality", help="writes OUT.md, .json and .png")
    p.add_argument("--work", type=Path, default=ROOT / "build/quality", help="directory for tokens and finished runs")
    p.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="directory of .py files")
    p.add_argument("--corpus-bytes", type=int, default=60_000_000, help="read at most so much of it")
    p.add_argument("--settings", default="pretrained,scratch", help="which to compare in")
    p.add_argument(
        "--explored",
        metavar="JSON",
        default=argparse.SUPPRESS,
        help="settings of Arenas to try instead of "
        """ours, a list of what differs from the published ones, as '[{"peak": 0.1, "end": 0.5}]'""",
    )
    p.add_argument(
        "--lengths",
        metavar="X,Y",
        default=argparse.SUPPRESS,
        help="multiples of --steps in which Arenas is compared with "
        "none as well, or '' (default: 0.25,4 from a trained model, 0.25 from scratch)",
    )
    p.add_argument("--vocab", type=int, default=2048, help="pieces of the tokenizer")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    p.add_argument("--intermediate", type=int, default=768, help="a multiple of 128")
    p.add_argument("--context", type=int, default=128, help="tokens of a sequence")
    p.add_argument("--batch", type=int, default=8, help="sequences of a step")
    p.add_argument("--steps", type=int, default=600, help="of every run")
    p.add_argument("--base-steps", type=int, default=3000, help="of the full-precision model that `pretrained` starts from")
    p.add_argument("--base-batch", type=int, default=16)
    p.add_argument("--base-lr", type=float, default=3e-3)
    p.add_argument("--seeds", type=int, default=3, help="that are reported")
    p.add_argument("--eval-blocks", type=int, default=256, help="held-out sequences for choices, and as many to report")
    p.add_argument("--jobs", type=int, default=1 if gpu() else os.cpu_count(), help="runs at a time")
    p.add_argument("--threads", type=int, default=1, help="of each")
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
        p.error(f"--settings: choose of {', '.join(RATES)}")
    if unknown := set(a.settings) - set(RATES):
        p.error(f"--settings {', '.join(sorted(unknown))}: choose of {', '.join(RATES)}")
    return a


def explored(text: str, p: argparse.ArgumentParser) -> list[dict]:
    """The settings of --explored; ends the program where they are none."""
    from sherry_gguf.qat import Arenas

    try:
        settings = json.loads(text)
        if not isinstance(settings, list) or not settings:
            raise ValueError("it must be a list with something in it")
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
    """The numbers of --lengths; ends the program where they are none."""
    try:
        multiples = [float(x) for x in text.split(",") if x]
    except ValueError:
        multiples = [math.nan]
    if not all(1e-3 <= x <= 1e3 for x in multiples):
        p.error(f"--lengths {text}: numbers from 0.001 to 1000, with commas between them")
    return multiples


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> str:
    if gpu():
        import torch

        return torch.cuda.get_device_name()
    from sherry_gguf.bench import cpu_name

    return cpu_name()


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    from python_corpus import CorpusError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers too
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        with open(a.work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Stop(f"another comparison is running in {a.work}: wait for it, or choose another --work") from None
            figures = prepare(a)
            results = {"sizes": {k: v for k, v in vars(a).items() if isinstance(v, int)}, "machine": machine(), **figures,
                       "settings": {}}  # fmt: skip
            with Runs(a) as runs:
                if "pretrained" in a.settings:
                    base = Run("base", "full", a.base_lr, 0, (), a.base_steps)
                    if not (a.work / "base/config.json").is_file():
                        runs.done.pop(base.key(), None)  # its model is gone
                    print(f"pretrained: the full-precision model, {a.base_steps} steps", flush=True)
                    runs.need([base])
                    results["base"] = runs[base]
                for setting in a.settings:
                    results["settings"][setting] = compare(runs, setting, a)
                    results["parameters"] = next(iter(runs.done.values()))["parameters"]
                    report(results, a.out)
    except (Stop, CorpusError, OSError) as e:
        print(f"compare_quality: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare_quality: interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"wrote {suffixed(a.out, '.md')}, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
