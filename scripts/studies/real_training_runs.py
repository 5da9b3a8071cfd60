"""The runs of real_training.py: training a real model with one method, stopping in time, and measuring what came out."""

import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from study_runs import Kept, Paused, Runs, Sweep, complete, leaders

from sherry_gguf.training.files import write

LOOKS = 8  # held-out losses in a reported run, evenly spread over its tokens
LOOK_TOKENS = 2048  # at a time while measuring; every pass quantizes all weights, so fewer are slower, and more are not faster
SAVE_EVERY = 100  # steps between two checkpoints, besides that at the deadline
WARMUP = 0.05  # share of the steps during which the learning rate rises
MILD = (("end", 0.5), ("peak", 0.25))  # settings of Arenas
PUBLISHED = (("end", 1.0), ("peak", 1.0))
# what is trained: label, quantizer.METHODS, Arenas' settings, whether the full-precision model teaches
METHODS: dict[str, tuple[str, str, tuple[tuple[str, float], ...], bool]] = {
    "full": ("full precision", "full", (), False),
    "absmean": ("absmean ternary", "absmean", (), False),
    "twn": ("TWN ternary", "twn", (), False),
    "sherry": ("Sherry without Arenas", "sherry", (), False),
    "arenas": ("Sherry, mild Arenas", "sherry", MILD, False),
    "arenas-published": ("Sherry, Arenas as published", "sherry", PUBLISHED, False),
    "absmean-arenas-published": ("absmean ternary, Arenas as published", "absmean", PUBLISHED, False),
    "absmean-teacher": ("absmean ternary, with a teacher", "absmean", (), True),
    "twn-teacher": ("TWN ternary, with a teacher", "twn", (), True),
    "sherry-teacher": ("Sherry without Arenas, with a teacher", "sherry", (), True),
    "arenas-teacher": ("Sherry, mild Arenas, with a teacher", "sherry", MILD, True),
    "arenas-published-teacher": ("Sherry, Arenas as published, with a teacher", "sherry", PUBLISHED, True),
}
RATES, RATES_FULL = (2.5e-4, 5e-4), (1e-5, 2e-5)  # where a sweep begins


@dataclasses.dataclass(frozen=True)
class Run(Kept):
    """One training run: `method` is one of METHODS."""

    method: str
    granularity: str
    lr: float
    seed: int
    steps: int
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.method} lr {self.lr:g} seed {self.seed}"


def train(run: Run, a: dict) -> dict:
    """Train one run in this process, from its checkpoint if it has one.

    Returns its losses in nats a token and the seconds of all calls; for a seed that is reported, losses and accuracies on its way too.
    Raises Paused when a["deadline"] is over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides
    began = time.monotonic()
    if time.time() > a["deadline"]:
        raise Paused
    import real_training_files as files
    import safetensors.torch
    import torch
    import transformers
    from transformers import PrinterCallback

    from sherry_gguf import qat
    from sherry_gguf.qat.data import Blocks
    from sherry_gguf.training.resume import last_checkpoint

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(a["threads"])
    _, blocks, held_out, tasks = files.load(work := Path(a["work"]), run.context)
    held_out = held_out[: a["eval_blocks"] * 2]
    model, teacher = load_models(run, a)
    notes = Notes((folder := work / "checkpoints" / slug(run)) / "notes.json", began)

    def look(step: int) -> None:
        """Accuracies, for the seeds that are reported."""
        if run.seed and str(step) not in (found := notes.kept.get("tasks", {})):
            model.eval()
            notes.keep(tasks=found | {str(step): task_accuracies(model, tasks, a)})

    looks = {run.steps * i // a["task_looks"] for i in range(a["task_looks"] + 1)} if a["task_looks"] else {run.steps}
    arenas: dict[str, Any] = dict(METHODS[run.method][2])
    trainer = qat.SherryTrainer(
        model, arguments(run, a, folder), train_dataset=Blocks(blocks), eval_dataset=Blocks(held_out[1::2]), teacher=teacher,
        arenas=qat.Arenas(**arenas) if arenas else None, callbacks=[deadline(a["deadline"], looks, look)])  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if run.seed and "before" not in notes.kept:
        notes.keep(**start(run, model, held_out[1::2], tasks if 0 in looks else {}, a))
    checkpoint = last_checkpoint(folder)
    if checkpoint and checkpoint.name == f"checkpoint-{run.steps}":  # only measuring is left; the Trainer would take one more step
        safetensors.torch.load_model(model, checkpoint / "model.safetensors")
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            notes.keep()
        state = trainer.state
    if state.global_step < run.steps or time.time() > a["deadline"]:
        raise Paused
    model.eval()
    look(run.steps)
    result = outcome(run, a, model, held_out, notes, state.log_history)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def load_models(run: Run, a: dict) -> tuple[Any, Any]:
    """The model, prepared for its method, and its teacher or None."""
    import torch
    from transformers import AutoModelForCausalLM

    from sherry_gguf import qat

    _, method, _, taught = METHODS[run.method]
    path = Path(a["work"]) / "model"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if a["bf16"] else torch.float32) if taught else None
    model.to(a["device"])
    qat.prepare(model, qat.QuantConfig(method, granularity=run.granularity))
    return model, teacher


def start(run: Run, model: Any, held_out: np.ndarray, tasks: dict[str, list[dict]], a: dict) -> dict:
    """Loss and accuracies before the first step, for a run's Notes: measured once for all runs with the same quantizer."""
    path = Path(a["work"]) / f"start-{METHODS[run.method][1]}-{run.granularity}.json"
    with FileLock(f"{path}.lock"):  # another run may be measuring it
        if not path.exists():
            model.eval()
            accuracies = {"tasks": {"0": task_accuracies(model, tasks, a)}} if tasks else {}
            write(path, json.dumps({"before": loss(model, held_out, a)} | accuracies))
        return json.loads(path.read_text())


def precision(a: dict) -> Any:
    """The context of every measurement, the same as in the Trainer's evaluations: bfloat16 products, or float32 without a["bf16"].

    The Trainer leaves its own context on a model that it has trained in this call, and on no other.
    """
    import torch

    return torch.autocast(a["device"], torch.bfloat16, enabled=a["bf16"])


def loss(model: Any, blocks: np.ndarray, a: dict) -> float:
    """Mean loss in nats a token over blocks (m, context)."""
    from sherry_gguf.qat.data import mean_loss

    with precision(a):
        return mean_loss(model, blocks, max(1, LOOK_TOKENS // blocks.shape[1]))


def task_accuracies(model: Any, tasks: dict[str, list[dict]], a: dict) -> dict[str, dict[str, float]]:
    """Each task's `accuracy`."""
    with precision(a):
        return {name: accuracy(model, rows, LOOK_TOKENS) for name, rows in tasks.items()}


def outcome(run: Run, a: dict, model: Any, held_out: np.ndarray, notes: "Notes", log: list[dict]) -> dict:
    """The result of a run whose steps are done."""
    report = loss(model, held_out[1::2], a)
    before = {0: notes.kept["before"]} if run.seed else {}
    curve = before | {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry} | {run.steps: report}
    tokens = run.batch * run.context
    return {
        "run": dataclasses.asdict(run), "before": notes.kept.get("before"), "choice": loss(model, held_out[::2], a),
        "report": report, "curve": [{"tokens": step * tokens, "loss": loss} for step, loss in sorted(curve.items())],
        "tasks": [{"tokens": int(step) * tokens, **found} for step, found in notes.kept.get("tasks", {}).items()],
        "seconds": round(notes.keep()["seconds"], 1), "machine": a["machine"],
        "jobs": a["jobs"], "threads": a["threads"],
    }  # fmt: skip


def memory(figures: dict, methods: list[str]) -> float:
    """Bytes that a run needs, about: weights, gradients, two moments and a teacher in float32; three copies of the logits; PyTorch."""
    copies = 5 if any(METHODS[name][3] for name in methods) else 4
    return 4.0 * (copies * figures["parameters"] + 3 * LOOK_TOKENS * figures["vocabulary"]) + 5e8


class Notes:
    """What a run has measured, and the seconds that it took, over all its calls: a file."""

    def __init__(self, path: Path, began: float):
        self.path, self.last = path, began
        self.kept: dict[str, Any] = {"seconds": 0.0}
        if path.exists():
            self.kept |= json.loads(path.read_text())

    def keep(self, **more: object) -> dict:
        """Add these; returns everything."""
        now = time.monotonic()
        self.kept |= {"seconds": self.kept["seconds"] + now - self.last, **more}
        self.last = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(self.kept))
        return self.kept


def arguments(run: Run, a: dict, folder: Path) -> Any:
    """The Trainer's arguments. They say nothing of time: a run that was paused gives the same result."""
    from transformers import TrainingArguments

    micro = math.gcd(run.batch, a["micro"])
    cpu = a["device"] == "cpu"
    return TrainingArguments(
        output_dir=str(folder), max_steps=run.steps, per_device_train_batch_size=micro, gradient_accumulation_steps=run.batch // micro,
        per_device_eval_batch_size=max(1, LOOK_TOKENS // run.context), learning_rate=run.lr, lr_scheduler_type="cosine",
        warmup_steps=round(run.steps * WARMUP), weight_decay=0.0, adam_beta2=0.95, optim="adamw_torch_fused", bf16=a["bf16"], use_cpu=cpu,
        dataloader_pin_memory=not cpu, seed=run.seed, data_seed=run.seed, eval_strategy="steps" if run.seed else "no",
        eval_steps=max(1, run.steps // LOOKS), prediction_loss_only=True, logging_steps=max(1, run.steps // 40), save_strategy="steps",
        save_steps=SAVE_EVERY, save_total_limit=1, report_to="none", disable_tqdm=True, average_tokens_across_devices=False)  # fmt: skip


def deadline(when: float, looks: set[int], look: Callable[[int], None]) -> Any:
    """A callback that saves a checkpoint and stops when time.time() is past `when`; it saves after the last step too.

    At the steps in `looks` it calls `look` with the step, in evaluation mode.
    """
    from transformers import TrainerCallback

    class Deadline(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step in looks and state.global_step < state.max_steps:
                look(state.global_step)
                model.train()
            late = time.time() > when
            if late or state.global_step == state.max_steps:
                control.should_save = True
                control.should_training_stop |= late

    return Deadline()


def slug(run: Run) -> str:
    return f"{run.method}-{run.granularity}-{run.lr:g}-{run.seed}-{run.steps}x{run.batch}x{run.context}"


def accuracy(model: Any, rows: list[dict], tokens: int) -> dict[str, float]:
    """Share of documents whose right choice is the likeliest, with its standard error.

    rows: as `real_training_files.questions` gives. tokens: at a time.
    """
    import torch

    flat = sorted(((i, j, request, n) for i, row in enumerate(rows) for j, (request, n) in enumerate(zip(row["requests"], row["scored"]))),
                  key=lambda item: -len(item[2]))  # fmt: skip
    parts: list[list[tuple]] = []
    while rest := flat[sum(map(len, parts)) :]:
        parts.append(rest[: max(1, tokens // len(rest[0][2]))])
    scores = [[-math.inf] * len(row["requests"]) for row in rows]
    device = next(model.parameters()).device
    with torch.no_grad():
        for part in parts:
            ids = torch.zeros(len(part), len(part[0][2]), dtype=torch.int64)
            for k, (_, _, request, _) in enumerate(part):  # padded on the right, which a causal model's earlier tokens do not see
                ids[k, : len(request)] = torch.tensor(request)
            logits = model(input_ids=ids.to(device)).logits.float()
            found = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(device))[..., 0].cpu()
            for k, (i, j, request, n) in enumerate(part):
                scores[i][j] = float(found[k, len(request) - 1 - n : len(request) - 1].sum())
    right = np.array([int(np.argmax(score)) == row["gold"] for score, row in zip(scores, rows, strict=True)])
    return {"acc": float(right.mean()), "acc_stderr": float(right.std(ddof=1) / len(right) ** 0.5)}


def all_runs(runs: Runs, a: Any) -> None:
    """Sweep each method's rate with seed 0, then train the leaders with the other seeds. Raises Paused."""
    sweeps = {name: Sweep(runs, template(name, a), RATES_FULL if name == "full" else RATES) for name in a.methods}
    complete(list(sweeps.values()))
    for seed in range(1, a.seeds + 1):  # one seed of every method before the next: a study that is cut off has complete rows
        runs.need([dataclasses.replace(run, seed=seed) for name in a.methods for run in leaders([sweeps[name]])])


def template(name: str, a: Any) -> Run:
    return Run(name, a.granularity, 0.0, 0, a.steps, a.batch, a.context)
