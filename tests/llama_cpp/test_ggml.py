"""The built libggml's TQ1_25, TQ1_25_64 and STQ1_0 give the same bytes and numbers as the reference."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from built_ggml import CpuGgml
from vectors import ALL_BLOCKS, ALL_DOTS, VECTORS

from sherry_gguf import kernels, llama_cpp, reader, retag, stq1_0, tq1_25, tq1_25_64
from sherry_gguf.errors import NotBuilt

KINDS = pytest.mark.parametrize("kind", [tq1_25.TYPE, tq1_25_64.TYPE, stq1_0.TYPE])


@pytest.fixture(scope="module")
def ggml():
    return CpuGgml()


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((6, 768)).astype(np.float32)


@KINDS
def test_registration(ggml, kind):
    assert ggml.types[kind.name] == kind.type_id
    assert ggml.block(kind.name.lower()) == (kind.size, kind.bytes)
    assert ggml.row_size(kind.name, 768) == 768 // kind.size * kind.bytes
    assert ggml.vec_dot_type(kind.name) == "Q8_0"
    assert not [name for name, type_id in ggml.types.items() if 43 < type_id < 125]


def test_what_python_knows_of_upstream(ggml):
    assert ggml.block("q2_0") == retag.Q2_0 and ggml.types["Q2_0"] == stq1_0.OLD_TYPE_ID
    header = (llama_cpp.source_dir() / "ggml/include/ggml.h").read_text()
    assert int(re.search(r"#define GGML_MAX_DIMS +(\d+)", header)[1]) == reader.MAX_DIMS


@pytest.mark.parametrize("kind, name", ALL_BLOCKS)
def test_golden_blocks(ggml, kind, name):
    x, block, lanes, d = VECTORS[kind].blocks[name]
    assert (ggml.quantize(kind, x[None]) == block).all()
    assert (ggml.from_float(kind, x) == block).all()
    assert (ggml.dequantize(kind, block[None])[0] == np.float32(d) * np.array(lanes, np.float32)).all()


@KINDS
def test_quantize_chunk_and_to_float(ggml, x, kind):
    packed = ggml.quantize(kind.name, x)
    assert (packed == kind.quantize(x)).all() and (ggml.from_float(kind.name, x[0]) == packed[0]).all()
    assert (ggml.dequantize(kind.name, packed) == kind.dequantize(packed)).all()


@KINDS
def test_importance_matrix(ggml, x, kind):
    importance = np.random.default_rng(1).random(768).astype(np.float32)
    packed = ggml.quantize(kind.name, x, importance)
    assert (packed == kernels.quantize(x, importance, kind)).all()
    assert (packed != kind.quantize(x)).any()


@pytest.mark.parametrize("kind, i", ALL_DOTS)
def test_golden_dots(ggml, kind, i):
    row, y, _, result = VECTORS[kind].dots[i]
    assert ggml.vec_dot(kind, row, kernels.quantize_q8_0(y)) == pytest.approx(result, rel=1e-5)


@KINDS
def test_vec_dot_is_the_best_kernel(ggml, x, monkeypatch, kind):
    monkeypatch.delenv("SHERRY_ISA", raising=False)
    packed, q8_0 = kind.quantize(x), kernels.quantize_q8_0(x[0])
    for row in packed:
        assert ggml.vec_dot(kind.name, row, q8_0) == kernels.vec_dot_q8_0(row, q8_0, kind=kind)


HERE = Path(__file__).parent
IN_ANOTHER_PROCESS = """
import numpy as np
from built_ggml import CpuGgml
from sherry_gguf import gguf_type, kernels
for kind in gguf_type.TYPES.values():
    x = np.random.default_rng(0).standard_normal(7 * kind.size).astype(np.float32)
    row, q8_0 = kind.quantize(x), kernels.quantize_q8_0(x)
    print(CpuGgml().vec_dot(kind.name, row, q8_0), kernels.vec_dot_q8_0(row, q8_0, kind=kind))
"""


@pytest.mark.parametrize("isa", kernels.available())
def test_the_environment_chooses_the_kernel(isa, monkeypatch):
    monkeypatch.setenv("SHERRY_ISA", isa)
    result = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=HERE, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 3 and all(float(built) == float(ours) for built, ours in lines), lines


def test_a_missing_instruction_set_ends_the_process_with_its_name():
    code = "import os; os.environ['SHERRY_ISA'] = 'mmx'; from built_ggml import CpuGgml; import numpy as np; " \
           "CpuGgml().vec_dot('TQ1_25', np.zeros(22, np.uint8), np.zeros(136, np.uint8))"  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"SHERRY_ISA=mmx: there is no such instruction set in this build; this CPU runs {' '.join(kernels.available())}" in result.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@KINDS
def test_bad_weights_make_an_invalid_row(ggml, x, bad, kind):
    x[3, 700] = bad
    with pytest.raises(ValueError, match=f"NaN, infinite or too large for {kind.name}"):
        ggml.quantize(kind.name, x)


@pytest.mark.parametrize("d", [np.nan, np.inf, -1.0])
@KINDS
def test_bad_scales_are_invalid(ggml, x, d, capfd, kind):
    packed = kind.quantize(x)
    assert ggml.valid(kind.name, packed)
    packed.reshape(-1, kind.bytes)[9, -2:] = np.frombuffer(np.float16(d).tobytes(), np.uint8)
    assert not ggml.valid(kind.name, packed)
    assert f"{kind.name.lower()}: the scale of block 9 is" in capfd.readouterr().err


def test_other_types(ggml, x):
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    for name in "Q6_K", "q4_k", "Q8_0", "F16":
        packed = ggml.quantize(name, x)
        assert packed.shape == (3, ggml.row_size(name, 512))
        assert np.abs(ggml.dequantize(name, packed) - x).max() < 0.5
    with pytest.raises(ValueError, match="Q9_9 is not a type of the built ggml, which has F32, F16,.*TQ1_25"):
        ggml.quantize("Q9_9", x)
    with pytest.raises(ValueError, match="importance matrix"):
        ggml.quantize("IQ2_XXS", x)
    with pytest.raises(ValueError, match="rows of 300 weights are not a multiple of 256, the block of Q6_K"):
        ggml.quantize("Q6_K", x[:, :300])


@pytest.mark.parametrize("call, message", [
    (lambda g, x: g.quantize("TQ1_25", x[:, :0]), "rows of 0 weights"),
    (lambda g, x: g.quantize("I32", x), "weights cannot be quantized to I32"),
    (lambda g, x: g.quantize("q8_k", x), "weights cannot be quantized to q8_k"),
    (lambda g, x: g.quantize("TQ1_25", x.astype(np.float64)), "float64"),
    (lambda g, x: g.quantize("TQ1_25", x, x[0, :128]), r"\(128,\), rows have 768"),
    (lambda g, x: g.dequantize("I32", x.view(np.uint8)), "I32 has no to_float"),
    (lambda g, x: g.dequantize("TQ1_25", np.zeros((1, 23), np.uint8)), "rows of 23 bytes"),
    (lambda g, x: g.dequantize("TQ1_25_64", np.zeros((1, 22), np.uint8)), "rows of 22 bytes are not a multiple of 12"),
    (lambda g, x: g.from_float("IQ2_XXS", x[0, :768]), "IQ2_XXS has no from_float"),
    (lambda g, x: g.vec_dot("I32", np.zeros(4, np.uint8), np.zeros(4, np.uint8)), "I32"),
    (lambda g, x: g.vec_dot("TQ1_25", np.zeros(22, np.uint8), np.zeros(34, np.uint8)), "34 bytes of Q8_0"),
])  # fmt: skip
def test_what_would_end_the_process_raises(ggml, x, call, message):
    with pytest.raises(ValueError, match=message):
        call(ggml, x)


@KINDS
def test_odd_addresses(ggml, x, kind):
    packed = ggml.quantize(kind.name, x)
    shifted = np.insert(packed.reshape(-1), 0, 0)[1:].reshape(packed.shape)
    assert shifted.ctypes.data % 2 and (ggml.dequantize(kind.name, shifted) == ggml.dequantize(kind.name, packed)).all()


def test_what_is_not_built_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SHERRY_BUILD_DIR", str(tmp_path))
    for call in (lambda: llama_cpp.tool("llama-cli"), lambda: llama_cpp.library("ggml-base"), llama_cpp.source_dir):
        with pytest.raises(NotBuilt, match=f"{tmp_path}.* is not there: run scripts/build_llama_cpp.py"):
            call()
