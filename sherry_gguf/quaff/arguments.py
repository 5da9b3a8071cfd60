"""The fine-tuning command's own flags and the text of its --help, without PyTorch and transformers, which take seconds to import."""

import argparse
import dataclasses
import re

from sherry_gguf.training import flags
from sherry_gguf.training.flags import Help, flag

DESCRIPTION = """\
Fine-tune an adapter on a frozen quantized model (Quaff). The model is a Hugging
Face directory, or a GGUF in TQ1_25, whose weights stay packed in memory.

A row to train on is a chat (`messages`), a `prompt` and its `completion`, or
text. Chats and prompts train the answers only.

All flags of transformers' TrainingArguments work too, and so do torchrun and
accelerate launch. Ctrl-C saves a checkpoint; run the same command again to
resume from the last checkpoint in --output_dir. The result, an adapter
directory of PEFT, goes to --export and is evaluated there as saved.
`sherry-gguf convert-adapter` makes it a GGUF for llama.cpp.

  {prog} --model DIR --train a.jsonl --output_dir run
  {prog} --model m-TQ1_25.gguf --train a.jsonl --output_dir run
  torchrun --nproc_per_node 2 -m sherry_gguf finetune --model DIR ...
"""
# In --help a group begins with the field named here.
GROUPS = {
    "model": "model and text",
    "method": "the frozen model",
    "channels": "outlier channels",
    "adapter": "adapter",
    "export": "result",
}
# The published recipe where transformers' defaults differ from it: TrainingArguments' field, default, help.
RECIPE = flags.RECIPE | {
    "learning_rate": (2e-4, "highest learning rate"),
    "lr_scheduler_type": ("constant", "how the learning rate falls"),
    "warmup_ratio": (0.0, "share of the steps during which it rises"),
    "max_grad_norm": (0.3, "norm above which gradients are clipped"),
}


def share_by_name(text: str) -> str:
    """REGEX=SHARE, checked. Raises ArgumentTypeError."""
    try:
        ((pattern, share),) = budgets_of([text]).items()
        re.compile(pattern)
        if not pattern or not 0 <= share <= 1:
            raise ValueError
    except (ValueError, re.error):
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=SHARE, such as down_proj=0.05, with a share from 0 to 1") from None
    return text


def budgets_of(texts: list[str]) -> dict[str, float]:
    """--budgets as `calibrate` takes them. Raises ValueError."""
    return {pattern: float(share) for pattern, _, share in (text.rpartition("=") for text in texts)}


@dataclasses.dataclass
class FinetuneArguments:
    """The command's own flags; `help` of each field says what it does."""

    model: str = flag("model: a Hugging Face directory or name, or a GGUF in TQ1_25", "", metavar="DIR_OR_GGUF")
    tokenizer: str = flag("tokenizer, if it is not the model's", "", metavar="DIR")
    chat_template: str = flag("file with a chat template, if it is not the tokenizer's", "", metavar="FILE")
    train: list[str] = flag("""rows to train on: .json, .jsonl, .parquet (one a row), text files (one document each), also .gz, .xz,
        .bz2, or directories""", [], metavar="PATH")  # fmt: skip
    validation: list[str] = flag("held-out rows, given the same way; default: a share of the rows to train on", [], metavar="PATH")
    dataset: str = flag("instead of --train: name of a data set for datasets.load_dataset", "", metavar="NAME")
    dataset_config: str = flag("configuration of the data set", "", metavar="NAME")
    text_column: str = flag("column that holds the text, in rows without messages and prompt", "text", metavar="NAME")
    loss_on: str = flag("tokens of chats and prompts to train: only answers, or all", "answers", choices=["answers", "all"])
    validation_share: float = flag("share of the rows to hold out without --validation", 0.05, metavar="SHARE")
    context: int = flag("most tokens of a sequence; longer chats and prompts are cut at their end, texts into pieces", 1024, metavar="N")
    eval_tokens: int = flag("evaluate at most this many held-out tokens", 1 << 15, metavar="N")
    # test_finetune_arguments.py compares these choices with what sherry_gguf.quaff knows
    method: str = flag("how to quantize activations; all but quaff are for comparison", "quaff",
                       choices=["quaff", "naive", "static", "dynamic", "mixed", "full", "bf16"])  # fmt: skip
    base: str = flag("how weights are stored; auto: tq1_25 for a GGUF and for a model trained with Sherry, int8 otherwise", "auto",
                     choices=["auto", "int8", "tq1_25"])  # fmt: skip
    granularity: str = flag("int8: weights that share a scale", "channel", choices=["channel", "tensor"])
    keep: str = flag("regular expression: layers to keep as they are, besides head and routers", "", metavar="REGEX")
    gamma: float = flag("share of the old factors in each step", 0.1, metavar="γ")
    channels: str = flag("file of outlier channels, instead of calibration", "", metavar="FILE")
    calibration_rows: int = flag("rows to find outlier channels with", 512, metavar="N")
    threshold: float = flag("an activation is an outlier above this many times the mean", 20.0, metavar="X")
    budget: float = flag("a layer's outlier channels, at most: a share of its inputs", 0.05, metavar="SHARE")
    budgets: list[str] = flag("other shares for layers with such names", [], metavar="REGEX=SHARE", parse=share_by_name)
    adapter: str = flag("what trains", "lora", choices=["lora", "ia3", "prompt", "p-tuning"])
    rank: int = flag("LoRA: rank", 16, metavar="R")
    alpha: int = flag("LoRA: α; the adapter's output is multiplied by α / R", 16, metavar="α")
    dropout: float = flag("LoRA: dropout of its inputs", 0.1, metavar="SHARE")
    target: str = flag("regular expression: layers with an adapter; default: all (LoRA), those that PEFT knows (IA3)", "", metavar="REGEX")
    virtual_tokens: int = flag("prompt tuning and p-tuning: length of the prompt that trains", 20, metavar="N")
    export: str = flag("directory for the result (default: adapter in --output_dir)", "", metavar="DIR")


HELP = Help(FinetuneArguments, GROUPS, DESCRIPTION, "--model MODEL --train PATH --output_dir DIR [flags]", RECIPE, "adapter")
