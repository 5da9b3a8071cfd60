"""scripts/studies/real_training.py at a tiny size: what it carries, pauses, and what it reports."""

import argparse
import dataclasses
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import real_files
import real_training
import real_training_files as files
import real_training_report as reporting
import real_training_runs as real_runs
import small_models
import study_runs
import torch
from lm_eval.models.huggingface import HFLM
from matplotlib.figure import Figure
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.errors import NotBuilt, Stop
from sherry_gguf.evaluation import tasks as lm_tasks
from sherry_gguf.qat import data as qat_data
from sherry_gguf.training import run as training

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUESTIONS = Path(__file__).parents[1] / "evaluate/eval_data"
SIZES = ("--context", "32", "--steps", "8", "--batch", "2", "--micro", "2", "--eval-blocks", "2", "--task-looks", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("source") / "llama", "llama", latent=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name in files.TEXTS:
        rows = [" ".join(rng.choice(["of", "the", "sea", "a", "whale"]) for _ in range(400)) for _ in range(6)]
        with lzma.open(folder / name, "wt") as f:
            f.write("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for path in QUESTIONS.glob("*.jsonl"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prepared(source, data, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("prepared") / "work"
    argv = ["prepare", "--source", source, "--data", data, "--work", work, "--tokens", 4000, "--held-out-tokens", 600, "--limit", 4,
            "--part-size", 1]  # fmt: skip
    assert real_training.main([str(x) for x in argv]) == 0
    return work


def arguments(work: Path, *more: object, precision: str = "float32") -> list[str]:
    flags = {"float32": ("--float32",), "bfloat16": ()}[precision]
    return [str(x) for x in ("run", "--work", work, "--out", work / "out", *SIZES, *flags, "--methods", "absmean,sherry", "--seeds", 1,
                             *more)]  # fmt: skip


def test_preparing_compares_tokens_with_llama_cpp(source, data, tmp_path, monkeypatch, capfd):
    """On the held-out text, if a build is there."""

    def f16(*_) -> Path:
        raise NotBuilt("no llama-quantize")

    def prepare(name: str) -> str:
        argv = ["prepare", "--data", data, "--work", tmp_path / name, "--tokens", 500, "--held-out-tokens", 200, "--tasks", ""]
        assert real_training.main([str(x) for x in argv]) == 0
        return capfd.readouterr().out

    compared: list[tuple] = []
    monkeypatch.setattr(real_files, "directory", lambda *_: source)
    monkeypatch.setattr(real_files, "terms", lambda *_: "its license")
    monkeypatch.setattr(real_files, "check_tokens", lambda *args: compared.append(args))
    monkeypatch.setattr(real_files, "f16", f16)
    said = prepare("unbuilt")
    assert said.startswith("its license\ntoken ids are not compared with llama.cpp's: no llama-quantize\ntext\n") and not compared
    monkeypatch.setattr(real_files, "f16", lambda *_: tmp_path / "F16.gguf")
    assert "not compared" not in prepare("built")
    assert compared == [(source, tmp_path / "F16.gguf", "".join(files.texts(data / files.TEXTS[1])))]


@torch.no_grad()
def test_the_smaller_vocabulary_gives_the_same_logits(source, prepared):
    figures, train, held_out, tasks = files.load(prepared, 32)
    used = np.load(prepared / "tokens.npz")["used"]
    whole, small = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (source, prepared / "model"))
    assert small.config.vocab_size == len(used) == figures["vocabulary"] < whole.config.vocab_size
    ids = torch.from_numpy(train[:2].astype(np.int64))
    old = torch.from_numpy(used)[ids]
    wanted = whole(input_ids=old).logits[..., torch.from_numpy(used)]
    torch.testing.assert_close(small(input_ids=ids).logits, wanted, rtol=2e-3, atol=2e-3)  # the weights went through float16
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert (ids[:, 0] == figures["bos"]).all() and (old[:, 0] == tokenizer.bos_token_id).all()
    assert "whale" in tokenizer.decode(old[0]) and len(held_out) == 600 // 31
    assert {name: len(rows) for name, rows in tasks.items()} == dict.fromkeys(files.TASKS, 4)


def test_tasks_are_those_of_lm_eval(source, data, prepared):
    """Its own split into tokens, and its right answers."""
    _, _, _, tasks = files.load(prepared, 32)
    used = np.load(prepared / "tokens.npz")["used"]
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(source), tokenizer=AutoTokenizer.from_pretrained(source))
    for name, rows in tasks.items():
        loaded, _ = lm_tasks.load([name], None, 0, data)
        lm_tasks.prepare(loaded, 4)
        requests = [(used[r].tolist(), n) for row in rows for r, n in zip(row["requests"], row["scored"], strict=True)]
        wanted = [lm._encode_pair(*i.args) for i in loaded[name].instances]
        assert requests == [(context + more, len(more)) for context, more in wanted], name
    rights = {row["answer"] for row in map(json.loads, (data / "winogrande.validation.jsonl").read_text().splitlines()[:4])}
    assert {str(row["gold"] + 1) for row in tasks["winogrande"]} == rights
    piqa = [row["label"] for row in map(json.loads, (data / "piqa.validation.jsonl").read_text().splitlines()[:4])]
    assert [row["gold"] for row in tasks["piqa"]] == piqa


@torch.no_grad()
def test_accuracy(prepared):
    model = AutoModelForCausalLM.from_pretrained(prepared / "model", dtype=torch.float32).eval()
    rows = files.load(prepared, 32)[3]["arc_easy"]

    def score(request, n):
        shares = model(input_ids=torch.tensor([request])).logits[0].log_softmax(-1)
        return sum(float(shares[i - 1, request[i]]) for i in range(len(request) - n, len(request)))

    best = [int(np.argmax([score(r, n) for r, n in zip(row["requests"], row["scored"], strict=True)])) for row in rows]
    for right in range(5):
        rows = [row | {"gold": b if i < right else -1} for i, (row, b) in enumerate(zip(rows, best, strict=True))]
        found = real_runs.accuracy(model, rows, 90)
        assert found["acc"] == right / 4
    assert found["acc_stderr"] == 0


def plain(a, **more) -> dict:
    """Arguments as a run's process gets them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()} | {"device": "cpu", "machine": "here", "threads": 1} | more


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_paused_study_gives_the_same_result(prepared, tmp_path, capfd, precision, monkeypatch):
    """Each call trains one step and saves a checkpoint; another one measures, in the same precision."""
    monkeypatch.setattr(real_runs, "RATES", (1e-3,))  # one run of each seed
    monkeypatch.setattr(study_runs, "EXTEND", 0)
    autocast = []
    for module, name in (qat_data, "mean_loss"), (real_runs, "accuracy"):
        monkeypatch.setattr(module, name, watched(getattr(module, name), autocast))
    more = ("--steps", 4, "--task-looks", 2, "--methods", "sherry")
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    for work in whole, paused:
        shutil.copytree(prepared, work)
    monkeypatch.setattr(training, "bf16_time", lambda: 9.0)
    assert real_training.main(arguments(whole, *more, precision=precision)) == 0
    said = capfd.readouterr()
    assert "the time is up" not in said.out
    assert ("bfloat16 products take 9 times as long as float32: add --float32" in said.err) == (precision == "bfloat16")
    done = json.loads((whole / "runs.jsonl").read_text().splitlines()[-1])
    run, calls = real_runs.Run(**done["run"]), 0
    a = real_training.parse(arguments(paused, *more, precision=precision))
    with pytest.raises(real_runs.Paused):
        real_runs.train(run, plain(a, deadline=0.0))
    assert not (paused / "checkpoints").exists()
    while calls < 20:
        calls += 1
        try:
            # past as soon as the first step is done; in the last call the steps are done and the measuring is left
            last = (paused / "checkpoints" / real_runs.slug(run) / "checkpoint-4").exists()
            result = real_runs.train(run, plain(a, deadline=float("inf") if last else Once()))
            break
        except real_runs.Paused:
            continue
    assert calls == 5
    elsewhere = "seconds", "machine", "jobs"
    assert {k: v for k, v in result.items() if k not in elsewhere} == {k: v for k, v in done.items() if k not in elsewhere}
    assert [look["tokens"] for look in result["tasks"]] == [0, 2 * 64, 4 * 64]
    assert not (paused / "checkpoints" / real_runs.slug(run)).exists()
    assert autocast == [precision == "bfloat16"] * (3 + 3 * len(files.TASKS))  # before, choice, report; three looks


def test_the_start_is_measured_once(prepared, tmp_path, monkeypatch):
    """Every seed starts from the same weights, with and without Arenas and a teacher."""
    shutil.copytree(prepared, tmp_path / "work")
    a = real_training.parse(arguments(tmp_path / "work", "--task-looks", 1, "--steps", 2))
    measured: list[bool] = []
    monkeypatch.setattr(real_runs, "task_accuracies", watched(real_runs.task_accuracies, measured))
    runs = [real_runs.Run(method, "per_group", 1e-3, 1, 2, 2, 32) for method in ("sherry", "arenas-published-teacher")]
    first, second = (real_runs.train(run, plain(a, deadline=float("inf"))) for run in runs)
    assert (
        first["before"] == second["before"]
        and first["tasks"][0] == second["tasks"][0]
        and first["tasks"][0]["tokens"] == 0
        and len(first["tasks"][0]) == 1 + len(files.TASKS)
    )
    assert len(measured) == 3  # the start, and two ends


class Ends(float):
    """A time that ends the process when it is asked for often enough."""

    def __new__(cls, often: int):
        made = super().__new__(cls, 0.0)
        made.left = often
        return made

    def __lt__(self, now):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return False


def fails(run, a: dict) -> dict:
    """Seed 0 fails by its method's name, seed 1 ends later, and seed 2 must not begin."""
    if run.seed == 0:
        raise {"full": study_runs.Paused, "twn": ValueError("twn")}[run.method]
    if run.seed == 2:
        (Path(a["work"]) / "began").touch()
    time.sleep(1)
    return {"run": dataclasses.asdict(run), "choice": 1.0, "seconds": 1.0}


@pytest.mark.parametrize("method, error", [("full", study_runs.Paused), ("twn", ValueError)])
def test_an_error_waits_for_the_other_runs(tmp_path, method, error):
    """They save their checkpoints, or are done, at the same time or a little later."""
    runs = [real_runs.Run(method, "per_group", 1e-3, seed, 2, 2, 32) for seed in (0, 1, *range(3, 7), 2)]
    with pytest.raises(error), study_runs.Runs(argparse.Namespace(work=tmp_path, jobs=2), real_runs.Run, fails) as kept:
        kept.need(runs)
    assert runs[1] in kept and runs[0] not in kept and not (tmp_path / "began").exists()
    assert 1 in {json.loads(line)["run"]["seed"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()}


def dies(run, a: dict) -> dict:
    os._exit(9)


def test_a_run_that_is_killed(tmp_path):
    with pytest.raises(Stop, match="was killed: if memory ran out, use a smaller --jobs"):
        with study_runs.Runs(argparse.Namespace(work=tmp_path, jobs=1), real_runs.Run, dies) as kept:
            kept.need([real_runs.Run("full", "per_group", 1e-3, 0, 2, 2, 32)])


def test_a_run_that_was_killed_continues_from_its_last_checkpoint(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.setattr(real_runs, "SAVE_EVERY", 3)
    a = real_training.parse(arguments(tmp_path / "work"))
    run = real_runs.Run("sherry", "per_group", 1e-3, 0, 8, 2, 32)
    whole = real_runs.train(run, plain(a, deadline=float("inf")))
    with pytest.raises(KeyboardInterrupt):
        real_runs.train(run, plain(a, deadline=Ends(6)))  # when its fifth step is done
    [checkpoint] = (tmp_path / "work" / "checkpoints" / real_runs.slug(run)).glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    assert real_runs.train(run, plain(a, deadline=float("inf")))["report"] == whole["report"]


def watched(measure, autocast: list[bool]):
    """`measure`, which notes whether it is called within autocast."""

    def noted(*args):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return measure(*args)

    return noted


class Once(float):
    """A time that is not over when it is first asked for, and over from then on."""

    def __new__(cls):
        made = super().__new__(cls, 0.0)
        made.asked = False
        return made

    def __lt__(self, now):
        self.asked, before = True, self.asked
        return before


def test_the_report(prepared, tmp_path, capfd):
    work, looks = tmp_path / "work", ("--task-looks", 2)
    shutil.copytree(prepared, work)
    assert real_training.main(["report", "--work", str(work)]) == 1
    assert "no run is complete" in capfd.readouterr().err
    assert real_training.main(arguments(work, *looks, "--minutes", 1e-6)) == 0
    assert capfd.readouterr().out.endswith("the time is up: run the same command again to go on\n")
    assert real_training.main(arguments(work, *looks)) == 0
    text = (work / "runs.jsonl").read_text()
    results = [json.loads(line) for line in text.splitlines()]
    assert {r["run"]["seed"] for r in results} == {0, 1}
    table = (work / "out.md").read_text()
    assert table.startswith("llama, trained with each method from the same weights")
    assert "| absmean ternary |" in table and "| Sherry without Arenas |" in table and "rates only" not in table and "piqa" in table
    sherry = next(r for r in results if r["run"]["method"] == "sherry" and r["run"]["seed"] == 1)
    assert f"{sherry['report']:.4f}" in table and f"{sherry['before']:.3f}" in table
    assert [look["tokens"] for look in sherry["curve"]] == [n * 2 * 32 for n in range(9)]
    assert sherry["curve"][-1]["loss"] == sherry["report"] and sherry["curve"][0]["loss"] == sherry["before"]
    assert imread(work / "out.png").shape[:2] == (880, 720)  # losses, and accuracies below
    only = [r for r in results if not r["run"]["seed"]]
    assert "rates only" in reporting.table(only, next(iter(reporting.by_shape(only))), reporting.best(only))

    longer = text.replace('"steps": 8', '"steps": 16').replace('"tokens": ', '"tokens": 2')
    (work / "runs.jsonl").write_text(text + longer + text[:50])  # cut off while it was written
    assert real_training.main(["report", "--work", str(work), "--out", str(work / "both")]) == 0
    assert "16 steps" in (work / "both.md").read_text() and "8 steps" in (work / "both.md").read_text()
    assert real_training.main(arguments(work, *looks, "--micro", 1)) == 1
    assert "was begun with other settings (micro: 2 then, 1 now)" in capfd.readouterr().err


def result(method: str, seed: int, steps: int, *percents: float) -> dict:
    """One run's, with these accuracies before, halfway and at the end, or at the end only."""
    found = [{"tokens": int(1e6) * steps * i // 2, "x": {"acc": p / 100 - 0.1, "acc_stderr": 0.03},
              "y": {"acc": p / 100 + 0.1, "acc_stderr": 0.04}}
             for i, p in zip((0, 1, 2)[-len(percents) :], percents)] if percents else []  # fmt: skip
    return {"run": {"method": method, "seed": seed, "lr": 1e-3, "steps": steps, "granularity": "per_group", "batch": 1, "context": 32},
            "choice": 1.0, "curve": [{"tokens": 1, "loss": 1.0}], "tasks": found}  # fmt: skip


def test_accuracies_against_tokens(tmp_path):
    rows = [result("twn", 1, 2, 20, 30, 40), result("twn", 2, 2, 40, 50, 80), result("twn", 1, 4, 20, 40, 60),
            result("full", 0, 2), result("sherry", 1, 2, 70)]  # fmt: skip
    shown = {shape: reporting.best(found) for shape, found in reporting.by_shape(rows).items()}
    axis = Figure().subplots()
    reporting.plot_accuracies(axis, list(shown.values()), dict.fromkeys(real_runs.METHODS, "red"))
    lines = [np.array(line.get_xydata()).round(6).tolist() for line in axis.lines]
    assert lines == [[[0, 30], [1, 40], [2, 60]], [[0, 20], [2, 40], [4, 60]]]  # means over tasks and seeds
    errors = [np.diff(bar[:, 1]).item() for group in axis.collections for bar in getattr(group, "get_segments", list)()]
    np.testing.assert_allclose(errors, [2 * 2.5] * 6)  # half of the root of 3² + 4²
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["TWN ternary"]
    for rows, height in ([result("sherry", 1, 2, 70)], 440), ([result("sherry", 1, 2, 70), result("twn", 1, 2, 0, 0, 0)], 880):
        reporting.plot({("per_group", 2, 1, 32): reporting.best(rows)}, tmp_path / "x.png")
        assert imread(tmp_path / "x.png").shape[0] == height


def test_parts(prepared, tmp_path, capfd):
    """They are all that another machine needs, and a damaged one is named."""
    parts = sorted((prepared / files.PARTS).glob("*.part"))
    assert len(parts) > 1 and max(p.stat().st_size for p in parts) == 1 << 20
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(prepared / files.PARTS, work / files.PARTS)
    second = work / files.PARTS / parts[1].name
    data = second.read_bytes()
    second.write_bytes(data[:-1])
    assert real_training.main(arguments(work)) == 1
    assert f"{second} is missing or damaged: copy it again" in capfd.readouterr().err
    second.write_bytes(data)
    files.load(work, 32)
    for path in prepared.rglob("*"):
        if path.is_file() and path.name != "lock":
            assert (work / path.relative_to(prepared)).read_bytes() == path.read_bytes(), path


def test_parts_depend_on_nothing_but_the_contents(prepared, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    then = json.loads((work / files.COMPLETE).read_text())
    (work / "figures.json").write_text(json.dumps({k: v for k, v in then.items() if k != "data"}, indent=1) + "\n")
    os.utime(work / "tokens.npz", (1, 1))
    (work / "tasks.json").chmod(0o600)
    files.split_up(work, 1 << 20)
    assert files.parts_digest(work) == then["data"]


def test_runs_of_another_machine(prepared, tmp_path, capfd):
    """It trained one method, this one trains the other."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    shutil.copytree(prepared, theirs)
    shutil.copytree(prepared, mine)
    assert real_training.main(arguments(theirs, "--methods", "absmean")) == 0
    report = theirs / "out.json"
    done = json.loads(report.read_text())["runs"]
    capfd.readouterr()
    assert real_training.main(arguments(mine, "--merge", report)) == 0
    assert f"{len(done)} runs from {report}\n" in (said := capfd.readouterr().out) and "absmean lr" not in said and "sherry lr" in said
    whole = json.loads((mine / "out.json").read_text())["runs"]
    assert whole[: len(done)] == done and {r["run"]["method"] for r in whole[len(done) :]} == {"sherry"}
    assert real_training.main(arguments(mine, "--merge", report)) == 0
    assert f"0 runs from {report}\n" in capfd.readouterr().out

    lines = (mine / "runs.jsonl").read_text()
    report.write_text(report.read_text().replace('"eval_blocks": ', '"eval_blocks": 1'))
    assert real_training.main(arguments(mine, "--merge", report)) == 1
    assert f"--merge {report} was made with other settings (eval_blocks: 1" in capfd.readouterr().err
    report.write_text(report.read_text()[:-9])
    assert real_training.main(arguments(mine, "--merge", report)) == 1
    assert f"{report} is damaged" in capfd.readouterr().err
    report.unlink()
    assert real_training.main(arguments(mine, "--merge", report)) == 1
    assert f"--merge {report} is not there" in capfd.readouterr().err
    assert (mine / "runs.jsonl").read_text() == lines


def test_other_data(prepared, tmp_path, capfd):
    """Parts of another preparation, copied over older ones, and runs on both in one directory."""
    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    assert real_training.main(arguments(work, "--minutes", 1e-6)) == 0
    sums, mark = work / files.PARTS / files.SUMS, work / files.COMPLETE
    lines = sums.read_text()
    sums.write_text(lines.replace(lines[0], "0" if lines[0] != "0" else "1"))
    assert real_training.main(arguments(work)) == 1
    said = f"{work} was made of other parts than {work / files.PARTS} holds now: move these to a new --work"
    assert said in capfd.readouterr().err
    sums.write_text(lines)
    then = json.loads(mark.read_text())
    mark.write_text(json.dumps(then | {"data": "other"}))
    sums.unlink()  # without parts, data is taken as it is
    assert real_training.main(arguments(work)) == 1
    assert f"was begun with other settings (data: {then['data']} then, other now)" in capfd.readouterr().err


def test_a_machine_that_only_trains(prepared, tmp_path):
    """It has neither lm_eval nor datasets, cffi, gguf or matplotlib."""
    work, script = tmp_path / "work", tmp_path / "study.py"
    shutil.copytree(prepared, work)
    script.write_text(  # at module level, for the process that trains; one rate, for one run of each seed
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['lm_eval', 'datasets', 'cffi', 'gguf', 'sentencepiece', 'matplotlib']))\n"
        f"sys.path[:0] = [{str(Path(real_training.__file__).parent)!r}]\n"
        "import real_training, real_training_runs, study_runs\n"
        "real_training_runs.RATES, study_runs.EXTEND = (1e-3,), 0\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(real_training.main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, script, *arguments(work, "--methods", "sherry-teacher", "--steps", 1)],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0 and "wrote " in done.stdout and "no plot: matplotlib is not installed here" in done.stdout, done.stderr
    assert len((work / "runs.jsonl").read_text().splitlines()) == 2


def test_errors(prepared, source, data, tmp_path, capfd):
    def says(*argv: object) -> str:
        assert real_training.main([str(x) for x in argv]) == 1
        return capfd.readouterr().err

    assert "is not prepared" in says("run", "--work", tmp_path / "new", *SIZES)
    assert "is prepared: choose another --work" in says("prepare", "--data", data, "--source", source, "--work", prepared)
    assert "lacks books.train.jsonl.xz" in says("prepare", "--data", tmp_path, "--work", tmp_path / "new")
    with pytest.raises(Stop, match="held-out sequences of 512"):
        files.load(prepared, 512)
    with pytest.raises(SystemExit):
        real_training.main(["run", "--methods", "sherri"])
    assert "--methods sherri: choose from full, absmean" in capfd.readouterr().err
