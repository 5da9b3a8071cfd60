"""llama-quantize to our types: rows that fit and that do not, failures that leave nothing, warnings about weights that are not ternary."""

import os
import re
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import small_models
from built_tools import run, run_for
from conftest import upstream_f32

from sherry_gguf import gguf_type, kernels

pytestmark = pytest.mark.slow

gguf_type.register()


def quantize(*args):
    return run("llama-quantize", *args, 2)


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def types_of(path):
    return {name: t.tensor_type.name for name, t in tensors(path).items()}


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """An F32 GGUF and its importance matrix: rows of 192, and of 384 in ffn_down; four heads share keys and values."""
    root = tmp_path_factory.mktemp("odd")
    shape = dict(hidden_size=192, intermediate_size=384, num_attention_heads=8, num_key_value_heads=2)
    small_models.make(root / "hf", "llama", latent=True, config=shape)
    upstream_f32(root / "hf", root / "f32.gguf")
    upstream_f32(root / "hf", root / "split.gguf", "--split-max-tensors", 15)
    (root / "text.txt").write_text(small_models.corpus()[:20000])
    code, text = run("llama-imatrix", "-m", root / "f32.gguf", "-f", root / "text.txt", "-o", root / "im.gguf", "-c", 128, "-t", 2)
    assert code == 0, text
    return root / "f32.gguf", root / "im.gguf"


def file_type(path):
    return gguf.GGUFReader(path).fields["general.file_type"].contents()


@pytest.mark.parametrize("kind, down", [("TQ1_25", "TQ1_25"), ("TQ1_25_64", "TQ1_25_64"), ("STQ1_0", "Q4_0")])
def test_rows_of_64(odd, tmp_path, kind, down):
    """TQ1_25 becomes TQ1_25_64 where rows are not whole blocks of 128; TQ1_25_64 is for all rows; STQ1_0 falls back."""
    code, text = quantize(odd[0], tmp_path / "q.gguf", kind)
    assert code == 0, text
    source, found = tensors(odd[0]), tensors(tmp_path / "q.gguf")
    matrices = [name for name in found if re.match(r"blk\.\d\.(attn_(q|k|v|output)|ffn_\w+)\.weight", name) and "norm" not in name]
    assert len(matrices) == 14 and file_type(tmp_path / "q.gguf") == gguf_type.TYPES[kind].file_type
    for name in matrices:
        wanted = down if "ffn_down" in name else "Q4_0" if kind == "STQ1_0" else "TQ1_25_64"
        assert found[name].tensor_type.name == wanted, name
        if wanted in gguf_type.TYPES:
            assert f"converting to {wanted.lower()} " in re.search(rf"{name} .*", text)[0]
            assert (found[name].data == gguf_type.TYPES[wanted].quantize(source[name].data)).all(), name
    code, text = run("llama-bench", "-m", tmp_path / "q.gguf", "-p", 40, "-n", 2, "-r", 1, "-t", 2)
    assert code == 0 and re.search(rf"llama .* {kind} - 1\.\d+ bpw 3:4 sparse ternary \|", text), text


def test_rows_of_64_and_an_importance_matrix(odd, tmp_path):
    code, text = quantize("--pure", "--imatrix", odd[1], odd[0], tmp_path / "q.gguf", "TQ1_25")
    assert code == 0, text
    source, found, sums = tensors(odd[0]), tensors(tmp_path / "q.gguf"), tensors(odd[1])
    for name, kind in ("blk.0.ffn_up.weight", "TQ1_25_64"), ("blk.1.attn_v.weight", "TQ1_25_64"), ("blk.1.ffn_down.weight", "TQ1_25"):
        importance = (sums[f"{name}.in_sum2"].data / sums[f"{name}.counts"].data).astype(np.float32).reshape(-1)
        weights, kind = source[name].data, gguf_type.TYPES[kind]
        assert (found[name].data == kernels.quantize(weights, importance, kind)).all(), name
        assert (found[name].data != kernels.quantize(weights, kind=kind)).any()


@pytest.mark.parametrize("flags", [[], ["--no-repack"]])
def test_rows_of_64_compute_what_the_checkpoint_does(flags, tmp_path):
    """SmolLM2's shape, ternary in groups of 64: the file is exact, so it computes what the F32 file does."""
    shape = dict(hidden_size=192, intermediate_size=320, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)
    small_models.make(tmp_path / "hf", "llama", config=shape)
    upstream_f32(tmp_path / "hf", tmp_path / "f32.gguf")
    code, text = quantize("--token-embedding-type", "f16", tmp_path / "f32.gguf", tmp_path / "q.gguf", "TQ1_25")
    assert code == 0 and "WARNING: " not in text, text
    assert {t for name, t in types_of(tmp_path / "q.gguf").items() if "norm" not in name} == {"F16", "TQ1_25_64"}
    assert file_type(tmp_path / "q.gguf") == gguf_type.TYPES["TQ1_25_64"].file_type  # since no tensor is TQ1_25
    (tmp_path / "text.txt").write_text(small_models.corpus()[:4000])
    found = []
    for model in "f32.gguf", "q.gguf":
        common = "-f", tmp_path / "text.txt", "-c", 128, "--chunks", 4, "-t", 2, *flags
        _, match = run_for(r"Final estimate: PPL = ([0-9.]+)", "llama-perplexity", "-m", tmp_path / model, *common)
        found.append(float(match[1]))
    assert found[1] == pytest.approx(found[0], rel=2e-3), found


@pytest.mark.parametrize("d", [np.nan, np.inf, -0.5])
def test_check_tensors_finds_a_bad_scale_of_64(odd, tmp_path, d):
    code, text = quantize(odd[0], tmp_path / "q.gguf", "TQ1_25")
    assert code == 0, text
    reader = gguf.GGUFReader(tmp_path / "q.gguf", "r+")
    data = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data
    data[7, -2:] = np.frombuffer(np.float16(d).tobytes(), np.uint8)  # the last of the row's three blocks
    reader.data.flush()
    code, text = run("llama-cli", "-m", tmp_path / "q.gguf", "-p", "x", "-n", 1, "-st", "--check-tensors")
    assert code == 1 and "tq1_25_64: the scale of block 23 is" in text and "blk.1.ffn_up.weight" in text, text


@pytest.mark.parametrize("kind", ["TQ1_25", "TQ1_25_64", "STQ1_0"])
def test_fallbacks_of_mixed_types(odd, tmp_path, kind):
    """Each type of the mixture has its own fallback: Q4_0 for STQ1_0 and Q2_K, TQ1_25_64 for TQ1_25, Q5_0 for Q4_K."""
    code, text = quantize("--imatrix", odd[1], odd[0], tmp_path / "q.gguf", kind)
    assert code == 0, text
    found = types_of(tmp_path / "q.gguf")
    assert {found[f"blk.{i}.attn_v.weight"] for i in (0, 1)} == {"Q5_0"} and found["token_embd.weight"] == "Q5_0"
    wanted = "Q4_0" if kind == "STQ1_0" else "TQ1_25_64"
    assert {found[f"blk.{i}.{name}.weight"] for i in (0, 1) for name in ("attn_q", "ffn_up")} == {wanted}
    assert found["blk.0.ffn_down.weight"] == "Q4_0" and found["output.weight"] == "Q8_0"
    assert found["blk.1.ffn_down.weight"] == ("Q4_0" if kind == "STQ1_0" else kind)


@pytest.mark.parametrize("flags, tensor, block", [
    (["--token-embedding-type", "tq1_25"], "token_embd.weight", "128, the block size of tq1_25"),
    (["--token-embedding-type", "q4_K"], "token_embd.weight", "256, the block size of q4_K"),
    (["--output-tensor-type", "stq1_0"], "output.weight", "256, the block size of stq1_0"),
    (["--dry-run", "--output-tensor-type", "tq1_25"], "output.weight", "128, the block size of tq1_25"),
])  # fmt: skip
@pytest.mark.parametrize("to", ["TQ1_25", "Q8_0", "F16"])
def test_quantize_refuses_a_type_that_rows_do_not_fit(odd, tmp_path, flags, tensor, block, to):
    """Before it writes anything; it used to abort in the middle."""
    for older in None, b"an older target":
        if older:
            (tmp_path / "q.gguf").write_bytes(older)
        code, text = quantize(*flags, odd[0], tmp_path / "q.gguf", to)
        assert code == 1 and f"tensor '{tensor}' has rows of 192 weights, not a multiple of {block}: choose another type" in text, text
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [older] * bool(older)


def test_quantize_falls_back_from_a_tensor_type(odd, tmp_path):
    """As upstream does: --tensor-type has fallbacks, the flags for embeddings and output have none."""
    flags = [f for flag in ("attn_q=stq1_0", "attn_k=tq1_25", "ffn_up=q4_K", "ffn_down=tq1_25_64") for f in ("--tensor-type", flag)]
    code, text = quantize(*flags, odd[0], tmp_path / "q.gguf", "Q8_0")
    assert code == 0 and re.search(r"blk.0.attn_q.weight .*ncols +192 not divisible by 256 .*falling back to +q4_0", text), text
    found = types_of(tmp_path / "q.gguf")
    assert found["blk.0.attn_q.weight"] == "Q4_0" and found["blk.0.ffn_up.weight"] == "Q5_0"
    assert found["blk.0.attn_k.weight"] == "TQ1_25_64" == found["blk.0.ffn_down.weight"] and found["blk.0.ffn_gate.weight"] == "Q8_0"


@pytest.mark.parametrize("case", ["file", "split", "link"])
def test_a_quantization_that_fails_leaves_no_half_file(odd, tmp_path, case):
    """Whatever fails; and it removes nothing that it didn't write."""
    shards = [shutil.copy(p, tmp_path) for p in sorted(odd[0].parent.glob("split-*" if case == "split" else "f32.gguf"))]
    reader = gguf.GGUFReader(shards[-1], "r+")
    broken = reader.tensors[-1]
    broken.data[..., 5] = np.nan
    reader.data.flush()
    assert len(shards) == 1 + (case == "split") and len(reader.tensors) > 1
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "other-00009-of-00009.gguf").write_bytes(b"not its own")
    target, flags, left = tmp_path / "q" / "q.gguf", [], {"other-00009-of-00009.gguf"}
    if case == "split":
        target, flags = tmp_path / "q" / "q", ["--keep-split"]
    elif case == "link":
        target.symlink_to(tmp_path / "real.gguf")
        left.add("q.gguf")  # the link, whose file is gone
    code, text = quantize(*flags, shards[0], target, "Q8_0")
    assert code == 1 and f"tensor '{broken.name}' has invalid data" in text, text
    assert set(os.listdir(tmp_path / "q")) == left and not (tmp_path / "real.gguf").exists()


def test_a_quantization_to_a_device_leaves_it(odd, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.DEVNULL):
        quantize(odd[0], fifo, "TQ1_25", 2)  # fails: it can't seek back to write the header
    assert fifo.is_fifo()


WARNING = (
    r"WARNING: (\d+) of (\d+) tensors were not 3:4 sparse ternary in the groups of their new type, such as \S+ "
    r"\(relative error 0\.\d+\): .*expect noise unless the model was trained with Sherry\. .*sherry-gguf calibrate"
)


@pytest.mark.parametrize("outtype", ["F32", "F16", "BF16"])
def test_quantize_warns_of_weights_that_are_not_ternary(tmp_path, outtype):
    """One line; none if the type holds a Sherry checkpoint's weights."""
    small_models.make(tmp_path / "hf", "llama")
    upstream_f32(tmp_path / "hf", tmp_path / "f32.gguf")
    source = tmp_path / "source.gguf"
    code, text = quantize(tmp_path / "f32.gguf", source, outtype)
    assert code == 0 and "WARNING" not in text, text
    for flags, kind, wanted in ([], "TQ1_25", []), (["--pure"], "TQ1_25", [("2", "16")]), ([], "STQ1_0", [("12", "12")]), ([], "Q8_0", []):
        code, text = quantize(*flags, source, tmp_path / "q.gguf", kind)
        assert code == 0 and re.findall(WARNING, text) == wanted, text
        assert len(re.findall("3:4 sparse ternary in", text)) == len(wanted)


def test_quantize_warns_of_latent_weights_once(tmp_path):
    small_models.make(tmp_path / "hf", "llama", latent=True)
    upstream_f32(tmp_path / "hf", tmp_path / "f32.gguf")
    code, text = quantize("--max-buffer-size", 1, tmp_path / "f32.gguf", tmp_path / "q.gguf", "TQ1_25")
    assert code == 0 and re.findall(WARNING, text) == [("14", "14")], text


def test_quantize_warns_of_groups_of_64(tmp_path):
    """Two groups of 64 under one scale lose less than untrained weights do; the warning names the type that holds them."""
    small_models.make(tmp_path / "hf", "llama", group=64)
    upstream_f32(tmp_path / "hf", tmp_path / "f32.gguf")
    code, text = quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", "TQ1_25")
    assert code == 0 and re.findall(WARNING, text) == [("14", "14")] and "groups of 64, quantize it to TQ1_25_64" in text, text
    code, text = quantize(tmp_path / "f32.gguf", tmp_path / "q.gguf", "TQ1_25_64")
    assert code == 0 and "WARNING" not in text, text
