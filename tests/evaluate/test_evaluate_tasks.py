"""lm-eval's tasks: their data from the hub's cache and from files, and what is reported without them."""

import bz2
import gzip
import json
import lzma
import re
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from evaluation_support import DATA, DOCUMENTS, REPO, TERNARY_NATS, cached, in_the_hubs_form, local_task, report_of, run

from sherry_gguf.evaluation.command import PAPER
from sherry_gguf.evaluation.tasks import load as load_tasks

pytest_plugins = "evaluation_fixtures"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]


def test_the_papers_tasks_from_the_cache(models, tmp_path, capsys):
    """lm-eval's own definitions of the five, on our documents as cached data sets."""
    for data in in_the_hubs_form():
        cached(datasets.config.HF_DATASETS_CACHE, *data)
    code, report = report_of(tmp_path / "r.json", models["spm"][0], models["spm"][2])
    out, err = capsys.readouterr()
    assert code == 0 and not report["missing"], err
    first, second = (m["tasks"] for m in report["models"])
    assert list(first) == list(second) == ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"]
    assert {name: t["documents"] for name, t in first.items()} == DOCUMENTS
    for name in first:
        assert sum(first[name]["choices"], []) == pytest.approx(sum(second[name]["choices"], []), abs=TERNARY_NATS)
    mean = 100 * sum(t["acc"] for t in first.values()) / 5
    assert re.search(rf"^mean of 5 +acc +{mean:.2f} % ", out, re.M)


def test_some_data_are_missing(models, tmp_path, capsys):
    cached(datasets.config.HF_DATASETS_CACHE, *in_the_hubs_form()[1])
    cached(datasets.config.HF_DATASETS_CACHE, *in_the_hubs_form()[4])
    code, report = report_of(tmp_path / "r.json", models["spm"][2], "--limit", 2)
    out, err = capsys.readouterr()
    assert code == 1
    assert list(report["models"][0]["tasks"]) == ["arc_easy", "winogrande"]
    assert list(report["missing"]) == ["piqa", "arc_challenge", "hellaswag"]
    assert re.search(r"^piqa +no data +-$", out, re.M) and re.search(r"^mean of 2 of 5 +acc ", out, re.M)


def test_no_data_at_all(models, capsys):
    """Each task is reported within seconds, and no model is loaded."""
    begun = time.monotonic()
    assert run(models["spm"][2]) == 1
    assert time.monotonic() - begun < 20
    err = capsys.readouterr().err
    for task, data in (("piqa", "baber/piqa"), ("arc_easy", "allenai/ai2_arc ARC-Easy"),
                       ("arc_challenge", "allenai/ai2_arc ARC-Challenge"), ("hellaswag", "Rowan/hellaswag"),
                       ("winogrande", "allenai/winogrande winogrande_xl")):  # fmt: skip
        message = (
            f"sherry-gguf evaluate: {task}: its data set {data} is unavailable: the hub http://127.0.0.1:9 cannot be reached "
            f"(ConnectionError), and it is not in the cache {datasets.config.HF_DATASETS_CACHE}\n"
        )
        assert message in err
    assert "set HF_DATASETS_CACHE to it" in err and "--data (see examples/tasks/README.md" in err
    assert err.endswith("sherry-gguf evaluate: no task has data: nothing was measured\n") and "Traceback" not in err


def test_offline_mode_is_reported(models, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run(models["spm"][2], "--tasks", "piqa") == 1
    assert "is unavailable: offline mode is on (HF_HUB_OFFLINE" in capsys.readouterr().err


def test_a_users_task_overrides_lm_evals(tmp_path):
    """And the tasks of --data."""
    local_task(tmp_path, "piqa", REPO / DATA / "piqa.validation.jsonl")
    for data in None, tmp_path:
        tasks, missing = load_tasks(["piqa"], tmp_path, 0, data)
        assert not missing and len(tasks["piqa"].dataset["validation"]) == 10


# ---- the paper's tasks from files ----


def asked_of(tasks):
    """Each task's requests with the right answers, its metrics and its version."""
    for task in tasks.values():
        task.build_all_requests()
    return {name: ([(i.arguments, task.doc_to_target(i.doc)) for i in task.instances], task.aggregation(), task.VERSION)
            for name, task in tasks.items()}  # fmt: skip


def test_tasks_on_files_equal_lm_evals(tmp_path):
    """The same requests, answers, metrics and versions as lm-eval's own tasks on the same data from the hub."""
    for data in in_the_hubs_form():
        cached(datasets.config.HF_DATASETS_CACHE, *data)
    wanted, missing = load_tasks(PAPER, None, 0)
    assert not missing and {t.config.dataset_path for t in wanted.values()}.isdisjoint(["json"])
    tasks, missing = load_tasks(PAPER, None, 0, DATA)
    assert not missing and {t.config.dataset_path for t in tasks.values()} == {"json"}
    assert asked_of(tasks) == asked_of(wanted)
    assert len(asked_of(tasks)["hellaswag"][0]) == 4 * DOCUMENTS["hellaswag"]


def test_hellaswag_in_llama_perplexitys_form(tmp_path):
    """It gives the same requests as the hub's fields; rows in neither form are an error."""
    hub, _ = load_tasks(["hellaswag"], None, 0, DATA)
    rows = [{k: d[k] for k in ("query", "choices", "gold")} for d in hub["hellaswag"].eval_docs]
    (tmp_path / "hellaswag.validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    finished, missing = load_tasks(["hellaswag"], None, 0, tmp_path)
    assert not missing and asked_of(finished) == asked_of(hub)
    (tmp_path / "hellaswag.validation.jsonl").write_text('{"ctx": "She", "endings": ["a", "b"], "label": 0}\n')
    _, missing = load_tasks(["hellaswag"], None, 0, tmp_path)
    assert "its rows have ctx, endings, label; HellaSwag's have activity_label, ctx_a, " in missing["hellaswag"]


@pytest.mark.parametrize("end, module", [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_compressed_files(tmp_path, end, module):
    """They replace a missing plain file; with both, each document counts once."""
    plain = (DATA / "piqa.validation.jsonl").read_bytes()
    directory = tmp_path / "my [own] data"
    directory.mkdir()
    (directory / f"piqa.validation.jsonl{end}").write_bytes(module.compress(plain))
    tasks, missing = load_tasks(["piqa"], None, 0, directory)
    assert not missing and len(tasks["piqa"].eval_docs) == 10
    (directory / "piqa.validation.jsonl").write_bytes(plain)
    tasks, _ = load_tasks(["piqa"], None, 0, directory)
    assert len(tasks["piqa"].eval_docs) == 10


def test_where_data_files_are_found(tmp_path, monkeypatch):
    """A user's tasks, too: in --data, else in the current directory, unless the path is absolute; by split or in a list."""
    rows = (DATA / "piqa.validation.jsonl").read_text().splitlines(keepends=True)
    for name, some in ("a", rows[:3]), ("b", rows[3:]):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    local_task(tmp_path, "both", "[a.jsonl, b.jsonl]")
    local_task(tmp_path, "absolute", tmp_path / "a.jsonl")
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [both]\n")
    names = ["both", "absolute"]
    tasks, missing = load_tasks(names, tmp_path, 0, tmp_path)
    assert not missing and [len(tasks[n].eval_docs) for n in names] == [10, 3]
    assert len(load_tasks(["mine"], tmp_path, 0, tmp_path)[0]["both"].eval_docs) == 10
    _, missing = load_tasks(names, tmp_path, 0)
    assert list(missing) == ["both"] and f"Unable to find '{Path.cwd()}/a.jsonl'" in missing["both"]
    monkeypatch.chdir(tmp_path)
    assert len(load_tasks(names, tmp_path, 0)[0]["both"].eval_docs) == 10


def test_data_and_tasks_that_fail(models, tmp_path, capsys):
    """A missing file, a file that lm-eval skips, documents without a field."""
    local_task(tmp_path, "gone", tmp_path / "none.jsonl")
    (tmp_path / "sums.yaml").write_text("task: local_sums\ndataset_path: [json\n")
    (tmp_path / "lacking.jsonl").write_text('{"sol1": "s", "sol2": "t", "label": 0}\n')
    local_task(tmp_path, "lacking", tmp_path / "lacking.jsonl")
    assert run(models["spm"][2], "--include-path", tmp_path, "--tasks", "gone,lacking") == 1
    err = capsys.readouterr().err
    assert f"sherry-gguf evaluate: gone: cannot load its data {tmp_path}/none.jsonl: Unable to find" in err
    assert f"lacking: cannot load its data {tmp_path}/lacking.jsonl: 'goal' is undefined\n" in err
    assert "HF_DATASETS_CACHE" not in err and "Traceback" not in err
    local_task(tmp_path, "local_sum", tmp_path / "none.jsonl")
    assert run(models["spm"][2], "--include-path", tmp_path, "--tasks", "gone,local_sums") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"sherry-gguf evaluate: --tasks local_sums: no such task in lm-eval or {tmp_path}; similar: local_sum")
    assert f"; cannot read {tmp_path}/sums.yaml: while parsing a flow sequence" in err and err.count("\n") == 1
