"""Compare Hugging Face checkpoints and GGUFs on lm-eval's tasks and on text.

command     the entry point and its arguments; imports PyTorch and lm-eval only after they have been checked
measure     one run: every model on every task and the text, and the JSON report
tasks       lm-eval's tasks, from the hub, the cache or local files
text        the loss on a text, by llama-perplexity's protocol
tokens      whether the models split the inputs alike, before anything is measured
models      lm-eval's view of a model: PyTorch runs a checkpoint, llama.cpp a GGUF
scoring     log-probabilities of a GGUF, from a process of its own (`llama_scorer`)
tools       llama.cpp's programs as child processes; llama-server's HTTP interface
resume      what an earlier run has measured
comparison  differences between models, doubts about them, and the final table
"""

import sys

from tqdm import tqdm

prog = "evaluate.py"  # the command's name in messages, which `command.main` sets


def say(text: str) -> None:
    """Print a line to stderr without breaking a progress bar."""
    tqdm.write(f"{prog}: {text}", file=sys.stderr)


def first_line(e: BaseException) -> str:
    """The first line of a foreign exception's message, or its type's name."""
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__
