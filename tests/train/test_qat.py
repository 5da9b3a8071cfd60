"""The PyTorch quantizer against the NumPy reference, bit for bit; the layer, its insertion, and the export."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sherry_gguf import ternary, tq1_25
from sherry_gguf.qat import (
    QuantConfig,
    QuantConv1D,
    QuantLinear,
    export,
    fake_quantize,
    prepare,
    quantized_layers,
    set_residual,
    sparse_absmean,
)
from sherry_gguf.qat.quantizer import METHODS

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
@pytest.mark.parametrize("group_size", [4, 32, 64, 128, 384])
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


def test_sums_are_those_of_the_reference():
    """Means at a rounding boundary when summed in order, and beyond it in another order."""
    edge, others = 96 * (1.5 + 2**-11), 0
    for seed in range(100):
        x = np.random.default_rng(seed).uniform(1.2, 1.8, (1, 128))
        x[0, ::4] = 0.001  # the zeros, so that the last kept one is free
        x[0, 127] = 0.0
        x[0, 127] = edge - np.add.accumulate(x[0] * (np.arange(128) % 4 != 0))[-1]
        if not 0.1 < x[0, 127] < 10 or np.add.accumulate(x[0] * (np.arange(128) % 4 != 0))[-1] != edge:
            continue
        others += torch.from_numpy(x * (np.arange(128) % 4 != 0)).sum().item() > edge
        check(x)
    assert others > 5


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (2, 128), elements=st.one_of(st.sampled_from(EDGES), st.floats(-1e4, 1e4, width=32))))
def test_any_weights(x):
    check(x)


@pytest.mark.parametrize("granularity, size", [("per_channel", 768), ("per_tensor", 64 * 768)])
def test_granularities(granularity, size):
    x = np.random.default_rng(1).standard_normal((64, 768)).astype(np.float32)
    got = sparse_absmean(torch.from_numpy(x), granularity=granularity).numpy()
    np.testing.assert_array_equal(got, reference(x.reshape(-1, size), size).reshape(x.shape))


def test_bfloat16_scale_is_what_both_formats_hold():
    """In bfloat16 a scale has 8 significant bits, and fp16 holds every such number: an export stays exact."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] *= 2**-20  # fp16's subnormals
    got = sparse_absmean(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.half().bfloat16(), got) and torch.equal(got.float().half().float(), got.float())
    wide = sparse_absmean(x.float())
    assert torch.equal(got.sign(), wide.sign())
    assert torch.equal(got, wide.bfloat16())
    assert tq1_25.is_exact(got.float().numpy()).all()


def test_non_finite_weights_show():
    x = torch.ones(3, 128)
    x[0, 5], x[1, 7], x[2] = torch.nan, torch.inf, 1e6
    got = sparse_absmean(x)
    assert not got[got != 0].isfinite().any() and (got != 0).sum() >= 3 * 96


def test_baselines():
    """Each against its paper's formula, written for one group."""
    x = np.random.default_rng(2).standard_normal((16, 256)).astype(np.float32)
    x[0, :128] = 0
    got = {m: fake_quantize(torch.from_numpy(x), m).numpy().reshape(-1, 128) for m in ("absmean", "twn", "binary")}
    for i, group in enumerate(x.reshape(-1, 128).astype(np.float64)):
        mean = np.abs(group).mean()
        absmean = np.clip(np.round(group / (mean or 1)), -1, 1) * float(np.float16(mean))
        np.testing.assert_array_equal(got["absmean"][i], absmean)
        kept = np.abs(group) > 0.7 * mean
        alpha = float(np.float16(np.abs(group)[kept].mean())) if kept.any() else 0.0
        np.testing.assert_array_equal(got["twn"][i], np.sign(group) * kept * alpha)
        np.testing.assert_array_equal(got["binary"][i], np.where(group < 0, -1, 1) * float(np.float16(mean)))
    assert torch.equal(fake_quantize(torch.from_numpy(x), "full"), torch.from_numpy(x))


@pytest.mark.parametrize("method", ["sherry", "absmean", "twn", "binary"])
def test_gradient_is_straight_through(method):
    w = torch.randn(8, 256, requires_grad=True)
    grad = torch.randn(8, 256)
    fake_quantize(w, method).backward(grad)
    assert torch.equal(w.grad, grad)


@pytest.mark.parametrize("rescale", [False, True])
def test_residual_is_two_products_in_one(rescale):
    """Sherry, Eq. 7, written out with two products, gives the same outputs and gradients."""
    torch.manual_seed(0)
    layer = QuantLinear(256, 16).double()
    set_residual(layer, 0.3, rescale)
    x = torch.randn(8, 256, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()

    w, x2 = layer.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    t = w + (sparse_absmean(w) - w).detach()  # the usual straight-through estimator
    y2 = (x2 @ t.T + 0.3 * (x2 @ w.T)) / (1.3 if rescale else 1) + layer.bias
    y2.square().sum().backward()
    for a, b in (y, y2), (x.grad, x2.grad), (layer.weight.grad, w.grad):
        torch.testing.assert_close(a, b)

    layer.eval()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, sparse_absmean(layer.weight), layer.bias))


def test_layer_trains_its_latent_weight():
    layer = QuantLinear(128, 16)
    x = torch.randn(4, 128)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(16, 128))
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, sparse_absmean(layer.weight), layer.bias))


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: sparse_absmean(torch.zeros(2, 100)), ValueError, r"\(2, 100\).*multiple of 128"),
        (lambda: sparse_absmean(torch.tensor(1.0)), ValueError, r"shape \(\)"),
        (lambda: sparse_absmean(torch.zeros(2, 128), 6), ValueError, "group_size is 6"),
        (lambda: sparse_absmean(torch.zeros(2, 128), 0), ValueError, "group_size is 0"),
        (lambda: sparse_absmean(torch.zeros(2, 98), granularity="per_tensor"), ValueError, "multiple of 4"),
        (lambda: sparse_absmean(torch.zeros(2, 128, dtype=torch.int8)), TypeError, "int8"),
        (lambda: fake_quantize(torch.zeros(2, 128), "sherri"), ValueError, "method is 'sherri'"),
        (lambda: QuantConfig("sherry", "per_row"), ValueError, "granularity is 'per_row'"),
        (lambda: QuantConfig(group_size=30), ValueError, "group_size is 30"),
        (lambda: QuantLinear(100, 8), ValueError, r"\(8, 100\)"),
        (
            lambda: prepare(torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.Linear(96, 4))),
            ValueError,
            r"1 of 2 layers have inputs that are not a multiple of 64, as sherry per_group needs \(96 inputs: 1\). Pass:\n  --keep '1'",
        ),
        (lambda: prepare(torch.nn.Embedding(4, 4)), ValueError, "Embedding has no linear layer"),
    ],
)
def test_errors_say_what_is_wrong(call, error, says):
    with pytest.raises(error, match=says):
        call()


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_prepare_quantizes_only_the_blocks(tied):
    model = llama(tied)
    before = {id(p) for p in model.parameters()}
    names = prepare(model)
    assert names == [
        f"model.layers.{i}.{n}"
        for i in range(2)
        for n in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ]
    assert all(type(model.get_submodule(n)) is QuantLinear for n in names)
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert {id(p) for p in model.parameters()} == before


def test_prepare_keeps_named_layers():
    assert not any("layers.0" in n for n in prepare(llama(), keep=r"layers\.0\.|lm_head"))
    assert all("mlp" in n for n in prepare(llama(), only="mlp"))
    assert prepare(llama(), QuantConfig("full")) == []


def test_prepare_warns_about_what_it_cannot_quantize(caplog):
    model = llama()
    model.model.layers[0].register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 128, 128)))
    prepare(model)
    assert "left in full precision: model.layers.0.experts" in caplog.text


def test_prepare_changes_nothing_on_error():
    model = llama()
    prepare(model, only="mlp")
    with pytest.raises(ValueError, match="layers.0.mlp.gate_proj is quantized already, by QuantConfig.*sherry"):
        prepare(model, QuantConfig("twn"))
    with pytest.raises(ValueError, match="quantized already"):  # not in full precision
        prepare(model, QuantConfig("full"))
    assert len(quantized_layers(model)) == 6
    assert len(prepare(model)) == 8  # the rest, in the same way
    said = model.config.sherry_config
    with pytest.raises(ValueError, match="besides the 14 that are quantized already"):
        prepare(model)
    assert model.config.sherry_config is said  # otherwise its checkpoints would no longer be converted as Sherry's
    model = torch.nn.Sequential(torch.nn.Linear(256, 4), torch.nn.Linear(96, 4))
    with pytest.raises(ValueError):
        prepare(model)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_export_stores_what_evaluation_computes(tmp_path, tied, dtype):
    model = llama(tied).eval()
    names = prepare(model)
    export(model, tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["sherry_config"] == {
        "method": "sparse_absmean",
        "granularity": "per_group",
        "group_size": 128,
        "n": 3,
        "m": 4,
        "weights": "fake_quantized",
    }
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


def test_export_of_ties_and_zeros(tmp_path):
    """Equal magnitudes, zeros in the latent weights, a block of zeros: all are exact in the export."""
    model = llama()
    names = prepare(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(torch.randint(-2, 3, weight.shape) * 0.01)
            weight[0] = 0
            weight[1, ::2] = -0.0
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name in names:
        weight = loaded.get_submodule(name).weight.detach()
        assert tq1_25.is_exact(weight.numpy()).all(), name
        assert torch.equal(weight, model.get_submodule(name).quantized_weight()), name
        assert not weight[0].any() and weight[1].count_nonzero() == weight.shape[1] // 4 * 3


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_export_says_the_granularity(tmp_path, granularity):
    model = llama()
    names = prepare(model, QuantConfig(granularity=granularity))
    export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["sherry_config"]
    assert config["granularity"] == granularity and "group_size" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in names:
        assert tq1_25.is_exact(loaded.get_submodule(name).weight.detach().float().numpy()).all()


def test_export_of_a_baseline_does_not_claim_sherry(tmp_path):
    model = llama().eval()
    prepare(model, QuantConfig("absmean"))
    export(model, tmp_path / "out", dtype=torch.float32)
    assert "sherry_config" not in json.loads((tmp_path / "out/config.json").read_text())
    x = torch.arange(32)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(x).logits, model(x).logits)


def test_saved_latent_weights_say_so(tmp_path):
    """A Trainer's checkpoints: the converter quantizes them as training did."""
    model = llama()
    prepare(model)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["sherry_config"]["weights"] == "latent"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prepare(again, QuantConfig("absmean"))  # no longer Sherry's
    assert not hasattr(again.config, "sherry_config")
    half = llama().bfloat16()
    prepare(half)  # training rounds its scales further than the converter
    assert not hasattr(half.config, "sherry_config")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_export_of_half_precision_models(tmp_path, dtype):
    model = llama().to(dtype).eval()
    names = prepare(model)
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name in names:
        weight = loaded.get_submodule(name).weight.detach()
        assert tq1_25.is_exact(weight.numpy()).all()
        assert torch.equal(weight, model.get_submodule(name).quantized_weight().float())


def test_experts(tmp_path):
    """Each expert's matrices are ternary; routers always stay."""
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, shared_expert_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1)).eval()  # fmt: skip
    names = prepare(model, keep=r"layers\.0\.")
    assert len(names) == 4 + 3 * 3 and all(n.endswith("_proj") for n in names)
    assert all(n.startswith("model.layers.1.") for n in names)
    export(model, tmp_path / "out", dtype=torch.float32)
    kept = json.loads((tmp_path / "out/config.json").read_text())["sherry_config"]["kept"]
    assert "model.layers.1.mlp.shared_expert_gate.weight" in kept and "model.layers.0.self_attn.q_proj.weight" in kept
    assert not any(f"{n}.weight" in kept for n in names) and "lm_head.weight" not in kept
    loaded, x = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(32)[None]
    for name in names:
        assert torch.equal(loaded.get_submodule(name).weight, model.get_submodule(name).quantized_weight())
    torch.testing.assert_close(loaded(x).logits, model(x).logits)


def test_conv1d_of_gpt2(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=128, n_layer=1, n_head=2, n_positions=64)).eval()
    names = prepare(model)
    assert names == [f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    for layer in quantized_layers(model).values():
        assert type(layer) is QuantConv1D
        assert torch.equal(layer.quantized_weight(), sparse_absmean(layer.weight.T.contiguous()).T)
    x = torch.arange(32)[None]
    model(x, labels=x).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    export(model, tmp_path / "out", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(x).logits, model(x).logits)
    for name in names:
        assert tq1_25.is_exact(loaded.get_submodule(name).weight.detach().T.contiguous().numpy()).all()


def test_export_refuses_and_leaves_nothing(tmp_path):
    model = llama()
    prepare(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 7] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has values that are not finite"):
        export(model, tmp_path / "out")
    with pytest.raises(TypeError, match="bfloat16"):
        export(model, tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="lacks model.layers.0.self_attn.q_proj.weight"):
        export(model, tmp_path / "out", state={"lm_head.weight": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="already has something in it"):
        export(model, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_export_of_latent_weights_as_they_are_is_refused(tmp_path):
    model = llama()
    prepare(model)
    model.save_pretrained(tmp_path / "latent")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "latent")
    with pytest.raises(ValueError, match="weights are latent.*prepare"):
        export(loaded, tmp_path / "out")
    prepare(loaded)
    export(loaded, tmp_path / "out")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight.float(),
                       model.model.layers[0].mlp.up_proj.quantized_weight())  # fmt: skip


def test_falcon(tmp_path):
    """Its layers have a class of their own, which computes what nn.Linear does."""
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, bias=True))
    x = torch.arange(16).view(1, 16)
    before = model.eval()(x).logits
    names = prepare(model)
    assert len(names) == 8
    state = {n: model.get_submodule(n).weight.detach().clone() for n in names}
    with torch.no_grad():
        for n in names:
            model.get_submodule(n).weight.copy_(model.get_submodule(n).quantized_weight())
    export(model, tmp_path / "out", dtype=torch.float32)
    quantized = FalconForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(x).logits, quantized(x).logits)
    for n in names:
        quantized.get_submodule(n).weight.data.copy_(state[n])
    torch.testing.assert_close(quantized(x).logits, before)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_a_gpu_does_not_wait(method, monkeypatch):
    """A tensor made from a number is copied to the GPU in every call, and both wait for it."""

    def tensor(*_, **__):
        raise AssertionError("a tensor of a number")

    weight = torch.empty(256, 256, device="meta", requires_grad=True)  # takes the GPU's path
    monkeypatch.setattr(torch, "tensor", tensor)
    fake_quantize(weight, method, residual=0.5, rescale=True).sum().backward()
    assert weight.grad.shape == weight.shape
