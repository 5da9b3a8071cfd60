"""Groups of 64 and layers with different group sizes: what training computes, what the result records, and how training goes on from it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sherry_gguf import tq1_25, tq1_25_64
from sherry_gguf.qat import QuantConfig, QuantLinear, export, fake_quantize, prepare, quantized_layers, sparse_absmean
from sherry_gguf.qat.monitor import _ternary
from sherry_gguf.qat.quantizer import GROUP_SIZES

KINDS = {128: tq1_25.TYPE, 64: tq1_25_64.TYPE}
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def llama(hidden: int = 192, intermediate: int = 256, **more) -> LlamaForCausalLM:
    """Rows of 192 and `intermediate`: neither fits whole blocks of 128, or only the down projections do."""
    torch.manual_seed(0)
    settings = dict(vocab_size=64, num_hidden_layers=2, num_attention_heads=hidden // 64, num_key_value_heads=1) | more
    return LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, **settings))


def sizes(model) -> dict[str, int]:
    return {name: m.quant.group_size for name, m in quantized_layers(model).items()}


def recorded(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["sherry_config"]


def test_group_sizes_are_those_of_the_types():
    assert GROUP_SIZES == tuple(KINDS) == tuple(kind.size for kind in KINDS.values())


@pytest.mark.parametrize("size", KINDS)
def test_what_training_computes_is_what_the_type_holds(size):
    rng = np.random.default_rng(size)
    x = np.concatenate([rng.standard_normal((64, 640)) * 0.02, rng.integers(-2, 3, (64, 640)) * 0.01]).astype(np.float32)
    got, kind = sparse_absmean(torch.from_numpy(x), size).numpy(), KINDS[size]
    np.testing.assert_array_equal(got, kind.dequantize(kind.quantize(x)))
    assert kind.is_exact(got).all() and kind.quantize(got).tobytes() == kind.quantize(x).tobytes()
    assert tq1_25.is_exact(got).all() == (size == 128)
    assert tq1_25_64.TYPE.is_exact(got).all()


@pytest.mark.parametrize("intermediate, quant, size, others", [
    (256, QuantConfig(), 128, 64),  # 256 inputs: 128
    (320, QuantConfig(), 64, None),
    (256, QuantConfig(group_size=64), 64, None),
    (320, QuantConfig(group_size=64), 64, None),
])  # fmt: skip
def test_each_layer_has_its_group_size_and_the_result_records_it(tmp_path, intermediate, quant, size, others):
    model = llama(intermediate=intermediate).eval()
    names = prepare(model, quant)
    assert len(names) == 14
    want = {name: size if others is None or name in DOWN else others for name in names}
    assert sizes(model) == want
    entry = {"method": "sparse_absmean", "granularity": "per_group", "group_size": size, "n": 3, "m": 4}
    if others:
        entry["group_sizes"] = {name: others for name in names if name not in DOWN}
    model.save_pretrained(tmp_path / "latent")
    export(model, tmp_path / "out", dtype=torch.float32)
    assert recorded(tmp_path / "latent") == entry | {"weights": "latent"}
    assert recorded(tmp_path / "out") == entry | {"weights": "fake_quantized"}

    latent, out = (AutoModelForCausalLM.from_pretrained(tmp_path / d) for d in ("latent", "out"))
    for name in names:
        weight, kind = out.get_submodule(name).weight.detach().numpy(), KINDS[want[name]]
        assert kind.is_exact(weight).all(), name
        np.testing.assert_array_equal(weight, kind.dequantize(kind.quantize(latent.get_submodule(name).weight.detach().numpy())))
        if weight.shape[1] % 128 == 0 and want[name] == 64:
            assert not tq1_25.is_exact(weight).all()
    x = torch.arange(32)[None]
    assert torch.equal(out(x).logits, model(x).logits)


@pytest.mark.parametrize("weights", ["latent", "fake_quantized"])
@pytest.mark.parametrize("size", [64, 256, 32])
def test_training_goes_on_in_the_groups_of_its_start(tmp_path, weights, size):
    """Not in those that the shapes alone would give; another size can be asked for."""
    model = llama(256, 512)
    prepare(model, QuantConfig(group_size=size), keep=r"layers\.1\..*q_proj")
    model.save_pretrained(tmp_path / "out") if weights == "latent" else export(model, tmp_path / "out")
    assert recorded(tmp_path / "out")["weights"] == weights
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prepare(again)
    kept = "model.layers.1.self_attn.q_proj"
    assert sizes(again) == {name: 128 if name == kept else size for name in sizes(again)} and kept in sizes(again)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prepare(other, QuantConfig(group_size=128))
    assert set(sizes(other).values()) == {128} and "group_sizes" not in other.config.sherry_config


def test_mixed_groups_go_on_as_they_are(tmp_path):
    model = llama(256, 512)
    model.config.sherry_config = {"group_size": 128, "group_sizes": dict.fromkeys(DOWN, 64)}
    names = prepare(model)
    want = {name: 64 if name in DOWN else 128 for name in names}
    export(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prepare(again)
    assert sizes(again) == sizes(model) == want
    assert again.config.sherry_config["group_sizes"] == recorded(tmp_path / "out")["group_sizes"] == dict.fromkeys(DOWN, 64)


@pytest.mark.parametrize("said", [
    "junk", {}, {"granularity": "per_channel"}, {"group_size": "64"}, {"group_size": -64}, {"group_size": 6}, {"group_size": 512},
    {"group_size": None, "group_sizes": 5, "kept": 5}, {"group_sizes": {"model.layers.0.mlp.down_proj": 0}},
])  # fmt: skip
def test_groups_that_a_start_cannot_have_been_trained_in(said):
    """Then the layers' shapes decide: a record that the converter would refuse must not keep anybody from training."""
    model = llama()
    model.config.sherry_config = said
    prepare(model)
    assert sizes(model) == {name: 128 if name in DOWN else 64 for name in sizes(model)}


def test_layers_prepared_in_parts():
    model, whole = llama(), llama()
    assert prepare(model, only="q_proj") and set(sizes(model).values()) == {64}  # so the record says 64
    assert prepare(model, only="mlp") and prepare(model)
    prepare(whole)
    assert sizes(model) == sizes(whole) and model.config.sherry_config == whole.config.sherry_config
    model = llama()
    prepare(model, QuantConfig(group_size=64), only="down_proj")
    with pytest.raises(ValueError, match="down_proj is quantized already, by QuantConfig.*group_size=64"):
        prepare(model, QuantConfig(group_size=128))


def test_single_layers_and_conv1d(tmp_path):
    assert [QuantLinear(n, 8).quant.group_size for n in (64, 128, 192, 256)] == [64, 128, 64, 128]
    assert QuantLinear(128, 8, quant=QuantConfig(group_size=64)).quant.group_size == 64
    with pytest.raises(ValueError, match="multiple of 64"):
        QuantLinear(96, 8)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=192, n_layer=1, n_head=3))
    prepare(model)
    assert sizes(model) == {f"transformer.h.0.{n}": s for n, s in
                            {"attn.c_attn": 64, "attn.c_proj": 64, "mlp.c_fc": 64, "mlp.c_proj": 128}.items()}  # fmt: skip
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, size in sizes(model).items():
        assert KINDS[size].is_exact(loaded.get_submodule(name).weight.detach().T.contiguous().numpy()).all()


def test_the_monitor_sees_each_layers_groups():
    model = llama()
    prepare(model)
    for name, layer in quantized_layers(model).items():
        weight, ternary, scale = _ternary(layer)
        assert weight.shape == ternary.shape == (layer.weight.numel() // sizes(model)[name], sizes(model)[name])
        assert torch.equal((ternary * scale).view_as(layer.weight), fake_quantize(layer.weight, group_size=sizes(model)[name]))


def test_coarser_scales_record_no_group_size(tmp_path):
    model = llama()
    prepare(model, QuantConfig(granularity="per_channel"))
    export(model, tmp_path / "out")
    assert not {"group_size", "group_sizes"} & recorded(tmp_path / "out").keys()


def test_only_groups_that_no_type_holds_are_warned_about(tmp_path, caplog):
    for size, warned in (64, False), (192, False), (32, True), (96, True):
        model = llama(192, 384)
        prepare(model, QuantConfig(group_size=size))
        export(model, tmp_path / str(size))
        says = f"groups of {size}: TQ1_25 stores multiples of 128 and TQ1_25_64 multiples of 64, so neither"
        assert (says in caplog.text) is warned, caplog.text
        caplog.clear()


def smol(hidden: int = 576, intermediate: int = 1536) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with two layers."""
    with torch.device("meta"):
        return llama(hidden, intermediate)


def test_rows_that_do_not_fit_name_the_ways_out():
    """Each of them works."""
    with pytest.raises(ValueError) as e:
        prepare(smol(), QuantConfig(group_size=128))
    message, *ways = str(e.value).split("\n  ")
    assert "12 of 14 layers have inputs that are not a multiple of 128" in message and "(576 inputs: model.layers.*" in message
    assert [way.split()[0] for way in ways] == ["--group_size", "--group_size", "--keep"]
    found = [re.fullmatch(r"--(\w+) '?(.*?)'?  \(.*\)", way).groups() for way in ways]
    assert found[:2] == [("group_size", "auto"), ("group_size", "64")]
    for _, value in found[:2]:
        assert len(prepare(smol(), QuantConfig(group_size=int(value) if value.isdigit() else value))) == 14
    assert prepare(smol(), QuantConfig(group_size=128), keep=found[2][1]) == DOWN
    for quant in QuantConfig(), QuantConfig(group_size=64):  # nothing smaller to offer
        with pytest.raises(ValueError, match=r"12 of 14 layers.*not a multiple of 64.*\(544 inputs: model(?s:.*)Pass:\n  --keep '") as e:
            prepare(smol(544), quant)
        assert "--group_size" not in str(e.value)
    with pytest.raises(ValueError, match=r"14 of 14 layers(?s:.*)--group_size auto  \(") as e:
        prepare(smol(576, 576), QuantConfig(group_size=128))
    assert "--keep" not in str(e.value)
    with pytest.raises(ValueError, match="14 of 14 layers.*None is left to quantize"):
        prepare(smol(544, 544))


@pytest.mark.parametrize("hidden, intermediate, size, trained", [
    (544, 576, 128, [2, 2]),  # no group size fits 544 inputs, 64 fits 576
    (576, 544, 128, [12, 12]),
    (704, 96, 96, [12, 12, 2]),  # 96 fits only the others
])  # fmt: skip
def test_ways_out_that_keep_some_layers(hidden, intermediate, size, trained):
    """With a smaller group size, --keep names the layers that it does not fit."""
    with pytest.raises(ValueError, match=r"--group_size auto --keep '") as e:
        prepare(smol(hidden, intermediate), QuantConfig(group_size=size))
    ways = [re.fullmatch(r"(?:--group_size (\w+) )?--keep '(.*)'  \(.*\)", way).groups() for way in str(e.value).split("\n  ")[1:]]
    assert [way[0] for way in ways] == ["auto", "64", None][: len(trained)]
    for (other, keep), count in zip(ways, trained, strict=True):
        quant = QuantConfig(group_size={None: size, "64": 64}.get(other, other))
        assert len(prepare(smol(hidden, intermediate), quant, keep=keep)) == count


@pytest.mark.parametrize("size", ["Auto", "128", 128.0, 0, -64, 6])
def test_impossible_group_sizes(size):
    with pytest.raises(
        ValueError,
        match=re.escape(f"group_size is {size!r}: it must be a positive multiple of 4, or 'auto' for --group_size and QuantConfig"),
    ):
        QuantConfig(group_size=size)
