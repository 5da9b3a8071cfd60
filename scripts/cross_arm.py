"""What the scripts that compile for 64-bit ARM Linux share."""

from __future__ import annotations

import shutil
import subprocess

PREFIX = "aarch64-linux-gnu-"
PACKAGES = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user"
COMPILERS = PREFIX + "gcc", PREFIX + "g++"
EMULATOR = "qemu-aarch64"


class Stop(Exception):
    """What a person can mend; the message says how."""


def missing(*programs: str) -> str:
    """Why nothing can be built here, or which of these programs is absent and how to get it, or ""."""
    absent = [program for program in programs or (*COMPILERS, EMULATOR) if not shutil.which(program)]
    return f"{', '.join(absent)} not there: apt-get install {PACKAGES}" if absent else ""


def call(*command: object, **kwargs) -> str:
    """A command's output; its last lines in a Stop if it fails."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs)
    if done.returncode:
        raise Stop(f"{command[0]} failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))
    return done.stdout
