"""Conversion of small models, tensor by tensor against upstream's own F32 conversion of the same checkpoint."""

import argparse
import json
import re
import shutil
import types

import conftest
import numpy as np
import pytest
import small_models
import torch
from conftest import sherry

from sherry_gguf import gguf_file, gguf_type, llama_cpp, ternary, tq1_25
from sherry_gguf.convert import Options, command, encode, plan
from sherry_gguf.convert.tensor import Tensor
from sherry_gguf.errors import ConvertError

gguf = gguf_type.register()

# Matrices in blocks that are not stored as TQ1_25, by model.
KEPT = {
    "mixtral": ["ffn_gate_inp"],
    "qwen3moe": ["ffn_gate_inp"],
    "gptoss": ["ffn_gate_inp", "_exps"],
    "olmoe": ["ffn_gate_inp"],
    "deepseek2": ["ffn_gate_inp", "attn_k_b"],
    "mamba": ["ssm_conv1d", "ssm_a", "ssm_dt"],
}


def load(path):
    """name: (type, float32 array) of all tensors of a file."""
    model = gguf_file.read_gguf(path)
    return {name: (t.type.name, gguf.quants.dequantize(t.read(), t.type).reshape(t.shape)) for name, t in model.tensors.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, but for the sign of zeros."""
    return a.shape == b.shape and (a + 0.0).tobytes() == (b + 0.0).tobytes()


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
            assert qtype == "TQ1_25", key
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
    "blocks, told",
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
def test_missing_matrices(blocks, told):
    """A lost matrix is told, blocks of several kinds are not; with a list of figures by block anything goes."""
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
    if told:
        with pytest.raises(ConvertError, match=re.escape(told)):
            check(2)
    else:
        check(2)


# ---- latent weights, groups ----


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("latent") / "llama", "llama", latent=True, dtype=torch.float32)


@pytest.mark.parametrize("granularity, size", [("per_group", 128), ("per_group", 256), ("per_channel", 0), ("per_tensor", 0)])
def test_latent(latent, tmp_path, granularity, size):
    """Blocks of a wider group all hold its scale; verify agrees."""
    flags = ["--granularity", granularity] + (["--group-size", size] if size else [])
    out = tmp_path / "x.gguf"
    keep = ["--keep", "ffn_down"]  # whose rows of 384 are no whole groups of 256
    commands = ["convert", latent, "--outfile", out], ["verify", out, latent]
    done, proof = (sherry(*command, *flags, *keep) for command in commands)
    assert done.returncode == 0, done.stderr
    assert "exact 0/12, 0.0 % of blocks; quantized: error <= 0.5" in done.stdout
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
    told = dict(zip(model.fields["sherry.tensor.names"], model.fields["sherry.tensor.relative_error"]))
    assert told["blk.0.ffn_up.weight"] == pytest.approx(error, rel=1e-4)


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
    """A weight or a scale that is off by one unit in the last place, of float64 too, is told by convert and verify."""
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
    t.add(x.size // 128, *encode.compare(x, y.copy()))
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
            assert "768 blocks that are not all zero became so" in done.stdout and re.search(
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


# ---- what is kept, and how ----


@pytest.mark.slow
def test_embedding_types(zoo, tmp_path):
    root, _ = zoo
    out = [tmp_path / f"{i}.gguf" for i in range(4)]
    results = [
        sherry(*args)
        for args in (
            [
                "convert",
                root / "llama",
                "--outfile",
                out[0],
                "--token-embedding-type",
                "q6_k",
                "--output-tensor-type",
                "Q8_0",
            ],
            ["convert", root / "llama-tied", "--outfile", out[1], "--token-embedding-type", "TQ1_25"],
            ["convert", root / "llama-tied", "--outfile", out[2], "--output-tensor-type", "Q8_0"],
            [
                "convert",
                root / "qwen2",
                "--outfile",
                out[3],
                "--token-embedding-type",
                "Q4_K",
                "--tokenizer-pre",
                "gpt-2",
            ],
            ["verify", out[0], root / "llama", "--token-embedding-type", "q6_k", "--output-tensor-type", "Q8_0"],
            ["verify", out[1], root / "llama-tied", "--token-embedding-type", "TQ1_25"],
        )
    ]
    assert [r.returncode for r in results] == [0, 0, 1, 1, 0, 0], results
    assert "has no output tensor" in results[2].stderr and "use --token-embedding-type" in results[2].stderr
    assert "token_embd.weight has rows of 896, Q4_K needs a multiple of 256" in results[3].stderr
    stored = {k: t.type.name for k, t in gguf_file.read_gguf(out[0]).tensors.items()}
    assert (stored["token_embd.weight"], stored["output.weight"]) == ("Q6_K", "Q8_0")
    assert load(out[1])["token_embd.weight"][0] == "TQ1_25"
    wanted = load(root / "llama.f32.gguf")
    for name, error in (("token_embd.weight", 0.02), ("output.weight", 0.01)):
        x, y = wanted[name][1], load(out[0])[name][1]
        assert np.linalg.norm(x - y) < error * np.linalg.norm(x)


def test_odd_rows_and_large_weights(tmp_path):
    """Rows that are not a multiple of 128 become Q4_0, said once; what F16 cannot hold stays F32."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(intermediate_size=320))

    def change(tensors):
        tensors["model.embed_tokens.weight"][3, 3] = -70000.0
        tensors["lm_head.weight"][5, 5] = 70000.0

    small_models.edit_weights(model, change)
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.count("stored as Q4_0, rows of 320, not a multiple of 128: blk.*.ffn_down.weight (2 blocks)") == 1
    assert "kept in F32, a weight of magnitude 70144, too large for F16: output.weight, token_embd.weight" in text
    tensors = load(out)
    assert tensors["token_embd.weight"][0] == "F32" and tensors["token_embd.weight"][1].min() == -70144
    assert tensors["blk.1.ffn_down.weight"][0] == "Q4_0"
    assert sherry("verify", out, model).returncode == 0
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--token-embedding-type", "Q8_0")
    assert done.returncode == 1 and "Q8_0 holds none beyond 65504: BF16 or F32 does" in done.stderr


def test_largest_weights_of_bf16(tmp_path):
    """What rounds to infinity in BF16 is refused."""
    model = small_models.make(tmp_path / "m", "llama", dtype=torch.float32)
    for weight, code in (3.3895e38, 0), (3.4e38, 1):
        small_models.edit_weights(model, lambda tensors, w=weight: tensors["lm_head.weight"].view(-1)[:1].fill_(w))
        done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--output-tensor-type", "bf16")
        assert done.returncode == code, done.stderr
    assert "output.weight (lm_head.weight) has a weight of magnitude 3.4e+38, BF16 holds none" in done.stderr


def test_keep(zoo, tmp_path):
    root, _ = zoo
    convert = ["convert", root / "llama", "--outfile", tmp_path / "x.gguf"]
    done = sherry(*convert, "--keep", "ffn_dwon", "--keep", "attn_q")
    assert done.returncode == 1 and "--keep ffn_dwon: no tensor has such a name" in done.stderr
    done = sherry(*convert, "--keep", ".")
    assert done.returncode == 1 and "no tensor can be TQ1_25. --keep keeps 16 tensors" in done.stderr
    assert not list(tmp_path.iterdir())
    flags = ["--keep", "output", "--output-tensor-type", "Q8_0"]
    done = sherry(*convert, *flags)
    assert done.returncode == 0 and "stored as Q8_0, as asked, which overrules --keep: output.weight" in done.stdout
    stored = {k: t.type.name for k, t in gguf_file.read_gguf(tmp_path / "x.gguf").tensors.items()}
    assert (stored["output.weight"], stored["blk.0.attn_output.weight"]) == ("Q8_0", "F16")
    done = sherry("verify", tmp_path / "x.gguf", root / "llama", *flags)
    assert done.returncode == 0 and "9 kept in another type (3 F16, 5 F32, 1 Q8_0)" in done.stdout, done.stdout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("safe", [True, False])
def test_other_checkpoints(tmp_path, dtype, safe):
    """float64, float32 and float16, several shards, and PyTorch's own format, each verified."""
    model = small_models.make(tmp_path / "m", "llama", dtype=dtype, shard="1MB", safe=safe)
    assert len(list(model.glob("*-of-*"))) > 2
    before = small_models.snapshot(model)
    for args in (
        ["convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact"],
        ["verify", tmp_path / "x.gguf", model],
    ):
        done = sherry(*args)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "14 TQ1_25 tensors bit for bit as in the checkpoint" in done.stdout
    assert small_models.snapshot(model) == before


@pytest.mark.slow
def test_chunks(zoo, tmp_path):
    """Reading by a few rows gives the same file as reading at once."""
    root, _ = zoo
    for name in ("mixtral", "phi", "gpt2"):
        out = tmp_path / f"{name}.gguf"
        patch = "from sherry_gguf.convert import rows\nrows.CHUNK = 2000"
        done = sherry("convert", root / name, "--outfile", out, *conftest.pre(name), patch=patch)
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == (root / f"{name}.gguf").read_bytes()


def test_fused_qkv(zoo, tmp_path):
    """Upstream's own flags: what they put together is still exact, and verify needs them too."""
    root, _ = zoo
    done = sherry("convert", root / "llama", "--outfile", tmp_path / "x.gguf", "--fuse-qkv", "--require-exact")
    assert done.returncode == 0, done.stderr
    assert gguf_file.read_gguf(tmp_path / "x.gguf").tensors["blk.0.attn_qkv.weight"].type.name == "TQ1_25"
    assert sherry("verify", tmp_path / "x.gguf", root / "llama", "--fuse-qkv").returncode == 0
    assert sherry("verify", tmp_path / "x.gguf", root / "llama").returncode == 1


@pytest.mark.slow
def test_peak_memory(zoo, tmp_path):
    """A model 100 times as large takes hardly more memory: tensors go through in chunks."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    model = small_models.make(tmp_path / "m", "llama", config=config, latent=True, dtype=torch.bfloat16)
    assert (model / "model.safetensors").stat().st_size > 240e6
    script = (
        "import resource, sys\nfrom sherry_gguf import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for source in (zoo[0] / "llama", model):
        output, _ = conftest.python(script, "convert", source, "--outfile", tmp_path / "x.gguf").communicate()
        peaks.append(int(re.search(r"peak (\d+)", output)[1]) * 1024)
    assert peaks[1] - peaks[0] < 120e6 + 30e6 * encode.WORKERS, peaks


# ---- files ----


def test_split(zoo, tmp_path):
    root, _ = zoo
    whole = load(root / "llama.gguf")
    (tmp_path / "a-00002-of-00003.gguf").write_bytes(b"of an earlier run")
    for args in (
        ["convert", root / "llama", "--outfile", tmp_path / "a.gguf", "--split-max-tensors", 8],
        [
            "convert",
            root / "llama",
            "--outfile",
            tmp_path / "b.gguf",
            "--split-max-size",
            "300K",
            "--no-tensor-first-split",
        ],
        ["verify", tmp_path / "a-00001-of-00003.gguf", root / "llama"],
    ):
        done = sherry(*args)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)] + [f"b-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    )
    for name in ("a-00002-of-00003.gguf", "b-00001-of-00004.gguf"):
        parts = load(tmp_path / name)
        assert parts.keys() == whole.keys() and all(same(parts[k][1], whole[k][1]) for k in whole)
    first = gguf.GGUFReader(tmp_path / "b-00001-of-00004.gguf")
    assert not first.tensors and first.fields["split.count"].contents() == 4


def test_split_beside_others(zoo, tmp_path):
    """Links are written through, permissions stay, and other splits are left alone and told."""
    root, _ = zoo
    (tmp_path / "a-00001-of-00003.gguf").write_bytes(b"old")
    (tmp_path / "a-00001-of-00003.gguf").chmod(0o600)
    (tmp_path / "there").mkdir()
    (tmp_path / "a-00002-of-00003.gguf").symlink_to(tmp_path / "there" / "x")
    for i in (1, 2):
        (tmp_path / f"a-0000{i}-of-00002.gguf").write_bytes(b"old")
    done = sherry("convert", root / "llama", "--outfile", tmp_path / "a.gguf", "--split-max-tensors", 8)
    assert done.returncode == 0, done.stderr
    assert "left as they are: a-00001-of-00002.gguf, a-00002-of-00002.gguf\n" in done.stdout
    assert (tmp_path / "a-00002-of-00002.gguf").read_bytes() == b"old"
    assert (tmp_path / "a-00001-of-00003.gguf").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a-00002-of-00003.gguf").is_symlink() and (tmp_path / "there" / "x").stat().st_size > 10_000
    assert sherry("verify", tmp_path / "a-00003-of-00003.gguf", root / "llama").returncode == 0


def test_sizes():
    assert [command.size(text) for text in ("7", "2K", "3M", "4G")] == [7, 2000, 3_000_000, 4_000_000_000]
    for text in ("", "K", "-1", "1.5M", "1T", "\u0663M"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
            command.size(text)


def test_dry_run(zoo, tmp_path):
    root, results = zoo
    before = sorted(p.name for p in root.rglob("*"))
    done = sherry("convert", root / "llama", "--dry-run", "--split-max-tensors", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^blk\.0\.attn_q\.weight +TQ1_25 +256 x 256 +11264 +model\.layers\.0\.self_attn\.q_proj\.weight$",
        done.stdout,
        re.M,
    )
    assert f"would write {root}/llama/llama-TQ1_25-00001-of-00003.gguf" in done.stdout
    assert sorted(p.name for p in root.rglob("*")) == before and not list(tmp_path.iterdir())


def test_default_file_and_names(tmp_path):
    model = small_models.make(tmp_path / "my.model", "llama")
    (tmp_path / "meta.json").write_text(json.dumps({"general.author": "somebody"}))
    (tmp_path / "out").mkdir()
    for args in (
        [],
        ["--vocab-only"],
        ["--outfile", tmp_path / "out"],
        ["--outfile", tmp_path / "{ftype}.gguf", "--model-name", "A Name", "--metadata", tmp_path / "meta.json"],
    ):
        done = sherry("convert", model, *args)
        assert done.returncode == 0, done.stderr
    assert (model / "my.model-TQ1_25.gguf").read_bytes() == (tmp_path / "out" / "my.model-TQ1_25.gguf").read_bytes()
    vocab = gguf_file.read_gguf(model / "my.model-vocab.gguf")
    assert not vocab.tensors and len(vocab.fields["tokenizer.ggml.tokens"]) == small_models.VOCAB
    fields = gguf_file.read_gguf(tmp_path / "tq1_25.gguf").fields
    assert (fields["general.name"], fields["general.author"]) == ("A Name", "somebody")


def test_script_and_supported_models():
    import subprocess
    import sys

    script = conftest.TESTS.parent / "scripts" / "convert_hf_to_sherry_gguf.py"
    done = subprocess.run(
        [script, "--print-supported-models"],
        capture_output=True,
        text=True,
        env=conftest.ENV | {"PATH": f"{sys.executable.rpartition('/')[0]}:/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"} <= set(done.stdout.split())
    assert len(done.stdout.split()) > 100
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{script.name}: error: the following arguments are required: MODEL_DIR" in done.stderr
