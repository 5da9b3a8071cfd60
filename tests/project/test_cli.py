"""The command line's verbs and their help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV

from sherry_gguf import cli

SCRIPT = Path(__file__).parents[2] / "scripts/convert_hf_to_sherry_gguf.py"


def run(*args, columns=80, program=("-m", "sherry_gguf.cli")):
    command = [sys.executable, *program, *args]
    return subprocess.run(command, env=ENV | {"COLUMNS": str(columns)}, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_fits_the_terminal_and_begins_with_the_purpose(verb):
    for columns in 80, 120:
        done = run(*[verb] * bool(verb), "--help", columns=columns)
        assert done.returncode == 0 and not done.stderr, done.stderr
        usage, purpose = done.stdout.split("\n\n")[:2]
        assert usage.startswith(f"usage: sherry-gguf {verb}".rstrip()) and re.match(r"[A-Z][a-z]+\b(?! arguments:)", purpose), done.stdout
        assert max(map(len, done.stdout.splitlines())) <= columns


def test_every_verb_is_listed():
    listed = re.findall(r"^  (\w+)  +(\w.*)$", run("--help").stdout.partition("verbs, ")[2], re.M)
    assert listed == [(verb, does) for verb, (_, does) in cli.VERBS.items()]
    for wrong in (), ("nothing",), ("--verbose", "inspect"):
        done = run(*wrong)
        assert done.returncode == 2 and "usage: sherry-gguf VERB" in done.stderr


def test_the_list_of_verbs_imports_no_verb():
    code = "import sys\nfrom sherry_gguf import cli\ntry: cli.main(['--help'])\nfinally: print(*sys.modules)"
    loaded = set(run(program=("-c", code)).stdout.split())
    assert "sherry_gguf.cli" in loaded and not loaded & {"torch", "transformers", "gguf", "numpy", "sherry_gguf.convert", "sherry_gguf.qat"}


def test_the_script_of_llama_cpps_name():
    done = run("--help", program=(SCRIPT,))
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {SCRIPT.name} [options] MODEL_DIR\n")
    assert done.stdout.partition("\n")[2] == run("convert", "--help").stdout.partition("\n")[2]
    assert os.access(SCRIPT, os.X_OK)
