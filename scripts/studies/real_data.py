"""The texts and tasks that real_models.py takes from --data: what they are, where they come from, whether they are there."""

import hashlib
import json
import lzma
from pathlib import Path

from sherry_gguf.errors import Stop
from sherry_gguf.training.files import undamaged, write

WIKI, BOOKS = "wiki.test.raw.xz", "books.train.jsonl.xz"
WIKI_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"  # unpacked
TEXTS = {
    WIKI: "WikiText-2's raw test set, 1,290,590 bytes, the file wiki.test.raw of the archive wikitext-2-raw-v1.zip, packed by xz",
    BOOKS: "any English books, a document in each line's field `text`, packed by xz",
}
# the task's file, as in examples/tasks, and its data set on the Hugging Face hub
TASKS = {
    "arc_easy": ("arc_easy.test.jsonl", "allenai/ai2_arc, ARC-Easy"),
    "arc_challenge": ("arc_challenge.test.jsonl", "allenai/ai2_arc, ARC-Challenge"),
    "piqa": ("piqa.validation.jsonl", "baber/piqa"),
    "winogrande": ("winogrande.validation.jsonl", "allenai/winogrande, winogrande_xl"),
    "hellaswag": ("hellaswag.validation.jsonl", "Rowan/hellaswag"),
}
PACKED = "", ".xz", ".gz", ".bz2"  # as sherry_gguf.evaluation takes a task's file


def task_file(data: Path, task: str) -> Path | None:
    """The file of one of TASKS, plain or compressed, or None."""
    return next((path for end in PACKED if (path := data / (TASKS[task][0] + end)).is_file()), None)


def check(data: Path | None, tasks: list[str]) -> None:
    """Raise Stop if --data lacks a file: says what it is, and where it is to be had."""
    there = data if data and data.is_dir() else None
    missing = [f"  {name}: {what}" for name, what in TEXTS.items() if not (there and (there / name).is_file())]
    for task in tasks:
        if task in TASKS and not (there and task_file(there, task)):
            name, source = TASKS[task]
            missing.append(f"  {name}, or .xz, .gz or .bz2 of it: the data set {source}, in JSON Lines (examples/tasks/README.md)")
    if missing:
        what = f"--data {data} lacks" if there else f"--data {data}: no such directory. It needs" if data else "name a --data DIR that has"
        raise Stop("\n".join([what, *missing]))


def wiki(data: Path, work: Path) -> Path:
    """WikiText-2's raw test set, unpacked. Raises Stop if it is another text."""
    target = work / "wiki.test.raw"
    if target.exists() and sha256(target.read_bytes()) == WIKI_SHA256:
        return target
    with undamaged(data / WIKI, "copy it again"):
        text = lzma.decompress((data / WIKI).read_bytes())
    if (found := sha256(text)) != WIKI_SHA256:
        raise Stop(f"{data / WIKI} is not {TEXTS[WIKI]}: its text has SHA-256 {found}, it must be {WIKI_SHA256}")
    write(target, text)
    return target


def sample(data: Path, characters: int) -> str:
    """As much text from the middle of each book as makes so many characters. Raises Stop if the books' file is damaged."""
    with undamaged(data / BOOKS, "copy it again"), lzma.open(data / BOOKS, "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"] for line in lines]
        share = characters // len(books)
    return "\n".join(book[len(book) // 2 : len(book) // 2 + share] for book in books)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
