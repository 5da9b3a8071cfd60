"""`sherry-gguf demo`: text from a small Sherry model that comes with the package."""

import argparse
import hashlib
import os
from pathlib import Path

from . import launch
from .errors import ConvertError

MODEL = Path(__file__).parent / "data" / "demo-TQ1_25.gguf"  # made by scripts/make_demo_model.py, with its .md and .sha256
PROMPT = "It was late in the evening when the old man opened the door, and"
CONTEXT = 256  # tokens that the model was trained on at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options]"
    parser.description = (
        "Continue a story with a small Sherry model that comes with the package. It has read 157 old novels and tales, knows nothing and "
        "answers nothing: give it a beginning."
    )
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", default=PROMPT, help="the beginning of the story (default: %(default)s)")
    add("-n", "--tokens", metavar="N", type=int, default=200, help="how many tokens to add (default: %(default)s)")
    add("--temp", metavar="T", type=float, default=0.7, help="temperature: 0 always takes the likeliest token (default: %(default)s)")
    add("--seed", metavar="N", type=int, default=-1, help="seed of the random choices (default: another one each time)")
    add("-i", "--interactive", action="store_true", help="write a story in turns, in llama-cli; Ctrl-C ends it")
    add("--path", action="store_true", help="print where the model is, for other programs, and exit")


def run(args: argparse.Namespace) -> int:
    """Check the model and become llama.cpp's tool. Raises ConvertError if the model is missing or damaged."""
    check()
    # OpenMP's threads must not spin while they wait: with so small a model, beside other busy programs, that takes over 100 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.path:
        print(MODEL)
        return 0
    flags = ["-c", CONTEXT, "-n", args.tokens, "--temp", args.temp, "--repeat-penalty", 1.1, "--seed", args.seed, "--context-shift"]
    if args.interactive:
        flags += ["--simple-io"]
    else:
        print(args.prompt, end="", flush=True)
        flags += ["-no-cnv", "-p", args.prompt]
    return launch.run([str(MODEL), *map(str, flags)], "sherry-gguf demo")


def check() -> None:
    """Raises ConvertError unless the model is there and is what was packed."""
    if not MODEL.exists():
        raise ConvertError(f"{MODEL} is not there. Install the package again")
    try:
        wanted = MODEL.with_suffix(".sha256").read_text(encoding="utf-8").split()[0]
        found = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    except (OSError, IndexError) as e:
        raise ConvertError(f"{MODEL} cannot be read ({e}). Install the package again") from e
    if found != wanted:
        raise ConvertError(f"{MODEL} is damaged: its SHA-256 is {found}, not {wanted}. Install the package again")
