"""scripts/studies/measure_finetuning.py at a tiny size: every method takes its steps, and the figures are those of the weights."""

import json
import re

import measure_finetuning
import pytest

METHODS = ["--methods", "full,quaff,tq1_25-quaff", "--gradient-checkpointing"]
SIZES = ["--hidden", "256", "--intermediate", "512", "--layers", "2", "--vocab", "300", "--tokens", "8", "--rounds", "1", "--threads", "1"]


@pytest.mark.slow
def test_measures_each_method(tmp_path, capfd):
    assert measure_finetuning.main([*SIZES, *METHODS, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    full, quaff, packed = results["methods"].values()
    layers = 2 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 512)
    rest = 2 * 300 * 256 + 5 * 256
    assert full["parameters"] - full["trained"] == layers + rest
    assert (full["bytes"] // 4, full["bits"]) == (pytest.approx(layers + rest, abs=100), pytest.approx(32, abs=1e-3))
    assert 8 < quaff["bits"] < 8.5 and 1.375 < packed["bits"] < 1.4  # with scales, outlier channels and their factors
    for row in results["methods"].values():
        assert len(row["step"]) == 1 and 0 < row["forward"][0] + row["backward"][0] <= row["step"][0]
        assert row["peak"] > row["idle"] and row["building"] >= row["idle"]
    text = (tmp_path / "out.md").read_text()
    assert "1 x 8 tokens a step, with gradient checkpointing" in text and f"| {packed['bits']:.3f} |" in re.sub(" +", " ", text)
    losses = [line.split()[-1] for line in capfd.readouterr().out.splitlines() if "loss" in line]
    assert len(losses) == 6 and float(losses[0]) == pytest.approx(float(losses[2]), rel=0.01)  # the same weights in each base


def test_ratios_are_of_the_same_round():
    row = {
        "forward": [1.0],
        "backward": [1.0],
        "peak": 2e9,
        "bytes": 1e9,
        "bits": 8.0,
        "building": 1e9,
        "idle": 1e8,
        "parameters": 1,
        "trained": 1,
    }
    results = {"model": "m", "machine": "", "batch": 1, "tokens": 2, "rounds": 3, "threads": 1, "gradient_checkpointing": False,
               "methods": {"full": row | {"step": [1.0, 2.0, 4.0]}, "quaff": row | {"step": [3.0, 3.0, 4.0], "peak": 1e9}}}  # fmt: skip
    cells = [cell.strip() for cell in measure_finetuning.table(results).splitlines()[-1].split("|")]
    assert cells[4:8] == ["3.00", "1.50", "1000", "0.50"]


def test_wrong_arguments(tmp_path, capsys):
    for wrong, says in [(["--methods", "lora"], "--methods lora: choose from full"), (["--tokens", "1"], "--tokens 1: at least 2"),
                        (["--rounds", "0"], "--rounds 0: at least 1")]:  # fmt: skip
        with pytest.raises(SystemExit):
            measure_finetuning.main([*wrong, "--out", str(tmp_path / "out")])
        assert says in capsys.readouterr().err
