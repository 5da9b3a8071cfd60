"""`sherry-gguf verify` finds every difference that is put into a file; `inspect` shows files, and tells broken ones."""

import itertools
import re
import shutil
import struct
import subprocess
import sys

import conftest
import numpy as np
import pytest
import small_models
from conftest import sherry

from sherry_gguf import gguf_type, verify

gguf = gguf_type.register()


@pytest.mark.parametrize("name", small_models.MODELS)
def test_zoo_verifies(zoo, name):
    root, _ = zoo
    done = sherry("verify", root / f"{name}.gguf", root / name, *conftest.pre(name))
    assert done.returncode == 0, done.stdout + done.stderr
    names = verify.read_gguf(root / f"{name}.gguf").fields["sherry.tensor.names"]
    assert done.stdout.startswith(f"{len(names)} TQ1_25 tensors bit for bit as in the checkpoint, 0 as the reference")
    assert done.stdout.endswith("no differences\n")


@pytest.fixture
def copy(zoo, tmp_path):
    root, _ = zoo
    return shutil.copy(root / "llama.gguf", tmp_path / "x.gguf")


def differs(zoo, path, *told):
    root, _ = zoo
    done = sherry("verify", path, root / "llama")
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    assert f"; {len(told)} difference" in done.stdout, done.stdout
    for text in told:
        assert text in done.stdout, done.stdout


def flip(path, offset: int, bit: int = 0):
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize(
    "name, row, told",
    [
        (
            "blk.1.ffn_up.weight",
            7,
            "row 7 holds neither the checkpoint's values nor their Sparse-AbsMean in groups of 128",
        ),
        ("output.weight", 0, "are not the checkpoint's values as F16"),
        ("output_norm.weight", 0, "are not the checkpoint's values as F32"),
    ],
)
def test_one_bit(zoo, copy, name, row, told):
    t = verify.read_gguf(copy).tensors[name]
    for byte in (0, 5, 19, 20) if "blk" in name else (3,):
        offset = t.offset + row * (t.nbytes // t.shape[0]) * (len(t.shape) > 1) + byte
        flip(copy, offset, 6 if byte == 20 else 0)
        differs(zoo, copy, told)
        flip(copy, offset, 6 if byte == 20 else 0)


def test_another_checkpoint(zoo, tmp_path):
    other = small_models.make(tmp_path / "m", "llama", seed=1)
    done = sherry("verify", zoo[0] / "llama.gguf", other)
    assert done.returncode == 1 and done.stdout.count("differs: blk.") == 18


def rewrite(source, target, fields=lambda f: f, tensors=lambda t: t):
    """Write a copy of a GGUF with other fields (name: (value, type, element type)) or tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    pairs = {
        f.name: (f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
        for f in reader.fields.values()
        if not f.name.startswith("GGUF.")
    }
    for name, (value, kind, element) in fields(pairs).items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, element)
    for t in tensors(list(reader.tensors)):
        writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_metadata_and_tables(zoo, tmp_path):
    source = zoo[0] / "llama.gguf"
    cases = [
        (
            dict(fields=lambda f: f | {"llama.rope.freq_base": (5000.0, *f["llama.rope.freq_base"][1:])}),
            ["llama.rope.freq_base is 5000, the checkpoint has 10000"],
        ),
        (
            dict(fields=lambda f: {k: v for k, v in f.items() if k != "llama.context_length"}),
            ["llama.context_length is missing"],
        ),
        (
            dict(fields=lambda f: f | {"llama.more": (1, *f["llama.context_length"][1:])}),
            ["llama.more is in the file's metadata"],
        ),
        (
            dict(
                fields=lambda f: (
                    f
                    | {
                        "tokenizer.ggml.tokens": (
                            [t + "x" * (i == 300) for i, t in enumerate(f["tokenizer.ggml.tokens"][0])],
                            *f["tokenizer.ggml.tokens"][1:],
                        )
                    }
                )
            ),
            ["tokenizer.ggml.tokens is ["],
        ),
        (
            dict(fields=lambda f: f | {"sherry.tensor.exact": ([False] + [True] * 13, *f["sherry.tensor.exact"][1:])}),
            ["sherry.tensor.exact says False, it is exact"],
        ),
        (dict(fields=lambda f: f | {"general.name": ("Another", *f["general.name"][1:])}), []),
        (dict(tensors=lambda t: t[1:]), ["output.weight is missing from the file"]),
        (
            dict(tensors=lambda t: [x._replace(name="more.weight") if x.name == "output.weight" else x for x in t]),
            ["more.weight is in the file and not in the checkpoint", "output.weight is missing"],
        ),
        (
            dict(tensors=lambda t: [x._replace(data=x.data[1:]) if x.name == "output.weight" else x for x in t]),
            ["output.weight: shape (511, 256), the checkpoint has (512, 256)"],
        ),
    ]
    for i, (changes, told) in enumerate(cases):
        rewrite(source, tmp_path / f"{i}.gguf", **changes)
        if told:
            differs(zoo, tmp_path / f"{i}.gguf", *told)
        else:
            assert sherry("verify", tmp_path / f"{i}.gguf", zoo[0] / "llama").returncode == 0


def test_verify_bad_input(zoo, tmp_path):
    root, _ = zoo
    for args, told in [
        ((tmp_path / "none.gguf", root / "llama"), "none.gguf: no such file"),
        ((root / "llama.gguf", tmp_path / "none"), "none: no such directory"),
        ((root / "llama.gguf", tmp_path), "it has no config.json"),
        ((root / "llama" / "config.json", root / "llama"), "is not a GGUF file"),
    ]:
        done = sherry("verify", *args)
        assert done.returncode == 1 and told in done.stderr, done.stderr


# ---- inspect ----


def test_inspect(zoo):
    root, _ = zoo
    done = sherry("inspect", root / "llama.gguf", "--tensors")
    assert done.returncode == 0, done.stderr
    for line in (
        r"general\.architecture +llama",
        r"general\.file_type +125",
        r"sherry\.version +1",
        r"14 of 14 TQ1_25 tensors are exact.*",
        r"tokenizer\.ggml\.tokens +512 tokens",
        r"TQ1_25 +14 +983,040 +168,960 +1\.375",
        r"total +21 +1,246,464 +698,368 +4\.482",
        r"blk\.0\.attn_q\.weight +TQ1_25 +256 x 256 +yes +0\.0\d+ 0\.05\d*",
    ):
        assert re.search(rf"^ *{line}$", done.stdout, re.M), (line, done.stdout)


def test_inspect_needs_no_torch_and_no_llama_cpp(zoo):
    script = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from sherry_gguf import cli
code = cli.main(["inspect", sys.argv[1]])
assert "site-packages" in sys.modules["gguf"].__file__
sys.exit(code)
"""
    process = conftest.python(script, zoo[0] / "llama.gguf", env=conftest.ENV | {"SHERRY_BUILD_DIR": "/nowhere"})
    output, _ = process.communicate()
    assert process.returncode == 0 and "TQ1_25" in output, output


def test_inspect_split(zoo, tmp_path):
    assert (
        sherry("convert", zoo[0] / "llama", "--outfile", tmp_path / "x.gguf", "--split-max-tensors", "11").returncode
        == 0
    )
    second = tmp_path / "x-00002-of-00002.gguf"
    done = sherry("inspect", second)
    assert done.returncode == 0 and "in 2 file(s)" in done.stdout and "1,246,464" in done.stdout
    (tmp_path / "x-00001-of-00002.gguf").unlink()
    done = sherry("inspect", second)
    assert done.returncode == 1 and "x-00001-of-00002.gguf: no such file" in done.stderr


def test_inspect_broken_files(zoo, tmp_path):
    """Cut anywhere, or with any early byte changed: a message or a description, never a traceback."""
    data = (zoo[0] / "llama.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    table = data.index(b"output.weight")
    for size in (0, 3, 10, 24, 100, 5000, table + 20, len(data) - 100_000, len(data) - 1):
        path.write_bytes(data[:size])
        done = sherry("inspect", path)
        assert done.returncode == 1 and "x.gguf is not a GGUF file, or is truncated or damaged" in done.stderr, size
        assert "Traceback" not in done.stderr
    for offset in itertools.chain(range(0, 60, 5), range(table - 8, table + 60, 7)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        done = sherry("inspect", path, "--tensors")
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, offset
    unknown = data.rindex(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16
    assert data[unknown : unknown + 4] == struct.pack("<I", 125)
    path.write_bytes(data[:unknown] + struct.pack("<I", 99) + data[unknown + 4 :])
    done = sherry("inspect", path)
    assert done.returncode == 1 and "(99) is not a valid GGMLQuantizationType" in done.stderr


def test_inspect_into_a_closed_pipe(zoo):
    process = subprocess.Popen(
        [sys.executable, "-m", "sherry_gguf.cli", "inspect", str(zoo[0] / "llama.gguf")],
        env=conftest.ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert b"Traceback" not in process.communicate()[1]
