"""Writes GGUF files, and reads their tensors as float32 arrays."""

import numpy as np

from sherry_gguf import gguf_file, gguf_type

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType
RNG = np.random.default_rng(0)


def load(path):
    """name: (type, float32 array) of all tensors of a file."""
    model = gguf_file.read_gguf(path)
    return {name: (t.type.name, gguf.quants.dequantize(t.read(), t.type).reshape(t.shape)) for name, t in model.tensors.items()}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, but for the sign of zeros."""
    return a.shape == b.shape and (a + 0.0).tobytes() == (b + 0.0).tobytes()


def ternary(kind, rows, n, same=False):
    """Weights that `kind` holds; with `same`, neighbouring blocks of 128 share a scale."""
    x = kind.dequantize(kind.quantize(RNG.standard_normal((rows, n)).astype(np.float32)))
    if same:
        x = np.sign(x) * np.repeat(np.abs(x).max(axis=1, keepdims=True), n, axis=1)
    return x.astype(np.float32)


def write(path, tensors, file_type=125, alignment=None):
    """tensors: name to (type, values)."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "ternäry")
    writer.add_file_type(file_type)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ж"])
    writer.add_array("x.numbers", [1, 2, 3])
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, (qtype, x) in tensors.items():
        if qtype == Q.F32:
            writer.add_tensor(name, x)
        elif qtype == Q.F16:
            writer.add_tensor(name, x.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
