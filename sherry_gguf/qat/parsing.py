"""The training command's arguments as dataclasses: its own flags and those of transformers' TrainingArguments."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_xla_available

from .arguments import RECIPE, SherryArguments, help_text


def recipe(name: str):
    default, help = RECIPE[name]
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with the published recipe's defaults."""

    learning_rate: float = recipe("learning_rate")
    lr_scheduler_type: str = recipe("lr_scheduler_type")
    warmup_ratio: float = recipe("warmup_ratio")
    logging_steps: float = recipe("logging_steps")
    save_total_limit: int = recipe("save_total_limit")
    logging_nan_inf_filter: bool = recipe("logging_nan_inf_filter")

    def __post_init__(self):
        if self.use_cpu and self.fsdp and self.fsdp_config is None:  # every process makes the same model; CPUs cannot sync it
            self.fsdp_config = {"sync_module_states": False}
        if self.report_to is None:  # transformers' default is every installed one, and some ask for an account
            self.report_to = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
        cpu = self.use_cpu or self.no_cuda
        if (self.bf16 or self.bf16_full_eval) and not cpu and not torch.accelerator.is_available() and not is_torch_xla_available():
            # transformers says only that the set-up does not support it
            raise ValueError("--bf16 true: PyTorch finds no GPU here; leave it out, or add --use_cpu true to compute in bfloat16 "
                             "on the CPU, which is faster than float32 only if the CPU has instructions for it")  # fmt: skip
        super().__post_init__()

    @property
    def directory(self) -> Path:
        """--output_dir."""
        return Path(str(self.output_dir))


class Parser(HfArgumentParser):
    """Our flags and the Trainer's. An error is one line, with exit status 2."""

    def __init__(self, prog: str):
        super().__init__((SherryArguments, Arguments), prog=prog)  # type: ignore[arg-type]
        self.add_argument("--help-all", action=HelpAll, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)

    def add_argument(self, *names, **kwargs):
        if "parse" in kwargs:  # HfArgumentParser takes the type from the annotation
            kwargs["type"] = kwargs.pop("parse")
        return super().add_argument(*names, **kwargs)

    def format_help(self) -> str:
        return help_text(self.prog)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


class HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        trainer = HfArgumentParser(Arguments, add_help=False, usage=argparse.SUPPRESS)
        print(f"{parser.format_help()}\nall flags of transformers' TrainingArguments:\n{trainer.format_help()}", end="")
        parser.exit()


def parse(argv: list[str], prog: str) -> tuple[SherryArguments, Arguments]:
    """Both kinds of arguments. Wrong ones end the program with one line on stderr and status 2."""
    parser = Parser(prog)
    try:
        s, args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except Exception as e:  # TrainingArguments raises many kinds
        plain = isinstance(e, (ValueError, ImportError, RuntimeError))
        parser.error(str(e) if plain else f"{type(e).__name__}: {e}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return s, args
