"""train_sherry.py's --help: our flags first, within 80 columns, at once; and what is written twice agrees."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import train_sherry

from sherry_gguf.qat import arguments, parsing
from sherry_gguf.qat.arenas import DECAYS
from sherry_gguf.qat.linear import AUTO, QuantConfig
from sherry_gguf.qat.quantizer import GRANULARITIES, METHODS
from sherry_gguf.training import flags

SCRIPTS = Path(train_sherry.__file__).parent


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"COLUMNS": "200"} | kwargs)  # fmt: skip


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, tmp_path):
    for name in "torch", "transformers", "numpy":  # importing them takes seconds
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    done = run(SCRIPTS / "train_sherry.py", "--context", "64", flag, PYTHONPATH=os.pathsep.join([str(tmp_path), str(SCRIPTS.parent)]))
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 120 and max(map(len, lines)) <= 80
    listed = re.findall(r"^  (?:-h, )?--(\w+)", done.stdout, re.M)
    ours = [f.name for f in dataclasses.fields(arguments.SherryArguments)]
    assert listed[: len(ours)] == ours and {"output_dir", "max_steps", "learning_rate"} <= set(listed[len(ours) :])
    assert "adam_beta1" not in done.stdout
    words = " ".join(done.stdout.split())
    assert "tokens of a training sequence (default: 1024)" in words and "highest learning rate (default: 0.0001)" in words
    examples = [line for line in lines if line.startswith("  train_sherry.py ")]
    assert len(examples) == 3 and all("--output_dir" in line for line in examples)


def test_help_all(capsys):
    with pytest.raises(SystemExit) as e:
        train_sherry.main(["--help-all"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("usage: train_sherry.py --model")
    for field in dataclasses.fields(parsing.Arguments):
        assert not field.init or f"--{field.name}" in out


def test_choices_and_defaults_are_those_in_use():
    ours = {f.name: f for f in dataclasses.fields(arguments.SherryArguments)}
    assert ours["method"].metadata["choices"] == list(METHODS)
    assert ours["granularity"].metadata["choices"] == list(GRANULARITIES)
    assert ours["arenas_decay"].metadata["choices"] == list(DECAYS)
    assert ours["group_size"].default == AUTO == QuantConfig().group_size
    theirs = {f.name: f for f in dataclasses.fields(parsing.Arguments)}
    for name, (default, _) in arguments.RECIPE.items():
        assert theirs[name].default == default
    for name, _, default, help in flags.COMMON:
        if name not in arguments.RECIPE and name != "output_dir":  # TrainingArguments sets it when it is made
            assert help and str(theirs[name].default) == default, name
    assert parsing.parse(["--use_cpu", "true"], "train")[1].output_dir == {c[0]: c[2] for c in flags.COMMON}["output_dir"]


def test_pytorch_is_loaded_with_threads_that_wait_without_spinning(tmp_path):
    """OpenMP reads the variable when PyTorch is loaded; set later, a step takes many times as long beside other work."""
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ.get('OMP_WAIT_POLICY'))\nraise SystemExit")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SCRIPTS.parent)]), "OMP_WAIT_POLICY": ""}
    done = subprocess.run([sys.executable, SCRIPTS / "train_sherry.py"], capture_output=True, text=True, timeout=300,
                          env={k: v for k, v in (os.environ | env).items() if v})  # fmt: skip
    assert done.stdout == "PASSIVE\n", done.stderr


def test_threads_of_the_demo_wait_without_spinning():
    """The same for the demo, whose other imports load PyTorch first, as OpenMP reports it."""
    env = {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])}
    env |= {"OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    done = subprocess.run([sys.executable, "-c", "import make_demo_checkpoint"], capture_output=True, text=True, timeout=300,
                          env={k: v for k, v in (os.environ | env).items() if v})  # fmt: skip
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert done.returncode == 0 and spins and set(spins) == {"0"}


@pytest.mark.parametrize("command", [[SCRIPTS / "train_sherry.py"], ["-m", "sherry_gguf.cli", "train"]])
def test_interrupted_while_it_imports(command, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SCRIPTS.parent)])}
    process = subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.endswith(": interrupted; run the same command again to resume\n")
    assert errors.count("\n") == 1
