import pytest
import torch
from quaff_models import batches, llama

from sherry_gguf.quaff import Channels, calibrate
from sherry_gguf.quaff.channels import budget_of, chosen, linear_layers


def test_channels_of_a_model_with_outliers():
    model = llama().train()
    found = calibrate(model, batches(), threshold=10, budget=0.07)
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert found.channels["model.layers.0.self_attn.q_proj"].tolist() == [5, 40]
    assert found.channels["model.layers.1.mlp.up_proj"].tolist() == [7]
    assert found.channels.keys() == linear_layers(model).keys() and "lm_head" not in found.channels
    assert found.settings == {"threshold": 10, "budget": 0.07, "budgets": {}, "batches": 3, "tokens": 144}
    assert found.maxima["model.layers.0.mlp.down_proj"].shape == (128,)


def test_counts_are_those_of_the_rule():
    """|x| > threshold * mean |x|, the mean over a batch's elements, summed over batches."""
    model = llama()
    seen = []
    name = "model.layers.0.self_attn.q_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    found = calibrate(model, batches(), threshold=3, budget=1)
    handle.remove()
    count = sum((x.abs() > 3 * x.abs().mean()).sum((0, 1)) for x in seen)
    assert found.channels[name].tolist() == count.nonzero().reshape(-1).tolist()
    assert (found.maxima[name] == torch.stack([x.abs().amax((0, 1)) for x in seen]).amax(0)).all()


def test_padding_counts_nowhere():
    model = llama()
    padded = []
    for batch in batches():
        filler = torch.randint(0, 97, (4, 8), generator=torch.Generator().manual_seed(9))
        ids = torch.cat([batch["input_ids"], filler], 1)
        mask = torch.cat([batch["attention_mask"], torch.zeros(4, 8, dtype=torch.int64)], 1)
        padded.append({"input_ids": ids, "attention_mask": mask})
    whole, found = calibrate(model, batches(), threshold=3, budget=0.2), calibrate(model, padded, threshold=3, budget=0.2)
    for name in whole.channels:
        assert (whole.channels[name] == found.channels[name]).all()
        assert torch.allclose(whole.maxima[name], found.maxima[name], rtol=1e-4)
    assert found.settings["tokens"] == 144


def test_the_highest_counts_within_the_budget():
    counts = torch.tensor([0, 5, 1, 5, 0, 7, 5])
    assert chosen(counts, 0).tolist() == []
    assert chosen(counts, 3).tolist() == [1, 3, 5]
    assert chosen(counts, 7).tolist() == [1, 2, 3, 5, 6]
    assert budget_of("a.q_proj", 576, 0.01, {}) == 4
    assert budget_of("a.q_proj", 399, 0.01, {}) == 0
    assert budget_of("a.down_proj", 1536, 0.01, {"down": 0.05, "proj": 0.5}) == 76


def test_saved_and_loaded(tmp_path):
    found = calibrate(llama(), batches(), threshold=10, budget=0.07)
    path = tmp_path / "channels.safetensors"
    found.save(path)
    loaded = Channels.load(path)
    assert loaded.settings == found.settings and loaded.channels.keys() == found.channels.keys()
    for name in found.channels:
        assert (loaded.channels[name] == found.channels[name]).all() and (loaded.maxima[name] == found.maxima[name]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["channels.safetensors"]


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Channels.load(tmp_path / "none")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ValueError, match="text: not a safetensors file"):
        Channels.load(tmp_path / "text")
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights: not a file of outlier channels"):
        Channels.load(tmp_path / "weights")


def test_wrong_arguments():
    model = llama()
    with pytest.raises(ValueError, match="no data to calibrate with"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="threshold 0: must be above 0"):
        calibrate(model, batches(), threshold=0)
    with pytest.raises(ValueError, match="a budget of 2: must be a share"):
        calibrate(model, batches(), budgets={"x": 2})
    with pytest.raises(ValueError, match="no layers to quantize"):
        calibrate(torch.nn.ReLU(), batches())
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = torch.inf
    with pytest.raises(ValueError, match="q_proj: its inputs are not finite"):
        calibrate(model, batches())
