"""Names of tensors and layers: lists with many as one, and regular expressions that match them."""

import re
from collections.abc import Iterable


def star(name: str) -> str:
    """ "blk.7.attn_q.weight" to "blk.*.attn_q.weight"."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def starred(names: Iterable[str]) -> str:
    """List names, with those that differ only in the block's number as one: "blk.*.attn_q.weight (30 blocks), output.weight"."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(star(name), []).append(name)
    return ", ".join(f"{name} ({len(found)} blocks)" if len(found) > 1 else found[0] for name, found in alike.items())


def matching(names: Iterable[str], but: Iterable[str]) -> str:
    """A short regular expression that re.search finds in each of `names` and in none of `but`."""
    names, but = list(dict.fromkeys(names)), list(but)

    def last(name: str) -> str:
        parts = name.split(".")
        return parts[-2] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts[-1]

    def joined(parts: Iterable[str]) -> str:
        parts = list(dict.fromkeys(parts))
        return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"

    candidates = (
        joined(re.escape(last(name)) for name in names),
        rf"\b{joined(re.escape(last(name)) for name in names)}\b",
        joined(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names),
    )
    for pattern in candidates:
        if all(re.search(pattern, name) for name in names) and not any(re.search(pattern, name) for name in but):
            return pattern
    return f"^{joined(map(re.escape, names))}$"
