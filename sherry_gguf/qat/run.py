"""One run of the training command, from its arguments to the evaluated export."""

import collections
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from sherry_gguf.errors import Stop
from sherry_gguf.training import run as running
from sherry_gguf.training.callbacks import LOSS, Estimate, Interrupt, Panel, plot
from sherry_gguf.training.files import write
from sherry_gguf.training.models import warn
from sherry_gguf.training.resume import check_settings, settings

from . import models, text
from .arenas import Arenas
from .arguments import SherryArguments
from .data import mean_loss
from .linear import QuantConfig, full_precision, lossy_sizes, prepare, quantized_layers
from .monitor import TrainingMonitor
from .parsing import Arguments
from .quantizer import GROUP_SIZE, SMALL_GROUP_SIZE
from .trainer import SherryTrainer

RECORD = "training.json"  # in the export
START_TOKENS = 1 << 13  # held-out tokens evaluated before the first step
NEAR_GUESSING = 0.8  # share of ln(vocabulary): a trained model with a higher loss reads text that it does not know
FREE = "export", "export_dtype", "eval_tokens", "monitor_every"  # flags that may change when a run is resumed
PANELS = (
    Panel("nats per token", LOSS, ("residual", "λ", "λ of Arenas")),
    Panel("effective rank", {"gradient_rank": ("of the gradients", {}), "activation_rank": ("of the layers' inputs", {})}),
    Panel("share", {"flips": ("ternary values changed by a step", {}), "sign_flips": ("of these, sign changes", {}),
                    "near_zeroing": ("groups close to another choice of the zero", {"ls": ":"}),
                    "near_sign": ("latent weights close to 0", {"ls": ":"})}, log=True),
)  # fmt: skip


def run(s: SherryArguments, args: Arguments, trained: bool) -> int:
    """Train, export and evaluate; returns the exit status. `trained`: as in `command.main`.

    Raises Stop, and KeyboardInterrupt if interrupted; there is a checkpoint then if training had begun.
    """
    transformers.utils.logging.set_verbosity_warning()
    out = Path(s.export or args.directory / "hf")
    check(s, args)
    now = settings(s, args, FREE)
    with running.begin(args, out, now, (*s.train, *s.validation)) as checkpoint:
        return train_and_export(s, args, out, now, checkpoint, trained)


def check(s: SherryArguments, args: Arguments) -> None:
    """Raises Stop for numbers that training cannot use."""
    if s.monitor_every == 1 or s.monitor_every < 0:
        raise Stop(f"--monitor_every {s.monitor_every}: use 2 or more, or 0 to turn the monitor off")
    running.check(args, s.context, s.validation_share)
    if s.eval_tokens < 1:
        raise Stop(f"--eval_tokens {s.eval_tokens}: at least 1")


def train_and_export(s: SherryArguments, args: Arguments, out: Path, now: dict, checkpoint: Path | None, trained: bool) -> int:
    interrupt = Interrupt()
    trainer, texts = set_up(s, args, now, checkpoint, interrupt)
    now = now | {"text": texts.digest}
    rows = np.array(texts.held_out["input_ids"])
    before = None
    if args.process_index == 0:
        running.announce(args, now, checkpoint)
        before = announce(s, args, trainer, texts, rows, trained)
    seconds = running.train(trainer, interrupt, checkpoint)
    if args.process_index == 0:
        plot(trainer.state.log_history, args.directory / "training.png", PANELS)
        running.staged(args.directory)
    stage = args.directory / running.STAGE
    try:
        trainer.export(stage, getattr(torch, s.export_dtype))
    except ValueError as e:  # not finite
        raise Stop(str(e)) from e
    if args.process_index == 0:
        history, steps = trainer.state.log_history, trainer.state.global_step
        del trainer  # the memory of its models
        exported: Any = AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32)
        loss = mean_loss(exported.to(args.device), rows)
        last = next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
        record = {"settings": now, "loss": {"train": last, "held_out": loss}, "before": before,
                  "bytes_per_token": texts.bytes_per_token, "steps": steps, "seconds": round(seconds, 1)}  # fmt: skip
        write(stage / RECORD, json.dumps(record, indent=2) + "\n")
        running.publish(stage, out)
        print(f"training: {steps} steps, held-out loss {loss:.4f} of the export in {out}", flush=True)
    return 0


def set_up(s: SherryArguments, args: Arguments, now: dict, checkpoint: Path | None,
           interrupt: Interrupt) -> tuple[SherryTrainer, text.Texts]:  # fmt: skip
    """The trainer and its texts. Raises Stop."""
    try:
        quant = QuantConfig(s.method, s.granularity, s.group_size)
        arenas = Arenas(s.arenas_peak, s.arenas_warmup, s.arenas_decay, s.arenas_end, s.arenas_rescale)
    except ValueError as e:
        raise Stop(str(e)) from e
    if not arenas.peak and arenas != Arenas(peak=0.0):
        raise Stop("--arenas_peak is 0, which trains without Arenas: the other --arenas_ flags need a higher one")
    transformers.set_seed(args.seed)  # the Trainer does so only after the model is made
    model, tokenizer = models.load(s)
    try:
        names = prepare(model, quant, s.keep, s.only)
    except (ValueError, re.error) as e:
        raise Stop(str(e)) from e
    with args.main_process_first(desc="tokenizing"):
        texts = text.load(s, tokenizer)
    if args.dataloader_drop_last and len(texts.train) < args.train_batch_size * args.world_size:
        raise Stop(f"--dataloader_drop_last: the text has {len(texts.train)} sequences, less than one batch")
    begun = checkpoint.resolve().parent if checkpoint else args.directory
    check_settings(begun, now | {"text": texts.digest}, bool(checkpoint))
    teacher = models.load_teacher(s, tokenizer, torch.bfloat16 if args.bf16 else torch.float32) if s.teacher else None
    try:
        trainer = SherryTrainer(
            model, args, data_collator=text.collate, train_dataset=texts.train, eval_dataset=texts.held_out, processing_class=tokenizer,
            arenas=arenas if names else None, monitor=TrainingMonitor(s.monitor_every) if s.monitor_every and names else None,
            teacher=teacher, distill=s.distill, temperature=s.temperature, callbacks=[interrupt, Estimate()])  # fmt: skip
    except (ValueError, ImportError, RuntimeError) as e:  # something is not installed, or settings contradict each other
        raise Stop(f"{type(e).__name__}: {e}") from e
    running.show_progress(trainer)
    return trainer, texts


def announce(s: SherryArguments, args: Arguments, trainer: SherryTrainer, texts: text.Texts, rows: np.ndarray,
             trained: bool) -> dict | None:  # fmt: skip
    """Print what will be trained, warn about what looks wrong, and return the losses of `before_training`."""
    model: Any = trainer.model
    density = texts.bytes_per_token
    print(f"text: {density['train']:.2f} bytes per token in the training text, {density['held_out']:.2f} in the held-out text", flush=True)
    before = before_training(s, args, model, rows, trained)
    layers = quantized_layers(model)
    if lossy := lossy_sizes(model):
        warn(f"groups of {lossy}: neither TQ1_25 nor TQ1_25_64 can store these weights without loss. Use a multiple of {SMALL_GROUP_SIZE}")
    sizes = collections.Counter(int(m.quant.group_size) for m in layers.values())
    others = ", ".join(f"{n} in groups of {size}" for size, n in sorted(sizes.items()) if size != GROUP_SIZE)
    in_groups = f" ({others})" * (others != "" and s.granularity == "per_group")
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    print(f"training: {model.num_parameters() / 1e6:.1f} M parameters, {len(layers)} matrices by {s.method}{in_groups}, "
          f"sequences of {s.context} tokens, {sequences} a step, {len(texts.train)} to train on and {len(texts.held_out)} held out, "
          f"{args.world_size} process{'es' * (args.world_size > 1)} on {args.device.type}", flush=True)  # fmt: skip
    return before


def before_training(s: SherryArguments, args: Arguments, model, rows: np.ndarray, trained: bool) -> dict | None:
    """The held-out loss that training starts from, printed and returned for `RECORD`; None under DeepSpeed.

    full_precision: the loss of the model as given. If it is close to guessing, a warning says that model, tokenizer and text don't
    belong together. The quantized loss could not show that: quantization makes a good model guess, too.
    quantized: the loss of the model that the first step trains.
    """
    if args.deepspeed:  # no process may have the whole model
        return None
    # Under FSDP the model is still on the CPU here, where a large one is slow.
    rows = rows[: 1 if args.fsdp else max(1, START_TOKENS // s.context)]
    batch = min(8, args.per_device_train_batch_size)
    with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):  # leaves training's random numbers alone
        with full_precision(model):
            loss = mean_loss(model, rows, batch)
        quantized = mean_loss(model, rows, batch) if quantized_layers(model) else loss
    given = "as given" if s.model else "with random weights"
    then = f", {quantized:.4f} quantized by {s.method}" * (s.method != "full")
    print(f"start: held-out loss before the first step ({rows.size} tokens): {loss:.4f} {given}{then}", flush=True)
    vocabulary = model.get_input_embeddings().num_embeddings
    if s.model and trained and loss > NEAR_GUESSING * math.log(vocabulary):
        warn(f"before the first step {s.model} has a held-out loss of {loss:.2f}; guessing among its {vocabulary} tokens would have "
             f"{math.log(vocabulary):.2f}. If the model is trained: is {s.tokenizer or s.model} its tokenizer, and does it know this kind "
             "of text?")  # fmt: skip
    return {"full_precision": loss, "quantized": quantized, "tokens": rows.size}
