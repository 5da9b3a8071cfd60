"""Arenas: the annealed residual λ·X·W beside the quantized product (Sherry, Eq. 7), scheduled by optimizer steps."""

import dataclasses
import math

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .linear import quantized_layers, set_residual

DECAYS = {  # progress of the decay, 0 to 1, to the remaining share of the peak
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "linear": lambda t: 1 - t,
    "exponential": lambda t: (math.exp(-5 * t) - math.exp(-5)) / (1 - math.exp(-5)),
}


@dataclasses.dataclass(frozen=True)
class Arenas:
    """λ as a function of training progress. Raises ValueError for settings that make no schedule.

    Attributes:
        peak: the highest λ; 0 trains without Arenas. The published value is 1.
        warmup: share of the optimizer steps during which λ rises linearly from 0 to the peak; 0 starts at the peak.
        decay: how λ then falls to 0: `cosine` (half a period), `linear`, or `exponential` (by e^5).
        end: share of the optimizer steps at which λ reaches 0.
        rescale: divide the layers' products by 1 + λ, so that their magnitude does not depend on λ. Not in the paper.
    """

    peak: float = 1.0
    warmup: float = 0.1
    decay: str = "cosine"
    end: float = 1.0
    rescale: bool = False

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(f"Arenas' decay is {self.decay!r}: it must be one of {', '.join(DECAYS)}")
        if not (self.peak >= 0 and math.isfinite(self.peak)):
            raise ValueError(f"Arenas' peak is {self.peak}: it must be 0 or greater")
        if not 0 <= self.warmup < self.end <= 1:
            raise ValueError(f"Arenas' warmup is {self.warmup} and its end {self.end}: 0 <= warmup < end <= 1 must hold")

    def at(self, step: int, steps: int) -> float:
        """λ in optimizer step `step` of `steps`, counted from 0."""
        progress = step / steps
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        if progress >= self.end:
            return 0.0
        return self.peak * DECAYS[self.decay]((progress - self.warmup) / (self.end - self.warmup))


class ArenasCallback(TrainerCallback, ExportableState):
    """Sets λ of a model that went through `prepare`, in a Hugging Face Trainer.

    It counts the Trainer's optimizer steps, so gradient accumulation and checkpointing do not move the schedule. Checkpoints hold
    the settings and λ in trainer_state.json. Training resumes at the λ of its step, and refuses other settings, including none (a
    peak of 0). After training λ is 0.
    """

    def __init__(self, arenas: Arenas | dict = Arenas()):
        self.arenas = arenas if isinstance(arenas, Arenas) else Arenas(**arenas)  # a dict comes from `state`
        self.residual = 0.0
        self.steps = 0

    def state(self) -> dict:
        return {"args": {"arenas": dataclasses.asdict(self.arenas)},
                "attributes": {"residual": self.residual, "steps": self.steps}}  # fmt: skip

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Raises ValueError if the model has no quantized layer, or if the checkpoint to resume from has other settings."""
        if not quantized_layers(model):
            raise ValueError("Arenas has nothing to act on: call prepare(model) before the Trainer is made")
        name = type(self).__name__
        if state.global_step:
            saved = state.stateful_callbacks.get(name)
            then = saved["args"]["arenas"] | {"steps": saved["attributes"]["steps"]} if saved else {"peak": 0.0}
            now = dataclasses.asdict(self.arenas) | {"steps": state.max_steps}
            if then != now and (then["peak"] or now["peak"]):
                other = ", ".join(f"{k} {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v)
                raise ValueError(f"the checkpoint was trained with other settings of Arenas ({other}): use the same ones, or start over "
                                 "from its weights")  # fmt: skip
        state.stateful_callbacks.setdefault(name, self.state())  # the Trainer saves it from there
        self.steps = state.max_steps
        self._set(model, state.global_step)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._set(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.residual = 0.0
        set_residual(model, 0.0)

    def _set(self, model, step: int) -> None:
        self.residual = self.arenas.at(step, self.steps)
        set_residual(model, self.residual, self.arenas.rescale)
