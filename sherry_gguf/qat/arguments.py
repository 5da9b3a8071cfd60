"""The training command's own flags and the text of its --help, without PyTorch and transformers, which take seconds to import."""

import argparse
import dataclasses

from sherry_gguf.training import flags
from sherry_gguf.training.flags import Help, flag

DESCRIPTION = """\
Train a causal language model with 3:4 sparse ternary weights (Sherry) and
export it as a Hugging Face directory.

All flags of transformers' TrainingArguments work too, and so do torchrun and
accelerate launch. Ctrl-C saves a checkpoint; run the same command again to
resume from the last checkpoint in --output_dir. The result goes to --export
and is evaluated there as saved. training.png shows the loss, Arenas' λ and the
effective rank.

  {prog} --model DIR --train text/ --output_dir run
  {prog} --config DIR --tokenizer DIR --train a.txt --output_dir run
  {prog} --model DIR --train a.jsonl --output_dir run --arenas_peak 1
  torchrun --nproc_per_node 8 train_sherry.py --model DIR ...
"""
# In --help a group begins with the field named here.
GROUPS = {
    "model": "model and text",
    "method": "quantization",
    "arenas_peak": "Arenas",
    "teacher": "distillation",
    "monitor_every": "monitoring and result",
}
# The published recipe where transformers' defaults differ from it: TrainingArguments' field, default, help.
RECIPE = flags.RECIPE | {
    "learning_rate": (1e-4, "highest learning rate"),
    "lr_scheduler_type": ("cosine", "how the learning rate falls"),
    "warmup_ratio": (0.05, "share of the steps during which it rises"),
}


def group_size(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


@dataclasses.dataclass
class SherryArguments:
    """The command's own flags; `help` of each field says what it does."""

    model: str = flag("model to start from: a Hugging Face directory or name", "", metavar="DIR")
    config: str = flag("config of a new model: a directory with config.json, or a name", "", metavar="DIR")
    tokenizer: str = flag("tokenizer, if it is not the model's", "", metavar="DIR")
    train: list[str] = flag("""text to train on: files (one document each; .json, .jsonl, .parquet: one per row; also .gz, .xz, .bz2) or
        directories""", [], metavar="PATH")  # fmt: skip
    validation: list[str] = flag("held-out text, given the same way; default: a share of the training documents", [],
                                 metavar="PATH")  # fmt: skip
    dataset: str = flag("instead of --train: name of a data set for datasets.load_dataset", "", metavar="NAME")
    dataset_config: str = flag("configuration of the data set", "", metavar="NAME")
    text_column: str = flag("column that holds the text in tables and data sets", "text", metavar="NAME")
    special_tokens: bool = flag("read names of special tokens in the text, such as a chat template's, as these tokens", False,
                                metavar="true")  # fmt: skip
    validation_share: float = flag("share of the documents to hold out without --validation", 0.01, metavar="SHARE")
    context: int = flag("tokens of a training sequence", 1024, metavar="N")
    eval_tokens: int = flag("evaluate at most this many held-out tokens", 1 << 17, metavar="N")
    # test_train_arguments.py compares these choices with what sherry_gguf.qat knows
    method: str = flag("how to quantize; all but sherry are for comparison", "sherry",
                       choices=["sherry", "absmean", "twn", "binary", "full"])  # fmt: skip
    granularity: str = flag("which weights share a scale", "per_group", choices=["per_group", "per_channel", "per_tensor"])
    group_size: int | str = flag("group size of per_group; auto: as the model was trained, else 128 where that divides a layer's "
                                 "inputs, and 64 elsewhere. TQ1_25 stores multiples of 128, TQ1_25_64 multiples of 64", "auto",
                                 metavar="N", parse=group_size)  # fmt: skip
    keep: str = flag("regular expression: layers to keep in full precision, besides head and routers", "", metavar="REGEX")
    only: str = flag("regular expression: quantize only these layers", "", metavar="REGEX")
    arenas_peak: float = flag("highest λ of Arenas, the residual λ·X·W; 1 as published, 0 trains without", 0.0, metavar="λ")
    arenas_warmup: float = flag("share of the steps during which λ rises", 0.1, metavar="SHARE")
    arenas_decay: str = flag("how λ falls", "cosine", choices=["cosine", "linear", "exponential"])
    arenas_end: float = flag("share of the steps after which λ is 0", 1.0, metavar="SHARE")
    arenas_rescale: bool = flag("divide each layer's product by 1 + λ", False, metavar="true")
    teacher: str = flag("model to learn from, besides the text: a directory or name, with the same vocabulary", "", metavar="DIR")
    distill: float = flag("the teacher's share in the loss", 0.5, metavar="SHARE")
    temperature: float = flag("temperature that divides the logits in that share", 1.0, metavar="T")
    monitor_every: int = flag("steps between two looks at effective rank and flips; 0 never looks", 50, metavar="N")
    export: str = flag("directory for the result (default: hf in --output_dir)", "", metavar="DIR")
    export_dtype: str = flag("dtype of the result", "float16", choices=["float16", "float32"])


HELP = Help(SherryArguments, GROUPS, DESCRIPTION, "--model DIR --train PATH ... --output_dir DIR [flags]", RECIPE, "hf")
