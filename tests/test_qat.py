"""The PyTorch quantizer against the NumPy reference, bit for bit; the layer, its insertion, and the export."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sherry_gguf import ternary, tq1_25
from sherry_gguf.qat import SherryLinear, export, prepare, sparse_absmean

EDGES = [0.0, -0.0, 1.0, -1.0, 1.5, 2**-24, -(2**-25), 2**-14, 65504.0, 1e-30, 1 + 2**-11, 1 + 3 * 2**-11]


def reference(x: np.ndarray, group_size: int) -> np.ndarray:
    lanes, scale = ternary.sparse_absmean(x, group_size)
    d = scale.astype(np.float16).astype(x.dtype)
    return (lanes.reshape(-1, group_size) * d.reshape(-1, 1)).reshape(x.shape)


def check(x: np.ndarray, group_size: int = 128):
    got = sparse_absmean(torch.from_numpy(x), group_size)
    assert got.dtype == torch.from_numpy(x).dtype
    np.testing.assert_array_equal(got.numpy(), reference(x, group_size))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("group_size", [4, 32, 128, 384])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 300.0])
def test_random_weights(dtype, group_size, scale):
    rng = np.random.default_rng(0)
    check((rng.standard_normal((64, 768)) * scale).astype(dtype), group_size)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_ties_and_zeros(levels):
    rng = np.random.default_rng(levels)
    x = rng.integers(-levels, levels + 1, (256, 256)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -0.0
    check(x)


def test_each_tie_of_four_lanes():
    """All orders of four lanes with up to four different magnitudes, in either sign."""
    lanes = np.stack(np.meshgrid(*[[-3, -2, -1, -0.0, 0, 1, 2, 3]] * 4), -1).reshape(-1, 128)
    check(lanes.astype(np.float32))


def test_scale_is_rounded_once():
    """Means next to the middle of two fp16 numbers, where going through float32 would round the wrong way."""
    x = np.full((4, 128), 1 + 2**-11, np.float64)  # the middle of 1 and 1 + 2**-10
    x[1] += 2**-40  # float32 drops it; rounding must not
    x[2] -= 2**-40
    x[3] *= 2**-24  # the same among subnormals: 2**-24 is the smallest
    x[3] += 2**-25 + 2**-60
    got = sparse_absmean(torch.from_numpy(x)).numpy()
    assert [row.max() for row in got[:3]] == [1.0, 1 + 2**-10, 1.0]
    check(x)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.one_of(
    st.sampled_from(EDGES), st.floats(-1e4, 1e4, width=32))))
def test_any_weights(x):
    check(x)


def test_non_finite_weights_show():
    x = torch.ones(3, 128)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, 1e6
    assert not sparse_absmean(x).isfinite().any()


def test_gradient_is_straight_through():
    w = torch.randn(8, 256, requires_grad=True)
    grad = torch.randn(8, 256)
    sparse_absmean(w).backward(grad)
    assert torch.equal(w.grad, grad)


def test_layer_trains_its_latent_weight():
    layer = SherryLinear(128, 16)
    x = torch.randn(4, 128)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 128))
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, sparse_absmean(layer.weight), layer.bias))


@pytest.mark.parametrize("call, error, says", [
    (lambda: sparse_absmean(torch.zeros(2, 100)), ValueError, r"\(2, 100\).*multiple of 128"),
    (lambda: sparse_absmean(torch.tensor(1.0)), ValueError, r"shape \(\)"),
    (lambda: sparse_absmean(torch.zeros(2, 128), 6), ValueError, "group_size is 6"),
    (lambda: sparse_absmean(torch.zeros(2, 128), 0), ValueError, "group_size is 0"),
    (lambda: sparse_absmean(torch.zeros(2, 128, dtype=torch.bfloat16)), TypeError, "bfloat16"),
    (lambda: SherryLinear(100, 8), ValueError, "in_features is 100"),
    (lambda: prepare(torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.Linear(96, 4))), ValueError, "1 has 96"),
    (lambda: prepare(torch.nn.Embedding(4, 4)), ValueError, "Embedding has no nn.Linear"),
])
def test_errors_say_what_is_wrong(call, error, says):
    with pytest.raises(error, match=says):
        call()


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_turns_the_blocks_only(tied):
    model = llama(tied)
    before = {id(p) for p in model.parameters()}
    names = prepare(model)
    assert names == [f"model.layers.{i}.{n}" for i in range(2) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    assert all(type(model.get_submodule(n)) is SherryLinear for n in names)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert {id(p) for p in model.parameters()} == before


def test_prepare_keeps_what_it_is_told():
    model = llama()
    assert not any("layers.0" in n for n in prepare(model, keep=r"layers\.0\.|lm_head"))


def test_prepare_changes_nothing_on_error():
    model = torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.Linear(96, 4))
    with pytest.raises(ValueError):
        prepare(model)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_export_stores_what_evaluation_computes(tmp_path, tied, dtype):
    model = llama(tied).eval()
    names = prepare(model)
    export(model, None, tmp_path / "out", dtype)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["sherry_config"] == {"method": "sparse_absmean", "granularity": "per_group", "group_size": 128,
                                       "n": 3, "m": 4, "weights": "fake_quantized"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == dtype and loaded.config.tie_word_embeddings == tied
    for name in names:
        weight = loaded.get_submodule(name).weight
        assert tq1_25.is_exact(weight.detach().numpy()).all(), name
        assert torch.equal(weight.float(), model.get_submodule(name).quantized_weight()), name
    if dtype == torch.float32:
        x = torch.arange(32)[None]
        assert torch.equal(loaded(x).logits, model(x).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_refuses_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="call prepare"):
        export(llama(), None, tmp_path / "out")
    model = llama()
    prepare(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 7] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has values that are not finite"):
        export(model, None, tmp_path / "out")
    with pytest.raises(TypeError, match="bfloat16"):
        export(model, None, tmp_path / "out", torch.bfloat16)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="already has something in it"):
        export(model, None, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
