"""C against NumPy on bytes, every instruction set against scalar on integers, and what Python may not do to C."""

import functools
import mmap
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vectors import ALL_BLOCKS, ALL_DOTS, VECTORS

from sherry_gguf import blocks as block_types
from sherry_gguf import gguf_type, kernels, ternary, tq1_25, tq1_25_64
from sherry_gguf.errors import QuantizeError

SOURCES = Path(__file__).parents[2] / "ggml_patch" / "src"
ISAS = kernels.available()
KINDS = [tq1_25.TYPE, tq1_25_64.TYPE]  # tests/format has STQ1_0's tests
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

floats = st.floats(-(2.0**15), 2.0**15, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149])


def rows_of(kind):
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([kind.size, 3 * kind.size])), elements=floats)


def random_rows(seed, n, character, kind):
    """Weights of several characters; "exact" ones are 3:4 sparse ternary already."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, n)).astype(np.float32)
    if character == "ties":
        x = np.round(x * 2) / 2
    elif character == "exact":
        x = kind.dequantize(kind.quantize(x))
    elif character == "tiny":
        x *= np.float32(2.0**-22)
    elif character == "wide":
        x *= np.float32(2.0) ** rng.integers(-60, 10, x.shape)
    return np.clip(x, -60000, 60000).astype(np.float32)


def test_constants_of_c_and_python_are_equal():
    lib = kernels.lib
    assert set(gguf_type.TYPES) == {"TQ1_25", "TQ1_25_64", "STQ1_0"} and lib.TQ1_25_GROUP == ternary.GROUP
    for name, kind in gguf_type.TYPES.items():
        assert (getattr(lib, f"{name}_TYPE_ID"), getattr(lib, f"QK_{name}")) == (kind.type_id, kind.size)
        assert kernels.ffi.sizeof(f"block_{name.lower()}") == kind.bytes
        assert kind.file_type == kind.type_id  # the header has one number for both
    assert (block_types.Q8_0, block_types.Q8_0_BYTES) == (lib.TQ1_25_QK8_0, kernels.Q8_0_BYTES)
    sizes = {q: (n, size) for q, (n, size) in quants.GGML_QUANT_SIZES.items()}
    assert sizes[GGMLQuantizationType.Q8_0] == (lib.TQ1_25_QK8_0, kernels.Q8_0_BYTES)
    assert [list(lane) for lane in lib.tq1_25_lanes] == ternary.PATTERNS[:16].T.tolist()


@pytest.mark.parametrize("kind, name", ALL_BLOCKS)
def test_golden_blocks(kind, name):
    x, block, lanes, d = VECTORS[kind].blocks[name]
    kind = gguf_type.TYPES[kind]
    assert (kernels.quantize(x, kind=kind) == block).all()
    assert (kernels.dequantize(block, kind) == np.float32(d) * np.array(lanes, np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind, i", ALL_DOTS)
def test_golden_dots(kind, i, isa):
    row, y, q8_0, result = VECTORS[kind].dots[i]
    kind = gguf_type.TYPES[kind]
    packed = np.frombuffer(b"".join(np.float16(d).tobytes() + np.array(q, np.int8).tobytes() for d, q in q8_0), np.uint8)
    assert (kernels.quantize_q8_0(y) == packed).all()
    assert kernels.vec_dot(row, y, isa, kind) == pytest.approx(result, abs=1e-5 * absolute_terms(row, packed, kind))


@each_kind
@pytest.mark.parametrize("character", ["normal", "ties", "exact", "tiny", "wide"])
@pytest.mark.parametrize("blocks", [1, 7, 32])
def test_quantize_gives_the_bytes_of_numpy(kind, character, blocks):
    for seed in range(10):
        x = random_rows(seed, blocks * kind.size, character, kind)
        assert (kernels.quantize(x, kind=kind) == kind.quantize(x)).all()


@each_kind
@given(data=st.data())
@settings(deadline=None)
def test_quantize_and_dequantize_agree_on_anything(kind, data):
    x = data.draw(rows_of(kind))
    packed = kind.quantize(x)
    assert (kernels.quantize(x, kind=kind) == packed).all()
    assert (kernels.dequantize(packed, kind).view(np.uint32) == kind.dequantize(packed).view(np.uint32)).all()


@each_kind
@given(data=st.data())
@settings(deadline=None)
def test_dequantize_agrees_on_random_bytes(kind, data):
    b = data.draw(hnp.arrays(np.uint8, st.integers(0, 5).map(lambda n: kind.bytes * n)))
    assert np.array_equal(kernels.dequantize(b, kind), kind.dequantize(b), equal_nan=True)


@each_kind
def test_every_half_is_reached_from_its_own_mean_and_its_neighbours(kind):
    """fp16 rounding against NumPy's, at every half, halfway to the next, and at the floats to either side of that."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2  # exact in float32
    means = np.concatenate([halves, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
    x = np.repeat(means, kind.size).reshape(-1, kind.size)
    expected, packed = means.astype(np.float16), kind.quantize(x)
    assert (kind.unpack(packed)[1][:, 0] == expected).all()
    assert (kernels.quantize(x, kind=kind) == packed).all()


@each_kind
def test_the_sum_is_in_order(kind):
    """A first addend so large that each of the others is lost on it, though together they would not be: the mean stays
    on the tie between two halves and goes to the even one."""
    x = np.zeros(kind.size, np.float32)
    x[np.arange(kind.size) % 4 != 0] = kind.size * 2.0**-54
    x[1] = kind.size * 3 // 4 * (1 + 2.0**-11)  # a mean of 1 + 2^-11, halfway from 1 to the next half
    assert kind.unpack(kind.quantize(x))[1][0] == 1
    assert (kernels.quantize(x, kind=kind) == kind.quantize(x)).all()
    x[1], x[-1] = x[-1], x[1]  # the small ones first: they count
    assert kind.unpack(kind.quantize(x))[1][0] == 1 + 2.0**-10
    assert (kernels.quantize(x, kind=kind) == kind.quantize(x)).all()


@each_kind
def test_the_first_bad_row_is_named(kind):
    x = np.ones((9000, 128), np.float32)  # more weights than NumPy handles at a time
    x[8500, 3], x[8700, 3] = np.nan, 1e9
    for quantize in kind.quantize, functools.partial(kernels.quantize, kind=kind):
        with pytest.raises(QuantizeError) as error:
            quantize(x)
        assert error.value.row == 8500 and error.value.cause == tq1_25.NOT_FINITE
    x[8500, 3] = 1
    for quantize in kind.quantize, functools.partial(kernels.quantize, kind=kind):
        with pytest.raises(QuantizeError) as error:
            quantize(x)
        assert error.value.row == 8700 and error.value.cause == tq1_25.OVERFLOW


@each_kind
def test_what_ggml_calls(kind):
    """The functions in the shapes of ggml's tables: every row, an importance matrix, and no status to return."""
    n = 3 * kind.size
    x, importance = random_rows(11, n, "normal", kind), np.random.default_rng(0).random(n, np.float32)
    out = np.zeros((8, 3 * kind.bytes), np.uint8)
    quantize, validate = (kernels._function(kind, name) for name in ("quantize_TYPE", "TYPE_validate"))
    for im in None, importance:
        size = quantize(kernels._floats(x), kernels.ffi.from_buffer(out), 8, n, kernels.ffi.NULL if im is None else kernels._floats(im))
        assert size == out.size and (out == kernels.quantize(x, im, kind)).all()
    assert validate(kernels.ffi.from_buffer(out), 24)
    x[5, n // 2] = np.inf
    quantize(kernels._floats(x), kernels.ffi.from_buffer(out), 8, n, kernels.ffi.NULL)
    assert not validate(kernels.ffi.from_buffer(out), 24)
    assert np.isnan(kind.unpack(out)[1]).nonzero()[0].tolist() == [5]


def test_released_bytes_of_a_file_can_still_be_read(tmp_path):
    """Ranges that begin and end anywhere, as tensors do; on Linux whole pages within leave the process."""
    expected = np.random.default_rng(0).integers(0, 256, 64 << 12, dtype=np.uint8)
    expected.tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")

    def resident():
        mapping = Path("/proc/self/smaps").read_text().split(str(tmp_path / "file"))[1]
        return int(re.search(r"Rss: +(\d+) kB", mapping)[1]) << 10

    page = mmap.PAGESIZE
    for begin, end in [(0, 10), (5, 5), (page + 22, 40 * page + 3), (3, 3 * page - 1), (0, len(expected))]:
        assert (mapped == expected).all()
        pointer = kernels.ffi.from_buffer(mapped) + begin
        if sys.platform == "linux":
            before = resident()
        kernels.lib.tq1_25_release(pointer, end - begin)
        if sys.platform == "linux":
            assert before - resident() == max(end // page - -(-begin // page), 0) * page
        assert (mapped == expected).all()


@each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
def test_what_no_block_can_hold(kind, value):
    x = np.ones((3, 2, 256), np.float32)
    x[1, 1, 200] = value if not np.isfinite(value) else 1e7
    with pytest.raises(QuantizeError) as expected:
        kind.quantize(x)
    with pytest.raises(QuantizeError) as error:
        kernels.quantize(x, kind=kind)
    assert str(error.value) == str(expected.value) and error.value.row == 3
    with pytest.raises(QuantizeError) as error:
        kernels.quantize(x, np.ones(256, np.float32), kind)
    assert str(error.value) == str(expected.value)


# ---- importance ----


def weighted_error(x, packed, importance, kind):
    difference = x - kernels.dequantize(packed, kind).astype(np.float64)
    return (importance * difference**2).reshape(*x.shape[:-1], -1, kind.size).sum(-1)


@each_kind
@pytest.mark.parametrize("character", ["normal", "ties", "wide"])
def test_importance_lowers_the_weighted_error(kind, character):
    rng = np.random.default_rng(3)
    for seed in range(5):
        n = 7 * kind.size
        x, importance = random_rows(seed, n, character, kind), rng.exponential(size=n).astype(np.float32) ** 3
        plain = weighted_error(x, kernels.quantize(x, kind=kind), importance, kind)
        weighted = weighted_error(x, kernels.quantize(x, importance, kind), importance, kind)
        assert (weighted <= plain * (1 + 1e-3)).all()  # the scale is rounded to fp16 only after the search
        assert weighted.sum() < plain.sum()


@each_kind
def test_weighted_scale_and_zeros_are_best_for_each_other(kind):
    """d = sum of w|x| over sum of w on the kept lanes; the zero costs least, w (x^2 - (|x| - d)^2) (float64 oracle)."""
    rng = np.random.default_rng(4)
    n = 10 * kind.size
    x, importance = random_rows(5, n, "normal", kind), (rng.random(n) + 0.1).astype(np.float32)
    lanes, d = kind.unpack(kernels.quantize(x, importance, kind))
    a, w = np.abs(x.astype(np.float64)).reshape(8, 10, -1, 4), importance.astype(np.float64).reshape(10, -1, 4)
    kept = lanes.reshape(a.shape) != 0
    best = (w * a * kept).sum((-1, -2)) / (w * kept).sum((-1, -2))
    assert (d == best.astype(np.float16)).all()
    cost = w * best[..., None, None] * (2 * a - best[..., None, None])
    assert (cost.argmin(-1) == kept.argmin(-1)).all()
    assert (np.where(x < 0, -1, 1)[lanes != 0] == lanes[lanes != 0]).all()


@each_kind
@pytest.mark.parametrize("importance", ["uniform", "random", "sparse", "zero"])
def test_exact_weights_stay_exact_whatever_their_importance(kind, importance):
    rng = np.random.default_rng(6)
    x = random_rows(7, 512, "exact", kind)
    weights = {"uniform": np.ones(512), "random": rng.random(512), "sparse": rng.random(512) > 0.9, "zero": np.zeros(512)}
    packed = kernels.quantize(x, weights[importance].astype(np.float32), kind)
    assert (packed == kernels.quantize(x, kind=kind)).all()


# ---- dot products ----


def absolute_terms(row, q8_0, kind):
    """The sum of the absolute terms of a dot product, what its rounding error is measured against."""
    lanes, d = kind.unpack(row)
    y = quants.dequantize(q8_0, GGMLQuantizationType.Q8_0)
    return float(np.abs(lanes * np.repeat(d.astype(np.float64), kind.size) * y).sum())


def random_q8_0(rng, n):
    """Blocks with any int8 and an fp16 scale of 1: sums of such blocks are whole numbers, exact in float32."""
    q = rng.integers(-128, 128, (n // 32, 34), dtype=np.int8).view(np.uint8)
    q[:, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    return q


@each_kind
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 32, 45])
def test_integers_equal_those_of_scalar(isa, blocks, kind):
    """Scales of 1, all but one Q8_0 block silenced by a scale of 0: each integer sum of 32 products comes out alone."""
    rng, n = np.random.default_rng(blocks), blocks * kind.size
    for _ in range(5):
        row = rng.integers(0, 256, (blocks, kind.bytes), dtype=np.uint8)
        row[:, -2:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        q8_0 = random_q8_0(rng, n)
        lanes, _ = kind.unpack(row.reshape(-1))
        sums = (lanes.reshape(-1, 32).astype(int) * q8_0[:, 2:].view(np.int8)).sum(axis=1)
        assert kernels.vec_dot_q8_0(row.reshape(-1), q8_0.reshape(-1), isa, kind) == sums.sum()
        for j in {*rng.choice(n // 32, 4), n // 32 - 1}:
            alone = q8_0.copy()
            alone[np.arange(n // 32) != j, :2] = 0
            assert kernels.vec_dot_q8_0(row.reshape(-1), alone.reshape(-1), isa, kind) == sums[j]
            assert kernels.vec_dot_q8_0(row.reshape(-1), alone.reshape(-1), "scalar", kind) == sums[j]


@each_kind
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("extreme", [-128, 127])
def test_extreme_sums(isa, extreme, kind):
    """Every product at its largest and all of one sign: no intermediate may overflow."""
    n = 3 * kind.size
    row = kind.pack(np.tile([0, -1, 1, -1], n // 4).astype(np.int8), np.ones(3, np.float16))
    q8_0 = random_q8_0(np.random.default_rng(0), n)
    y = np.where(np.arange(32) % 2, extreme, -extreme).clip(-128, 127)
    q8_0[:, 2:] = y.astype(np.int8).view(np.uint8)
    assert kernels.vec_dot_q8_0(row, q8_0.reshape(-1), isa, kind) == n // 4 * (-2 * extreme + min(-extreme, 127))


@each_kind
@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_rows_keep_the_tolerance(isa, kind):
    """53248 weights, Llama-3.1-405B's feed-forward; all terms of one sign, where rounding adds up the most."""
    n = 53248
    row = kind.pack(np.tile([0, 1, 1, 1], n // 4).astype(np.int8), np.full(n // kind.size, 0.01, np.float16))
    y = np.random.default_rng(0).uniform(0.5, 1, n).astype(np.float32)
    expected = kind.vec_dot(row, y)
    assert kernels.vec_dot(row, y, isa, kind) == pytest.approx(expected, rel=1e-5)


@each_kind
@given(seed=st.integers(0, 2**32 - 1), blocks=st.integers(1, 12), scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_floats_agree_within_their_rounding(kind, seed, blocks, scale):
    rng = np.random.default_rng(seed)
    row = kernels.quantize(rng.standard_normal(kind.size * blocks).astype(np.float32), kind=kind)
    y = (scale * rng.standard_normal(kind.size * blocks)).astype(np.float32)
    expected, tolerance = kind.vec_dot(row, y), 1e-5 * absolute_terms(row, kernels.quantize_q8_0(y), kind)
    for isa in ISAS:
        assert kernels.vec_dot(row, y, isa, kind) == pytest.approx(expected, abs=tolerance)


@each_kind
@pytest.mark.parametrize("isa", ISAS)
def test_zero_blocks(isa, kind):
    zero = np.zeros(3 * kind.size, np.float32)
    assert kernels.vec_dot(kernels.quantize(zero, kind=kind), zero + 1, isa, kind) == 0
    assert kernels.vec_dot(kernels.quantize(zero + 1, kind=kind), zero, isa, kind) == 0
    assert kernels.vec_dot(np.zeros(0, np.uint8), np.zeros(0, np.float32), isa, kind) == 0


def test_q8_0_rounds_halves_away_from_zero_and_holds_any_scale():
    y = np.zeros(32, np.float32)
    y[:9] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49999997, -0.49999997
    assert kernels.quantize_q8_0(y)[2:11].view(np.int8).tolist() == [127, 1, 2, 3, -1, -2, -127, 0, 0]
    y[:] = 2.0**-149  # the scale, a 127th, is 0, and so is everything
    assert not kernels.quantize_q8_0(y).any()
    y[:] = 2.0**-140  # a scale whose reciprocal overflows
    assert np.abs(kernels.quantize_q8_0(y)[2:].view(np.int8)).max() <= 127


@given(rows_of(tq1_25.TYPE))
@settings(deadline=None)
def test_q8_0_gives_the_bytes_of_gguf(x):
    y = x[0]
    if (np.abs(y.reshape(-1, 32)).max(axis=1) < 1e-30).any():
        return  # subnormal scales: gguf divides by zero there
    assert (kernels.quantize_q8_0(y) == quants.quantize(y, GGMLQuantizationType.Q8_0)).all()


# ---- arguments ----


def test_available_lists_what_the_machine_has():
    best_first = ["zen4", "avx512vnni", "avx512", "avxvnni", "avx2", "i8mm", "dotprod", "neon", "scalar"]
    assert [isa for isa in best_first if isa in ISAS] == ISAS and ISAS[-1] == "scalar"
    table = (SOURCES / "isas.c").read_text().split("tq1_25_isas[] = {")[1].split("};")[0]
    checks = re.findall(r'\{ "(\w+)", +VEC_DOT\((\w+)\), +(?:tq1_25_has_(\w+)|NULL),', table)
    assert [name for name, _, _ in checks] == best_first[:-1]
    plain = {"zen4": "avx512vnni", "avxvnni": "avx2", "i8mm": "dotprod"}  # the dot product of another, that has all it needs
    for name, kernel, check in checks:
        assert kernel == plain.get(name, name) and check == ("" if name == "neon" else name)
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""  # an emulator's is its host's
    if platform.machine() in ("x86_64", "AMD64") and (flags := re.search(r"^flags\s*: (.*)$", text, re.M)):
        needs = {"avx2": {"avx2", "fma", "f16c"}}
        needs["avxvnni"] = needs["avx2"] | {"avx_vnni"}
        needs["avx512"] = needs["avx2"] | {"avx512f", "avx512dq", "avx512bw", "avx512vl"}
        needs["avx512vnni"] = needs["avx512"] | {"avx512_vnni"}
        if re.search(r"^vendor_id\s*: AuthenticAMD$", text, re.M):
            needs["zen4"] = needs["avx512vnni"]
    elif platform.machine() in ("aarch64", "arm64") and (flags := re.search(r"^Features\s*: (.*)$", text, re.M)):
        needs = {"neon": {"asimd"}, "dotprod": {"asimddp"}, "i8mm": {"asimddp", "i8mm"}}
    else:
        return
    assert set(ISAS) == {"scalar"} | {isa for isa, wanted in needs.items() if wanted <= set(flags[1].split())}


def test_an_instruction_set_that_is_missing_raises(monkeypatch):
    row, y = kernels.quantize(np.ones(128, np.float32)), np.ones(128, np.float32)
    with pytest.raises(ValueError, match="instruction set mmx: no such kernel.*it runs .*scalar"):
        kernels.vec_dot(row, y, isa="mmx")
    monkeypatch.setattr(kernels, "_supported", lambda entry: entry.supported == kernels.ffi.NULL)
    assert kernels.available() == [isa for isa in ("neon", "scalar") if isa in kernels._compiled()]
    with pytest.raises(ValueError, match="this CPU lacks it; it runs .*scalar"):
        kernels.vec_dot(row, y, isa=next(iter(kernels._compiled())))


def test_the_environment_chooses(monkeypatch):
    row, y = kernels.quantize(np.ones(128, np.float32)), np.ones(128, np.float32)
    monkeypatch.setenv("SHERRY_ISA", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        kernels.vec_dot(row, y)
    monkeypatch.setenv("SHERRY_ISA", "scalar")
    assert kernels.vec_dot(row, y) == kernels.vec_dot(row, y, "scalar")


@pytest.mark.parametrize("call, message", [
    (lambda: kernels.quantize(np.zeros(130, np.float32)), r"\(130,\).*128"),
    (lambda: kernels.quantize(np.zeros(128, np.float64)), "float64.*float32"),
    (lambda: kernels.quantize(np.zeros(128, np.int64)), "^weights are int64, not float32$"),
    (lambda: kernels.quantize(np.zeros(128, ">f4")), ">f4"),
    (lambda: kernels.quantize(np.zeros(128, np.float32), np.zeros(64, np.float32)), r"\(64,\).*\(128,\)"),
    (lambda: kernels.quantize(np.zeros(128, np.float32), np.zeros(128)), "float64"),
    (lambda: kernels.quantize(np.zeros(128, np.float32), np.full(128, np.nan, np.float32)), "not finite"),
    (lambda: kernels.quantize(np.zeros(128, np.float32), np.full(128, -1, np.float32)), "negative"),
    (lambda: kernels.vec_dot(np.zeros(22, np.uint8), np.full(128, np.inf, np.float32)), "activation 0 is NaN or infinite"),
    (lambda: kernels.vec_dot(np.zeros(22, np.uint8), np.zeros(128, np.float32), isa=""), "instruction set :"),
    (lambda: kernels.dequantize(np.zeros(21, np.uint8)), r"\(21,\).*22"),
    (lambda: kernels.dequantize(np.zeros(22, np.float32)), "float32.*uint8"),
    (lambda: kernels.dequantize(np.uint8(3)), r"\(\)"),
    (lambda: kernels.vec_dot(np.zeros(44, np.uint8), np.zeros(128, np.float32)), r"\(128,\).*\(256,\)"),
    (lambda: kernels.vec_dot(np.zeros((2, 22), np.uint8), np.zeros(256, np.float32)), r"\(2, 22\)"),
    (lambda: kernels.vec_dot(np.zeros(22, np.uint8), np.zeros(128, np.float16)), "float16.*float32"),
    (lambda: kernels.vec_dot_q8_0(np.zeros(22, np.uint8), np.zeros(135, np.uint8)), r"\(135,\).*\(136,\)"),
    (lambda: kernels.quantize_q8_0(np.zeros(33, np.float32)), r"\(33,\).*32"),
    (lambda: kernels.quantize(np.zeros(96, np.float32), kind=tq1_25_64.TYPE), r"\(96,\).*64"),
    (lambda: kernels.quantize(np.zeros(64, np.float32), np.zeros(128, np.float32), tq1_25_64.TYPE), r"\(128,\).*\(64,\)"),
    (lambda: kernels.dequantize(np.zeros(22, np.uint8), tq1_25_64.TYPE), r"\(22,\).*12"),
    (lambda: kernels.vec_dot(np.zeros(12, np.uint8), np.zeros(128, np.float32), kind=tq1_25_64.TYPE), r"\(128,\).*\(64,\)"),
    (lambda: kernels.vec_dot_q8_0(np.zeros(12, np.uint8), np.zeros(34, np.uint8), kind=tq1_25_64.TYPE), r"\(34,\).*\(68,\)"),
])  # fmt: skip
def test_wrong_arguments_raise_with_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call, message", [
    (lambda: kernels.quantize(np.zeros(64, np.float32), tq1_25_64.TYPE), "importance is the block type TQ1_25_64: pass it as kind="),
    (lambda: kernels.quantize(np.zeros(64, np.float32), kind="TQ1_25_64"), "kind is 'TQ1_25_64': pass a block type"),
    (lambda: kernels.dequantize(np.zeros(12, np.uint8), "TQ1_25_64"), "kind is 'TQ1_25_64': pass a block type"),
])  # fmt: skip
def test_what_is_no_block_type_raises(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@each_kind
def test_strided_and_read_only_arrays(kind):
    x = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    x.flags.writeable = False
    quantize, dequantize = functools.partial(kernels.quantize, kind=kind), functools.partial(kernels.dequantize, kind=kind)
    assert (quantize(x[::2, ::-1]) == kind.quantize(x[::2, ::-1])).all()
    packed = quantize(x)
    assert (dequantize(packed[::-2]) == kind.dequantize(packed[::-2])).all()
    assert (quantize(x, x[1, ::-1] ** 2) == quantize(x, np.ascontiguousarray(x[1, ::-1] ** 2))).all()


@each_kind
def test_copies_live_as_long_as_the_call(kind):
    """Large arrays that must be copied: memory given back too early would be unmapped or written to."""
    y = np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32)
    quantize, dequantize = functools.partial(kernels.quantize, kind=kind), functools.partial(kernels.dequantize, kind=kind)
    packed, importance = quantize(y), np.abs(y)

    def strided(a):
        return np.repeat(a, 2)[::2]

    assert (kernels.quantize_q8_0(strided(y)) == kernels.quantize_q8_0(y)).all()
    assert (quantize(strided(y)) == packed).all()
    assert (dequantize(strided(packed)) == dequantize(packed)).all()
    assert (quantize(strided(y), strided(importance)) == quantize(y, importance)).all()
    assert kernels.vec_dot(strided(packed), strided(y), kind=kind) == kernels.vec_dot(packed, y, kind=kind)


@each_kind
def test_odd_addresses(kind):
    x = np.random.default_rng(0).standard_normal(3 * kind.size).astype(np.float32)
    packed, q8_0 = kernels.quantize(x, kind=kind), kernels.quantize_q8_0(x)
    shifted, shifted_q8_0 = np.insert(packed, 0, 0)[1:], np.insert(q8_0, 0, 0)[1:]
    floats = np.frombuffer(b"\0" + x.tobytes(), np.float32, offset=1)
    assert shifted.ctypes.data % 2 == 1 and floats.ctypes.data % 4 == 1
    # what C gets is a copy at an even address
    assert int(kernels.ffi.cast("uintptr_t", kernels._blocks(shifted, "uint8_t"))) % 2 == 0
    assert int(kernels.ffi.cast("uintptr_t", kernels._floats(floats))) % 4 == 0
    assert (kernels.dequantize(shifted, kind) == kernels.dequantize(packed, kind)).all()
    assert kernels.vec_dot_q8_0(shifted, shifted_q8_0, kind=kind) == kernels.vec_dot_q8_0(packed, q8_0, kind=kind)
    assert (kernels.quantize(floats, kind=kind) == packed).all()
