"""Conversion of small models, tensor by tensor against upstream's own F32 conversion of the same checkpoint."""

import re
import shutil
import types

import conftest
import numpy as np
import pytest
import small_models
import torch
from conftest import sherry
from gguf_tensors import load, same

from sherry_gguf import gguf_file, gguf_type, llama_cpp, ternary, tq1_25
from sherry_gguf.convert import Options, encode, plan
from sherry_gguf.convert.tensor import Tensor
from sherry_gguf.errors import ConvertError

gguf = gguf_type.register()

# Matrices in blocks that are not ternary, by model.
KEPT = {
    "mixtral": ["ffn_gate_inp"],
    "qwen3moe": ["ffn_gate_inp"],
    "gptoss": ["ffn_gate_inp", "_exps"],
    "olmoe": ["ffn_gate_inp"],
    "deepseek2": ["ffn_gate_inp", "attn_k_b"],
    "mamba": ["ssm_conv1d", "ssm_a", "ssm_dt"],
}


@pytest.mark.parametrize("name", small_models.MODELS)
def test_exact_checkpoint(zoo, name):
    root, results = zoo
    done = results[name]
    assert done.returncode == 0, done.stderr
    assert "quantized" not in done.stdout
    ours, upstream = load(root / f"{name}.gguf"), load(root / f"{name}.f32.gguf")
    assert list(ours) == list(upstream)
    kept = KEPT.get(name, [])
    for key, (qtype, value) in ours.items():
        _, wanted = upstream[key]
        matrix = key.startswith("blk.") and key.endswith(".weight") and wanted.ndim > 1
        if matrix and not any(k in key for k in kept):
            assert qtype == ("TQ1_25_64" if wanted.shape[-1] % 128 else "TQ1_25"), key
            assert same(value, wanted), key
        elif qtype == "MXFP4":  # packed by upstream itself
            assert name == "gptoss" and upstream[key][0] == "MXFP4" and same(value, wanted)
        elif qtype == "F16":
            assert wanted.ndim > 1 and same(value, wanted.astype(np.float16).astype(np.float32)), key
        else:
            assert qtype == "F32" and same(value, wanted), key


@pytest.mark.parametrize("name", ["llama", "llama-bpe", "qwen2", "mixtral"])
def test_metadata(zoo, name):
    root, _ = zoo
    ours, upstream = (gguf_file.read_gguf(root / f"{name}.{kind}").fields for kind in ("gguf", "f32.gguf"))
    assert {k: v for k, v in ours.items() if not k.startswith("sherry.")} == upstream | {"general.file_type": 125}
    tensors = load(root / f"{name}.gguf")
    names = [k for k, (qtype, _) in tensors.items() if qtype == "TQ1_25"]
    assert ours["sherry.version"] == 1 and ours["sherry.method"] == "sparse_absmean"
    assert ours["sherry.group_size"] == 128 and ours["sherry.exact"] is True
    assert ours["sherry.tensor.names"] == names and ours["sherry.tensor.exact"] == [True] * len(names)
    assert ours["sherry.tensor.relative_error"] == [0.0] * len(names)


def test_rules_cover_what_llama_cpp_does():
    """Whatever the pinned graphs don't use as the weights of a matrix product, or llama-quantize leaves, stays."""
    source = (llama_cpp.source_dir() / "src" / "llama-arch.cpp").read_text()
    names = dict(re.findall(r'\{\s*(LLM_TENSOR_\w+),\s*"([^"]+)"\s*\}', source))
    ops = re.findall(r"\{(LLM_TENSOR_\w+),\s*\{\w+,\s*GGML_OP_(\w+)\}\}", source)
    assert len(names) > 200 and len(ops) > 200

    def kept(name, arch="llama"):
        t = Tensor(name, "", (256, 256), gguf.GGMLQuantizationType.F16, 0, None)
        return bool(plan.why_kept(t, arch, []))

    wrong = [
        names[t]
        for t, op in ops
        if t in names and "blk." in names[t] and not op.startswith("MUL_MAT") and not kept(names[t].replace("%d", "0") + ".weight")
    ]
    assert not wrong
    source = (llama_cpp.source_dir() / "src" / "llama-quant.cpp").read_text()
    body = source[source.index("static bool tensor_allows_quantization(") : source.index("// tensor type selection")]
    excluded = re.findall(r'name\.find\("([^"]+)"\)\s*==', body)
    assert len(excluded) > 30
    outside = ("per_layer_model_proj", "sam.", "a.rvq.", "mm.a.")  # of any block
    wrong = [
        n for n in excluded if not n.startswith(outside) and not kept(f"blk.0.{n.strip('.').removesuffix('.weight')}.weight", "glm5-next")
    ]
    assert not wrong
    for name in (
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "attn_qkv",
        "ffn_up",
        "ffn_down_exps",
        "ssm_in",
        "ssm_out",
        "attn_q_a",
        "attn_kv_b",
        "attn_v_b",
        "shortconv.in_proj",
        "time_mix_key",
        "channel_mix_value",
        "nextn.eh_proj",
    ):
        assert not kept(f"blk.3.{name}.weight"), name
    assert not kept("enc.blk.0.attn_q.weight") and not kept("dec.blk.11.cross_attn_o.weight")


DENSE, EXPERTS = ("attn_q", "ffn_up"), ("attn_q", "ffn_up_exps", "ffn_gate_exps")
MAMBA = ("ssm_in", "ssm_out", "ffn_up")


@pytest.mark.parametrize(
    "blocks, says",
    [
        ([DENSE] * 2, ""),
        ([DENSE, EXPERTS], ""),  # the first one dense
        ([DENSE] + [EXPERTS] * 30, ""),
        ([EXPERTS] * 30 + [(*EXPERTS, "nextn.eh_proj")], ""),  # the last one predicts further
        ([DENSE, MAMBA], ""),
        ([MAMBA, MAMBA, MAMBA, DENSE] * 8, ""),
        ([DENSE, ("ffn_up",)] * 8, ""),  # keys of the block before
        ([DENSE] * 20 + [("ffn_up",)] * 12, ""),
        ([DENSE[:1]], ""),
        ([DENSE, DENSE[:1]], "blk.1.ffn_up.weight missing"),
        ([DENSE] * 31 + [DENSE[:1]], "blk.31.ffn_up.weight missing"),
        ([DENSE[:1], *[DENSE] * 30, DENSE[1:]], "blk.0.ffn_up.weight missing"),
        ([DENSE] + [EXPERTS] * 20 + [EXPERTS[:2]], "blk.21.ffn_gate_exps.weight missing"),
        ([DENSE, (), DENSE], "blk.1.attn_q.weight, blk.1.ffn_up.weight missing"),
    ],
)
def test_missing_matrices(blocks, says):
    """A lost matrix is reported, blocks of several kinds are not; with a list of figures by block anything goes."""
    tensors = [
        Tensor(f"blk.{i}.{name}.weight", "", (1, 128), None, 0, None)
        for i, names in enumerate(blocks)
        for name in (*names, *["attn_norm"] * bool(names), *["time_mix_v1"] * (i > 0))
    ]

    def check(figures):
        pairs = {"x.attention.head_count_kv": types.SimpleNamespace(value=figures)}
        writer = types.SimpleNamespace(arch="x", kv_data=[pairs])
        model = types.SimpleNamespace(gguf_writer=writer, block_count=len(blocks), find_hparam=lambda *_, **__: len(blocks), dir_model="m")
        plan.check_blocks(model, tensors, Options())

    check([2] * len(blocks))
    if says:
        with pytest.raises(ConvertError, match=re.escape(says)):
            check(2)
    else:
        check(2)


# ---- latent weights, groups ----


NOISE = (
    "): expect noise unless the model was trained with Sherry. An ordinary model loses less if sherry-gguf calibrate prepares it first\n"
)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("latent") / "llama", "llama", latent=True, dtype=torch.float32)


def test_noise_is_not_expected_of_sherry_models(latent, tmp_path):
    """Of weights that a Sherry training left latent, nor of those that are ternary, in whatever groups."""
    trained = shutil.copytree(latent, tmp_path / "trained")
    small_models.edit_config(trained, sherry_config={"weights": "latent"})
    made = {group: small_models.make(tmp_path / str(group), "llama", group=group) for group in (64, 128)}
    for model in (trained, *made.values()):
        done = sherry("convert", model, "--outfile", tmp_path / "x.gguf")
        assert done.returncode == 0 and "expect noise" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("granularity, size", [("per_group", 128), ("per_group", 256), ("per_channel", 0), ("per_tensor", 0)])
def test_latent(latent, tmp_path, granularity, size):
    """Blocks of a wider group all hold its scale; verify agrees."""
    flags = ["--granularity", granularity] + (["--group-size", size] if size else [])
    out = tmp_path / "x.gguf"
    keep = ["--keep", "ffn_down"]  # its rows of 384 are not a multiple of 256
    commands = ["convert", latent, "--outfile", out], ["verify", out, latent]
    done, proof = (sherry(*command, *flags, *keep) for command in commands)
    assert done.returncode == 0, done.stderr
    assert "exact 0/12, 0.0 % of blocks; quantized: error <= 0.5" in done.stdout
    assert "\nnote: 12 of 12 ternary matrices were rounded (relative error up to 0.5" in done.stdout and NOISE in done.stdout
    assert proof.returncode == 0, proof.stdout + proof.stderr
    assert "0 TQ1_25 tensors bit for bit as in the checkpoint, 12 as the reference" in proof.stdout
    model = gguf_file.read_gguf(out)
    assert model.fields["sherry.granularity"] == granularity and model.fields["sherry.exact"] is False
    assert model.tensors["blk.0.ffn_down.weight"].type.name == "F16"
    from safetensors.numpy import load_file

    wanted = load_file(latent / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    blocks = model.tensors["blk.0.ffn_up.weight"].read()
    lanes, d = tq1_25.unpack(blocks)
    shape = {
        "per_group": (384, 256 // (size or 1), size),
        "per_channel": (384, 1, 256),
        "per_tensor": (1, 1, 384 * 256),
    }[granularity]
    groups = np.sort(np.abs(wanted.astype(np.float64)).reshape(*shape[:2], shape[2] // 4, 4))[..., 1:]
    scale = groups.mean(axis=(2, 3)).astype(np.float16)
    assert (d == np.broadcast_to(np.repeat(scale, d.shape[1] // scale.shape[1], axis=1), d.shape)).all()
    assert (lanes == ternary.sparse_absmean(wanted)[0]).all()
    error = np.linalg.norm(tq1_25.dequantize(blocks) - wanted) / np.linalg.norm(wanted)
    errors = dict(zip(model.fields["sherry.tensor.names"], model.fields["sherry.tensor.relative_error"]))
    assert errors["blk.0.ffn_up.weight"] == pytest.approx(error, rel=1e-4)


def test_per_tensor_of_experts(tmp_path):
    """A stack of experts is many matrices, each with a scale of its own."""
    from safetensors.numpy import load_file

    model = small_models.make(tmp_path / "m", "mixtral", latent=True, dtype=torch.float32)
    out = tmp_path / "x.gguf"
    for args in (["convert", model, "--outfile", out], ["verify", out, model]):
        done = sherry(*args, "--granularity", "per_tensor")
        assert done.returncode == 0, done.stdout + done.stderr
    weights = load_file(model / "model.safetensors")
    d = tq1_25.unpack(gguf_file.read_gguf(out).tensors["blk.1.ffn_up_exps.weight"].read())[1].reshape(4, -1)
    for i in range(4):
        x = np.abs(weights[f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight"].astype(np.float64))
        kept = np.sort(x.reshape(-1, 4))[:, 1:]
        assert (d[i] == np.float16(kept.mean())).all()
    assert len(np.unique(d)) > 1


# ---- what is exact ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_ulp_is_not_exact(tmp_path, dtype):
    """A weight or a scale that is off by one unit in the last place, of float64 too, is reported by convert and verify."""
    model = small_models.make(tmp_path / "m", "llama", dtype=dtype)

    def change(tensors):
        for name, place in ("self_attn.q_proj", (0, 1)), ("mlp.up_proj", (7, slice(128, 256))):
            w = tensors[f"model.layers.0.{name}.weight"][place]
            w.copy_(torch.where(w == 0, 0, torch.nextafter(w, torch.full_like(w, torch.inf) * w.sign())))

    small_models.edit_weights(model, change)
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out, "--require-exact")
    assert done.returncode == 1 and "2 of 14 tensors are not" in done.stderr
    for args in (["convert", model, "--outfile", out], ["verify", out, model]):
        done = sherry(*args)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "12 TQ1_25 tensors bit for bit as in the checkpoint, 2 as the reference" in done.stdout
    fields = gguf_file.read_gguf(out).fields
    inexact = [n for n, e in zip(fields["sherry.tensor.names"], fields["sherry.tensor.exact"]) if not e]
    assert sorted(inexact) == ["blk.0.attn_q.weight", "blk.0.ffn_up.weight"] and fields["sherry.exact"] is False


def tensor(x, y):
    t = Tensor("t", "", x.shape, None, 0, None)
    t.add(x.size // 128, *encode.compare(x, y.copy(), 128))
    return t


def test_error_and_cosine():
    """Against float64 arithmetic written here, at any magnitude."""
    rng = np.random.default_rng(0)
    for scale in 1.0, 1e-30, 1e30:
        x = (scale * rng.standard_normal((40, 512))).astype(np.float32)
        y = tq1_25.dequantize(tq1_25.quantize(rng.standard_normal((40, 512)))) * np.float32(scale)
        y[:5] = x[:5]
        y[5:7, 128:256] = 0
        t = tensor(x, y)
        a, b = x.astype(np.float64), y.astype(np.float64)
        assert t.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
        assert t.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)
        assert (t.blocks, t.exact, t.vanished) == (160, 20, 2)
    zero = np.zeros((2, 128), np.float32)
    assert (tensor(x[:2, :128], zero).cosine, tensor(x[:2, :128], zero).relative_error) == (0, 1)
    assert (tensor(zero, zero).cosine, tensor(zero, zero).relative_error, tensor(zero, zero).exact) == (1, 0, 2)


def test_blocks_that_vanish_are_told(latent, tmp_path):
    model = shutil.copytree(latent, tmp_path / "m")

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1e-25

    small_models.edit_weights(model, change)
    for args in (["convert", model, "--outfile", tmp_path / "x.gguf"], ["verify", tmp_path / "x.gguf", model]):
        done = sherry(*args)
        assert done.returncode == 0, done.stdout + done.stderr
        if args[0] == "convert":
            assert "768 blocks became all zero because their mean magnitude is below" in done.stdout and re.search(
                r"\(6e-8\): blk\.(?:\*|1)\.ffn_up", done.stdout
            )
            assert re.search(r"blk\.\*\.ffn_up.*error <= 1.0000, cosine >= 0.0000", done.stdout)


@pytest.mark.slow
def test_columns_put_together_are_no_rows():
    """torch.cat along the rows is read piece by piece, along the columns as a whole."""
    script = """
import numpy as np, torch
from sherry_gguf.convert import rows as convert_rows, upstream
lazy = upstream.upstream().LazyTorchTensor
a, b = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12).reshape(2, 3)
for f, dim in (torch.cat, 0), (torch.cat, 1), (torch.cat, -1), (torch.stack, 0), (torch.stack, 1), (torch.stack, -1):
    for call in (lambda p: f(p, dim), lambda p: f(p, dim=dim)):
        wanted = f([a, b], dim).numpy()
        data = call([lazy.from_eager(a), lazy.from_eager(b)])
        rows = [load() for _, load in convert_rows.row_loaders(data, wanted.shape[-1])]
        assert len(rows) == 1 + (dim == 0), (f, dim)
        assert np.array_equal(np.concatenate(rows), wanted.reshape(-1, wanted.shape[-1])), (f, dim)
"""
    process = conftest.python(script)
    output, _ = process.communicate()
    assert process.returncode == 0, output


def test_wide_groups_of_an_exact_checkpoint(tmp_path):
    """A checkpoint trained per channel, its config saying so, is exact in blocks of 128 too."""
    model = small_models.make(tmp_path / "m", "llama", group=256)
    small_models.edit_config(
        model,
        sherry_config={
            "method": "sparse_absmean",
            "granularity": "per_channel",
            "n": 3,
            "m": 4,
            "weights": "fake_quantized",
        },
    )
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out, "--keep", "ffn_down", "--require-exact")
    assert done.returncode == 0, done.stderr
    fields = gguf_file.read_gguf(out).fields
    assert fields["sherry.granularity"] == "per_channel" and "sherry.group_size" not in fields
    assert fields["sherry.weights"] == "fake_quantized" and fields["sherry.exact"] is True


def test_inexact_is_told(tmp_path):
    """One weight that is off makes its tensor quantized, and tells how much of it."""
    model = small_models.make(tmp_path / "m", "llama")
    small_models.edit_config(model, sherry_config={"weights": "fake_quantized"})

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][7, 200] = 0.25

    small_models.edit_weights(model, change)
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("blk.*.ffn_up"))
    assert "exact 1/2, 99.9 % of blocks; quantized: error <=" in line
    assert re.search(r"fake_quantized, yet these are not .*: blk\.1\.ffn_up\.weight\. --keep keeps them", done.stdout)
    fields = gguf_file.read_gguf(out).fields
    flags = dict(zip(fields["sherry.tensor.names"], fields["sherry.tensor.exact"]))
    assert [k for k, v in flags.items() if not v] == ["blk.1.ffn_up.weight"]
    before = small_models.snapshot(tmp_path)
    done = sherry("convert", model, "--outfile", out, "--require-exact")
    assert done.returncode == 1 and "--require-exact: 1 of 14 tensors" in done.stderr and "ffn_up" in done.stderr
    assert small_models.snapshot(tmp_path) == before
    done = sherry("convert", model, "--outfile", out, "--require-exact", "--keep", r"layers\.1\.mlp\.up")
    assert done.returncode == 0
    assert gguf_file.read_gguf(out).tensors["blk.1.ffn_up.weight"].type.name == "F16"
