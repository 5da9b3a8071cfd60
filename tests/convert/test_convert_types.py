"""The types and the files that a conversion writes: what is kept, in which type, rows that fit no block, splits, names."""

import argparse
import json
import re
import shutil

import conftest
import numpy as np
import pytest
import small_models
import torch
from conftest import sherry
from gguf_tensors import load, same

from sherry_gguf import gguf_file, gguf_type
from sherry_gguf.convert import command, encode

gguf = gguf_type.register()

pytest_plugins = "conversion_fixtures"

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
    """Rows that are not a multiple of 64 become Q4_0, said once; what F16 cannot hold stays F32."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(intermediate_size=352))

    def change(tensors):
        tensors["model.embed_tokens.weight"][3, 3] = -70000.0
        tensors["lm_head.weight"][5, 5] = 70000.0

    small_models.edit_weights(model, change)
    out = tmp_path / "x.gguf"
    done = sherry("convert", model, "--outfile", out)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.count("stored as Q4_0, rows of 352, not a multiple of 64: blk.*.ffn_down.weight (2 blocks)") == 1
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
    assert done.returncode == 1 and "no tensor can be TQ1_25 or TQ1_25_64. --keep keeps 16 tensors" in done.stderr
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


# ---- rows that do not fit ----


@pytest.mark.slow
def test_all_misfits_are_listed_once(tmp_path, fails):
    """With the flags that convert what fits, as a line to copy."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(intermediate_size=640))
    small_models.edit_config(model, sherry_config=dict(group_size=256))
    done = fails(model, says=["2 of 14 matrices have rows of 640, not a multiple of the group size, 256: blk.*.ffn_down.weight (2 blocks)"])
    flags = done.stderr[done.stderr.index("--keep") :].splitlines()[0].split()
    assert sherry("convert", model, "--outfile", tmp_path / "x.gguf", *flags).returncode == 0
    fails(model, "--keep", "attn_q", says=["2 of 12 matrices have rows of 640", "\n  --keep attn_q --keep ffn_down \nor to quantize"])
    small_models.edit_config(model, sherry_config=dict(group_size=512))
    done = fails(
        model, "--keep", "attn_q", says=["12 of 12 matrices have rows of 256, 640", ". To quantize all weights again, with loss:\n"]
    )
    assert "--keep" not in done.stderr  # nothing would be left
    flag = "--output-tensor-type"
    small_models.edit_config(model, sherry_config=dict(group_size=128, group_sizes={"lm_head": 512}))
    done = fails(
        model, flag, "TQ1_25", says=["1 of 15 matrices", f"unquantized:\n  {flag} with a type that is not ternary\nor to quantize"]
    )
    assert "--keep" not in done.stderr
    assert sherry("convert", model, "--outfile", tmp_path / "x.gguf", flag, "Q6_K").returncode == 0


@pytest.mark.slow
def test_fallback_types(tmp_path, fails):
    """Rows that no block of 64 fits: Q4_0, shown with what other types would take."""
    model = small_models.make(tmp_path / "m", "llama", config=dict(hidden_size=160, num_attention_heads=5, num_key_value_heads=1))
    out = tmp_path / "x.gguf"
    sizes = {}
    for flags, kind in (
        ([], "Q4_0"),
        (["--fallback-type", "q8_0"], "Q8_0"),
        (["--fallback-type", "F16"], "F16"),
        (["--fallback-type", "Q6_K"], "F16"),
    ):
        planned = sherry("convert", model, "--outfile", out, "--dry-run", *flags).stdout
        done = sherry("convert", model, "--outfile", out, *flags)
        assert done.returncode == 0, done.stderr
        for text in planned, done.stdout:
            nor = " nor of 256, which Q6_K needs" if "Q6_K" in flags else ""
            assert f" {kind}, rows of 160, not a multiple of 64{nor}: " in text
            line = next(line for line in text.splitlines() if line.startswith("blk.*.attn_q.weight"))
            assert line.split()[1] == kind and line.endswith("fallback")
        assert sherry("verify", out, model, *flags).returncode == 0
        says = done.stdout[done.stdout.index("by --fallback-type: ") :].splitlines()[0]
        sizes[kind] = sum(int(line.split()[4].replace(",", "")) for line in done.stdout.splitlines() if line.endswith("fallback"))
        assert f"{kind} {sizes[kind] / 1e6:.1f} MB" in says
    assert sizes["Q4_0"] * 8.5 == sizes["Q8_0"] * 4.5 and sizes["Q4_0"] * 16 == sizes["F16"] * 4.5
    # what training kept in full precision stays so, if nothing else is asked for
    kept = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    small_models.edit_config(model, sherry_config=dict(kept=kept))
    for flags, kind in ([], "F16"), (["--fallback-type", "Q8_0"], "Q8_0"):
        done = sherry("convert", model, "--outfile", out, *flags)
        assert next(line for line in done.stdout.splitlines() if line.startswith("blk.*.ffn_up.weight")).split()[1] == kind
    small_models.edit_config(model, sherry_config=None)
    out.unlink()
    fails(model, "--require-exact", says=["tensors would be stored as Q4_0, with loss", "Pass --fallback-type F16 as well"])
    assert sherry("convert", model, "--outfile", out, "--require-exact", "--fallback-type", "F16").returncode == 0
    fails(model, "--fallback-type", "Q5", says=["unknown tensor type Q5"])
    fails(model, "--fallback-type", "tq1_25", says=["--fallback-type"])


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
    """Links are written through, permissions stay, and other splits are left alone and reported."""
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


# ---- the Hugging Face cache ----


@pytest.mark.slow
def test_a_snapshot_of_the_cache_is_named_after_its_repository(good, tmp_path):
    repository = tmp_path / "models--some-org--Tiny-Llama-1M"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(good.iterdir())):
        shutil.copy(path, repository / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    for directory in snapshot, tmp_path / "link":
        done = sherry("convert", directory)
        target = snapshot / "Tiny-Llama-1M-TQ1_25.gguf"
        assert done.returncode == 0 and target.is_file(), done.stderr
        assert "general.name                                  Tiny Llama 1M" in sherry("inspect", target).stdout
        target.unlink()
