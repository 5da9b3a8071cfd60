"""Tensors of GGUF files as float32 arrays."""

import numpy as np

from sherry_gguf import gguf_file, gguf_type

gguf = gguf_type.register()


def load(path):
    """name: (type, float32 array) of all tensors of a file."""
    model = gguf_file.read_gguf(path)
    return {name: (t.type.name, gguf.quants.dequantize(t.read(), t.type).reshape(t.shape)) for name, t in model.tensors.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, but for the sign of zeros."""
    return a.shape == b.shape and (a + 0.0).tobytes() == (b + 0.0).tobytes()
