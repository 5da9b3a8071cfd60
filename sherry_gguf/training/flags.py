"""Flags of a training command and the text of its --help, without PyTorch and transformers, which take seconds to import."""

import argparse
import dataclasses
from collections.abc import Mapping

WIDTH = 80  # columns of --help
# Where transformers' defaults differ from ours, in every training command: TrainingArguments' field, default, help.
RECIPE = {
    "logging_steps": (10, "steps between two log entries"),
    "save_total_limit": (2, "number of checkpoints to keep"),
    "logging_nan_inf_filter": (False, "log 0 instead of a loss that is not finite"),
}
# Flags of transformers that --help shows too: name, as in --help, default in words, help ("" as in the command's recipe).
COMMON = (
    ("output_dir", "DIR", "trainer_output", "directory for checkpoints, training.png and, in {result}, the result"),
    ("max_steps", "N", "-1", "optimizer steps; -1 goes by epochs"),
    ("num_train_epochs", "N", "3.0", "how often to read the text, without --max_steps"),
    ("per_device_train_batch_size", "N", "8", "sequences per batch and device"),
    ("gradient_accumulation_steps", "N", "1", "batches per optimizer step"),
    ("gradient_checkpointing", "true", "False", "compute activations twice to save memory"),
    ("learning_rate", "RATE", "", ""),
    ("lr_scheduler_type", "NAME", "", ""),
    ("warmup_ratio", "SHARE", "", ""),
    ("weight_decay", "X", "0.0", "AdamW's weight decay"),
    ("bf16", "true", "False", "multiply in bfloat16; weights stay float32"),
    ("use_cpu", "true", "False", "train on the CPU even if there is a GPU"),
    ("save_steps", "N", "500", "steps between two checkpoints"),
    ("save_total_limit", "N", "", ""),
    ("logging_steps", "N", "", ""),
    ("seed", "N", "42", "seed of all random numbers"),
)


def flag(help: str, default=None, **metadata):
    """A dataclass field that is a flag. metadata: of argparse's add_argument; `parse` is its type."""
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**factory, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True)
class Help:
    """What --help of a training command shows.

    Attributes:
        ours: the dataclass of the command's own flags.
        groups: name of the field with which a group begins to the group's title.
        description: with {prog}.
        usage: arguments, after the program's name.
        recipe: defaults that differ from transformers': field to default and help.
        result: the directory of the result in --output_dir.
    """

    ours: type
    groups: Mapping[str, str]
    description: str
    usage: str
    recipe: Mapping[str, tuple]
    result: str

    def text(self, prog: str) -> str:
        """The text, at most `WIDTH` columns wide: our flags in groups, then those of transformers that most runs need."""
        parser = argparse.ArgumentParser(
            prog=prog, add_help=False, allow_abbrev=False, description=self.description.format(prog=prog), usage=f"%(prog)s {self.usage}",
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=WIDTH))  # fmt: skip

        def add(group, name: str, help: str, default: str, **kwargs) -> None:
            text = help + f" (default: {default})" * bool(default)
            group.add_argument(f"--{name}", help=text.replace("%", "%%"), **kwargs)

        group = None
        for field in dataclasses.fields(self.ours):
            group = parser.add_argument_group(self.groups[field.name]) if field.name in self.groups else group
            default = "" if field.default is dataclasses.MISSING else str(field.default)
            kwargs = {k: v for k, v in field.metadata.items() if k not in ("help", "parse")}
            add(group, field.name, field.metadata["help"], default, **kwargs,
                nargs="+" if field.default is dataclasses.MISSING else None)  # fmt: skip
        group = parser.add_argument_group("training, by transformers; --help-all lists the rest of its flags")
        for name, metavar, default, help in COMMON:
            value, recipe_help = self.recipe.get(name, (default, help.format(result=self.result)))
            add(group, name, recipe_help, str(value), metavar=metavar)
        group = parser.add_argument_group("help")
        group.add_argument("-h", "--help", action="store_true", help="print this and exit")
        group.add_argument("--help-all", action="store_true", help="print all flags of transformers' TrainingArguments and exit")
        return parser.format_help()
