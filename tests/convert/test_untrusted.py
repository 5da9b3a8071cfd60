"""Files that lie: each refused, by our readers and by the patched loader, with the tensor's name and the cause."""

import re
import subprocess
import time
from pathlib import Path

import fuzz_seeds
import numpy as np
import pytest
from conftest import sherry

from sherry_gguf import gguf_type, llama_cpp, stq1_0, transcode
from sherry_gguf.errors import ConvertError
from sherry_gguf.reader import open_gguf

pytestmark = pytest.mark.slow

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType
NAME = "blk.0.attn_k.weight"


@pytest.fixture(scope="module", params=gguf_type.TYPES)
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    # rows of TQ1_25_64 that no larger block fits
    return fuzz_seeds.model(path, Q[request.param], {"TQ1_25": 128, "TQ1_25_64": 192}.get(request.param, 256))


def u32(value):
    return np.array([value], "<u4").tobytes()


def u64(value):
    return np.array([value], "<u8").tobytes()


def changed(model, tmp_path, change):
    """A copy of a model with `change(data, entry of NAME, the next entry)` done to its bytes."""
    data = bytearray(model.read_bytes())
    table = open_gguf(model).table
    i = next(i for i, e in enumerate(table) if e.name == NAME)
    data = change(data, table[i], table[i + 1]) or data
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


def put(data, at, value):
    data[at : at + len(value)] = value


def as_old(path, target):
    """A copy with type 42 in place of our types, as far as the file can be read."""
    data = bytearray(path.read_bytes())
    try:
        table = open_gguf(path, types=False).table
    except ConvertError:
        table = []
    for e in table:
        if e.type_id in {kind.type_id for kind in gguf_type.TYPES.values()}:
            put(data, e.type_at, u32(stq1_0.OLD_TYPE_ID))
    target.write_bytes(data)
    return target


def loaded(path, *flags, says=""):
    """llama-completion's exit code and output. Retries until that has `says`: the process may end before its last lines are written."""
    deadline = time.monotonic() + 30
    while True:
        code, text = loaded_once(path, *flags)
        if re.search(says, text) or time.monotonic() > deadline:
            return code, text


def loaded_once(path, *flags):
    arguments = ["-m", path, "-p", "a", "-n", 1, "-no-cnv", "--no-warmup", "--check-tensors", *flags]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    result = llama_cpp.run("llama-completion", *arguments, **pipes, text=True, errors="replace", timeout=100)
    return result.returncode, result.stdout


def test_the_model_itself_is_whole(model):
    code, text = loaded(model)
    assert code == 0, text
    assert sherry("inspect", model, "--tensors").returncode == 0


# change; our reader's message after the file's name; llama.cpp's message
LIES = {
    "truncated": (
        lambda d, e, n: d[:-100],
        r"tensor blk.0.ffn_down.weight .*would end at byte \d+, the file has \d+: it is truncated|tensor output_norm",
        r"tensor '[a-z0-9._]+' data is not within the file bounds",
    ),
    "overlapping": (
        lambda d, e, n: put(d, n.type_at + 4, u64(0)),
        r"tensors \S+ and \S+ overlap: one ends at byte \d+, the other begins at \d+",
        r"tensor 'blk.0.attn_v.weight' has offset 0, expected \d+",
    ),
    "misaligned": (
        lambda d, e, n: put(d, n.type_at + 4, u64(33)),
        r"tensor blk.0.attn_v.weight .*not a multiple of the file's alignment, 32",
        r"tensor 'blk.0.attn_v.weight' has offset 33, expected \d+",
    ),
    "beyond the end": (
        lambda d, e, n: put(d, e.type_at + 4, u64(1 << 62)),
        rf"tensor {NAME} .*would end at byte \d+, the file has",
        rf"tensor '{NAME}' has offset {1 << 62}, expected",
    ),
    "too many rows": (
        lambda d, e, n: put(d, e.type_at - 8, u64(1 << 40)),
        rf"tensor {NAME} .*would end at byte \d+, the file has",
        r"tensor 'blk.0.attn_v.weight' has offset \d+, expected \d+",
    ),
    "rows beyond 64 bits": (
        lambda d, e, n: put(d, e.type_at - 8, u64((1 << 63) - 1)),
        rf"tensor {NAME} .*has more weights than 64 bits can count",
        rf"incorrect shape for a tensor '{NAME}' may cause overflow",
    ),
    "just 2^63 weights": (
        lambda d, e, n: put(d, e.type_at - 16, u64(1 << 31) + u64(1 << 32)),
        rf"tensor {NAME} .*more weights than 64 bits can count",
        rf"incorrect shape for a tensor '{NAME}' may cause overflow",
    ),
    "negative rows": (
        lambda d, e, n: put(d, e.type_at - 8, u64((1 << 64) - 1)),
        rf"tensor {NAME} .*more weights than 64 bits can count",
        rf"tensor '{NAME}' dimension 1 has invalid number of elements: -1 < 0",
    ),
    "rows of no whole blocks": (
        lambda d, e, n: put(d, e.type_at - 16, u64(130)),
        rf"tensor {NAME} .*its rows are not a multiple of \d+, the block of",
        rf"tensor '{NAME}' of type \d+ \(s?tq1_\w+\) has 130 elements per row, not a multiple of block size",
    ),
    "wrong count of dimensions": (
        lambda d, e, n: put(d, e.type_at - 20, u32(1000)),
        rf"damaged: .*tensor \d+ of its table, '{NAME}', has 1000 dimensions, not 1 to 4",
        rf"tensor '{NAME}' has invalid number of dimensions: 1000 > 4",
    ),
    "unused type": (
        lambda d, e, n: put(d, e.type_at, u32(99)),
        rf"tensor {NAME} .*has the unknown type 99",
        rf"tensor '{NAME}' has ggml type 99, which is not in use",
    ),
    "another type's size": (
        lambda d, e, n: put(d, e.type_at, u32(8)),
        rf"tensors {NAME} and \S+ overlap",
        r"tensor 'blk.0.attn_v.weight' has offset",
    ),
    "another type's number, for fewer bytes": (
        # in rows of 128, the block of Q1_0
        lambda d, e, n: put(d, e.type_at - 16, u64(128) + u64(int(np.prod(e.shape)) // 128) + u32(41)),
        rf"tensor {NAME} takes \d+ bytes as Q1_0, but there are \d+ up to the next tensor",
        r"tensor 'blk.0.attn_v.weight' has offset \d+, expected \d+",
    ),
    "more tensors than there are": (
        lambda d, e, n: put(d, 8, u64(1000)),
        r"is not a GGUF file, or is truncated or damaged",
        r"failed to read tensor info",
    ),
    "2^64 - 1 tensors": (
        lambda d, e, n: put(d, 8, u64((1 << 64) - 1)),
        r"is not a GGUF file, or is truncated or damaged",
        r"number of tensors is -?\d+ but must be in",
    ),
    "2^62 keys": (
        lambda d, e, n: put(d, 16, u64(1 << 62)),
        r"is not a GGUF file, or is truncated or damaged",
        r"number of key value pairs is \d+ but must be in",
    ),
    "a name twice": (
        lambda d, e, n: put(d, n.type_at - 20 - len(n.name), NAME.encode()),
        rf"tensor {NAME} .*appears twice",
        rf"duplicate tensor name '{NAME}'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_tables_that_lie(model, tmp_path, lie):
    change, ours, llama = LIES[lie]
    path = changed(model, tmp_path, change)
    before = path.read_bytes()
    for command in (["inspect", path], ["transcode", path, tmp_path / "out.gguf", "--to", "f16"]):
        done = sherry(*command)
        assert done.returncode == 1 and re.search(ours, done.stderr) and str(path) in done.stderr, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    old = as_old(path, tmp_path / "old.gguf")  # and to retag, with STQ1_0's old number
    done = sherry("retag", old, tmp_path / "out.gguf")
    assert done.returncode == 1 and str(old) in done.stderr and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "is not a GGUF file" in done.stderr or re.search(r"tensors? (blk\.|output_)", done.stderr), done.stderr
    old.unlink()
    code, text = loaded(path, says=llama)
    assert code == 1 and re.search(llama, text), f"{code}\n{text[-3000:]}"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("which", ["all", "one"])
def test_a_number_that_another_type_has_now(tmp_path, which):
    """A fork's 2-bit blocks, 66 bytes for 256 weights, with type 41: upstream's Q1_0, 36 bytes for 256 weights."""
    path = fuzz_seeds.model(tmp_path / "x.gguf", Q.TQ2_0, 256)
    data, table = bytearray(path.read_bytes()), open_gguf(path).table
    for e in [e for e in table if e.type_id == Q.TQ2_0 and which in ("all", {NAME: "one"}.get(e.name))]:
        put(data, e.type_at, u32(Q.Q1_0))
    path.write_bytes(data)
    name, rows = ("blk.0.attn_q.weight", 256) if which == "all" else (NAME, 64)
    says = f"error: {path}: tensor {name} takes {36 * rows} bytes as Q1_0, but there are {66 * rows} up to the next tensor: "
    says += "it was written as another type with this number"
    for command in (
        ["inspect", path],
        ["verify", path, tmp_path],
        ["retag", path, tmp_path / "y.gguf"],
        *(["transcode", path, tmp_path / "y.gguf", "--to", to] for to in transcode.TARGETS),
    ):
        done = sherry(*command)
        assert done.returncode == 1 and done.stderr.startswith(says), done.stdout + done.stderr
    assert path.read_bytes() == data and list(tmp_path.iterdir()) == [path]
    code, text = loaded(path, says="has offset")
    assert code == 1 and "has offset" in text, text[-3000:]


@pytest.fixture
def ends_unpadded(tmp_path):
    """A file whose last tensor has 28 bytes and four of padding: its path, and the tensor's end."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("first", np.ones(32, np.float32))
    writer.add_tensor("last", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, open_gguf(path).table[-1].start + 28


def test_the_end_of_a_file(ends_unpadded):
    """The last tensor's padding may be missing, all or in part. More bytes are refused: nothing would tell the tensor's type."""
    path, end = ends_unpadded
    data = path.read_bytes()
    assert len(data) == end + 4
    for whole in data, data[:end], data[: end + 1]:
        path.write_bytes(whole)
        assert [e.name for e in open_gguf(path).table] == ["first", "last"]
    for junk in bytes(1), b"junk", bytes(32):
        path.write_bytes(data + junk)
        with pytest.raises(
            ConvertError, match=rf"x\.gguf: tensor last takes 28 bytes as F32, but there are {32 + len(junk)} up to the end of the file"
        ):
            open_gguf(path)
    path.write_bytes(data[: end - 1])
    with pytest.raises(ConvertError, match="tensor last .*would end at byte"):
        open_gguf(path)


def test_tensors_in_another_order_and_gaps(ends_unpadded):
    """Tensors may lie in any order (llama.cpp is stricter); bytes outside all tensors are refused."""
    path, _ = ends_unpadded
    data, (one, two) = bytearray(path.read_bytes()), open_gguf(path).table
    swapped = data[: one.start] + data[two.start :] + data[one.start : two.start]
    put(swapped, one.type_at + 4, u64(32))
    put(swapped, two.type_at + 4, u64(0))
    path.write_bytes(swapped)
    assert [t.data.tolist() for t in open_gguf(path).tensors] == [[1.0] * 32, [1.0] * 7]
    gap = data[: two.start] + bytes(32) + data[two.start :]
    put(gap, two.type_at + 4, u64(160))
    path.write_bytes(gap)
    with pytest.raises(ConvertError, match="tensor first takes 128 bytes as F32, but there are 160 up to the next tensor"):
        open_gguf(path)
    put(gap, one.type_at + 4, u64(32))
    path.write_bytes(gap)
    with pytest.raises(
        ConvertError, match=rf"the tensors' data begins at byte {one.start}, but the first tensor, first, at byte {one.start + 32}"
    ):
        open_gguf(path)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_padding_by_the_files_own_alignment(tmp_path, alignment):
    """Tensors without weights share their offset with the next tensor or the file's end."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, count in ("empty", 0), ("a", 3), ("none", 0), ("b", 9), ("nothing", 0):
        writer.add_tensor(name, np.ones(count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    starts = {e.name: e.start for e in open_gguf(path).table}
    assert starts["empty"] == starts["a"] and starts["none"] == starts["b"] == starts["a"] + -(-12 // alignment) * alignment
    assert sherry("inspect", path, "--tensors").returncode == 0


@pytest.mark.parametrize("found", ["most-weights", "no-rows"])
def test_findings_of_the_fuzzer(found):
    path = Path(__file__).parents[1] / "fuzz" / "corpus" / f"found-{found}.gguf"
    says = "incorrect shape for a tensor 'stq1_0' may cause overflow"
    code, text = loaded(path, says=says)
    assert code == 1 and says in text, f"{code}\n{text[-3000:]}"
    done = sherry("inspect", path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {path}: tensor stq1_0 ("), done.stderr


def test_long_arrays_are_read_at_once(tmp_path):
    """Ten million numbers take no longer than reading them."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("x.bytes", [1, 2, 3])
    writer.add_array("x.flags", [True, False])
    writer.add_array("x.empty", [1])
    writer.add_array("x.texts", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = path.read_bytes()
    at = data.index(b"x.empty") + len(b"x.empty") + 8
    data = data[:at] + u64(0) + data[at + 8 + 4 :]
    at = data.index(b"x.bytes") + len(b"x.bytes") + 4
    count = 10_000_000
    path.write_bytes(data[:at] + u32(0) + u64(count) + bytes(range(250)) * (count // 250) + data[at + 4 + 8 + 12 :])
    fields = {name: f.contents() for name, f in open_gguf(path).fields.items()}
    assert len(fields["x.bytes"]) == count and fields["x.bytes"][:3] == [0, 1, 2] and fields["x.flags"] == [True, False]
    assert fields["x.empty"] == [] and fields["x.texts"] == ["a", "b"]
    assert len(open_gguf(path).fields["x.bytes"].parts) == 6  # key, kind, and one part for all the numbers


def test_many_texts(tmp_path):
    """Half a million strings take a second, where gguf's reader takes ten; one that is too long is refused."""
    path, texts = tmp_path / "x.gguf", ["", "a", "жжж"] * 170_000
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("x.texts", texts)
    writer.add_uint32("x.after", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = open_gguf(path).fields
    assert fields["x.texts"].contents() == texts and fields["x.texts"].contents(1) == "a" and fields["x.after"].contents() == 7
    data = bytearray(path.read_bytes())
    at = data.index(b"x.texts") + len(b"x.texts") + 4 + 4 + 8 + 8
    for length in (1 << 62, (1 << 64) - 1):
        data[at : at + 8] = u64(length)
        path.write_bytes(data)
        with pytest.raises(ConvertError, match="is not a GGUF file, or is truncated or damaged: EOFError: data from byte"):
            open_gguf(path)


def test_what_is_not_the_files_fault(tmp_path, model, monkeypatch):
    for error, raised, says in (
        (PermissionError(13, "Permission denied"), ConvertError, "cannot read .*m.gguf: Permission denied"),
        (MemoryError("some"), MemoryError, "some"),
    ):

        def memmap(*_, error=error, **__):
            raise error

        monkeypatch.setattr(np, "memmap", memmap)
        with pytest.raises(raised, match=says):
            open_gguf(model)


@pytest.mark.parametrize("value_type, size", [(0, 1), (5, 4), (6, 4), (7, 1), (11, 8)])
def test_a_list_that_is_a_number(tmp_path, value_type, size):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("tokenizer.ggml.tokens", 1)
    writer.add_array("sherry.tensor.names", ["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = path.read_bytes()
    for key in b"tokenizer.ggml.tokens", b"sherry.tensor.names":
        at = data.index(key) + len(key)
        old = 8 if key.startswith(b"tok") else 4 + 4 + 8 + 8 + 1
        path.write_bytes(data[:at] + u32(value_type) + bytes([1] * size) + data[at + old :])
        done = sherry("inspect", path, "--tensors")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("d", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize("flags", [[], ["--load-mode", "none"], ["--no-repack"]], ids=" ".join)
def test_scales_that_lie(model, tmp_path, d, flags):
    """The last block's scale, in a row that repacking may leave over."""

    def change(data, e, n):
        block, size = gguf.GGML_QUANT_SIZES[Q(e.type_id)]
        put(data, e.start + int(np.prod(e.shape)) // block * size - 2, np.array([d], "<f2").tobytes())

    path = changed(model, tmp_path, change)
    code, text = loaded(path, *flags, says=f"tensor '{NAME}' has invalid data")
    assert code == 1 and f"tensor '{NAME}' has invalid data" in text, text[-3000:]
    assert re.search(r"s?tq1_\w+: the scale of block \d+ is -?(nan|inf|0.5), not a finite number", text), text[-3000:]


# GGUF type numbers of some keys
KEYS = {"llama.embedding_length": 4, "llama.block_count": 4, "llama.attention.head_count": 4, "llama.context_length": 4,
        "general.file_type": 4, "tokenizer.ggml.tokens": 9, "tokenizer.ggml.scores": 9, "general.architecture": 8}  # fmt: skip


@pytest.mark.parametrize("key, value_type", [(key, t) for key, own in KEYS.items() for t in (0, 4, 6, 7, 8, 9, 12, 13, 1000) if t != own])
def test_metadata_of_the_wrong_type(model, tmp_path, key, value_type):
    """A refusal, or a run without the key; never a crash."""
    data = model.read_bytes()
    at = data.index(key.encode()) + len(key)
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:at] + u32(value_type) + data[at + 4 :])
    assert data[at : at + 4] == u32(KEYS[key])
    for command in ["inspect", path, "--tensors"], ["transcode", path, tmp_path / "out.gguf", "--to", "f16"]:
        done = sherry(*command)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or str(path) in done.stderr
    code, text = loaded(path)
    assert code in (0, 1), f"{code}\n{text[-3000:]}"
