"""The training command's arguments as dataclasses."""

import dataclasses
from collections.abc import Sequence

from sherry_gguf.training import parsing
from sherry_gguf.training.parsing import recipe

from .arguments import HELP, RECIPE, SherryArguments


@dataclasses.dataclass
class Arguments(parsing.Arguments):
    """TrainingArguments with the published recipe's defaults."""

    learning_rate: float = recipe("learning_rate", RECIPE)
    lr_scheduler_type: str = recipe("lr_scheduler_type", RECIPE)
    warmup_ratio: float = recipe("warmup_ratio", RECIPE)


def parse(argv: Sequence[str], prog: str) -> tuple[SherryArguments, Arguments]:
    """Both kinds of arguments. Wrong ones end the program with one line on stderr and status 2."""
    return parsing.parse(argv, prog, HELP, Arguments)
