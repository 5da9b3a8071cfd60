"""The built llama.cpp: its directory, tools and libraries."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import cffi
import numpy as np

from . import gguf_type
from .errors import NotBuilt

_PACKAGE = Path(__file__).resolve().parent
INCLUDED = _PACKAGE / "_llama"  # in a wheel with the tools: bin, which holds the libraries too, and a part of llama.cpp's source


def root() -> Path:
    """The build directory: SHERRY_BUILD_DIR, or what came with the wheel, or `build` beside the package's source."""
    if own := os.environ.get("SHERRY_BUILD_DIR"):
        return Path(own).resolve()
    return INCLUDED if INCLUDED.is_dir() else _PACKAGE.parent / "build"


def _existing(path: Path) -> Path:
    if not path.exists():
        if INCLUDED in path.parents:
            how = "the installed package lacks it. Install it again, or set SHERRY_BUILD_DIR to a build directory"
        elif (_PACKAGE.parent / "scripts" / "build_llama_cpp.py").is_file() or os.environ.get("SHERRY_BUILD_DIR"):
            how = "run scripts/build_llama_cpp.py, or set SHERRY_BUILD_DIR to its build directory"
        else:
            how = "this installation has no llama.cpp. Install a wheel that has it, or set SHERRY_BUILD_DIR to a build directory"
        raise NotBuilt(f"{path} is not there: {how}")
    return path


def source_dir() -> Path:
    """The patched source tree. Raises NotBuilt."""
    _existing(root() / "llama.cpp" / "conversion" / "base.py")
    return root() / "llama.cpp"


def tool(name: str) -> Path:
    """The path of a built tool, such as "llama-cli". Raises NotBuilt."""
    return _existing(root() / "bin" / (name + ".exe" * (sys.platform == "win32")))


def library(name: str) -> Path:
    """The path of a built shared library, such as "ggml-base". Raises NotBuilt."""
    if sys.platform == "win32":
        return _existing(root() / "bin" / f"{name}.dll")
    folder = root() / ("bin" if root() == INCLUDED else "lib")
    return _existing(folder / f"lib{name}.{'dylib' if sys.platform == 'darwin' else 'so'}")


def run(name: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    """Run a built tool and wait for it; `kwargs` go to `subprocess.run`. Raises NotBuilt."""
    return subprocess.run([str(tool(name)), *map(str, args)], **kwargs)


# ---- the built ggml, as llama.cpp's tools see it ----

_CDEF = """
struct ggml_type_traits {
    const char * type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void *, float *, int64_t);
    void (*from_float_ref)(const float *, void *, int64_t);
};
const struct ggml_type_traits * ggml_get_type_traits(int);
size_t ggml_row_size(int, int64_t);
bool ggml_quantize_requires_imatrix(int);
size_t ggml_quantize_chunk(int, const float *, void *, int64_t, int64_t, int64_t, const float *);
bool ggml_validate_row_data(int, const void *, size_t);
"""


class Ggml:
    """The built libggml-base through its C interface. Raises NotBuilt."""

    def __init__(self) -> None:
        self._ffi = cffi.FFI()
        self._ffi.cdef(_CDEF)
        self._base = self._ffi.dlopen(str(library("ggml-base")))
        self.types: dict[str, int] = {}  # name in capitals to id
        last = max(kind.type_id for kind in gguf_type.TYPES.values())
        for type_id in range(last + 1):  # unused ids have no name, removed types no block size
            traits = self._base.ggml_get_type_traits(type_id)
            if traits.type_name != self._ffi.NULL and traits.blck_size:
                self.types[self._ffi.string(traits.type_name).decode().upper()] = type_id

    def type_id(self, name: str) -> int:
        """The id of a type, by its name in any case. Raises ValueError, which lists the names."""
        if name.upper() not in self.types:
            raise ValueError(f"{name} is not a type of the built ggml, which has {', '.join(self.types)}")
        return self.types[name.upper()]

    def block(self, name: str) -> tuple[int, int]:
        """Weights and bytes per block."""
        return self._traits(name).blck_size, self._traits(name).type_size

    def row_size(self, name: str, n: int) -> int:
        """Bytes of a row of n weights. Raises ValueError if n is not a multiple of the block size."""
        weights, _ = self.block(name)
        if n <= 0 or n % weights:
            raise ValueError(f"rows of {n} weights are not a multiple of {weights}, the block of {name}")
        return self._base.ggml_row_size(self.type_id(name), n)

    def quantize(self, name: str, x: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        """`ggml_quantize_chunk`: float32 (rows, n) to uint8 (rows, bytes of a row).

        imatrix: float32 (n,), the importance of each input. Raises ValueError for another dtype or shape, for a missing
        imatrix if the type needs one, and for weights that give an invalid row (NaN, infinite or too large).
        """
        type_id = self.type_id(name)
        floats, activations = ("F32", "F16", "BF16"), ("Q8_1", "Q8_K")
        if name.upper() in activations or not (name.upper() in floats or self._traits(name).is_quantized):
            raise ValueError(f"weights cannot be quantized to {name}")
        x = self._array(x, np.float32, 2)
        rows, n = x.shape
        out = np.empty((rows, self.row_size(name, n)), np.uint8)
        if imatrix is not None:
            imatrix = self._array(imatrix, np.float32, 1)
            if imatrix.shape != (n,):
                raise ValueError(f"imatrix of shape {imatrix.shape}, rows have {n} weights")
        elif self._base.ggml_quantize_requires_imatrix(type_id):
            raise ValueError(f"quantizing to {name} needs an importance matrix")
        importance = self._ffi.NULL if imatrix is None else self._pointer(imatrix, "const float *")
        self._base.ggml_quantize_chunk(type_id, self._pointer(x, "const float *"), self._pointer(out, "void *"), 0, rows, n, importance)
        if not self.valid(name, out):
            raise ValueError(f"weights that are NaN, infinite or too large for {name}")
        return out

    def valid(self, name: str, b: np.ndarray) -> bool:
        """`ggml_validate_row_data`, the check behind --check-tensors, of uint8 (rows, bytes); ggml prints errors to stderr."""
        b = self._array(b, np.uint8, 2)
        return self._base.ggml_validate_row_data(self.type_id(name), self._pointer(b, "const void *"), b.nbytes)

    def _traits(self, name: str):
        return self._base.ggml_get_type_traits(self.type_id(name))

    @staticmethod
    def _array(a: np.ndarray, dtype: type, ndim: int) -> np.ndarray:
        a = np.asarray(a)
        if a.dtype != dtype or a.ndim != ndim:
            raise ValueError(f"an array of {a.dtype} {a.shape}, not {np.dtype(dtype)} with {ndim} axes")
        a = np.require(a, requirements=["C", "ALIGNED"])
        return a.copy() if a.ctypes.data % 8 else a  # blocks hold fp16 and float

    def _pointer(self, a: np.ndarray, ctype: str):
        return self._ffi.cast(ctype, a.ctypes.data)


@functools.cache
def ggml() -> Ggml:
    """The built ggml, opened once. Raises NotBuilt."""
    return Ggml()
