"""scripts/studies/real_training.py at a tiny size: what it carries, pauses, and what it reports."""

import json
import lzma
import random
import time
from pathlib import Path

import numpy as np
import pytest
import real_training
import real_training_files as files
import real_training_report as reporting
import real_training_runs as real_runs
import small_models
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.errors import Stop
from sherry_gguf.evaluation import tasks as lm_tasks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
QUESTIONS = Path(__file__).parents[1] / "evaluate/eval_data"
SIZES = ("--context", "32", "--steps", "8", "--batch", "2", "--micro", "2", "--eval-blocks", "2", "--device", "cpu", "--float32")


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
    argv = ["prepare", "--source", source, "--data", data, "--work", work, "--tokens", 4000, "--held-out-tokens", 600, "--limit", 4]
    assert real_training.main([str(x) for x in argv]) == 0
    return work


def arguments(work: Path, *more: object) -> list[str]:
    return [str(x) for x in ("run", "--work", work, "--out", work / "out", *SIZES, "--methods", "absmean,sherry", "--seeds", 1, *more)]


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
        found = real_runs.accuracy(model, rows, 3, "cpu")
        assert found["acc"] == right / 4
    assert found["acc_stderr"] == 0


def test_a_paused_study_gives_the_same_result(prepared, tmp_path, capfd):
    """Each call trains a step or two and saves a checkpoint."""
    import shutil

    whole, paused = tmp_path / "whole", tmp_path / "paused"
    for work in whole, paused:
        shutil.copytree(prepared, work)
    assert real_training.main(arguments(whole)) == 0
    says = capfd.readouterr().out
    assert "the time is up" not in says
    original, calls = real_runs.deadline, []
    run = real_runs.template("sherry", real_training.parse(arguments(paused)))
    a = vars(real_training.parse(arguments(paused))) | {"device": "cpu", "machine": "here"}
    done = json.loads((whole / "runs.jsonl").read_text().splitlines()[-1])
    run = real_runs.Run(**done["run"])
    while len(calls) < 20:
        calls.append(time.time())
        try:
            result = real_runs.train(run, {k: str(v) if isinstance(v, Path) else v for k, v in a.items()} | {"deadline": time.time()})
            break
        except real_runs.Paused:
            continue
    assert original is real_runs.deadline and len(calls) == 8
    assert {k: v for k, v in result.items() if k not in ("seconds", "machine")} == {
        k: v for k, v in done.items() if k not in ("seconds", "machine")
    }
    assert not (paused / "checkpoints" / real_runs.slug(run)).exists()


def test_the_report(prepared, tmp_path, capfd):
    import shutil

    work = tmp_path / "work"
    shutil.copytree(prepared, work)
    assert real_training.main(arguments(work, "--minutes", 1e-6)) == 1  # nothing is complete
    assert "no run is complete" in capfd.readouterr().err
    assert real_training.main(arguments(work)) == 0
    results = [json.loads(line) for line in (work / "runs.jsonl").read_text().splitlines()]
    assert {r["run"]["seed"] for r in results} == {0, 1}
    table = (work / "out.md").read_text()
    assert "| absmean ternary |" in table and "| Sherry without Arenas |" in table and "rates only" not in table
    sherry = next(r for r in results if r["run"]["method"] == "sherry" and r["run"]["seed"] == 1)
    assert f"{sherry['report']:.4f}" in table and f"{sherry['before']:.3f}" in table
    assert [look["tokens"] for look in sherry["curve"]] == [n * 2 * 32 for n in range(9)]
    assert (work / "out.png").stat().st_size > 5000
    for file in (work / "runs.jsonl").read_text(), (work / "out.json").read_text():
        assert '"piqa"' in file
    only = [r for r in results if not r["run"]["seed"]]
    assert "rates only" in reporting.table(only, next(iter(reporting.by_shape(only))), reporting.best(only))


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
