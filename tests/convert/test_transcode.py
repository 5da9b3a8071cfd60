"""From one ternary type to another: exact if possible, reported if not, and nothing else changes."""

import os

import numpy as np
import pytest
from gguf_tensors import RNG, ternary, write

from sherry_gguf import cli, gguf_file, gguf_type, inspect, stq1_0, tq1_25, tq1_25_64, transcode
from sherry_gguf.errors import ConvertError

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType


def values(path):
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def types(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.gguf", {
        "token_embd.weight": (Q.F16, RNG.standard_normal((7, 256))),
        "blk.0.attn_q.weight": (Q.TQ1_25, ternary(tq1_25.TYPE, 5, 512)),
        "blk.0.norm.weight": (Q.F32, RNG.standard_normal(256).astype(np.float32)),
        "blk.0.ffn_up.weight": (Q.TQ1_25, ternary(tq1_25.TYPE, 3, 768, same=True)),
        "blk.0.odd.weight": (Q.TQ1_25, ternary(tq1_25.TYPE, 2, 384)),
        "output.weight": (Q.Q8_0, RNG.standard_normal((7, 256)).astype(np.float32)),
    })  # fmt: skip


def test_exact_in_types_with_a_scale_for_less(model, tmp_path, capsys):
    for to in "f16", "q8_0":
        out = tmp_path / f"{to}.gguf"
        assert cli.main(["transcode", str(model), str(out), "--to", to, "--require-exact"]) == 0
        assert f"Converted 3 of 6 tensors to {to.upper()}, 3 exactly; copied the rest unchanged" in capsys.readouterr().out
        for name, x in values(model).items():
            assert (values(out)[name] == x).all(), name
        assert [types(out)[f"blk.0.{n}.weight"] for n in ("attn_q", "ffn_up", "odd")] == [to.upper()] * 3
        assert types(out)["token_embd.weight"] == "F16" and types(out)["output.weight"] == "Q8_0"
        # and back: the same bytes, except those without meaning
        back = tmp_path / "back.gguf"
        assert cli.main(["transcode", str(out), str(back), "--to", "tq1_25", "--require-exact"]) == 0
        assert back.read_bytes() == model.read_bytes()


def test_what_a_larger_block_cannot_hold_is_told(model, tmp_path, capsys):
    out = tmp_path / "tq2_0.gguf"
    assert cli.main(["transcode", str(model), str(out), "--to", "tq2_0", "--require-exact"]) == 1
    assert "such as blk.0.attn_q.weight with 10 of 10. Nothing was written" in capsys.readouterr().err and not out.exists()
    assert cli.main(["transcode", str(model), str(out), "--to", "tq2_0"]) == 0
    said = capsys.readouterr().out
    assert "Converted 2 of 6 tensors to TQ2_0, 1 exactly" in said
    assert "not exact: blk.0.attn_q.weight, 10 of 10 blocks, relative error 0." in said
    assert "kept as TQ1_25, rows of 384 weights are not a multiple of 256: blk.0.odd.weight" in said
    found, wanted = values(out), values(model)
    assert (found["blk.0.ffn_up.weight"] == wanted["blk.0.ffn_up.weight"]).all()
    error = np.linalg.norm(found["blk.0.attn_q.weight"] - wanted["blk.0.attn_q.weight"]) / np.linalg.norm(wanted["blk.0.attn_q.weight"])
    assert f"relative error {error:.4f}" in said and error < 0.2


def test_stq1_0_to_others_and_back(tmp_path, capsys):
    model = write(tmp_path / "stq.gguf", {"a": (Q.STQ1_0, ternary(stq1_0.TYPE, 4, 512)), "b": (Q.F32, np.ones(3, np.float32))}, 43, 64)
    for to in "tq2_0", "f16", "q8_0":
        assert cli.main(["transcode", str(model), str(tmp_path / "x.gguf"), "--to", to, "--require-exact"]) == 0
        assert (values(tmp_path / "x.gguf")["a"] == values(model)["a"]).all()
        assert cli.main(["transcode", str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf"), "--to", "stq1_0", "--require-exact"]) == 0
        assert (tmp_path / "y.gguf").read_bytes() == model.read_bytes()
    capsys.readouterr()
    # its groups are not those of TQ1_25
    assert cli.main(["transcode", str(model), str(tmp_path / "z.gguf"), "--to", "tq1_25"]) == 0
    assert "to TQ1_25, 0 exactly" in (said := capsys.readouterr().out) and "not exact: a, 16 of 16 blocks" in said


def test_tq1_25_64_and_back(model, tmp_path, capsys):
    """A block of 128 is two of 64. The way back is for matrices whose neighbours have the same scale; others stay."""
    out = tmp_path / "64.gguf"
    assert cli.main(["transcode", str(model), str(out), "--to", "tq1_25_64", "--require-exact"]) == 0
    assert "Converted 3 of 6 tensors to TQ1_25_64, 3 exactly" in capsys.readouterr().out
    assert all((values(out)[name] == x).all() for name, x in values(model).items())
    assert cli.main(["transcode", str(out), str(tmp_path / "back.gguf"), "--to", "tq1_25", "--require-exact"]) == 0
    assert (tmp_path / "back.gguf").read_bytes() == model.read_bytes()
    write(out, {
        "a": (Q.TQ1_25_64, ternary(tq1_25_64.TYPE, 2, 512)), "b": (Q.TQ1_25_64, ternary(tq1_25_64.TYPE, 2, 512, same=True)),
        "zeros": (Q.TQ1_25_64, np.zeros((2, 512), np.float32)),
    }, 126)  # fmt: skip
    assert cli.main(["transcode", str(out), str(tmp_path / "x.gguf"), "--to", "tq1_25", "--require-exact"]) == 0
    said = capsys.readouterr().out
    assert "Converted 2 of 3 tensors to TQ1_25, 2 exactly" in said
    assert "kept as TQ1_25_64, scales differ within blocks of 128 weights: a\n" in said
    assert types(tmp_path / "x.gguf") == {"a": "TQ1_25_64", "b": "TQ1_25", "zeros": "TQ1_25"}
    assert all((values(tmp_path / "x.gguf")[name] == x).all() for name, x in values(out).items())
    write(out, {"a": (Q.TQ1_25_64, ternary(tq1_25_64.TYPE, 2, 512))}, 126)
    with pytest.raises(ConvertError, match="no tensor that could be TQ1_25 instead, of TQ1_25_64; kept as TQ1_25_64, scales differ"):
        transcode.transcode(out, tmp_path / "y.gguf", "tq1_25")
    for to in "f16", "q8_0":
        assert cli.main(["transcode", str(out), str(tmp_path / "z.gguf"), "--to", to, "--require-exact"]) == 0
        assert cli.main(["transcode", str(tmp_path / "z.gguf"), str(tmp_path / "back.gguf"), "--to", "tq1_25_64", "--require-exact"]) == 0
        assert (tmp_path / "back.gguf").read_bytes() == out.read_bytes()


def test_rows_that_tq1_25_does_not_fit(tmp_path, capsys):
    """--to tq1_25 means what it means for the converter: such rows are TQ1_25_64, and so are rows in groups of 64 (the next test)."""
    odd, even = ternary(tq1_25_64.TYPE, 3, 192), ternary(tq1_25.TYPE, 3, 256)
    model = write(tmp_path / "m.gguf", {
        "a": (Q.F16, odd), "b": (Q.F16, even), "c": (Q.TQ1_25_64, odd), "dense": (Q.F16, RNG.standard_normal((3, 192))),
        "odd": (Q.F16, RNG.standard_normal((3, 96))),
    }, 1)  # fmt: skip
    out = tmp_path / "x.gguf"
    assert cli.main(["transcode", str(model), str(out), "--to", "tq1_25", "--require-exact"]) == 0
    said = capsys.readouterr().out
    assert "Converted 2 of 5 tensors to TQ1_25 (1) and TQ1_25_64 (1), 2 exactly; copied the rest unchanged." in said
    assert "stored as TQ1_25_64, rows of 192 weights are not a multiple of 128: a\n" in said
    assert "kept as TQ1_25_64, rows of 192 weights are not a multiple of 128: c\n" in said and "dense" not in said
    assert types(out) == {"a": "TQ1_25_64", "b": "TQ1_25", "c": "TQ1_25_64", "dense": "F16", "odd": "F16"}
    assert gguf_file.read_gguf(out).fields["general.file_type"] == 125
    assert all((values(out)[name] == x).all() for name, x in values(model).items())
    only = write(tmp_path / "only.gguf", {"a": (Q.F16, odd)}, 1)
    transcode.transcode(only, out, "tq1_25")
    assert gguf_file.read_gguf(out).fields["general.file_type"] == 126
    with pytest.raises(ConvertError, match="no tensor that could be TQ1_25 instead, of TQ1_25_64; kept as TQ1_25_64, rows of 192 weights"):
        transcode.transcode(out, tmp_path / "y.gguf", "tq1_25")


@pytest.mark.parametrize("source", [Q.F16, Q.F32, Q.Q8_0], ids=lambda q: q.name)
def test_groups_that_tq1_25_does_not_fit(tmp_path, capsys, source):
    """From another type, a matrix whose scales are those of 64 weights becomes TQ1_25_64, next to others or alone."""
    tensors = {"a": ternary(tq1_25_64.TYPE, 3, 256), "b": ternary(tq1_25.TYPE, 3, 256), "dense": RNG.standard_normal((3, 256), np.float32)}
    ours = write(tmp_path / "ours.gguf", {name: (Q.TQ1_25_64, tensors[name]) for name in "ab"} | {"dense": (Q.F32, tensors["dense"])})
    model, out = tmp_path / "m.gguf", tmp_path / "x.gguf"
    if source == Q.Q8_0:
        transcode.transcode(ours, model, "q8_0")
    else:
        write(model, {name: (source, x) for name, x in tensors.items()})
    assert cli.main(["transcode", str(model), str(out), "--to", "tq1_25", "--require-exact"]) == 0
    said = capsys.readouterr().out
    assert "Converted 2 of 3 tensors to TQ1_25 (1) and TQ1_25_64 (1), 2 exactly; copied the rest unchanged." in said
    assert "stored as TQ1_25_64, scales differ within blocks of 128 weights: a\n" in said
    assert types(out) | {"dense": ""} == {"a": "TQ1_25_64", "b": "TQ1_25", "dense": ""}
    assert gguf_file.read_gguf(out).fields["general.file_type"] == 125
    assert all((values(out)[name] == x).all() for name, x in values(model).items())
    only = write(tmp_path / "only.gguf", {"a": (Q.F16, tensors["a"])}, 1)
    transcode.transcode(only, out, "tq1_25")
    assert types(out) == {"a": "TQ1_25_64"} and gguf_file.read_gguf(out).fields["general.file_type"] == 126
    for to in "stq1_0", "tq2_0":
        with pytest.raises(ConvertError, match=f"no tensor that could be {to.upper()} instead"):
            transcode.transcode(only, out, to)


@pytest.mark.parametrize("to", transcode.TARGETS)
def test_metadata_is_kept(model, tmp_path, to):
    if to == "tq1_25":
        transcode.transcode(model, tmp_path / "f16.gguf", "f16")
        model = tmp_path / "f16.gguf"
    transcode.transcode(model, tmp_path / "out.gguf", to)
    before, after = gguf_file.read_gguf(model), gguf_file.read_gguf(tmp_path / "out.gguf")
    wanted = {"tq1_25": 125, "tq1_25_64": 126, "stq1_0": 43, "tq2_0": 37, "q8_0": 7, "f16": 1}[to]
    assert after.fields == before.fields | {"general.file_type": wanted} and after.types == before.types
    assert list(after.tensors) == list(before.tensors)
    for name in "token_embd.weight", "blk.0.norm.weight", "output.weight":
        assert (after.tensors[name].read() == before.tensors[name].read()).all()


def test_file_types_are_llama_cpps():
    for to, number in transcode.FILE_TYPES.items():
        assert gguf.LlamaFileType[f"MOSTLY_{to.upper()}"] == number


def test_many_rows_and_experts(tmp_path):
    """More rows than one chunk, on three axes."""
    x = ternary(tq1_25.TYPE, 3 * 1500, 512).reshape(3, 1500, 512)
    model = write(tmp_path / "m.gguf", {"experts": (Q.TQ1_25, x)})
    (m,), _ = transcode.transcode(model, tmp_path / "f.gguf", "f16")
    assert m.blocks == m.exact == x.size and (values(tmp_path / "f.gguf")["experts"] == x).all()


def test_what_cannot_be_transcoded(model, tmp_path, capsys):
    other = write(tmp_path / "other.gguf", {"a": (Q.F32, RNG.standard_normal((4, 256)).astype(np.float32))})
    assert cli.main(["transcode", str(other), str(tmp_path / "x.gguf"), "--to", "tq1_25"]) == 1
    assert "has no tensor that could be TQ1_25 instead, of F32" in capsys.readouterr().err
    assert cli.main(["transcode", str(model), str(tmp_path / "x.gguf"), "--to", "tq1_25"]) == 1
    assert "has no tensor that could be TQ1_25 instead" in capsys.readouterr().err
    for target, says in (
        (model, "is the input file: name another one"),
        (tmp_path / "no/x.gguf", "no does not exist. Create it first"),
        (tmp_path, "not an ordinary file"),
    ):
        assert cli.main(["transcode", str(model), str(target), "--to", "f16"]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["transcode", str(model), str(tmp_path / "x.gguf"), "--to", "q4_0"])
    with pytest.raises(ConvertError, match="--to q4_0: one of"):
        transcode.transcode(model, tmp_path / "x.gguf", "q4_0")
    assert cli.main(["transcode", str(tmp_path / "none.gguf"), str(tmp_path / "x.gguf"), "--to", "f16"]) == 1
    assert "no such file" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "other.gguf"]


@pytest.mark.parametrize("kind", gguf_type.TYPES.values(), ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -0.5, -0.0])
def test_bad_scales(tmp_path, capsys, kind, scale):
    """Like llama.cpp's --check-tensors, transcode refuses them, by name, for any target, and writes nothing."""
    x = kind.quantize(ternary(kind, 3, 1024))
    x[1, 2 * kind.bytes - 2 : 2 * kind.bytes] = np.array([scale], "<f2").view(np.uint8)
    file = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("w", x, raw_dtype=Q(kind.type_id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for to in {"stq1_0", "tq1_25", "f16", "q8_0", "tq2_0"} - {kind.name.lower()}:
        assert cli.main(["transcode", str(file), str(tmp_path / "x.gguf"), "--to", to]) == 1
        assert f"bad.gguf: tensor w, row 1: the scale of block 1 is {scale}, which no {kind.name} has" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.gguf"]


def test_weights_of_another_type_that_are_no_numbers(tmp_path, capsys):
    x = gguf.quants.quantize(ternary(stq1_0.TYPE, 3, 256), Q.TQ2_0)
    x[2, -2:] = np.array([np.nan], "<f2").view(np.uint8)
    file = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("w", x, raw_dtype=Q.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cli.main(["transcode", str(file), str(tmp_path / "x.gguf"), "--to", "stq1_0"]) == 1
    assert "bad.gguf: tensor w, row 2: a weight is NaN or infinite" in capsys.readouterr().err and os.listdir(tmp_path) == ["bad.gguf"]


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.weight"])
def test_a_source_that_is_cut_while_it_is_read(model, tmp_path, monkeypatch, name):
    real = transcode._data

    def data(m, gguf):
        if m.name == name:
            os.truncate(model, m.source.offset + 10)
        return real(m, gguf)

    monkeypatch.setattr(transcode, "_data", data)
    with pytest.raises(ConvertError, match=f"ends within the tensor {name}"):
        transcode.transcode(model, tmp_path / "x.gguf", "f16")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_what_is_beyond_a_type_is_refused(tmp_path, capfd):
    """TQ2_0's code 3 is twice the scale, which F16 may not hold."""
    x = gguf.quants.quantize(ternary(stq1_0.TYPE, 3, 256), Q.TQ2_0)
    x[2, :-2], x[2, -2:] = 255, np.array([40000], "<f2").view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", x, raw_dtype=Q.TQ2_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for to in "f16", "q8_0":
        assert cli.main(["transcode", str(tmp_path / "m.gguf"), str(tmp_path / "x.gguf"), "--to", to]) == (1 if to == "f16" else 0)
    says = capfd.readouterr()
    assert says.err.count("tensor w, row 2: a weight is beyond what F16 holds") == 1 and "Warning" not in says.err


def test_ternary_vectors_are_transcoded_too(tmp_path):
    x = ternary(tq1_25.TYPE, 1, 256)[0]
    model = write(tmp_path / "m.gguf", {"w": (Q.TQ1_25, x)})
    transcode.transcode(model, tmp_path / "out.gguf", "f16", require_exact=True)
    assert types(tmp_path / "out.gguf") == {"w": "F16"} and (values(tmp_path / "out.gguf")["w"] == x).all()


def test_padding_is_a_hole(tmp_path):
    model = write(
        tmp_path / "m.gguf", {"a": (Q.TQ1_25, ternary(tq1_25.TYPE, 2, 256)), "b": (Q.F32, np.ones((2, 32), np.float32))}, alignment=1 << 26
    )
    transcode.transcode(model, tmp_path / "out.gguf", "f16")
    assert (tmp_path / "out.gguf").stat().st_size >= 2 << 26 and (tmp_path / "out.gguf").stat().st_blocks * 512 < 1 << 20
    assert types(tmp_path / "out.gguf") == {"a": "F16", "b": "F32"}


def test_zeros_are_no_ternary_matrix(tmp_path, capsys):
    """Unused matrices and biases keep the type that llama.cpp wants."""
    x = ternary(stq1_0.TYPE, 2, 256)
    model = write(tmp_path / "m.gguf", {"a": (Q.F32, x), "zeros": (Q.F32, np.zeros((4, 256), np.float32))})
    transcode.transcode(model, tmp_path / "out.gguf", "stq1_0")
    assert types(tmp_path / "out.gguf") == {"a": "STQ1_0", "zeros": "F32"}


def test_what_was_said_of_exactness_is_corrected(tmp_path, capsys):
    """The converter's sherry.* keys: a tensor that became inexact is marked so, also after the way back."""
    kind = tq1_25.TYPE
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    names = ["a", "b", "c"]
    for name, same in zip(names, (True, False, True)):
        writer.add_tensor(name, kind.quantize(ternary(kind, 2, 512, same)), raw_dtype=Q.TQ1_25)
    writer.add_bool("sherry.exact", False)
    writer.add_array("sherry.tensor.names", names)
    writer.add_array("sherry.tensor.exact", [True, True, False])
    writer.add_array("sherry.tensor.relative_error", [0.0, 0.0, 0.25])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan, _ = transcode.transcode(tmp_path / "m.gguf", tmp_path / "tq2.gguf", "tq2_0")
    transcode.transcode(tmp_path / "tq2.gguf", tmp_path / "back.gguf", "tq1_25")
    for name in "tq2.gguf", "back.gguf":
        fields = gguf_file.read_gguf(tmp_path / name).fields
        assert fields["sherry.tensor.exact"] == [True, False, False] and fields["sherry.tensor.names"] == names
        assert (
            np.allclose(fields["sherry.tensor.relative_error"], [0, plan[1].relative_error, 0.25], rtol=0.02)
            and plan[1].relative_error > 0.01
        )
    lines = list(inspect.inspect(tmp_path / "back.gguf", tensors=True))
    assert any("1 of 3 TQ1_25 tensors are marked exact" in line for line in lines)


def test_other_types_are_not_called_exact(tmp_path):
    """llama-quantize copies the converter's keys."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    x = ternary(tq1_25.TYPE, 2, 512)
    for name, qtype in {"a": Q.TQ1_25, "b": Q.STQ1_0, "c": Q.F16}.items():
        writer.add_tensor(name, gguf.quants.quantize(x, qtype), raw_dtype=qtype)
    writer.add_array("sherry.tensor.names", ["a", "b", "c", "gone"])
    writer.add_array("sherry.tensor.exact", [True] * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = list(inspect.inspect(tmp_path / "m.gguf", tensors=True))
    assert any("1 of 1 TQ1_25 tensors are marked exact" in line for line in lines), lines
    assert [line.split()[0] for line in lines if " yes " in line] == ["a"]


@pytest.mark.parametrize("sizes, held", [
    ({}, "abc"), ({"group_size": 64}, "b"), ({"group_size": 128, "tensor.group_size": [128, 64, 64]}, "ab"),
])  # fmt: skip
def test_flags_of_groups_that_the_type_does_not_hold(tmp_path, sizes, held):
    """A tensor in groups of 64 that is TQ1_25 now: llama-quantize has changed it."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    x = ternary(tq1_25.TYPE, 2, 512)
    for name, qtype in {"a": Q.TQ1_25, "b": Q.TQ1_25_64, "c": Q.TQ1_25}.items():
        writer.add_tensor(name, gguf.quants.quantize(x, qtype), raw_dtype=qtype)
    writer.add_array("sherry.tensor.names", ["a", "b", "c"])
    writer.add_array("sherry.tensor.exact", [True] * 3)
    for key, size in sizes.items():
        (writer.add_array if "tensor" in key else writer.add_uint32)(f"sherry.{key}", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lines = list(inspect.inspect(tmp_path / "m.gguf", tensors=True))
    assert "".join(line.split()[0] for line in lines if " yes " in line) == held
    assert sum(f"{len(held)} of {len(held)} TQ1_25" in line for line in lines) == 1


@pytest.mark.parametrize("names", [7, "no list", True])
def test_names_that_are_no_list(tmp_path, names):
    """Metadata of other programs is copied unchanged."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a", tq1_25.quantize(ternary(tq1_25.TYPE, 2, 512)), raw_dtype=Q.TQ1_25)
    writer.add_key_value("sherry.tensor.names", names, gguf.GGUFValueType.get_type(names))
    writer.add_array("sherry.tensor.exact", [True])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (m,), _ = transcode.transcode(tmp_path / "m.gguf", tmp_path / "out.gguf", "tq2_0")
    assert m.exact < m.blocks and gguf_file.read_gguf(tmp_path / "out.gguf").fields["sherry.tensor.names"] == names


def test_a_second_run_replaces_the_first(model, tmp_path):
    for _ in range(2):
        assert cli.main(["transcode", str(model), str(tmp_path / "x.bin"), "--to", "f16"]) == 0


@pytest.mark.slow
def test_more_than_4_gib(tmp_path):
    """Offsets beyond 32 bits; a hole, which reads as a tensor of zeros, stays one."""
    x = ternary(tq1_25.TYPE, 4, 256)
    model = write(
        tmp_path / "m.gguf",
        {"zeros": (Q.F32, np.ones((2, 32), np.float32)), "a": (Q.TQ1_25, x), "last": (Q.F32, np.arange(8, dtype=np.float32))},
    )
    reader = gguf.GGUFReader(model)
    zeros, a, last = reader.tensors
    data = {t.name: t.data.tobytes() for t in reader.tensors}
    rows = (1 << 32) // 128 + 5
    with open(model, "r+b") as f:  # the first tensor grows; it has two axes, of which the second is rows
        head = bytearray(f.read(reader.data_offset))
        at = [int(t.field.offset) + sum(int(p.nbytes) for p in t.field.parts[:5]) for t in reader.tensors]
        head[at[0] - 12 : at[0] - 4] = np.array([rows], "<u8").tobytes()
        starts = [rows * 128, rows * 128 + a.n_bytes + -a.n_bytes % 32]
        for place, start in zip(at[1:], starts):
            head[place : place + 8] = np.array([start], "<u8").tobytes()
        f.seek(0)
        f.write(head)
        for name, start in zip(("a", "last"), starts):
            f.seek(reader.data_offset + start)
            f.write(data[name])
        f.seek(reader.data_offset)
        f.write(bytes(512))
    assert model.stat().st_size > 1 << 32
    out = tmp_path / "out.gguf"
    plan, _ = transcode.transcode(model, out, "f16", require_exact=True)
    assert [m.type.name for m in plan] == ["F32", "F16", "F32"]
    assert out.stat().st_size > 1 << 32 and out.stat().st_blocks * 512 < 1 << 28
    found = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    assert (found["a"].astype(np.float32) == x).all() and (found["last"] == np.arange(8)).all() and found["zeros"].shape == (rows, 32)
