"""The study of post-training quantization."""

import json

import compare_ptq as compare
import pytest

pytestmark = pytest.mark.slow


def test_table_of_a_small_model(tmp_path, monkeypatch, capfd):
    runs = ("Q8_0", "TQ2_0", "TQ1_25, mixed", "TQ1_25, --pure", "TQ1_25, no matrix")
    monkeypatch.setattr(compare, "RUNS", {label: compare.RUNS[label] for label in runs})
    small = "--layers 2 --hidden 256 --intermediate 256 --vocab 512 --context 64 --steps 40 --corpus-bytes 400000".split()
    arguments = ["--work", tmp_path / "w", "--out", tmp_path / "t", "--calibration", 20000, "--context", 64, "--chunks", 4, "--", *small]
    assert compare.main([str(x) for x in arguments]) == 0, capfd.readouterr()
    table = (tmp_path / "t.md").read_text()
    rows = {row["label"]: row for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert list(rows) == ["BF16", *runs] and all(f"| {label} |" in table for label in rows)
    assert (
        rows["TQ1_25, --pure"]["types"] == rows["TQ1_25, no matrix"]["types"] == {"TQ1_25": 14} and rows["TQ1_25, --pure"]["bits"] == 1.375
    )
    assert rows["TQ1_25, mixed"]["types"] == {"TQ1_25": 11, "Q2_K": 3} and rows["TQ2_0"]["bits"] == 2.0625
    assert abs(rows["Q8_0"]["nats"] / rows["BF16"]["nats"] - 1) < 0.01 < rows["TQ1_25, --pure"]["nats"] - rows["BF16"]["nats"]
    assert rows["TQ1_25, --pure"]["nats"] != rows["TQ1_25, no matrix"]["nats"]


def test_failures_are_reported(tmp_path, capsys):
    (tmp_path / "w").write_text("a file")
    assert compare.main(["--work", str(tmp_path / "w")]) == 1
    assert "compare_ptq: " in capsys.readouterr().err
