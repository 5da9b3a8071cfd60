import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sherry_gguf import ternary

finite = st.floats(-(2.0**100), 2.0**100, width=32)
rows = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([128, 256])), elements=finite)


def test_every_pattern_has_its_own_code():
    lanes = np.array([p for p in itertools.product((-1, 0, 1), repeat=4) if p.count(0) == 1], np.int8)
    codes = ternary.lanes_to_codes(lanes)
    assert sorted(codes) == list(range(32))
    assert (ternary.codes_to_lanes(codes) == lanes).all()


def test_code_bits_are_those_of_the_format():
    for code in range(32):
        lanes = ternary.codes_to_lanes(np.array(code))
        zero = int(np.flatnonzero(lanes == 0)[0])
        n0, n1, n2 = (lanes[i] for i in range(4) if i != zero)
        assert code == (n0 < 0) << 4 | zero << 2 | (n2 != n0) << 1 | (n1 != n0)


@pytest.mark.parametrize("bad", [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 2, 1, 1], [0, 1, 1, -2], [-128, 0, 1, 1]])
def test_other_lanes_are_refused_by_place(bad):
    lanes = np.array([[0, 1, 1, 1], bad], np.int8)
    with pytest.raises(ValueError, match=r"group \(1,\) is"):
        ternary.lanes_to_codes(lanes)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_lanes_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=np.dtype(dtype).name):
        ternary.lanes_to_codes(np.array([0, 1, 1, 1], dtype))


def plain_sparse_absmean(row, group_size):
    """The definition, weight by weight (docs/format.md, "Quantizing a block")."""
    lanes, scales = [], []
    for start in range(0, len(row), group_size):
        total = 0.0
        for group in range(start, start + group_size, 4):
            magnitudes = [abs(float(v)) for v in row[group : group + 4]]
            zero = magnitudes.index(min(magnitudes))
            lanes += [0 if i == zero else -1 if row[group + i] < 0 else 1 for i in range(4)]
            for i in range(4):
                if i != zero:
                    total += magnitudes[i]
        scales.append(total / (group_size // 4 * 3))
    return lanes, scales


@given(rows)
@settings(max_examples=50, deadline=None)
def test_sparse_absmean_is_its_definition(x):
    lanes, scale = ternary.sparse_absmean(x)
    for i, row in enumerate(x):
        expected_lanes, expected_scale = plain_sparse_absmean(row, 128)
        assert lanes[i].tolist() == expected_lanes
        assert scale[i].tolist() == expected_scale


@pytest.mark.parametrize("group_size", [4, 32, 128, 512])
def test_group_sizes(group_size):
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    lanes, scale = ternary.sparse_absmean(x, group_size)
    assert scale.shape == (3, 512 // group_size)
    expected = [plain_sparse_absmean(row, group_size) for row in x]
    assert lanes.tolist() == [e[0] for e in expected] and scale.tolist() == [e[1] for e in expected]


def test_no_other_zeros_and_scale_are_nearer():
    """For the chosen zeros the mean magnitude is the least-squares scale, and no other zero of a group is better."""
    x = np.random.default_rng(1).standard_normal(128)
    lanes, scale = ternary.sparse_absmean(x)
    error = ((x - lanes * scale) ** 2).sum()
    for other in scale * (1 + np.linspace(-0.1, 0.1, 41)):
        assert error <= ((x - lanes * other) ** 2).sum() + 1e-12
    signs = np.sign(x)
    for group, zero in itertools.product(range(0, 128, 4), range(4)):
        moved = lanes.copy()
        moved[group : group + 4] = signs[group : group + 4]
        moved[group + zero] = 0
        best = np.abs(x[moved != 0]).mean()  # each choice with its own best scale
        assert error <= ((x - moved * best) ** 2).sum() + 1e-12


@pytest.mark.parametrize("shape, group_size", [((2, 100), 128), ((128,), 0), ((128,), 6), ((128,), -4), ((), 128)])
def test_sizes_that_do_not_fit(shape, group_size):
    with pytest.raises(ValueError, match="group"):
        ternary.sparse_absmean(np.zeros(shape, np.float32), group_size)
