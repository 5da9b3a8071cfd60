"""Old STQ1_0 files are told from upstream's Q2_0 by size alone, and changed whole or not at all."""

import os

import numpy as np
import pytest

from sherry_gguf import cli, gguf_type, retag
from sherry_gguf.errors import ConvertError
from sherry_gguf.reader import open_gguf

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType


def write(path, tensors, alignment=32, file_type=41):
    """tensors: name to (type's number, number in the file, shape in NumPy's order)."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "an old one")
    if file_type is not None:
        writer.add_file_type(file_type)
    sizes = {43: (256, 42), 42: (64, 18), 0: (1, 4)}
    for name, (real, _, shape) in tensors.items():
        block, nbytes = sizes[real]
        data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * nbytes), dtype=np.uint8)
        if real == 0:
            writer.add_tensor(name, data.view(np.float32))
        else:  # the published package lacks Q2_0: write its bytes as a type of the same size
            writer.add_tensor_info(name, data.shape, np.dtype(np.uint8), data.nbytes, raw_dtype=Q.I8)
            writer.tensors[-1][name].tensor = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entries = open_gguf(path, types=False).table
    with open(path, "r+b") as f:
        for e in entries:
            real, number, shape = tensors[e.name]
            if real:
                f.seek(e.type_at - 8 * len(shape))
                f.write(np.array(shape[::-1], "<u8").tobytes() + np.array([number], "<u4").tobytes())
    return path


OLD = {
    "token_embd.weight": (0, 0, (4, 32)),
    "a": (43, 42, (3, 256)),
    "b": (43, 42, (5, 768)),
    "norm": (0, 0, (7,)),
    "c": (43, 42, (2, 4, 512)),
}


@pytest.fixture
def old(tmp_path):
    return write(tmp_path / "old.gguf", OLD)


CHANGES = [(41, 43), *[(42, 43)] * 3]  # general.file_type, and the type of three tensors


def changes(before, after):
    assert len(before) == len(after)
    return [(a, b) for a, b in zip(before, after) if a != b]


def numbers(path):
    return {e.name: e.type_id for e in open_gguf(path, types=False).table}


@pytest.mark.parametrize("alignment", [32, 64, 128])
def test_a_copy(tmp_path, alignment, capsys):
    old = write(tmp_path / "old.gguf", OLD, alignment)
    before = old.read_bytes()
    assert cli.main(["retag", str(old), str(tmp_path / "new.gguf")]) == 0
    assert "3 tensors and general.file_type now have STQ1_0's number, 43\n" in capsys.readouterr().out
    assert old.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["new.gguf", "old.gguf"]
    assert numbers(tmp_path / "new.gguf") == {name: 43 if real == 43 else real for name, (real, _, _) in OLD.items()}
    new = (tmp_path / "new.gguf").read_bytes()
    assert changes(before, new) == CHANGES
    # the published reader now accepts the file and returns the weights
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "new.gguf").tensors}
    assert tensors["b"].tensor_type == Q.STQ1_0 and tensors["b"].shape.tolist() == [768, 5]
    assert gguf.quants.dequantize(tensors["b"].data, Q.STQ1_0).shape == (5, 768)


def test_in_place(old, capsys):
    before = old.read_bytes()
    assert cli.main(["retag", str(old), "--in-place"]) == 0
    assert numbers(old)["c"] == 43 and os.listdir(old.parent) == ["old.gguf"]
    assert changes(before, old.read_bytes()) == CHANGES
    assert cli.main(["retag", str(old), "--in-place"]) == 1
    assert "has no tensor of type 42: there is nothing to change" in capsys.readouterr().err


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("file_type, wanted", [(41, 43), (42, 43), (43, 43), (7, 7), (125, 125), (None, None)])
def test_the_file_type(tmp_path, capsys, file_type, wanted, in_place):
    """Tools print it. The first files have 41 or 42, now other types' numbers; no other file's changes."""
    file = write(tmp_path / "x.gguf", OLD, file_type=file_type)
    new = file if in_place else tmp_path / "new.gguf"
    assert cli.main(["retag", str(file), "--in-place" if in_place else str(new)]) == 0
    assert ("general.file_type now ha" in capsys.readouterr().out) == (file_type != wanted)
    field = open_gguf(new).fields.get("general.file_type")
    assert (field and field.contents()) == wanted


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_an_earlier_retag_left_with_the_old_file_type(tmp_path, capsys, in_place):
    file = write(tmp_path / "x.gguf", {name: (real, real, shape) for name, (real, _, shape) in OLD.items()})
    before, new = file.read_bytes(), file if in_place else tmp_path / "new.gguf"
    assert cli.main(["retag", str(file), "--in-place" if in_place else str(new)]) == 0
    assert "general.file_type now has STQ1_0's number, 43\n" in capsys.readouterr().out
    assert changes(before, new.read_bytes()) == [(41, 43)]
    other = write(tmp_path / "y.gguf", {"norm": (0, 0, (7,))}, file_type=41)  # no tensor shows that this is STQ1_0
    assert cli.main(["retag", str(other), str(tmp_path / "z.gguf")]) == 1 and "nothing to change" in capsys.readouterr().err


def test_a_file_type_of_another_kind_is_left_alone(tmp_path):
    """A string has no 32 bits to change."""
    file = write(tmp_path / "x.gguf", OLD)
    data, key = file.read_bytes(), b"general.file_type"
    at = data.index(key) + len(key)
    text = b"\x08\0\0\0" + np.array([28], "<u8").tobytes() + b"41" * 14  # longer by exactly the alignment
    file.write_bytes(data[:at] + text + data[at + 8 :])
    before = file.read_bytes()
    assert cli.main(["retag", str(file), str(tmp_path / "new.gguf")]) == 0
    assert changes(before, (tmp_path / "new.gguf").read_bytes()) == CHANGES[1:]


def test_upstreams_q2_0_is_refused(tmp_path, capsys):
    for tensors in {"a": (42, 42, (3, 256))}, OLD | {"q": (42, 42, (5, 64))}, {"q": (42, 42, (1, 64)), "z": (0, 0, (1, 32))}:
        file = write(tmp_path / "q2_0.gguf", tensors)
        before = file.read_bytes()
        for more in ["--in-place"], [str(tmp_path / "new.gguf")]:
            assert cli.main(["retag", str(file), *more]) == 1
            assert "it is upstream's Q2_0" in capsys.readouterr().err
        assert file.read_bytes() == before and os.listdir(tmp_path) == ["q2_0.gguf"]


def test_sizes_of_neither(old, tmp_path, capsys):
    data = old.read_bytes()
    for wrong in data[:-64], data + bytes(64), data[:-1]:
        old.write_bytes(wrong)
        assert cli.main(["retag", str(old), str(tmp_path / "new.gguf")]) == 1
        assert "neither STQ1_0's 42 for each 256 weights nor Q2_0's 72" in capsys.readouterr().err
    a, b = (e for e in open_gguf(old, types=False).table if e.name in "ab")
    for at, value, says in (
        (b.type_at + 4, b.start, "tensor a, .*neither STQ1_0's"),
        (a.type_at + 4, 33, "tensor a, .*neither STQ1_0's"),
        (b.type_at - 8, 0, "tensor b, 768 x 0, has no weights"),
        (b.type_at - 16, 100, "tensor b, .*neither STQ1_0's"),
    ):
        wrong = bytearray(data)
        wrong[at : at + 8] = np.array([value], "<u8").tobytes()
        old.write_bytes(wrong)
        with pytest.raises(ConvertError, match=says):
            retag.old_tensors(open_gguf(old, types=False))


@pytest.mark.parametrize("alignment, real", [(128, (1, 256)), (128, (256,)), (4096, (16, 256))])
def test_rooms_that_tell_nothing(tmp_path, capsys, alignment, real):
    """42 and 72 bytes for each 256 weights may be equal once padded: only other tensors decide, never a guess."""
    for type_id in 42, 43:
        file = write(tmp_path / "x.gguf", {"a": (type_id, 42, real), "z": (0, 0, (1, 32))}, alignment)
        assert cli.main(["retag", str(file), str(tmp_path / "new.gguf")]) == 1
        assert "tensor a and all others of type 42 are so small that" in capsys.readouterr().err and not (tmp_path / "new.gguf").exists()
        larger = {"a": (type_id, 42, real), "b": (type_id, 42, (300, 256)), "z": (0, 0, (1, 32))}
        file = write(tmp_path / "x.gguf", larger, alignment)
        assert cli.main(["retag", str(file), str(tmp_path / "new.gguf")]) == (0 if type_id == 43 else 1)
        says = capsys.readouterr()
        assert (
            "2 tensors and general.file_type now have STQ1_0's number, 43" in says.out
            if type_id == 43
            else "tensor b, 256 x 300, has 21632 bytes" in says.err or "it is upstream's Q2_0" in says.err
        )


def test_what_else_is_wrong_is_told(old, tmp_path, capsys):
    """A file with damage elsewhere isn't copied."""
    data = old.read_bytes()
    first, e = (next(e for e in open_gguf(old, types=False).table if e.name == name) for name in ("token_embd.weight", "norm"))
    for at, value, says in (
        (e.type_at, 99, "tensor norm (7) has the unknown type 99"),
        (e.type_at - 8, 1 << 40, "tensor norm (1099511627776) would end at byte"),
        (first.type_at + 4, e.start - first.start, "tensors norm and token_embd.weight overlap"),
    ):
        wrong = bytearray(data)
        width = 4 if at == e.type_at else 8
        wrong[at : at + width] = value.to_bytes(width, "little")
        old.write_bytes(wrong)
        for command in ["retag", str(old), str(tmp_path / "new.gguf")], ["retag", str(old), "--in-place"]:
            assert cli.main(command) == 1
            assert says in capsys.readouterr().err
        assert old.read_bytes() == wrong and os.listdir(tmp_path) == ["old.gguf"]


def test_old_bytes_are_kept_until_the_new_ones_are_on_the_disk(old, monkeypatch):
    """The order of what reaches the disk: the copy of the head, its name, the new numbers; then the copy goes."""
    calls = []
    names = {}

    def recorded(function, name):
        def call(*args, **kwargs):
            what = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[0])
            calls.append((name, os.path.basename(what)))
            if name == "unlink":
                names["numbers"] = numbers(old)
            return function(*args, **kwargs)

        return call

    for module, name in (os, "fsync"), (os, "replace"), (os, "unlink"):
        monkeypatch.setattr(module, name, recorded(getattr(module, name), name))
    retag.retag_in_place(old)
    backup = old.name + retag.BACKUP
    assert open_gguf(old).fields["general.file_type"].contents() == 43
    assert calls == [
        ("unlink", backup + ".part"),
        ("fsync", backup + ".part"),
        ("replace", backup + ".part"),
        ("fsync", old.parent.name),
        ("fsync", old.name),
        ("unlink", backup),
    ]
    assert 42 not in names["numbers"].values()


def test_a_head_that_cannot_be_copied_leaves_nothing(old, monkeypatch, capsys):
    before = old.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["retag", str(old), "--in-place"]) == 1
    assert "there is no room for the copy of its head" in capsys.readouterr().err
    assert old.read_bytes() == before and os.listdir(old.parent) == ["old.gguf"]


def test_what_lies_beside_the_file(old, tmp_path, capsys):
    """Somebody else's files under retag's names: retag doesn't write through them or wait for them."""
    before, backup = old.read_bytes(), old.name + retag.BACKUP
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / (backup + ".part")).symlink_to("victim")
    assert cli.main(["retag", str(old), "--in-place"]) == 0 and (tmp_path / "victim").read_bytes() == b"precious"
    old.write_bytes(before)
    for make in os.mkfifo, lambda path: os.symlink("victim", path):
        make(tmp_path / backup)
        assert cli.main(["retag", str(old), "--in-place"]) == 1
        assert "is in the way of a retag in place" in capsys.readouterr().err and old.read_bytes() == before
        (tmp_path / backup).unlink()
    (tmp_path / backup).write_bytes(before[:100])
    assert cli.main(["retag", str(old), str(tmp_path / "new.gguf")]) == 1
    assert "was cut off: run it with --in-place again" in capsys.readouterr().err


def test_targets_as_other_programs_take_them(old, tmp_path, capsys):
    """A symbolic link is written through; anything but an ordinary file is left alone."""
    (tmp_path / "real.gguf").write_bytes(b"older")
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    assert cli.main(["retag", str(old), str(tmp_path / "link.gguf")]) == 0
    assert (tmp_path / "link.gguf").is_symlink() and numbers(tmp_path / "real.gguf")["a"] == 43
    os.mkfifo(tmp_path / "pipe.gguf")
    assert cli.main(["retag", str(old), str(tmp_path / "pipe.gguf")]) == 1
    assert "not an ordinary file" in capsys.readouterr().err and not (tmp_path / "pipe.gguf").is_file()
    assert cli.main(["retag", str(old), str(tmp_path / ("x" * 300))]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_split_goes_file_by_file(old, tmp_path, capsys):
    """A file without a tensor of type 42 is copied, so that the split stays whole."""
    shard = old.rename(tmp_path / "m-00002-of-00002.gguf")
    first = write(tmp_path / "m-00001-of-00002.gguf", {"norm": (0, 0, (7,))}, file_type=42)
    before = first.read_bytes()
    for i, source in (1, first), (2, shard):
        assert cli.main(["retag", str(source), str(tmp_path / f"n-0000{i}-of-00002.gguf")]) == 0
    assert "n-00001-of-00002.gguf: general.file_type now has STQ1_0's number, 43\n" in capsys.readouterr().out
    assert changes(before, (tmp_path / "n-00001-of-00002.gguf").read_bytes()) == [(42, 43)]  # its file type, for the other one
    # in place, in either order
    for i, source in (2, shard), (1, first):
        assert cli.main(["retag", str(source), "--in-place"]) == 0
        assert source.read_bytes() == (tmp_path / f"n-0000{i}-of-00002.gguf").read_bytes()


@pytest.mark.parametrize("second", [None, {"a": (42, 42, (3, 256))}, {"norm": (0, 0, (7,))}], ids=["missing", "q2_0", "f32"])
def test_the_file_type_of_a_split_that_is_not_known_to_be_stq1_0(tmp_path, second):
    first = write(tmp_path / "m-00001-of-00002.gguf", {"norm": (0, 0, (7,))})
    if second:
        write(tmp_path / "m-00002-of-00002.gguf", second)
    target = tmp_path / "n-00001-of-00002.gguf"
    assert cli.main(["retag", str(first), str(target)]) == 0 and target.read_bytes() == first.read_bytes()


def test_in_place_through_a_symbolic_link(old, tmp_path, capsys):
    """As in a Hugging Face cache, whose snapshots are links to files that other revisions have too."""
    before, link = old.read_bytes(), tmp_path / "snapshot.gguf"
    link.symlink_to("old.gguf")
    assert cli.main(["retag", str(link), "--in-place"]) == 1
    said = capsys.readouterr().err
    assert f"{link} is a symbolic link to {old}: --in-place would change that file" in said and "sherry-gguf retag IN OUT" in said
    assert old.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["old.gguf", "snapshot.gguf"]
    assert cli.main(["retag", str(link), str(tmp_path / "new.gguf")]) == 0 and old.read_bytes() == before
    # an earlier version wrote through links: a cut-off run of it is undone as well
    backup = tmp_path / ("snapshot.gguf" + retag.BACKUP)
    backup.write_bytes(before[: max(e.type_at for e in retag.old_tensors(open_gguf(old, types=False))) + 4])
    with open(old, "r+b") as f:
        retag._set(f, {retag.old_tensors(open_gguf(old, types=False))[0].type_at: 43})
    assert cli.main(["retag", str(link), "--in-place"]) == 1 and "is a symbolic link" in capsys.readouterr().err
    assert old.read_bytes() == before and not backup.exists()


def test_files_without_their_last_padding(old):
    entries = open_gguf(old, types=False).table
    last = max(entries, key=lambda e: e.start)
    assert last.name == "c"
    os.truncate(old, last.start + 2 * 4 * 84)
    assert len(retag.old_tensors(open_gguf(old, types=False))) == 3


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "not an ordinary file"),
        (lambda p: p.write_bytes(b"junk"), "is not a GGUF file"),
        (lambda p: p.write_bytes(b""), "is not a GGUF file"),
    ],
)
def test_what_is_no_gguf(tmp_path, capsys, make, says):
    make(tmp_path / "x.gguf")
    assert cli.main(["retag", str(tmp_path / "x.gguf"), str(tmp_path / "new.gguf")]) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "new.gguf").exists()


def test_places_that_cannot_be_written(old, tmp_path, capsys):
    before = old.read_bytes()
    for target, says in (
        (old, "--in-place changes it"),
        (tmp_path, "not an ordinary file"),
        (tmp_path / "none/new.gguf", "none does not exist. Create it first"),
    ):
        assert cli.main(["retag", str(old), str(target)]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["retag", str(old)])
    with pytest.raises(SystemExit):
        cli.main(["retag", str(old), str(tmp_path / "new.gguf"), "--in-place"])
    assert old.read_bytes() == before and os.listdir(tmp_path) == ["old.gguf"]


def test_a_retag_in_place_that_was_cut_off_is_undone(old, capsys):
    before = old.read_bytes()
    found = retag.old_tensors(open_gguf(old, types=False))
    backup = old.with_name(old.name + retag.BACKUP)
    for cut in range(5):  # so many numbers had changed
        old.write_bytes(before)
        backup.write_bytes(before[: max(e.type_at for e in found) + 4])
        with open(old, "r+b") as f:
            retag._set(f, dict([(open_gguf(old, types=False).file_type_at(), 43), *((e.type_at, 43) for e in found)][:cut]))
        assert changes(before, old.read_bytes()) == CHANGES[:cut]
        assert cli.main(["retag", str(old), "--in-place"]) == 0
        assert changes(before, old.read_bytes()) == CHANGES and not backup.exists()
    # another file under that name is left alone
    backup.write_bytes(b"x" * 100)
    after = old.read_bytes()
    assert cli.main(["retag", str(old), "--in-place"]) == 1
    assert "belongs to a retag that was cut off, but not to this old.gguf" in capsys.readouterr().err and old.read_bytes() == after
