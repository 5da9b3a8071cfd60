"""English prose from books in the public domain, cleaned for training."""

import json
import lzma
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from sherry_gguf.errors import Stop

DIALOGUE = 0.15  # share of paragraphs that begin with speech; plays, verse and treatises have less
VERSE = 60  # characters: a paragraph of shorter lines is verse, or a table
RULE = "\n-------\n"  # after a book's title, author and year
PLAIN = str.maketrans({
    "“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " ", "æ": "ae", "Æ": "Ae", "œ": "oe",
    "\r": None, "\ufeff": None, "_": None, "*": None,
})  # fmt: skip


def read(path: Path) -> tuple[dict[str, str], int]:
    """The novels and tales in a .jsonl.xz of books, each cleaned, by title; and how many other books there are.

    Raises Stop if the file is missing or holds something else.
    """
    if not path.is_file():
        raise Stop(f"{path}: no such file")
    found, others = {}, 0
    try:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                book = json.loads(line)
                kept = list(paragraphs(book["text"]))
                if sum(p[0] in "\"'" for p in kept) < DIALOGUE * len(kept) or not kept:
                    others += 1
                else:
                    found[book["title"]] = "\n".join(kept)
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as e:
        raise Stop(f"{path} is not a list of books ({type(e).__name__}: {e})") from e
    if not found:
        raise Stop(f"{path} has no book with dialogue in it")
    return found, others


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of prose in a book, each on one line and in ASCII: no headings, lists of contents, verse or Greek."""
    text = text.translate(PLAIN)
    for block in re.split(r"\n\s*\n", text.partition(RULE)[2] or text):
        lines = [line.strip() for line in block.strip().split("\n")]
        prose = " ".join(" ".join(lines).split())
        prose = "".join(c for c in unicodedata.normalize("NFD", prose) if not unicodedata.combining(c))
        verse = len(lines) > 1 and max(map(len, lines)) < VERSE
        sentence = re.search(r"""[.!?]["')]*$|[,:;-]["']*$""", prose) and re.search("[a-z]", prose)
        if prose.isascii() and sentence and not verse and prose[0] != "#":
            yield prose
