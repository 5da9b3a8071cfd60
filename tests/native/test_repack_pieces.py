"""The pieces of a product that threads take: which columns, which rows, and that nothing outside them is written."""

import numpy as np
import pytest
from repacked_rows import (
    CODE_COLUMNS,
    COLUMNS,
    HAS,
    IN_PAIRS,
    ISAS,
    PRODUCTS,
    WIDE_COLUMNS,
    WIDE_TILES,
    Guarded,
    check_exact,
    deep,
    each_kind,
    every_product,
    floats,
    multiply,
    random_q8_0,
    random_rows,
)

from sherry_gguf import kernels, tq1_25_64

ffi, lib = kernels.ffi, kernels.lib


@every_product
@pytest.mark.parametrize("columns", [1, 13, 31])
def test_pieces_give_the_same_bits_as_the_whole(isa, product, kind, columns):
    """As the threads of llama.cpp cut them: what is made along the vector, rows of tiles (the second of a pair begins a piece,
    too), groups of panels."""
    rng = np.random.default_rng(9)
    n, rows = deep(kind), 330
    b = random_rows(rng, rows, n, kind, d=rng.exponential(size=(rows, n // kind.size)))
    q8_0 = random_q8_0(rng, columns, n, d=rng.exponential(size=(columns, n // 32)))
    whole = multiply(product, isa, b, n, q8_0, kind)
    for pieces in 2, 3, 5, 8, 100:
        assert (multiply(product, isa, b, n, q8_0, kind, pieces=pieces).view(np.uint32) == whole.view(np.uint32)).all()


@each_kind
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [1, 4, 6, 11, 20, 33])
def test_nothing_is_written_outside_its_range(isa, columns, kind):
    """Tables, panels, scratch and results take the bytes that they say; of a result only the rows and columns of
    the ranges are written, whatever lies between columns."""
    entry = ffi.addressof(kernels._compiled()[isa])
    rng = np.random.default_rng(10)
    n, rows, gap, number = deep(kind), 330, 7, kernels._kind(kind)
    b, q8_0 = random_rows(rng, rows, n, kind), random_q8_0(rng, columns, n)
    w, y = floats(b, q8_0, kind)
    expected, b = y @ w.T, kernels.repack(b, kind)
    x, of = kernels._blocks(b, "uint8_t"), kernels._pointers("const tq1_25_q8_0 *", q8_0)

    tables = [Guarded(lib.tq1_25_table_size(entry, n)) for _ in range(columns)]
    to = ffi.new("void *[]", [table.pointer for table in tables])
    for c in range(columns):
        lib.tq1_25_make_table(entry, n, 0, n, of[c], to[c])
    assert all(table.intact() for table in tables)
    panels = Guarded(lib.tq1_25_panel_size(n, columns))
    count = lib.tq1_25_panels(columns)
    for p in range(count):
        first, last = (lib.tq1_25_first_column(columns, k) for k in (p, p + 1))
        assert 0 < last - first <= COLUMNS
        lib.tq1_25_make_panel(0, n, last - first, of + first, panels.pointer + lib.tq1_25_panel_size(n, first))
    assert panels.intact()
    panel_scratch, code_scratch, wide_scratch = (Guarded(ffi.sizeof(f"struct tq1_25_{of}_scratch")) for of in ("panel", "code", "wide"))
    groups = lib.tq1_25_code_groups(columns)

    for begin, end in [(0, 6), (0, 1), (2, 4), (5, 6), (3, 3)]:
        for p, q in [(0, count), (0, 1), (count - 1, count), (1, 1)]:
            for product in PRODUCTS:
                if isa not in HAS[product] or (product != "panels" and (p, q) != (0, count)):
                    continue
                out = Guarded(4 * columns * (rows + gap))
                floats32 = out.bytes.view(np.float32).reshape(columns, rows + gap)
                s = ffi.new("float *[]", [ffi.cast("float *", out.pointer) + c * (rows + gap) for c in range(columns)])
                if product == "panels":
                    lib.tq1_25_mul_panels(entry, number, rows, n, x, begin, end, columns, p, q, panels.pointer, s,
                                          ffi.cast("struct tq1_25_panel_scratch *", panel_scratch.pointer))  # fmt: skip
                elif product == "tables":
                    lib.tq1_25_mul_tables(entry, number, rows, n, x, begin, end, columns, of, to, s)
                for group in range(groups if product == "codes" else 0):
                    first, last = (lib.tq1_25_first_of_group(columns, groups, k) for k in (group, group + 1))
                    lib.tq1_25_mul_codes(entry, number, rows, n, x, begin, end, last - first, of + first, s + first,
                                         ffi.cast("struct tq1_25_code_scratch *", code_scratch.pointer))  # fmt: skip
                for first in range(0, columns if product == "wide" else 0, WIDE_COLUMNS):
                    lib.tq1_25_mul_wide(entry, number, rows, n, x, begin, end, min(columns - first, WIDE_COLUMNS), of + first, s + first,
                                        ffi.cast("struct tq1_25_wide_scratch *", wide_scratch.pointer))  # fmt: skip
                assert out.intact() and panels.intact()
                assert panel_scratch.intact() and code_scratch.intact() and wide_scratch.intact()
                written = np.zeros((columns, rows + gap), bool)
                first, last = (lib.tq1_25_first_column(columns, k) for k in (p, q))
                written[first:last, 64 * begin : min(64 * end, rows)] = True
                assert (floats32[written] == expected[written[:, :rows]]).all()
                assert (floats32[~written].view(np.uint32) == 0xA5A5A5A5).all()


def test_columns_are_spread_over_groups_in_pairs():
    """Over as few groups as can be, or more, where there are threads for them: down to pairs."""
    for columns in range(1, 200):
        least = lib.tq1_25_code_groups(columns)
        assert least == -(-columns // CODE_COLUMNS)
        for groups in range(least, (columns + 1) // 2 + 1):
            cuts = [lib.tq1_25_first_of_group(columns, groups, g) for g in range(groups + 1)]
            widths = np.diff(cuts)
            assert cuts[0] == 0 and cuts[-1] == columns
            assert 0 < widths.min() and widths.max() <= CODE_COLUMNS and widths.max() - widths.min() <= 3
            assert (widths[:-1] % 2 == 0).all()


def test_columns_of_wide_tables():
    for columns in range(1, 200):
        cuts = [lib.tq1_25_first_of_wide(columns, g) for g in range(lib.tq1_25_wide_groups(columns) + 1)]
        widths, left = np.diff(cuts).tolist(), columns % WIDE_COLUMNS
        rest = [16, left - 16] if 16 < left <= 24 else [left] if left else []
        assert cuts[0] == 0 and widths == [WIDE_COLUMNS] * (columns // WIDE_COLUMNS) + rest


def test_columns_are_spread_evenly_over_panels():
    for columns in range(1, 400):
        cuts = [lib.tq1_25_first_column(columns, p) for p in range(lib.tq1_25_panels(columns) + 1)]
        widths = np.diff(cuts)
        assert cuts[0] == 0 and cuts[-1] == columns and len(widths) == -(-columns // COLUMNS)
        assert widths.max() <= COLUMNS and widths.max() - widths.min() <= (2 if IN_PAIRS else 1)
        assert not IN_PAIRS or not (widths[:-1] % 2).any()


@pytest.mark.parametrize("isa", HAS["wide"])
def test_wide_tables_leave_few_columns_to_codes(isa, monkeypatch):
    calls = []

    class Recorded:
        def __getattr__(self, name):
            function = getattr(lib, name)
            if name not in ("tq1_25_mul_wide", "tq1_25_mul_codes"):
                return function
            return lambda *args: calls.append((name.removeprefix("tq1_25_mul_"), args[7])) or function(*args)

    monkeypatch.setattr(kernels, "lib", Recorded())
    rng, kind = np.random.default_rng(14), tq1_25_64.TYPE
    least = kernels.instruction_set(isa).max_codes + 1
    for columns, wanted in [
        (1, [1]),  # not used by llama.cpp
        (24, [16, 8]),
        (32 + least - 1, [32, least - 1]),
        (32 + least, [32, least]),
        (64 + 17, [32, 32, 16, 1]),
    ]:
        calls.clear()
        check_exact("wide", isa, random_rows(rng, 65, 64, kind), random_q8_0(rng, columns, 64), kind)
        assert calls == [("wide" if count >= least or columns < least else "codes", count) for count in wanted]


@pytest.mark.parametrize("isa", HAS["wide"])
def test_more_rows_than_a_wide_table_serves(isa):
    rng, kind, n = np.random.default_rng(13), tq1_25_64.TYPE, 64
    for rows in 64 * WIDE_TILES - 1, 64 * WIDE_TILES, 64 * WIDE_TILES + 1, 64 * (2 * WIDE_TILES + 1) + 5:
        check_exact("wide", isa, random_rows(rng, rows, n, kind), random_q8_0(rng, 33, n), kind)
