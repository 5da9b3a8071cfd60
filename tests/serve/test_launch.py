"""`sherry-gguf run` and `serve`: which tool they become, with which flags; what they refuse."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from conftest import ENV

from sherry_gguf import llama_cpp
from sherry_gguf.evaluation import tools

TOOLS = "llama-cli", "llama-completion", "llama-server"
# A tool that says what it is, its process, its arguments, and whether the end of a pipe's reader ends it.
FAKE = """#!/bin/sh
echo "${0##*/}" $$ "$@"
grep SigIgn /proc/self/status
exit 7
"""


def start(*args, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "sherry_gguf", *map(str, args)]
    return subprocess.Popen(
        command, text=True, errors="replace", **({"env": ENV, "stdin": subprocess.DEVNULL, "stdout": -1, "stderr": -1} | kwargs)
    )


@pytest.fixture
def fakes(tmp_path):
    """A build of such tools, and a file that looks like a model."""
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        (tmp_path / "bin" / name).write_text(FAKE)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "a model.gguf").write_bytes(b"GGUF...")
    return tmp_path


@pytest.mark.parametrize(
    "verb, flags, tool",
    [
        ("run", [], "llama-cli"),
        ("run", ["-sys", "a b", "--temp", "0"], "llama-cli"),
        *(("run", [flag, "x"], "llama-completion") for flag in ("-p", "--prompt", "-f", "--file", "-bf", "--binary-file")),
        ("serve", ["--port", "0"], "llama-server"),
    ],
)
def test_the_tool_replaces_the_command(fakes, verb, flags, tool):
    model = fakes / "a model.gguf"
    process = start(verb, model, *flags, env=ENV | {"SHERRY_BUILD_DIR": str(fakes)}, restore_signals=False)
    said, errors = process.communicate()
    assert not errors, errors
    first, ignored = said.splitlines()
    added = "--jinja -st --no-display-prompt --log-verbosity 1 " * (tool == "llama-completion")
    assert first == f"{tool} {process.pid} -m {model} {added}{' '.join(flags)}".rstrip()
    assert process.returncode == 7
    assert not int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1


def test_what_is_refused(fakes):
    for args, says, code in (
        ([], "the following arguments are required: MODEL", 2),
        (["-p", "x"], "the following arguments are required: MODEL", 2),
        ([fakes / "none.gguf"], f"error: {fakes / 'none.gguf'} does not exist\n", 1),
        ([fakes], f"error: {fakes} is a directory: make it a GGUF with `sherry-gguf convert {fakes}`\n", 1),
        ([__file__], f'error: {__file__} is not a GGUF: it begins with b\'"""`\'\n', 1),
        ([fakes / "a model.gguf"], f"error: {fakes / 'none/bin/llama-server'} is not there: ", 1),
    ):
        process = start("serve", *args, env=ENV | {"SHERRY_BUILD_DIR": str(fakes / "none")})
        said, errors = process.communicate()
        assert process.returncode == code and not said and says in errors, errors


@pytest.mark.parametrize("verb, flag", [("run", "--show-timings"), ("serve", "--metrics")])
def test_the_tools_help(verb, flag):
    said, _ = start(verb, "model.gguf", "--help").communicate()
    assert flag in said


def test_the_exit_code_is_the_tools(tiny):
    process = start("run", tiny, "--no-such-flag")
    said, errors = process.communicate()
    assert process.returncode == 1 and "invalid argument: --no-such-flag" in said + errors


def test_a_prompt_gives_a_text_whole(tiny):
    """The tool prints from a thread, and waits for it: unpatched, half of these runs lose the end."""
    with tools.serve(tiny, 1, 128, 1) as server:
        wanted = server.ask("POST", "/completion", prompt="def read", n_predict=24, temperature=0)["content"]
    for _ in range(8):
        process = start("run", tiny, "-p", "def read", "-n", 24, "--temp", 0, "-c", 128, "-t", 1)
        said, errors = process.communicate()
        assert (process.returncode, said, errors) == (0, wanted + "\n\n", "")


def test_a_signal_is_the_servers(tiny):
    """Ctrl-C stops llama-server in order: its exit code is 0."""
    process = start("serve", tiny, "--port", 0, "-c", 128, "-t", 1, stderr=subprocess.STDOUT)
    try:
        port = next(m[1] for line in process.stdout if (m := re.search(r"listening on http://127.0.0.1:(\d+)", line)))
        assert os.readlink(f"/proc/{process.pid}/exe") == str(llama_cpp.tool("llama-server").resolve())
        # an answer, since a signal before its loop begins would be forgotten
        body = json.dumps({"prompt": "a", "n_predict": 1}).encode()
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/completion", body).status == 200
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
    finally:
        process.kill()
