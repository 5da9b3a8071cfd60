"""Runs of the built tools."""

import re
import subprocess

from sherry_gguf import llama_cpp


def run(name, *args, **kwargs):
    """(exit code, stdout and stderr) of a tool without input."""
    result = llama_cpp.run(name, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, errors="replace", timeout=600, **kwargs)  # fmt: skip
    return result.returncode, result.stdout


def run_for(pattern, name, *args, **kwargs):
    """A tool's output and the match of `pattern` in it. llama.cpp logs from a thread and doesn't always wait for it at the end: a run
    whose output is cut short is repeated."""
    for _ in range(8):
        code, text = run(name, *args, **kwargs)
        assert code == 0, text
        if match := re.search(pattern, text):
            return text, match
    raise AssertionError(f"{pattern} is not in the output of {name}:\n{text}")
