"""`sherry-gguf gguf`: the published package's tools read these types, and leave tensors as they are."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from conftest import ENV

from sherry_gguf import cli, gguf_tools, gguf_type
from sherry_gguf.gguf_file import read_gguf

gguf = gguf_type.register()
KINDS = gguf_type.TYPES


@pytest.fixture
def model(tmp_path):
    """A file with a tensor of each type, an alignment of its own, and arrays in its metadata."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(64)
    writer.add_string("general.name", "ternäry")
    writer.add_uint32("llama.context_length", 256)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("sherry.tensor.names", list(KINDS))
    writer.add_array("sherry.tensor.exact", [True, False, True])
    writer.add_array("sherry.tensor.relative_error", [0.0, 0.5, 0.0])
    rng = np.random.default_rng(0)
    writer.add_tensor("norm", rng.standard_normal(3).astype(np.float32))
    for name, kind in KINDS.items():
        writer.add_tensor(name, kind.quantize(rng.standard_normal((3, 256)).astype(np.float32)),
                          raw_dtype=gguf.GGMLQuantizationType(kind.type_id))  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def contents(path):
    found = read_gguf(path)
    return found.fields, found.types, {name: (t.type, t.shape, t.read().tobytes()) for name, t in found.tensors.items()}


def run(*args, **kwargs):
    """Run a tool as users do."""
    return subprocess.run([sys.executable, "-m", "sherry_gguf", "gguf", *map(str, args)], env=ENV, capture_output=True, text=True,
                          **({"stdin": subprocess.DEVNULL} | kwargs))  # fmt: skip


def test_dump_and_hash_know_the_types(model, capsys):
    assert cli.main(["gguf", "dump", str(model)]) == 0
    shown = capsys.readouterr().out
    assert all(f"| {kind:7} | {kind}\n" in shown for kind in KINDS if len(kind) < 8) and "TQ1_25_64" in shown, shown
    assert cli.main(["gguf", "dump", "--markdown", str(model)]) == cli.main(["gguf", "dump", "--json", str(model)]) == 0
    capsys.readouterr()
    assert cli.main(["gguf", "hash", str(model)]) == 0
    assert all(f":{kind}\n" in capsys.readouterr().out for kind in list(KINDS)[:1])


def test_new_metadata_keeps_tensors_alignment_and_other_keys(model, tmp_path):
    fields, types, tensors = contents(model)
    assert run("new-metadata", model, tmp_path / "new.gguf", "--general-name", "other", "--chat-template", "{{ x }}").returncode == 0
    new_fields, new_types, new_tensors = contents(tmp_path / "new.gguf")
    assert new_tensors == tensors
    assert new_fields == fields | {"general.name": "other", "tokenizer.chat_template": "{{ x }}"}
    assert {key: new_types[key] for key in types} == types
    assert stat.S_IMODE(os.stat(tmp_path / "new.gguf").st_mode) == stat.S_IMODE(os.stat(model).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "new.gguf"]


def test_new_metadata_may_replace_its_input(model):
    tensors = contents(model)[2]
    assert cli.main(["gguf", "new-metadata", str(model), str(model), "--general-name", "other", "--force"]) == 0
    fields, _, now = contents(model)
    assert fields["general.name"] == "other" and now == tensors


def test_new_metadata_that_fails_leaves_the_older_file(model, tmp_path, monkeypatch):
    older = tmp_path / "older.gguf"
    older.write_bytes(b"older")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    assert cli.main(["gguf", "new-metadata", str(model), str(older), "--general-name", "other", "--force"]) == 1
    assert older.read_bytes() == b"older" and sorted(os.listdir(tmp_path)) == ["m.gguf", "older.gguf"]


def test_set_metadata_changes_one_value(model):
    fields, types, tensors = contents(model)
    size = model.stat().st_size
    for key, text, value in (
        ("llama.context_length", "0", 0),
        ("tokenizer.ggml.add_bos_token", "0", False),
        ("tokenizer.ggml.add_bos_token", "True", True),
        ("tokenizer.ggml.add_bos_token", "false", False),
    ):
        assert cli.main(["gguf", "set-metadata", str(model), key, text, "--force"]) == 0
        fields[key] = value
        assert contents(model) == (fields, types, tensors) and model.stat().st_size == size


REFUSED = [*((key, "3") for key in gguf_tools.LAYOUT), ("llama.context_length", "-1"), ("llama.context_length", "x"), ("general.name", "x"),
           ("none", "1"), ("tokenizer.ggml.add_bos_token", "no")]  # fmt: skip


@pytest.mark.parametrize("key, value", REFUSED)
def test_set_metadata_refuses_what_would_damage(model, key, value, capsys):
    before = model.read_bytes()
    try:
        assert cli.main(["gguf", "set-metadata", str(model), key, value, "--force"]) == 1
    except SystemExit as e:  # the tool's own refusal
        assert e.code == 1
    assert model.read_bytes() == before
    if key in gguf_tools.LAYOUT:
        assert "no program could read the file" in capsys.readouterr().err


def test_errors_are_words(model, tmp_path, capsys):
    half = tmp_path / "half.gguf"
    half.write_bytes(model.read_bytes()[:-100])
    before = half.read_bytes()
    for args in ("dump", half), ("hash", half), ("set-metadata", half, "llama.context_length", 1, "--force"), ("dump", tmp_path / "none"):
        assert cli.main(["gguf", *map(str, args)]) == 1
        error = capsys.readouterr().err
        assert "sherry-gguf gguf " in error and ("damaged" in error or "no such file" in error), error
    assert half.read_bytes() == before
    asked = run("set-metadata", model, "llama.context_length", 1)
    assert asked.returncode == 1 and "pass --force" in asked.stderr and "Traceback" not in asked.stderr


def test_arguments_and_exit_codes_are_the_tools_own(capsys):
    assert cli.main(["gguf"]) == cli.main(["gguf", "none"]) == 2
    assert capsys.readouterr().err.count("set-metadata  ") == 2
    for args, code in ((["dump", "--help"], 0), (["dump", "--none", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["gguf", *args])
        assert ended.value.code == code
    assert "usage: sherry-gguf gguf dump " in capsys.readouterr().out


def test_without_an_output():
    done = subprocess.run(f"{sys.executable} -m sherry_gguf gguf dump x.gguf >&-", shell=True, env=ENV, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "no such file" in done.stderr


def test_set_metadata_of_one_file_of_a_split(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    for key, value in (("split.no", 0), ("split.count", 2), ("split.tensors.count", 2)):
        writer.add_uint16(key, value)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("norm", np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "m-00001-of-00002.gguf"
    assert cli.main(["gguf", "set-metadata", str(path), "tokenizer.ggml.add_bos_token", "0", "--force"]) == 0
    assert not gguf.GGUFReader(path).fields["tokenizer.ggml.add_bos_token"].contents()
