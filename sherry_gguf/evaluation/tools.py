"""llama.cpp's programs as child processes that never outlive us."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

from .. import llama_cpp

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Tool:
    """A running tool: its `process` and the last lines of its output."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.last: collections.deque[str] = collections.deque(maxlen=500)

    def lines(self) -> Iterator[str]:
        """The output, line by line, until the tool closes it."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.last.append(line.rstrip())
            yield line

    def failure(self) -> str:
        """The tool's error messages and how it ended, in one line."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            code = None
        # "0.00.123.456 E message": time, level (debug, info, warning, error)
        lines = [re.sub(r"^\d+\.\d\d\.\d{3}\.\d{3} (?=[A-Z] )", "", line) for line in list(self.last) if line]
        errors = list(dict.fromkeys(line[2:] for line in lines if line.startswith("E ")))[:2]
        other = [line for line in lines if not re.match("[DIW] ", line)]  # an abort's message, followed by a debugger's lines
        errors = errors or [line for line in other if re.search(r"GGML_|what\(\)|[Ee]rror", line)][:1] or other[-3:]
        how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{'; '.join(errors) or 'no error message'} ({how})"


@contextlib.contextmanager
def tool(name: str, *args: object) -> Iterator[Tool]:
    """Start a built tool and kill it at the end of the block. Raises NotBuilt.

    Ctrl-C reaches only us, not the tool; if we are killed, so is the tool. Environment variables that configure llama.cpp are
    removed: results must not depend on them, and an API key would lock us out.
    """

    def die_with_parent():
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    command = [str(llama_cpp.tool(name)), *map(str, args)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", env=environment, start_new_session=True,
                               preexec_fn=die_with_parent)  # fmt: skip
    try:
        yield Tool(process)
    finally:
        process.kill()  # a server that is starting ignores SIGTERM, and no tool has anything to save
        process.wait()
        assert process.stdout
        process.stdout.close()
