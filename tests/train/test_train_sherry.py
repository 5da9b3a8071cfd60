"""scripts/train_sherry.py as a user starts it: from a model and from a config, resumed, and with input that is wrong."""

import fcntl
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import small_models
import torch
import train_sherry
from conftest import sherry
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sherry_gguf import gguf_type, tq1_25
from sherry_gguf.qat import dataset, fake_quantize, models, run
from sherry_gguf.qat.arguments import SherryArguments
from sherry_gguf.qat.callbacks import Interrupt, duration
from sherry_gguf.qat.resume import last_checkpoint

pytestmark = pytest.mark.slow

gguf_type.register()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(12):
        lines = [f"    {rng.choice('abc')} = {rng.choice('xyz')} + {rng.randrange(10)}" for _ in range(150)]
        (folder / f"{i:02}.txt").write_text("\n".join(["def f(x, y, z):", *lines]))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return small_models.make(tmp_path_factory.mktemp("start") / "llama", "llama", latent=True)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(start: Path, text: Path, out: Path, **more) -> list[str]:
    settings = dict(model=start, train=text, output_dir=out, context=64, max_steps=6, per_device_train_batch_size=2,
                    learning_rate=1e-3, monitor_every=2, logging_steps=2, use_cpu=True, eval_tokens=512, report_to="none",
                    validation_share=0.2, arenas_peak=1) | more  # fmt: skip
    return [x for k, v in settings.items() if v is not None for x in (f"--{k}", *(v if isinstance(v, list) else [str(v)]))]


def test_from_a_model(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 0
    out, err = capfd.readouterr()
    hf = tmp_path / "run/hf"
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
    assert (tmp_path / "run/training.png").stat().st_size > 10_000
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ArenasCallback"]["args"]["arenas"]["peak"] == 1.0
    assert any("gradient_rank" in entry for entry in state["log_history"])
    # what a Trainer saved on the way is latent, and says so
    assert AutoConfig.from_pretrained(tmp_path / "run/checkpoint-6").sherry_config["weights"] == "latent"
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1
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
    """That of the model as it was given, and quantized; with the text's bytes a token, so that tokenizers compare."""
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
    """As many tokens, other ones: nothing fails, and the model guesses. One that is made from a config does so by nature."""
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
    """Dropout draws as it would have."""
    model = tmp_path / "model"
    shutil.copytree(start, model)
    small_models.edit_config(model, attention_dropout=0.2)
    assert train_sherry.main(flags(model, text, tmp_path / "with")) == 0
    real = run.before_training

    def draws(*args):  # as a model might whose evaluation is random
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


def test_time_that_is_left_is_said_once(start, text, tmp_path, capfd, monkeypatch):
    now = [0.0]

    def later():
        now[0] += 25  # more than twice a step: the Trainer looks as well
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


def test_tokenizer_is_in_the_result_and_in_checkpoints(start, text, tmp_path):
    """There each is needed: a checkpoint converts, and another training starts from it."""
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 0
    names = {"tokenizer.model", "tokenizer_config.json"}
    for directory in "hf", "checkpoint-6":
        assert names <= set(os.listdir(tmp_path / "run" / directory))
    assert not [name for name in os.listdir(tmp_path / "run") if "token" in name]
    assert train_sherry.main(flags(tmp_path / "run/checkpoint-6", text, tmp_path / "next")) == 0


def test_held_out_loss_is_that_of_the_export(start, text, tmp_path):
    validation = text / "03.txt"
    assert train_sherry.main(flags(start, text, tmp_path / "run", validation=validation, eval_tokens=1 << 20)) == 0
    hf = tmp_path / "run/hf"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = np.array([*tokenizer(validation.read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
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


def test_interrupted_run_goes_on_and_ends_the_same(start, text, tmp_path):
    steps = 100

    def command(out):
        return [sys.executable, train_sherry.__file__, *flags(start, text, tmp_path / out, max_steps=steps, save_steps=1000)]

    whole = subprocess.run(command("whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    for number in signal.SIGINT, signal.SIGHUP:  # Ctrl-C, and a terminal that is closed
        first = subprocess.Popen(command("cut"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.default_int_handler),
                                                     signal.signal(signal.SIGHUP, signal.SIG_DFL)))  # fmt: skip
        for line in first.stdout:
            if line.startswith("training:"):
                break
        time.sleep(0.7)
        first.send_signal(number)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
        assert not (tmp_path / "cut/hf").exists()
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 2
    settings = (tmp_path / "cut/settings.json").stat().st_mtime_ns
    # a checkpoint whose writing was cut off is passed over
    (tmp_path / "cut/checkpoint-9999").mkdir()

    second = subprocess.run(command("cut"), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "cut/settings.json").stat().st_mtime_ns == settings
    step = int(re.search(r"resuming from \S*checkpoint-(\d+)", second.stdout)[1])
    assert 0 < step < steps
    a, b = (load_file(tmp_path / d / "hf/model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(model=None), "give a model to start from"),
        (dict(train=None), "give text to train on"),
        (dict(train="/nowhere/at/all"), "/nowhere/at/all: no such file or directory"),
        (dict(model="/nowhere/at/all"), "/nowhere/at/all: "),
        (dict(context=4096), "--context 4096: the model's positions end at 256"),
        (dict(text_column="body", train="TABLE"), "t.jsonl: line 1 has no column 'body', only 'text'"),
        (dict(train="ONE"), "one document cannot be both trained on and held out"),
        (dict(train="EMPTY"), "has no files of text"),
        (dict(train="BROKEN"), "broken.jsonl: line 1: "),
        (dict(group_size=100), "100"),
        (dict(group_size=512), "multiple of 512"),
        (dict(arenas_end=0.05), "0 <= warmup < end <= 1"),
        (dict(arenas_peak=0, arenas_end=0.5), "--arenas_peak is 0, which trains without Arenas"),
        (dict(keep="."), "no linear layer to quantize"),
        (dict(keep="("), "unterminated"),
        (dict(monitor_every=1), "--monitor_every 1"),
        (dict(learning_rate=1e30), "the loss is not finite at step 4: training diverged"),
        (dict(context=1), "--context 1"),
        (dict(validation_share=1), "--validation_share 1.0"),
        (dict(eval_tokens=-5), "--eval_tokens -5"),
        (dict(max_steps=0, num_train_epochs=0), "nothing to train"),
        (dict(per_device_train_batch_size=0), "--per_device_train_batch_size 0: at least 1"),
        (dict(per_device_train_batch_size=999, dataloader_drop_last=True), "less than one batch"),
        (dict(optim="adamw_bnb_8bit"), "bitsandbytes"),
    ],
)
def test_wrong_input_says_what_is_wrong(start, text, tmp_path, capfd, more, says):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("\x00\x01 no table")
    (tmp_path / "empty").mkdir()
    places = {"TABLE": tmp_path / "t.jsonl", "ONE": text / "00.txt", "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken.jsonl"}
    more = {k: places.get(v, v) if isinstance(v, str) else v for k, v in more.items()}
    assert train_sherry.main(flags(start, text, tmp_path / "run", **more)) == 1
    error = capfd.readouterr().err
    assert says in error and "Traceback" not in error
    assert not (tmp_path / "run/hf").exists()


@pytest.mark.parametrize("more, says", [
    (dict(steps=5), "unrecognized arguments: --steps 5"),
    (dict(lr_scheduler_type="foo"), "foo"),
    (dict(load_best_model_at_end=True), "load_best_model_at_end requires the save and eval strategy to match"),
    (dict(context="long"), "argument --context: invalid int value: 'long'"),
    (dict(method="best"), "argument --method: invalid choice: 'best'"),
    (dict(fsdp="full_shard", fsdp_config="/nowhere/at/all"), "/nowhere/at/all"),
    (dict(bf16=True, use_cpu=False), "--bf16 true: PyTorch finds no GPU here; leave it out, or add --use_cpu true"),
])  # fmt: skip
def test_wrong_flags_are_one_line(start, text, tmp_path, capfd, monkeypatch, more, says):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        train_sherry.main(flags(start, text, tmp_path / "run", **more))
    out, error = capfd.readouterr()
    assert e.value.code == 2 and not out
    assert re.fullmatch(r"train_sherry\.py: .*\n", error) and says in error


@pytest.mark.parametrize("times, warned", [(30.0, True), (1.0, False)])
def test_bf16_that_is_slow_on_this_cpu(start, text, tmp_path, capfd, monkeypatch, times, warned):
    monkeypatch.setattr(run, "bf16_time", lambda: times)
    assert train_sherry.main(flags(start, text, tmp_path / "run", bf16=True)) == 0
    warning = "warning: --bf16 true: on this CPU bfloat16 products take 30 times as long as float32: leave it out\n"
    assert (warning in capfd.readouterr().err) is warned
    assert train_sherry.main(flags(start, text, tmp_path / "float32")) == 0
    assert warning not in capfd.readouterr().err


def test_other_settings_and_foreign_directories(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "one")) == 0
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "two", arenas_peak=0.5)) == 1
    assert "begun with other settings (arenas_peak: 1.0 then, 0.5 now)" in capfd.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").write_text("precious")
    assert train_sherry.main(flags(start, text, tmp_path / "mine")) == 1
    assert "files that this program did not write" in capfd.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis"]
    (tmp_path / "run/settings.json").write_text("junk")
    assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / "two")) == 1
    assert "settings.json is damaged" in capfd.readouterr().err


def test_export_that_was_cut_off_is_made_again(start, text, tmp_path, capfd, monkeypatch):
    """Killed, or out of memory, between the export and its evaluation. Nothing is where the result will be until it is whole."""
    flags = functools.partial(globals()["flags"], lr_scheduler_type="constant")  # so that one more step would be seen
    weights = []

    def fails(model, rows, batch=None):
        if batch:  # before the first step
            return 0.0
        weights.append((tmp_path / "run/exporting/model.safetensors").read_bytes())
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(run, "mean_loss", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            train_sherry.main(flags(start, text, tmp_path / "run"))
        patch.setattr(run, "NO_SPACE", 1 << 60)  # the disk has less than this
        assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1
    assert "MB are free there (RuntimeError): make room" in capfd.readouterr().err
    assert not (tmp_path / "run/hf").exists()
    # what came to be there meanwhile is not ours
    (tmp_path / "run/hf").mkdir()
    (tmp_path / "run/hf/thesis").write_text("precious")
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1
    assert "already has something in it" in capfd.readouterr().err
    assert (tmp_path / "run/hf/thesis").read_text() == "precious"
    shutil.rmtree(tmp_path / "run/hf")

    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 0
    assert "resuming from" in capfd.readouterr().out
    # 6 steps, not one more, which the Trainer would take
    assert {(tmp_path / "run/hf/model.safetensors").read_bytes()} == set(weights)
    assert json.loads((tmp_path / "run/hf/training.json").read_text())["steps"] == 6
    assert not list((tmp_path / "run").glob("*exporting*"))
    assert train_sherry.main(flags(start, text, tmp_path / "run")) == 1  # complete now, so it is left alone


def test_places_where_nothing_can_be_exported(start, text, tmp_path, capfd, monkeypatch):
    """All of it is said before training, and whatever is there stays."""
    run = tmp_path / "runs/run"
    (tmp_path / "file").write_text("precious")
    for export, says in ((run, "that is for checkpoints"), (run.parent, "that is for checkpoints"), (run / "exporting", "that is for"),
                         (tmp_path / "file", "already has something in it"), (tmp_path / "file/hf", "nothing can be written there"),
                         ("/proc/hf", "nothing can be written there")):  # fmt: skip
        for _ in range(2):
            assert train_sherry.main(flags(start, text, run, export=export)) == 1
            out, error = capfd.readouterr()
            assert says in error and "Traceback" not in error and "training" not in out
        assert not (run / "checkpoint-6").exists()
    assert (tmp_path / "file").read_text() == "precious"
    assert train_sherry.main(flags(start, text, text / "run")) == 1
    assert "which is read as text" in capfd.readouterr().err and not (text / "run").exists()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert train_sherry.main(flags(start, text, run, export=".")) == 0
    assert (tmp_path / "empty/model.safetensors").is_file() and not list((tmp_path / "empty").glob("*part"))
    AutoModelForCausalLM.from_pretrained(".")


def test_what_it_cannot_go_on_from(start, text, tmp_path, capfd, monkeypatch):
    """A lost optimizer, other text, other noise: each would go on without a word, to another result."""
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    more = dict(max_steps=4, save_steps=2, save_total_limit=9, lr_scheduler_type="constant")

    def main(**changed):
        code = train_sherry.main(flags(start, folder, tmp_path / "run", **more | changed))
        return code, capfd.readouterr().err

    with monkeypatch.context() as patch:  # cut off in the third step
        patch.setattr(Interrupt, "on_step_end", lambda self, args, state, *_, **__: 1 // (state.global_step < 3) and None)
        with pytest.raises(ZeroDivisionError):
            train_sherry.main(flags(start, folder, tmp_path / "run", **more))
    last = tmp_path / "run/checkpoint-2"
    assert last_checkpoint(tmp_path / "run") == last
    code, error = main(neftune_noise_alpha=5)
    assert code == 1 and "begun with other settings (neftune_noise_alpha: None then, 5.0 now)" in error
    (folder / "more.txt").write_text("more of it " * 100)
    code, error = main()
    assert code == 1 and "begun with other settings (text: " in error
    (folder / "more.txt").unlink()
    for name in "optimizer.pt", "rng_state.pth":
        os.rename(last / name, tmp_path / name)
        code, error = main()
        assert code == 1 and f"checkpoint-2 has no {name}, so training cannot resume from it" in error
        os.rename(tmp_path / name, last / name)
    code, error = main(resume_from_checkpoint=tmp_path / "nowhere")
    assert code == 1 and "there is no complete checkpoint" in error and "remove" not in error
    with open(tmp_path / "run/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, error = main()
    assert code == 1 and "another run is training in" in error
    assert main()[0] == 0


def test_settings_that_failed_do_not_bind(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=start, distill=2)) == 1
    assert "distill is 2.0" in capfd.readouterr().err
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=start, distill=0.5)) == 0


def test_the_best_model_is_exported_again(start, text, tmp_path):
    more = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=6, learning_rate=0.3,
                save_total_limit=3, arenas_peak=0)  # fmt: skip
    for name in "one", "two":
        assert train_sherry.main(flags(start, text, tmp_path / "run", export=tmp_path / name, **more)) == 0
    best = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())["best_model_checkpoint"]
    assert not best.endswith("checkpoint-6")  # such a rate makes it worse and worse
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_generation_config_that_cannot_be_saved(start, text, tmp_path):
    """As Llama 2 has it."""
    model = tmp_path / "model"
    shutil.copytree(start, model)
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    assert train_sherry.main(flags(model, text, tmp_path / "run")) == 0
    saved = json.loads((tmp_path / "run/hf/generation_config.json").read_text())
    assert saved["temperature"] == 0.9 and saved["top_p"] == 0.6 and saved["do_sample"] is True


def test_models_that_are_not_whole(start, text, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(start, model)
    small_models.edit_weights(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert train_sherry.main(flags(model, text, tmp_path / "run")) == 1
    assert "lacks 1 of the model's tensors" in capfd.readouterr().err
    shutil.rmtree(model)
    shutil.copytree(start, model, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    assert train_sherry.main(flags(model, text, tmp_path / "run")) == 1
    assert "has no tokenizer: name its directory with --tokenizer" in capfd.readouterr().err
    other = small_models.make(tmp_path / "other", "gpt2", latent=True)
    assert train_sherry.main(flags(start, text, tmp_path / "run", teacher=other)) == 1
    assert "has another tokenizer" in capfd.readouterr().err


def test_names_of_special_tokens_are_text(start):
    import datasets

    tokenizer = models.load_tokenizer(str(start))
    texts = datasets.Dataset.from_dict({"text": ["a </s> b <s> c"] * 8})
    for special in False, True:
        s = SherryArguments(context=16, special_tokens=special)
        ids = np.array(dataset.blocks(texts, tokenizer, s)["input_ids"])[:, 1:]
        assert (tokenizer.bos_token_id in ids) is special


def test_two_processes(start, text, tmp_path):
    """Under torchrun, with accumulation: cut off, resumed, and exported by one of them; the other never finalizes Python."""
    (tmp_path / "sitecustomize.py").write_text(  # aborts every time where a thread of Gloo does by chance
        "import atexit, os\nif os.environ.get('RANK') == '1':\n    atexit.register(os.abort)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))

    def torchrun(*more):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "127.0.0.1:0",
            train_sherry.__file__,
            *flags(start, text, tmp_path / "run", ddp_backend="gloo", gradient_accumulation_steps=2, save_steps=3),
            *more,
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        )

    first = torchrun()
    assert first.returncode == 0, first.stderr[-3000:]
    assert "8 a step" in first.stdout and "2 processes on cpu" in first.stdout
    weights = load_file(tmp_path / "run/hf/model.safetensors")
    shutil.rmtree(tmp_path / "run/hf")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    second = torchrun()
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming from" in second.stdout and "checkpoint-3" in second.stdout
    again = load_file(tmp_path / "run/hf/model.safetensors")
    assert all(torch.equal(again[k], weights[k]) for k in weights)
    shutil.rmtree(tmp_path / "run/hf")
    # one process alone would take half as much a step
    assert train_sherry.main(flags(start, text, tmp_path / "run", gradient_accumulation_steps=2, save_steps=3)) == 1


def test_damaged_checkpoint_is_named(start, text, tmp_path, capfd):
    assert train_sherry.main(flags(start, text, tmp_path / "run", max_steps=6, export=tmp_path / "one")) == 0
    (tmp_path / "run/checkpoint-6/optimizer.pt").write_bytes(b"junk")
    assert train_sherry.main(flags(start, text, tmp_path / "run", max_steps=6, export=tmp_path / "two")) == 1
    error = capfd.readouterr().err
    assert f"cannot resume from {tmp_path}/run/checkpoint-6" in error and "remove it to resume from an earlier one" in error


@pytest.mark.parametrize("granularity, group_size", [("per_group", 128), ("per_group", 256), ("per_channel", 128),
                                                     ("per_tensor", 128)])  # fmt: skip
def test_gguf_holds_what_training_computed(start, text, tmp_path, granularity, group_size):
    """The export converts bit for bit; and what the Trainer saved, latent weights, to the very same blocks."""
    # the model's feed-forward layer is no multiple of 256; what is kept, the checkpoint tells the converter
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
