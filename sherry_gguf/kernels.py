"""The C kernels of ggml_patch/src on NumPy arrays. No call reads or writes outside its arrays, whatever the arguments."""

import _thread
import contextlib
import functools
import operator
import os
from collections.abc import Callable, Iterable
from queue import SimpleQueue

import numpy as np

from . import tq1_25
from .blocks import NOT_FINITE, OVERFLOW, BlockType
from .errors import QuantizeError

try:
    from ._kernels import ffi, lib
except ImportError as error:
    raise ImportError(f"the C kernels are not compiled ({error}): run scripts/setup.sh, or pip install -e .") from error

Q8_0_BYTES = ffi.sizeof("tq1_25_q8_0")


@functools.cache
def _compiled() -> dict:
    """The table entry of each instruction set that is compiled in, by name, best first."""
    entries, i = {}, 0
    while lib.tq1_25_isas[i].name != ffi.NULL:
        entries[ffi.string(lib.tq1_25_isas[i].name).decode()] = lib.tq1_25_isas[i]
        i += 1
    return entries


def _supported(entry) -> bool:
    return entry.supported == ffi.NULL or _runs_here(entry.supported)


@functools.cache  # asking the CPU takes 20 to 50 us in a virtual machine
def _runs_here(supported) -> bool:
    return bool(supported())


def available() -> list[str]:
    """The instruction sets that are compiled in and that this CPU supports, best first; "scalar" is the last."""
    return [name for name, entry in _compiled().items() if _supported(entry)]


def available_repacked() -> list[str]:
    """The sets in `available()` that have kernels for repacked rows, best first; empty on a CPU with scalar kernels only."""
    return [name for name in available() if _compiled()[name].gemv != ffi.NULL]


def available_panels() -> list[str]:
    """The sets in `available_repacked()` that multiply many columns by panels, best first."""
    return [name for name in available_repacked() if _compiled()[name].gemm != ffi.NULL]


def available_wide() -> list[str]:
    """The sets in `available_repacked()` that multiply many columns by wide tables, best first."""
    return [name for name in available_repacked() if _compiled()[name].wide_rows != ffi.NULL]


def instruction_set(isa: str | None):
    """The table entry of an instruction set, by default of the one that SHERRY_ISA names, else of the best. Raises ValueError."""
    if isa is None:
        isa = os.environ.get("SHERRY_ISA") or next(name for name, entry in _compiled().items() if _supported(entry))
    entry = _compiled().get(isa)
    if entry is None or not _supported(entry):
        why = "no such kernel is compiled in" if entry is None else "this CPU lacks it"
        raise ValueError(f"instruction set {isa}: {why}; it runs {', '.join(available())}")
    return entry


def _floats(x: np.ndarray):
    """A float * to an array or to a contiguous, aligned copy, which it keeps alive."""
    return ffi.from_buffer("float[]", np.require(x, np.float32, ["C", "ALIGNED"]))


def _even(b: np.ndarray) -> np.ndarray:
    """Contiguous bytes at an even address, which the fp16 in blocks need."""
    b = np.ascontiguousarray(b)
    return b.copy() if b.ctypes.data % 2 else b


def _blocks(b: np.ndarray, ctype: str):
    """A pointer to blocks, which keeps them alive."""
    return ffi.from_buffer(f"{ctype}[]", _even(b))


def _function(kind: BlockType, name: str):
    """A block type's C function; `name` has "TYPE" in place of the type's name."""
    return getattr(lib, name.replace("TYPE", kind.name.lower()))


def _check_kind(kind: BlockType) -> None:
    if not isinstance(kind, BlockType):
        raise TypeError(f"kind is {kind!r}: pass a block type, such as sherry_gguf.TQ1_25")


def quantize(x: np.ndarray, importance: np.ndarray | None = None, kind: BlockType = tq1_25.TYPE) -> np.ndarray:
    """Quantize weights, float32 (..., n) with n a multiple of the block size, to blocks, uint8 (..., bytes), as `kind.quantize` does.

    importance: float32 (n,), one per input. Scales and zeros then minimize the squared error weighted by it, as in llama-quantize with an
    importance matrix. Releases the GIL.
    Raises ValueError for another dtype or shape, QuantizeError for weights that no block can hold, TypeError for a `kind` that is not a
    BlockType.
    """
    if isinstance(importance, BlockType):
        raise TypeError(f"importance is the block type {importance.name}: pass it as kind=")
    _check_kind(kind)
    x = np.asarray(x)
    if x.dtype != np.float32:
        raise ValueError(f"weights are {x.dtype}, not float32")
    x = kind.check_weights(x)
    n, ctype = x.shape[-1], f"block_{kind.name.lower()}"
    out = np.empty((*x.shape[:-1], n // kind.size * kind.bytes), np.uint8)
    bad = ffi.new("int64_t *", -1)
    if importance is None:
        status = _function(kind, "TYPE_quantize")(_floats(x), _blocks(out, ctype), x.size, bad)
        if status != lib.TQ1_25_OK:
            raise _error(kind, n, bad[0], status)
        return out
    importance = np.asarray(importance)
    if importance.dtype != np.float32 or importance.shape != (n,):
        raise ValueError(f"importance is {importance.dtype} {importance.shape}, not float32 ({n},)")
    if not (np.isfinite(importance) & (importance >= 0)).all():
        raise ValueError("importance has values that are negative or not finite")
    if not x.size:
        return out
    weights = _floats(importance)
    for i, (row, packed) in enumerate(zip(x.reshape(-1, n), out.reshape(-1, out.shape[-1]))):
        status = _function(kind, "TYPE_quantize_weighted")(_floats(row), weights, _blocks(packed, ctype), n, bad)
        if status != lib.TQ1_25_OK:
            raise _error(kind, n, i * (n // kind.size) + bad[0], status)
    return out


def _error(kind: BlockType, n: int, block: int, status: int) -> QuantizeError:
    causes = {lib.TQ1_25_NOT_FINITE: NOT_FINITE, lib.TQ1_25_OVERFLOW: OVERFLOW}
    return QuantizeError(block // (n // kind.size), causes[status])


def dequantize(b: np.ndarray, kind: BlockType = tq1_25.TYPE) -> np.ndarray:
    """Dequantize blocks, uint8 (..., bytes), to float32 (..., weights), as `kind.dequantize` does.

    Raises ValueError for another dtype or a length that is not a multiple of the block's bytes, TypeError for a `kind` that is not a
    BlockType.
    """
    _check_kind(kind)
    b = kind.check_blocks(b)
    out = np.empty((*b.shape[:-1], b.shape[-1] // kind.bytes * kind.size), np.float32)
    _function(kind, "TYPE_dequantize")(_blocks(b, f"block_{kind.name.lower()}"), _floats(out), out.size)
    return out


def _q8_0_bytes(n: int) -> int:
    return n // lib.TQ1_25_QK8_0 * Q8_0_BYTES


def quantize_q8_0(y: np.ndarray) -> np.ndarray:
    """Quantize activations, float32 (n,) with n a multiple of 32, to Q8_0, uint8 (n / 32 * 34,), with the bytes of ggml's reference.

    Raises ValueError for another dtype or shape.
    """
    y = np.asarray(y)
    if y.dtype != np.float32 or y.ndim != 1 or y.size % lib.TQ1_25_QK8_0:
        raise ValueError(f"activations are {y.dtype} {y.shape}, not float32 (n,), n a multiple of {lib.TQ1_25_QK8_0}")
    out = np.empty(_q8_0_bytes(y.size), np.uint8)
    lib.tq1_25_quantize_q8_0(_floats(y), _blocks(out, "tq1_25_q8_0"), y.size)
    return out


def vec_dot_q8_0(b_row: np.ndarray, q8_0: np.ndarray, isa: str | None = None, kind: BlockType = tq1_25.TYPE) -> float:
    """The dot product of a packed row, uint8 (bytes,), with Q8_0 activations, uint8 (weights / 32 * 34,).

    isa: an instruction set in `available()`; by default the one that SHERRY_ISA names, else the best.
    Raises ValueError for a missing set or another dtype, shape or length.
    """
    entry = instruction_set(isa)
    b_row, q8_0 = kind.check_row(b_row), np.asarray(q8_0)
    n = b_row.size // kind.bytes * kind.size
    if q8_0.dtype != np.uint8 or q8_0.shape != (_q8_0_bytes(n),):
        need = f"the row of {n} weights needs uint8 ({_q8_0_bytes(n)},)"
        raise ValueError(f"Q8_0 activations are {q8_0.dtype} {q8_0.shape}, {need}")
    out = ffi.new("float *")
    entry.vec_dot[_kind(kind)](n, out, _blocks(b_row, "uint8_t"), _blocks(q8_0, "tq1_25_q8_0"))
    return float(out[0])


def vec_dot(b_row: np.ndarray, y: np.ndarray, isa: str | None = None, kind: BlockType = tq1_25.TYPE) -> float:
    """The dot product of a packed row, uint8 (bytes,), with activations, float32 (weights,), as `kind.vec_dot` computes it.

    isa: an instruction set in `available()`; by default the one that SHERRY_ISA names, else the best.
    Raises ValueError for a missing set or another dtype, shape or length.
    """
    b_row = kind.check_blocks(b_row)
    y = kind.check_activations(b_row, y)
    return vec_dot_q8_0(b_row, quantize_q8_0(y), isa, kind)


# ---- repacked rows ----


def _kind(kind: BlockType) -> int:
    return getattr(lib, f"KIND_{kind.name}")


def order(y: np.ndarray) -> np.ndarray:
    """Put activations, float32 (n,) with n a multiple of 256, into the order of STQ1_0's groups, as its repacked rows need them."""
    y = np.asarray(y)
    if y.dtype != np.float32 or y.ndim != 1 or y.size % lib.QK_STQ1_0:
        raise ValueError(f"activations are {y.dtype} {y.shape}, not float32 (n,), n a multiple of {lib.QK_STQ1_0}")
    out = np.empty(y.size, np.float32)
    lib.stq1_0_order(_floats(y), _floats(out), y.size)
    return out


def repack(b: np.ndarray, kind: BlockType = tq1_25.TYPE) -> np.ndarray:
    """Interleave packed rows, uint8 (rows, nb), into uint8 (rows * nb,), as llama.cpp does when it loads a model.

    Every 64 rows become tiles; leftover rows stay as they are (tile.h).
    Raises ValueError for another dtype or shape, or a length that is not a multiple of the block's bytes.
    """
    b = kind.check_blocks(b)
    if b.ndim != 2:
        raise ValueError(f"packed rows have shape {b.shape}, not (rows, bytes of a row)")
    out = np.empty(b.size, np.uint8)
    n = b.shape[1] // kind.bytes * kind.size
    lib.tq1_25_repack(_kind(kind), b.shape[0], n, _blocks(b, "uint8_t"), ffi.from_buffer(out))
    return out


def check_repacked(repacked: np.ndarray, rows: int, n: int, kind: BlockType) -> tuple[np.ndarray, int, int]:
    """A repacked matrix as an array of its bytes, its number of rows and of weights in a row. Raises ValueError unless they fit."""
    repacked, rows, n = np.asarray(repacked), operator.index(rows), operator.index(n)  # NumPy's integers overflow
    if n <= 0 or n % kind.size or rows < 0:
        raise ValueError(f"{rows} rows of {n} weights: rows are not whole blocks of {kind.size}, at least one")
    size = rows * (n // kind.size) * kind.bytes
    if repacked.dtype != np.uint8 or repacked.shape != (size,):
        need = f"{rows} rows of {n} weights need uint8 ({size},)"
        raise ValueError(f"repacked rows are {repacked.dtype} {repacked.shape}, {need}")
    return repacked, rows, n


class _Product:
    """The checked arguments of a product of repacked rows, as C takes them, and its result, `out`. Raises ValueError."""

    def __init__(self, repacked: np.ndarray, rows: int, n: int, q8_0: np.ndarray, isa: str | None, pieces: int, kind: BlockType):
        entry = instruction_set(isa)
        if entry.gemv == ffi.NULL:
            raise _lacking(entry, "kernels for repacked rows", available_repacked())
        repacked, rows, n = check_repacked(repacked, rows, n, kind)
        q8_0, pieces = np.asarray(q8_0), operator.index(pieces)
        width = _q8_0_bytes(n)
        if q8_0.dtype != np.uint8 or q8_0.ndim != 2 or q8_0.shape[1] != width:
            need = f"rows of {n} weights need uint8 (columns, {width})"
            raise ValueError(f"Q8_0 activations are {q8_0.dtype} {q8_0.shape}, {need}")
        if pieces < 1:
            raise ValueError(f"{pieces} pieces: at least 1 is needed")
        self.isa, self.kind, self.rows, self.n, self.columns, self.pieces = ffi.addressof(entry), _kind(kind), rows, n, len(q8_0), pieces
        self.x, self._q8_0, self.out = _blocks(repacked, "uint8_t"), _even(q8_0), np.empty((len(q8_0), rows), np.float32)
        self.y, self.s = _pointers("const tq1_25_q8_0 *", self._q8_0), _pointers("float *", self.out)

    def ranges(self, count: int) -> list[tuple[int, int]]:
        """0 .. count in `pieces` ranges, last first, since none may rely on an earlier one."""
        cuts = [count * i // self.pieces for i in range(self.pieces + 1)]
        return list(zip(cuts, cuts[1:]))[::-1]

    def tiles(self) -> list[tuple[int, int]]:
        """The ranges of the tile rows."""
        return self.ranges(-(-self.rows // lib.TQ1_25_TILE))


def _lacking(entry, what: str, others: list[str]) -> ValueError:
    name = ffi.string(entry.name).decode()
    return ValueError(f"instruction set {name} has no {what}; those that this CPU runs: {', '.join(others) or 'none'}")


def aligned(size: int) -> np.ndarray:
    """`size` bytes at an address that is a multiple of 64."""
    out = np.empty(size + 64, np.uint8)
    skip = -out.ctypes.data % 64
    return out[skip : skip + size]


def _scratch(way: str):
    """Memory for one thread that multiplies by "code", "wide" or "panel"."""
    ctype = f"struct tq1_25_{way}_scratch"
    return ffi.from_buffer(f"{ctype} *", aligned(ffi.sizeof(ctype)))


def _pointers(ctype: str, arrays: np.ndarray):
    """Pointers to the rows of a contiguous array, which the caller keeps alive. Blocks need an even address."""
    return ffi.from_buffer(f"{ctype}[]", arrays.ctypes.data + np.arange(len(arrays), dtype=np.uintp) * np.uintp(arrays.strides[0]))


def share(items: Iterable[tuple], worker: Callable[[], Callable], threads: int) -> None:
    """Calls f(*item) for every item on up to `threads` threads, each with an f of its own, worker(). Raises what an f raises.

    The calling thread is one of them and waits for no other to begin: on a busy machine that takes longer than the work. A thread that
    begins late finds nothing to do and ends. After an error, and after Ctrl-C, no further item begins. In any case no f runs any more when
    this ends, since they write to memory of the caller.
    """
    items = list(items)
    queue = iter(items)  # threads take turns: C runs without the GIL, next() with it
    if (helpers := min(threads, len(items)) - 1) <= 0:
        f = worker()
        for item in queue:
            f(*item)
        return
    done: list[BaseException | None] = []  # an entry for each item, also for those that never begin
    full: SimpleQueue[None] = SimpleQueue()

    def stop() -> None:
        for _ in queue:
            done.append(None)

    def work() -> None:
        f = None
        for item in queue:
            error = None
            try:
                f = f or worker()
                f(*item)
            except BaseException as e:
                error = e
                stop()
            done.append(error)
            if len(done) == len(items):
                full.put(None)

    def finish() -> None:
        while len(done) < len(items):
            full.get()

    with contextlib.suppress(RuntimeError):  # the system allows no more threads
        for _ in range(helpers):
            _thread.start_new_thread(work, ())  # threading.Thread.start would wait until it runs
    try:
        work()
        finish()
    except BaseException:
        while True:
            with contextlib.suppress(BaseException):  # a second Ctrl-C
                stop()
                finish()
                break
        raise
    for error in filter(None, done):
        raise error


def mul_tables(
    repacked: np.ndarray,
    rows: int,
    n: int,
    q8_0: np.ndarray,
    isa: str | None = None,
    pieces: int = 1,
    kind: BlockType = tq1_25.TYPE,
    threads: int = 1,
) -> np.ndarray:
    """Multiply repacked rows, uint8 (bytes,) from `repack`, by Q8_0 activations, uint8 (columns, n / 32 * 34), with tables.

    Returns float32 (columns, rows). STQ1_0 needs activations that were put into its `order` before they were quantized.
    isa: an instruction set in `available_repacked()`; by default the one that SHERRY_ISA names, else the best.
    pieces: how many pieces to cut tables and tile rows into; the result is bit-identical.
    threads: how many threads share the pieces. They run without the GIL.
    Raises ValueError for a missing set or another dtype, shape or length.
    """
    p = _Product(repacked, rows, n, q8_0, isa, pieces, kind)
    size = lib.tq1_25_table_size(p.isa, p.n)
    tables = aligned(p.columns * size).reshape(p.columns, size)
    to_tables = _pointers("void *", tables)

    def make(begin: int, end: int, c: int) -> None:
        lib.tq1_25_make_table(p.isa, p.n, begin * lib.TQ1_25_QK8_0, end * lib.TQ1_25_QK8_0, p.y[c], to_tables[c])

    def multiply(begin: int, end: int) -> None:
        lib.tq1_25_mul_tables(p.isa, p.kind, p.rows, p.n, p.x, begin, end, p.columns, p.y, to_tables, p.s)

    share([(*of, c) for of in p.ranges(p.n // lib.TQ1_25_QK8_0) for c in range(p.columns)], lambda: make, threads)
    share(p.tiles(), lambda: multiply, threads)
    return p.out


def mul_codes(
    repacked: np.ndarray,
    rows: int,
    n: int,
    q8_0: np.ndarray,
    isa: str | None = None,
    pieces: int = 1,
    kind: BlockType = tq1_25.TYPE,
    threads: int = 1,
) -> np.ndarray:
    """`mul_tables` with codes, spread once for a group of columns: faster for several columns.

    pieces: how many pieces to cut the tile rows into.
    """
    p = _Product(repacked, rows, n, q8_0, isa, pieces, kind)
    groups = lib.tq1_25_code_groups(p.columns)
    cuts = [lib.tq1_25_first_of_group(p.columns, groups, group) for group in range(groups + 1)] if groups else []

    def worker() -> Callable:
        scratch = _scratch("code")
        return lambda first, last, begin, end: lib.tq1_25_mul_codes(
            p.isa, p.kind, p.rows, p.n, p.x, begin, end, last - first, p.y + first, p.s + first, scratch
        )

    share([(*of, *tiles) for of in zip(cuts, cuts[1:]) for tiles in p.tiles()], worker, threads)
    return p.out


def mul_wide(
    repacked: np.ndarray,
    rows: int,
    n: int,
    q8_0: np.ndarray,
    isa: str | None = None,
    pieces: int = 1,
    kind: BlockType = tq1_25.TYPE,
    threads: int = 1,
) -> np.ndarray:
    """`mul_tables` with tables of up to 32 columns at a time, for instruction sets in `available_wide()`.

    As in llama.cpp, a few columns left over by the others go by codes.
    pieces: how many pieces to cut the tile rows into.
    """
    p = _Product(repacked, rows, n, q8_0, isa, pieces, kind)
    if p.isa.wide_rows == ffi.NULL:
        raise _lacking(p.isa, "wide tables", available_wide())
    cuts = [lib.tq1_25_first_of_wide(p.columns, group) for group in range(lib.tq1_25_wide_groups(p.columns) + 1)]

    def worker() -> Callable:
        wide, codes = _scratch("wide"), _scratch("code")

        def multiply(first: int, last: int, begin: int, end: int) -> None:
            few = last - first <= p.isa.max_codes < p.columns
            function, scratch = (lib.tq1_25_mul_codes, codes) if few else (lib.tq1_25_mul_wide, wide)
            function(p.isa, p.kind, p.rows, p.n, p.x, begin, end, last - first, p.y + first, p.s + first, scratch)

        return multiply

    share([(*of, *tiles) for of in zip(cuts, cuts[1:]) for tiles in p.tiles()], worker, threads)
    return p.out


def mul_panels(
    repacked: np.ndarray,
    rows: int,
    n: int,
    q8_0: np.ndarray,
    isa: str | None = None,
    pieces: int = 1,
    kind: BlockType = tq1_25.TYPE,
    threads: int = 1,
) -> np.ndarray:
    """`mul_tables` with decoded weights and panels of columns, for instruction sets in `available_panels()`.

    pieces: how many pieces to cut each panel, the tile rows and the list of panels into.
    """
    p = _Product(repacked, rows, n, q8_0, isa, pieces, kind)
    if p.isa.gemm == ffi.NULL:
        raise _lacking(p.isa, "panels", available_panels())
    panels = ffi.from_buffer("uint8_t[]", aligned(lib.tq1_25_panel_size(p.n, p.columns)))
    count = lib.tq1_25_panels(p.columns)
    cuts = [lib.tq1_25_first_column(p.columns, panel) for panel in range(count + 1)] if count else []

    def make(first: int, last: int, begin: int, end: int) -> None:
        out = panels + lib.tq1_25_panel_size(p.n, first)
        lib.tq1_25_make_panel(begin * lib.TQ1_25_QK8_0, end * lib.TQ1_25_QK8_0, last - first, p.y + first, out)

    def worker() -> Callable:
        scratch = _scratch("panel")
        return lambda begin, end, first, last: lib.tq1_25_mul_panels(
            p.isa, p.kind, p.rows, p.n, p.x, begin, end, p.columns, first, last, panels, p.s, scratch
        )

    share([(*of, *blocks) for of in zip(cuts, cuts[1:]) for blocks in p.ranges(p.n // lib.TQ1_25_QK8_0)], lambda: make, threads)
    share([(*tiles, *of) for tiles in p.tiles() for of in p.ranges(count)], worker, threads)
    return p.out
