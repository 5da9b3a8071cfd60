"""`sherry-gguf run` and `sherry-gguf serve`: llama.cpp's tools on a GGUF. The tool replaces this process."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from . import llama_cpp
from .errors import NotBuilt, Stop

PROMPTS = {"-p", "--prompt", "-f", "--file", "-bf", "--binary-file"}
CHAT = {"-cnv", "--conversation"}
# For a prompt. The model's own template makes it a message; -st ends after the answer. Only the answer is printed, and errors.
ANSWER = ("--jinja", "-st", "--no-display-prompt", "--log-verbosity", "1")


def run(argv: list[str], prog: str) -> int:
    """Answer a prompt with llama-completion, or chat with llama-cli. Returns 1 after a reported error, otherwise never."""
    about = (
        "Run a model. With a prompt (-p TEXT or -f FILE) the answer is printed, and nothing else: if the model has a chat template, the "
        "prompt is a message to it; otherwise, or with -no-cnv, a text that it continues. Without a prompt you chat."
    )
    first: tuple[str, ...]
    name, first = ("llama-cli", ()) if PROMPTS.isdisjoint(argv) else ("llama-completion", ANSWER)
    if not CHAT.isdisjoint(argv):
        first = tuple(flag for flag in first if flag != "-st")
    return _launch(name, first, argv, prog, about, "llama-cli's, or with a prompt llama-completion's")


def serve(argv: list[str], prog: str) -> int:
    """Serve a model with llama-server. Returns 1 after a reported error, otherwise never."""
    about = "Serve a model over HTTP with OpenAI's interface, by default at http://127.0.0.1:8080."
    return _launch("llama-server", (), argv, prog, about, "llama-server's")


def _launch(name: str, first: tuple[str, ...], argv: list[str], prog: str, about: str, whose: str) -> int:
    """Become the tool `name` on the model argv[0], with the flags `first` and those of the user, which win."""
    also = f"Further options are {whose}. List them with `{prog} MODEL --help`."
    parser = argparse.ArgumentParser(prog=prog, description=about, usage="%(prog)s MODEL [options]", epilog=also)
    parser.add_argument("model", metavar="MODEL", help="the GGUF; for a split, its first file")
    parser.parse_args(argv[:1])
    try:
        if {"-h", "--help", "--usage"}.isdisjoint(argv):
            _check(Path(argv[0]))
        _become(llama_cpp.tool(name), ["-m", *argv[:1], *first, *argv[1:]])
    except (Stop, NotBuilt, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def _check(model: Path) -> None:
    """Raises Stop or OSError if the file is not a GGUF."""
    if model.is_dir():
        raise Stop(f"{model} is a directory: make it a GGUF with `sherry-gguf convert {model}`")
    if not model.exists():
        raise Stop(f"{model} does not exist")
    with model.open("rb") as file:
        if (begins := file.read(4)) != b"GGUF":
            raise Stop(f"{model} is not a GGUF: it begins with {begins!r}")


def _become(tool: Path, arguments: list[str]) -> NoReturn:
    """Replace this process by a tool, so that its signals and its exit code are the tool's."""
    for name in "SIGPIPE", "SIGXFSZ":  # Python ignores them, and a new program inherits that
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if sys.stdout:
        sys.stdout.flush()
    os.execv(tool, [str(tool), *arguments])
