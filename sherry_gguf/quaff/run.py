"""One run of the fine-tuning command, from its arguments to the evaluated adapter."""

import json
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import transformers

from sherry_gguf.errors import Stop
from sherry_gguf.packed.frozen import FrozenLinear
from sherry_gguf.training import run as running
from sherry_gguf.training.callbacks import LOSS, Estimate, Interrupt, Panel, plot
from sherry_gguf.training.files import whole_directory, write
from sherry_gguf.training.resume import check_settings, settings
from sherry_gguf.training.trainer import CpuTrainer

from . import building, rows
from .arguments import FinetuneArguments
from .channels import Channels
from .models import EXPERTS
from .parsing import Arguments
from .scaling import load_factors, save_factors

FACTORS = "factors.safetensors"  # in checkpoints and in the result
RECORD = "training.json"  # in the result
START_TOKENS = 1 << 12  # held-out tokens evaluated before the first step
FREE = "export", "eval_tokens"  # flags that may change when a run is resumed
PANELS = (
    Panel("nats per token", LOSS),
    Panel("norm", {"grad_norm": ("norm of the gradients", {})}, ("learning_rate", "learning rate", "learning rate")),
)


class AdapterTrainer(CpuTrainer):
    """A Trainer whose checkpoints hold the factors too."""

    def __init__(self, model, args, collate: rows.Collate, **kwargs):
        super().__init__(model, args, data_collator=collate, **kwargs)
        self.collate = collate

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        assert self.model is not None and self.args.output_dir
        save_factors(self.model, Path(output_dir or self.args.output_dir) / FACTORS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        assert self.model is not None
        load_factors(self.model, Path(resume_from_checkpoint) / FACTORS)

    def _load_best_model(self):
        super()._load_best_model()
        assert self.model is not None
        load_factors(self.model, Path(str(self.state.best_model_checkpoint)) / FACTORS)


def run(s: FinetuneArguments, args: Arguments) -> int:
    """Fine-tune, save and evaluate; returns the exit status.

    Raises Stop, and KeyboardInterrupt if interrupted; there is a checkpoint then if training had begun.
    """
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    warnings.filterwarnings("ignore", "Could not find a config file in")  # of peft, about a GGUF; embeddings do not train
    out = Path(s.export or args.directory / "adapter")
    check(s, args)
    now = settings(s, args, FREE)
    with running.begin(args, out, now, (*s.train, *s.validation)) as checkpoint:
        return train_and_save(s, args, out, now, checkpoint)


def check(s: FinetuneArguments, args: Arguments) -> None:
    """Raises Stop for arguments that fit no model."""
    if not s.model:
        raise Stop("give a model to fine-tune: --model DIR_OR_GGUF")
    running.check(args, s.context, s.validation_share)
    for name in "eval_tokens", "calibration_rows", "rank", "virtual_tokens":
        if getattr(s, name) < 1:
            raise Stop(f"--{name} {getattr(s, name)}: at least 1")
    if not s.alpha > 0:
        raise Stop(f"--alpha {s.alpha:g}: must be above 0")
    if not 0 <= s.dropout < 1:
        raise Stop(f"--dropout {s.dropout:g}: from 0 to below 1")
    if not s.threshold > 0:
        raise Stop(f"--threshold {s.threshold:g}: must be above 0")
    for name in "gamma", "budget":
        if not 0 <= getattr(s, name) <= 1:
            raise Stop(f"--{name} {getattr(s, name):g}: from 0 to 1")
    if s.channels and not Path(s.channels).is_file():
        raise Stop(f"--channels {s.channels}: no such file")
    for name in "keep", "target":
        try:
            re.compile(getattr(s, name))
        except re.error as e:
            raise Stop(f"--{name} {getattr(s, name)!r}: not a regular expression: {e}") from e
    if s.base == "tq1_25" and s.method not in ("quaff", "naive"):
        raise Stop(f"--base tq1_25 --method {s.method}: packed weights train with quaff or naive")
    if args.fsdp or args.deepspeed:
        raise Stop("--fsdp and --deepspeed: quantized weights are not sharded; torchrun alone trains with DDP")


def train_and_save(s: FinetuneArguments, args: Arguments, out: Path, now: dict, checkpoint: Path | None) -> int:
    interrupt = Interrupt()
    trainer, table, channels, before = set_up(s, args, now, checkpoint, interrupt)
    now = now | {"rows": table.digest}
    seconds = running.train(trainer, interrupt, checkpoint)
    if args.process_index == 0:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        history, steps = trainer.state.log_history, trainer.state.global_step
        plot(history, args.directory / "training.png", PANELS)
        stage = running.staged(args.directory)
        with whole_directory(stage) as part:
            model.save_pretrained(part)
            if channels is not None:
                channels.save(part / building.CHANNELS)
                save_factors(model, part / FACTORS)
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(stage), device="cpu"))  # evaluated as saved
        loss = rows.mean_loss(model, table.held_out, trainer.collate, args.per_device_eval_batch_size)
        if not math.isfinite(loss):
            raise Stop(f"the adapter's held-out loss is {loss}: training diverged. Use a lower --learning_rate and another --output_dir")
        last = next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
        losses = {"train": last, "held_out": loss}
        record = {"settings": now, "loss": losses, "before": before, "steps": steps, "seconds": round(seconds, 1)}
        write(stage / RECORD, json.dumps(record, indent=2) + "\n")
        running.publish(stage, out)
        print(f"training: {steps} steps, held-out loss {loss:.4f} of the adapter in {out}", flush=True)
    return 0


def set_up(s: FinetuneArguments, args: Arguments, now: dict, checkpoint: Path | None,
           interrupt: Interrupt) -> tuple[AdapterTrainer, rows.Rows, Channels | None, dict[str, float]]:  # fmt: skip
    """The trainer, its rows, the outlier channels, and the losses before the first step, in the first process. Raises Stop."""
    transformers.set_seed(args.seed)  # the Trainer does so only after the model is made
    model, tokenizer = building.load_model(s)
    base = building.base_of(s, model)
    with args.main_process_first(desc="reading"):
        table = rows.load(s, tokenizer)
    begun = checkpoint.resolve().parent if checkpoint else args.directory
    now = now | {"rows": table.digest}
    check_settings(begun, now, bool(checkpoint))
    collate = rows.Collate(next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0))
    first = args.process_index == 0
    if first:
        running.announce(args, now, checkpoint)
        cut = f", {table.cut} of them cut at --context {s.context}" * bool(table.cut)
        empty = f"; {table.empty} left out, which have no answer in their first {s.context} tokens" * bool(table.empty)
        print(f"rows: {len(table.train)} to train on{cut}, {len(table.held_out)} held out{empty}", flush=True)
    sample = rows.first(table.held_out, START_TOKENS)
    size = args.per_device_eval_batch_size
    before: dict[str, float] = {"tokens": sum(sample["labelled"])}
    channels, resumed = None, checkpoint is not None
    if s.method in building.NEED_CHANNELS and not building.known_channels(s, args, resumed) or args.device.type == "cpu":
        model.to(args.device)  # in full precision only if it must run so
        if first:
            before["given"] = rows.mean_loss(model, sample, collate, size)
    if s.method in building.NEED_CHANNELS:
        with args.main_process_first(desc="calibrating"):
            channels = building.outlier_channels(s, args, model, table, collate, resumed)
    model = building.quantized(s, model, channels, base).to(args.device)
    if first:
        before["quantized"] = rows.mean_loss(model, sample, collate, size)
    model = building.with_adapter(s, model)
    if args.ddp_find_unused_parameters is None:  # a process may skip experts
        args.ddp_find_unused_parameters = any(re.search(EXPERTS, name) for name, _ in model.named_modules())
    try:
        trainer = AdapterTrainer(model, args, collate, train_dataset=table.train.select_columns(["input_ids", "labels"]),
                                 eval_dataset=table.held_out.select_columns(["input_ids", "labels"]), processing_class=tokenizer,
                                 callbacks=[interrupt, Estimate()])  # fmt: skip
    except (ValueError, ImportError, RuntimeError) as e:  # something is not installed, or settings contradict each other
        raise Stop(f"{type(e).__name__}: {e}") from e
    running.show_progress(trainer)
    if first:
        announce(s, model, base, channels, before)
    return trainer, table, channels, before


def announce(s: FinetuneArguments, model: Any, base: str, channels: Channels | None, before: dict[str, float]) -> None:
    """Print what will be trained, and the losses before the first step."""
    frozen = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    weights = sum(m.in_features * m.out_features for m in frozen)
    bits = 8 * sum(b.numel() * b.element_size() for m in frozen for b in m.buffers()) / max(weights, 1)
    stored = f"{len(frozen)} layers of {weights / 1e6:.1f} M weights in {base} by {s.method}, {bits:.3g} bits each" if frozen else (
        f"not quantized ({s.method})")  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model: {stored}; {s.adapter} trains {trained / 1e6:.2f} M parameters", flush=True)
    if channels is not None and s.method == "quaff":
        found = [len(of_layer) for of_layer in channels.channels.values()]
        where = s.channels or "calibrated"
        print(f"outlier channels: {sum(found)} in {sum(map(bool, found))} of {len(found)} layers ({where})", flush=True)
    words = {"given": "as given", "quantized": "quantized" if frozen else "frozen"}
    losses = ", ".join(f"{before[key]:.4f} {said}" for key, said in words.items() if key in before and (frozen or key == "given"))
    print(f"start: held-out loss before the first step ({before['tokens']} tokens): {losses}", flush=True)
