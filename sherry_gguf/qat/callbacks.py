"""The training command's callbacks: interruption, a time estimate, and the progress bar."""

from __future__ import annotations

import math
import sys
import time

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from sherry_gguf.errors import Stop

ESTIMATE_AFTER = 60  # seconds of training until a line estimates the rest


class Finished(Exception):
    """The checkpoint to resume from has all steps. The Trainer would take one more."""


class Interrupt(TrainerCallback):
    """Once `ask` was called in any process, ends training in all of them after the same step, with a checkpoint.

    Ends it without a checkpoint if the loss is not finite.

    Attributes:
        asked: this process was asked to end.
        agreed: all processes know that one was asked.
        stepped: training has begun.
    """

    def __init__(self):
        self.asked = self.agreed = self.stepped = False

    def ask(self, signal_number: int) -> None:
        self.asked = True

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.asked
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.agreed = bool(asked)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):  # a mean over the processes, so all of them see it
            raise Stop(
                f"the loss is not finite at step {state.global_step}: training diverged. Use a lower --learning_rate; "
                f"earlier checkpoints are in {args.output_dir}"
            )


class Estimate(TrainerCallback):
    """Prints once, after a minute of training, how long the rest will take: for those who see no progress bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first, self.printed = time.monotonic(), state.global_step, not state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        seconds, done = time.monotonic() - self.began, state.global_step - self.first
        if self.printed or seconds < ESTIMATE_AFTER:
            return
        self.printed = True
        rest = (state.max_steps - state.global_step) * seconds / done
        tqdm.write(f"training: step {state.global_step} of {state.max_steps}, {seconds / done:.2f} s a step: about "
                   f"{duration(rest)} to go", file=sys.stdout)  # fmt: skip
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """`seconds` in a unit that makes it a short number."""
    units = ("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1)
    unit, size = next((u for u in units if seconds >= 2 * u[1]), units[-1])
    return f"{seconds / size:.0f} {unit}"


class Progress(ProgressCallback):
    """One bar with the loss beside it; on a terminal it moves twice a second, elsewhere every ten seconds."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.mininterval = 0.5 if sys.stderr.isatty() else 10
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            names = {"loss": "loss", "eval_loss": "held-out", "residual": "λ"}
            shown = [f"{name} {logs[key]:.3f}" for key, name in names.items() if key in logs]
            if shown:  # the very last entry has none of these
                self.training_bar.set_postfix_str(", ".join(shown), refresh=False)
