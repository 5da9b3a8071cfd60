"""Text for training: every kind of file, under any name, and the errors about files without text."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest

from sherry_gguf.training.texts import Column, TextError, read


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(*texts) -> str:
    return "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts)


def test_every_kind_of_file(tmp_path):
    files = {
        "a.txt": b"\xef\xbb\xbfone\r\ntwo", "b.TXT.gz": gzip.compress("drei €".encode()), "c.jsonl": rows("four", None, "five").encode(),
        "d.JSONL.gz": gzip.compress(rows("six").encode() + b"\n"), "e.json": json.dumps([{"text": "seven"}, {"text": "eight"}]).encode(),
        "f.json": b"\n" + rows("nine", "").encode(), "g.log": b"ten", "j.jsonl.xz": lzma.compress(rows("eleven").encode()),
        "k.txt.BZ2": bz2.compress(b"twelve"),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name, kind in ("h.parquet", pyarrow.string()), ("i.parquet", pyarrow.large_string()):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([name, None], kind), "n": [1, 2]}), tmp_path / name)
    found = ["one\ntwo", "drei €", "four", "five", "six", "seven", "eight", "nine", "", "h.parquet", "i.parquet", "eleven", "twelve"]
    assert read([tmp_path])["text"] == found  # a .log is not searched for
    assert read([tmp_path / "g.log", tmp_path / "a.txt"])["text"] == ["ten", "one\ntwo"]


@pytest.mark.parametrize("name", ["a[1].txt", "a*.txt", "what? really.txt", "a{b,c}.txt", "**", "é ü.txt", "a.txt"])
def test_names_are_not_patterns(tmp_path, name):
    for other in {"a1.txt", "ab.txt", "x", "a.txt"} - {name}:
        (tmp_path / other).write_text("not asked for")
    (tmp_path / name).write_text("mine")
    assert read([tmp_path / name])["text"] == ["mine"]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    stat = path.stat()
    assert read([path])["text"] == ["old"]
    path.write_text("new")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert read([path])["text"] == ["new"]


@pytest.mark.parametrize("name, data, says", [
    ("a.txt", "naïve".encode("latin-1"), "a.txt: byte 2 is not UTF-8"),
    ("a.jsonl", rows("fine").encode() + b'{"text": ', "a.jsonl: line 2: "),
    ("a.jsonl", b'{"text": ["x", "y"]}', "a.jsonl: line 1: 'text' must be a string, not list"),
    ("a.jsonl", b'{"body": "x"}', "a.jsonl: line 1 has no column 'text', only 'body'"),
    ("a.jsonl", b"3", "a.jsonl: line 1 is not an object"),
    ("a.jsonl", b"", "a.jsonl: there is no text in it"),
    ("a.json", b'[{"text": "x"}', "a.json: JSONDecodeError: "),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: BadGzipFile: "),
    ("a.jsonl.xz", b"no xz at all", "a.jsonl.xz: LZMAError: "),
    ("a.jsonl.bz2", b"no bzip", "a.jsonl.bz2: OSError: "),
    ("a.parquet", b"no parquet", "a.parquet: ArrowInvalid: "),
    ("a.csv", b"text\nx\n", "a.csv: .csv files are not supported: make it plain text, .jsonl or .parquet"),
    ("a.jsonl.zst", b"", "a.jsonl.zst: .zst files are not supported"),
    ("a.csv.gz", b"", "a.csv.gz: .gz files are not supported"),
    (None, b"", "nowhere: no such file or directory"),
])  # fmt: skip
def test_errors_name_the_file_and_the_problem(tmp_path, name, data, says):
    (tmp_path / "b.txt").write_text("fine")
    if name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError) as e:
        read([*([tmp_path / "b.txt"] if data else []), tmp_path / (name or "nowhere")])
    assert says in str(e.value)


def test_files_without_any_text(tmp_path):
    for name in "a.jsonl", "b.jsonl":
        (tmp_path / name).write_text('{"text": null}')
    with pytest.raises(TextError, match=r"a\.jsonl and 1 more: there is no text in it"):
        read([tmp_path])
    (tmp_path / "c.txt").write_text("some")  # is enough
    assert read([tmp_path])["text"] == ["some"]


def test_numbers_and_wrong_columns_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="row 1: 'text' must be a string, not int"):
        read([tmp_path / "a.parquet"])
    with pytest.raises(TextError, match="it has no column 'body', only 'text'"):
        read([tmp_path / "a.parquet"], Column("body"))
