"""`sherry-gguf verify` finds every difference put into a file; `inspect` describes files and refuses broken ones."""

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
import torch
from conftest import sherry

from sherry_gguf import gguf_file, gguf_type, llama_cpp

gguf = gguf_type.register()


@pytest.mark.parametrize("name", small_models.MODELS)
def test_zoo_verifies(zoo, name):
    root, _ = zoo
    done = sherry("verify", root / f"{name}.gguf", root / name, *conftest.pre(name))
    assert done.returncode == 0, done.stdout + done.stderr
    model = gguf_file.read_gguf(root / f"{name}.gguf")
    names = model.fields["sherry.tensor.names"]
    kinds = " and ".join(sorted({model.tensors[n].type.name for n in names}))
    assert f"{len(names)} {kinds} tensors bit for bit as in the checkpoint, 0 as the reference" in done.stdout
    assert done.stdout.endswith("no differences\n")


@pytest.fixture
def copy(zoo, tmp_path):
    root, _ = zoo
    return shutil.copy(root / "llama.gguf", tmp_path / "x.gguf")


def differs(zoo, path, *says, flags=()):
    root, _ = zoo
    done = sherry("verify", path, root / "llama", *flags)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    assert f"; {len(says)} difference" in done.stdout, done.stdout
    for text in says:
        assert text in done.stdout, done.stdout


def flip(path, offset: int, bit: int = 0):
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize(
    "name, row, says",
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
def test_one_bit(zoo, copy, name, row, says):
    t = gguf_file.read_gguf(copy).tensors[name]
    for byte in (0, 5, 19, 20) if "blk" in name else (3,):
        offset = t.offset + row * (t.nbytes // t.shape[0]) * (len(t.shape) > 1) + byte
        flip(copy, offset, 6 if byte == 20 else 0)
        differs(zoo, copy, says)
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
            ["llama.rope.freq_base is 5000.0, the checkpoint has 10000.0"],
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
            ["tokenizer.ggml.tokens[300] is '"],
        ),
        (
            dict(fields=lambda f: f | {"sherry.tensor.exact": ([False] + [True] * 13, *f["sherry.tensor.exact"][1:])}),
            ["sherry.tensor.exact[0] is False, the checkpoint has True"],
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
    for i, (changes, says) in enumerate(cases):
        rewrite(source, tmp_path / f"{i}.gguf", **changes)
        if says:
            differs(zoo, tmp_path / f"{i}.gguf", *says)
        else:
            assert sherry("verify", tmp_path / f"{i}.gguf", zoo[0] / "llama").returncode == 0


# Claims that a file may make, and verify's answers: key; value, type and element type, or None to leave the key out; the
# differences reported.
V = gguf.GGUFValueType
FLAGS = [True] * 14
CLAIMS = [
    ("sherry.version", (9, V.UINT32), ["sherry.version is 9, the checkpoint has 1"]),
    ("sherry.method", ("x", V.STRING), ["sherry.method is 'x', the checkpoint has 'sparse_absmean'"]),
    ("sherry.weights", ("latent", V.STRING), ["sherry.weights is in the file's metadata and not"]),
    ("sherry.group_size", (256, V.UINT32), ["sherry.group_size is 256, the checkpoint has 128"]),
    ("sherry.group_size", (0, V.UINT32), ["sherry.group_size is 0"]),
    ("sherry.group_size", ("x", V.STRING), ["sherry.group_size is of type STRING, the checkpoint has UINT32"]),
    ("sherry.granularity", ("bogus", V.STRING), ["sherry.granularity is 'bogus'"]),
    ("sherry.granularity", (1, V.UINT32), ["sherry.granularity is of type UINT32"]),
    ("sherry.exact", (False, V.BOOL), ["sherry.exact is False, the checkpoint has True"]),
    ("sherry.exact", None, ["sherry.exact is missing"]),
    ("sherry.tensor.names", (["nope"], V.ARRAY, V.STRING), ["sherry.tensor.names has 1 values, the checkpoint has 14"]),
    ("sherry.tensor.names", (["nope"] * 14, V.ARRAY, V.STRING), ["sherry.tensor.names[0] is 'nope', the checkpoint"]),
    ("sherry.tensor.exact", (3, V.UINT32), ["sherry.tensor.exact is of type UINT32, the checkpoint has ARRAY/BOOL"]),
    ("sherry.tensor.exact", ([*FLAGS[1:], False], V.ARRAY, V.BOOL), ["sherry.tensor.exact[13] is False"]),
    ("sherry.tensor.exact", ([1] * 14, V.ARRAY, V.INT32), ["sherry.tensor.exact is of type ARRAY/INT32"]),
    ("sherry.tensor.relative_error", ([1e-3] * 14, V.ARRAY, V.FLOAT32), ["sherry.tensor.relative_error[0] is 0.00"]),
    ("general.quantization_version", (99, V.UINT32), ["general.quantization_version is 99, the checkpoint has 2"]),
    ("general.file_type", None, ["general.file_type is missing"]),
    ("general.author", ("me", V.STRING), []),
    ("llama.context_length", (256, V.UINT64), ["llama.context_length is of type UINT64, the checkpoint has UINT32"]),
    ("tokenizer.ggml.bos_token_id", (True, V.BOOL), ["tokenizer.ggml.bos_token_id is of type BOOL"]),
    ("llama.rope.freq_base", (10000, V.UINT32), ["llama.rope.freq_base is of type UINT32, the checkpoint has FLOAT32"]),
    ("llama.rope.freq_base", (10000.001, V.FLOAT32), ["freq_base is 10000.0009765625, the checkpoint has 10000.0"]),
]  # fmt: skip


def test_a_file_is_not_believed(zoo, tmp_path):
    source, path = zoo[0] / "llama.gguf", tmp_path / "x.gguf"

    fields = gguf_file.read_gguf(source).fields
    cases = list(CLAIMS)
    for key, element in ("tokenizer.ggml.scores", V.FLOAT32), ("tokenizer.ggml.token_type", V.INT32):
        value = list(fields[key])
        cases.append((key, (value[:-1], V.ARRAY, element), [f"{key} has 511 values, the checkpoint has 512"]))
        value[300] += 1
        says = f"{key}[300] is {value[300]!r}, the checkpoint has {fields[key][300]!r}"
        cases.append((key, (value, V.ARRAY, element), [says]))
    while cases:  # one of each key at a time
        batch = {key: (value, says) for key, value, says in reversed(cases)}
        cases = [case for case in cases if batch[case[0]][1] is not case[2]]

        def change(fields, batch=batch):
            changed = fields | {key: (*value, None)[:3] for key, (value, _) in batch.items() if value}
            return {k: v for k, v in changed.items() if batch.get(k, [v])[0]}

        rewrite(source, path, fields=change)
        # llama.cpp refuses a damaged vocabulary or splits text differently, which would be another difference
        differs(zoo, path, *(text for _, says in batch.values() for text in says), flags=["--no-tokenizer-check"])
        done = sherry("inspect", path, "--tensors")
        assert done.returncode == 0, done.stderr
    rewrite(source, path, fields=lambda f: {k: v for k, v in f.items() if not k.startswith("sherry.")})
    differs(zoo, path, *(f"{key} is missing" for key in fields if key.startswith("sherry.")))


def test_inexact_claims(tmp_path):
    """Latent weights: claims of exactness, or of another error or grouping, are differences."""
    model = small_models.make(tmp_path / "m", "llama", latent=True, dtype=torch.float32)
    source, path = tmp_path / "x.gguf", tmp_path / "y.gguf"
    assert sherry("convert", model, "--outfile", source).returncode == 0
    errors = gguf_file.read_gguf(source).fields["sherry.tensor.relative_error"]
    for key, value, says in [
        ("sherry.tensor.exact", FLAGS, "sherry.tensor.exact[0] is True, the checkpoint has False"),
        ("sherry.exact", True, "sherry.exact is True, the checkpoint has False"),
        ("sherry.tensor.relative_error", [0.0] * 14, "sherry.tensor.relative_error[0] is 0.0, the checkpoint has 0.5"),
        ("sherry.tensor.relative_error", [*errors[:9], errors[9] + 1e-6, *errors[10:]], "relative_error[9] is 0.5"),
    ]:
        rewrite(source, path, fields=lambda f, key=key, value=value: f | {key: (value, *f[key][1:])})
        done = sherry("verify", path, model)
        assert done.returncode == 1 and says in done.stdout and "; 1 difference" in done.stdout, done.stdout
    done = sherry("verify", source, model, "--granularity", "per_channel")
    assert done.returncode == 1 and "nor their Sparse-AbsMean in per_channel" in done.stdout
    assert "sherry.granularity is 'per_group', the checkpoint has 'per_channel'" in done.stdout
    weight = "model.layers.0.mlp.up_proj.weight"
    for value, cause in (float("nan"), "a weight is NaN or infinite"), (1e30, "is beyond fp16 (65504)"):
        small_models.edit_weights(model, lambda tensors, value=value: tensors[weight][3, :64].fill_(value))
        for flags in [], ["--granularity", "per_channel"]:
            done = sherry("verify", source, model, *flags)
            assert done.returncode == 1 and "Traceback" not in done.stderr
            assert f"blk.0.ffn_up.weight ({weight}), row 3: " in done.stderr and cause in done.stderr


def retyped(name, qtype):
    """For `rewrite`: store one tensor in another type, with the same values if the type can hold them."""

    def change(tensors):
        for t in tensors:
            if t.name == name:
                x = gguf.quants.dequantize(np.array(t.data), t.tensor_type).astype(np.float32)
                block, size = gguf.GGML_QUANT_SIZES[qtype]
                if qtype.name in ("F64", "I32", "F16"):
                    x = x.astype({"F64": np.float64, "I32": np.int32, "F16": np.float16}[qtype.name])
                elif qtype.name == "IQ2_XXS":
                    x = np.zeros((*x.shape[:-1], x.shape[-1] // block * size), np.uint8)
                elif qtype.name != "F32":
                    x = llama_cpp.ggml().quantize(qtype.name, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
                t = t._replace(data=x, tensor_type=qtype)
            yield t

    return change


@pytest.mark.parametrize(
    "name, types, planned",
    [
        ("blk.0.attn_q.weight", ("F16", "F32", "Q2_K", "TQ1_0", "IQ2_XXS", "F64"), "TQ1_25"),
        ("blk.0.attn_norm.weight", ("F16", "Q8_0", "F64", "I32"), "F32"),
        ("output.weight", ("Q8_0", "F32", "TQ1_25"), "F16"),
    ],
)
def test_types(zoo, tmp_path, name, types, planned):
    """A type that conversion would not choose is a difference, whatever the values are; no type aborts verify."""
    for qtype in types:
        change = retyped(name, gguf.GGMLQuantizationType[qtype])
        rewrite(zoo[0] / "llama.gguf", tmp_path / "x.gguf", tensors=change)
        says = f"{name}: stored as {qtype}, but conversion with these flags stores {planned}"
        differs(zoo, tmp_path / "x.gguf", says)


@pytest.mark.slow
def test_what_upstream_packs(zoo, copy, tmp_path):
    """MXFP4 experts are compared too."""
    root, _ = zoo
    path = shutil.copy(root / "gptoss.gguf", tmp_path / "y.gguf")
    flip(path, gguf_file.read_gguf(path).tensors["blk.1.ffn_up_exps.weight"].offset + 1000)
    done = sherry("verify", path, root / "gptoss", *conftest.pre("gptoss"))
    assert done.returncode == 1 and "; 1 difference" in done.stdout
    assert "blk.1.ffn_up_exps.weight: not the MXFP4 data of llama.cpp" in done.stdout


def test_broken_splits(zoo, tmp_path):
    root, _ = zoo
    x = ["convert", root / "llama", "--outfile", tmp_path / "x.gguf", "--split-max-tensors", "11"]
    y = [*x[:3], tmp_path / "y.gguf", "--split-max-tensors", "12"]
    assert sherry(*x).returncode == sherry(*y).returncode == 0
    first, second = tmp_path / "x-00001-of-00002.gguf", tmp_path / "x-00002-of-00002.gguf"
    keep = second.read_bytes()
    second.write_bytes((tmp_path / "y-00002-of-00002.gguf").read_bytes())
    done = sherry("verify", first, root / "llama")
    assert (
        done.returncode == 1
        and "belongs to a split with 21 tensors, but x-00001-of-00002.gguf, x-00002-of-00002.gguf have 20" in done.stderr
    )
    second.write_bytes(keep)
    (tmp_path / "y-00002-of-00002.gguf").write_bytes(keep)
    done = sherry("verify", tmp_path / "y-00001-of-00002.gguf", root / "llama")
    assert done.returncode == 1 and "y-00002-of-00002.gguf repeats the tensor blk." in done.stderr
    whole = shutil.copy(root / "llama.gguf", tmp_path / "z-00005-of-00003.gguf")
    assert sherry("verify", whole, root / "llama").returncode == 0  # a name that only looks like a split's


def test_verify_bad_input(zoo, tmp_path):
    root, _ = zoo
    for args, says in [
        ((tmp_path / "none.gguf", root / "llama"), "none.gguf: no such file"),
        ((root / "llama.gguf", tmp_path / "none"), "none does not exist"),
        ((root / "llama.gguf", root / "llama.gguf"), "llama.gguf is not a directory"),
        ((tmp_path, root / "llama"), f"{tmp_path}: not an ordinary file"),
        ((root / "llama.gguf", tmp_path), "it has no config.json"),
        ((root / "llama" / "config.json", root / "llama"), "is not a GGUF file"),
    ]:
        done = sherry("verify", *args)
        assert done.returncode == 1 and says in done.stderr, done.stderr


# ---- inspect ----


def test_inspect(zoo):
    root, _ = zoo
    done = sherry("inspect", root / "llama.gguf", "--tensors")
    assert done.returncode == 0, done.stderr
    for line in (
        r"general\.architecture +llama",
        r"general\.file_type +125",
        r"sherry\.version +1",
        r"14 of 14 TQ1_25 tensors are marked exact: bit for bit the checkpoint's",
        r"tokenizer\.ggml\.tokens +512 tokens",
        r"TQ1_25 +14 +983,040 +168,960 +1\.375",
        r"total +21 +1,246,464 +698,368 +4\.482",
        r"blk\.0\.attn_q\.weight +TQ1_25 +256 x 256 +yes +0\.0\d+ 0\.05\d*",
    ):
        assert re.search(rf"^ *{line}$", done.stdout, re.M), (line, done.stdout)


def test_inspect_of_two_types(zoo):
    done = sherry("inspect", zoo[0] / "llama-64.gguf", "--tensors")
    for line in (
        r"14 of 14 TQ1_25 and TQ1_25_64 tensors are marked exact: bit for bit the checkpoint's",
        r"sherry\.group_size +128",
        r"sherry\.tensor\.group_size +\[64, 128, 128, ...\] \(14\)",
        r"TQ1_25_64 +2 +49,152 +9,216 +1\.500",
        r"blk\.0\.ffn_down\.weight +TQ1_25_64 +128 x 192 +yes +0\.0\d+ 0\.0\d+",
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
    assert sherry("convert", zoo[0] / "llama", "--outfile", tmp_path / "x.gguf", "--split-max-tensors", "11").returncode == 0
    second = tmp_path / "x-00002-of-00002.gguf"
    done = sherry("inspect", second)
    assert done.returncode == 0 and "in 2 files\n" in done.stdout and "1,246,464" in done.stdout
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
        says = r"x.gguf(: tensor \S+ .* would end at byte \d+, the file has \d+: it is truncated"
        says += "| is not a GGUF file, or is truncated or damaged)"
        assert done.returncode == 1 and re.search(says, done.stderr), (size, done.stderr)
        assert "Traceback" not in done.stderr
    for offset in itertools.chain(range(0, 60, 5), range(table - 8, table + 60, 7)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :])
        done = sherry("inspect", path, "--tensors")
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, offset
    unknown = data.rindex(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16
    assert data[unknown : unknown + 4] == struct.pack("<I", 125)
    path.write_bytes(data[:unknown] + struct.pack("<I", 99) + data[unknown + 4 :])
    done = sherry("inspect", path)
    assert done.returncode == 1 and "tensor blk.0.ffn_down.weight (384 x 256) has the unknown type 99" in done.stderr


def test_inspect_tensor_without_rows(zoo, tmp_path):
    path = tmp_path / "x.gguf"

    def change(tensors):
        return [t._replace(data=t.data[:0]) if "ffn_up" in t.name else t for t in tensors]

    rewrite(zoo[0] / "llama.gguf", path, tensors=change)
    done = sherry("inspect", path, "--tensors")
    assert done.returncode == 0 and re.search(r"blk\.0\.ffn_up\.weight +TQ1_25 +0 x 256", done.stdout), done.stderr


def test_inspect_into_a_closed_pipe(zoo):
    process = subprocess.Popen(
        [sys.executable, "-m", "sherry_gguf.cli", "inspect", str(zoo[0] / "llama.gguf")],
        env=conftest.ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert b"Traceback" not in process.communicate()[1]
