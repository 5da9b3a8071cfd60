"""What the scripts that compile for 64-bit ARM Linux share."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import sherry_gguf  # noqa: F401
except ImportError:
    script = Path(sys.argv[0]).name
    sys.exit(f"{script}: the Python environment is not set up: run scripts/setup.sh, then .venv/bin/python scripts/{script}")

PREFIX = "aarch64-linux-gnu-"
PACKAGES = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user"
COMPILERS = PREFIX + "gcc", PREFIX + "g++"
EMULATOR = "qemu-aarch64"


class Stop(Exception):
    """What a person can mend; the message says how."""


def missing(*programs: str) -> str:
    """Which of these programs, or of all that the scripts for ARM need, is absent and how to get it; or why they can't run here; or ""."""
    absent = [program for program in programs or (*COMPILERS, EMULATOR) if not shutil.which(program)]
    if absent:
        return f"{', '.join(absent)} not there: apt-get install {PACKAGES}"
    system = platform.freedesktop_os_release()
    return "" if programs or system["ID"] == "debian" else f"Debian's packages for ARM are wanted, and this is {system['NAME']}"


def call(*command: object) -> str:
    """A command's output; its last lines in a Stop if it fails."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                          env=os.environ | {"LC_ALL": "C", "LANGUAGE": "C"})  # fmt: skip
    if done.returncode:
        raise Stop(f"{command[0]} failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))
    return done.stdout
