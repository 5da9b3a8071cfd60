"""`sherry-gguf demo`: the model is checked before llama.cpp's tool runs it."""

import hashlib
import os

import pytest
from conftest import sherry

from sherry_gguf import cli, demo, launch


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A file in the place of the model, with its checksum; gives its path, and the list of what launch.run was given."""
    started = []
    monkeypatch.setattr(demo, "MODEL", tmp_path / "m.gguf")
    monkeypatch.setattr(launch, "run", lambda argv, prog: started.append(argv) or 0)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    demo.MODEL.write_bytes(b"GGUF and so on")
    (tmp_path / "m.sha256").write_text(f"{hashlib.sha256(demo.MODEL.read_bytes()).hexdigest()}  m.gguf\n")
    return demo.MODEL, started


def test_a_prompt_is_continued(packed, capfd):
    model, started = packed
    assert cli.main(["demo", "-p", "Once", "-n", "5", "--seed", "3"]) == 0
    assert capfd.readouterr().out == "Once"  # the tool prints what follows
    [argv] = started
    assert argv[0] == str(model) and argv[-3:] == ["-no-cnv", "-p", "Once"]
    flags = dict(zip(argv[1::2], argv[2::2]))
    assert (flags["-n"], flags["--seed"], flags["-c"]) == ("5", "3", str(demo.CONTEXT))
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_stories_in_turns_and_the_path(packed, capfd):
    model, started = packed
    assert cli.main(["demo", "--interactive"]) == cli.main(["demo", "--path"]) == 0
    [argv] = started
    assert launch.PROMPTS.isdisjoint(argv)  # which makes it llama-cli
    assert capfd.readouterr().out == f"{model}\n"


@pytest.mark.parametrize("damage, says", [
    (lambda model: model.write_bytes(b"GGUF and so om"), "damaged: its SHA-256 is"),
    (lambda model: model.unlink(), "is not there. Install the package again"),
    (lambda model: model.with_suffix(".sha256").write_text(""), "Install the package again"),
])  # fmt: skip
def test_a_damaged_model_is_not_run(packed, capfd, damage, says):
    model, started = packed
    damage(model)
    assert cli.main(["demo"]) == 1
    said = capfd.readouterr()
    assert says in said.err and not said.out and not started


def test_the_model_that_comes_along_writes():
    assert demo.MODEL.stat().st_size <= 6_000_000
    card = demo.MODEL.with_suffix(".md").read_text("utf-8")
    assert "MIT" in card and "held-out loss" in card and "make_demo_model.py" in card
    done = sherry("demo", "-p", "The old man", "-n", "12", "--temp", "0", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.startswith("The old man") and len(done.stdout.split()) > 6, done.stdout + done.stderr
