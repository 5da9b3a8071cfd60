"""The files of a split are transcoded one by one."""

import numpy as np
import pytest
from gguf_tensors import ternary, write

from sherry_gguf import cli, gguf_file, gguf_type, inspect, tq1_25, tq1_25_64, transcode

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType


def test_the_files_of_a_split_keep_their_places(tmp_path, capsys):
    shard = write(tmp_path / "m-00002-of-00003.gguf", {"a": (Q.TQ1_25, ternary(tq1_25.TYPE, 2, 512))})
    for name in "out.gguf", "out-00001-of-00003.gguf", "out-00002-of-00004.gguf":
        for command in ["transcode", str(shard), str(tmp_path / name), "--to", "f16"], ["retag", str(shard), str(tmp_path / name)]:
            assert cli.main(command) == 1
            assert (
                f"is file 2 of 3 of a split. Name the output so that it ends with -00002-of-00003.gguf, not {name}"
                in capsys.readouterr().err
            )
    assert cli.main(["transcode", str(shard), str(tmp_path / "out-00002-of-00003.gguf"), "--to", "f16"]) == 0


def test_a_split_goes_file_by_file(tmp_path, capsys):
    """A file without ternary tensors, or without tensors, is copied with the others' file type."""
    for i, tensors in enumerate(({}, {"norm": (Q.F32, np.ones(3, np.float32))}), 1):
        shard = write(tmp_path / f"m-0000{i}-of-00003.gguf", tensors)
        out = tmp_path / f"n-0000{i}-of-00003.gguf"
        assert cli.main(["transcode", str(shard), str(out), "--to", "f16"]) == 0
        assert f"Converted none of {len(tensors)} tensors" in capsys.readouterr().out
        assert len(out.read_bytes()) == len(shard.read_bytes()) and len(gguf.GGUFReader(out).tensors) == len(tensors)
        assert gguf.GGUFReader(out).fields["general.file_type"].contents() == 1


@pytest.mark.parametrize("to", ["tq2_0", "f16"])
def test_the_first_file_of_a_split_says_what_it_knows(tmp_path, capsys, to):
    """It has the flags of all files' tensors. If the new type may lose precision, those of the other files are cleared."""
    kind = tq1_25.TYPE
    for i, (name, same) in enumerate({"a": True, "b": False}.items(), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i}-of-00002.gguf", "llama")
        if i == 1:
            writer.add_bool("sherry.exact", True)
            writer.add_array("sherry.tensor.names", ["a", "b"])
            writer.add_array("sherry.tensor.exact", [True, True])
            writer.add_array("sherry.tensor.relative_error", [0.0, 0.0])
        writer.add_tensor(name, kind.quantize(ternary(kind, 2, 512, same)), raw_dtype=Q.TQ1_25)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for source, target, t in ("m", "there", to), ("there", "back", "tq1_25"):
            names = [str(tmp_path / f"{s}-0000{i}-of-00002.gguf") for s in (source, target)]
            assert cli.main(["transcode", *names, "--to", t]) == 0
    says = capsys.readouterr().out
    fields = gguf_file.read_gguf(tmp_path / "there-00001-of-00002.gguf").fields
    if to == "f16":  # exact here; on the way back, the other file is unknown
        assert fields["sherry.tensor.exact"] == [True, True] and fields["sherry.exact"] is True
    else:
        assert fields["sherry.tensor.exact"] == [True, False] and fields["sherry.exact"] is False
        assert fields["sherry.tensor.relative_error"][0] == 0 and np.isnan(fields["sherry.tensor.relative_error"][1])
    assert says.count("Cleared the exactness flags of 1 tensor in the split's other files") == 1
    lines = list(inspect.inspect(tmp_path / "back-00002-of-00002.gguf"))
    assert any("1 of 2 TQ1_25 tensors are marked exact" in line for line in lines), lines


@pytest.mark.parametrize("to, source, cleared, file_type", [
    ("tq1_25_64", Q.TQ1_25_64, False, 126), ("tq1_25", Q.TQ1_25_64, False, 126), ("tq1_25_64", Q.TQ1_25, False, 126),
    ("tq1_25", Q.F16, False, 126), ("tq1_25", Q.STQ1_0, True, 125), ("tq2_0", Q.TQ1_25_64, True, 37), ("tq1_25_64", None, True, 126),
])  # fmt: skip
def test_the_other_files_of_a_split_count(tmp_path, to, source, cleared, file_type):
    """The first file's flags and file type depend on the tensors in the second, which may be missing (None)."""
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    writer = gguf.GGUFWriter(first, "llama")
    writer.add_file_type(126)
    writer.add_bool("sherry.exact", True)
    writer.add_array("sherry.tensor.names", ["a"])
    writer.add_array("sherry.tensor.exact", [True])
    writer.add_array("sherry.tensor.relative_error", [0.0])
    writer.add_tensor("norm", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if source:
        write(second, {"a": (source, ternary(tq1_25_64.TYPE, 2, 512))})
    out = tmp_path / "n-00001-of-00002.gguf"
    _, others = transcode.transcode(first, out, to)
    fields = {key: field.contents() for key, field in gguf.GGUFReader(out).fields.items()}
    assert others == cleared and fields["general.file_type"] == file_type
    assert fields["sherry.exact"] is not cleared and fields["sherry.tensor.exact"] == [not cleared]
    assert np.isnan(fields["sherry.tensor.relative_error"][0]) == cleared
    if source:  # a damaged file counts as a missing one
        second.write_bytes(second.read_bytes()[:100])
        assert transcode.transcode(first, out, to)[1] == 1
