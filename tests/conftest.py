"""Shared by the tests: the commands, and a zoo of small models that are converted once, by us and by upstream."""

import atexit
import fcntl
import functools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import small_models

from sherry_gguf import llama_cpp

# Several tests at once: threads that wait give way to those of others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

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

# The `sherry-gguf` command again and again in one process, since the imports take longer than most conversions, and in another those
# that do not import llama.cpp's gguf but the published one; with a patch, Python code to run before it, in a fork. A fork must not meet
# threads that were left behind, so there are none.
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
def _server(llama_cpps_gguf: bool) -> tuple[subprocess.Popen, list[str]]:
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
    process, outputs = _server(args[0] in ("convert", "verify"))
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
    results = {name: sherry("convert", root / name, "--outfile", root / f"{name}.gguf", *pre(name)) for name in small_models.MODELS}
    output, _ = upstream.communicate()
    assert upstream.returncode == 0, output
    return root, results


# ---- the demo model ----


def upstream_f32(directory, outfile, *flags):
    """Upstream's own script, in the environment that it takes its gguf package from."""
    script = llama_cpp.source_dir() / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, directory, "--outtype", "f32", "--outfile", outfile, *map(str, flags)], check=True,
                   capture_output=True)  # fmt: skip


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's checkpoint after a quarter of its training, made if it isn't there: (directory, upstream's F32 GGUF, our GGUF)."""
    hf, root = llama_cpp.root() / "tests" / "demo" / "hf", tmp_path_factory.mktemp("demo")
    hf.parent.mkdir(parents=True, exist_ok=True)
    with open(hf.parent / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the script would not wait for that of another worker
        script = TESTS.parent / "scripts" / "make_demo_checkpoint.py"
        subprocess.run([sys.executable, script, "--out", hf, "--steps", "400"], check=True)
    (root / "hf").symlink_to(hf)
    upstream_f32(root / "hf", root / "f32.gguf")
    result = sherry("convert", root / "hf", "--outfile", root / "demo.gguf", "--require-exact")
    assert result.returncode == 0, result.stderr
    return hf, root / "f32.gguf", root / "demo.gguf"


def greedy(model, *args, prompt="def read(self):", count=16, command=None, **kwargs):
    """How llama-cli, or `command` that runs it, goes on with a prompt: the demo's chat template adds nothing to it.
    It is used since it waits for its output."""
    command = command or [llama_cpp.tool("llama-cli")]
    done = subprocess.run([*command, "-m", model, "-p", prompt, "-n", str(count), "--temp", "0", "-st", "-t", "2", "-c", "256",
                           "--simple-io", "--log-verbosity", "1", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600, **kwargs)  # fmt: skip
    answer = re.search(re.escape(f"> {prompt}\n") + r"(.*\S)\s*\[ Prompt: ", done.stdout, re.S)
    assert done.returncode == 0 and answer, done.stdout
    return answer[1]


# ---- builds to take away ----

# Longer than what codes are used for, so that its product goes by panels where there are some.
LONG = (
    "class Reader:\n    def __init__(self, file, size, encoding, errors):\n        self.file = file\n        self.size = size\n        self"
)
LEAST = {"MUL_MAT": 40, "MUL_MAT_ID": 60, "GET_ROWS": 5, "CPY": 10}  # upstream's cases with one of our types, at least


def portable(arch, directory):
    """Unpack the archive that scripts/build/portable.py makes for tests in `directory`; return where its files are."""
    script = TESTS.parent / "scripts" / "build" / "portable.py"
    done = subprocess.run([sys.executable, script, arch, "--tested"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    archive = Path(re.search(r"packed (.*\.tar\.gz), \d+ MB", done.stdout)[1])
    with tarfile.open(archive) as tar:
        tar.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return directory / archive.name.removesuffix(".tar.gz")


def only(files, module, directory):
    """`directory` with links to the files of such a build, and of the libraries for kinds of CPUs this one alone."""
    directory.mkdir()
    for file in files.iterdir():
        if file.name == module or not file.name.startswith("libggml-cpu-"):
            os.link(file, directory / file.name)
    return directory


def shared_symbols(files, prefix=""):
    """What the libraries for kinds of CPUs have one of for all that are loaded: an inline function's static, through which the code of a
    better CPU may be met. Stripped libraries still name it."""
    modules = sorted(files.glob("libggml-cpu-*"))
    symbols = subprocess.run([f"{prefix}nm", "-DC", *modules], capture_output=True, text=True, check=True).stdout
    assert symbols.count(" ggml_backend_score\n") == len(modules) > 1
    return re.findall(r"^\S+ u (?!(?:guard variable for )?std::)(.*)$", symbols, re.M)


def loaded(text):
    """The library for a kind of CPUs that a tool says it has loaded."""
    return re.findall(r"loaded CPU backend from .*/(libggml-cpu-\S+\.so)", text)


def backend_ops(command, kinds=("tq1_25", "stq1_0"), **kwargs):
    """Run test-backend-ops on our types; return its output. It starts once for each: building the list of all cases takes longest."""
    output = ""
    for kind in kinds:
        done = subprocess.run([*command, "test", "-b", "CPU", "-o", ",".join(LEAST), "-p", kind], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs)  # fmt: skip
        passed = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
        assert done.returncode == 0 and passed and passed[1] == passed[2], done.stdout[-3000:]
        for op, count in LEAST.items():
            assert len(re.findall(rf"^ *{op}\(.*OK", done.stdout, re.M)) >= count, (op, done.stdout[-3000:])
        output += done.stdout
    return output
