"""`sherry-gguf calibrate` when something is wrong: models it cannot do, damaged work, a full disk, training that makes it worse."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import small_models
import torch
from conftest import sherry
from test_calibrate import CONTEXT, arguments, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf.calibration import command, layers, training
from sherry_gguf.calibration import run as running
from sherry_gguf.errors import Stop

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("model") / "llama", "llama", latent=True)


def saved(folder, model, tokens_of):
    """A model with a tokenizer, as a directory."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokens_of).save_pretrained(folder)
    return folder


def other(kind, model, folder, **more):
    return saved(folder, tiny(kind, vocab_size=AutoModelForCausalLM.from_pretrained(model).config.vocab_size, **more), model)


# ---- kinds of models ----


@pytest.mark.parametrize("name, more", [
    ("mixtral", ["--train", "weights"]), ("gpt2", ["--steps", 16]), ("smollm2", ["--group-size", "64"]), ("gemma2", []),
    ("llama", ["--keep", "mlp", "--steps", 0]), ("llama", ["--start", "rounding", "--bf16", "true"]),
])  # fmt: skip
def test_other_models(name, more, text, tmp_path, capfd):
    """Experts; Conv1D; tied embeddings and groups of 64; layers that are kept; bfloat16. The result converts exactly."""
    source = small_models.make(tmp_path / name, name, latent=True)
    assert command.main(arguments(source, text, tmp_path / "hf", "--distill-rate", 0.002, *more)) == 0, capfd.readouterr().err
    done = sherry("convert", tmp_path / "hf", "--require-exact", "--no-tokenizer-check", "--outfile", tmp_path / "a.gguf",
                  *(["--tokenizer-pre", "gpt-2"] if small_models.MODELS[name][1] == "bpe" else []))  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--keep" in more:
        before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (source, tmp_path / "hf"))
        found = json.loads((tmp_path / "hf" / running.REPORT).read_text())["layers"]
        assert len(found) == before.config.num_hidden_layers
        assert re.search("mlp.*kept|kept.*mlp", (tmp_path / "hf" / "config.json").read_text(), re.S)
        assert len(after.model.layers[0].mlp.up_proj.weight.unique()) > 1000


@pytest.mark.parametrize("train", ["scales", "weights"])
def test_other_matrices_are_left_alone(text, tmp_path, train):
    """Routers, and layers that are kept."""
    source = small_models.make(tmp_path / "moe", "mixtral", latent=True)
    assert command.main(arguments(source, text, tmp_path / "hf", "--keep", "o_proj", "--train", train, "--distill-rate", 0.002)) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in (source, tmp_path / "hf"))
    for name, p in before.items():
        if "gate.weight" in name or "o_proj" in name:
            assert torch.equal(p.half(), after[name].half()), name
        if name.endswith("layernorm.weight"):
            assert not torch.equal(p.half(), after[name].half()), name


def test_models_that_cannot_be_calibrated(model, text, tmp_path, capfd):
    def says(source, *more):
        assert command.main(arguments(source, text, tmp_path / "hf", *more)) == 1
        assert not (tmp_path / "hf").exists()
        return capfd.readouterr().err

    latent = small_models.make(tmp_path / "latent", "llama", latent=True)
    config = json.loads((latent / "config.json").read_text())
    (latent / "config.json").write_text(json.dumps(config | {"sherry_config": {"weights": "latent"}}))
    assert "holds latent weights" in says(latent)
    assert "no such file or directory" in says(tmp_path / "nowhere")
    scaled = other("granite", model, tmp_path / "granite", logits_scaling=8.0)
    assert "what it computes after its last layer is not known here, so --steps and --generated cannot be used" in says(scaled)
    assert "cannot be used" in says(scaled, "--steps", 0, "--generated", 0.5)
    experts = other("gpt_oss", model, tmp_path / "oss", num_local_experts=2, num_experts_per_tok=1)
    assert re.search(r"GptOssForCausalLM: model.layers.0.mlp.experts.\w+ holds the matrices of several experts", says(experts))
    states = other("falcon_h1", model, tmp_path / "h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
                   mamba_chunk_size=16)  # fmt: skip
    assert "FalconH1ForCausalLM keeps a state besides keys and values, so it cannot write text here" in says(states, "--generated", 0.5)
    err = says(small_models.make(tmp_path / "s", "smollm2", latent=True), "--group-size", 128)
    assert "--group-size auto" in err and "--group-size 64" in err and "--group_size" not in err


def test_layers_that_are_not_all():
    """What a model does between its layers cannot be seen from one layer."""
    model = tiny("llama")
    layers.calls(model, CONTEXT)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(Stop, match="does more between its 3 layers than call one after the other"):
        layers.calls(model, CONTEXT)


# ---- training that makes it worse ----


def test_a_layer_keeps_the_best_it_had(model, text, tmp_path, capfd):
    assert command.main(arguments(model, text, tmp_path / "hf", "--rate", 1000, "--steps", 0)) == 0
    assert "; kept feedback (" in (says := capfd.readouterr().out) or "; kept rounded (" in says
    for record in json.loads((tmp_path / "hf" / running.REPORT).read_text())["layers"]:
        assert record["errors"][record["kept"]] == min(v for v in record["errors"].values() if v == v)


def test_a_distillation_that_fails(model, text, tmp_path, capfd):
    argv = arguments(model, text, tmp_path / "hf", "--passes", 0, "--train", "weights")
    assert command.main([*argv, "--distill-rate", "100"]) == 1
    says = capfd.readouterr().err
    assert re.search("the distillation made it worse: KL divergence from full precision .* Use a smaller --distill-rate", says), says
    (tmp_path / "hf.work" / running.DISTILLED).unlink()
    assert command.main(argv) == 0


# ---- damaged work ----


@pytest.fixture
def half(model, text, tmp_path, monkeypatch):
    """A run that ended after its first layer: its arguments and --work."""
    train, calls = training.Task.train, []

    def once(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(self, *args)

    argv = arguments(model, text, tmp_path / "hf")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training.Task, "train", once)
        command.main(argv)
    return argv, tmp_path / "hf.work"


def test_lost_states(half, capfd):
    argv, work = half
    for path in work.glob("*.states"):
        path.unlink()
    assert command.main(argv) == 1
    assert "lacks the hidden states before layer 2" in capfd.readouterr().err


def test_states_that_were_cut_off(half, capfd):
    argv, work = half
    path = work / "quantized-001.states"
    size = path.stat().st_size
    with open(path, "r+b") as f:
        f.truncate(1000)
    assert command.main(argv) == 1
    assert f"{path} is damaged: it has 1000 bytes, not {size}" in capfd.readouterr().err


@pytest.mark.parametrize("name, content", [
    (running.RECORD, "{"), (running.SETTINGS, "[1]"), ("layer-000.safetensors", "x"),
])  # fmt: skip
def test_other_files_that_are_damaged(half, name, content, capfd):
    argv, work = half
    (work / name).write_text(content)
    assert command.main(argv) == 1
    assert re.search(rf"{name} is damaged .*: remove {work} to start over", capfd.readouterr().err)


def test_another_model_in_the_same_place(model, text, tmp_path, capfd):
    source = shutil.copytree(model, tmp_path / "source")
    assert command.main(arguments(source, text, tmp_path / "hf", "--steps", 0)) == 0
    weights = safetensors.torch.load_file(source / "model.safetensors")
    weights["model.norm.weight"] *= 2
    safetensors.torch.save_file(weights, source / "model.safetensors", {"format": "pt"})
    assert command.main(arguments(source, text, tmp_path / "b", "--work", tmp_path / "hf.work", "--steps", 0)) == 1
    assert "was begun with other settings (weights: " in capfd.readouterr().err


def test_a_wrong_flag_leaves_nothing_behind(model, text, tmp_path):
    assert command.main(arguments(model, text, tmp_path / "hf", "--keep", "(")) == 1
    assert command.main(arguments(model, text, tmp_path / "hf", "--steps", 0, "--passes", 0)) == 0


@pytest.mark.parametrize("flag", ["--output", "--work"])
def test_results_in_the_text(model, text, tmp_path, capfd, flag):
    """The next run would read them."""
    shutil.copytree(text, tmp_path / "text")
    more = ["--work", tmp_path / "text" / "work"] if flag == "--work" else ["--work", tmp_path / "work"]
    out = tmp_path / "hf" if flag == "--work" else tmp_path / "text" / "hf"
    assert command.main(arguments(model, tmp_path / "text", out, *more)) == 1
    assert re.search(rf"{flag} .* is in {tmp_path / 'text'}, which is read as text", capfd.readouterr().err)


def test_empty_text(model, tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    assert command.main(arguments(model, tmp_path / "a.jsonl", tmp_path / "hf")) == 1
    assert "a.jsonl" in capfd.readouterr().err


def test_a_full_disk(model, text, tmp_path):
    """In a process of its own, with a limit on the size of files: mapped states end a process that the disk has no room for."""
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "from sherry_gguf.calibration.command import main; sys.exit(main(sys.argv[1:]))")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(model, text, tmp_path / "hf")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "MiB are needed" in done.stderr and "full-000.states" in done.stderr, done.stderr
    assert not list((tmp_path / "hf.work").glob("*.states")) and command.main(arguments(model, text, tmp_path / "hf")) == 0


def test_one_sequence_for_the_distillation(model, tmp_path, capfd):
    argv = [str(x) for x in (model, "--output", tmp_path / "hf", "--generated", 1, "--tokens", 4 * CONTEXT, "--context", CONTEXT,
                             "--passes", 0, "--steps", 1, "--distill-batch", 1, "--device", "cpu")]  # fmt: skip
    assert command.main(argv) == 0, capfd.readouterr().err
