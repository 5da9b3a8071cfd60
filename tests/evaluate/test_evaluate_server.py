"""llama-server and other tools: they end with us, and their failures are reported."""

import os
import subprocess

import pytest
from evaluation_support import state

from sherry_gguf.errors import Stop
from sherry_gguf.evaluation.models import in_slots
from sherry_gguf.evaluation.tools import Tool, serve

pytest_plugins = "evaluation_fixtures"


def test_the_server_is_gone_after_its_block(models):
    with serve(models["spm"][2], 1, 64, 1) as server:
        process = server.tool.process
        assert process.poll() is None and server.ask("POST", "/tokenize", content="a")["tokens"]
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    assert process.returncode is not None and state(process.pid) is None
    with pytest.raises(RuntimeError), serve(models["spm"][2], 1, 64, 1) as server:
        raise RuntimeError
    assert state(server.tool.process.pid) is None


def test_a_closed_connection_is_reopened(models):
    with serve(models["spm"][2], 1, 64, 1) as server:
        before = server.ask("POST", "/tokenize", content="a b c")
        server._http[None].sock.shutdown(2)
        assert server.ask("POST", "/tokenize", content="a b c") == before


def test_a_dead_server_is_reported(models):
    with serve(models["spm"][2], 2, 64, 1) as server:
        server.tool.process.kill()
        with pytest.raises(Stop, match=r"llama-server does not answer \(\w+\): .*\(signal 9\)"):
            in_slots(server, 5, lambda slot, i: server.ask("POST", "/completion", prompt=[1, 2], id_slot=slot), "", quiet=True)


@pytest.mark.parametrize(
    "printed, words",
    [
        ("0.00.001.234 I fine\n0.00.001.235 E one\n0.00.001.236 E one\n0.00.002.000 E two\n9.00.002.001 E 3", "one; two"),  # fmt: skip
        ("0.00.001.234 I fine\nf.cpp:1: GGML_ASSERT(x) failed\n#1 0x123\n#2 0x456", "f.cpp:1: GGML_ASSERT(x) failed"),
        ("0.00.001.234 I fine\nf: cannot open shared object file", "f: cannot open shared object file"),
        ("0.00.001.234 I fine", "no error message"),
    ],
)
def test_a_tools_error_message(printed, words):
    with subprocess.Popen(["sh", "-c", f"printf '{printed}\n'; exit 3"], stdout=subprocess.PIPE, text=True) as process:
        t = Tool(process)
        assert len(list(t.lines())) == printed.count("\n") + 1
    assert t.failure() == f"{words} (exit code 3)"


def test_a_refused_request_is_reported(models):
    with serve(models["spm"][2], 1, 64, 1) as server:
        with pytest.raises(Stop, match="llama-server refuses a request: .*exceed"):
            server.ask("POST", "/completion", prompt=[5] * 300, n_predict=1)
        assert server.ask("POST", "/completion", prompt=[5] * 3, n_predict=1)["tokens_predicted"] == 1  # it still works
