"""scripts/studies/real_models.py with a tiny model: what is made and measured again, what it says, and its table."""

import json
import lzma
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import real_data
import real_files
import real_models
import small_models
import yaml
from conftest import upstream_f32
from real_models_report import table

from sherry_gguf.errors import Stop
from sherry_gguf.evaluation.tasks import EXAMPLES
from sherry_gguf.training.files import locked

QUESTIONS = Path(__file__).parents[1] / "evaluate/eval_data"
LABELS = "F16", "TQ1_25", "TQ1_25, matrix"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A --work with a model's files, and beside it two calibrated directories of the same sizes."""
    root = tmp_path_factory.mktemp("tiny")
    folder = root / "work" / "tiny"
    small_models.make(folder / "hf", "llama", latent=True)
    upstream_f32(folder / "hf", folder / "F16.gguf", "--outtype", "f16")
    (folder / "source.gguf").touch()
    for seed in 1, 2:
        small_models.make(root / f"calibrated-{seed}", "llama", seed=seed)
    return root


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """--data, with another text than WikiText-2."""
    folder, text = tmp_path / "data", small_models.corpus()[:9000].encode()
    folder.mkdir()
    (folder / real_data.WIKI).write_bytes(lzma.compress(text))
    monkeypatch.setattr(real_data, "WIKI_SHA256", real_data.sha256(text))
    with lzma.open(folder / real_data.BOOKS, "wt") as f:
        f.write(json.dumps({"text": small_models.corpus()[:9000]}) + "\n")
    for path in QUESTIONS.glob("*.jsonl"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def study(tiny, data, monkeypatch):
    """The study's arguments in --work; the models' own files are shared."""
    work = data.parent / "work"
    (work / "tiny").mkdir(parents=True)
    for path in (tiny / "work" / "tiny").iterdir():
        (work / "tiny" / path.name).symlink_to(path)
    model = real_files.Model("tiny", "its own license", {}, "source.gguf", "", ("TERMS",))
    monkeypatch.setitem(real_models.MODELS, "gemma", model)
    monkeypatch.setattr(real_models, "RUNS", {label: real_models.RUNS[label] for label in LABELS})
    monkeypatch.setattr(real_models, "MATRIX_TEXT", 6000)

    def arguments(*more: object) -> list[str]:
        fixed = ("--data", data, "--work", work, "--out", work / "out-1.5", "--context", 64, "--chunks", 2, "--threads", 1, "--no-speed")
        return [str(x) for x in (*fixed, *more)]

    return arguments


def fake(file: Path, text: Path, a) -> dict:
    """Results that depend on the file's bytes, without measuring."""
    nats = int(real_data.sha256(file.read_bytes())[:4], 16) / 1e4
    return {"text": {"nats": nats, "perplexity": 2.0, "chunks": 2, "scored": 62}, "tasks": {}}


@pytest.mark.slow
def test_what_has_changed_is_made_and_measured_again(study, tiny, capfd, monkeypatch):
    monkeypatch.setattr(real_models, "evaluate", fake)

    def measured(*more: object) -> tuple[list[str], dict[str, float]]:
        assert real_models.main(study("--tasks", "", *more)) == 0, capfd.readouterr()
        said = capfd.readouterr().out
        assert f"tiny: its own license, see {work}/tiny/TERMS\n" in said
        assert re.search(r"hf does: 9,000 characters compared, \d\.\d\d bytes a token\n", said)
        rows = json.loads((work / "out-1.5.json").read_text())["rows"]
        return re.findall(r"measuring (.*)\n", said), {row["label"]: row["text"]["nats"] for row in rows}

    work = Path(study()[study().index("--work") + 1])
    labels, first = measured("--calibrated", f"C={tiny}/calibrated-1")
    assert labels == [*LABELS, "C"] == list(first) and len(set(first.values())) == 4
    assert measured("--calibrated", f"C={tiny}/calibrated-1") == ([], first)
    (work / "tiny" / "part.gguf").write_text("left by an interruption")
    labels, second = measured("--calibrated", f"C={tiny}/calibrated-2")  # of the same size, under the same label
    assert labels == ["C"] and second != first and second | {"C": first["C"]} == first
    assert measured("--calibrated", f"C={tiny}/calibrated-1") == (["C"], first)
    assert (work / "out-1.5.md").read_text().startswith("tiny, WikiText-2 by 2 chunks of 64 tokens")

    books = Path(study()[1]) / real_data.BOOKS
    with lzma.open(books, "wt") as f:
        f.write(json.dumps({"text": small_models.corpus()[20000:29000]}) + "\n")
    labels, third = measured()
    assert labels == ["TQ1_25, matrix"] == [label for label in LABELS if third[label] != first[label]]
    os.utime(work / "tiny" / "F16.gguf")  # through the link; all is made of it
    assert measured()[0] == list(LABELS)
    assert measured("--context", "32")[0] == list(LABELS)


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes(study, capfd, monkeypatch):
    monkeypatch.setattr(real_models, "RUNS", {"F16": real_models.RUNS["F16"]})
    argv = study("--tasks", "arc_easy,piqa", "--limit", 3)
    folder = Path(argv[argv.index("--work") + 1]) / "tiny"
    report = folder / "F16.evaluated.json"

    def interrupt() -> None:
        while not (report.exists() and '"text": {' in report.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert real_models.main(argv) == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert said.endswith("real_models: interrupted; run the same command again to resume\n") and "F16.gguf: the text" in said
    assert not (folder / "F16.json").exists()
    first = json.loads(report.read_text())["models"][0]
    assert real_models.main(argv) == 0
    said = capfd.readouterr()
    assert "of an earlier run, with the same files and arguments" in said.err and "F16.gguf: the text" not in said.err
    row = json.loads((folder / "F16.json").read_text())
    assert row["text"] == first["text"] and list(row["tasks"]) == ["arc_easy", "piqa"] and "the first 3 documents of each task" in said.out
    assert not row["tasks"]["piqa"].keys() & {"choices", "tokens"}
    (Path(argv[1]) / "piqa.validation.jsonl").write_text("not JSON\n")
    assert real_models.main(argv) == 1
    assert "evaluate.py could not measure" in capfd.readouterr().err


@pytest.mark.slow
def test_other_tokens(tiny, tmp_path):
    """A tokenizer that puts no space in front of the text."""
    small_models.save_tokenizer(tmp_path, "spm-plain")
    with pytest.raises(Stop, match="DIFFERENT TOKENS: .*F16.gguf splits the text otherwise than"):
        real_files.check_tokens(tmp_path, tiny / "work/tiny/F16.gguf", "def f(x):\n    return x\n")


# ---- what is said ----


@pytest.fixture
def says(tmp_path, capfd):
    def failed(*argv: object) -> str:
        assert real_models.main([str(x) for x in (*argv, "--work", tmp_path / "w")]) == 1
        return capfd.readouterr().err

    return failed


def test_missing_data(data, says):
    """Before anything is fetched or made: what is missing, and where it is to be had."""
    everything = [*real_data.TEXTS, *(name for name, _ in real_data.TASKS.values())]
    said = says()
    assert said.startswith("real_models: name a --data DIR that has\n") and all(f"\n  {name}" in said for name in everything)
    assert "wikitext-2-raw-v1.zip" in said and "the data set baber/piqa" in said
    said = says("--data", data / "nowhere")
    assert f"--data {data / 'nowhere'}: no such directory. It needs\n" in said and all(f"\n  {name}" in said for name in everything)
    hellaswag = data / "hellaswag.validation.jsonl"
    hellaswag.unlink()
    said = says("--data", data)
    assert f"--data {data} lacks\n  hellaswag.validation.jsonl, or" in said and "the data set Rowan/hellaswag" in said
    assert said.count("\n") == 2
    hellaswag.with_name(f"{hellaswag.name}.xz").touch()
    real_data.check(data, [*real_data.TASKS, "a task of the user's"])


def test_the_tasks_files_are_those_of_the_examples():
    readme = (EXAMPLES / "README.md").read_text()
    for task, (name, source) in real_data.TASKS.items():
        config = re.sub("!function.*", "", (EXAMPLES / f"{task}.yaml").read_text())
        assert list(yaml.safe_load(config)["dataset_kwargs"]["data_files"].values()) == [name]
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{task}` | `{name}` |"))
        assert row.replace("`", "").endswith(f"| {source} |")


def test_another_text(data, tmp_path, monkeypatch):
    kept = real_data.wiki(data, tmp_path)
    assert kept.read_bytes() == small_models.corpus()[:9000].encode()
    kept.write_bytes(kept.read_bytes()[:100])  # as an interruption once left it
    assert len(real_data.wiki(data, tmp_path).read_bytes()) == 9000
    monkeypatch.setattr(real_data, "WIKI_SHA256", "0" * 64)
    with pytest.raises(Stop, match="is not WikiText-2's raw test set.* it must be 0000"):
        real_data.wiki(data, tmp_path)
    (data / real_data.WIKI).write_bytes(b"\xfd7zXZ")
    with pytest.raises(Stop, match="is damaged .*: copy it again"):
        real_data.wiki(data, tmp_path)


def test_wrong_calibrated_directories(data, tmp_path, says):
    for name in "a", "b":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert f"{data} is not a Hugging Face directory" in says("--data", data, "--calibrated", f"C={data}")
    assert "--calibrated C: write LABEL=DIR" in says("--data", data, "--calibrated", "C")
    for labels in ("C, 1", "C 1"), ("C", "TQ1_25"):
        said = says("--data", data, "--calibrated", f"{labels[0]}={tmp_path / 'a'}", f"{labels[1]}={tmp_path / 'b'}")
        assert f"--calibrated {labels[1]}={tmp_path / 'b'}: another row has this label" in said


def test_one_run_at_a_time(data, tmp_path, says):
    (tmp_path / "w").mkdir()
    with locked(tmp_path / "w", "--work"):
        assert "choose another --work" in says("--data", data)


def test_the_help_shows_no_empty_list(capsys):
    with pytest.raises(SystemExit):
        real_models.main(["--help"])
    assert "(default: [])" not in " ".join(capsys.readouterr().out.split())


def test_the_table():
    wanted = {"bytes": 3 << 20, "context": 512, "limit": 200}
    task = {"acc": 0.5, "acc_stderr": 0.035, "documents": 200}
    rows = [{"label": label, "wanted": wanted, "bits": bits, "text": {"perplexity": perplexity, "nats": 3.0, "chunks": 4, "scored": 1020},
             "tasks": {"piqa": task}} for label, bits, perplexity in (("F16", 16.0, 20.44), ("TQ1_25", 1.375, 72345678.0))]  # fmt: skip
    rounds = {"F16": {"tg32": [60.4, 75.0, 67.0], "pp512": [1e3, 3e3, 2e3]}, "TQ1_25": {"tg32": [143, 138, 141], "pp512": [9, 8, 7]}}
    results = {"model": "M", "rows": rows, "speeds": {"machine": "a CPU", "threads": 2, "rounds": rounds}}
    assert table(results) == (
        "M, WikiText-2 by 4 chunks of 512 tokens, 1020 of them scored; embeddings in Q8_0 but for F16; accuracies in percent with their "
        "standard errors, the first 200 documents of each task; tokens a second with 2 threads on a CPU, the median of 3 rounds and in "
        "brackets the slowest and the fastest.\n\n"
        "| layers' weights | bits | MiB | perplexity | nats/token | piqa | decode | prompt |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| F16 | 16.000 | 3 | 20.4 | 3.000 | 50.0 ± 3.5 | 67 (60–75) | 2000 (1000–3000) |\n"
        "| TQ1_25 | 1.375 | 3 | 7.2e+07 | 3.000 | 50.0 ± 3.5 | 141 (138–143) | 8 (7–9) |\n"
    )
    wanted["limit"] = 0
    assert "standard errors, all documents; tokens" in table(results)
    shown = table({"model": "M", "rows": [row | {"tasks": {}} for row in rows], "speeds": {}})
    assert "standard errors" not in shown and "\n| F16 | 16.000 | 3 | 20.4 | 3.000 |\n" in shown
