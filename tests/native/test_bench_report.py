"""The tables and pictures of scripts/bench: figures, notes, and which rows they show."""

import model_files
import model_report
import pytest
from conftest import squeezed


def made_up_report():
    def entry(label, kind, rates, run="", threads=1):
        test = f"{kind}64"
        return {"model": "m", "type": label, "kind": kind, "threads": threads, "test": test, "common": test,
                "run": run or test, "rates": rates}  # fmt: skip

    size = 50_000_000
    file = {"bytes": size, "bytes_per_token": size, "bits_per_weight": 1.5, "stored": {}, "kept_rows": []}
    speed = [entry("TQ1_25", "tg", [100.0, 220.0, 90.0]), entry("TQ2_0", "tg", [50.0, 100.0, 60.0]),
             entry("Q2_0", "tg", [10.0, 11.0], run="tg16"), entry("F16", "tg", []),
             entry("TQ1_25", "pp", [500.0]), entry("TQ2_0", "pp", [250.0]),
             entry("Q2_0", "pp", []), entry("F16", "pp", [])]  # fmt: skip
    model = {
        "name": "M",
        "parameters": 1e9,
        "layers": 1,
        "hidden": 2,
        "ffn": 3,
        "heads": 4,
        "head_dim": 5,
        "kv_heads": 6,
    }
    memory = {"seconds": 1.0, "anon": 10.0, "file": 20.0, "peak": 30.0}
    rounds = [{"load": memory | {"seconds": s}, "token": memory} for s in (3.0, 1.0, 2.0)]
    return {"cpu": "c", "date": "d", "isa": None, "llama_cpp": "l", "rounds": 3, "complete": True, "vocab": 32000, "embeddings": "Q4_0",
            "bandwidth": {"1": [9.0, 10.0, 20.0]},
            "models": {"m": model | {"types": dict.fromkeys(("TQ1_25", "TQ2_0", "Q2_0", "F16"), file)}},
            "speed": speed, "load": [{"model": "m", "type": "TQ1_25", "rounds": rounds}]}  # fmt: skip


def test_medians_ratios_and_shares():
    report = made_up_report()
    model_report.summarize(report)
    ours, peer, short, none, *_ = report["speed"]
    assert ours["median"] == 100 and ours["ours_ratio"] == 1
    assert peer["median"] == 60 and peer["ours_ratio"] == 2  # of 2, 2.2 and 1.5; of the medians it would be 1.67
    assert short["ours_ratio"] == 15  # of 10 and 20, the rounds that both have
    assert none["median"] is None and none["ours_ratio"] is None
    assert report["bandwidth_median"] == {"1": 10} and report["bandwidth_maximum"] == {"1": 20}
    assert ours["gb_per_s"] == 5 and ours["of_limit"] == 0.5 and ours["limit"] == 200
    assert report["load"][0]["load_seconds"] == 2 and report["load"][0]["token_anon"] == 10
    text = squeezed(model_report.markdown(report))
    assert "| type | bits/weight | MiB | tg64 t/s | TQ1_25 × | GB/s | of limit | pp64 t/s | TQ1_25 × |" in text
    assert "| TQ2_0 | 1.500 | 47.7 | 60.0 | 2.00 | 3.00 | 30 % | 250 | 2.00 |" in text
    assert "| Q2_0 | 1.500 | 47.7 | 10.5 [1] | 15.00 | 0.53 | 5 % |" in text and "[1] tg16, to save time" in text
    assert "| TQ1_25 | 2.00 | 10.0 | 20.0 | 30.0 | 1.00 | 10.0 | 20.0 |" in text
    assert "@ d" not in text


def test_without_ours_nothing_is_compared_with_it():
    report = made_up_report()
    report["speed"] = [e for e in report["speed"] if e["type"] != "TQ1_25"]
    model_report.summarize(report)
    text = squeezed(model_report.markdown(report))
    assert "TQ1_25 ×" not in text and "| TQ2_0 | 1.500 | 47.7 | 60.0 | 3.00 | 30 % | 250 |" in text


def test_the_chart_shows_types_of_this_build_only(tmp_path):
    chart = pytest.importorskip("chart")
    labels = ["TQ1_25", "TQ1_25-plain", "TQ1_25-before", "Q4_0", "Q4_0-before", "TQ1_25+F16", "Q4_0+Q6_K-plain"]
    speed = [{"type": label, "kind": kind, "depth": 0, "rates": [9.0]} for label in labels for kind in ("pp", "tg")]
    types = {model_files.base(label): {"bits_per_weight": 1.375} for label in labels}
    report = {"cpu": "c", "models": {"m": {"name": "M", "types": types}}, "speed": speed}
    assert set(chart.rates(report, "tg")) == {"TQ1_25", "Q4_0"}
    chart.draw(report, tmp_path / "chart.svg")
    assert "F16" not in (tmp_path / "chart.svg").read_text()


def test_bars(tmp_path):
    pytest.importorskip("matplotlib")
    report = made_up_report()
    model_report.summarize(report)
    model_report.draw(report, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
