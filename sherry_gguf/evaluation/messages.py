"""One-line messages on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(f"evaluate: {text}", file=sys.stderr)


def first_line(e: BaseException) -> str:
    """The first line of a foreign exception's message, or its type's name."""
    text = str(e).strip()
    return text.splitlines()[0] if text else type(e).__name__
