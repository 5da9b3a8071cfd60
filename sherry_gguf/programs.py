"""Helpers for the programs in scripts/: --help that fits the terminal, run a command, end with a message."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from . import signals
from .errors import Stop

REPO = Path(__file__).resolve().parents[1]


class Help(argparse.HelpFormatter):
    """Wraps the paragraphs of a description, and keeps those that hold a list: an indented line, or columns two blanks apart."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = re.split(r"\n\n+", text.strip())
        return "\n\n".join(p if re.search(r"^ |\S  ", p, re.M) else super(Help, self)._fill_text(p, width, indent) for p in paragraphs)


class HelpWithDefaults(Help, argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default that says something; a path in the repository is shown relative to it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default not in (None, "", []) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if said else action.help

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).replace(f"{REPO}{os.sep}", "")


def positive(text: str) -> int:
    """An argument's type for argparse: 1 or more."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


positive.__name__ = "positive number"  # argparse: "invalid positive number value"


def call(*command: object, **kwargs) -> str:
    """Run a command and return its output, stdout and stderr together; `kwargs` go to `subprocess.run`.

    Raises Stop with the last lines of the output if the command fails.
    """
    kwargs.setdefault("env", os.environ | {"LC_ALL": "C", "LANGUAGE": "C"})
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs)
    if done.returncode:
        raise Stop(f"{command[0]} failed:\n{last_lines(done.stdout)}")
    return done.stdout


def last_lines(text: str) -> str:
    """The end of a program's output, where its errors are."""
    return "\n".join(text.splitlines()[-25:])


def compiler_cache(env: Mapping[str, str]) -> list[str]:
    """CMake's arguments for ccache or sccache, if one is on the PATH of `env`."""
    found = next(filter(None, (shutil.which(name, path=env["PATH"]) for name in ("ccache", "sccache"))), "")
    return [f"-DCMAKE_{language}_COMPILER_LAUNCHER={found}" for language in ("C", "CXX") if found]


def run(main: Callable[[], int | None], hint: str = "") -> NoReturn:
    """Run a program's `main` and exit with its code.

    Stop, OSError, ValueError and a failed subprocess become a message and exit code 1; signal n one with `hint` and 128 + n.
    """
    name = Path(sys.argv[0]).name
    try:
        with signals.raised():
            code = main()
        sys.exit(code)
    except (Stop, OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")
    except signals.Interrupted as ending:
        print(f"{name}: interrupted{hint}", file=sys.stderr)
        sys.exit(ending.exit_code)


def run_with_torch(prog: str, load: Callable[[], Callable[[argparse.Namespace], int]], a: argparse.Namespace, hint: str = "") -> int:
    """Run a command that needs PyTorch; returns its exit code: 1 for Stop, OSError and MemoryError, 128 + n after signal n, with `hint`.

    load: imports what the command needs, and returns what runs it.
    """
    interrupted = f"{prog}: interrupted{hint}"
    with signals.exit_at_once(interrupted):  # the imports take seconds
        # PyTorch's threads wait for each other by spinning, which slows down everything beside them. Read when PyTorch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when a process is started
        command = load()
    try:
        with signals.raised():
            return command(a)
    except (Stop, OSError, MemoryError) as e:  # OSError includes NotBuilt
        print(f"{prog}: {e or type(e).__name__}", file=sys.stderr)
        return 1
    except signals.Interrupted as e:
        print(interrupted, file=sys.stderr, flush=True)
        return e.exit_code
