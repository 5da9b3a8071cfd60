"""scripts/studies/compare_quality.py at a tiny size: the comparison is fair, resumes after an interruption, and reports what it ran."""

import argparse
import contextlib
import json
import math
import random
import re
import shutil
import statistics
from pathlib import Path

import compare_quality
import pytest
import quality_report
import quality_runs
import study_runs
from quality_runs import Comparison, Run, arenas
from study_runs import Sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(40):
        lines = [f"def {rng.choice('abcdef')}({rng.choice('xyz')}):\n    return {rng.randrange(100)}" for _ in range(150)]
        (folder / f"m{i:02}.py").write_text("\n".join(lines))
    return folder


class Fixed(study_runs.Runs):
    """Runs whose loss is a function of the run; `need` notes the learning rates that were asked for."""

    def __init__(self, loss):
        self.loss, self.asked, self.done = loss, [], {}

    def need(self, runs):
        for run in runs:
            if run not in self:
                self.asked.append(run.lr)
                loss = self.loss(run)
                self.done[run.key()] = {"choice": loss, "report": loss, "before": 4.0, "curve": []}


@pytest.mark.parametrize(
    "best, rates",
    [
        (2.0, [1, 2, 4]),  # between two worse ones at once
        (0.5, [0.25, 0.5, 1, 2, 4]),
        (8.0, [1, 2, 4, 8, 16]),
        (1e9, [1, 2, 4, 8, 16, 32]),  # a loss that falls for ever ends the sweep too
    ],
)
def test_sweep_ends_between_two_worse_rates(best, rates):
    runs = Fixed(lambda run: (run.lr / best - 1) ** 2 if run.lr < best else (best / run.lr - 1) ** 2)
    sweep = Sweep(runs, Run("scratch", "sherry", 0.0, 0, (), 10), (1, 2, 4))
    study_runs.complete([sweep])
    assert sweep.rates == rates == sorted(runs.asked)
    assert sweep.best() == min(rates, key=lambda lr: abs(lr - best))


def test_other_seeds_decide_if_one_cannot():
    """Two rates, or two of Arenas' settings, as good as each other with seed 0."""
    ahead = dict(quality_runs.PUBLISHED, end=0.5)
    close = dict(quality_runs.PUBLISHED, peak=0.25, end=0.5)

    def loss(run):
        settings = dict(run.arenas)
        start = 3.0 if not settings else 2.9 if settings in (ahead, close) else 3.1
        off = abs(math.log2(run.lr / (8e-3 if run.steps == 8 else 32e-3)))  # the best rate moves with the length
        if run.steps == 8 and run.method == "sherry" and not settings and run.lr in (8e-3, 16e-3):
            return start + (1e-5 if (run.lr == 16e-3) != bool(run.seed) else 0)
        if settings == close:
            start += -1e-4 if run.seed else 1e-4
        return start + off

    compared = Comparison(Fixed(loss), "scratch", argparse.Namespace(steps=8, seeds=2, explored=None, lengths=None)).result()
    methods = compared["methods"]
    assert list(methods["sherry"]["sweep"]) == ["0.002", "0.004", "0.008", "0.016", "0.032"]  # a worse one beside both
    assert [x["lr"] for x in methods["sherry"]["led"]] == [8e-3, 16e-3] and methods["sherry"]["lr"] == 16e-3
    assert methods["sherry"]["losses"] == [3.0, 3.0] and not methods["sherry"]["open"]
    assert [x["arenas"] for x in methods["arenas"]["led"]] == [ahead, close] and methods["arenas"]["arenas"] == close
    assert methods["absmean"]["lr"] == 8e-3 and len(methods["absmean"]["led"]) == 1
    results = {"settings": {"scratch": compared}, "sizes": vars(compare_quality.parse(["--seeds", "2"])), "machine": "",
               "parameters": 1, "tokens": 1, "held_out": 1, "corpus": "here"}  # fmt: skip
    text = quality_report.table(results)
    assert (
        "| Sherry without Arenas | 0.008 | 3.0000 | 3.0000 |" in text and "Sherry with Arenas (end 0.5, peak 0.25) | 0.008 | 2.8999" in text
    )
    assert "| 2 | 3.0000 (0.032) | 2.8999 (0.032) | -3.34% | 3.1000 (0.032) | +3.33% |" in text
    assert "The training is too short**: full precision, which can do everything the others can, is behind (Sherry with Arenas)." in text
    compared["methods"]["full"]["losses"] = [2.5, 2.5]
    assert "too short" not in quality_report.table(results)


def test_best_rates_that_differ():
    """Each setting of Arenas is compared with none at the same rate."""

    def loss(run):
        return 3.0 + abs(math.log2(run.lr / (8e-3 if dict(run.arenas) == quality_runs.PUBLISHED else 1e-3)))

    compared = Comparison(Fixed(loss), "scratch", compare_quality.parse(["--steps", "8", "--seeds", "1"])).result()
    assert compared["explored_rates"] == [1e-3, 8e-3] and compared["without"] == pytest.approx([3, 6])


def test_fewer_settings_and_lengths_as_asked():
    a = compare_quality.parse(["--steps", "8", "--seeds", "1", "--lengths", "1", "--explored", '[{"peak": 1}, {"peak": 0.1}, {}]'])
    runs = Fixed(lambda run: 3.0 + abs(math.log2(run.lr / 4e-3)))
    compared = Comparison(runs, "scratch", a).result()
    assert {json.loads(key)["steps"] for key in runs.done} == set(compared["lengths"]) == {8}
    assert [x["arenas"]["peak"] for x in compared["explored"]] == [1.0, 0.1]  # 1 is 1.0
    assert not any(x["open"] for x in compared["lengths"][8].values())
    assert {json.loads(key)["seed"] for key in runs.done} == {0, 1}
    a = compare_quality.parse(["--steps", "8", "--seeds", "1", "--lengths", "0.5,2", "--explored", "[{}]"])
    assert set(Comparison(runs, "scratch", a).result()["lengths"]) == {4, 8, 16}


def test_diverged_runs_are_never_best():
    runs = Fixed(lambda run: math.nan if run.lr > 1 else 3.0)
    sweep = Sweep(runs, Run("scratch", "sherry", 0.0, 0, (), 10), (1, 2, 4))
    study_runs.complete([sweep])
    assert sweep.best() <= 1


METHODS = {k: v for k, v in quality_runs.METHODS.items() if k not in ("twn", "binary")}


@contextlib.contextmanager
def fewer_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_runs, "EXPLORED", dict.fromkeys(quality_runs.RATES, [{}, {"peak": 0.25, "end": 0.5}]))
        patch.setattr(quality_runs, "LENGTHS", dict.fromkeys(quality_runs.RATES, (0.5,)))
        patch.setattr(quality_runs, "FINALISTS", 1)
        patch.setattr(quality_runs, "METHODS", METHODS)
        patch.setattr(study_runs, "EXTEND", 0)
        patch.setattr(quality_runs, "RATES", dict.fromkeys(quality_runs.RATES, (1e-3, 4e-3)))
        patch.setattr(quality_runs, "RATES_FULL", quality_runs.RATES)
        yield


def test_paired_differences():
    assert quality_report.paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0]) == "+10.00 ± 0.00 %"
    assert quality_report.paired([1.1, 1.3], [1.0, 1.0]) == "+20.00 ± 10.00 %"
    assert quality_report.paired([2.0], [2.0]) == ""


@pytest.fixture(scope="module")
def compared(tmp_path_factory, corpus):
    """A complete comparison, in both settings, of the smallest possible models."""
    work = tmp_path_factory.mktemp("compared")
    arguments = ["--work", str(work / "work"), "--out", str(work / "quality"), "--corpus", str(corpus), "--layers", "1",
                 "--hidden", "128", "--intermediate", "128", "--vocab", "300", "--context", "32", "--batch", "2", "--base-batch",
                 "2", "--steps", "4", "--base-steps", "6", "--seeds", "2", "--eval-blocks", "8", "--jobs", "1"]  # fmt: skip
    with fewer_runs():
        assert compare_quality.main(arguments) == 0
    return work, arguments


def test_reports_what_was_run(compared):
    work, _ = compared
    results = json.loads((work / "quality.json").read_text())
    runs = [json.loads(line) for line in (work / "work/runs.jsonl").read_text().splitlines()]
    text = (work / "quality.md").read_text()
    assert list(results["settings"]) == ["pretrained", "scratch"]
    for setting, r in results["settings"].items():
        assert set(r["methods"]) == set(METHODS)
        for method, row in r["methods"].items():
            of_method = [x for x in runs if x["run"]["setting"] == setting and x["run"]["steps"] == 4
                         and dict(x["run"]["arenas"]) == row["arenas"]
                         and x["run"]["method"] == ("sherry" if method.startswith("arenas") else method)]  # fmt: skip
            reported = [x for x in of_method if x["run"]["seed"] and x["run"]["lr"] == row["lr"]]
            assert sorted(row["losses"]) == sorted(x["report"] for x in reported) and len(row["losses"]) == 2
            first = {x["run"]["lr"]: x["choice"] for x in of_method if x["run"]["seed"] == 0}
            assert first[row["lr"]] < min(first.values()) * (1 + study_runs.TIE)  # on the other half of the text
            assert f"{statistics.mean(row['losses']):.4f}" in text
    pretrained = results["settings"]["pretrained"]
    assert all(x["before"] != pretrained["before"] for x in runs if x["run"]["setting"] == "scratch")
    assert (work / "quality.png").stat().st_size > 20_000
    assert all("gradient_rank" in str(results["settings"][s]["methods"]["arenas"]["curve"]) for s in results["settings"])


def test_resumes_where_it_stopped(compared, capfd):
    work, arguments = compared
    log = work / "work/runs.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    before = json.loads((work / "quality.json").read_text())
    log.write_text("".join(lines[:-2]) + lines[-2][:50])  # one missing, and one half written
    with fewer_runs():
        assert compare_quality.main(arguments) == 0
        out = capfd.readouterr().out
        assert "damaged; that run is repeated" in out
        assert len(re.findall(r"^  \d of \d: ", out, re.M)) == 2  # finished runs are not trained again
        assert compare_quality.main(arguments) == 0
    out = capfd.readouterr().out
    assert "damaged" not in out and not re.findall(r"^  \d of \d: ", out, re.M)
    assert sorted(x.split('"seconds"')[0] for x in log.read_text().splitlines()) == sorted(x.split('"seconds"')[0] for x in lines)
    after = json.loads((work / "quality.json").read_text())
    for setting in before["settings"]:  # the same runs give the same figures
        for method in METHODS:
            assert after["settings"][setting]["methods"][method]["losses"] == before["settings"][setting]["methods"][method]["losses"]


def test_wrong_input(compared, corpus, tmp_path, capfd):
    work, arguments = compared
    assert compare_quality.main([*arguments, "--layers", "2"]) == 1
    assert "begun with other settings (layers: 1 then, 2 now)" in capfd.readouterr().err
    assert compare_quality.main(["--work", str(tmp_path), "--corpus", str(tmp_path / "none")]) == 1
    assert "no such directory" in capfd.readouterr().err
    small = ["--work", str(tmp_path / "small"), "--corpus", str(corpus), "--vocab", "300"]
    assert compare_quality.main([*small, "--context", "99999"]) == 1
    assert (
        f"{corpus} gives " in capfd.readouterr().err and not (tmp_path / "small/sizes.json").exists()
    )  # other settings may still be tried
    for wrong, says in [(["--settings", "tuned"], "--settings tuned: choose from pretrained, scratch"),
                        (["--settings", ""], "--settings: choose from pretrained, scratch"), (["--seeds", "0"], "--seeds 0: at least 1"),
                        (["--steps", "1"], "--steps 1: at least 4"), (["--jobs", "0"], "--jobs 0: at least 1"),
                        (["--context", "1"], "--context 1: at least 2"), (["--lengths", "2,x"], "--lengths 2,x: numbers from 0.001"),
                        (["--lengths", "0.001"], "--steps 600: at least 1000"), (["--lengths", "-1"], "--lengths -1: numbers from 0.001"),
                        (["--lengths", "1e308"], "--lengths 1e308: numbers from 0.001"),
                        (["--explored", "{}"], "--explored {}: it must be a non-empty list"), (["--explored", "[1"], "--explored [1: "),
                        (["--explored", '[{"peek": 1}]'], '{"peek": 1} must be an object of peak, warmup'),
                        (["--explored", "[1]"], "1 must be an object"), (["--explored", '[{"end": 2}]'], "its end 2"),
                        (["--explored", '[{"peak": "1"}]'], 'peak is "1": it must be like 1.0'),
                        (["--explored", '[{"rescale": 1}]'], "rescale is 1: it must be like false"),
                        (["--explored", '[{"peak": true}]'], "peak is true: it must be like 1.0")]:  # fmt: skip
        with pytest.raises(SystemExit):
            compare_quality.main(wrong)
        assert says in capfd.readouterr().err
    shutil.copytree(work / "work", tmp_path / "copy")
    arguments[arguments.index("--work") + 1] = str(tmp_path / "copy")
    (tmp_path / "copy/tokens.npz").write_bytes(b"junk")
    assert compare_quality.main(arguments) == 1
    assert "tokens.npz is damaged" in capfd.readouterr().err
    (tmp_path / "copy/sizes.json").write_bytes(b"junk")
    assert compare_quality.main(arguments) == 1
    assert "sizes.json is damaged" in capfd.readouterr().err


def test_results_are_named_as_asked(tmp_path):
    assert quality_report.suffixed(tmp_path / "qwen2.5", ".md") == tmp_path / "qwen2.5.md"


def test_a_setting_that_diverged_is_not_chosen():
    """NaN has no order: sorting by it would leave the others where they were."""
    best = dict(quality_runs.PUBLISHED, peak=0.25, end=0.5)

    def loss(run):
        settings = dict(run.arenas)
        return 3.05 if settings == best else math.nan if settings.get("peak") == 0.25 else 3.2

    results = Comparison(Fixed(loss), "scratch", argparse.Namespace(steps=8, seeds=1, explored=None, lengths=None)).result()
    assert results["methods"]["arenas"]["arenas"] == best


def test_published_settings_are_the_defaults_of_arenas():
    from sherry_gguf.qat import Arenas

    assert dict(arenas()) == vars(Arenas()) == quality_runs.PUBLISHED


def test_state_is_that_of_the_middle_looks():
    looks = [{"step": i, "gradient_rank": float(i), "flips": i / 100} for i in range(8)]
    state = quality_report.state_of([{"loss": 1.0}, *looks])
    assert state["gradient_rank"] == 3.5 and state["flips"] == pytest.approx(0.035)
    assert quality_report.state_of(looks[:1])["gradient_rank"] == 0.0 and quality_report.state_of([{"loss": 1.0}]) == {}
