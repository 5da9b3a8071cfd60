"""TQ1_25 and TQ1_25_64: the golden vectors, and the codecs' own laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vectors import ALL_BLOCKS, ALL_DOTS, EXACT, VECTORS

from sherry_gguf import gguf_type, ternary, tq1_25, tq1_25_64
from sherry_gguf.errors import QuantizeError

KINDS = pytest.mark.parametrize("kind", [tq1_25.TYPE, tq1_25_64.TYPE], ids=lambda kind: kind.name)
any_floats = hnp.arrays(np.float32, 256, elements=st.floats(-1e4, 1e4, width=32))
any_blocks = hnp.arrays(np.uint8, st.integers(1, 4).map(lambda n: 132 * n))  # whole blocks of both types


@pytest.mark.parametrize("kind, name", ALL_BLOCKS)
def test_golden_blocks(kind, name):
    x, block, lanes, d = VECTORS[kind].blocks[name]
    kind = gguf_type.TYPES[kind]
    assert (kind.quantize(x) == block).all()
    assert kind.unpack(block)[0].tolist() == lanes
    assert kind.unpack(block)[1].tolist() == [d]
    assert (kind.dequantize(block) == np.float32(d) * np.array(lanes, np.float32)).all()
    assert kind.is_exact(x).tolist() == [name in EXACT]


@pytest.mark.parametrize("kind, i", ALL_DOTS)
def test_golden_dots(kind, i):
    row, y, q8_0, result = VECTORS[kind].dots[i]
    kind = gguf_type.TYPES[kind]
    assert kind.vec_dot(row, y) == pytest.approx(result, rel=1e-12)
    packed = b"".join(np.float16(d).tobytes() + np.array(q, np.int8).tobytes() for d, q in q8_0)
    lanes, d = kind.unpack(row)
    assert tq1_25.dot_q8_0(lanes, d, np.frombuffer(packed, np.uint8).reshape(-1, 34)) == kind.vec_dot(row, y)


@given(any_floats)
@settings(deadline=None)
def test_a_block_is_two_of_64_with_one_scale(x):
    x = x.reshape(2, 128)
    lanes, d = tq1_25.unpack(tq1_25.quantize(x))
    halves = tq1_25_64.TYPE.pack(lanes, np.repeat(d, 2, axis=1)).reshape(2, 2, 12)
    block = np.concatenate([halves[:, :, :8].reshape(2, 16), halves[:, :, 8:10].reshape(2, 4), halves[:, 0, 10:]], axis=1)
    assert (block == tq1_25.quantize(x)).all()
    decoded = tq1_25.dequantize(block)
    assert (tq1_25_64.TYPE.dequantize(halves.reshape(2, 24)) == decoded).all() and tq1_25_64.TYPE.is_exact(decoded).all()


@KINDS
@given(x=any_floats)
@settings(deadline=None)
def test_quantizing_what_was_decoded_changes_nothing(kind, x):
    block = kind.quantize(x)
    decoded = kind.dequantize(block)
    # A scale of zero keeps neither signs nor zeros: only such blocks may come back as other bytes.
    again = kind.quantize(decoded)
    assert (kind.dequantize(again) == decoded).all() and kind.is_exact(decoded).all()
    kept = kind.unpack(block)[1] > 0
    assert (again.reshape(-1, kind.bytes)[kept] == block.reshape(-1, kind.bytes)[kept]).all()


@KINDS
@given(x=any_floats)
@settings(deadline=None)
def test_exact_means_that_every_value_comes_back(kind, x):
    back = kind.dequantize(kind.quantize(x)).reshape(-1, kind.size)
    assert kind.is_exact(x).tolist() == (back == x.reshape(-1, kind.size)).all(axis=1).tolist()


@KINDS
@given(b=any_blocks)
@settings(deadline=None)
def test_any_bytes_decode_and_pack_again(kind, b):
    lanes, d = kind.unpack(b)
    assert (np.abs(lanes.reshape(-1, 4)).sum(axis=1) == 3).all()
    assert (kind.pack(lanes, d) == b).all()
    assert kind.dequantize(b).shape == (b.size // kind.bytes * kind.size,)


@KINDS
def test_leading_axes_and_chunks(kind):
    """More weights than one chunk, with a non-contiguous axis."""
    x = np.random.default_rng(0).standard_normal((2, 384, 4096)).astype(np.float32)[:, ::2]
    packed = kind.quantize(x)
    assert packed.shape == (2, 192, 4096 // kind.size * kind.bytes)
    assert (packed[1, 100] == kind.quantize(x[1, 100])).all()
    assert (kind.dequantize(packed)[1, 191] == kind.dequantize(packed[1, 191])).all()
    assert kind.is_exact(kind.dequantize(packed)).all()


@KINDS
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(kind, dtype):
    x = np.random.default_rng(0).standard_normal(128).astype(dtype)
    lanes, scale = ternary.sparse_absmean(x.astype(np.float64), kind.size)
    assert (kind.quantize(x) == kind.pack(lanes, scale.astype(np.float16))).all()


@KINDS
def test_mean_is_rounded_once(kind):
    """A mean just above the middle of two halves that float32 would first round onto the middle."""
    x = np.where(np.arange(128) % 4 == 0, 0, 1).astype(np.float64)
    x[x > 0] = 1 + 2**-11 + 2**-40  # halves near 1 are 2^-10 apart
    assert kind.unpack(kind.quantize(x))[1][0] == np.float16(1 + 2**-10)
    assert np.float16(np.float32(x[1])) == 1


@KINDS
@pytest.mark.parametrize("value, cause", [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (1e5, "beyond fp16")])
def test_what_no_block_can_hold_is_an_error_that_names_the_row(kind, value, cause):
    x = np.ones((3, 2, 256), np.float32)
    x[1, 1, 128:] = value
    with pytest.raises(QuantizeError, match=rf"row 3: .*{cause}") as error:
        kind.quantize(x)
    assert error.value.row == 3
    assert kind.is_exact(x)[1, 1].tolist() == [False] * (256 // kind.size)


@KINDS
def test_the_largest_mean_that_fits(kind):
    assert kind.unpack(kind.quantize(np.full(128, 65519.0)))[1][0] == 65504
    with pytest.raises(QuantizeError):
        kind.quantize(np.full(128, 65520.0))


@pytest.mark.parametrize("call, argument, message", [
    (tq1_25.quantize, np.zeros((2, 130), np.float32), r"\(2, 130\).*128"),
    (tq1_25.quantize, np.zeros((), np.float32), r"\(\)"),
    (tq1_25.quantize, np.zeros(128, np.int32), "int32"),
    (tq1_25.is_exact, np.zeros(64, np.float32), r"\(64,\)"),
    (tq1_25.dequantize, np.zeros(23, np.uint8), r"\(23,\).*22"),
    (tq1_25.dequantize, np.zeros(22, np.int8), "int8"),
    (tq1_25_64.TYPE.quantize, np.zeros((2, 96), np.float32), r"\(2, 96\).*64"),
    (tq1_25_64.TYPE.dequantize, np.zeros(22, np.uint8), r"\(22,\).*12"),
])  # fmt: skip
def test_wrong_arguments_are_named(call, argument, message):
    with pytest.raises(ValueError, match=message):
        call(argument)


@pytest.mark.parametrize("b_row, y, message", [
    (np.zeros(44, np.uint8), np.zeros(128, np.float32), r"\(128,\).*\(256,\)"),
    (np.zeros((2, 22), np.uint8), np.zeros(256, np.float32), r"\(2, 22\)"),
    (np.zeros(22, np.uint8), np.zeros(128, np.float64), "float64"),
])  # fmt: skip
def test_dot_with_wrong_lengths(b_row, y, message):
    with pytest.raises(ValueError, match=message):
        tq1_25.vec_dot(b_row, y)
