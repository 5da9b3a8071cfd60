"""What the training command shows, and how it is interrupted: callbacks and a plot."""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback

from sherry_gguf.errors import Stop

ESTIMATE_AFTER = 60  # seconds of training until a line estimates the rest


class Finished(Exception):
    """The checkpoint to resume from has all steps; the Trainer would take one more."""


class Interrupt(TrainerCallback):
    """Ends training in all processes after the same step, with a checkpoint, once `ask` was called in any of them.

    Raises Stop if the loss is not finite.
    """

    asked = False  # this process was asked to end
    agreed = False  # all processes know that one was asked
    stepped = False  # training has begun

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
            raise Stop(f"the loss is not finite at step {state.global_step}: training diverged. Use a lower --learning_rate; earlier "
                       f"checkpoints are in {args.output_dir}")  # fmt: skip


class Estimate(TrainerCallback):
    """Prints once, after a minute of training, how long the rest will take, for logs without a progress bar."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first, self.printed = time.monotonic(), state.global_step, not state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        seconds, done = time.monotonic() - self.began, state.global_step - self.first
        if self.printed or seconds < ESTIMATE_AFTER:
            return
        self.printed = True
        rest = (state.max_steps - state.global_step) * seconds / done
        pace = f"step {state.global_step} of {state.max_steps}, {seconds / done:.2f} s a step"
        tqdm.write(f"training: {pace}: about {duration(rest)} to go", file=sys.stdout)
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """`seconds` in words, in the largest unit that gives 2 or more."""
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


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram of training.png: curves by key of the log, each with its label and matplotlib's style; a second axis on the right."""

    title: str
    curves: dict[str, tuple[str, dict]]
    right: tuple[str, str, str] | None = None  # key, label, title
    log: bool = False


LOSS = {"loss": ("training loss", {}), "eval_loss": ("held-out loss", {"marker": "o", "ms": 3})}


def plot(history: list[dict], path: Path, panels: Sequence[Panel]) -> None:
    """Draw training.png from a Trainer's log: the panels above each other, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def draw(axis, key, label, **style):
        points = [(e["step"], e[key]) for e in history if key in e]
        if points:
            axis.plot(*zip(*points), label=label, lw=1.3, **style)

    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 3 * len(panels)), sharex=True, squeeze=False)
    for panel, axis in zip(panels, axes[:, 0]):
        for key, (label, style) in panel.curves.items():
            draw(axis, key, label, **style)
        axis.set_ylabel(panel.title)
        if panel.right and any(panel.right[0] in entry for entry in history):
            second = axis.twinx()
            draw(second, *panel.right[:2], color="tab:green", ls="--")
            second.set_ylabel(panel.right[2])
        if panel.log:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
