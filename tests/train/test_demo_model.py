"""scripts/make_demo_model.py at a tiny size: books become prose, rounds follow each other, and the GGUF is what its card says."""

import hashlib
import json
import lzma
import random

import books
import make_demo_model
import pytest
import torch
from safetensors.torch import load_file

from sherry_gguf.errors import Stop
from sherry_gguf.gguf_file import read_gguf

HEAD = "# Title: A Tale\n\n## Author: Nobody\n\n## Year: 1900\n\n-------\n\n"
STORY = """## CHAPTER I: THE BEGINNING\r
\r
“Come in—quickly,” said the _old_ man.\r
\r
He shut the door, and\r
went slowly along the dark street to the café, where nobody knew him.\r
\r
A Table of Contents\r
\r
The boy stood on the deck,\r
whence all had fled.\r
\r
Ἄνδρα μοι ἔννεπε, Μοῦσα.\r
"""
PROSE = [
    '"Come in--quickly," said the old man.',
    "He shut the door, and went slowly along the dark street to the cafe, where nobody knew him.",
]


def test_only_prose_is_kept():
    assert list(books.paragraphs(HEAD + STORY)) == PROSE


def test_books_without_speech_are_left_out(tmp_path):
    write(tmp_path / "b.jsonl.xz", {"a tale": STORY, "a treatise": "It follows that all is well.\n\n" * 9})
    assert books.read(tmp_path / "b.jsonl.xz") == ({"a tale": "\n".join(PROSE)}, 1)


def test_a_file_that_is_no_list_of_books_is_refused(tmp_path):
    path = tmp_path / "b.jsonl.xz"
    with pytest.raises(Stop, match="no such file"):
        books.read(path)
    for content in (b"{}", lzma.compress(b"{}\n"), lzma.compress(b'{"title": "x", "text": "Plain."}\n'), lzma.compress(b"x" * 999)[:40]):
        path.write_bytes(content)
        with pytest.raises(Stop, match="not a list of books|no book with dialogue"):
            books.read(path)


def write(path, texts):
    path.write_bytes(lzma.compress("".join(json.dumps({"title": k, "text": HEAD + v}) + "\n" for k, v in texts.items()).encode()))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs the program at a tiny size, in this process; gives its exit status."""
    rng = random.Random(0)
    words = "the a man dog house door river went came saw old young dark and but then he she it said never always".split()
    tale = lambda: "\n\n".join(f'"{" ".join(rng.choices(words, k=9))}," he said.' for _ in range(150))
    write(tmp_path / "books.train.jsonl.xz", {f"tale {i}": tale() for i in range(3)})
    write(tmp_path / "books.heldout.jsonl.xz", {"another": tale()})
    for name, value in {"VOCAB": 320, "LAYERS": 1, "HIDDEN": 128, "INTERMEDIATE": 128, "CONTEXT": 32, "BATCH": 2, "CHUNKS": 2}.items():
        monkeypatch.setattr(make_demo_model, name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(rounds, work="work"):
        flags = {"data": tmp_path, "work": tmp_path / work, "out": tmp_path / "out/m.gguf", "rounds": rounds, "round-steps": 3}
        return make_demo_model.main([x for k, v in (flags | {"finish-steps": 2}).items() for x in (f"--{k}", str(v))])

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_rounds_finish_and_model(tiny, tmp_path, capfd, monkeypatch):
    assert tiny(1) == 0, capfd.readouterr().err
    digest = hashlib.sha256((tmp_path / "out/m.gguf").read_bytes()).hexdigest()
    assert (tmp_path / "out/m.sha256").read_text() == f"{digest}  m.gguf\n"
    model = read_gguf(tmp_path / "out/m.gguf")
    kinds = {t.type.name for name, t in model.tensors.items() if name.startswith("blk.") and "norm" not in name}
    assert kinds == {"TQ1_25"} and model.tensors["token_embd.weight"].type.name == "Q8_0"
    assert model.fields["general.license.name"] == "MIT" and model.fields["sherry.exact"]
    card = (tmp_path / "out/m.md").read_text()
    loss = json.loads((tmp_path / "work/finish-1-2/hf/training.json").read_text())["loss"]["held_out"]
    assert f"{loss:.3f} over all tokens" in card and "--rounds 1 --round-steps 3 --finish-steps 2 --seed 0" in card and "MIT" in card

    monkeypatch.setattr(make_demo_model, "convert", lambda *_: 0)
    capfd.readouterr()
    assert tiny(1) == 0  # nothing is trained again
    assert "==>" not in capfd.readouterr().out
    assert tiny(2) == 0  # goes on after the first round
    said = capfd.readouterr().out
    assert "==> round-1" not in said and "==> round-2" in said and "==> finish-2-2" in said
    assert tiny(2, "other") == 0  # and comes to the same result
    one, other = (load_file(tmp_path / work / "finish-2-2/hf/model.safetensors") for work in ("work", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_other_settings_are_refused(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"seed": 1, "round_steps": 3}')
    data = ["--data", str(tmp_path), "--work", str(tmp_path), "--out", str(tmp_path / "m.gguf")]
    assert make_demo_model.main([*data, "--round-steps", "3"]) == 1
    assert "seed: 1 then, 0 now" in capsys.readouterr().err
    assert make_demo_model.main([*data, "--seed", "1", "--round-steps", "3"]) == 1
    assert "books.train.jsonl.xz: no such file" in capsys.readouterr().err
