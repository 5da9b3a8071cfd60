"""Golden TQ1_25 and TQ1_25_64 vectors, made from the format's text by a program that shares no code with this one."""

import json
from pathlib import Path

import numpy as np


def floats(words: list[str]) -> np.ndarray:
    """Little-endian float32 in hex to an array."""
    return np.frombuffer(bytes.fromhex("".join(words)), "<f4").astype(np.float32)


def packed(*blocks: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(blocks)), np.uint8)


class Vectors:
    """The vectors of one type.

    Attributes:
        blocks: name -> (weights float32 (size,), block uint8 (bytes,), lanes (size,), d).
        dots: [(packed row uint8, activations float32, Q8_0 blocks [(d, int8 (32,))], dot product)].
    """

    def __init__(self, name: str):
        vectors = json.loads((Path(__file__).parent / f"{name.lower()}.json").read_text())
        assert vectors["format"] == name
        self.blocks = {b["name"]: (floats(b["x"]), packed(b["block"]), b["codes"], b["d"]) for b in vectors["blocks"]}
        self.dots = [(packed(*d["blocks"]), floats(d["y"]), [(q["d"], q["qs"]) for q in d["q8_0"]], d["result"]) for d in vectors["dots"]]


VECTORS = {name: Vectors(name) for name in ("TQ1_25", "TQ1_25_64")}
ALL_BLOCKS = [(kind, name) for kind, vectors in VECTORS.items() for name in vectors.blocks]
ALL_DOTS = [(kind, i) for kind, vectors in VECTORS.items() for i in range(len(vectors.dots))]
BLOCKS, DOTS = VECTORS["TQ1_25"].blocks, VECTORS["TQ1_25"].dots
EXACT = {"zeros", "sherry-exact", "sherry-exact-neg-zero", "all-32-codes", "all-32-codes-0", "all-32-codes-1", "large"}
