"""Compare Hugging Face checkpoints and GGUFs on lm-eval's tasks or on a text.

By default: the five tasks of the Sherry paper, zero-shot, and the mean of their
accuracies. PyTorch runs a directory through lm-eval's own class; the built
llama.cpp runs a GGUF and gets the same tokens, which is checked first.
With --output, the same command continues a run that was interrupted.

Exit code: 0 if everything was measured, 1 if anything could not be, 2 for wrong
arguments, 128 plus the signal's number when interrupted.
"""

import argparse
import os
from pathlib import Path

from .. import evaluation
from ..programs import Help, positive, run_with_torch

PAPER = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")


def main(argv: list[str] | None = None, prog: str = "evaluate.py") -> int:
    """Run `sherry-gguf evaluate`, also known as scripts/evaluate.py; returns the exit code.

    argv: the arguments; None: those of the process. prog: the command's name in help and messages.
    """

    def load():
        from . import measure

        return measure.run

    evaluation.prog = prog
    return run_with_torch(prog, load, parse(argv, prog))


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    """The arguments. Exits with code 2 if they are wrong, as argparse does."""
    parser = argparse.ArgumentParser(prog=prog, usage="%(prog)s [options] MODEL ...", description=__doc__, formatter_class=Help)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face directories and GGUFs; each is compared with the first")
    parser.add_argument("--output", type=Path, metavar="FILE", help="""write all results as JSON, updated after each task; results in it
        with the same files and arguments are not measured again, and all others are kept""")  # fmt: skip
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", type=_names, help=f"lm-eval tasks, separated by commas (default: {','.join(PAPER)})")
    add("--data", type=Path, metavar="DIR", help="read the five tasks' data from DIR (see examples/tasks/README.md), download nothing")
    add("--include-path", type=Path, metavar="DIR", help="""lm-eval YAML files that override its own tasks; relative data_files are
        looked up in --data, else in the current directory""")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="use only the first N documents of each task")
    add("--num-fewshot", type=int, default=0, metavar="N", help="examples before each question (0)")
    add("--batch-size", type=positive, default=4, metavar="N", help="""requests at a time in PyTorch, and in llama-server, which
        generates a GGUF's text (4)""")  # fmt: skip
    add("--max-length", type=positive, default=2048, metavar="N", help="""longest input in tokens, at most the model's training length
        (2048)""")  # fmt: skip
    add = parser.add_argument_group("text").add_argument
    add("--text", type=Path, metavar="FILE", help="""measure the loss on this text as llama-perplexity does; run only tasks that --tasks
        names""")  # fmt: skip
    add("--context", type=positive, default=256, metavar="N", help="tokens in a chunk of the text (256; llama-perplexity has 512)")
    add("--chunks", type=positive, metavar="N", help="use only the first N chunks of the text")
    add = parser.add_argument_group("machine").add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--threads", type=positive, default=cores, metavar="N", help=f"CPU threads ({cores})")
    add("--device", help="where PyTorch runs a directory: cpu, cuda, cuda:1, ... (cuda if available)")
    add("--dtype", choices=["float32", "float16", "bfloat16", "auto"], default="float32",
        help="PyTorch's dtype for a directory; auto: the checkpoint's (float32)")  # fmt: skip
    a = parser.parse_args(argv)
    if a.num_fewshot < 0:
        parser.error("argument --num-fewshot: it cannot be negative")
    if a.context < 4:
        parser.error("argument --context: use at least 4 tokens; the second half is scored")
    if a.tasks is None:
        a.tasks = [] if a.text else list(PAPER)
    return a


def _names(text: str) -> list[str]:
    names = [t.strip() for t in text.split(",") if t.strip()]
    if not names:
        raise argparse.ArgumentTypeError("name at least one task")
    return list(dict.fromkeys(names))
