"""Shared by the tests: the commands, and a zoo of small models that are converted once, by us and by upstream."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
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

# The `sherry-gguf` command again and again in one process, since the imports take longer than most conversions; with a
# patch, Python code to run before it, in a fork. A fork must not meet threads that were left behind, so there are none.
SERVER = """
import json, os, sys, traceback
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
from sherry_gguf.cli import main
done = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    arguments, directory, outputs, patch = json.loads(line)
    if patch and (pid := os.fork()):
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=done, flush=True)
        continue
    os.chdir(directory)
    for fd, path in zip((1, 2), outputs):
        new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(new, fd)
        os.close(new)
    try:
        exec(patch or "", {})
        code = main(arguments)
    except SystemExit as e:
        code = e.code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if patch:
        os._exit(code)
    print(code, file=done, flush=True)
"""


def python(script: str, *args, **kwargs) -> subprocess.Popen:
    """Start Python code in a process of its own: conversion needs llama.cpp's gguf, the tests the published one."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        text=True,
        **({"env": ENV, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | kwargs),
    )


@functools.cache
def _server() -> tuple[subprocess.Popen, list[str]]:
    process = python(SERVER, stdin=subprocess.PIPE, stderr=None)
    directory = tempfile.TemporaryDirectory()
    atexit.register(lambda: (process.stdin.close(), process.wait(), directory.cleanup()))
    return process, [f"{directory.name}/{name}" for name in ("stdout", "stderr")]


def sherry(*args, cwd=".", patch="", **kwargs) -> subprocess.CompletedProcess:
    """Run the `sherry-gguf` command to its end, after the Python code `patch` if there is some; in a fresh process if
    there are keyword arguments for that."""
    args = [str(a) for a in args]
    if kwargs:
        return subprocess.run(
            [sys.executable, "-m", "sherry_gguf.cli", *args],
            cwd=cwd,
            capture_output=True,
            text=True,
            **({"env": ENV} | kwargs),
        )
    process, outputs = _server()
    print(json.dumps([args, os.path.abspath(cwd), outputs, patch]), file=process.stdin, flush=True)
    code = process.stdout.readline()
    stdout, stderr = (Path(p).read_text() for p in outputs)
    assert code, f"the process died: {stdout}{stderr}"
    return subprocess.CompletedProcess(args, int(code), stdout, stderr)


def pre(name: str) -> list[str]:
    """The flag that the tokenizer of a model of the zoo needs."""
    return ["--tokenizer-pre", "gpt-2"] if small_models.MODELS[name][1] == "bpe" else []


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A directory with, for each model of small_models, NAME/, NAME.f32.gguf by upstream and NAME.gguf by us.

    Returns it and our completed commands by name.
    """
    root = tmp_path_factory.mktemp("zoo")
    for name in small_models.MODELS:
        small_models.make(root / name, name)
    upstream = python(UPSTREAM, *(root / name for name in small_models.MODELS))
    results = {
        name: sherry("convert", root / name, "--outfile", root / f"{name}.gguf", *pre(name))
        for name in small_models.MODELS
    }
    output, _ = upstream.communicate()
    assert upstream.returncode == 0, output
    return root, results
