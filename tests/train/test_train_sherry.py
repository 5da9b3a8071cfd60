"""The training command as a user starts it: from a model and from a config; what it prints, and what is in the result."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import small_models
import torch
import train_sherry
from conftest import sherry
from safetensors.torch import load_file
from training_runs import flags
from transformers import AutoConfig, AutoModelForCausalLM

from sherry_gguf import gguf_type, tq1_25
from sherry_gguf.qat import fake_quantize, models, run
from sherry_gguf.qat import text as training_text
from sherry_gguf.qat.arguments import SherryArguments
from sherry_gguf.training import run as running
from sherry_gguf.training.callbacks import duration

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

gguf_type.register()


@pytest.fixture(scope="module")
def trained(start, text, tmp_path_factory):
    """A run that held out 03.txt: its flags, its directory, what it printed and what went to stderr."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    arguments = flags(start, text, directory, validation=text / "03.txt", eval_tokens=1 << 20)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert train_sherry.main(arguments) == 0
    return arguments, directory, out.getvalue(), err.getvalue()


def test_from_a_model(trained, capfd):
    arguments, directory, out, err = trained
    hf = directory / "hf"
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    assert model.config.sherry_config == {"method": "sparse_absmean", "granularity": "per_group", "group_size": 128, "n": 3,
                                          "m": 4, "weights": "fake_quantized"}  # fmt: skip
    matrices = {k: v for k, v in load_file(hf / "model.safetensors").items() if "_proj" in k}
    assert len(matrices) == 14 and f"{len(matrices)} matrices by sherry" in out
    for name, weight in matrices.items():
        assert tq1_25.is_exact(weight.numpy()).all(), name
    record = json.loads((hf / "training.json").read_text())
    assert record["steps"] == 6 and f"held-out loss {record['loss']['held_out']:.4f}" in out
    assert "λ" in err  # beside the progress bar
    assert (directory / "training.png").stat().st_size > 10_000
    state = json.loads((directory / "checkpoint-6/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ArenasCallback"]["args"]["arenas"]["peak"] == 1.0
    assert any("gradient_rank" in entry for entry in state["log_history"])
    # checkpoints hold latent weights, and say so
    assert AutoConfig.from_pretrained(directory / "checkpoint-6").sherry_config["weights"] == "latent"
    assert train_sherry.main(arguments) == 1
    assert "already has something in it" in capfd.readouterr().err


def test_from_a_config_and_a_table(start, text, tmp_path, capfd):
    table = tmp_path / "train.jsonl"
    table.write_text("".join(json.dumps({"body": p.read_text()}) + "\n" for p in sorted(text.iterdir())))
    more = dict(model=None, config=start, train=table, validation=text / "00.txt", text_column="body", method="absmean",
                arenas_peak=None, seed=3)  # fmt: skip
    losses = []
    for name in "a", "b":
        assert train_sherry.main(flags(start, text, tmp_path / name, **more)) == 0
        losses.append(json.loads((tmp_path / name / "hf/training.json").read_text())["loss"])
    assert losses[0] == losses[1]  # the same seed, the same weights
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "a/hf"), "sherry_config")
    out, err = capfd.readouterr()
    assert "14 matrices by absmean" in out and "λ" not in err  # Arenas is off unless it is asked for


@pytest.fixture(scope="module")
def learned(start, text, tmp_path_factory) -> Path:
    """A model that knows the text, in full precision."""
    out = tmp_path_factory.mktemp("learned")
    more = dict(method="full", max_steps=40, learning_rate=5e-3, arenas_peak=None, monitor_every=0)
    assert train_sherry.main(flags(start, text, out / "run", export=out / "hf", export_dtype="float32", **more)) == 0
    return out / "hf"


def test_loss_before_the_first_step(learned, text, tmp_path, capfd):
    """The loss of the model as given, and quantized; and bytes per token, which make tokenizers comparable."""
    more = dict(validation=text / "03.txt", eval_tokens=1 << 20)
    assert train_sherry.main(flags(learned, text, tmp_path / "run", **more)) == 0
    out, err = capfd.readouterr()
    record = json.loads((tmp_path / "run/hf/training.json").read_text())
    tokenizer = models.load_tokenizer(str(learned))
    train, held_out = ([p.read_text() for p in paths] for paths in (sorted(text.iterdir()), [text / "03.txt"]))
    for name, texts in ("train", train), ("held_out", held_out):
        tokens = [len(x) for x in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        assert record["bytes_per_token"][name] == pytest.approx(sum(len(t.encode()) for t in texts) / sum(tokens), rel=1e-9)
    said = record["bytes_per_token"]
    assert f"text: {said['train']:.2f} bytes per token in the training text, {said['held_out']:.2f} in the held-out text" in out

    ids = np.array([*tokenizer(held_out[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    rows = ids[: len(ids) // 63 * 63].reshape(-1, 63)
    rows = torch.from_numpy(np.concatenate([np.full((len(rows), 1), tokenizer.bos_token_id), rows], axis=1))
    model = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32).eval()
    before = record["before"]
    assert before["tokens"] == rows.numel()
    with torch.no_grad():
        assert before["full_precision"] == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-5)
        for name, weight in model.state_dict().items():
            if "_proj" in name:
                weight.copy_(fake_quantize(weight))
        assert before["quantized"] == pytest.approx(model(input_ids=rows, labels=rows).loss.item(), rel=1e-5)
    assert before["full_precision"] < before["quantized"] * 0.999  # a hundred times the tolerances above
    assert f"{before['full_precision']:.4f} as given, {before['quantized']:.4f} quantized by sherry" in out
    assert "warning" not in err


def test_model_and_tokenizer_that_do_not_belong_together(learned, start, text, tmp_path, capfd):
    """Another tokenizer of the same size: nothing fails, but the model guesses. A model made from a config always does."""
    other = tmp_path / "tokenizer"
    other.mkdir()
    small_models.save_tokenizer(other, "bpe")
    assert train_sherry.main(flags(learned, text, tmp_path / "run", tokenizer=other)) == 0
    err = capfd.readouterr().err
    assert re.search(rf"warning: before the first step {learned} has a held-out loss of \d+\.\d\d; guessing among its 512 "
                     rf"tokens would have 6.24. If the model is trained: is {other} its tokenizer", err)  # fmt: skip
    assert train_sherry.main(flags(start, text, tmp_path / "fresh", model=None, config=start, tokenizer=start)) == 0
    out, err = capfd.readouterr()
    assert "warning" not in err and "with random weights" in out
    assert train_sherry.main(flags(start, text, tmp_path / "random"), trained=False) == 0
    assert "warning" not in capfd.readouterr().err


def test_looking_before_the_first_step_changes_nothing(start, text, tmp_path, monkeypatch):
    """Dropout draws the same random numbers."""
    model = tmp_path / "model"
    shutil.copytree(start, model)
    small_models.edit_config(model, attention_dropout=0.2)
    assert train_sherry.main(flags(model, text, tmp_path / "with")) == 0
    real = run.before_training

    def draws(*args):  # like a model whose evaluation is random
        with monkeypatch.context() as patch:
            mean_loss = run.mean_loss
            patch.setattr(run, "mean_loss", lambda *a: torch.rand(7).sum().item() + mean_loss(*a))
            return real(*args)

    monkeypatch.setattr(run, "before_training", draws)
    assert train_sherry.main(flags(model, text, tmp_path / "draws")) == 0
    monkeypatch.setattr(run, "before_training", lambda *_: None)
    assert train_sherry.main(flags(model, text, tmp_path / "without")) == 0
    a, *others = ((tmp_path / d / "hf/model.safetensors").read_bytes() for d in ("without", "with", "draws"))
    assert all(a == b for b in others)


def test_remaining_time_is_printed_once(start, text, tmp_path, capfd, monkeypatch):
    now = [0.0]

    def later():
        now[0] += 25  # more than twice a step, as the Trainer asks too
        return now[0]

    monkeypatch.setattr("time.monotonic", later)
    assert train_sherry.main(flags(start, text, tmp_path / "run", max_steps=20)) == 0
    said = re.findall(r"^training: step (\d+) of 20, (\S+) s a step: about (\d+) (\w+) to go$", capfd.readouterr().out, re.M)
    assert len(said) == 1
    step, seconds, left, unit = int(said[0][0]), float(said[0][1]), int(said[0][2]), said[0][3]
    assert step * seconds >= 60 > (step - 1) * seconds - 25
    assert left == round((20 - step) * seconds / 60) and unit == "minutes"


@pytest.mark.parametrize("seconds, says", [(0, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"),
                                           (7200, "2 hours"), (200_000, "2 days")])  # fmt: skip
def test_duration(seconds, says):
    assert duration(seconds) == says


def test_tokenizer_is_in_the_result_and_in_checkpoints(trained, text, tmp_path):
    """Both need it: checkpoints can be converted, and training can start from them."""
    directory = trained[1]
    names = {"tokenizer.model", "tokenizer_config.json"}
    for name in "hf", "checkpoint-6":
        assert names <= set(os.listdir(directory / name))
    assert not [name for name in os.listdir(directory) if "token" in name]
    assert train_sherry.main(flags(directory / "checkpoint-6", text, tmp_path / "next")) == 0


def test_held_out_loss_is_that_of_the_export(trained, text):
    hf = trained[1] / "hf"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = np.array([*tokenizer((text / "03.txt").read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    blocks = ids[: len(ids) // 63 * 63].reshape(-1, 63)
    blocks = np.concatenate([np.full((len(blocks), 1), tokenizer.bos_token_id), blocks], axis=1)
    x = torch.from_numpy(blocks)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(x).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()
    assert json.loads((hf / "training.json").read_text())["loss"]["held_out"] == pytest.approx(loss, rel=1e-5)


def test_teacher(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=start, distill=1.0, arenas_peak=0)) == 0
    history = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())["log_history"]
    losses = [e["loss"] for e in history if "loss" in e]
    assert 0 < losses[-1] < losses[0] < 2  # nearer to the teacher than to the text


@pytest.mark.parametrize("times, warned", [(30.0, True), (1.0, False)])
def test_bf16_that_is_slow_on_this_cpu(start, text, tmp_path, capfd, monkeypatch, times, warned):
    monkeypatch.setattr(running, "bf16_time", lambda: times)
    assert train_sherry.main(flags(start, text, tmp_path / "run", bf16=True)) == 0
    warning = "warning: --bf16 true: on this CPU bfloat16 products take 30 times as long as float32: leave it out\n"
    assert (warning in capfd.readouterr().err) is warned
    if warned:
        assert train_sherry.main(flags(start, text, tmp_path / "float32")) == 0
        assert warning not in capfd.readouterr().err


def test_generation_config_that_cannot_be_saved(start, text, tmp_path):
    """Like that of Llama 2."""
    model = tmp_path / "model"
    shutil.copytree(start, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    assert train_sherry.main(flags(model, text, tmp_path / "run")) == 0
    saved = json.loads((tmp_path / "run/hf/generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and saved["top_p"] == 0.6 and saved["do_sample"] is True


def test_names_of_special_tokens_are_text(start):
    import datasets

    tokenizer = models.load_tokenizer(str(start))
    texts = datasets.Dataset.from_dict({"text": ["a </s> b <s> c"] * 8})
    for special in False, True:
        s = SherryArguments(context=16, special_tokens=special)
        ids = np.array(training_text.blocks(texts, tokenizer, s)["input_ids"])[:, 1:]
        assert (tokenizer.bos_token_id in ids) is special


@pytest.mark.parametrize("granularity, group_size", [("per_group", 128), ("per_group", 256), ("per_channel", 128),
                                                     ("per_tensor", 128)])  # fmt: skip
def test_gguf_holds_what_training_computed(start, text, tmp_path, granularity, group_size):
    """The export converts bit for bit, and the checkpoint with its latent weights to the same blocks."""
    # the feed-forward layer is not a multiple of 256; the checkpoint tells the converter what is kept
    more = dict(granularity=granularity, group_size=group_size, only="attn|up_proj", keep="layers.1.*up_proj")
    assert train_sherry.main(flags(start, text, tmp_path / "run", **more)) == 0
    files = {"hf": tmp_path / "hf.gguf", "checkpoint-6": tmp_path / "latent.gguf"}
    for directory, file in files.items():
        exact = ["--require-exact"] if directory == "hf" else []
        result = sherry("convert", tmp_path / "run" / directory, "--outfile", file, *exact)
        assert result.returncode == 0, result.stdout + result.stderr
        assert not result.stderr.startswith("gguf."), result.stderr  # upstream's own code has nothing to say
    result = sherry("verify", files["hf"], tmp_path / "run/hf")
    assert result.returncode == 0 and "9 TQ1_25 tensors bit for bit as in the checkpoint" in result.stdout
    a, b = ({t.name: t.data for t in gguf.GGUFReader(f).tensors if t.tensor_type == tq1_25.TYPE_ID} for f in files.values())
    assert len(a) == 9 and a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name
