"""ggml's operations on a Vulkan device, from NumPy arrays and back.

`start` opens the device and `compute` runs one operation. Both run in a process of their own (`worker`), which keeps the driver's threads
and ggml's aborts away from pytest; the device reads its environment variables once.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

F32, F16, I32 = 0, 1, 26
_DTYPES = {F32: np.float32, F16: np.float16, I32: np.int32}
_PRECISE = 10  # GGML_PREC_F32
_GUARD = 1024  # floats after the result, which nobody may write

_CDEF = """
void ggml_mul_mat_set_prec(void * tensor, int prec);
void * ggml_cont(void * ctx, void * a);
void * ggml_permute(void * ctx, void * a, int axis0, int axis1, int axis2, int axis3);
void * ggml_backend_vk_init(size_t device);
int ggml_backend_vk_get_device_count(void);
void * ggml_backend_get_device(void * backend);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
"""


@dataclass
class Operand:
    """A source of an operation.

    Attributes:
        type_id: ggml's number of its type.
        values: its bytes or numbers, outermost axis first.
        ne: weights or numbers along each axis, innermost first.
        view: (ne, nb1, nb2, nb3, offset) of the part to use, strides and offset in bytes; None: all.
        permute: ggml_permute's four axes; None: in order.
    """

    type_id: int
    values: np.ndarray
    ne: tuple[int, ...]
    view: tuple | None = None
    permute: tuple[int, ...] | None = None


def numbers(values: np.ndarray, **kwargs) -> Operand:
    """An operand of float32, float16 or int32 numbers."""
    type_id = next(key for key, dtype in _DTYPES.items() if values.dtype == dtype)
    return Operand(type_id, values, values.shape[::-1], **kwargs)


@dataclass
class _Device:
    ffi: object = None
    base: object = None
    backend: object = None
    libraries: list = field(default_factory=list)  # kept open


_device = _Device()


def start(build: Path, env: dict[str, str]) -> None:
    """Open the first device that the built libggml-vulkan has."""
    import cffi
    from test_ops import CDEF

    os.environ.update(env)
    ffi = cffi.FFI()
    ffi.cdef(CDEF + _CDEF)
    base, vulkan = (ffi.dlopen(str(build / "lib" / f"libggml-{name}.so")) for name in ("base", "vulkan"))
    assert vulkan.ggml_backend_vk_get_device_count(), "no device"
    _device.__init__(ffi, base, vulkan.ggml_backend_vk_init(0), [vulkan])


def compute(op: str, *sources: Operand, to: int | None = None, precise: bool = False) -> np.ndarray | None:
    """The bytes of the result of `ggml_OP`, uint8 (n,); None if the device does not support it.

    to: the type that a copy has. precise: ask for sums in float32.
    """
    ffi, base = _device.ffi, _device.base
    ctx = base.ggml_init((1 << 20, ffi.NULL, True))
    tensors, operands = [], []
    for source in sources:
        tensors.append(tensor := base.ggml_new_tensor(ctx, source.type_id, len(source.ne), source.ne))
        if source.view:
            ne, *strides = source.view
            tensor = base.ggml_view_4d(ctx, tensor, *ne, *[1] * (4 - len(ne)), *strides)
        operands.append(base.ggml_permute(ctx, tensor, *source.permute) if source.permute else tensor)
    if op == "cpy":
        ne = sources[0].view[0] if sources[0].view else sources[0].ne
        ne = [*ne, *[1] * (4 - len(ne))]
        if permute := sources[0].permute:
            ne = [ne[permute.index(axis)] for axis in range(4)]
        operands.append(base.ggml_new_tensor(ctx, to, 4, ne))
    result = getattr(base, f"ggml_{op}")(ctx, *operands)
    if precise:
        base.ggml_mul_mat_set_prec(result, _PRECISE)
    guard = base.ggml_new_tensor(ctx, F32, 1, [_GUARD])
    buffer = base.ggml_backend_alloc_ctx_tensors(ctx, _device.backend)
    try:
        if not base.ggml_backend_dev_supports_op(base.ggml_backend_get_device(_device.backend), result):
            return None
        for source, tensor in zip(sources, tensors):
            _write(tensor, np.ascontiguousarray(source.values))
        for tensor in result, guard:
            _write(tensor, np.full(base.ggml_nbytes(tensor), 0xFF, np.uint8))  # NaN
        graph = base.ggml_new_graph(ctx)
        base.ggml_build_forward_expand(graph, result)
        assert base.ggml_backend_graph_compute(_device.backend, graph) == 0
        after = _read(guard)
        assert (after == 0xFF).all(), f"{op} writes beyond its result, byte {(after != 0xFF).argmax()} after it"
        return _read(result)
    finally:
        base.ggml_backend_buffer_free(buffer)
        base.ggml_free(ctx)


def _write(tensor, values: np.ndarray) -> None:
    assert values.nbytes == _device.base.ggml_nbytes(tensor), (values.shape, values.dtype)
    _device.base.ggml_backend_tensor_set(tensor, _device.ffi.from_buffer(values), 0, values.nbytes)


def _read(tensor) -> np.ndarray:
    out = np.empty(_device.base.ggml_nbytes(tensor), np.uint8)
    _device.base.ggml_backend_tensor_get(tensor, _device.ffi.from_buffer(out), 0, out.nbytes)
    return out


def worker(build: Path, env: dict[str, str]) -> ProcessPoolExecutor:
    """A process that has opened the device with these environment variables: `worker(...).submit(compute, ...)`."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (build, env))
