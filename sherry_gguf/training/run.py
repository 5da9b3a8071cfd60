"""The steps of a training run that every training command takes."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, Trainer

from sherry_gguf import signals
from sherry_gguf.errors import Stop

from .callbacks import Finished, Interrupt, Progress
from .files import locked, whole_directory, write
from .models import warn
from .parsing import Arguments
from .resume import SETTINGS, resume_from

STAGE = "exporting"  # directory in --output_dir where the result is made and evaluated
SLOW_BF16 = 1.25  # warn if bfloat16 products on a CPU take this many times as long as float32's
NO_SPACE = 1 << 26  # a failure to write is put down to a full disk below this many free bytes


@contextlib.contextmanager
def begin(args: Arguments, out: Path, now: dict, read: Sequence[str]) -> Iterator[Path | None]:
    """Check --output_dir and lock it; yields the checkpoint to resume from.

    out: --export. now: the run's settings. read: files and directories that are read as text.
    Raises Stop, also inside the `with` block for what a full disk causes.
    """
    for folder in map(Path, read):
        if folder.is_dir() and args.directory.resolve().is_relative_to(folder.resolve()):
            raise Stop(f"--output_dir {args.output_dir} is in {folder}, which is read as text: choose another place")
    found = resume_from(args, now)
    with contextlib.ExitStack() as stack:
        if not args.process_index:
            check_target(out, args.directory)
            args.directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(args.directory, "--output_dir"))
        try:
            yield found
        except (SafetensorError, RuntimeError) as e:  # how safetensors and PyTorch report a failure to write
            free = shutil.disk_usage(args.directory).free if args.directory.is_dir() else NO_SPACE
            if free >= NO_SPACE:
                raise
            raise Stop(f"{args.output_dir}: only {free / 1e6:.1f} MB are free there ({type(e).__name__}): make room, and run "
                       "the same command again") from e  # fmt: skip


def check(args: Arguments, context: int, validation_share: float) -> None:
    """Raises Stop for numbers that training cannot use."""
    if context < 2:
        raise Stop(f"--context {context}: use at least 2 tokens, of which one is predicted")
    if not 0 < validation_share < 1:
        raise Stop(f"--validation_share {validation_share}: use a share between 0 and 1")
    for name in "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps":
        if getattr(args, name) < 1:
            raise Stop(f"--{name} {getattr(args, name)}: at least 1")
    if not 0 <= args.seed < 1 << 32:
        raise Stop(f"--seed {args.seed}: from 0 to 4294967295")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise Stop("--max_steps 0, or --num_train_epochs 0: there is nothing to train")


def check_target(out: Path, directory: Path, flag: str = "--export") -> None:
    """Raises Stop if the result could not be written in the end, before hours of work.

    directory: of the run's checkpoints. flag: the one that names `out`.
    """
    mine = directory.resolve()
    if mine.is_relative_to(out.resolve()) or out.resolve() == mine / STAGE:
        raise Stop(f"{flag} {out}: the run keeps its own files there; choose another directory, or one in it")
    try:
        with contextlib.suppress(InterruptedError), whole_directory(out):
            raise InterruptedError  # so that nothing appears
    except FileExistsError:
        raise Stop(f"{out} already has something in it: choose another {flag}, or remove it") from None
    except OSError as e:
        raise Stop(f"{flag} {out}: nothing can be written there ({e.strerror})") from e


def show_progress(trainer: Trainer) -> None:
    """One bar instead of transformers' own progress."""
    trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress)


def announce(args: Arguments, now: dict, checkpoint: Path | None) -> None:
    """In the first process, before its first step: keep the settings, and warn about what is slow."""
    if not checkpoint or not (args.directory / SETTINGS).is_file():
        write(args.directory / SETTINGS, json.dumps(now, indent=2) + "\n")
    if args.device.type == "cpu" and args.bf16 and (slower := bf16_time()) > SLOW_BF16:
        warn(f"--bf16 true: on this CPU bfloat16 products take {slower:.3g} times as long as float32: leave it out")


def train(trainer: Trainer, interrupt: Interrupt, checkpoint: Path | None) -> float:
    """Run the Trainer; returns the seconds it took.

    Raises KeyboardInterrupt after Ctrl-C, once a checkpoint is saved, and Stop for errors before the first step, or if there was none.
    """
    if trainer.args.process_index == 0 and checkpoint:
        print(f"training: resuming from {checkpoint}", flush=True)
    began = time.monotonic()
    with signals.handled(interrupt.ask):
        run(trainer, interrupt, checkpoint)
    if interrupt.agreed:
        raise KeyboardInterrupt
    if not trainer.state.global_step:
        raise Stop("training took no step: the rows do not fill one batch, and --dataloader_drop_last leaves the rest out")
    return time.monotonic() - began


def run(trainer: Trainer, interrupt: Interrupt, checkpoint: Path | None) -> None:
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


def staged(directory: Path) -> Path:
    """The path of the result while it is made; what an earlier run left there is removed."""
    stage = directory / STAGE
    for rest in stage, *directory.glob(f".{STAGE}.*.part"):
        shutil.rmtree(rest, ignore_errors=True)
    return stage


def publish(stage: Path, out: Path) -> None:
    """Move what is in `stage` to `out`, whole or not at all."""
    with whole_directory(out) as part:
        for path in stage.iterdir():
            shutil.move(path, part / path.name)
    stage.rmdir()


def bf16_time() -> float:
    """Time of a bfloat16 product on this CPU, which may emulate it, divided by that of a float32 product."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        runs = []
        for _ in range(5):
            began = time.perf_counter()
            x @ w
            runs.append(time.perf_counter() - began)
        times[dtype] = min(runs)
    return times[torch.bfloat16] / times[torch.float32]
