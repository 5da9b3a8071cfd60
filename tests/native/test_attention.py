"""The attention kernels against float64, for every instruction set, within bounds that follow from the arithmetic."""

import itertools

import numpy as np
import pytest
from attention_reference import KEYS, causal, operands, reference

from sherry_gguf import attention, kernels

ISAS = attention.available()
PANEL = 16  # of attention.h
TYPES = ["f16", "bf16", "q8_0"]
SIZES = [64, 80, 96, 128, 192, 256]

each_isa = pytest.mark.parametrize("isa", ISAS)


def check(isa, q, k, v, mask=None, sinks=None, threads=1, scratch=None, **options):
    options = {"scale": q.shape[-1] ** -0.5} | options
    exact, bound = reference(q, k, v, mask, sinks, parts=threads, **options)
    found = attention.attend(q, k, v, mask, sinks, isa=isa, threads=threads, scratch=scratch, **options)
    assert found.shape == exact.shape
    worse = abs(found - exact) > bound
    assert not worse.any() and not np.isnan(found).any(), (np.argwhere(worse)[:3], abs(found - exact).max(), bound.min())
    return found


def test_constants_of_c_and_python_are_equal():
    lib = kernels.lib
    assert (lib.SHERRY_ATTENTION_KEYS, lib.SHERRY_ATTENTION_PANEL, lib.SHERRY_ATTENTION_MAX_SIZE) == (KEYS, PANEL, max(SIZES))


def test_every_set_but_scalar_has_attention():
    assert ISAS == [isa for isa in kernels.available() if isa != "scalar"]


@each_isa
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", TYPES)
def test_sizes_and_lengths(isa, kind, size):
    """One row, few rows and many, lengths around those of the loops."""
    if kind == "q8_0" and size % 32:
        pytest.skip("Q8_0 has blocks of 32")
    rng = np.random.default_rng(size)
    for tokens, keys in itertools.product([1, 2, 9, 40], [1, 5, 16, 63, 64, 65, 131]):
        check(isa, *operands(rng, kind, tokens=tokens, keys=keys, size=size), causal(min(tokens, keys), keys) if tokens <= keys else None)


@each_isa
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 71])
def test_queries_that_share_keys(isa, group):
    rng = np.random.default_rng(group)
    for tokens in 1, 2, 5, 33:
        check(isa, *operands(rng, heads=2 * group, kv_heads=2, tokens=tokens, keys=90), causal(tokens, 90))


@each_isa
@pytest.mark.parametrize("threads", [2, 3, 4, 5, 8, 16, 64])
def test_threads(isa, threads):
    """Heads and keys are split among threads, also where most threads get nothing."""
    rng = np.random.default_rng(threads)
    for tokens, keys, kv_heads in itertools.product([1, 2, 20], [1, 40, 700], [1, 2, 6]):
        options = {"sinks": rng.standard_normal(12, np.float32)} if keys == 700 else {}
        check(isa, *operands(rng, heads=12, kv_heads=kv_heads, tokens=tokens, keys=keys), threads=threads, **options)


@each_isa
def test_little_scratch_takes_more_rounds(isa):
    rng = np.random.default_rng(0)
    q, k, v = operands(rng, streams=3, heads=8, kv_heads=4, tokens=2, keys=200)
    for threads in 1, 2, 5, 8:
        results = [check(isa, q, k, v, causal(2, 200), threads=threads, scratch=scratch) for scratch in (8 << 10, 12 << 10, 1 << 20)]
        assert all((result == results[0]).all() for result in results)  # the same operations
    with pytest.raises(ValueError, match="head sizes 64 and 64 with 1024 bytes of scratch"):
        attention.attend(q, k, v, isa=isa, scratch=1024)


@each_isa
def test_tiles_of_fewer_rows(isa):
    """With many threads or little scratch, tiles have 16, 32 or 48 rows."""
    rng = np.random.default_rng(1)
    q, k, v = operands(rng, tokens=50, keys=150)
    for threads, scratch in itertools.product([1, 2, 3, 4], [52 << 10, 64 << 10, 80 << 10]):
        check(isa, q, k, v, causal(50, 150), threads=threads, scratch=scratch)


@each_isa
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_options(isa, tokens):
    rng = np.random.default_rng(tokens)
    q, k, v = operands(rng, heads=12, kv_heads=4, tokens=tokens, keys=300)
    mask, sinks = causal(tokens, 300), rng.standard_normal(12, np.float32) * 4
    biased = (mask + rng.standard_normal(mask.shape)).astype(np.float16)
    distance = np.where(np.isfinite(mask), -np.arange(300)[::-1], -np.inf).astype(np.float16)
    check(isa, q, k, v, biased)
    check(isa, q, k, v, mask, sinks)
    check(isa, q, k, v, mask, softcap=2.0)
    check(isa, q, k, v, mask, softcap=50.0, scale=1.0)
    for max_bias in 1.0, 8.0:
        check(isa, q, k, v, distance, max_bias=max_bias)
    check(isa, q, k, v, biased, sinks, softcap=20.0, max_bias=8.0, scale=0.3, threads=3)
    check(isa, q, k, v, biased, np.full(12, -np.inf, np.float32))
    check(isa, q, k, v, mask, scale=0.0)
    check(isa, q, k, v, mask, scale=-2.0)


@each_isa
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("keys", [1, 5, 65, 301])
def test_soft_cap_of_any_number_of_keys(isa, keys, tokens):
    """What completes the last vector of keys is no key, also where the cap is close to the scores."""
    rng = np.random.default_rng(keys)
    for heads in 1, 2, 3, 4, 5:
        q, k, v = operands(rng, heads=heads, kv_heads=1, tokens=tokens, keys=keys)
        check(isa, q, k, v, softcap=2.0)
        check(isa, q, -abs(k), v, softcap=2.0, scale=-8.0)
        part = np.zeros((1, 1, tokens, keys), np.float16)
        part[..., keys // 3 + 1 :] = -np.inf
        check(isa, abs(q), -abs(k), v, part, softcap=30.0, scale=8.0)


@each_isa
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_masked_keys_that_are_not_numbers(isa, tokens):
    """Another sequence's keys lie between ours."""
    rng = np.random.default_rng(tokens)
    q, k, v = operands(rng, tokens=tokens, keys=200)
    seen = rng.random(200) < 0.7
    mask = np.where(seen, 0, -np.inf).astype(np.float16)[None, None, None].repeat(tokens, 2)
    for value in np.nan, np.inf:
        k[:, :, ~seen] = v[:, :, ~seen] = value
        found = attention.attend(q, k, v, mask, isa=isa, threads=2)
        exact, bound = reference(q, k[:, :, seen], v[:, :, seen], mask[..., seen])
        assert (abs(found - exact) <= bound).all()


@each_isa
@pytest.mark.parametrize("tokens", [1, 4, 60])
def test_windows(isa, tokens):
    """Keys outside the window are not even read: there they are not numbers."""
    rng = np.random.default_rng(tokens)
    q, k, v = operands(rng, tokens=tokens, keys=500)
    mask = causal(tokens, 500, window=100)
    mask[..., -37:] = -np.inf  # a cache that is not full
    unseen = np.isinf(mask).all((0, 1, 2))
    k[:, :, unseen] = v[:, :, unseen] = np.nan
    found = attention.attend(q, k, v, mask, isa=isa, threads=2)
    seen = ~unseen
    exact, bound = reference(q, k[:, :, seen], v[:, :, seen], mask[..., seen])
    assert (abs(found - exact) <= bound).all()


@each_isa
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_rows_that_see_nothing_are_zero(isa, tokens):
    rng = np.random.default_rng(tokens)
    q, k, v = operands(rng, tokens=tokens, keys=200)
    mask = np.zeros((1, 1, tokens, 200), np.float16)
    mask[..., ::2, :] = -np.inf
    for threads, sinks in itertools.product([1, 3], [None, np.ones(4, np.float32)]):
        found = check(isa, q, k, v, mask, sinks, threads=threads)
        assert (found[:, ::2] == 0).all() and (tokens == 1 or (found[:, 1::2] != 0).all())
    mask[...] = -np.inf
    assert (check(isa, q, k, v, mask, threads=3) == 0).all()


@each_isa
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_streams_and_masks_of_heads(isa, tokens):
    """Sequences with caches of their own, shared caches, and masks for each stream and head."""
    rng = np.random.default_rng(tokens)
    for streams, kv_streams, mask_streams, mask_heads in [(3, 3, 3, 1), (4, 2, 2, 1), (2, 2, 1, 8), (4, 1, 2, 4), (3, 3, 1, 2)]:
        operand = operands(rng, streams=streams, kv_streams=kv_streams, heads=8, tokens=tokens, keys=130)
        mask = rng.choice([0, -np.inf, 0.5], (mask_streams, mask_heads, tokens, 130)).astype(np.float16)
        for threads in 1, 2, 5:
            check(isa, *operand, mask, threads=threads)


@each_isa
@pytest.mark.parametrize("k_kind, v_kind", list(itertools.permutations(TYPES, 2)))
def test_keys_and_values_of_different_types_and_sizes(isa, k_kind, v_kind):
    rng = np.random.default_rng(0)
    for tokens in 1, 2, 20:
        check(isa, *operands(rng, k_kind, v_kind, tokens=tokens, size=192, v_size=128))
        check(isa, *operands(rng, k_kind, v_kind, tokens=tokens, size=64, v_size=256))


@each_isa
@pytest.mark.parametrize("kind", TYPES)
def test_long_contexts(isa, kind):
    rng = np.random.default_rng(0)
    check(isa, *operands(rng, kind, keys=8192, tokens=1), causal(1, 8192))
    check(isa, *operands(rng, kind, keys=8192 + 7, tokens=16, heads=2), causal(16, 8199), threads=3)


@each_isa
def test_scores_of_any_magnitude(isa):
    """Softmax of large scores, of scores whose exp vanishes, and of a maximum that grows with every chunk."""
    rng = np.random.default_rng(0)
    for tokens in 1, 20:
        q, k, v = operands(rng, tokens=tokens, keys=400)
        check(isa, q, k, v, scale=30.0)
        check(isa, q, k, v, scale=1e-6)
        check(isa, q, k, v, np.linspace(-200, 0, 400, dtype=np.float16)[None, None, None].repeat(tokens, 2))
        check(isa, q, k, v, np.linspace(0, -200, 400, dtype=np.float16)[None, None, None].repeat(tokens, 2))


@each_isa
@pytest.mark.parametrize("tokens", [1, 20])
def test_not_a_number_stays_visible(isa, tokens):
    q, k, v = operands(np.random.default_rng(0), tokens=tokens, keys=70)
    for broken in q, k, v:
        kept = broken[0, 0, 0, 5]
        broken[0, 0, 0, 5] = np.nan
        found = attention.attend(q, k, v, isa=isa)
        broken[0, 0, 0, 5] = kept
        assert np.isnan(found).any()


def test_what_is_left_to_llama_cpp():
    rng = np.random.default_rng(0)
    for size, kind in [(72, "f16"), (8, "bf16"), (272, "f16"), (288, "q8_0")]:
        with pytest.raises(ValueError, match=f"head sizes {size} and {size} with .* llama.cpp's code must do it"):
            attention.attend(*operands(rng, kind, size=size), isa=ISAS[0])


def shifted(x):
    """A copy one byte beyond an address where it would be aligned."""
    size = x.nbytes
    memory = kernels.aligned(size + 1)
    memory[1:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return np.frombuffer(memory, x.dtype, x.size, offset=1).reshape(x.shape)


def test_wrong_arguments():
    rng = np.random.default_rng(0)
    q, k, v = operands(rng)
    q8_0 = operands(rng, "q8_0")[1]
    mask, sinks, twice = causal(3, 100), np.zeros(4, np.float32), np.repeat(k, 2, axis=-1)
    for arguments, message in [
        ((q.astype(np.float64), k, v), "they do not belong together"),
        ((q[..., :32], k, v), "they do not belong together"),
        ((q, k, v[:, :, :50]), "they do not belong together"),
        ((q[:, :3], k, v), "they do not belong together"),
        ((q, k.astype(np.float32), v), "keys or values are float32"),
        ((q, k, v, np.zeros((1, 1, 3, 99), np.float16)), "the mask is float16"),
        ((q, k, v, np.zeros((1, 1, 3, 100), np.float32)), "the mask is float32"),
        ((q, k, v, None, np.zeros(3, np.float32)), "the sinks are float32"),
        # strides
        ((q, twice[..., ::2], v), "k: the last axis is not contiguous"),
        ((np.repeat(q, 2, axis=-1)[..., ::2], k, v), "q: the last axis is not contiguous"),
        ((q, k, v, np.repeat(mask, 2, axis=-1)[..., ::2]), "the mask: the last axis is not contiguous"),
        ((q, k, v, None, np.repeat(sinks, 2)[::2]), "the sinks: the last axis is not contiguous"),
        # addresses
        ((shifted(q), k, v), "q: not aligned"),
        ((q, shifted(k), v), "k: not aligned"),
        ((q, k, shifted(v)), "v: not aligned"),
        ((q, shifted(q8_0), v), "k: not aligned"),
        ((q, k, v, shifted(mask)), "the mask: not aligned"),
        ((q, k, v, None, shifted(sinks)), "the sinks: not aligned"),
        # dtypes
        ((q.astype(">f4"), k, v), "they do not belong together"),
        ((q, k.astype(">f2"), v), "keys or values are >f2"),
        ((q, k, v, mask.astype(">f2")), "the mask is >f2"),
        ((q, k, v, None, sinks.astype(">f4")), "the sinks are >f4"),
        ((q, np.zeros((1, 2, 100, 70), np.uint8), v), "whole blocks of 34"),
        # shapes
        ((q[0], k, v), "q has the shape .*, not four axes"),
        ((q, k[0], v), "k has the shape .*, not four axes"),
        ((q, k, v[None]), "v has the shape .*, not four axes"),
        ((q, k, v, mask[0]), "the mask has the shape .*, not four axes"),
        ((q, k, v, None, sinks[None]), "the sinks are float32"),
        ((q.tolist(), k, v), "q is float64"),
        # empty axes
        ((q[:0], k, v), "q has the shape .*at least 1"),
        ((q[:, :0], k, v), "q has the shape .*at least 1"),
        ((q[:, :, :0], k, v), "q has the shape .*: no tokens"),
        ((q[..., :0], k[..., :0], v), "head sizes 0 and 64"),
        ((q, k[:0], v[:0]), "k has the shape .*at least 1"),
        ((q, k[:, :0], v[:, :0]), "k has the shape .*at least 1"),
        ((q, k, v, mask[:0]), "the mask has the shape .*at least 1"),
        ((q, k, v, mask[:, :0]), "the mask has the shape .*at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention.attend(*arguments)
    for threads in 0, -1, 513, 1 << 40:
        with pytest.raises(ValueError, match=f"{threads} threads: must be from 1 to 512"):
            attention.attend(q, k, v, threads=threads)
    for scratch in -64, 1 << 63:
        with pytest.raises(ValueError, match=f"{scratch} bytes of scratch: must be from 0 to"):
            attention.attend(q, k, v, scratch=scratch)
    with pytest.raises(ValueError, match="instruction set scalar has no attention"):
        attention.attend(q, k, v, isa="scalar")


@pytest.mark.parametrize("axis", ["streams", "heads", "tokens", "kv_streams", "kv_heads"])
def test_no_plan_for_nothing(axis):
    sizes = dict(streams=1, heads=4, tokens=3, kv_streams=1, kv_heads=2, keys=9, k_size=64, v_size=64)
    plan = kernels.ffi.new("struct sherry_attention_plan *")

    def planned(**changed):
        a = kernels.ffi.new("struct sherry_attention *", sizes | changed)
        return kernels.lib.sherry_attention_make_plan(a, 1, 1 << 20, plan)

    assert planned() and not planned(**{axis: 0})


@each_isa
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_no_keys(isa, tokens):
    q, k, v = operands(np.random.default_rng(0), tokens=tokens)
    for mask, sinks in itertools.product([None, np.zeros((1, 1, tokens, 0), np.float16)], [None, np.ones(4, np.float32)]):
        for threads in 1, 3:
            assert (attention.attend(q, k[:, :, :0], v[:, :, :0], mask, sinks, isa=isa, threads=threads) == 0).all()
