"""A report's results are used again by the same command, and only with the same files and arguments."""

import json
import os
import shutil

import pytest
import small_models
from evaluation_support import DATA, DATA_ARGS, DOCUMENTS, F32_NATS, TEXT, report_of, run

from sherry_gguf import signals
from sherry_gguf.errors import Stop
from sherry_gguf.evaluation import resume, tasks, text

pytest_plugins = "evaluation_fixtures"
pytestmark = pytest.mark.usefixtures("offline")

TASKS = ["--tasks", "piqa,arc_easy"]


@pytest.fixture
def measured(monkeypatch):
    """What is measured, as it happens: (kind of model, task or "text")."""
    found = []

    def watch(module, name, what):
        original = getattr(module, name)

        def called(*args):
            found.append(what(*args))
            return original(*args)

        monkeypatch.setattr(module, name, called)

    watch(tasks, "measure", lambda lm, name, *_: (type(lm).__name__, name))
    watch(text, "torch_text", lambda *_: ("TorchLM", "text"))
    watch(text, "gguf_text", lambda *_: ("GgufLM", "text"))
    return found


def again(measured):
    """What was measured since the last call."""
    found = list(measured)
    measured.clear()
    return found


@pytest.fixture
def command(models, tmp_path):
    """Arguments on copies of a checkpoint and a GGUF: (hf, gguf, the arguments)."""
    shutil.copytree(models["spm"][0], tmp_path / "hf")
    shutil.copy(models["spm"][1], tmp_path / "m.gguf")
    return tmp_path / "hf", tmp_path / "m.gguf", [tmp_path / "hf", tmp_path / "m.gguf", *DATA_ARGS, *TASKS, "--limit", 4]


def test_results_are_used_again(command, tmp_path, measured, capsys):
    report, (*_, args) = tmp_path / "r.json", command
    args = [*args, "--text", TEXT, "--chunks", 2, "--context", 64]
    code, first = report_of(report, *args)
    assert code == 0 and len(again(measured)) == 6
    out, err = capsys.readouterr()
    assert "earlier run" not in err and "2 models split it alike" in err
    code, second = report_of(report, *args)
    assert code == 0 and again(measured) == [] and second == first
    shown = capsys.readouterr()
    assert shown.out == out and f"{report}: 6 results of an earlier run, with the same files and arguments; delete it" in shown.err
    # what only changes the speed, or another order
    code, third = report_of(report, *args, "--batch-size", 2, "--tasks", "arc_easy,piqa")
    assert code == 0 and again(measured) == [] and list(third["models"][0]["tasks"]) == ["arc_easy", "piqa"]
    report.unlink()
    assert report_of(report, *args)[0] == 0 and len(again(measured)) == 6


def test_what_has_changed_is_measured_again(command, models, tmp_path, measured):
    report, (hf, gguf, args) = tmp_path / "r.json", command
    torch, llama = ([(kind, name) for name in ("piqa", "arc_easy")] for kind in ("TorchLM", "GgufLM"))

    def measures(*more):
        assert report_of(report, *more)[0] == 0
        return again(measured)

    assert measures(*args) == torch + llama
    for flags in ["--limit", 3], ["--num-fewshot", 1], ["--max-length", 100]:
        assert measures(*args, *flags) == torch + llama and measures(*args, *flags) == []
    assert measures(*args) == []
    assert measures(*args, "--dtype", "bfloat16")[:2] == torch
    os.utime(gguf, (1, 1))
    assert measures(*args) == llama
    small_models.edit_config(hf, rms_norm_eps=1e-3)
    assert measures(*args) == torch
    data = tmp_path / "data"
    shutil.copytree(DATA, data)
    path = next(data.glob("piqa.*"))
    assert measures(*args, "--data", data) == []  # the same documents
    path.write_text(path.read_text().replace('"label": 0', '"label": 1', 1))
    assert measures(*args, "--data", data) == [("TorchLM", "piqa"), ("GgufLM", "piqa")]
    assert measures(models["spm"][2], *args, "--data", data) == llama  # a further model


def test_results_of_other_tasks_and_models_are_kept(command, tmp_path, measured, capsys):
    """A report that is used for something else loses nothing, even if the new run measures nothing."""
    report, (hf, gguf, args) = tmp_path / "r.json", command
    text = ["--text", TEXT, "--chunks", 2, "--context", 64]
    _, first = report_of(report, *args, "--tasks", "piqa", *text)
    wanted = again(measured)
    capsys.readouterr()
    code, second = report_of(report, hf, *DATA_ARGS, "--tasks", "arc_easy", "--limit", 3)
    assert code == 0 and again(measured) == [("TorchLM", "arc_easy")]
    assert f'{report}: 4 results of other files or arguments, kept in "earlier"\n' in capsys.readouterr().err
    assert [m["model"] for m in second["models"]] == [str(hf)] and list(second["models"][0]["tasks"]) == ["arc_easy"]
    kept = {(e["model"], *e["tasks"], *(["text"] if "text" in e else [])): e for e in second["earlier"]}
    assert sorted(kept) == sorted((str(model), what) for model in (hf, gguf) for what in ("piqa", "text"))
    assert all(e["settings"] == first["settings"] for e in kept.values()) and second["settings"]["limit"] == 3
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    code, third = report_of(report, tmp_path / "broken.gguf", *DATA_ARGS, "--tasks", "piqa")
    assert code == 1 and again(measured) == [] and len(third["earlier"]) == 5
    code, last = report_of(report, *args, "--tasks", "piqa", *text)
    assert code == 0 and again(measured) == [] and len(wanted) == 4
    assert last["models"] == first["models"] and [list(e["tasks"]) for e in last["earlier"]] == [["arc_easy"]]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("end", [signals.Interrupted(2), RuntimeError("broken")])
def test_an_interrupted_task_continues(models, tmp_path, monkeypatch, capsys, which, end):
    """The answers so far are kept, whether a run is interrupted or fails, and are used once."""
    args = [models["spm"][which], *DATA_ARGS, *TASKS]
    wanted = report_of(tmp_path / "whole.json", *args)[1]["models"][0]["tasks"]
    report, add, added = tmp_path / "r.json", resume.Answers.add, []

    def count(self, request, answer, most=30):
        if len(added) == most:
            raise end
        added.append(request)
        add(self, request, answer)

    monkeypatch.setattr(resume.Answers, "add", count)
    assert run(*args, "--output", report) == (130 if isinstance(end, signals.Interrupted) else 1)
    (answers,) = tmp_path.glob("r.json.*.answers")
    assert len(answers.read_text().splitlines()) == 1 + 30 - 2 * DOCUMENTS["piqa"]
    answers.write_text(answers.read_text() + '["cut o')
    monkeypatch.setattr(resume.Answers, "add", lambda *args: count(*args, most=1000))
    capsys.readouterr()
    code, found = report_of(report, *args)
    err = capsys.readouterr().err
    assert code == 0 and "1 result of an earlier run" in err and ": arc_easy, 10 requests of an earlier run\n" in err
    assert len(added) == len(set(added)) == 2 * DOCUMENTS["piqa"] + 4 * DOCUMENTS["arc_easy"] and not answers.exists()
    for name, task in found["models"][0]["tasks"].items():
        assert sum(task["choices"], []) == pytest.approx(sum(wanted[name]["choices"], []), abs=F32_NATS)
        assert task["tokens"] == wanted[name]["tokens"] and task["key"] == wanted[name]["key"]


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"models": [{"model": 1}]}', '{"models": [{"model": "m", "tasks": {"a": {}}}]}'])
def test_another_file_is_replaced(models, tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    code, report = report_of(tmp_path / "r.json", models["spm"][1], *DATA_ARGS, "--tasks", "piqa", "--limit", 1)
    assert code == 0 and report["models"][0]["tasks"]["piqa"]["documents"] == 1
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_model_that_fails_keeps_its_answers(models, tmp_path, monkeypatch, capsys):
    """The models after it use files of their own."""
    report, args = tmp_path / "r.json", [*models["spm"][:2], *DATA_ARGS, "--tasks", "piqa"]
    add, added = resume.Answers.add, []

    def count(self, request, answer):
        added.append(request)
        if len(added) == 9:
            raise Stop("broken")
        add(self, request, answer)

    monkeypatch.setattr(resume.Answers, "add", count)
    code, found = report_of(report, *args)
    assert code == 1 and [list(m["tasks"]) for m in found["models"]] == [[], ["piqa"]] and found["models"][0]["error"] == "broken"
    assert len(list(tmp_path.glob("r.json.*.answers"))) == 1
    capsys.readouterr()
    code, found = report_of(report, *args)
    assert code == 0 and f": {models['spm'][0]}: piqa, 8 requests of an earlier run\n" in capsys.readouterr().err
    assert len(added) == 1 + 4 * DOCUMENTS["piqa"] and os.listdir(tmp_path) == ["r.json"]


def test_answers_disappear_when_their_documents_are_measured(models, tmp_path):
    report, args = tmp_path / "r.json", [models["spm"][1], *DATA_ARGS, "--tasks", "piqa", "--limit", 2]
    hashes, _ = tasks.prepare(tasks.load(["piqa"], None, 0, DATA)[0], 2)
    for model, documents in (str(models["spm"][1]), hashes["piqa"]), (str(models["spm"][1]), "others"), ("other", hashes["piqa"]):
        resume.Answers(report, "other flags", model, documents).close(done=False)
    (tmp_path / "r.json.0123456789ab.answers").write_text("not ours\n")
    assert report_of(report, *args)[0] == 0
    left = [path.read_text().splitlines()[0] for path in tmp_path.glob("r.json.*.answers")]
    assert sorted(left) == sorted(
        [json.dumps(["other flags", str(models["spm"][1]), "others"]), json.dumps(["other flags", "other", hashes["piqa"]]), "not ours"]
    )


def test_answers_are_kept_apart(tmp_path):
    """By key, model and documents."""
    report, wanted = tmp_path / "r.json", ("one", "model", "documents")
    answers = resume.Answers(report, *wanted)
    answers.add(("a", "b"), (-1.5, True))
    answers.close(done=False)
    for i in range(3):
        other = resume.Answers(report, *wanted[:i], "two", *wanted[i + 1 :])
        assert len(other) == 0
        other.close(done=i == 0)
    same = resume.Answers(report, *wanted)
    assert same.get(("a", "b")) == (-1.5, True) and same.get(("a", "c")) is None and same.get(None) is None and len(same) == 1
    same.close(done=False)
    nowhere = resume.Answers(None, "one")
    nowhere.add(("a", "b"), (-1.5, True))
    nowhere.close(done=True)
    assert len(nowhere) == 0 and len(os.listdir(tmp_path)) == 3


def test_all_files_of_a_split_count(tmp_path):
    for name in "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf", "other.gguf":
        (tmp_path / name).write_text(name)
    first = tmp_path / "m-00001-of-00002.gguf"
    before = resume.identity(first)
    assert [name for name, *_ in before[0]] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    os.utime(tmp_path / "other.gguf", (1, 1))
    assert resume.identity(first) == before
    os.utime(tmp_path / "m-00002-of-00002.gguf", (1, 1))
    assert resume.identity(first) != before


def test_a_report_in_the_checkpoint_does_not_change_it(models, tmp_path, measured):
    shutil.copytree(models["spm"][0], tmp_path / "hf")
    for wanted in 1, 0:
        code, report = report_of(tmp_path / "hf" / "r.json", tmp_path / "hf", *DATA_ARGS, "--tasks", "piqa", "--limit", 2)
        assert code == 0 and len(again(measured)) == wanted
    assert json.loads((tmp_path / "hf" / "r.json").read_text()) == report
