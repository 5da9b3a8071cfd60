"""Each program of examples/ runs, prints what it promises, and is listed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ENV

from sherry_gguf import gguf_type, stq1_0, tq1_25, tq1_25_64

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, args)], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quantize_array():
    printed = run("quantize_array.py")
    assert "4096 bytes of float32 became 176: 1.375 bits a weight" in printed
    assert "0 of 8 before, 8 of 8 when quantized again" in printed
    assert "scalar: -24.8" in printed and "(float32: -24.9" in printed


@pytest.mark.slow
def test_train_loop():
    printed = run("train_loop.py")
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 4 and losses[-1] < losses[0] / 3
    assert printed.count("32768 weights in 5632 bytes, every block exact") == 2


@pytest.mark.parametrize(
    "kind, nbytes", [(tq1_25.TYPE, 132), (tq1_25_64.TYPE, 144), (stq1_0.TYPE, 126)], ids=lambda v: getattr(v, "name", "")
)
def test_read_gguf(tmp_path, kind, nbytes):
    """A GGUF of two tensors, made with the published gguf package."""
    gguf = gguf_type.register()
    writer = gguf.GGUFWriter(path := tmp_path / "model.gguf", "llama")
    x = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(256, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", packed := kind.quantize(x), raw_dtype=gguf.GGMLQuantizationType[kind.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    printed = run("read_gguf.py", path)
    assert f"blk.0.ffn_norm.weight        F32       256\nblk.0.ffn_up.weight          {kind.name:9} 3 x 256\n" in printed
    assert f"blk.0.ffn_up.weight: 3 rows of 256, {nbytes} bytes" in printed
    assert f" = {kind.dequantize(packed)[0, :4].round(4)}\n" in printed and "zeros: 25%" in printed


def test_llama(tiny, adapter):
    said = [line.split(": ", 1) for line in run("llama.py", tiny, adapter).splitlines()]
    told = dict(said)
    assert "".join(eval(told["streaming"])) == eval(told["completion"].rpartition(", ")[0]) != eval(told["LoRA"])
    assert eval(told["grammar"]) in ("yes", "no") and len(eval(told["log-probabilities"])) == 3
    first, second = (text for name, text in said if name == "meanwhile")
    assert told["saved state"][:8] == second[:8] != first[:8]  # then, batches of another size may round otherwise
    assert told["embeddings"].startswith("256 numbers, ") and eval(told["chat"]) != ""


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    programs = {p.name for p in EXAMPLES.glob("*.py")}
    assert len(programs) >= 3
    for name in programs:
        assert f"]({name})" in listed and f"def test_{name.removesuffix('.py')}(" in Path(__file__).read_text("utf-8"), name
        assert f"examples/{name}" in (EXAMPLES / name).read_text("utf-8").split('"""')[1], f"{name}'s docstring says how it is run"
