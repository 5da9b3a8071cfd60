"""Shared by the tests: the commands, and a zoo of small models that are converted once, by us and by upstream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_models

TESTS = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}

# Upstream's own script on each directory of argv, unchanged but that it takes any BPE tokenizer for GPT-2's.
UPSTREAM = """
import runpy, sys
from sherry_gguf import llama_cpp
source = llama_cpp.source_dir()
sys.path[:0] = [str(source / "gguf-py"), str(source)]
import conversion
conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for directory in sys.argv[1:]:
    sys.argv = ["convert_hf_to_gguf.py", directory, "--outtype", "f32", "--outfile", directory + ".f32.gguf"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
"""

# Our command on each list of arguments, in one process, since the imports take longer than the conversions.
OURS = """
import json, sys
from sherry_gguf.cli import main
for arguments in json.loads(sys.argv[1]):
    print("exit code", main(arguments), flush=True)
"""


def python(script: str, *args) -> subprocess.Popen:
    """Start Python code in a process of its own: conversion needs llama.cpp's gguf, the tests read with the published."""
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], env=ENV, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def sherry(*args, **kwargs) -> subprocess.CompletedProcess:
    """Run the `sherry-gguf` command."""
    return subprocess.run([sys.executable, "-m", "sherry_gguf.cli", *map(str, args)], env=ENV, capture_output=True,
                          text=True, **kwargs)


def start_all(commands: list[list]) -> subprocess.Popen:
    return python(OURS, json.dumps([[str(a) for a in c] for c in commands]))


def finish_all(process: subprocess.Popen, commands: list[list]) -> list[tuple[int, str]]:
    """(exit code, output) of each of the commands that `start_all` started."""
    output, _ = process.communicate()
    results, text = [], ""
    for line in output.splitlines(keepends=True):
        if line.startswith("exit code "):
            results.append((int(line.split()[2]), text))
            text = ""
        else:
            text += line
    assert len(results) == len(commands), output
    return results


def sherry_all(commands: list[list]) -> list[tuple[int, str]]:
    """Run several `sherry-gguf` commands one after the other in one process: (exit code, output) of each."""
    return finish_all(start_all(commands), commands)


def pre(name: str) -> list[str]:
    """The flag that the tokenizer of a model of the zoo needs."""
    return ["--tokenizer-pre", "gpt-2"] if small_models.MODELS[name][1] == "bpe" else []


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A directory with, for each model of small_models, NAME/, NAME.f32.gguf by upstream and NAME.gguf by us.

    Returns it and our commands' (exit code, output) by name.
    """
    root = tmp_path_factory.mktemp("zoo")
    for name in small_models.MODELS:
        small_models.make(root / name, name)
    upstream = python(UPSTREAM, *(root / name for name in small_models.MODELS))
    commands = [["convert", root / name, "--outfile", root / f"{name}.gguf", *pre(name)] for name in small_models.MODELS]
    results = finish_all(start_all(commands), commands)
    output, _ = upstream.communicate()
    assert upstream.returncode == 0, output
    return root, dict(zip(small_models.MODELS, results))
