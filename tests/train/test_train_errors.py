"""The training command with wrong input: it says what is wrong, in one line, and harms nothing."""

import re
import shutil

import pytest
import small_models
import torch
import train_sherry
from training_runs import flags
from transformers import AutoModelForCausalLM

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


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
    (dict(group_size="small"), "--group_size/--group-size: 'small' is neither a number nor auto"),
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


def test_unusable_export_directories(start, text, tmp_path, capfd, monkeypatch):
    """Each is reported before training, and existing files stay."""
    run = tmp_path / "runs/run"
    (tmp_path / "file").write_text("precious")
    for export, says in ((run, "keeps its own files"), (run.parent, "keeps its own files"), (run / "exporting", "keeps its own files"),
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


def test_incomplete_models(start, text, tmp_path, capfd):
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
