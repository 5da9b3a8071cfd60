"""STQ1_0 against its definition, weight by weight, and the codec's own laws."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sherry_gguf import blocks, stq1_0, ternary, tq1_25

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


@pytest.mark.parametrize("kind", [tq1_25.TYPE, TYPE])
def test_groups_are_a_permutation(kind):
    x = np.arange(3 * 2 * kind.size).reshape(3, -1)
    assert sorted(kind.to_groups(x)[1]) == sorted(x[1]) and (kind.from_groups(kind.to_groups(x)) == x).all()


def test_groups_are_sixteen_apart():
    groups = TYPE.to_groups(np.arange(512)).reshape(-1, 4)
    assert groups[0].tolist() == [0, 16, 32, 48] and groups[17].tolist() == [65, 81, 97, 113] and groups[64].tolist() == [256, 272, 288, 304]


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


@pytest.mark.parametrize("value, cause", [(np.nan, blocks.NOT_FINITE), (np.inf, blocks.NOT_FINITE), (1e5, blocks.OVERFLOW)])
def test_what_no_block_can_hold_names_the_row(value, cause):
    x = TYPE.dequantize(TYPE.quantize(np.ones((3, 2, 512), np.float32)))
    x[1, 1, 256:] = value
    with pytest.raises(blocks.QuantizeError, match="row 3: ") as error:
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
