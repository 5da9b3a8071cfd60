"""Helpers for the programs in scripts/: run a command, end with a message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from .errors import Stop


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

    Stop, OSError, ValueError and a failed subprocess become a message and exit code 1; so does Ctrl-C, with `hint`.
    """
    name = Path(sys.argv[0]).name
    try:
        sys.exit(main())
    except (Stop, OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted{hint}")
