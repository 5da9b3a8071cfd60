"""TQ1_25_64: which matrices get it, by their rows and by the groups of training, and what the file says of them."""

import conftest
import numpy as np
import pytest
import small_models
import torch
from conftest import sherry
from gguf_tensors import load
from safetensors.numpy import load_file

from sherry_gguf import gguf_file, ternary, tq1_25_64

pytest_plugins = "conversion_fixtures"

LAYER = "model.layers.0."
DOWN = f"{LAYER}mlp.down_proj"


def converted(model, out, *flags, both=()):
    """Convert, and verify with `both` flags, which must go well; return convert's text, the file's metadata and its tensors."""
    done = sherry("convert", model, "--outfile", out, *flags, *both)
    assert done.returncode == 0, done.stderr
    proof = sherry("verify", out, model, *both)
    assert proof.returncode == 0, proof.stdout + proof.stderr
    found = gguf_file.read_gguf(out)
    return done.stdout, found.fields, found.tensors


def kinds(tensors):
    """The last part of the names of ternary tensors of block 0, to their type."""
    return {name.split(".")[2]: t.type.name for name, t in tensors.items() if name.startswith("blk.0.") and "TQ1_25" in t.type.name}


def test_by_rows(zoo):
    """TQ1_25 if rows are whole blocks of 128, else TQ1_25_64, and why is said."""
    root, results = zoo
    mixed, smol = (gguf_file.read_gguf(root / f"{name}.gguf") for name in ("llama-64", "smollm2"))
    assert {name for name, kind in kinds(mixed.tensors).items() if kind == "TQ1_25_64"} == {"ffn_down"}
    assert len(kinds(smol.tensors)) == 7 and set(kinds(smol.tensors).values()) == {"TQ1_25_64"}
    assert (mixed.fields["general.file_type"], smol.fields["general.file_type"]) == (125, 126)
    assert mixed.fields["sherry.group_size"] == 128 and smol.fields["sherry.group_size"] == 64
    groups = dict(zip(mixed.fields["sherry.tensor.names"], mixed.fields["sherry.tensor.group_size"], strict=True))
    assert groups == {name: 64 if "ffn_down" in name else 128 for name in groups} and len(groups) == 14
    assert "sherry.tensor.group_size" not in smol.fields
    text = results["llama-64"].stdout
    assert "\nnote: ternary matrices: 12 TQ1_25, 2 TQ1_25_64\n" in text
    assert "\nnote: stored as TQ1_25_64, rows of 192, not a multiple of 128: blk.*.ffn_down.weight (2 blocks)\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("blk.*.ffn_down"))
    assert line.split()[1] == "TQ1_25_64" and line.endswith("1.500    exact 2/2")
    assert "\nnote: ternary matrices: 14 TQ1_25_64\n" in results["smollm2"].stdout
    assert "TQ1_25_64" not in results["llama"].stdout


@pytest.mark.parametrize("by_flag", [False, True])
def test_groups_of_64(tmp_path, by_flag):
    """A checkpoint with a scale for 64 weights is exact in TQ1_25_64, whatever its rows."""
    model = small_models.make(tmp_path / "m", "llama", group=64)
    both = ["--group-size", 64] if by_flag else []
    if not by_flag:
        small_models.edit_config(model, sherry_config=dict(group_size=64, weights="fake_quantized"))
    text, fields, tensors = converted(model, tmp_path / "x.gguf", "--require-exact", both=both)
    assert len(kinds(tensors)) == 7 and set(kinds(tensors).values()) == {"TQ1_25_64"}
    assert fields["general.file_type"] == 126 and fields["sherry.group_size"] == 64 and "sherry.tensor.group_size" not in fields
    assert "note: stored as TQ1_25_64, groups of 64, not a multiple of 128: blk.*." in text
    said = sherry("verify", tmp_path / "x.gguf", model, *([] if by_flag else ["--group-size", 128])).stdout
    says = "blk.0.attn_q.weight: stored as TQ1_25_64, but conversion with these flags stores TQ1_25. Pass the same flags as for the "
    assert f"{says}conversion, such as --group-size or --granularity\n" in said
    text, fields, tensors = converted(model, tmp_path / "y.gguf", both=["--group-size", 128])
    assert set(kinds(tensors).values()) == {"TQ1_25"} and fields["sherry.exact"] is False and "exact 0/14" in text


SHAPE = dict(hidden_size=192, intermediate_size=384, num_attention_heads=3, num_key_value_heads=1)


@pytest.mark.parametrize("granularity, size, kind", [
    ("per_group", 64, "TQ1_25_64"), ("per_group", 128, "TQ1_25"), ("per_group", 192, "TQ1_25_64"), ("per_channel", 0, "TQ1_25"),
    ("per_tensor", 0, "TQ1_25"),
])  # fmt: skip
def test_latent_weights(tmp_path, granularity, size, kind):
    """Each block has the scale of its group. Rows of 192 are TQ1_25_64; those of 384 are `kind`."""
    model = small_models.make(tmp_path / "m", "llama", latent=True, dtype=torch.float32, config=SHAPE)
    flags = ["--granularity", granularity] + (["--group-size", size] if size else [])
    _, fields, tensors = converted(model, tmp_path / "x.gguf", both=flags)
    assert kinds(tensors) == {name: kind if name == "ffn_down" else "TQ1_25_64" for name in kinds(tensors)} and len(kinds(tensors)) == 7
    assert fields["general.file_type"] == (126 if kind == "TQ1_25_64" else 125)
    x = load_file(model / "model.safetensors")[f"{LAYER}mlp.up_proj.weight"]
    lanes, d = tq1_25_64.TYPE.unpack(tensors["blk.0.ffn_up.weight"].read())
    group = 64 if size == 128 else size or 192  # rows of 192 have no groups of 128
    _, scale = ternary.sparse_absmean(x, group)
    scale = np.full_like(scale, scale.mean()) if granularity == "per_tensor" else scale
    assert (d == np.repeat(scale.astype(np.float16), group // 64, axis=1)).all()
    assert (lanes == ternary.sparse_absmean(x, 64)[0]).all()


@pytest.mark.parametrize("config, was, flags", [
    ({}, "groups of 128", "--group-size 64"),
    (dict(group_size=128, weights="fake_quantized"), "groups of 128", "--group-size 64"),
    (dict(granularity="per_channel"), "per_channel", "--group-size 64 --granularity per_group"),
])  # fmt: skip
def test_groups_of_64_that_nobody_told(tmp_path, config, was, flags):
    """A note names the flags that lose nothing, and --require-exact does so too; a matrix that is off is not promised to be exact."""
    model = small_models.make(tmp_path / "m", "llama", group=64)
    small_models.edit_config(model, sherry_config=config)

    def change(tensors):
        tensors[f"{DOWN}.weight"][-1, -1] = 0.25

    small_models.edit_weights(model, change)
    text, _, _ = converted(model, tmp_path / "x.gguf")
    (note,) = (line for line in text.splitlines() if line.startswith(f"note: exact in groups of 64, but not in {was}: blk."))
    assert note.endswith(f". Pass {flags}") and "blk.1.ffn_down.weight" in note and "blk.0.ffn_down" not in note
    assert ("were quantized, with loss: blk.0.ffn_down.weight. --keep keeps them" in text) == ("weights" in config)
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact")
    assert done.returncode == 1 and f". Pass {flags}. --keep keeps the others unquantized: blk.0.ffn_down.weight. " in done.stderr
    done = sherry("convert", model, "--outfile", tmp_path / "y.gguf", "--require-exact", *flags.split(), "--keep", r"0\.ffn_down")
    assert done.returncode == 0, done.stderr
    assert "note: exact" not in done.stdout


def test_groups_by_matrix(tmp_path):
    """sherry_config's group_sizes: matrices with another group size than the others."""
    model = small_models.make(tmp_path / "m", "llama")
    generator = torch.Generator().manual_seed(1)

    def change(tensors):
        w = tensors[f"{DOWN}.weight"]
        w.copy_(small_models.sparse_ternary(w.float(), generator, 64))

    small_models.edit_weights(model, change)
    done = sherry("convert", model, "--outfile", tmp_path / "x.gguf", "--require-exact")
    assert done.returncode == 1 and "1 of 14 tensors are not 3:4 sparse ternary with fp16 scales in groups of 128" in done.stderr
    small_models.edit_config(model, sherry_config=dict(group_size=128, group_sizes={DOWN: 64}, weights="fake_quantized"))
    text, fields, tensors = converted(model, tmp_path / "x.gguf", "--require-exact")
    assert [name for name, t in tensors.items() if t.type.name == "TQ1_25_64"] == ["blk.0.ffn_down.weight"]
    assert fields["sherry.group_size"] == 128
    assert [name for name, size in zip(fields["sherry.tensor.names"], fields["sherry.tensor.group_size"], strict=True) if size != 128] == [
        "blk.0.ffn_down.weight"
    ]
    assert "note: stored as TQ1_25_64, groups of 64, not a multiple of 128: blk.0.ffn_down.weight\n" in text
    for flags in ["--group-size", 128], ["--granularity", "per_channel"]:  # overrule both keys
        _, _, tensors = converted(model, tmp_path / "y.gguf", both=flags)
        assert set(kinds(tensors).values()) == {"TQ1_25"}
    _, _, tensors = converted(model, tmp_path / "y.gguf", "--require-exact", both=["--granularity", "per_group"])
    assert kinds(tensors)["ffn_down"] == "TQ1_25_64"


def test_names_that_upstream_shortens(tmp_path):
    """A text model inside another: sherry_config has the checkpoint's names."""
    model = small_models.make(tmp_path / "m", "llama-64", group=64)

    def change(tensors):
        for name in [name for name in tensors if ".layers." in name]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    small_models.edit_weights(model, change)
    layers = "model.language_model.layers."
    small_models.edit_config(
        model, sherry_config=dict(group_sizes={f"{layers}0.mlp.up_proj": 64}, kept=[f"{layers}{i}.mlp.gate_proj.weight" for i in range(2)])
    )
    _, _, tensors = converted(model, tmp_path / "x.gguf")
    assert kinds(tensors)["ffn_up"] == "TQ1_25_64" and kinds(tensors)["attn_q"] == "TQ1_25" and "ffn_gate" not in kinds(tensors)


def test_groups_of_experts(tmp_path):
    """A stack has the largest blocks that all its experts allow, whatever the other stacks need."""
    model = small_models.make(tmp_path / "m", "mixtral")
    experts = f"{LAYER}block_sparse_moe.experts"
    generator = torch.Generator().manual_seed(1)

    def change(tensors):
        w = tensors[f"{experts}.2.w2.weight"]
        w.copy_(small_models.sparse_ternary(w.float(), generator, 64))

    small_models.edit_weights(model, change)
    small_models.edit_config(model, sherry_config=dict(group_size=128, group_sizes={f"{experts}.2.w2": 64}))
    _, _, tensors = converted(model, tmp_path / "x.gguf", "--require-exact")
    assert [name for name, t in tensors.items() if t.type.name == "TQ1_25_64"] == ["blk.0.ffn_down_exps.weight"]
    small_models.edit_config(model, sherry_config=dict(kept=[f"{experts}.{i}.w2.weight" for i in range(4)]))
    _, _, tensors = converted(model, tmp_path / "x.gguf", "--require-exact")
    assert tensors["blk.0.ffn_down_exps.weight"].type.name == "F16"
    assert kinds(tensors)["ffn_up_exps"] == kinds(tensors)["ffn_gate_exps"] == "TQ1_25"


def test_experts_whose_rows_fit_differently(tmp_path):
    model = small_models.make(tmp_path / "m", "mixtral", config=dict(intermediate_size=192))
    _, fields, tensors = converted(model, tmp_path / "x.gguf", "--require-exact")
    assert {name for name, kind in kinds(tensors).items() if kind == "TQ1_25_64"} == {"ffn_down_exps"}
    assert kinds(tensors)["ffn_up_exps"] == "TQ1_25" and fields["general.file_type"] == 125


def test_split_and_dry_run(zoo, tmp_path):
    root, _ = zoo
    planned = sherry("convert", root / "llama-64", "--outfile", tmp_path / "a.gguf", "--dry-run")
    assert planned.returncode == 0 and not list(tmp_path.iterdir())
    assert "note: ternary matrices: 12 TQ1_25, 2 TQ1_25_64\n" in planned.stdout
    types = {line.split()[0]: line.split()[1] for line in planned.stdout.splitlines() if line.startswith("blk.0.")}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("TQ1_25_64", "TQ1_25")
    done = sherry("convert", root / "llama-64", "--outfile", tmp_path / "a.gguf", "--split-max-tensors", 8)
    assert done.returncode == 0, done.stderr
    whole, parts = load(root / "llama-64.gguf"), load(tmp_path / "a-00002-of-00003.gguf")
    assert parts.keys() == whole.keys()
    assert all(parts[name][0] == kind and np.array_equal(parts[name][1], x) for name, (kind, x) in whole.items())
    assert sherry("verify", tmp_path / "a-00001-of-00003.gguf", root / "llama-64").returncode == 0


def test_embeddings(zoo, tmp_path):
    """--token-embedding-type takes TQ1_25_64, and says which rows TQ1_25 does not fit."""
    root, _ = zoo
    flags = [*conftest.pre("smollm2"), "--token-embedding-type"]
    _, _, tensors = converted(root / "smollm2", tmp_path / "x.gguf", both=[*flags, "TQ1_25_64"])
    assert tensors["token_embd.weight"].type.name == "TQ1_25_64"
    done = sherry("convert", root / "smollm2", "--outfile", tmp_path / "y.gguf", *flags, "TQ1_25")
    assert done.returncode == 1 and "token_embd.weight has rows of 192, TQ1_25 needs a multiple of 128" in done.stderr


def test_kept_by_training(tmp_path, fails):
    """Rows that training did not fit into its groups stay F16, or become --fallback-type, which may not be ternary."""
    model = small_models.make(tmp_path / "m", "llama-64")
    downs = [DOWN, DOWN.replace("layers.0", "layers.1")]
    small_models.edit_config(model, sherry_config=dict(group_size=128, kept=[f"{name}.weight" for name in downs]))
    for flags, kind in ([], "F16"), (["--fallback-type", "Q8_0"], "Q8_0"):
        text, _, tensors = converted(model, tmp_path / "x.gguf", both=flags)
        assert {tensors[f"blk.{i}.ffn_down.weight"].type.name for i in range(2)} == {kind}
    assert "stored as Q8_0, rows of 192, not a multiple of 128: blk.*.ffn_down.weight (2 blocks)" in text
    # Training had groups of 64, which fit these rows: it kept the matrix on purpose.
    for sizes in dict(group_size=128, group_sizes={downs[1]: 64}), dict(group_size=64):
        small_models.edit_config(model, sherry_config=sizes | dict(kept=[f"{DOWN}.weight"]))
        text, _, tensors = converted(model, tmp_path / "x.gguf", both=["--fallback-type", "Q8_0"])
        assert tensors["blk.0.ffn_down.weight"].type.name == "F16" and tensors["blk.1.ffn_down.weight"].type.name == "TQ1_25_64"
        assert "stored as Q8_0" not in text and "fallback" not in text
    for kind in "TQ1_25", "tq1_25_64", "STQ1_0":
        fails(model, "--fallback-type", kind, says=[f"--fallback-type {kind}" if kind != "STQ1_0" else "unknown tensor type STQ1_0"])
