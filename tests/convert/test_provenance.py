"""What is called exact is what the checkpoint's files hold, whatever llama.cpp's classes do to it on the way."""

import re
import shutil

import gguf
import numpy as np
import pytest
import small_models
import torch
import transformers
from conftest import sherry
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers.integrations import bitnet

from sherry_gguf import gguf_type
from sherry_gguf.convert import packed
from sherry_gguf.convert.provenance import Tally, fingerprint

pytestmark = pytest.mark.slow

gguf_type.register()


def load(path):
    """name -> (type, values) of a file."""
    return {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def bitnet_model(directory, one_scale=False, first=True):
    """A BitNet b1.58 with exact 3:4 sparse weights under the names of its first checkpoints, and a sentencepiece tokenizer."""
    config = transformers.BitNetConfig(
        vocab_size=small_models.VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, hidden_act="silu", tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BitNetForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                w = small_models.sparse_ternary(module.weight, generator)
                module.weight.copy_(torch.sign(w) * 0.05 if one_scale else w)
    model.to(torch.bfloat16).save_pretrained(directory)
    small_models.save_tokenizer(directory, "spm")
    small_models.edit_config(directory, architectures=["BitnetForCausalLM"])

    def rename(tensors):
        for name in [n for n in tensors if "sub_norm" in n]:
            tensors[name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm")] = tensors.pop(name)

    if first:
        small_models.edit_weights(directory, rename)
    return directory


# ---- BitNet's class quantizes each matrix again ----


@pytest.mark.parametrize("one_scale", [False, True])
def test_bitnet_weights_are_taken_as_they_are(tmp_path, one_scale):
    model = bitnet_model(tmp_path / "m", one_scale)
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out, "--require-exact")
    assert done.returncode == 0, done.stderr
    stored, found = load(out), 0
    with safe_open(model / "model.safetensors", "pt") as f:
        for gguf_name, name in ("ffn_down", "mlp.down_proj"), ("attn_q", "self_attn.q_proj"), ("attn_output", "self_attn.o_proj"):
            kind, values = stored[f"blk.0.{gguf_name}.weight"]
            wanted = f.get_tensor(f"model.layers.0.{name}.weight").float().numpy()
            assert kind == "TQ1_25" and (np.sort(values, axis=None) == np.sort(wanted, axis=None)).all()
            found += (values == wanted).all()
    assert found >= 2  # where rows are not permuted
    assert sherry("verify", out, model).returncode == 0


@pytest.mark.parametrize("one_scale, change", [(False, "values changed by llama.cpp"), (True, "each value times 0.75")])
def test_bitnet_as_upstream_does_it_is_no_proof(tmp_path, one_scale, change):
    """The same with upstream's quantization left in place: reported, refused where it must be exact, no success of verify."""
    model, out = bitnet_model(tmp_path / "m", one_scale), tmp_path / "x.gguf"
    patch = "from sherry_gguf.convert import upstream; upstream.AS_STORED.clear()"
    done = sherry("convert", model, "--outfile", out, "--require-exact", patch=patch)
    assert done.returncode == 1 and not out.exists()
    assert "--require-exact: 7 of 7 tensors do not hold the checkpoint's values: llama.cpp's BitnetModel changes blk." in done.stderr
    assert change in done.stderr
    done = sherry("convert", model, "--outfile", out, patch=patch)
    assert done.returncode == 0 and "not the checkpoint's weights: llama.cpp's BitnetModel changes" in done.stdout
    assert load_flags(out) == [False] * 7
    done = sherry("verify", out, model, patch=patch)
    assert done.returncode == 1 and f"blk.0.attn_v.weight: llama.cpp's BitnetModel changes the checkpoint's values: {change}" in done.stdout
    assert done.stdout.count("differs: ") == 7
    assert "0 TQ1_25 tensors bit for bit as in the checkpoint" in done.stdout
    assert sherry("verify", out, model).returncode == 1


def load_flags(path):
    return gguf.GGUFReader(path).fields["sherry.tensor.exact"].contents()


def test_bitnet_with_another_activation(tmp_path):
    """llama.cpp's graph is that of the first BitNet models."""
    model = bitnet_model(tmp_path / "m")
    says = "config.json says that hidden_act is relu2, llama.cpp computes BitNet with silu"
    assert says not in sherry("convert", model, "--outfile", tmp_path / "x.gguf").stdout
    small_models.edit_config(model, hidden_act="relu2")
    assert says in sherry("convert", model, "--outfile", tmp_path / "x.gguf").stdout


def test_bitnet_as_transformers_has_it(tmp_path):
    """BitNet b1.58 2B: llama.cpp would run it wrongly."""
    model = bitnet_model(tmp_path / "m", first=False)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 1 and "the pinned llama.cpp runs only the first BitNet models" in done.stderr


# ---- a value that is changed inside a class of upstream's ----

PATCH = """
from sherry_gguf.convert.upstream import upstream
upstream()
from conversion.{module} import {cls}
import torch
modify = {cls}.modify_tensors
def changed(self, data, name, bid):
    for new_name, x in modify(self, data, name, bid):
        yield new_name, ({change} if "{where}" in new_name else x)
{cls}.modify_tensors = changed
"""


@pytest.mark.parametrize(
    "name, cls, where, change, says",
    [
        ("llama", "LlamaModel", "ffn_up", "x * 2", "each value times 2"),
        ("llama", "LlamaModel", "blk.1.attn_v", "x / 4", "each value times 0.25"),
        ("llama", "LlamaModel", "attn_q", "x * 2", "values changed by llama.cpp"),  # its rows are permuted
        ("llama", "LlamaModel", "ffn_down", "torch.cat([x[:1], x[:-1]])", "values changed by llama.cpp"),  # a row twice, one lost
        ("llama", "LlamaModel", "ffn_gate", "-x", "each value times -1"),
        ("gptneox", "GPTNeoXModel", "attn_qkv", "x * 0.5", "values changed by llama.cpp"),
    ],
)
def test_a_changed_value_is_no_proof(zoo, tmp_path, name, cls, where, change, says):
    root, _ = zoo
    module = cls.removesuffix("Model").lower()
    patch = PATCH.format(module=module, cls=cls, where=where, change=change)
    flags = ["--tokenizer-pre", "gpt-2"] if name == "gptneox" else []
    done = sherry("convert", root / name, "--outfile", tmp_path / "x.gguf", "--require-exact", *flags, patch=patch)
    assert done.returncode == 1 and not (tmp_path / "x.gguf").exists(), done.stdout
    assert f"do not hold the checkpoint's values: llama.cpp's {cls} changes" in done.stderr and says in done.stderr
    done = sherry("convert", root / name, "--outfile", tmp_path / "x.gguf", *flags, patch=patch)
    assert done.returncode == 0 and "not the checkpoint's weights" in done.stdout, done.stderr
    done = sherry("verify", tmp_path / "x.gguf", root / name, *flags, patch=patch)
    problems = re.findall(r"^differs: (.*)", done.stdout, re.M)
    assert (
        done.returncode == 1 and problems and all(where in problem and "changes the checkpoint's values" in problem for problem in problems)
    )


def test_moves_are_no_changes(zoo, tmp_path):
    """Permuted, split, transposed, stacked and computed on the way: every value is there, so all is exact (`test_zoo_verifies`)."""
    root, results = zoo
    for name, done in results.items():
        assert "not the checkpoint's weights" not in done.stdout, name
    # upstream forgets where an intermediate result comes from
    patch = PATCH.format(module="llama", cls="LlamaModel", where="ffn_", change="type(x).from_eager(type(x).to_eager(x).clone())")
    done = sherry("convert", root / "llama", "--outfile", tmp_path / "x.gguf", "--require-exact", patch=patch)
    assert done.returncode == 0, done.stderr


def test_kept_tensors_that_llama_cpp_changes_are_told(zoo):
    root, results = zoo
    assert re.search(r"^blk\.\*\.attn_norm\.weight +F32 .* kept, each value plus 1$", results["gemma2"].stdout, re.M)
    assert re.search(r"^blk\.\*\.ssm_a +F32 .* kept, minus the exponential of each value$", results["mamba"].stdout, re.M)
    done = sherry("verify", root / "gemma2.gguf", root / "gemma2")
    assert done.returncode == 0 and re.search(r"^note: each value plus 1, as llama.cpp stores it: .*blk\.\*\.ffn_norm", done.stdout, re.M)


def test_pytorch_files(tmp_path):
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    assert sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact").returncode == 0
    assert sherry("verify", tmp_path / "x.gguf", model).returncode == 0
    patch = PATCH.format(module="llama", cls="LlamaModel", where="ffn_up", change="x * 2")
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact", patch=patch)
    assert done.returncode == 1 and "each value times 2" in done.stderr


def test_tensors_that_share_a_storage(tmp_path):
    """As views of one tensor, in a file of PyTorch's; another tensor's values are none of theirs."""
    model = small_models.make(tmp_path / "m", "llama", safe=False)
    path = model / "pytorch_model.bin"
    tensors = torch.load(path)
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    parts = flat.split([t.numel() for t in tensors.values()])
    torch.save({name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts)}, path)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact")
    assert done.returncode == 0, done.stderr
    assert sherry("verify", tmp_path / "x.gguf", model).returncode == 0
    patch = PATCH.format(module="llama", cls="LlamaModel", where="blk.0.attn_k", change="x * 0 + other")
    patch = patch.replace("modify = ", "other = 0.015625\nmodify = ")
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact", patch=patch)
    assert done.returncode == 1 and "changes blk.0.attn_k.weight" in done.stderr


# ---- multisets ----

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, max_size=30), st.randoms(use_true_random=False))
def test_tally_counts_values(values, random):
    x = np.array(values, np.float32)
    shuffled = list(values)
    random.shuffle(shuffled)
    one, other = Tally.of([x]), Tally.of(np.array(shuffled, np.float32)[:, None])
    assert one.size == other.size == len(values) and not one.lacks(other) and not other.lacks(one)
    assert (one.values == np.unique(x.astype(np.float64))).all()
    assert fingerprint([x]) == fingerprint([np.array(shuffled, np.float32)[:, None]])
    assert fingerprint([x[:7], x[7:]]) == fingerprint([x]) == fingerprint([x.astype(np.float64)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tally_sees_each_change(dtype):
    x = (torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)).to(
        torch.float64 if dtype is torch.float64 else torch.float32
    )
    x[7] = x[8]
    whole = Tally.of([x.numpy()])
    assert not whole.lacks(Tally.of([x[1000:2000].numpy()])) and not whole.lacks(Tally.of([x.flip(0).numpy()]))
    for change in (lambda y: y[5].mul_(0.5), lambda y: y[5].copy_(y[6]), lambda y: y[5].neg_()):
        y = x.clone()
        change(y)
        assert whole.lacks(Tally.of([y.numpy()])) and fingerprint([x.numpy()]) != fingerprint([y.numpy()])
    assert fingerprint([np.float32([1, 4])]) != fingerprint([np.float32([2, 3])])
    assert fingerprint([np.float32([1, 1])]) != fingerprint([np.float32([2, 2])])
    assert not Tally.of([np.float32([0.0])]).lacks(Tally.of([np.float32([-0.0])]))
    assert Tally.of([np.empty(0, np.float32)]).lacks(whole)


# ---- packed ternary weights ----


def test_a_checkpoint_that_changes_between_two_conversions(tmp_path):
    """In one process, as the tests' server is."""
    for size in 384, 512:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        model = small_models.make(tmp_path / "m", "llama", config=dict(intermediate_size=size))
        done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact")
        assert done.returncode == 0, done.stderr


def pack(model, linear_class, scale):
    """Make a checkpoint's linear layers packed, as transformers' bitnet quantizer saves them."""

    def change(tensors):
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            w = tensors.pop(name).float()
            d = scale or w.abs().max().item()
            tensors[name] = bitnet.pack_weights(torch.sign(w).to(torch.int8))
            tensors[f"{name}_scale"] = torch.tensor([1 / d if linear_class == "bitlinear" else d], dtype=torch.bfloat16)

    small_models.edit_weights(model, change)
    quantization = dict(quant_method="bitnet", linear_class=linear_class, quantization_mode="offline", modules_to_not_convert=["lm_head"])
    small_models.edit_config(model, quantization_config=quantization)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
def test_packed_ternary_weights(tmp_path, linear_class, architecture):
    """Falcon-E's and BitNet 2B's layout: exact where the weights are 3:4 sparse, and what transformers computes with them."""
    model = tmp_path / "m"
    small_models.make(model, "llama") if architecture == "llama" else bitnet_model(model)
    pack(model, linear_class, 0.0625)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact")
    assert done.returncode == 0, done.stderr
    assert sherry("verify", tmp_path / "x.gguf", model).returncode == 0
    stored = load(tmp_path / "x.gguf")
    with safe_open(model / "model.safetensors", "pt") as f:
        w = f.get_tensor("model.layers.0.mlp.up_proj.weight")
        scale = f.get_tensor("model.layers.0.mlp.up_proj.weight_scale")
    x = torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(1))
    kind, values = stored["blk.0.ffn_up.weight"]
    assert kind == "TQ1_25" and set(np.unique(values)) == {-0.0625, 0, 0.0625}
    layer = getattr(bitnet, {"bitlinear": "BitLinear", "autobitlinear": "AutoBitLinear"}[linear_class])
    layer = layer(
        w.shape[1], 4 * w.shape[0], bias=False, dtype=torch.float32, **({} if linear_class == "bitlinear" else {"online_quant": False})
    )
    layer.load_state_dict({"weight": w, "weight_scale": scale.float()})
    torch.compiler.set_stance("force_eager")
    try:
        wanted = layer(x)
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(wanted, x @ torch.from_numpy(values.copy()).T, rtol=0.05, atol=0.05)  # transformers' activations have 8 bits


def test_packed_weights_that_are_not_sparse(tmp_path):
    model = small_models.make(tmp_path / "m", "llama", latent=True)
    pack(model, "bitlinear", 0.0625)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 0, done.stderr
    says = re.search(
        r"ternary weights that are not 3:4 sparse lose precision in TQ1_25 \(relative error up to (0\.\d+)\): .*TQ2_0 and TQ1_0 hold",
        done.stdout,
    )
    assert says and 0.3 < float(says[1]) < 0.6
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact")
    assert done.returncode == 1 and "not 3:4 sparse" in done.stderr


def test_packed_weights_whose_scale_is_rounded(tmp_path):
    """An inverse scale is seldom an fp16 number: the zeros fit, the scale is rounded, and nothing else is said."""
    model = small_models.make(tmp_path / "m", "llama")
    pack(model, "bitlinear", 0.05)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 0 and "not 3:4 sparse" not in done.stdout and "error <= 0.000" in done.stdout, done.stderr
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact")
    assert done.returncode == 1 and "with fp16 scales in groups of 128, bit for bit (relative error up to 0.000" in done.stderr


def test_packed_weights_that_are_damaged(tmp_path):
    model = small_models.make(tmp_path / "m", "llama")
    pack(model, "bitlinear", 0.0625)
    small_models.edit_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[:1].fill_(255))
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 1 and "blk.1.ffn_up.weight" in done.stderr and "NaN" in done.stderr
    small_models.edit_weights(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
    assert done.returncode == 1 and "up_proj.weight_scale is there without model.layers.1.mlp.up_proj.weight" in done.stderr


def test_unpack_is_the_inverse_of_pack():
    w = torch.randint(-1, 2, (24, 16), generator=torch.Generator().manual_seed(0))
    stored = bitnet.pack_weights(w.clone())
    assert torch.equal(packed.unpack(stored, torch.tensor([0.5]), False), 0.5 * w)
    assert torch.equal(packed.unpack(stored, torch.tensor([0.5]), True), 2.0 * w)
