"""llama-quantize to TQ1_25 and STQ1_0: rows that don't fit, failures that leave nothing, and warnings about weights that aren't ternary."""

import os
import re
import shutil
import subprocess

import gguf
import numpy as np
import pytest
import small_models
from conftest import upstream_f32

from sherry_gguf import gguf_type, llama_cpp

pytestmark = pytest.mark.slow

gguf_type.register()


def run(name, *args):
    """(exit code, stdout and stderr) of a tool."""
    result = llama_cpp.run(name, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return result.returncode, result.stdout


def quantize(*args):
    return run("llama-quantize", *args, 2)


def types_of(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """An F32 GGUF and its importance matrix: rows of 192, not a multiple of these types' blocks; four heads share keys and values."""
    root = tmp_path_factory.mktemp("odd")
    shape = dict(hidden_size=192, intermediate_size=384, num_attention_heads=8, num_key_value_heads=2)
    small_models.make(root / "hf", "llama", latent=True, config=shape)
    upstream_f32(root / "hf", root / "f32.gguf")
    upstream_f32(root / "hf", root / "split.gguf", "--split-max-tensors", 15)
    (root / "text.txt").write_text(small_models.corpus()[:20000])
    code, text = run("llama-imatrix", "-m", root / "f32.gguf", "-f", root / "text.txt", "-o", root / "im.gguf", "-c", 128, "-t", 2)
    assert code == 0, text
    return root / "f32.gguf", root / "im.gguf"


@pytest.mark.parametrize("kind", ["TQ1_25", "STQ1_0"])
def test_fallbacks_of_mixed_types(odd, tmp_path, kind):
    """Each type of the mixture has its own fallback: Q4_0 for the sparse types and Q2_K, Q5_0 for Q4_K."""
    code, text = quantize("--imatrix", odd[1], odd[0], tmp_path / "q.gguf", kind)
    assert code == 0, text
    found = types_of(tmp_path / "q.gguf")
    assert {found[f"blk.{i}.attn_v.weight"] for i in (0, 1)} == {"Q5_0"} and found["token_embd.weight"] == "Q5_0"
    assert {found[f"blk.{i}.{name}.weight"] for i in (0, 1) for name in ("attn_q", "ffn_up")} == {"Q4_0"}
    assert found["blk.0.ffn_down.weight"] == "Q4_0" and found["output.weight"] == "Q8_0"


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
    flags = ["--tensor-type", "attn_q=tq1_25", "--tensor-type", "ffn_up=q4_K"]
    code, text = quantize(*flags, odd[0], tmp_path / "q.gguf", "Q8_0")
    assert code == 0 and re.search(r"blk.0.attn_q.weight .*ncols +192 not divisible by 128 .*falling back to +q4_0", text), text
    found = types_of(tmp_path / "q.gguf")
    assert found["blk.0.attn_q.weight"] == "Q4_0" and found["blk.0.ffn_up.weight"] == "Q5_0"


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
    r"\(relative error 0\.\d\d\): .*training"
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
