"""Golden TQ1_25 vectors, made from the format's text by a program that shares no code with this one."""

import json
from pathlib import Path

import numpy as np

_VECTORS = json.loads((Path(__file__).parent / "tq1_25.json").read_text())


def floats(words: list[str]) -> np.ndarray:
    """Little-endian float32 in hex to an array."""
    return np.frombuffer(bytes.fromhex("".join(words)), "<f4").astype(np.float32)


def packed(*blocks: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(blocks)), np.uint8)


# name -> (weights float32 (128,), block uint8 (22,), lanes (128,), d)
BLOCKS = {b["name"]: (floats(b["x"]), packed(b["block"]), b["codes"], b["d"]) for b in _VECTORS["blocks"]}
# (packed row uint8, activations float32, Q8_0 blocks [(d, int8 (32,))], dot product)
DOTS = [(packed(*d["blocks"]), floats(d["y"]), [(q["d"], q["qs"]) for q in d["q8_0"]], d["result"]) for d in _VECTORS["dots"]]
EXACT = {"zeros", "sherry-exact", "sherry-exact-neg-zero", "all-32-codes", "large"}
