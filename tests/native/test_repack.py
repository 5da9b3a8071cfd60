"""Repacked rows: their layout byte by byte, and the products against NumPy's integers, for every instruction set."""

import functools

import numpy as np
import pytest
from repacked_rows import (
    CODE_COLUMNS,
    CODE_TABLES,
    COLUMNS,
    DEPTH,
    HAS,
    ISAS,
    KINDS,
    PRODUCTS,
    TILE,
    WIDE_COLUMNS,
    WIDE_TILES,
    Guarded,
    check_exact,
    deep,
    each_kind,
    every_product,
    floats,
    halves,
    multiply,
    random_q8_0,
    random_rows,
)

from sherry_gguf import kernels, stq1_0, ternary, tq1_25, tq1_25_64

ffi, lib = kernels.ffi, kernels.lib


def test_constants_of_c_and_python_are_equal():
    assert (lib.TQ1_25_TILE, lib.TQ1_25_COLUMNS, lib.TQ1_25_DEPTH) == (TILE, COLUMNS, DEPTH)
    assert (lib.TQ1_25_CODE_COLUMNS, lib.TQ1_25_CODE_TABLES) == (CODE_COLUMNS, CODE_TABLES)
    assert (lib.TQ1_25_WIDE_COLUMNS, lib.TQ1_25_WIDE_TILES) == (WIDE_COLUMNS, WIDE_TILES)
    assert all(ffi.sizeof(f"{kind.name.lower()}_tile") == TILE * kind.bytes for kind in KINDS)


def test_what_has_kernels_for_repacked_rows():
    entries = kernels._compiled()
    assert [isa for isa in kernels.available() if isa in ISAS] == ISAS
    assert set(kernels.available()) - set(ISAS) == {"scalar"}
    assert all(0 < entries[isa].max_tables < entries[isa].max_codes for isa in ISAS) and entries["scalar"].max_tables == 0
    for isa in ISAS:  # where there are neither panels nor wide tables, any number of columns goes by codes
        assert (isa in HAS["panels"]) + (isa in HAS["wide"]) == (entries[isa].max_codes < 2**31 - 1)
        assert isa not in HAS["wide"] or entries[isa].max_codes <= CODE_COLUMNS  # the last columns may be left to codes
    if ISAS:  # a kernel that is chosen by default has what the default buffer of llama.cpp wants
        assert kernels.available()[0] == ISAS[0]


# ---- layout ----


def repacked(b, kind):
    """The layout in NumPy: of 64 rows and a block of each, two or four parts of four bytes of qs and one of sign, byte by byte
    64 rows side by side; then 64 scales, in the order in which the lookup gives sums."""
    rows, nb, count = len(b), b.shape[1] // kind.bytes, kind.size // 32
    whole = rows // 64
    blocks = b[: 64 * whole].reshape(whole, 64, nb, kind.bytes)
    parts = np.empty((whole, nb, count, 5, 64), np.uint8)
    for part in range(count):
        for byte in range(4):
            parts[:, :, part, byte] = blocks[..., 4 * part + byte].swapaxes(1, 2)
        parts[:, :, part, 4] = blocks[..., 4 * count + part].swapaxes(1, 2)
    # Scales of 64 rows: row = 16 * sixteen + 8 * upper + 2 * pair + odd, place = 32 * upper + 16 * odd + 4 * sixteen + pair.
    d = blocks[..., -2:].swapaxes(1, 2).reshape(whole, nb, 4, 2, 4, 2, 2)  # sixteen, upper, pair, odd, byte
    scales = d.transpose(0, 1, 3, 5, 2, 4, 6).reshape(whole, nb, 128)
    tiles = np.concatenate([parts.reshape(whole, nb, 320 * count), scales], axis=-1)
    return np.concatenate([tiles.reshape(-1), b[64 * whole :].reshape(-1)])


@each_kind
@pytest.mark.parametrize("blocks", [1, 3, 7, 17])
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 127, 128, 130, 200, 256])
def test_layout(rows, blocks, kind):
    b = np.random.default_rng(rows).integers(0, 256, (rows, blocks * kind.bytes), dtype=np.uint8)
    found = kernels.repack(b, kind)
    assert found.dtype == np.uint8 and found.shape == (b.size,)
    assert (found == repacked(b, kind)).all()


@pytest.mark.parametrize("kind", [*KINDS, stq1_0.TYPE], ids=lambda kind: kind.name)
def test_repack_and_its_inverse_write_their_bytes_and_no_others(kind):
    for rows in 1, 64, 65, 129:
        b = np.random.default_rng(rows).integers(0, 256, (rows, 3 * kind.bytes), dtype=np.uint8)
        tiles = kernels.repack(b, kind)
        for function, given, wanted in (lib.tq1_25_repack, b, tiles), (lib.tq1_25_unpack, tiles, b.ravel()):
            out = Guarded(b.size)
            function(kernels._kind(kind), rows, 3 * kind.size, kernels._blocks(given, "uint8_t"), out.pointer)
            assert (out.bytes == wanted).all() and out.intact()


# ---- integers ----


WIDTHS = {tq1_25.TYPE: [128, 256, 384, 896, 2048, 2176, 4864], tq1_25_64.TYPE: [64, 192, 576, 960, 2112, 2880, 8640]}


@every_product
def test_integers_equal_those_of_numpy(isa, product, kind):
    for n in WIDTHS[kind]:
        rng = np.random.default_rng(n)
        sizes = [(1, 5), (64, 1), (65, 13), (130, 7), (200, 4), (63, 2), (127, 3), (128, 6), (191, 12)]
        for rows, columns in sizes if n < 2000 else sizes[:5]:
            check_exact(product, isa, random_rows(rng, rows, n, kind), random_q8_0(rng, columns, n), kind)


@every_product
def test_every_number_of_rows(isa, product, kind):
    rng = np.random.default_rng(1)
    n = 256 if kind is tq1_25.TYPE else 192
    b, q8_0 = random_rows(rng, 200, n, kind), random_q8_0(rng, 7, n)
    for rows in range(201):
        check_exact(product, isa, b[:rows], q8_0, kind)


@every_product
def test_every_number_of_columns(isa, product, kind):
    """Up to six, and around every switch: to codes, to panels or wide tables, and of the number of groups and of panels."""
    rng, n = np.random.default_rng(2), 3 * kind.size
    b, q8_0 = random_rows(rng, 67, n, kind), random_q8_0(rng, 512, n)
    switches = [k for k in (kernels._compiled()[isa].max_tables, kernels._compiled()[isa].max_codes) if k < 512]
    steps = [*switches, *range(COLUMNS, 60, COLUMNS), *range(CODE_COLUMNS, 100, CODE_COLUMNS), 256, 511]
    around = {k + i for k in steps for i in (-1, 0, 1)}
    for columns in sorted({0, 1, 2, 3, 4, 5, 6, 7, 12, 13, *around}):
        check_exact(product, isa, b, q8_0[:columns], kind)


@each_kind
def test_plain_and_repacked_kernels_agree(kind):
    rng, n = np.random.default_rng(3), 7 * kind.size
    b, q8_0 = random_rows(rng, 70, n, kind), random_q8_0(rng, 3, n)
    for isa in ISAS:
        plain = np.array([[kernels.vec_dot_q8_0(row, y, isa, kind) for row in b] for y in q8_0])
        for product in PRODUCTS:
            if isa in HAS[product]:
                assert (multiply(product, isa, b, n, q8_0, kind) == plain).all()


@every_product
def test_each_integer_alone(isa, product, kind):
    """All but one Q8_0 block silenced by a scale of 0: the column holds the 32 products of that one."""
    rng, n = np.random.default_rng(4), deep(kind)
    b, q8_0 = random_rows(rng, 65, n, kind, d=1), random_q8_0(rng, 1, n)
    alone = np.repeat(q8_0.reshape(1, n // 32, 34), n // 32, axis=0)
    alone[..., :2] = halves(np.eye(n // 32))
    check_exact(product, isa, b, alone.reshape(n // 32, -1), kind)


# ---- extremes ----


def uniform_rows(n, kind):
    """Row k holds code k % 32 in every group: 64 rows in tiles and 32 plain."""
    lanes = np.tile(ternary.PATTERNS[np.arange(96) % 32], (1, n // 4)).astype(np.int8)
    return kind.pack(lanes, np.ones((96, n // kind.size), np.float16))


def q8_0_of(values):
    """Q8_0 blocks of int8 (columns, n) with scales of 1."""
    values = np.asarray(values)
    q = np.empty((len(values), values.shape[1] // 32, 34), np.uint8)
    q[..., :2] = halves(1)
    q[..., 2:] = values.astype(np.int8).view(np.uint8).reshape(len(values), -1, 32)
    return q.reshape(len(values), -1)


@functools.cache
def every_sum(n):
    """Activations whose groups are all alike and add up to t under code 0, for every t and every zero lane."""
    t = np.arange(-384, 382)
    a = np.clip(t, -128, 127)
    b = np.clip(t - a, -128, 127)
    three = np.stack([a, b, t - a - b], axis=1)
    groups = np.concatenate([np.insert(three, lane, 0, axis=1) for lane in range(4)])
    return q8_0_of(np.tile(groups, (1, n // 4)))


@every_product
def test_every_sum_of_a_group_eight_times(isa, product, kind):
    """What a lookup splits into high and low parts adds up eight times, all of one sign: no byte may overflow."""
    check_exact(product, isa, uniform_rows(kind.size, kind), every_sum(kind.size), kind)


@every_product
@pytest.mark.parametrize("extreme", [-128, 127])
def test_extreme_activations(isa, product, kind, extreme):
    rng, n = np.random.default_rng(5), 7 * kind.size
    constant = q8_0_of(np.full((7, n), extreme))
    check_exact(product, isa, random_rows(rng, 130, n, kind), constant, kind)
    check_exact(product, isa, uniform_rows(n, kind), constant, kind)
    # every product of the row at its largest, and all of one sign
    lanes = kind.unpack(b := random_rows(rng, 96, n, kind, d=1))[0]
    for sign in -1, 1:
        check_exact(product, isa, b, q8_0_of((sign * extreme * lanes.astype(int)).clip(-128, 127)), kind)


@every_product
def test_zero_blocks(isa, product, kind):
    rng, n = np.random.default_rng(6), 3 * kind.size
    b, q8_0 = random_rows(rng, 130, n, kind), random_q8_0(rng, 7, n)
    assert not multiply(product, isa, np.zeros_like(b), n, q8_0, kind).any()
    assert not multiply(product, isa, random_rows(rng, 130, n, kind, d=0), n, q8_0, kind).any()
    assert not multiply(product, isa, b, n, np.zeros_like(q8_0), kind).any()
    assert not multiply(product, isa, b, n, random_q8_0(rng, 7, n, d=0), kind).any()


@every_product
def test_scales_that_are_not_finite_stay_in_their_row_and_column(isa, product, kind):
    rng = np.random.default_rng(7)
    n, rows, columns = deep(kind), 150, 9
    b, q8_0 = random_rows(rng, rows, n, kind), random_q8_0(rng, columns, n)
    w, y = floats(b, q8_0, kind)
    expected = y @ w.T
    bad_rows, bad_columns = [3, 17, 63, 64, 140], [0, 4, 8]
    for i, row in enumerate(bad_rows):  # the first block and the last among them
        b.reshape(rows, -1, kind.bytes)[row, i * (n // kind.size // 4), -2:] = halves([np.nan, np.inf, -np.inf][i % 3])
    for column, block, d in zip(bad_columns, (0, n // 64, n // 32 - 1), (np.nan, np.inf, -np.inf)):
        q8_0.reshape(columns, -1, 34)[column, block, :2] = halves(d)
    found = multiply(product, isa, b, n, q8_0, kind)
    finite = np.ones_like(found, bool)
    finite[:, bad_rows] = finite[bad_columns] = False
    assert (np.isfinite(found) == finite).all() and (found[finite] == expected[finite]).all()


# ---- floats ----


@every_product
def test_floats_agree_within_their_rounding(isa, product, kind):
    for n in WIDTHS[kind][0], deep(kind), WIDTHS[kind][-1]:
        rng = np.random.default_rng(n)
        b = random_rows(rng, 133, n, kind, d=rng.exponential(size=(133, n // kind.size)))
        q8_0 = random_q8_0(rng, 9, n, d=rng.exponential(size=(9, n // 32)))
        w, y = floats(b, q8_0, kind)
        found = multiply(product, isa, b, n, q8_0, kind)
        assert (np.abs(found - y @ w.T) <= 1e-5 * (np.abs(y) @ np.abs(w).T)).all()


@every_product
def test_the_longest_rows_keep_the_tolerance(isa, product, kind):
    """53248 weights, all terms of one sign, where rounding adds up the most."""
    n = 53248
    row = kind.pack(np.tile([0, 1, 1, 1], n // 4).astype(np.int8), np.full(n // kind.size, 0.01, np.float16))
    b = np.repeat(row[None], 65, axis=0)
    q8_0 = kernels.quantize_q8_0(np.random.default_rng(0).uniform(0.5, 1, n).astype(np.float32))[None]
    w, y = floats(b[:1], q8_0, kind)
    assert multiply(product, isa, b, n, q8_0, kind) == pytest.approx(float((y @ w.T)[0, 0]), rel=1e-5)


@every_product
def test_random_bytes(isa, product, kind):
    """Scales of any bits, NaN and infinite ones among them: a result is finite where its scales are, and then close."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        n, rows, columns = kind.size * rng.integers(1, 20), rng.integers(1, 200), rng.integers(1, 20)
        b = rng.integers(0, 256, (rows, n // kind.size * kind.bytes), dtype=np.uint8)
        q8_0 = rng.integers(0, 256, (columns, n // 32 * 34), dtype=np.uint8)
        w, y = floats(b, q8_0, kind)
        found = multiply(product, isa, b, n, q8_0, kind)
        with np.errstate(invalid="ignore"):
            expected, terms = y @ w.T, np.abs(y) @ np.abs(w).T
        finite = np.isfinite(y).all(axis=1)[:, None] & np.isfinite(w).all(axis=1)
        assert (np.isfinite(found) == finite).all()
        assert (np.abs(found - expected)[finite] <= 1e-5 * terms[finite]).all()


# ---- arguments ----


def good(product, **changed):
    given = dict(isa=HAS[product][0], repacked=np.zeros(65 * 44, np.uint8), rows=65, n=256, q8_0=np.zeros((2, 8 * 34), np.uint8))
    return PRODUCTS[product](**given | changed)


@pytest.mark.parametrize("product", [product for product in PRODUCTS if HAS[product]])
@pytest.mark.parametrize("changed, message", [
    (dict(rows=64), r"\(2860,\), 64 rows of 256 weights need uint8 \(2816,\)"),
    (dict(rows=-65), "-65 rows"),
    (dict(n=250), "rows of 250 weights.*128"),
    (dict(n=0), "rows of 0 weights"),
    (dict(n=-256), "rows of -256 weights"),
    (dict(repacked=np.zeros((65, 44), np.uint8)), r"\(65, 44\).*\(2860,\)"),
    (dict(repacked=np.zeros(65 * 44, np.int8)), "int8.*uint8"),
    (dict(q8_0=np.zeros(272, np.uint8)), r"\(272,\).*\(columns, 272\)"),
    (dict(q8_0=np.zeros((2, 271), np.uint8)), r"\(2, 271\).*\(columns, 272\)"),
    (dict(q8_0=np.zeros((2, 272), np.float32)), "float32.*uint8"),
    (dict(pieces=0), "0 pieces"),
    (dict(kind=tq1_25_64.TYPE), r"\(2860,\), 65 rows of 256 weights need uint8 \(3120,\)"),
    (dict(kind=tq1_25_64.TYPE, n=96), "rows of 96 weights.*64"),
    (dict(isa="scalar"), "instruction set scalar has no kernels for repacked rows; those that this CPU runs: "),
    (dict(isa="mmx"), "instruction set mmx: no such kernel"),
])  # fmt: skip
@pytest.mark.skipif(not ISAS, reason="this CPU has no kernels for repacked rows")
def test_wrong_arguments_raise_with_the_numbers(product, changed, message):
    assert not good(product).any()
    with pytest.raises(ValueError, match=message):
        good(product, **changed)


@every_product
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_numbers_of_numpy_do_not_overflow(isa, product, kind, dtype):
    rng, call = np.random.default_rng(12), functools.partial(PRODUCTS[product], isa=isa, kind=kind)
    n, size = kind.size, 200 * kind.bytes
    b, q8_0 = random_rows(rng, 130, n, kind), random_q8_0(rng, 3, n)
    w, y = floats(b, q8_0, kind)
    packed = kernels.repack(b, kind)
    assert (call(packed, dtype(130), dtype(n), q8_0, pieces=dtype(3)) == y @ w.T).all()
    with pytest.raises(ValueError, match=f"200 rows of {n} weights need uint8 .{size},."):
        call(packed[: size % 256], dtype(200), dtype(n), q8_0)
    with pytest.raises(TypeError):
        call(packed, 130.0, n, q8_0)


@pytest.mark.parametrize("b, message", [
    (np.zeros(22, np.uint8), r"\(22,\).*\(rows, bytes of a row\)"),
    (np.zeros((2, 3, 22), np.uint8), r"\(2, 3, 22\)"),
    (np.zeros((2, 21), np.uint8), r"\(2, 21\).*22"),
    (np.zeros((2, 22), np.float32), "float32.*uint8"),
])  # fmt: skip
def test_repack_refuses_what_are_no_rows_of_blocks(b, message):
    with pytest.raises(ValueError, match=message):
        kernels.repack(b)


@pytest.mark.skipif(not ISAS, reason="this CPU has no kernels for repacked rows")
def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("SHERRY_ISA", "scalar")
    with pytest.raises(ValueError, match="scalar has no kernels for repacked rows"):
        good("tables", isa=None)
    monkeypatch.setenv("SHERRY_ISA", ISAS[-1])
    assert not good("tables", isa=None).any()


@pytest.mark.parametrize("product, name", [("panels", "panels"), ("wide", "wide tables")])
def test_what_an_instruction_set_lacks(product, name):
    for isa in set(ISAS) - set(HAS[product]):
        with pytest.raises(ValueError, match=f"instruction set {isa} has no {name}; those that this CPU runs: "):
            PRODUCTS[product](np.zeros(65 * 44, np.uint8), 65, 256, np.zeros((2, 272), np.uint8), isa)


@every_product
def test_strided_read_only_and_odd_arrays(isa, product, kind):
    rng, n = np.random.default_rng(11), 3 * kind.size
    b, q8_0 = random_rows(rng, 130, n, kind), random_q8_0(rng, 5, n)
    w, y = floats(b, q8_0, kind)
    packed = kernels.repack(b, kind)
    strided = np.repeat(np.repeat(b, 2, axis=1), 2, axis=0)[::2, ::2]
    strided.flags.writeable = False
    shifted = np.insert(b.reshape(-1), 0, 0)[1:].reshape(b.shape)
    assert shifted.ctypes.data % 2 == 1
    assert (kernels.repack(strided, kind) == packed).all() and (kernels.repack(shifted, kind) == packed).all()
    odd = np.insert(packed, 0, 0)[1:], np.insert(q8_0.reshape(-1), 0, 0)[1:].reshape(q8_0.shape)
    wide = np.repeat(packed, 2)[::2], np.repeat(q8_0, 2, axis=1)[:, ::2]
    for x, q in odd, wide:
        x.flags.writeable = q.flags.writeable = False
        assert (PRODUCTS[product](x, 130, n, q, isa, kind=kind) == y @ w.T).all()
