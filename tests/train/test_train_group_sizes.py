"""The training command with groups of 64 and with layers of different group sizes: its result, resuming, going on from it, converting."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import small_models
import torch
import train_sherry
from conftest import pre, sherry
from safetensors.torch import load_file
from training_runs import flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf import gguf_type, tq1_25, tq1_25_64
from sherry_gguf.errors import Stop
from sherry_gguf.qat import QuantConfig, export, prepare
from sherry_gguf.training import run as running

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

gguf_type.register()

KINDS = {128: tq1_25.TYPE, 64: tq1_25_64.TYPE}
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
SHAPE = dict(hidden_size=64 * 3, num_attention_heads=3, num_key_value_heads=1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A model whose down projections have whole rows of 128; the other rows are a multiple of 64."""
    return small_models.make(tmp_path_factory.mktemp("mixed") / "llama", "llama", latent=True, config=SHAPE | dict(intermediate_size=256))


@pytest.fixture(scope="module")
def trained(mixed, text, tmp_path_factory) -> Path:
    """A run on it with the default group size."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    assert train_sherry.main(flags(mixed, text, directory, max_steps=4, save_steps=2)) == 0
    return directory


def group_sizes(directory: Path) -> dict[str, int]:
    """The group size that config.json records for each matrix; its blocks hold an export exactly."""
    said = json.loads((directory / "config.json").read_text())["sherry_config"]
    found = {}
    for key, weight in load_file(directory / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            name = key.removesuffix(".weight")
            found[name] = said.get("group_sizes", {}).get(name, said["group_size"])
            assert KINDS[found[name]].is_exact(weight.float().numpy()).all() == (said["weights"] == "fake_quantized"), name
    assert len(found) == 14 and said.get("group_sizes", {}).keys() <= found.keys()
    return found


def test_result_and_checkpoints_record_each_layers_groups(trained):
    for name in "hf", "checkpoint-2", "checkpoint-4":
        sizes = group_sizes(trained / name)
        assert sizes == {name: 128 if name in DOWN else 64 for name in sizes}
    assert json.loads((trained / "settings.json").read_text())["group_size"] == "auto"
    history = json.loads((trained / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert any("flips" in entry for entry in history)


def test_groups_of_64_throughout(text, tmp_path, capfd):
    """Asked for, and by default where no row is a multiple of 128: the same result."""
    model = small_models.make(tmp_path / "model", "llama", latent=True, config=SHAPE | dict(intermediate_size=64 * 5))
    for name, size in ("asked", 64), ("default", None):
        assert train_sherry.main(flags(model, text, tmp_path / name, max_steps=2, group_size=size)) == 0
        assert "14 matrices by sherry (14 in groups of 64), sequences" in capfd.readouterr().out
        assert set(group_sizes(tmp_path / name / "hf").values()) == {64}
        assert "group_sizes" not in json.loads((tmp_path / name / "hf/config.json").read_text())["sherry_config"]
    assert (tmp_path / "asked/hf/model.safetensors").read_bytes() == (tmp_path / "default/hf/model.safetensors").read_bytes()


def test_resuming(trained, mixed, text, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("hf", "checkpoint-4"))
    same = dict(max_steps=4, save_steps=2)
    assert train_sherry.main(flags(mixed, text, tmp_path / "run", **same, group_size=64)) == 1
    assert "begun with other settings (group_size: auto then, 64 now)" in capfd.readouterr().err
    assert train_sherry.main(flags(mixed, text, tmp_path / "run", **same, group_size="auto")) == 0
    out = capfd.readouterr().out
    assert "checkpoint-2" in out and "14 matrices by sherry (12 in groups of 64)" in out
    a, b = (load_file(d / "hf/model.safetensors") for d in (trained, tmp_path / "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module", params=["hf", "checkpoint-4"])
def further(trained, text, tmp_path_factory, request) -> Path:
    """A run from that one's result or checkpoint, with a group size that the shapes alone would not give."""
    out = tmp_path_factory.mktemp("further")
    shutil.copytree(trained / request.param, out / "start")
    said = json.loads((out / "start/config.json").read_text())["sherry_config"]
    said["group_sizes"][DOWN[0]] = 64
    small_models.edit_config(out / "start", sherry_config=said)
    assert train_sherry.main(flags(out / "start", text, out / "run", max_steps=2)) == 0
    return out / "run"


def test_training_goes_on_in_the_same_groups(further):
    for name in "hf", "checkpoint-2":
        sizes = group_sizes(further / name)
        assert sizes == {name: 128 if name == DOWN[1] else 64 for name in sizes}


def test_rows_that_do_not_fit(mixed, text, tmp_path, capfd):
    assert train_sherry.main(flags(mixed, text, tmp_path / "run", group_size=128)) == 1
    error = capfd.readouterr().err
    assert "12 of 14 layers have inputs that are not a multiple of 128" in error and "192 inputs: model.layers.*.self_attn.q_proj" in error
    assert [line.split("  (")[0] for line in error.splitlines()[1:3]] == ["  --group_size auto", "  --group_size 64"]
    assert "  --keep '" in error and "Traceback" not in error


def test_groups_that_no_type_holds_are_warned_about_before_the_first_step(mixed, text, tmp_path, capfd, monkeypatch):
    def began(trainer, interrupt, checkpoint):
        raise Stop("training has begun")

    monkeypatch.setattr(running, "train", began)
    for size, warned in (32, True), (64, False):
        assert train_sherry.main(flags(mixed, text, tmp_path / str(size), group_size=size)) == 1
        out, error = capfd.readouterr()
        assert f"14 matrices by sherry (14 in groups of {size}), sequences" in out
        assert "training has begun" in error
        assert (f"warning: groups of {size}: neither TQ1_25 nor TQ1_25_64 can store these weights" in error) is warned, error


def convert(directory: Path, out: Path, *flags) -> dict[str, gguf.ReaderTensor]:
    """The ternary tensors of a checkpoint's GGUF, which `verify` finds right."""
    for result in sherry("convert", directory, "--outfile", out, *flags), sherry("verify", out, directory, *flags[1:]):
        assert result.returncode == 0, result.stdout + result.stderr
    return {t.name: t for t in gguf.GGUFReader(out).tensors if t.tensor_type in {kind.type_id for kind in KINDS.values()}}


def test_gguf_holds_what_training_computed(further, tmp_path):
    """The export converts bit for bit, and the checkpoint with its latent weights to the same blocks, each layer's in its type."""
    exact = convert(further / "hf", tmp_path / "hf.gguf", "--require-exact")
    latent = convert(further / "checkpoint-2", tmp_path / "latent.gguf")
    assert len(exact) == 14 and exact.keys() == latent.keys()
    for name, tensor in exact.items():
        assert tensor.tensor_type == latent[name].tensor_type == KINDS[128 if name == "blk.1.ffn_down.weight" else 64].type_id
        assert np.array_equal(tensor.data, latent[name].data), name


def test_gguf_of_groups_of_64_in_rows_of_128(mixed, tmp_path):
    """They do not fit TQ1_25, whose rows they have."""
    model = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
    prepare(model, QuantConfig(group_size=64))
    export(model, tmp_path / "hf", AutoTokenizer.from_pretrained(mixed))
    assert {t.tensor_type for t in convert(tmp_path / "hf", tmp_path / "hf.gguf", "--require-exact").values()} == {tq1_25_64.TYPE.type_id}


def test_gguf_of_experts(tmp_path):
    """Each expert is a layer in training; the GGUF stacks them."""
    start = small_models.make(tmp_path / "start", "qwen3moe", latent=True, config=dict(moe_intermediate_size=192))
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    prepare(model)
    export(model, tmp_path / "hf", AutoTokenizer.from_pretrained(start))
    found = convert(tmp_path / "hf", tmp_path / "hf.gguf", "--require-exact", *pre("qwen3moe"))
    assert {n.split(".")[2] for n, t in found.items() if t.tensor_type == tq1_25_64.TYPE.type_id} == {"ffn_down_exps"}
    assert len(found) == 2 * (4 + 3)
