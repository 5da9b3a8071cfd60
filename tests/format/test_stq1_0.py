"""STQ1_0 against its definition, weight by weight, and the codec's own laws."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sherry_gguf import blocks, gguf_type, kernels, stq1_0, ternary, tq1_25
from sherry_gguf.errors import QuantizeError

TYPE = stq1_0.TYPE
any_blocks = hnp.arrays(np.uint8, st.integers(1, 4).map(lambda n: 42 * n))


def weight(block: np.ndarray, i: int) -> float:
    """Weight i (0..255) of a block, from the pull request's words alone."""
    chunk, place, lane = i // 64, i % 16, i % 64 // 16
    g = chunk * 16 + place
    slot = block[g // 2] >> 4 * (g % 2) & 15
    negative = block[32 + g // 8] >> g % 8 & 1
    zero, second, third = slot >> 2, slot & 1, slot >> 1 & 1
    d = float(block[40:42].view("<f2")[0])
    if lane == zero:
        return 0.0 * d
    kept = [p for p in range(4) if p != zero].index(lane)
    sign = -1.0 if negative ^ (0, second, third)[kept] else 1.0
    return sign * d


@given(any_blocks)
@settings(deadline=None, max_examples=30)
def test_any_bytes_decode_as_defined_and_pack_again(b):
    lanes, d = TYPE.unpack(b)
    assert (TYPE.pack(lanes, d) == b).all()
    with np.errstate(invalid="ignore"):
        wanted = np.array([weight(block, i) for block in b.reshape(-1, 42) for i in range(256)], np.float32)
    np.testing.assert_array_equal(TYPE.dequantize(b), wanted)


def test_sizes_and_ids():
    assert (TYPE.size, TYPE.bytes, TYPE.groups, TYPE.type_id) == (256, 42, 64, 43)
    assert (tq1_25.TYPE.size, tq1_25.TYPE.bytes, tq1_25.TYPE.groups) == (128, 22, 32)


@pytest.mark.parametrize("kind", gguf_type.TYPES.values())
def test_groups_are_a_permutation(kind):
    x = np.arange(3 * 2 * kind.size).reshape(3, -1)
    assert sorted(kind.to_groups(x)[1]) == sorted(x[1]) and (kind.from_groups(kind.to_groups(x)) == x).all()


@pytest.mark.parametrize("kind", gguf_type.TYPES.values())
def test_nothing_is_packed_to_nothing(kind):
    for shape in (0,), (0, 2 * kind.size), (3, 0):
        packed = kind.quantize(np.zeros(shape, np.float32))
        assert packed.shape == (*shape[:-1], shape[-1] // kind.size * kind.bytes) and kind.dequantize(packed).shape == shape
        assert kernels.dequantize(kernels.quantize(np.zeros(shape, np.float32), kind=kind), kind).shape == shape


def test_groups_are_sixteen_apart():
    groups = TYPE.to_groups(np.arange(512)).reshape(-1, 4)
    assert (
        groups[0].tolist() == [0, 16, 32, 48] and groups[17].tolist() == [65, 81, 97, 113] and groups[64].tolist() == [256, 272, 288, 304]
    )


@given(hnp.arrays(np.float32, 512, elements=st.floats(-1e4, 1e4, width=32)))
@settings(deadline=None)
def test_quantizing_is_sparse_absmean_of_its_groups(x):
    b = TYPE.quantize(x)
    lanes, d = TYPE.unpack(b)
    grouped, scale = ternary.sparse_absmean(TYPE.to_groups(x), 256)
    assert (TYPE.to_groups(lanes) == grouped).all() and (d == scale.astype(np.float16)).all()
    decoded = TYPE.dequantize(b)
    assert (TYPE.dequantize(TYPE.quantize(decoded)) == decoded).all() and TYPE.is_exact(decoded).all()
    assert TYPE.is_exact(x).tolist() == (decoded == x).reshape(-1, 256).all(axis=1).tolist()


def test_dot_product():
    rng = np.random.default_rng(0)
    b, y = TYPE.quantize(rng.standard_normal(1024).astype(np.float32)), rng.standard_normal(1024).astype(np.float32)
    seen = quants.dequantize(quants.quantize(y, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    assert TYPE.vec_dot(b, y) == pytest.approx(float(TYPE.dequantize(b).astype(np.float64) @ seen), rel=1e-12)


def test_limits_of_upstreams_test_are_what_the_reference_has():
    """test-quantize-fns takes a cosine, in which weights 16 apart are nearly in phase, so that no zero is small; on random
    weights the type is as good as TQ1_25."""
    i = np.arange(4096)
    x, y = (0.1 + 2 * np.cos(i)).astype(np.float32), (0.1 + 2 * np.cos(i + 1)).astype(np.float64)

    def error(kind, x):
        return np.linalg.norm(kind.dequantize(kind.quantize(x)) - x) / len(x)

    assert 0.0104 < error(TYPE, x) < 0.0106 and 0.24 < abs((TYPE.dequantize(TYPE.quantize(x)) - x) @ y) / len(x) < 0.245
    x = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    assert error(TYPE, x) == pytest.approx(error(tq1_25.TYPE, x), rel=0.005)


@pytest.mark.parametrize("value, cause", [(np.nan, blocks.NOT_FINITE), (np.inf, blocks.NOT_FINITE), (1e5, blocks.OVERFLOW)])
def test_what_no_block_can_hold_names_the_row(value, cause):
    x = TYPE.dequantize(TYPE.quantize(np.ones((3, 2, 512), np.float32)))
    x[1, 1, 256:] = value
    with pytest.raises(QuantizeError, match="row 3: ") as error:
        TYPE.quantize(x)
    assert (error.value.row, error.value.cause) == (3, cause) and TYPE.is_exact(x)[1, 1].tolist() == [True, False]


@pytest.mark.parametrize("call, argument, message", [
    (TYPE.quantize, np.zeros((2, 384), np.float32), r"\(2, 384\).*256"),
    (TYPE.dequantize, np.zeros(22, np.uint8), r"\(22,\).*42"),
    (TYPE.unpack, np.zeros(42, np.int8), "int8"),
])  # fmt: skip
def test_wrong_arguments_are_named(call, argument, message):
    with pytest.raises(ValueError, match=message):
        call(argument)


# ---- C ----


@pytest.mark.parametrize("scale", [1.0, 2.0**-22, 1e4])
@pytest.mark.parametrize("kind", ["normal", "ties", "exact"])
def test_c_gives_the_bytes_of_numpy(kind, scale):
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((4, 1280)).astype(np.float32)
        x = np.round(x * 2) / 2 if kind == "ties" else TYPE.dequantize(TYPE.quantize(x)) if kind == "exact" else x
        x = (x * np.float32(scale)).clip(-60000, 60000)
        b = TYPE.quantize(x)
        assert (kernels.quantize(x, kind=TYPE) == b).all()
        assert (kernels.dequantize(b, kind=TYPE) == TYPE.dequantize(b)).all()


@given(any_blocks)
@settings(deadline=None)
def test_c_decodes_any_bytes_alike(b):
    np.testing.assert_array_equal(kernels.dequantize(b, TYPE), TYPE.dequantize(b))


@pytest.mark.parametrize("isa", kernels.available())
@given(st.data())
@settings(deadline=None, max_examples=30)
def test_every_instruction_set_gives_the_integers_of_numpy(isa, data):
    """One Q8_0 block at a time, all scales 1: what comes out is an integer, whatever the order of the sums."""
    b = data.draw(any_blocks).reshape(-1, 42)
    b[:, 40:] = np.float16(1).reshape(1).view(np.uint8)
    lanes, d = TYPE.unpack(b.reshape(-1))
    q8_0 = np.zeros((len(b) * 8, 34), np.uint8)
    q8_0[:, :2] = np.float16(1).reshape(1).view(np.uint8)
    q8_0[:, 2:] = data.draw(hnp.arrays(np.uint8, (len(b) * 8, 32)))
    sums = np.einsum("jk,jk->j", lanes.reshape(-1, 32), q8_0[:, 2:].view(np.int8), dtype=np.int64)
    assert kernels.vec_dot_q8_0(b.reshape(-1), q8_0.reshape(-1), isa, TYPE) == sums.sum() == blocks.dot_q8_0(lanes, d, q8_0)
    for j in range(len(q8_0)):
        alone = q8_0.copy()
        alone[np.arange(len(q8_0)) != j, :2] = 0
        assert kernels.vec_dot_q8_0(b.reshape(-1), alone.reshape(-1), isa, TYPE) == sums[j]


@pytest.mark.parametrize("isa", kernels.available())
def test_dot_product_of_c(isa):
    rng = np.random.default_rng(1)
    for n in 256, 1024, 8192:
        b, y = TYPE.quantize(rng.standard_normal(n).astype(np.float32)), rng.standard_normal(n).astype(np.float32)
        terms = float(np.abs(TYPE.dequantize(b) * y).sum())
        assert kernels.vec_dot(b, y, isa, TYPE) == pytest.approx(TYPE.vec_dot(b, y), abs=1e-6 * terms)


def test_importance_lowers_the_weighted_error():
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((16, 512)).astype(np.float32), rng.random(512).astype(np.float32) ** 4

    def error(b):
        return (w * (TYPE.dequantize(b) - x) ** 2).sum(axis=1)

    assert (error(kernels.quantize(x, w, TYPE)) <= error(TYPE.quantize(x))).all()
    assert error(kernels.quantize(x, w, TYPE)).sum() < 0.9 * error(TYPE.quantize(x)).sum()
    # equal importance still gives one zero to each group
    one = kernels.quantize(x, np.ones(512, np.float32), TYPE)
    assert ((TYPE.dequantize(one) == 0).sum(axis=1) == 128).all()


def test_c_refuses_what_no_block_can_hold():
    x = np.ones((3, 512), np.float32)
    x[1, 300], x[2, 0] = np.nan, 1e9
    with pytest.raises(QuantizeError) as e:
        kernels.quantize(x, kind=TYPE)
    assert (e.value.row, e.value.cause) == (1, blocks.NOT_FINITE)
    out = np.zeros((3, 84), np.uint8)
    kernels.lib.quantize_stq1_0(kernels._floats(x), kernels.ffi.from_buffer(out), 3, 512, kernels.ffi.NULL)
    assert [bool(kernels.lib.stq1_0_validate(kernels.ffi.from_buffer(row.copy()), 2)) for row in out] == [True, False, False]


# ---- repacked ----

PRODUCTS = {"tables": kernels.mul_tables, "codes": kernels.mul_codes, "panels": kernels.mul_panels}
every_product = pytest.mark.parametrize("isa, product", [
    (isa, product) for product in PRODUCTS
    for isa in (kernels.available_panels() if product == "panels" else kernels.available_repacked())])  # fmt: skip


def halves(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype("<f2"))[..., None].view(np.uint8)


@every_product
@pytest.mark.parametrize("rows, columns, n", [(64, 1, 256), (192, 2, 512), (100, 3, 768), (63, 7, 512), (129, 17, 1280), (320, 13, 4864)])
def test_repacked_products_are_exact(isa, product, rows, columns, n):
    """Scales are powers of two, so that float32 holds every sum; activations are any int8, in the order of the groups."""
    rng = np.random.default_rng(rows)
    b = rng.integers(0, 256, (rows, n // 256, 42), dtype=np.uint8)
    b[..., 40:] = halves(rng.choice([0, 0.5, 1, 2], b.shape[:2]))
    b = b.reshape(rows, -1)
    q = rng.integers(0, 256, (columns, n // 32, 34), dtype=np.uint8)
    scale = rng.choice([0.5, 1, 2], q.shape[:2])
    q[..., :2] = halves(scale)
    lanes, d = TYPE.unpack(b)
    w = TYPE.to_groups(lanes) * np.repeat(d.astype(np.float64), 256, axis=-1)
    y = (q[..., 2:].view(np.int8) * scale[..., None]).reshape(columns, n)
    for pieces in 1, 3:
        found = PRODUCTS[product](kernels.repack(b, TYPE), rows, n, q.reshape(columns, -1), isa, pieces, TYPE)
        np.testing.assert_array_equal(found, y @ w.T)


def test_repacked_layout():
    """64 rows side by side: eight parts of four bytes of slots and one of signs, then the scales as TQ1_25's tiles have them;
    rows that are left over stay as they are."""
    rng = np.random.default_rng(3)
    b = rng.integers(0, 256, (70, 2 * 42), dtype=np.uint8)
    out = kernels.repack(b, TYPE)
    assert (out[64 * 84 :] == b[64:].reshape(-1)).all()
    lanes, d = TYPE.unpack(b[:64])
    codes = ternary.lanes_to_codes(TYPE.to_groups(lanes).reshape(64, 2, 8, 8, 4))  # row, block, part, group
    tiles = out[: 64 * 84].reshape(2, 42 * 64)
    parts = tiles[:, : 8 * 5 * 64].reshape(2, 8, 5, 64)
    slots = codes & 15
    assert (parts[:, :, :4] == (slots[..., :4] | slots[..., 4:] << 4).transpose(1, 2, 3, 0)).all()
    assert (parts[:, :, 4] == np.packbits(codes >> 4, axis=-1, bitorder="little")[..., 0].transpose(1, 2, 0)).all()
    # a place in the order of sums: TQ1_25's own tile tells which row it is
    plain = np.zeros((64, 22), np.uint8)
    plain[:, 20] = np.arange(64)
    place = kernels.repack(plain)[20 * 64 :].reshape(64, 2)[:, 0]
    np.testing.assert_array_equal(tiles[:, 8 * 5 * 64 :].view("<f2"), d[place].T)


def test_activations_in_the_order_of_the_groups():
    y = np.random.default_rng(4).standard_normal(768).astype(np.float32)
    assert (kernels.order(y) == TYPE.to_groups(y)).all()
    with pytest.raises(ValueError, match="256"):
        kernels.order(y[:128])


@every_product
def test_repacked_is_the_plain_product_but_for_the_activations_scales(isa, product):
    """The same weights and activations; what meets them is rounded in other blocks of 32."""
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((80, 1024)).astype(np.float32), rng.standard_normal((2, 1024)).astype(np.float32)
    b = TYPE.quantize(x)
    q = np.stack([kernels.quantize_q8_0(kernels.order(row)) for row in y])
    found = PRODUCTS[product](kernels.repack(b, TYPE), 80, 1024, q, isa, kind=TYPE)
    wanted = y.astype(np.float64) @ TYPE.dequantize(b).astype(np.float64).T
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
