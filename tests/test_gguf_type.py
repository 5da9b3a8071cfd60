"""The gguf package, published and pinned, after `gguf_type.register()`."""

import conftest
import numpy as np
import pytest
import small_models

from sherry_gguf import gguf_type, stq1_0, tq1_25

gguf = gguf_type.register()
TYPE = gguf.GGMLQuantizationType.TQ1_25
KINDS = pytest.mark.parametrize("kind, number", [(tq1_25.TYPE, 125), (stq1_0.TYPE, 43)])


@KINDS
def test_members_and_sizes(kind, number):
    assert gguf_type.register() is gguf  # a second time changes nothing
    qtype = gguf.GGMLQuantizationType[kind.name]
    assert qtype == gguf.GGMLQuantizationType(number) == number == getattr(gguf.GGMLQuantizationType, kind.name)
    assert [m.name for m in gguf.GGMLQuantizationType].count(kind.name) == 1
    assert getattr(gguf.LlamaFileType, f"MOSTLY_{kind.name}") == gguf.LlamaFileType(number) == number
    assert gguf.GGML_QUANT_SIZES[qtype] == (kind.size, kind.bytes)


@KINDS
def test_codec_is_the_reference(kind, number):
    qtype = gguf.GGMLQuantizationType(number)
    x = small_models.random_rows(33, 768)
    blocks = gguf.quants.quantize(x, qtype)
    assert blocks.tobytes() == kind.quantize(x).tobytes() and blocks.shape == (33, 768 // kind.size * kind.bytes)
    assert gguf.quants.dequantize(blocks, qtype).tobytes() == kind.dequantize(blocks).tobytes()


def test_bad_rows():
    with pytest.raises(gguf.QuantError, match="TQ1_25"):
        gguf.quants.quantize(np.zeros((2, 96), np.float32), TYPE)
    x = np.zeros((2, 128), np.float32)
    x[1, 5] = np.nan
    with pytest.raises(tq1_25.QuantizeError, match="NaN"):  # not QuantError, which upstream turns into F16
        gguf.quants.quantize(x, TYPE)


def test_a_taken_id_is_refused():
    import enum

    class Other(enum.IntEnum):
        ELSE = 125

    with pytest.raises(ValueError, match="ELSE.*cannot hold TQ1_25 = 125"):
        gguf_type._member(Other, "TQ1_25", 125)


def test_file_through_the_published_package(tmp_path):
    x = small_models.random_rows(6, 256)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", gguf.quants.quantize(x, TYPE), raw_dtype=TYPE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    assert tensor.tensor_type == TYPE and tensor.shape.tolist() == [256, 6]
    assert tensor.data.tobytes() == tq1_25.quantize(x).tobytes()


def test_the_pinned_package_agrees():
    script = """
from sherry_gguf import convert, gguf_type, llama_cpp
convert.upstream()
import gguf, inspect
assert str(llama_cpp.source_dir()) in gguf.__file__, gguf.__file__
source = inspect.getsource(gguf.constants)
assert "TQ1_25" in source, "the pinned constants.py lacks the type: is the tree patched?"
assert gguf_type.register() is gguf
t = gguf.GGMLQuantizationType.TQ1_25
assert (t, gguf.LlamaFileType.MOSTLY_TQ1_25, gguf.GGML_QUANT_SIZES[t]) == (125, 125, (128, 22))
"""
    process = conftest.python(script)
    output, _ = process.communicate()
    assert process.returncode == 0, output


def test_two_gguf_packages_are_refused():
    process = conftest.python("import gguf\nfrom sherry_gguf import cli\nraise SystemExit(cli.main(['convert', '.']))")
    output, _ = process.communicate()
    assert process.returncode == 1 and "another gguf package is already imported" in output, output
