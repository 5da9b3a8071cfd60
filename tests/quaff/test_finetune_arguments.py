"""`sherry-gguf finetune --help`: our flags first, within 80 columns, at once; and what is written twice agrees."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf.cli import main
from sherry_gguf.quaff import METHODS, arguments, parsing
from sherry_gguf.quaff.channels import BUDGET, THRESHOLD
from sherry_gguf.quaff.int8 import GRANULARITIES
from sherry_gguf.quaff.scaling import GAMMA
from sherry_gguf.training import flags


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, tmp_path):
    for name in "torch", "transformers", "numpy", "peft":  # importing them takes seconds
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run([sys.executable, "-m", "sherry_gguf", "finetune", flag], capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "200", "PYTHONPATH": path})  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 150 and max(map(len, lines)) <= 80
    listed = re.findall(r"^  (?:-h, )?--(\w+)", done.stdout, re.M)
    ours = [f.name for f in dataclasses.fields(arguments.FinetuneArguments)]
    assert listed[: len(ours)] == ours and {"output_dir", "max_steps", "learning_rate"} <= set(listed[len(ours) :])
    words = " ".join(done.stdout.split())
    assert "highest learning rate (default: 0.0002)" in words and "in adapter, the result" in words


def test_help_all(capsys):
    with pytest.raises(SystemExit) as e:
        main(["finetune", "--help-all"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith("usage: sherry-gguf finetune --model")
    assert all(not field.init or f"--{field.name}" in out for field in dataclasses.fields(parsing.Arguments))


def test_choices_and_defaults_are_those_in_use():
    ours = {f.name: f for f in dataclasses.fields(arguments.FinetuneArguments)}
    assert set(ours["method"].metadata["choices"]) == set(METHODS)
    assert set(ours["granularity"].metadata["choices"]) == set(GRANULARITIES)
    assert (ours["threshold"].default, ours["budget"].default, ours["gamma"].default) == (THRESHOLD, BUDGET, GAMMA)
    theirs = {f.name: f for f in dataclasses.fields(parsing.Arguments)}
    for name, (default, _) in arguments.RECIPE.items():
        assert theirs[name].default == default
    for name, _, default, help in flags.COMMON:
        if name not in arguments.RECIPE and name != "output_dir":  # TrainingArguments sets it when it is made
            assert help and str(theirs[name].default) == default, name
