import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from vectors import BLOCKS, DOTS, EXACT

from sherry_gguf import ternary, tq1_25
from sherry_gguf.errors import QuantizeError

any_floats = hnp.arrays(np.float32, 256, elements=st.floats(-1e4, 1e4, width=32))
any_blocks = hnp.arrays(np.uint8, st.integers(1, 4).map(lambda n: 22 * n))


@pytest.mark.parametrize("name", BLOCKS)
def test_golden_blocks(name):
    x, block, lanes, d = BLOCKS[name]
    assert (tq1_25.quantize(x) == block).all()
    assert tq1_25.unpack(block)[0].tolist() == lanes
    assert tq1_25.unpack(block)[1].tolist() == [d]
    assert (tq1_25.dequantize(block) == np.float32(d) * np.array(lanes, np.float32)).all()
    assert tq1_25.is_exact(x).tolist() == [name in EXACT]


@pytest.mark.parametrize("i", range(len(DOTS)))
def test_golden_dots(i):
    row, y, q8_0, result = DOTS[i]
    assert tq1_25.vec_dot(row, y) == pytest.approx(result, rel=1e-12)
    packed = b"".join(np.float16(d).tobytes() + np.array(q, np.int8).tobytes() for d, q in q8_0)
    lanes, d = tq1_25.unpack(row)
    assert tq1_25.dot_q8_0(lanes, d, np.frombuffer(packed, np.uint8).reshape(-1, 34)) == tq1_25.vec_dot(row, y)


@given(any_floats)
@settings(deadline=None)
def test_quantizing_what_was_decoded_changes_nothing(x):
    block = tq1_25.quantize(x)
    decoded = tq1_25.dequantize(block)
    # A scale of zero keeps neither signs nor zeros: only such blocks may come back as other bytes.
    again = tq1_25.quantize(decoded)
    assert (tq1_25.dequantize(again) == decoded).all() and tq1_25.is_exact(decoded).all()
    kept = tq1_25.unpack(block)[1] > 0
    assert (again.reshape(-1, 22)[kept] == block.reshape(-1, 22)[kept]).all()


@given(any_floats)
@settings(deadline=None)
def test_exact_means_that_every_value_comes_back(x):
    back = tq1_25.dequantize(tq1_25.quantize(x)).reshape(-1, 128)
    assert tq1_25.is_exact(x).tolist() == (back == x.reshape(-1, 128)).all(axis=1).tolist()


@given(any_blocks)
@settings(deadline=None)
def test_any_bytes_decode_and_pack_again(b):
    lanes, d = tq1_25.unpack(b)
    assert (np.abs(lanes.reshape(-1, 4)).sum(axis=1) == 3).all()
    assert (tq1_25.pack(lanes, d) == b).all()
    assert tq1_25.dequantize(b).shape == (b.size // 22 * 128,)


def test_leading_axes_and_chunks():
    """More weights than one chunk, with a non-contiguous axis."""
    x = np.random.default_rng(0).standard_normal((2, 384, 4096)).astype(np.float32)[:, ::2]
    packed = tq1_25.quantize(x)
    assert packed.shape == (2, 192, 4096 // 128 * 22)
    assert (packed[1, 100] == tq1_25.quantize(x[1, 100])).all()
    assert (tq1_25.dequantize(packed)[1, 191] == tq1_25.dequantize(packed[1, 191])).all()
    assert tq1_25.is_exact(tq1_25.dequantize(packed)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype):
    x = np.random.default_rng(0).standard_normal(128).astype(dtype)
    lanes, scale = ternary.sparse_absmean(x.astype(np.float64))
    assert (tq1_25.quantize(x) == tq1_25.pack(lanes, scale.astype(np.float16))).all()


def test_mean_is_rounded_once():
    """A mean just above the middle of two halves that float32 would first round onto the middle."""
    x = np.where(np.arange(128) % 4 == 0, 0, 1).astype(np.float64)
    x[x > 0] = 1 + 2**-11 + 2**-40  # halves near 1 are 2^-10 apart
    assert tq1_25.unpack(tq1_25.quantize(x))[1][0] == np.float16(1 + 2**-10)
    assert np.float16(np.float32(x[1])) == 1


@pytest.mark.parametrize("value, cause", [(np.nan, "NaN or infinite"), (-np.inf, "NaN or infinite"), (1e5, "beyond fp16")])
def test_what_no_block_can_hold_is_an_error_that_names_the_row(value, cause):
    x = np.ones((3, 2, 256), np.float32)
    x[1, 1, 128:] = value
    with pytest.raises(QuantizeError, match=rf"row 3: .*{cause}") as error:
        tq1_25.quantize(x)
    assert error.value.row == 3
    assert tq1_25.is_exact(x)[1, 1].tolist() == [False, False]


def test_the_largest_mean_that_fits():
    assert tq1_25.unpack(tq1_25.quantize(np.full(128, 65519.0)))[1][0] == 65504
    with pytest.raises(QuantizeError):
        tq1_25.quantize(np.full(128, 65520.0))


@pytest.mark.parametrize("call, argument, message", [
    (tq1_25.quantize, np.zeros((2, 130), np.float32), r"\(2, 130\).*128"),
    (tq1_25.quantize, np.zeros((), np.float32), r"\(\)"),
    (tq1_25.quantize, np.zeros(128, np.int32), "int32"),
    (tq1_25.is_exact, np.zeros(64, np.float32), r"\(64,\)"),
    (tq1_25.dequantize, np.zeros(23, np.uint8), r"\(23,\).*22"),
    (tq1_25.dequantize, np.zeros(22, np.int8), "int8"),
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
