"""Repacked matrices: their weights as floats against NumPy's reference, and products on several threads."""

import signal
import threading
import time

import numpy as np
import pytest
from repacked_rows import ISAS, KINDS, Guarded, halves, random_rows

from sherry_gguf import kernels, repacked, stq1_0, ternary, tq1_25
from sherry_gguf.repacked import Matrix

ffi, lib = kernels.ffi, kernels.lib
ALL_KINDS = [*KINDS, stq1_0.TYPE]
each_kind = pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
HEIGHTS = [0, 1, 63, 64, 65, 130, 200]


def random_bytes(rows, width, kind):
    """Rows of `width` blocks of any bytes, so that some scales are not finite, negative or subnormal."""
    return np.random.default_rng(rows).integers(0, 256, (rows, width * kind.bytes), dtype=np.uint8)


# ---- weights ----


@each_kind
@pytest.mark.parametrize("rows", HEIGHTS)
def test_decode_equals_the_reference(rows, kind):
    for width in 1, 2, 5:
        b = random_bytes(rows, width, kind)
        matrix, expected = Matrix.from_blocks(b, kind), kind.dequantize(b)
        assert np.array_equal(matrix.decode(), expected, equal_nan=True)
        for begin, end in [(0, rows), (rows // 2, rows), (0, rows // 3), (min(62, rows), min(66, rows)), (rows, rows)]:
            for first, last in [(0, width), (width // 2, width), (0, 1), (width - 1, width), (1, 1)]:
                part = expected[begin:end, first * kind.size : last * kind.size]
                for threads in 1, 3:
                    found = matrix.decode(begin, end, first * kind.size, last * kind.size, threads)
                    assert found.dtype == np.float32 and np.array_equal(found, part, equal_nan=True)


@each_kind
@pytest.mark.parametrize("rows", HEIGHTS)
def test_columns_equal_the_reference(rows, kind):
    b = random_bytes(rows, 3, kind)
    matrix, expected = Matrix.from_blocks(b, kind), kind.dequantize(b)
    for channels in [], [3 * kind.size - 1, 0, 7, 7], range(3 * kind.size):
        found = matrix.columns(np.array(channels, np.int64))
        assert found.dtype == np.float32 and np.array_equal(found, expected[:, list(channels)], equal_nan=True)


@each_kind
def test_every_code_in_every_group(kind):
    codes = np.arange(32)[:, None] + np.arange(kind.groups)
    lanes = kind.from_groups(ternary.PATTERNS[codes % 32].reshape(32, kind.size))
    b = np.tile(kind.pack(lanes, np.full((32, 1), 0.5, np.float16)), (3, 1))
    matrix = Matrix.from_blocks(b, kind)
    assert (matrix.decode() == 0.5 * np.tile(lanes, (3, 1))).all()
    assert (matrix.columns(np.arange(kind.size)) == matrix.decode()).all()


@each_kind
def test_decoding_writes_its_floats_and_no_others(kind):
    rows, n = 130, 3 * kind.size
    b = random_rows(np.random.default_rng(0), rows, n, kind)
    x, expected, number = kernels._blocks(kernels.repack(b, kind), "uint8_t"), kind.dequantize(b), kernels._kind(kind)
    for begin, end, first, last in [(0, 130, 0, n), (60, 67, kind.size, n), (129, 130, 0, kind.size), (64, 64, 0, n), (3, 9, n, n)]:
        out, part = Guarded(4 * (end - begin) * (last - first)), expected[begin:end, first:last]
        lib.tq1_25_decode_rows(number, rows, n, x, begin, end, first, last, ffi.cast("float *", out.pointer))
        assert (out.bytes.view(np.float32) == part.ravel()).all() and out.intact()
    channels = np.array([n - 1, 0, 9], np.int64)
    out = Guarded(4 * rows * 3)
    lib.tq1_25_decode_columns(number, rows, n, x, 3, ffi.from_buffer("int64_t[]", channels), ffi.cast("float *", out.pointer))
    assert (out.bytes.view(np.float32) == expected[:, channels].ravel()).all() and out.intact()


# ---- products ----


def exact_activations(rng, columns, n, kind):
    """Activations, and so are their Q8_0 blocks, that are multiples of powers of two; STQ1_0's blocks are those of its order."""
    q = rng.integers(-127, 128, (columns, n // 32, 32))
    q[..., rng.integers(32)] = 127
    return kind.from_groups((q * rng.choice([0.5, 1, 2], (columns, n // 32, 1))).astype(np.float32).reshape(columns, n))


@each_kind
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_products_have_the_integers_of_numpy(isa, kind, threads):
    """Around the numbers of columns where one way to multiply ends and the next begins."""
    rng, entry, n = np.random.default_rng(threads), kernels.instruction_set(isa), 3 * kind.size
    switches = {k + i for k in (entry.max_tables, entry.max_codes, 16, 32) if k < 100 for i in (0, 1)}
    for rows in HEIGHTS:
        b = random_rows(rng, rows, n, kind)
        matrix, w = Matrix.from_blocks(b, kind), kind.dequantize(b).astype(np.float64)
        for columns in sorted({0, 1, 2, 7, 70, *switches}):
            x = exact_activations(rng, columns, n, kind)
            found = matrix.multiply(x, threads, isa)
            assert found.dtype == np.float32 and found.shape == (columns, rows) and (found == x @ w.T).all()


@each_kind
def test_products_without_kernels_for_repacked_rows(kind, monkeypatch):
    rng, n = np.random.default_rng(0), 2 * kind.size
    b = random_rows(rng, 130, n, kind)
    x = (rng.integers(-127, 128, (5, n // 32, 32)) * 0.5).astype(np.float32)
    x[..., 0] = 63.5
    for at_a_time in 4 << 20, 40 * n:
        monkeypatch.setattr("sherry_gguf.repacked._AT_A_TIME", at_a_time)
        found = Matrix.from_blocks(b, kind).multiply(x.reshape(5, n), isa="scalar")
        assert (found == x.reshape(5, n) @ kind.dequantize(b).astype(np.float64).T).all()


@each_kind
@pytest.mark.parametrize("isa", kernels.available())
def test_activations_that_are_not_finite(isa, kind):
    n = kind.size
    b = random_rows(np.random.default_rng(0), 70, n, kind)
    for columns in 1, 5, 40:
        x = np.ones((columns, n), np.float32)
        clean = Matrix.from_blocks(b, kind).multiply(x, isa=isa)
        x[0, 3], x[columns // 2, 4] = np.inf, np.nan
        found = Matrix.from_blocks(b, kind).multiply(x, isa=isa)
        bad = np.isin(np.arange(columns), [0, columns // 2])
        assert np.isnan(found[bad]).all() and (found[~bad] == clean[~bad]).all()
    x = np.full((1, n), 3e38, np.float32)  # finite, but no scale of Q8_0's is as large
    assert not np.isfinite(Matrix.from_blocks(random_rows(np.random.default_rng(0), 70, n, kind, d=1), kind).multiply(x, isa=isa)).any()


@pytest.mark.skipif(not ISAS, reason="this CPU has no kernels for repacked rows")
def test_the_environment_chooses_the_instruction_set(monkeypatch):
    matrix = Matrix.from_blocks(np.zeros((65, 22), np.uint8))
    monkeypatch.setenv("SHERRY_ISA", ISAS[-1])
    assert not matrix.multiply(np.ones((1, 128), np.float32)).any()
    monkeypatch.setenv("SHERRY_ISA", "mmx")
    with pytest.raises(ValueError, match="instruction set mmx"):
        matrix.multiply(np.ones((1, 128), np.float32))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_take_each_item_once_and_pass_on_errors(threads):
    taken, ids = [], set()

    def worker():
        ids.add(threading.get_ident())
        return lambda *item: taken.append(item)

    def refuse(i):
        raise MemoryError(i)

    kernels.share([(i, 2 * i) for i in range(1000)], worker, threads)
    assert sorted(taken) == [(i, 2 * i) for i in range(1000)] and 1 <= len(ids) <= threads
    kernels.share([], worker, threads)
    with pytest.raises(MemoryError):
        kernels.share([(1,), (2,), (3,)], lambda: refuse, threads)


@pytest.mark.parametrize("times", [1, 2])
def test_no_thread_works_on_after_ctrl_c(times):
    """Ctrl-C arrives, once or twice, while the caller waits for another thread in the middle of its work."""
    running, ended, helped, left = [], [], threading.Event(), [None] * times

    def work(i):
        running.append(i)
        if threading.current_thread() is threading.main_thread():
            helped.wait()
        else:
            helped.set()
            time.sleep(0.6)
        ended.append(i)

    def interrupt(*_):
        left.pop()
        if left:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            kernels.share([(i,) for i in range(3)], lambda: work, 2)
        assert not left and len(running) > 1 and sorted(running) == sorted(ended)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_further_item_begins_after_an_error():
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.01)
        raise ValueError(i)

    with pytest.raises(ValueError):
        kernels.share([(i,) for i in range(50)], lambda: work, 2)
    assert 1 <= len(begun) <= 2


def test_fewer_threads_where_the_system_allows_no_more(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(kernels._thread, "start_new_thread", refuse)
    found = []
    kernels.share([(i,) for i in range(9)], lambda: found.append, 4)
    assert found == [*range(9)]


# ---- arguments ----


def test_odd_read_only_and_strided_bytes():
    b = random_rows(np.random.default_rng(0), 130, 256, tq1_25.TYPE)
    data = kernels.repack(b)
    odd, strided = np.insert(data, 0, 0)[1:], np.repeat(data, 2)[::2]
    assert odd.ctypes.data % 2 == 1
    for given in odd, strided, data:
        given.flags.writeable = False
        assert (Matrix(given, 130, 256).decode() == tq1_25.dequantize(b)).all()
    assert Matrix(data, 130, 256).data is data
    x = exact_activations(np.random.default_rng(1), 8, 256, tq1_25.TYPE)
    whole = Matrix(data, 130, 256).multiply(x)
    assert (Matrix(data, 130, 256).multiply(np.asfortranarray(x)) == whole).all()
    assert (Matrix(data, 130, 256).multiply(np.repeat(x, 2, axis=1)[:, ::2]) == whole).all()


@pytest.mark.parametrize("call, message", [
    (lambda m: Matrix(m.data, 64, 256), r"\(2860,\), 64 rows of 256 weights need uint8 \(2816,\)"),
    (lambda m: Matrix(m.data.astype(np.int8), 65, 256), "int8.*uint8"),
    (lambda m: Matrix(m.data, 65, 200), "rows of 200 weights.*128"),
    (lambda m: Matrix.from_blocks(np.zeros(22, np.uint8)), r"\(22,\).*\(rows, bytes of a row\)"),
    (lambda m: m.multiply(np.zeros((2, 256))), r"float64 \(2, 256\).*float32 \(columns, 256\)"),
    (lambda m: m.multiply(np.zeros(256, np.float32)), r"float32 \(256,\)"),
    (lambda m: m.multiply(np.zeros((2, 128), np.float32)), r"float32 \(2, 128\)"),
    (lambda m: m.multiply(np.zeros((2, 256), np.float32), 0), "0 threads"),
    (lambda m: m.multiply(np.zeros((2, 256), np.float32), isa="mmx"), "instruction set mmx"),
    (lambda m: m.decode(3, 66), "rows 3 to 66 of 65"),
    (lambda m: m.decode(-1, 5), "rows -1 to 5 of 65"),
    (lambda m: m.decode(5, 4), "rows 5 to 4"),
    (lambda m: m.decode(first=64), "weights 64 to 256 of 256: whole blocks of 128"),
    (lambda m: m.decode(first=128, last=384), "weights 128 to 384 of 256"),
    (lambda m: m.columns(np.array([0, 256])), "channel 256 of 256"),
    (lambda m: m.columns(np.array([0, -1])), "channel -1 of 256"),
    (lambda m: m.columns(np.array([0], np.int32)), r"int32 \(1,\), not int64 \(k,\)"),
    (lambda m: m.columns(np.zeros((1, 1), np.int64)), r"int64 \(1, 1\)"),
])  # fmt: skip
def test_wrong_arguments_raise_with_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call(Matrix(np.zeros(65 * 44, np.uint8), 65, 256))


def test_scales_that_are_not_finite_stay_in_their_row():
    for kind in ALL_KINDS:
        b = random_rows(np.random.default_rng(0), 70, 2 * kind.size, kind)
        b.reshape(70, 2, kind.bytes)[5, 1, -2:] = halves(np.nan)
        found = Matrix.from_blocks(b, kind).decode()
        assert np.isnan(found[5, kind.size :]).all() and np.isnan(found).sum() == kind.size


@pytest.mark.parametrize("kind", [*KINDS, stq1_0.TYPE], ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_blocks_are_those_before_repacking(kind, rows):
    for width in 1, 3:
        b = np.random.default_rng(rows).integers(0, 256, (rows, width * kind.bytes), dtype=np.uint8)
        assert np.array_equal(Matrix.from_blocks(b, kind).blocks(), b)


@pytest.mark.parametrize("kind", [*KINDS, stq1_0.TYPE], ids=lambda kind: kind.name)
def test_one_column_on_several_threads(kind, monkeypatch):
    b = np.random.default_rng(0).integers(0, 256, (330, 3 * kind.bytes), dtype=np.uint8)
    b.reshape(-1, kind.bytes)[:, -2:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    matrix, x = Matrix.from_blocks(b, kind), np.random.default_rng(1).standard_normal((1, 3 * kind.size), np.float32)
    one = matrix.multiply(x)
    assert np.array_equal(one, matrix.multiply(np.repeat(x, 2, 0))[:1])
    monkeypatch.setattr(repacked, "_A_THREADS", 1)
    for threads in 2, 7:
        assert np.array_equal(matrix.multiply(x, threads), one)
