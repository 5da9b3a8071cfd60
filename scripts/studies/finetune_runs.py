"""The runs of compare_finetuning.py: training one adapter, and which channels carry outliers meanwhile."""

import dataclasses
import json
import lzma
import re
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from study_runs import Kept, Runs, Sweep, complete

from sherry_gguf import quaff
from sherry_gguf.errors import Stop
from sherry_gguf.quaff.channels import Counter, budget_of, chosen, linear_layers
from sherry_gguf.quaff.int8 import Int8Linear
from sherry_gguf.quaff.scaling import GAMMA

QUESTIONS = "arc_easy"
LOOKS = 10  # in a run whose outliers are counted
WATCHED = "full", "quaff"  # the methods whose outliers are counted, with seed 1
RATES = (5e-4, 1e-3, 2e-3)  # where a sweep begins
GROUP = 5  # methods that are swept, then trained with other seeds, before the next ones: what is cut off has complete rows


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the tables. outliers: the place of its calibration in --outliers."""

    label: str
    method: str
    base: str = "int8"
    granularity: str = "channel"
    outliers: int = 0
    gamma: float = GAMMA

    def of(self, channels: list[quaff.Channels]) -> quaff.Channels:
        """Its channels of those for each pair of --outliers."""
        return channels[min(self.outliers, len(channels) - 1)]

    def quantized(self, model: torch.nn.Module, channels: quaff.Channels | None) -> torch.nn.Module:
        return quaff.quantize_for_finetuning(model, channels, self.base, method=self.method, granularity=self.granularity, gamma=self.gamma)


METHODS = {
    "full": Method("full precision", "full"),
    "quaff": Method("Quaff, the authors' threshold", "quaff"),
    "quaff-more": Method("Quaff", "quaff", outliers=1),
    "naive": Method("naive int8", "naive"),
    "static": Method("static scaling of all channels", "static"),
    "mixed": Method("channels above 6 in floating point", "mixed"),
    "dynamic": Method("dynamic scaling of all channels", "dynamic"),
    "bf16": Method("bfloat16", "bf16"),
    "gamma-0": Method("Quaff, γ 0: factors of the last batch", "quaff", outliers=1, gamma=0.0),
    "gamma-0.9": Method("Quaff, γ 0.9", "quaff", outliers=1, gamma=0.9),
    "gamma-1": Method("Quaff, γ 1: factors of the first batch", "quaff", outliers=1, gamma=1.0),
    "tq1_25-quaff": Method("TQ1_25, Quaff", "quaff", base="tq1_25"),
    "tq1_25-naive": Method("TQ1_25, no scaling", "naive", base="tq1_25"),
    "tensor-quaff": Method("Quaff, a scale per tensor", "quaff", granularity="tensor"),
    "tensor-naive": Method("naive int8, a scale per tensor", "naive", granularity="tensor"),
}
INT8 = [m for m, method in METHODS.items() if method.base == "int8" and method.method not in ("full", "bf16") and method.gamma == GAMMA]
FLOAT_BACKWARD = "gradients, backward in float32"  # a column of the errors


@dataclasses.dataclass(frozen=True)
class Run(Kept):
    """One run. Without steps it is the model before fine-tuning."""

    method: str  # of METHODS
    lr: float
    seed: int  # 0 sweeps the learning rate
    steps: int

    def __str__(self) -> str:
        return f"{self.method} " + (f"lr {self.lr:g} seed {self.seed}" if self.steps else "before")


# --------------------------------------------------------------------------------------------------- questions and model


def questions(data: str | Path, split: str, count: int, seed: int = 0) -> list[dict]:
    """Up to `count` questions of a split, in an order that the seed decides. Raises Stop."""
    names = [f"{QUESTIONS}.{split}.jsonl{end}" for end in ("", ".xz")]
    path = next((p for name in names if (p := Path(data) / name).is_file()), None)
    if path is None:
        raise Stop(f"--data {data}: it has no file {' or '.join(names)}")
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        for row in rows:
            row["text"] = row["question"], row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError) as e:
        raise Stop(f"{path}: not questions of ARC: {type(e).__name__}: {e}") from e
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]


def encoded(tokenizer, rows: list[dict]) -> list[dict[str, list[int]]]:
    """Questions as lm-eval's arc_easy asks them, with labels on the tokens of the answers."""
    examples = []
    for question, answer in (row["text"] for row in rows):
        prompt = f"Question: {question}\nAnswer:"
        ids, asked = tokenizer(f"{prompt} {answer}").input_ids, len(tokenizer(prompt).input_ids)
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * asked + ids[asked:]})
    return examples


def books(data: str | Path, tokenizer, count: int, length: int = 32) -> list[dict[str, list[int]]]:
    """`count` pieces of `length` tokens, about as long as questions, each from the middle of a book. Raises Stop."""
    path = next(p for end in ("", ".xz") if (p := Path(data) / f"books.train.jsonl{end}").is_file())
    pieces = []
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as f:
            texts = [json.loads(line)["text"] for line, _ in zip(f, range(count))]
    except (OSError, ValueError, KeyError, lzma.LZMAError) as e:
        raise Stop(f"{path}: not books: {type(e).__name__}: {e}") from e
    for i in range(count):
        text = texts[i % len(texts)]
        at = len(text) // 2 + 10 * length * (i // len(texts))
        ids = tokenizer(text[at : at + 10 * length]).input_ids[:length]
        pieces.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return pieces


def load(a: dict):
    """The model in full precision, and its tokenizer with a padding token."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    named = dict(gguf_file=a["gguf_file"]) if a["gguf_file"] else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(a["model"], **named)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(a["model"], dtype=torch.float32, **named), tokenizer


def adapted(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with LoRA on all linear layers but the head, as the authors of Quaff used it, without dropout."""
    import peft

    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def batches(examples: list[dict], tokenizer, size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of examples of similar lengths."""
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    return [dict(collate(examples[i : i + size])) for i in range(0, len(examples), size)]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: list[dict], tokenizer, size: int) -> float:
    """Mean loss of the answers' tokens, in nats."""
    model.eval()
    nats = scored = 0.0
    for batch in batches(examples, tokenizer, size):
        count = int((batch["labels"][:, 1:] != -100).sum())
        nats += float(model(**batch).loss) * count
        scored += count
    return nats / scored


def accuracy(model: torch.nn.Module, tokenizer, a: dict) -> dict[str, float]:
    """lm-eval's metrics on the first questions of the test set."""
    import logging

    from lm_eval.models.huggingface import HFLM

    from sherry_gguf.evaluation import tasks

    logging.disable(logging.WARNING)
    loaded, missing = tasks.load([QUESTIONS], None, 0, Path(a["data"]))
    if missing:
        raise Stop(f"{QUESTIONS}: {missing[QUESTIONS]}")
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=2 * a["batch"])
    result = tasks.measure(lm, QUESTIONS, loaded[QUESTIONS], a["test_questions"])
    return {key: result[key] for key in ("documents", "acc", "acc_norm")}


# ------------------------------------------------------------------------------------------------------------- outliers


def outliers_of(text: str) -> list[tuple[float, float]]:
    """--outliers: pairs of a threshold and a budget. Raises ValueError."""
    pairs = [tuple(map(float, pair.split(":"))) for pair in text.split(",")]
    if not all(len(pair) == 2 and pair[0] > 0 and 0 < pair[1] <= 1 for pair in pairs):
        raise ValueError("each a threshold above 0 and a share of the channels up to 1")
    return pairs  # type: ignore[return-value]


def channels_file(work: str | Path, text: str, outliers: tuple[float, float]) -> Path:
    return Path(work) / f"channels-{text}-{outliers[0]:g}-{outliers[1]:g}.safetensors"


@torch.no_grad()
def calibrations(model: torch.nn.Module, data: list[dict], pairs: list[tuple[float, float]]) -> dict[tuple[float, float], quaff.Channels]:
    """What `quaff.calibrate` finds with each pair, in one pass over the data."""
    layers = linear_layers(model.eval())
    counters = {threshold: Counter(layers, threshold) for threshold, _ in pairs}
    for batch in data:
        for counter in counters.values():
            counter.mask = batch["attention_mask"]
        model(**{name: value for name, value in batch.items() if name != "labels"})
    for counter in counters.values():
        counter.remove()
    found = {}
    for threshold, budget in pairs:
        counter = counters[threshold]
        channels = {n: chosen(counter.counts[n], budget_of(n, layer.in_features, budget, {})) for n, layer in layers.items()}
        found[threshold, budget] = quaff.Channels(channels, counter.maxima, {"threshold": threshold, "budget": budget})
    return found


class Watch(transformers.TrainerCallback):
    """At a few steps, counts the outliers at the inputs of all layers, and how many of them lie in the calibrated channels.

    layers: by name, before adapters are put in. found: calibrated channels by (threshold, budget).
    looks: for each look {"step", "fired": for each of `found`, for each layer: elements that fired, those in calibrated channels, channels
        that fired, calibrated ones among them}.
    """

    def __init__(self, model: torch.nn.Module, layers: dict[str, torch.nn.Module], found: dict[tuple, quaff.Channels], steps: int):
        self.layers, self.found = layers, found
        self.at = {round(i * (steps - 1) / max(1, LOOKS - 1)) for i in range(LOOKS)}
        self.counters: dict[float, Counter] = {}
        self.looks: list[dict] = []
        model.register_forward_pre_hook(self._mask, with_kwargs=True)

    def _mask(self, _, args, kwargs):
        for counter in self.counters.values():
            counter.mask = kwargs["attention_mask"]

    def on_step_begin(self, args, state, control, **_):
        if state.global_step in self.at:
            self.counters = {threshold: Counter(self.layers, threshold) for threshold, _ in self.found}

    def on_step_end(self, args, state, control, **_):
        if not self.counters:
            return
        fired = []
        for (threshold, _), channels in self.found.items():
            counts = self.counters[threshold].counts
            fired.append([
                [int(n) for n in (c.sum(), c[channels.channels[name]].sum(), (c > 0).sum(), (c[channels.channels[name]] > 0).sum())]
                for name, c in ((name, counts[name]) for name in self.layers)])  # fmt: skip
        self.looks.append({"step": state.global_step, "fired": fired})
        for counter in self.counters.values():
            counter.remove()
        self.counters = {}


@torch.no_grad()
def layer_errors(model: torch.nn.Module, batch: dict[str, torch.Tensor], channels: list[quaff.Channels]) -> dict[str, dict[str, float]]:
    """By int8 method and kind of layer: the relative error of a layer's output, root mean square over layers.

    channels: for each pair of --outliers.
    """
    errors: dict[str, dict[str, list[float]]] = {m: {} for m in INT8}
    mask = batch["attention_mask"].bool()

    def hook(name: str, layer: torch.nn.Linear):
        def see(_, args, y):
            x, y = args[0][mask], y[mask]
            for m, of_kind in errors.items():
                found = METHODS[m].of(channels)
                own = quaff.Channels({"0": found.channels[name]}, {"0": found.maxima[name]})
                alone = METHODS[m].quantized(torch.nn.Sequential(layer).eval(), own)
                of_kind.setdefault(name.rpartition(".")[2], []).append(float((alone(x) - y).norm() / y.norm()))

        return layer.register_forward_hook(see)

    handles = [hook(name, layer) for name, layer in linear_layers(model.eval()).items()]
    model(**{name: value for name, value in batch.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    return {m: {kind: float(np.sqrt(np.mean(np.square(of_layer)))) for kind, of_layer in of_kind.items()} for m, of_kind in errors.items()}


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradients of a new LoRA adapter's B on one batch, one after the other, in evaluation mode."""
    model = adapted(model, 0).eval()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None])


def gradient_errors(a: dict, batch: dict[str, torch.Tensor], channels: list[quaff.Channels]) -> dict[str, dict[str, float]]:
    """By int8 method: the relative error of an adapter's gradients, also with the backward products in float32.

    channels: for each pair of --outliers.
    """
    wanted, errors = gradients(METHODS["full"].quantized(load(a)[0], None), batch), {}
    for m in INT8:
        model = METHODS[m].quantized(load(a)[0], METHODS[m].of(channels))
        found = {"gradients": gradients(model, batch)}
        if METHODS[m].method in ("quaff", "naive"):
            model = METHODS[m].quantized(load(a)[0], METHODS[m].of(channels))
            for layer in (layer for layer in model.modules() if isinstance(layer, Int8Linear)):
                layer.transposed_product = lambda g, layer=layer: g @ (layer.qweight.float() * layer.scale)
            found[FLOAT_BACKWARD] = gradients(model, batch)
        errors[m] = {key: float((g - wanted).norm() / wanted.norm()) for key, g in found.items()}
    return errors


# ------------------------------------------------------------------------------------------------------------- one run


def train(run: Run, a: dict) -> dict:
    """Train one run in this process; returns its losses (nats per token of the answers), accuracy, curve and time in seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    torch.set_num_threads(a["threads"])
    began = time.monotonic()
    outliers, method = outliers_of(a["outliers"]), METHODS[run.method]
    model, tokenizer = load(a)
    channels = quaff.Channels.load(channels_file(a["work"], QUESTIONS, outliers[min(method.outliers, len(outliers) - 1)]))
    import logging

    logging.getLogger("sherry_gguf").setLevel(logging.ERROR)  # that weights which are not ternary lose much in TQ1_25
    model = method.quantized(model, channels)
    layers = linear_layers(model)
    model = adapted(model, run.seed)
    held_out = encoded(tokenizer, questions(a["data"], "dev", 2 * a["held_out"]))
    result: dict[str, Any] = {"run": dataclasses.asdict(run), "layers": len(layers), "parameters": model.get_nb_trainable_parameters()[0]}
    if run.steps:
        trainer = trainer_of(run, model, tokenizer, a)
        if run.seed == 1 and run.method in WATCHED:
            found = {pair: quaff.Channels.load(channels_file(a["work"], QUESTIONS, pair)) for pair in outliers}
            watch = Watch(model, layers, found, run.steps)
            trainer.add_callback(watch)
            result |= {"names": list(layers), "looks": watch.looks}
        trainer.train()
        result["curve"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for half, name in enumerate(("choice", "report")):
        result[name] = mean_loss(model, held_out[half::2], tokenizer, a["batch"])
    if run.seed or not run.steps:
        result |= accuracy(model, tokenizer, a)
    return result | {"seconds": round(time.monotonic() - began, 1)}


def trainer_of(run: Run, model: torch.nn.Module, tokenizer, a: dict) -> transformers.Trainer:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(Path(a["work"]) / "trainer"), max_steps=run.steps, per_device_train_batch_size=a["batch"], learning_rate=run.lr,
        lr_scheduler_type="constant_with_warmup", warmup_steps=a["warmup"], weight_decay=0.0, max_grad_norm=0.3, use_cpu=True,
        dataloader_pin_memory=False, group_by_length=True, seed=run.seed, data_seed=run.seed, logging_steps=max(1, run.steps // 20),
        save_strategy="no", report_to="none", disable_tqdm=True, label_names=["labels"])  # fmt: skip
    examples = encoded(tokenizer, questions(a["data"], "train", run.steps * a["batch"], seed=1 + run.seed))
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=transformers.DataCollatorForSeq2Seq(tokenizer))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


# ------------------------------------------------------------------------------------------------------- the comparison


def compared(runs: Runs, methods: list[str], steps: int, seeds: int) -> Iterator[dict[str, dict]]:
    """Train what the comparison needs; yields the figures of all methods so far after each group of methods."""
    rows: dict[str, dict] = {}
    for at in range(0, len(methods), GROUP):
        group = methods[at : at + GROUP]
        print(f"learning rates of {', '.join(group)}", flush=True)
        before = {m: Run(m, 0.0, 0, 0) for m in group}
        sweeps = {m: Sweep(runs, Run(m, 0.0, 0, steps), RATES, tie=0.0) for m in group}
        complete(list(sweeps.values()))
        best = {m: sweep.best() for m, sweep in sweeps.items()}
        fresh = {m: [Run(m, best[m], seed, steps) for seed in range(1, seeds + 1)] for m in group}
        print(f"seeds 1 to {seeds} at the best rates, and before", flush=True)
        runs.need([*before.values(), *(fresh[m][i] for i in range(seeds) for m in group)])
        for m in group:
            trained = [runs[run] for run in fresh[m]]
            rows[m] = {
                "lr": best[m], "open": sweeps[m].open(best[m]),
                "sweep": {f"{lr:g}": runs[sweeps[m].run(lr)]["choice"] for lr in sweeps[m].rates},
                "before": {key: runs[before[m]][key] for key in ("report", "acc", "acc_norm")},
                **{key: [result[key] for result in trained] for key in ("report", "choice", "acc", "acc_norm", "curve")},
            }  # fmt: skip
        yield rows


def hit_rates(watched: dict, pair: int) -> dict[str, Any]:
    """What a watched run says of one pair of --outliers.

    Returns: "layers" of "of" that fired; "elements" and "channels", the shares of those that fired that had been calibrated, over all
    layers; "kinds", "depths" and "steps": the share of elements by each; None where nothing fired.
    """
    names = watched["names"]
    counts = np.array([look["fired"][pair] for look in watched["looks"]])  # (looks, layers, 4)

    def rate(part: np.ndarray, of: int = 0) -> float | None:
        fired = int(part[..., of].sum())
        return float(part[..., of + 1].sum() / fired) if fired else None

    kinds = [name.rpartition(".")[2] for name in names]
    depths = [int(m[1]) if (m := re.search(r"\.(\d+)\.", name)) else 0 for name in names]
    return {
        "layers": int((counts[..., 0].sum(0) > 0).sum()), "of": len(names), "elements": rate(counts), "channels": rate(counts, 2),
        "fired": statistics.mean(counts[..., 2].sum(1).tolist()),
        "kinds": {kind: rate(counts[:, [k == kind for k in kinds]]) for kind in dict.fromkeys(kinds)},
        "kinds_fired": {kind: int((counts[:, [k == kind for k in kinds], 0].sum(0) > 0).sum()) for kind in dict.fromkeys(kinds)},
        "depths": {depth: rate(counts[:, [d == depth for d in depths]]) for depth in dict.fromkeys(depths)},
        "steps": {look["step"]: rate(part) for look, part in zip(watched["looks"], counts)},
    }  # fmt: skip
