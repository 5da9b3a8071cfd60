"""The command line's verbs and their help."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV

import sherry_gguf
from sherry_gguf import cli

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "scripts/convert_hf_to_sherry_gguf.py"
SCRIPTS = sorted(p for p in (REPO / "scripts").rglob("*.py") if "__main__" in p.read_text("utf-8"))


def run(*args, columns=80, program=("-m", "sherry_gguf")):
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_of_a_script_fits_the_terminal(script):
    done = run("--help", program=(script,))
    assert done.returncode == 0 and not done.stderr, done.stderr
    usage, purpose = done.stdout.split("\n\n")[:2]
    assert usage.startswith(f"usage: {script.name}") and re.match(r"[A-Z][a-z]+\b", purpose)
    assert max(map(len, done.stdout.splitlines())) <= 80 and str(REPO) not in done.stdout, done.stdout
    bare = [line for line in re.findall(r"^  (?:-|\w+$).*(?:\n {8,}.*)*", done.stdout, re.M) if not re.search(r"  +\S", line[2:])]
    assert not bare, bare  # every argument has a text
    assert not re.search(r"[A-Z0-9_]{2}\n +[A-Z0-9_]*,", done.stdout), done.stdout  # no list of types breaks in a name


def test_every_verb_is_listed():
    listed = re.findall(r"^  ([\w-]+)  +(\w.*)$", run("--help").stdout.partition("verbs, ")[2], re.M)
    assert listed == [(verb, does) for verb, (_, does) in cli.VERBS.items()]
    for wrong in ("nothing",), ("--verbose", "inspect"):
        done = run(*wrong)
        assert done.returncode == 2 and "usage: sherry-gguf VERB" in done.stderr
    bare = run()
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", run("--help").stdout)


def test_the_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"sherry-gguf {sherry_gguf.__version__}\n", "")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_metavars_are_capitals_and_verbose_promises_what_there_is(verb):
    text = run(verb, "--help").stdout
    usage, _, arguments = text.partition("\n\n")
    assert not re.search(r"\[-h\]| [a-z]+$", usage), usage
    assert not re.search(r"^  [a-z]+ ", arguments.partition("positional arguments:")[2].partition("\n\n")[0], re.M), text
    assert ("llama.cpp's log" in text) == (verb in ("convert", "pack", "verify"))


def test_messages_name_the_command(tmp_path):
    missing = str(tmp_path / "missing")
    for args, prefix in ((["inspect", missing], "error: "), (["bench", missing], "error: "),
                         (["evaluate", missing], "sherry-gguf evaluate: "),
                         (["train", "--model", missing, "--train", missing, "--output_dir", missing], "sherry-gguf train: ")):  # fmt: skip
        done = run(*args)
        assert done.returncode == 1 and done.stderr.startswith(prefix) and missing in done.stderr, done.stderr
    assert "one of the arguments OUTPUT --in-place is required" in run("retag", missing).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_script_that_a_signal_ends(number):
    code = f"import os\nfrom sherry_gguf.programs import run\nrun(lambda: os.kill(os.getpid(), {number}), '; go on')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip  # ignored in a shell's background jobs
    assert (done.returncode, done.stderr) == (128 + number, "-c: interrupted; go on\n")


def test_the_list_of_verbs_imports_no_verb():
    code = "import sys\nfrom sherry_gguf import cli\ntry: cli.main(['--help'])\nfinally: print(*sys.modules)"
    loaded = set(run(program=("-c", code)).stdout.splitlines()[-1].split())  # without the help, which has a verb "gguf"
    assert "sherry_gguf.cli" in loaded and not loaded & {"torch", "transformers", "gguf", "numpy", "sherry_gguf.convert", "sherry_gguf.qat"}


def test_the_script_of_llama_cpps_name():
    done = run("--help", program=(SCRIPT,))
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {SCRIPT.name} [options] MODEL_DIR\n")
    assert done.stdout.partition("\n")[2] == run("convert", "--help").stdout.partition("\n")[2]
    assert os.access(SCRIPT, os.X_OK)


def test_a_package_that_is_missing_is_named(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from sherry_gguf.cli import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", code, "convert", tmp_path], env=ENV, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr
    assert "the Python package torch is not installed: run scripts/setup.sh, or pip install torch" in done.stderr, done.stderr
