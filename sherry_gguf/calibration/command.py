"""Calibrate a trained model: make its weights 3:4 sparse ternary without
training it anew.

One transformer layer after the other is trained to give the full-precision
layer's outputs on your text, from the inputs that the quantized layers before
it give, or with --inputs full, the full-precision ones. With --steps, the whole
model then learns the full-precision model's probabilities; without, the result
is much worse. The result is a Hugging Face directory that converts without
loss:

  sherry-gguf calibrate MODEL --text books/ --output calibrated --steps 1000
  sherry-gguf convert calibrated --require-exact

One layer at a time is in float32, and with --steps the whole model is. Hidden
states are on the disk, in --work. After Ctrl-C or a crash, run the same command
again. It repeats at most the layer, the batch of generated text, the pass of
the full-precision model or the 50 steps that it was in.
"""

import argparse
from pathlib import Path

from ..programs import Help, positive, run_with_torch


def main(argv: list[str] | None = None, prog: str = "sherry-gguf calibrate") -> int:
    """Run `sherry-gguf calibrate`; returns the exit code: 1 for a problem the user can fix, 2 for wrong arguments, 128 + n after signal n.

    argv: the arguments; None: those of the process. prog: the command's name in help and messages.
    """

    def load():
        from .run import run

        return run

    return run_with_torch(prog, load, parse(argv, prog), "; run the same command again to continue")


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """The arguments. Exits with code 2 if they are wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=Help,
                                     usage="%(prog)s MODEL --text PATH ... --output DIR [options]")  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or name of a trained model")
    add = parser.add_argument_group("text").add_argument
    add("--text", nargs="+", default=[], metavar="PATH", help="""text to calibrate on: files (one document each; .json,
        .jsonl, .parquet: one per row; also .gz, .xz, .bz2) or directories""")  # fmt: skip
    add("--text-column", default="text", metavar="NAME", help="column that holds the text in tables (text)")
    add("--tokenizer", default="", metavar="DIR", help="tokenizer, if it is not the model's")
    add("--generated", type=_share, default=0.0, metavar="SHARE", help="""share of the sequences that the model writes itself, using
        only characters that occur in --text; 1 needs no --text (0)""")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="""beginnings for what the model writes, one a line (\\n for a line break): each
        sequence takes one at random""")  # fmt: skip
    add("--tokens", type=positive, default=1 << 18, metavar="N", help="""tokens to train the layers on, generated ones included;
        --steps reads more text (262144)""")  # fmt: skip
    add("--context", type=positive, default=512, metavar="N", help="tokens of a sequence (512)")
    add = parser.add_argument_group("layers").add_argument
    add("--passes", type=_number, default=2.0, metavar="N", help="passes over the text for each layer; 0: only --start (2)")
    add("--batch", type=positive, default=4, metavar="N", help="sequences in a training step of a layer (4)")
    add("--rate", type=_number, default=0.02, metavar="X", help="""highest learning rate, as a fraction of each matrix's
        mean magnitude (0.02)""")  # fmt: skip
    add("--inputs", choices=["quantized", "full"], default="quantized", help="""inputs to train a layer on: what the quantized
        layers before it give, or the full-precision ones (quantized)""")  # fmt: skip
    add("--start", choices=["feedback", "rounding"], default="feedback", help="""weights to start training from: quantized with error
        feedback (GPTQ), or the model's own (feedback)""")  # fmt: skip
    add("--group-size", choices=["auto", "64", "128"], default="auto", help="""weights that share a scale; auto: 128 where that divides
        a row, 64 elsewhere (auto)""")  # fmt: skip
    add("--keep", default="", metavar="REGEX", help="matrices to keep in full precision, besides the head and routers")
    add = parser.add_argument_group("distillation").add_argument
    add("--steps", type=_count, default=0, metavar="N", help="steps of distillation, of the whole model; 0: none (0)")
    add("--train", choices=["scales", "weights"], default="scales", help="""what the distillation trains: norms and scales, or all
        weights of the layers too, at 16 bytes of memory each (scales)""")  # fmt: skip
    add("--distill-batch", type=positive, default=1, metavar="N", help="sequences in a step of the distillation (1)")
    add("--distill-rate", type=_number, default=0.01, metavar="X", help="highest learning rate of the distillation, as --rate (0.01)")
    add = parser.add_argument_group("result and machine").add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="directory for the result; must be new or empty")
    add("--work", type=Path, metavar="DIR", help="directory for what a later run continues (--output with .work)")
    add("--device", default="", help="cpu, cuda, ... (cuda if available)")
    add("--bf16", choices=["auto", "true", "false"], default="auto", help="multiply in bfloat16; auto: where it is faster (auto)")
    add("--seed", type=_count, default=0, metavar="N", help="seed of the order of the sequences (0)")
    a = parser.parse_args(argv)
    if not a.text and a.generated < 1:
        parser.error("the following arguments are required: --text (or --generated 1)")
    if a.prompts and not a.generated:
        parser.error("argument --prompts: it needs --generated")
    if a.context < 8:
        parser.error("argument --context: use at least 8 tokens")
    if a.tokens < 2 * a.context:
        parser.error(f"argument --tokens: two sequences are {2 * a.context} tokens; one of them is held out")
    a.work = a.work or (out := a.output.absolute()).with_name(out.name + ".work")
    return a


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


def _number(text: str) -> float:
    if not 0 <= (value := float(text)) < 1e6:
        raise ValueError
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError
    return value


_share.__name__ = "share from 0 to 1"
_count.__name__ = _number.__name__ = "number"  # argparse: "invalid number value"
