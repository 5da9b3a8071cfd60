"""The runs of compare_quality.py: training one, and which runs a comparison needs."""

import argparse
import dataclasses
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import numpy as np
from study_runs import Kept, Runs, Sweep, complete, leaders

WARMUP = 0.05  # share of the steps during which the learning rate rises
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
# Settings of Arenas to try, each by its differences from the published ones.
EXPLORED = {
    "pretrained": [
        dict(), dict(peak=0.5), dict(peak=0.25), dict(peak=0.1), dict(end=0.5), dict(peak=0.25, end=0.5), dict(peak=0.1, end=0.5),
        dict(warmup=0.0), dict(decay="linear"), dict(decay="exponential"), dict(rescale=True), dict(rescale=True, warmup=0.0, end=0.5),
        dict(rescale=True, warmup=0.0, end=0.25), dict(rescale=True, warmup=0.0, peak=4.0, end=0.5),
        dict(rescale=True, warmup=0.0, peak=0.25, end=0.5),
    ],
    "scratch": [
        dict(), dict(peak=0.25), dict(end=0.5), dict(peak=0.25, end=0.5), dict(rescale=True), dict(rescale=True, warmup=0.0, end=0.5),
    ],
}  # fmt: skip
RATES = {"pretrained": (5e-4, 1e-3, 2e-3), "scratch": (2e-3, 4e-3, 8e-3)}  # where a sweep begins
RATES_FULL = {"pretrained": (1.25e-4, 2.5e-4, 5e-4), "scratch": (2e-3, 4e-3, 8e-3)}
FINALISTS = 2  # sweep the learning rate of this many explored settings of Arenas
# Multiples of the steps for comparing Arenas with none, at each one's best rate there: does a longer run change the result?
LENGTHS = {"pretrained": [0.25, 4], "scratch": [0.25]}


@dataclasses.dataclass(frozen=True)
class Run(Kept):
    """One training run."""

    setting: str
    method: str  # one of quantizer.METHODS
    lr: float
    seed: int
    arenas: tuple[tuple[str, object], ...] = ()  # settings of Arenas, sorted; () trains without
    steps: int = 0

    @classmethod
    def saved(cls, fields: dict) -> "Run":
        return cls(**fields | {"arenas": tuple(tuple(x) for x in fields["arenas"])})

    def __str__(self) -> str:
        settings = f" Arenas {arenas_text(dict(self.arenas))}" if self.arenas else ""
        return f"{self.setting} {self.method} lr {self.lr:g} seed {self.seed}{settings}"


def arenas(**changed) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((k, type(PUBLISHED[k])(v)) for k, v in (PUBLISHED | changed).items()))  # 1 and 1.0 are one run


# ------------------------------------------------------------------------------------------------------------ one run


def train(run: Run, a: dict) -> dict:
    """Train one run in this process; returns its losses (nats per token), training curve and time in seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    import python_corpus
    import torch
    import transformers
    from transformers import LlamaForCausalLM, PrinterCallback

    from sherry_gguf import qat
    from sherry_gguf.qat.data import Blocks, mean_loss, pack

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(a["threads"] * (a["jobs"] if run.setting == "base" else 1))  # the base runs alone
    work = Path(a["work"])
    with np.load(work / "tokens.npz") as z:
        blocks = pack(z["train"], a["context"], 1)
        held_out = pack(z["held_out"], a["context"], 1)
    held_out = np.random.default_rng(0).permutation(held_out)[: a["eval_blocks"] * 2]  # so that both halves are alike
    if run.setting == "pretrained":
        model = LlamaForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    else:
        model = python_corpus.small_llama(a["vocab"], a["layers"], a["hidden"], a["intermediate"], a["context"], run.seed)
    qat.prepare(model, qat.QuantConfig(run.method))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monitored = run.method != "full" and run.seed == 1  # the report shows these
    monitor = qat.TrainingMonitor(max(2, run.steps // 20)) if monitored else None
    schedule = qat.Arenas(**dict(run.arenas)) if run.arenas else None
    trainer = qat.SherryTrainer(model, trainer_arguments(run, a, device), train_dataset=Blocks(blocks), monitor=monitor, arenas=schedule)
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
        part = work / "base.part"
        model.save_pretrained(part)
        shutil.rmtree(work / "base", ignore_errors=True)
        os.replace(part, work / "base")
    return result


def trainer_arguments(run: Run, a: dict, device: str):
    from transformers import TrainingArguments

    base = run.setting == "base"
    return TrainingArguments(
        output_dir=str(Path(a["work"]) / "trainer"), max_steps=run.steps, per_device_train_batch_size=a["base_batch" if base else "batch"],
        learning_rate=run.lr, lr_scheduler_type="cosine", warmup_steps=round(run.steps * WARMUP), weight_decay=0.0, adam_beta2=0.95,
        optim="adamw_torch_fused", bf16=a["bf16"], use_cpu=device == "cpu", dataloader_pin_memory=device == "cuda", seed=run.seed,
        data_seed=1000 if base else 2000 + run.seed,  # other blocks than the base saw first
        logging_steps=max(1, run.steps // 40), save_strategy="no", report_to="none", disable_tqdm=True,
        average_tokens_across_devices=False)  # fmt: skip


def arenas_text(settings: dict) -> str:
    """How settings of Arenas differ from the published ones."""
    changed = [f"{k} {v}" for k, v in sorted(settings.items()) if PUBLISHED[k] != v]
    return ", ".join(changed) or "as published"


# ------------------------------------------------------------------------------------------------------- one comparison


class Comparison:
    """All runs of one setting: `result` is what the report shows."""

    def __init__(self, runs: Runs, setting: str, a: argparse.Namespace):
        self.runs, self.setting, self.a = runs, setting, a

    def template(self, method: str) -> Run:
        settings = arenas() if method == "arenas-published" else ()
        return Run(self.setting, "sherry" if method.startswith("arenas") else method, 0.0, 0, settings, self.a.steps)

    def result(self) -> dict:
        print(f"{self.setting}: learning rates", flush=True)
        sweeps = {m: Sweep(self.runs, self.template(m), (RATES_FULL if m == "full" else RATES)[self.setting])
                  for m in METHODS if m != "arenas"}  # fmt: skip
        complete(list(sweeps.values()))
        finals, exploration = self.explore(sweeps)
        print(f"{self.setting}: seeds 1 to {self.a.seeds} of the leaders", flush=True)
        fresh = self.with_seeds({m: [sweep] for m, sweep in sweeps.items()} | {"arenas": finals})
        reported = {m: min(fresh[m], key=lambda seeds: statistics.mean(map(self.runs.choice, seeds))) for m in METHODS}
        sweeps["arenas"] = next(sweep for sweep in finals if sweep.template.arenas == reported["arenas"][0].arenas)
        print(f"{self.setting}: shorter and longer runs", flush=True)
        lengths = self.lengths(sweeps, {m: reported[m][0] for m in ("sherry", "arenas", "arenas-published")})
        methods = {m: self.method(sweeps[m], reported[m], fresh[m]) for m in METHODS}
        return {"before": self.runs[reported["sherry"][0]]["before"], "methods": methods, **exploration, "lengths": lengths}

    def explore(self, sweeps: dict[str, Sweep]) -> tuple[list[Sweep], dict]:
        """The sweeps of Arenas' best settings, and the part of the result about all settings that were tried."""
        runs, a = self.runs, self.a
        rates = sorted({run.lr for m in ("sherry", "arenas-published") for run in leaders([sweeps[m]])})
        print(f"{self.setting}: Arenas' settings, at the best rates without Arenas and with the published settings", flush=True)
        without = [Run(self.setting, "sherry", lr, 0, (), a.steps) for lr in rates]
        explored = {arenas(**changed): [dataclasses.replace(run, arenas=arenas(**changed)) for run in without]
                    for changed in (EXPLORED[self.setting] if a.explored is None else a.explored)}  # fmt: skip
        runs.need(without + [run for of_setting in explored.values() for run in of_setting])
        best = sorted(explored, key=lambda settings: min(map(runs.choice, explored[settings])))
        finals = []
        for settings in best[:FINALISTS]:
            lr = min(explored[settings], key=runs.choice).lr
            finals.append(Sweep(runs, Run(self.setting, "sherry", 0.0, 0, settings, a.steps), (lr / 2, lr, lr * 2)))
        complete(finals)
        tried = [{"arenas": dict(settings), "losses": [runs[run]["choice"] for run in explored[settings]]} for settings in best]
        return finals, {"explored": tried, "explored_rates": rates, "without": [runs[run]["choice"] for run in without]}

    def with_seeds(self, of_method: dict[str, list[Sweep]]) -> dict[str, list[list[Run]]]:
        """The leaders of each method, each trained with all seeds."""
        seeds = range(1, self.a.seeds + 1)
        fresh = {m: [[dataclasses.replace(run, seed=seed) for seed in seeds] for run in leaders(of_method[m])] for m in METHODS}
        # one seed of every method before the next: a comparison that is cut off has complete rows
        self.runs.need([runs[i] for i in range(self.a.seeds) for m in METHODS for runs in fresh[m]])
        return fresh

    def lengths(self, sweeps: dict[str, Sweep], compared: dict[str, Run]) -> dict:
        """Arenas and none over runs of other lengths, each with a sweep of its own: the best rate moves, mostly upwards."""
        a, runs = self.a, self.runs
        multiples = LENGTHS[self.setting] if a.lengths is None else a.lengths
        swept = {steps: {m: Sweep(runs, dataclasses.replace(run, steps=steps), (run.lr, run.lr * 2)) for m, run in compared.items()}
                 for x in multiples if (steps := round(a.steps * x)) != a.steps}  # fmt: skip
        complete([sweep for of_length in swept.values() for sweep in of_length.values()])
        best = {steps: {m: sweep.run(sweep.best()) for m, sweep in of_length.items()} for steps, of_length in swept.items()}
        return {steps: {m: {"lr": run.lr, "open": swept.get(steps, sweeps)[m].open(run.lr), "loss": runs[run]["report"]}
                        for m, run in of_length.items()} for steps, of_length in sorted((best | {a.steps: compared}).items())}  # fmt: skip

    def method(self, sweep: Sweep, reported: list[Run], fresh: list[list[Run]]) -> dict:
        runs = self.runs
        return {
            "lr": reported[0].lr,
            "open": sweep.open(reported[0].lr),
            "arenas": dict(sweep.template.arenas),
            "sweep": {f"{lr:g}": runs[sweep.run(lr)]["choice"] for lr in sweep.rates},
            "losses": [runs[run]["report"] for run in reported],
            "choices": [runs[run]["choice"] for run in reported],
            "led": [{"lr": seeds[0].lr, "arenas": dict(seeds[0].arenas), "choice": [runs[run]["choice"] for run in seeds],
                     "report": [runs[run]["report"] for run in seeds]} for seeds in fresh],
            "curve": runs[reported[0]]["curve"],
        }  # fmt: skip
