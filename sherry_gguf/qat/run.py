"""One run of the training command, from its arguments to the evaluated export."""

import collections
import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback

from sherry_gguf import signals
from sherry_gguf.errors import Stop

from . import models, text
from .arenas import Arenas
from .arguments import SherryArguments
from .callbacks import Estimate, Finished, Interrupt, Progress, plot
from .data import mean_loss
from .files import locked, whole_directory, write
from .linear import QuantConfig, full_precision, lossy_sizes, prepare, quantized_layers
from .models import warn
from .monitor import TrainingMonitor
from .parsing import Arguments
from .quantizer import GROUP_SIZE, SMALL_GROUP_SIZE
from .resume import SETTINGS, check_settings, resume_from, settings
from .trainer import SherryTrainer, bf16_time

RECORD = "training.json"  # in the export
STAGE = "exporting"  # directory in --output_dir where the export is made and evaluated
START_TOKENS = 1 << 13  # held-out tokens evaluated before the first step
NEAR_GUESSING = 0.8  # share of ln(vocabulary): a trained model with a higher loss reads text that it does not know
SLOW_BF16 = 1.25  # warn if bfloat16 products on a CPU take this many times as long as float32's
NO_SPACE = 1 << 26  # a failure to write is put down to a full disk below this many free bytes


def run(s: SherryArguments, args: Arguments, trained: bool) -> int:
    """Train, export and evaluate; returns the exit status. `trained`: as in `command.main`.

    Raises Stop, and KeyboardInterrupt if interrupted; there is a checkpoint then if training had begun.
    """
    transformers.utils.logging.set_verbosity_warning()
    try:
        with begin(s, args) as (out, now, checkpoint):
            return train_and_export(s, args, out, now, checkpoint, trained)
    except (SafetensorError, RuntimeError) as e:  # how safetensors and PyTorch report a failure to write
        free = shutil.disk_usage(args.directory).free if args.directory.is_dir() else NO_SPACE
        if free >= NO_SPACE:
            raise
        raise Stop(f"{args.output_dir}: only {free / 1e6:.1f} MB are free there ({type(e).__name__}): make room, and run "
                   "the same command again") from e  # fmt: skip


@contextlib.contextmanager
def begin(s: SherryArguments, args: Arguments) -> Iterator[tuple[Path, dict, Path | None]]:
    """Check the arguments and lock --output_dir; yields --export, the run's settings and the checkpoint to resume from."""
    out = Path(s.export or args.directory / "hf")
    check(s, args)
    for folder in map(Path, (*s.train, *s.validation)):
        if folder.is_dir() and args.directory.resolve().is_relative_to(folder.resolve()):
            raise Stop(f"--output_dir {args.output_dir} is in {folder}, which is read as text: choose another place")
    now = settings(s, args)
    found = out, now, resume_from(args, now)
    if args.process_index:
        yield found
        return
    check_target(out, args)
    args.directory.mkdir(parents=True, exist_ok=True)
    with locked(args.directory, "--output_dir"):
        yield found


def check(s: SherryArguments, args: Arguments) -> None:
    """Raises Stop for numbers that training cannot use."""
    if s.monitor_every == 1 or s.monitor_every < 0:
        raise Stop(f"--monitor_every {s.monitor_every}: use 2 or more, or 0 to turn the monitor off")
    if s.context < 2:
        raise Stop(f"--context {s.context}: use at least 2 tokens, of which one is predicted")
    if not 0 < s.validation_share < 1:
        raise Stop(f"--validation_share {s.validation_share}: use a share between 0 and 1")
    if s.eval_tokens < 1:
        raise Stop(f"--eval_tokens {s.eval_tokens}: at least 1")
    for name in "per_device_train_batch_size", "gradient_accumulation_steps":
        if getattr(args, name) < 1:
            raise Stop(f"--{name} {getattr(args, name)}: at least 1")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise Stop("--max_steps 0, or --num_train_epochs 0: there is nothing to train")


def check_target(out: Path, args: Arguments) -> None:
    """Raises Stop if the result could not be written in the end, before hours of work."""
    mine = args.directory.resolve()
    if mine.is_relative_to(out.resolve()) or out.resolve() == mine / STAGE:
        raise Stop(f"--export {out}: that is for checkpoints; choose another directory, or one in it")
    try:
        with contextlib.suppress(InterruptedError), whole_directory(out):
            raise InterruptedError  # so that nothing appears
    except FileExistsError:
        raise Stop(f"{out} already has something in it: choose another --export, or remove it") from None
    except OSError as e:
        raise Stop(f"--export {out}: nothing can be written there ({e.strerror})") from e


def train_and_export(s: SherryArguments, args: Arguments, out: Path, now: dict, checkpoint: Path | None, trained: bool) -> int:
    interrupt = Interrupt()
    trainer, texts = set_up(s, args, now, checkpoint, interrupt)
    now = now | {"text": texts.digest}
    rows = np.array(texts.held_out["input_ids"])
    before = None
    if args.process_index == 0:
        if not checkpoint or not (args.directory / SETTINGS).is_file():
            write(args.directory / SETTINGS, json.dumps(now, indent=2) + "\n")
        before = announce(s, args, trainer, texts, rows, trained)
        if checkpoint:
            print(f"training: resuming from {checkpoint}", flush=True)
    began = time.monotonic()
    with signals.handled(interrupt.ask):
        train(trainer, interrupt, checkpoint)
    if interrupt.agreed:
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    stage = args.directory / STAGE
    if args.process_index == 0:
        plot(trainer.state.log_history, args.directory / "training.png")
        for rest in stage, *stage.parent.glob(f".{STAGE}.*.part"):  # of an export that was cut off
            shutil.rmtree(rest, ignore_errors=True)
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
        with whole_directory(out) as part:
            for path in stage.iterdir():
                shutil.move(path, part / path.name)
        stage.rmdir()
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
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    if not args.disable_tqdm:
        trainer.add_callback(Progress)
    return trainer, texts


def announce(s: SherryArguments, args: Arguments, trainer: SherryTrainer, texts: text.Texts, rows: np.ndarray,
             trained: bool) -> dict | None:  # fmt: skip
    """Print what will be trained, warn about what looks wrong, and return the losses of `before_training`."""
    model: Any = trainer.model
    density = texts.bytes_per_token
    print(f"text: {density['train']:.2f} bytes per token in the training text, {density['held_out']:.2f} in the held-out text", flush=True)
    if args.device.type == "cpu" and args.bf16 and (slower := bf16_time()) > SLOW_BF16:
        warn(f"--bf16 true: on this CPU bfloat16 products take {slower:.3g} times as long as float32: leave it out")
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


def train(trainer: SherryTrainer, interrupt: Interrupt, checkpoint: Path | None) -> None:
    """Run the Trainer. Raises Stop for errors before the first step, which settings or a checkpoint cause."""
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Finished:
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()  # as the Trainer does at the end
    except (Stop, torch.OutOfMemoryError):
        raise
    except Exception as e:
        if interrupt.stepped:
            raise
        if not checkpoint:  # something is not installed, or settings contradict each other
            raise Stop(f"training does not begin: {type(e).__name__}: {e}") from e
        ours = not args.resume_from_checkpoint
        remedy = f": remove it to resume from an earlier one, or remove {args.output_dir} to start over" * ours
        raise Stop(f"cannot resume from {checkpoint} ({type(e).__name__}: {e}){remedy}") from e
