"""scripts/studies/compare_finetuning.py at a tiny size: it counts outliers rightly, resumes, and reports what it ran."""

import json
import random
import re

import compare_finetuning
import finetune_runs
import pytest
import quaff_models
import small_models
import study_runs
import torch
import transformers

from sherry_gguf import quaff
from sherry_gguf.quaff.channels import linear_layers

WORDS = "iron water salt air sun plant root stone light heat".split()
ARGUMENTS = ["--steps", "3", "--warmup", "1", "--batch", "2", "--seeds", "2", "--calibration", "6", "--held-out", "3", "--test-questions",
             "4", "--jobs", "1", "--methods", "full,quaff,tq1_25-naive", "--outliers", "3:0.05,100:0.05"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for split in "train", "dev", "test":
        rows = []
        for _ in range(12):
            choices = rng.sample(WORDS, 4)
            rows.append({"question": f"What goes with {rng.choice(WORDS)}?", "choices": {"text": choices, "label": list("ABCD")},
                         "answerKey": rng.choice("ABCD")})  # fmt: skip
        (folder / f"arc_easy.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "books.train.jsonl").write_text(json.dumps({"title": "one", "text": " ".join(rng.choices(WORDS, k=3000))}) + "\n")
    return folder


def test_labels_are_the_answers(data, tmp_path):
    small_models.save_tokenizer(tmp_path, "bpe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = finetune_runs.questions(data, "train", 5)
    assert rows != finetune_runs.questions(data, "train", 5, seed=1)
    for row, example in zip(rows, finetune_runs.encoded(tokenizer, rows)):
        labelled = [i for i in example["labels"] if i != -100]
        assert tokenizer.decode(labelled) == f" {row['choices']['text']['ABCD'.index(row['answerKey'])]}"
        assert tokenizer.decode(example["input_ids"]).endswith(f"Question: {row['question']}\nAnswer:{tokenizer.decode(labelled)}")
        assert len(example["labels"]) == len(example["input_ids"]) == len(example["attention_mask"])


def test_calibrates_as_quaff_does():
    model, pairs = quaff_models.llama(), [(5.0, 0.1), (20.0, 0.1), (5.0, 0.2)]
    for (threshold, budget), found in finetune_runs.calibrations(model, list(quaff_models.batches()), pairs).items():
        wanted = quaff.calibrate(model, quaff_models.batches(), threshold=threshold, budget=budget)
        for name, channels in wanted.channels.items():
            assert torch.equal(found.channels[name], channels) and torch.equal(found.maxima[name], wanted.maxima[name])
        assert any(len(channels) for channels in found.channels.values())


def test_counts_what_fires_in_calibrated_channels():
    """Of the outlier channels 5 and 40 of the first norm, calibration knew 40; padding counts nowhere."""
    model = quaff_models.llama()
    layers = linear_layers(model)
    found = quaff.Channels({name: torch.tensor([40] if "q_proj" in name else []).long() for name in layers}, {})
    watch = finetune_runs.Watch(model, layers, {(6.0, 0.1): found}, steps=1)
    batch = next(quaff_models.batches(1))
    batch["attention_mask"][:, 6:] = 0
    state = transformers.TrainerState(global_step=0)
    watch.on_step_begin(None, state, None)
    inputs = []
    handle = layers["model.layers.1.self_attn.q_proj"].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().abs()))
    model(**batch)
    handle.remove()
    watch.on_step_end(None, state, None)
    x = inputs[0][:, :6].reshape(-1, quaff_models.SIZE)
    fires = x > 6 * x.mean()
    names = list(layers)
    counted = watch.looks[0]["fired"][0][names.index("model.layers.1.self_attn.q_proj")]
    assert counted == [int(fires.sum()), int(fires[:, 40].sum()), int(fires.any(0).sum()), int(fires[:, 40].any())]
    assert 0 < counted[1] < counted[0]
    model(**batch)  # between two looks
    watch.on_step_end(None, state, None)
    assert len(watch.looks) == 1


def test_layer_errors():
    """Quaff's layers with channels for the outliers lose less than naive ones; without channels they are the same."""
    model = quaff_models.llama()
    layers = linear_layers(model)
    none = quaff.Channels({name: torch.tensor([]).long() for name in layers}, {n: torch.ones(x.in_features) for n, x in layers.items()})
    found = quaff.calibrate(model, quaff_models.batches(), threshold=5, budget=0.1)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    errors = finetune_runs.layer_errors(model, next(quaff_models.batches(1, seed=1)), [none, found])
    assert errors["quaff"] == errors["naive"]
    assert 3 * errors["quaff-more"]["q_proj"] < errors["naive"]["q_proj"] < 0.2
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items()) and linear_layers(model) == layers


def test_hit_rates():
    looks = [
        {"step": 1, "fired": [[[4, 4, 1, 1], [0, 0, 0, 0], [6, 3, 3, 1]]]},
        {"step": 2, "fired": [[[0, 0, 0, 0], [0, 0, 0, 0], [10, 1, 5, 1]]]},
    ]
    hit = finetune_runs.hit_rates({"names": ["m.0.q_proj", "m.0.o_proj", "m.1.down_proj"], "looks": looks}, 0)
    assert (hit["layers"], hit["of"], hit["fired"]) == (2, 3, 4.5)
    assert (hit["elements"], hit["channels"]) == (0.4, pytest.approx(3 / 9))
    assert hit["kinds"] == {"q_proj": 1.0, "o_proj": None, "down_proj": 0.25} and hit["depths"] == {0: 1.0, 1: 0.25}
    assert hit["steps"] == {1: 0.7, 2: 0.1} and hit["kinds_fired"] == {"q_proj": 1, "o_proj": 0, "down_proj": 1}


def test_wrong_arguments(tmp_path, data, capsys):
    given = ["--model", str(tmp_path), "--data", str(data), "--work", str(tmp_path / "work")]
    for wrong, says in [(["--methods", "full,lora"], "--methods full,lora: choose from full, quaff"),
                        (["--steps", "0"], "--steps 0: at least 1"),
                        (["--outliers", "100"], "--outliers 100: "),
                        (["--outliers", "100:2"], "--outliers 100:2: each a threshold above 0")]:  # fmt: skip
        with pytest.raises(SystemExit):
            compare_finetuning.main([*given, *wrong])
        assert says in capsys.readouterr().err
    assert compare_finetuning.main([*given, "--held-out", "7"]) == 1
    assert "has 12 questions for dev, of 14: lower --held-out" in capsys.readouterr().err
    given[3] = str(tmp_path)
    assert compare_finetuning.main(given) == 1
    assert "has no file arc_easy.dev.jsonl" in capsys.readouterr().err
    (tmp_path / "arc_easy.dev.jsonl").write_text('{"question": "why"}\n')
    assert compare_finetuning.main(given) == 1
    assert "arc_easy.dev.jsonl: not questions of ARC: KeyError" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_resumes_and_reports(tmp_path, data, monkeypatch, capfd):
    monkeypatch.setattr(study_runs, "EXTEND", 0)
    model = small_models.make(tmp_path / "model", "llama-64", dtype=torch.float32)
    arguments = ["--model", str(model), "--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), *ARGUMENTS]
    assert compare_finetuning.main(arguments) == 0
    capfd.readouterr()
    log = tmp_path / "work/runs.jsonl"
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(runs) == 3 * (3 + 2 + 1)  # rates, seeds, before
    results, text = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    for method, row in results["methods"].items():
        of_method = [r for r in runs if r["run"]["method"] == method]
        swept = {r["run"]["lr"]: r["choice"] for r in of_method if r["run"]["steps"] and not r["run"]["seed"]}
        assert row["lr"] == min(swept, key=swept.get)
        assert row["report"] == [r["report"] for seed in (1, 2) for r in of_method if r["run"]["seed"] == seed]
        assert row["before"]["report"] == next(r["report"] for r in of_method if not r["run"]["steps"])
        assert f"| {finetune_runs.METHODS[method].label} | {row['lr']:g} (at the edge)" in text or not row["open"]
    full, quaffed = results["methods"]["full"], results["methods"]["quaff"]
    assert full["before"]["report"] == pytest.approx(quaffed["before"]["report"], rel=0.01)
    assert full["before"]["report"] != full["report"][0] != full["report"][1] != quaffed["report"][1]
    gradients = {"gradients", finetune_runs.FLOAT_BACKWARD}
    for m, of_kind in results["errors"].items():
        assert gradients & of_kind.keys() == (gradients if finetune_runs.METHODS[m].method in ("quaff", "naive") else {"gradients"})
        assert all(0 < error < (0.5 if kind in gradients else 0.1) for kind, error in of_kind.items()), of_kind
    assert set(results["calibration"]) == {"arc_easy", "books"}
    fired, none = results["hits"]["quaff"]
    assert fired["layers"] and none["layers"] == 0 and none["elements"] is None  # nothing is 100 times the mean
    assert (tmp_path / "out.png").stat().st_size > 20_000
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + lines[-1][:50])
    assert compare_finetuning.main(arguments) == 0
    out = capfd.readouterr().out
    assert "damaged; that run is repeated" in out and len(re.findall(r"^  \d of \d: ", out, re.M)) == 1
    assert json.loads((tmp_path / "out.json").read_text())["methods"] == results["methods"]  # the same run gives the same figures
    assert compare_finetuning.main([*arguments, "--batch", "3"]) == 1
    assert "begun with other settings (batch: 2 then, 3 now)" in capfd.readouterr().err
