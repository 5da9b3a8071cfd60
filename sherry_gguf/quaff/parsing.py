"""The fine-tuning command's arguments as dataclasses."""

import dataclasses
from collections.abc import Sequence

from sherry_gguf.training import parsing
from sherry_gguf.training.parsing import recipe

from .arguments import HELP, RECIPE, FinetuneArguments


@dataclasses.dataclass
class Arguments(parsing.Arguments):
    """TrainingArguments with the published recipe's defaults."""

    learning_rate: float = recipe("learning_rate", RECIPE)
    lr_scheduler_type: str = recipe("lr_scheduler_type", RECIPE)
    warmup_ratio: float = recipe("warmup_ratio", RECIPE)
    max_grad_norm: float = recipe("max_grad_norm", RECIPE)

    def __post_init__(self):
        super().__post_init__()
        self.label_names = ["labels"]  # the Trainer does not find them in a model of peft
        self.remove_unused_columns = False
        if self.gradient_checkpointing_kwargs is None:  # reentrant checkpoints and DistributedDataParallel exclude each other
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}


def parse(argv: Sequence[str], prog: str) -> tuple[FinetuneArguments, Arguments]:
    """Both kinds of arguments. Wrong ones end the program with one line on stderr and status 2."""
    return parsing.parse(argv, prog, HELP, Arguments)
