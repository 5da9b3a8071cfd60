"""The gguf package, published and pinned, after `gguf_type.register()`."""

import conftest
import numpy as np
import pytest
import small_models
import torch
import transformers

from sherry_gguf import gguf_type, stq1_0, tq1_25, tq1_25_64
from sherry_gguf.errors import QuantizeError

gguf = gguf_type.register()
TYPE = gguf.GGMLQuantizationType.TQ1_25
KINDS = pytest.mark.parametrize("kind, number", [(tq1_25.TYPE, 125), (tq1_25_64.TYPE, 126), (stq1_0.TYPE, 43)])


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
    with pytest.raises(QuantizeError, match="NaN"):  # not QuantError, which upstream turns into F16
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


# ---- other programs that use the published package ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, and beside it our GGUF of it."""
    directory = tmp_path_factory.mktemp("model")
    hf = small_models.make(directory / "hf", "llama")
    result = conftest.sherry("convert", hf, "--outfile", directory / "m.gguf", "--require-exact")
    assert result.returncode == 0, result.stderr
    return hf, directory / "m.gguf"


def run(script, *args):
    process = conftest.python(script, *args)
    output, _ = process.communicate()
    return process.returncode, output


REGISTER = "from sherry_gguf import gguf_type\ngguf_type.register()\n"
TOOL = "from gguf.scripts.{} import main\nmain()\n"
UNKNOWN = "125 is not a valid GGMLQuantizationType"  # what users see


def test_the_packages_tools(model, tmp_path):
    hf, gguf_file = model
    code, output = run(TOOL.format("gguf_dump"), gguf_file)
    assert code == 1 and UNKNOWN in output.replace("np.uint32(125)", "125")
    code, output = run(REGISTER + TOOL.format("gguf_dump"), gguf_file)
    assert code == 0 and "| TQ1_25  | blk.1.ffn_down.weight" in output, output
    code, output = run(REGISTER + TOOL.format("gguf_new_metadata"), gguf_file, tmp_path / "n.gguf", "--general-name", "Renamed")
    assert code == 0, output
    for old, new in zip(gguf.GGUFReader(gguf_file).tensors, gguf.GGUFReader(tmp_path / "n.gguf").tensors, strict=True):
        assert (old.name, old.tensor_type, old.data.tobytes()) == (new.name, new.tensor_type, new.data.tobytes())


@pytest.mark.slow
def test_transformers_loads_a_file(model, tmp_path):
    """Ternary weights equal the checkpoint's values; the file's F16 tensors equal them rounded to F16."""
    hf, gguf_file = model
    script = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file="m.gguf")
torch.save(model.state_dict(), sys.argv[2])
"""
    code, output = run(REGISTER + script, gguf_file.parent, tmp_path / "weights")
    assert code == 0, output
    found = torch.load(tmp_path / "weights")
    wanted = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        assert torch.equal(found[name], w.half().float() if w.ndim == 2 else w), name
    assert all(torch.equal(w, w.half().float()) for name, w in wanted.items() if "_proj" in name)


@pytest.mark.slow
def test_the_pinned_package_agrees():
    script = """
from sherry_gguf import gguf_type, llama_cpp
from sherry_gguf.convert.upstream import upstream
upstream()
import gguf, inspect, re
assert str(llama_cpp.source_dir()) in gguf.__file__, gguf.__file__
source = inspect.getsource(gguf.constants)
assert gguf_type.register() is gguf
for kind in gguf_type.TYPES.values():
    assert re.search(rf"\\b{kind.name}\\b", source), f"the pinned constants.py lacks {kind.name}: is the tree patched?"
    t = gguf.GGMLQuantizationType[kind.name]
    assert (t, gguf.LlamaFileType[f"MOSTLY_{kind.name}"]) == (kind.type_id, kind.file_type)
    assert gguf.GGML_QUANT_SIZES[t] == (kind.size, kind.bytes)
"""
    process = conftest.python(script)
    output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.mark.slow
def test_two_gguf_packages_are_refused():
    process = conftest.python("import gguf\nfrom sherry_gguf import cli\nraise SystemExit(cli.main(['convert', '.']))")
    output, _ = process.communicate()
    assert process.returncode == 1 and "another gguf package is already imported" in output, output
