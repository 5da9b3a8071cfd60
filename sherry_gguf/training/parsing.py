"""A training command's arguments as dataclasses: its own flags and those of transformers' TrainingArguments."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_xla_available

from .flags import RECIPE, Help


def recipe(name: str, of: Mapping[str, tuple] = RECIPE):
    """A field of TrainingArguments whose default and help are those in a recipe."""
    default, help = of[name]
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with defaults that suit every training command."""

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
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"  # PyTorch would warn

    @property
    def directory(self) -> Path:
        """--output_dir."""
        return Path(str(self.output_dir))


class Parser(HfArgumentParser):
    """A command's flags and the Trainer's. An error is one line, with exit status 2."""

    def __init__(self, prog: str, help: Help, arguments: type[Arguments]):
        self.help = help
        super().__init__((help.ours, arguments), prog=prog)  # type: ignore[arg-type]
        self.add_argument("--help-all", action=HelpAll, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, arguments=arguments)

    def add_argument(self, *names, **kwargs):
        if "parse" in kwargs:  # HfArgumentParser takes the type from the annotation
            kwargs["type"] = kwargs.pop("parse")
        return super().add_argument(*names, **kwargs)

    def format_help(self) -> str:
        return self.help.text(str(self.prog))

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


class HelpAll(argparse.Action):
    def __init__(self, *args, arguments: type[Arguments], **kwargs):
        super().__init__(*args, **kwargs)
        self.arguments = arguments

    def __call__(self, parser, *_):
        trainer = HfArgumentParser(self.arguments, add_help=False, usage=argparse.SUPPRESS)  # type: ignore[arg-type]
        print(f"{parser.format_help()}\nall flags of transformers' TrainingArguments:\n{trainer.format_help()}", end="")
        parser.exit()


def parse(argv: Sequence[str], prog: str, help: Help, arguments: type[Arguments]) -> tuple[Any, Any]:
    """Both kinds of arguments, of the types help.ours and `arguments`. Wrong ones end the program with one line and status 2."""
    parser = Parser(prog, help, arguments)
    try:
        s, args, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    except Exception as e:  # TrainingArguments raises many kinds
        plain = isinstance(e, (ValueError, ImportError, RuntimeError))
        parser.error(str(e) if plain else f"{type(e).__name__}: {e}")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return s, args
