"""What the built ggml computes with, as llama.cpp sees it: the types' conversions and the CPU backend's dot products."""

import numpy as np

from sherry_gguf.llama_cpp import Ggml, library

_CDEF = """
struct ggml_type_traits_cpu {
    void (*from_float)(const float *, void *, int64_t);
    void (*vec_dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
    int vec_dot_type;
    int64_t nrows;
};
const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(int);
void ggml_cpu_init(void);
"""


class CpuGgml(Ggml):
    """The built libggml-base and libggml-cpu through their C interface."""

    def __init__(self):
        super().__init__()
        self._ffi.cdef(_CDEF)
        self._cpu = self._ffi.dlopen(str(library("ggml-cpu")))
        self._cpu.ggml_cpu_init()

    def vec_dot_type(self, name: str) -> str:
        """The type that the activations of a dot product are quantized to."""
        wanted = self._cpu.ggml_get_type_traits_cpu(self.type_id(name)).vec_dot_type
        return next(other for other, type_id in self.types.items() if type_id == wanted)

    def dequantize(self, name: str, b: np.ndarray) -> np.ndarray:
        """The type's `to_float`: uint8 (rows, bytes) to float32 (rows, n)."""
        b = self._array(b, np.uint8, 2)
        weights, size = self.block(name)
        if b.shape[1] % size:
            raise ValueError(f"rows of {b.shape[1]} bytes are not a multiple of {size}, the block of {name}")
        out = np.empty((b.shape[0], b.shape[1] // size * weights), np.float32)
        to_float = self._function(name, "to_float", self._traits(name).to_float)
        to_float(self._pointer(b, "const void *"), self._pointer(out, "float *"), out.size)
        return out

    def from_float(self, name: str, x: np.ndarray) -> np.ndarray:
        """The CPU backend's `from_float`, for activations: float32 (n,) to uint8 (bytes,)."""
        x = self._array(x, np.float32, 1)
        out = np.empty(self.row_size(name, x.size), np.uint8)
        from_float = self._function(name, "from_float", self._cpu.ggml_get_type_traits_cpu(self.type_id(name)).from_float)
        from_float(self._pointer(x, "const float *"), self._pointer(out, "void *"), x.size)
        return out

    def vec_dot(self, name: str, b_row: np.ndarray, y: np.ndarray) -> float:
        """The CPU backend's `vec_dot`: a packed row, uint8 (bytes,), and its packed activations, uint8 (bytes,)."""
        b_row, y = self._array(b_row, np.uint8, 1), self._array(y, np.uint8, 1)
        weights, size = self.block(name)
        n = b_row.size // size * weights
        if b_row.size % size or y.size != self.row_size(self.vec_dot_type(name), n):
            raise ValueError(f"a row of {b_row.size} bytes of {name} and {y.size} bytes of {self.vec_dot_type(name)}")
        out = np.empty(1, np.float32)
        vec_dot = self._function(name, "vec_dot", self._cpu.ggml_get_type_traits_cpu(self.type_id(name)).vec_dot)
        vec_dot(n, self._pointer(out, "float *"), 0, self._pointer(b_row, "void *"), 0, self._pointer(y, "void *"), 0, 1)
        return float(out[0])

    def _function(self, name: str, what: str, pointer):
        if pointer == self._ffi.NULL:
            raise ValueError(f"{name} has no {what}")
        return pointer
