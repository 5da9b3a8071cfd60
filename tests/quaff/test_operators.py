"""The operators on packed weights: forward as the NumPy reference, gradients, fake kernels, and what they refuse."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from sherry_gguf import blocks, kernels
from sherry_gguf.packed import operators
from sherry_gguf.packed.operators import KINDS, packed_columns, packed_linear, packed_linear_transposed

each_kind = pytest.mark.parametrize("name", KINDS)
ROWS = [1, 63, 64, 65, 200]
U = 2.0**-24  # half a unit in the last place of float32


class Packed:
    """A random matrix: its bytes as the operators take them, and its weights, float64."""

    def __init__(self, name, rows, seed=0, width=3, scales=None):
        rng, kind = np.random.default_rng(seed), KINDS[name]
        n = width * kind.size
        b = rng.integers(0, 256, (rows, width, kind.bytes), dtype=np.uint8)
        d = rng.exponential(size=(rows, width)) if scales is None else rng.choice(scales, (rows, width))
        b[..., -2:] = np.ascontiguousarray(d.astype("<f2"))[..., None].view(np.uint8)
        b = b.reshape(rows, -1)
        self.kind, self.b, self.w = kind, b, kind.dequantize(b).astype(np.float64)
        self.args = torch.from_numpy(kernels.repack(b, kind)), name, rows, n
        self.rows, self.n = rows, n

    def reference(self, x):
        """What the product must be, and the sum of its terms' magnitudes: float64 (tokens, rows)."""
        lanes, d = self.kind.unpack(self.b)
        out = np.empty((len(x), self.rows))
        for i, row in enumerate(self.kind.to_groups(x)):
            q8_0 = quants.quantize(row, GGMLQuantizationType.Q8_0).reshape(-1, blocks.Q8_0_BYTES)
            out[i] = [blocks.dot_q8_0(one, of, q8_0) for one, of in zip(self.kind.to_groups(lanes), d)]
        return out, np.abs(x).astype(np.float64) @ np.abs(self.w).T


def exact_inputs(tokens, n, seed=0):
    """Activations whose Q8_0 scales are powers of two, so that sums in float32 are exact."""
    q = np.random.default_rng(seed).integers(-127, 128, (tokens, n // 32, 32))
    q[..., 0] = 127
    return (q * np.random.default_rng(seed).choice([0.25, 1, 2], (tokens, n // 32, 1))).astype(np.float32).reshape(tokens, n)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ---- forward ----


@each_kind
@pytest.mark.parametrize("isa", kernels.available())
@pytest.mark.parametrize("rows", ROWS)
def test_forward_is_exactly_the_reference(name, rows, isa, threads, monkeypatch):
    monkeypatch.setenv("SHERRY_ISA", isa)
    packed = Packed(name, rows, scales=[0, 0.5, 1, 2])
    for tokens in 1, 2, 5, 40:
        x = exact_inputs(tokens, packed.n)
        if isa != "scalar":  # which does without repacked rows, and so without the order of STQ1_0's groups
            x = packed.kind.from_groups(x)
            assert (packed.reference(x)[0] == x @ packed.w.T).all()
        found = packed_linear(torch.from_numpy(x), *packed.args)
        assert found.dtype == torch.float32 and found.shape == (tokens, rows)
        assert (found.numpy() == x @ packed.w.T).all()


@each_kind
@pytest.mark.parametrize("rows", ROWS)
def test_forward_of_any_scales_within_the_rounding(name, rows, threads):
    packed = Packed(name, rows, width=5)
    x = np.random.default_rng(1).standard_normal((20, packed.n)).astype(np.float32)
    expected, terms = packed.reference(x)
    assert (np.abs(packed_linear(torch.from_numpy(x), *packed.args).numpy() - expected) <= 1e-5 * terms).all()


@each_kind
def test_forward_of_bf16_strides_and_more_axes(name):
    packed = Packed(name, 65, scales=[0.5, 1])
    x = torch.from_numpy(exact_inputs(6, packed.n)).to(torch.bfloat16)
    assert (x.float().numpy() == exact_inputs(6, packed.n)).all()
    whole = packed_linear(x.float(), *packed.args)
    assert packed_linear(x, *packed.args).dtype == torch.bfloat16
    assert (packed_linear(x, *packed.args) == whole.to(torch.bfloat16)).all()
    assert (packed_linear(x.reshape(2, 3, -1), *packed.args) == whole.to(torch.bfloat16).reshape(2, 3, 65)).all()
    assert (packed_linear(x.float().T.contiguous().T, *packed.args) == whole).all()
    assert (packed_linear(x.float().repeat_interleave(2, 1)[:, ::2], *packed.args) == whole).all()
    assert (packed_linear(x.float()[0], *packed.args) == whole[0]).all()


@each_kind
def test_no_tokens_and_zeros(name):
    packed = Packed(name, 70)
    assert packed_linear(torch.empty(2, 0, packed.n), *packed.args).shape == (2, 0, 70)
    assert packed_linear_transposed(torch.empty(0, 70), *packed.args).shape == (0, packed.n)
    x = torch.zeros(3, packed.n, requires_grad=True)
    out = packed_linear(x, *packed.args)
    out.backward(torch.zeros(3, 70))
    assert not out.any() and not x.grad.any()


@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_nan_in_its_row_only(name, value):
    packed = Packed(name, 70)
    x = torch.ones(20, packed.n)
    clean = packed_linear(x, *packed.args)
    x[3, 5] = value
    found, others = packed_linear(x, *packed.args), torch.arange(20) != 3
    assert found[3].isnan().all() and (found[others] == clean[others]).all()


# ---- gradient ----


def bound(packed, grad, rounded=False):
    """The gradient in float64, and how far off a float32 dot product of `rows` terms may be: rows * u of their magnitudes (Higham, 3.1);
    for bfloat16 also its rounding to 8 bits."""
    exact = grad @ packed.w
    error = 1.01 * packed.rows * U * (np.abs(grad) @ np.abs(packed.w))
    return exact, error + (2.0**-8 * (np.abs(exact) + error) if rounded else 0)


@each_kind
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_the_dequantized_product(name, rows, dtype, threads):
    packed = Packed(name, rows, width=4)
    x = torch.randn(2, 7, packed.n, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    grad = torch.randn(2, 7, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed_linear(x, *packed.args).backward(grad)
    dense = x.detach().double().requires_grad_()
    torch.nn.functional.linear(dense, torch.from_numpy(packed.w)).backward(grad.double())
    exact, most = bound(packed, grad.double().numpy().reshape(14, rows), dtype == torch.bfloat16)
    assert x.grad.dtype == dtype and np.allclose(dense.grad.numpy().reshape(exact.shape), exact, rtol=1e-12, atol=1e-12)
    assert (np.abs(x.grad.double().numpy().reshape(exact.shape) - dense.grad.numpy().reshape(exact.shape)) <= most).all()


@each_kind
def test_gradient_in_strips(name, threads, monkeypatch):
    """Strips of one block, of two and of all columns; the last one is shorter. Gradients may have any strides."""
    packed = Packed(name, 130, width=3)
    grad = torch.randn(5, 130, generator=torch.Generator().manual_seed(0))
    for width in 0, 1, 2, 3:
        monkeypatch.setattr(operators, "STRIP", 4 * 130 * packed.kind.size * width + 1)
        for given in grad, grad.T.contiguous().T, grad[:1].expand(5, 130):
            exact, most = bound(packed, given.double().numpy())
            assert (np.abs(packed_linear_transposed(given, *packed.args).double().numpy() - exact) <= most).all()


@each_kind
def test_gradient_through_more_of_a_graph(name):
    packed = Packed(name, 65)
    x = torch.randn(4, packed.n, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (3 * packed_linear(2 * x, *packed.args)).sum().backward()
    exact, most = bound(packed, np.full((4, 65), 6.0))
    assert (np.abs(x.grad.double().numpy() - exact) <= most).all()
    with torch.no_grad():
        assert not packed_linear(x, *packed.args).requires_grad
    assert not packed_linear(x.detach(), *packed.args).requires_grad


# ---- columns ----


@each_kind
@pytest.mark.parametrize("rows", ROWS)
def test_columns_are_those_of_the_weights(name, rows):
    packed = Packed(name, rows)
    for channels in [], [0], [packed.n - 1, 0, 5, 5], list(range(packed.n)):
        found = packed_columns(*packed.args, torch.tensor(channels, dtype=torch.int64))
        assert found.dtype == torch.float32 and (found.numpy() == packed.w[:, channels]).all()


# ---- torch.library ----


@each_kind
def test_opcheck(name):
    packed = Packed(name, 65)
    for x in torch.randn(3, packed.n), torch.randn(2, 3, packed.n, requires_grad=True), torch.randn(3, packed.n, dtype=torch.bfloat16):
        torch.library.opcheck(packed_linear, (x, *packed.args))
    for grad in torch.randn(3, 65), torch.randn(2, 3, 65, dtype=torch.bfloat16):
        torch.library.opcheck(packed_linear_transposed, (grad, *packed.args))
    torch.library.opcheck(packed_columns, (*packed.args, torch.tensor([0, 3])))


def test_they_are_registered():
    packed = Packed("TQ1_25", 65)
    x = torch.randn(3, packed.n)
    assert torch.ops.sherry_gguf.packed_linear(x, *packed.args).equal(packed_linear(x, *packed.args))
    meta = torch.ops.sherry_gguf.packed_linear(x.to("meta"), packed.args[0].to("meta"), *packed.args[1:])
    assert meta.device.type == "meta" and meta.shape == (3, 65)


# ---- refusals ----


@pytest.mark.parametrize("changed, message", [
    (dict(x=torch.zeros(3, 383)), r"x has shape \(3, 383\), the weights need \(..., 384\)"),
    (dict(x=torch.zeros(())), r"x has shape \(\)"),
    (dict(x=torch.zeros(3, 384, dtype=torch.float64)), "x is torch.float64, not torch.float32 or torch.bfloat16"),
    (dict(x=torch.zeros(3, 384, dtype=torch.int8)), "x is torch.int8"),
    (dict(weight=torch.zeros(4290)), "packed weights are torch.float32, not torch.uint8"),
    (dict(weight=torch.zeros(4289, dtype=torch.uint8)), r"\(4289,\), 65 rows of 384 weights need uint8 \(4290,\)"),
    (dict(weight=torch.zeros(65, 66, dtype=torch.uint8)), r"\(65, 66\)"),
    (dict(kind="Q4_0"), "kind is 'Q4_0', not one of TQ1_25, TQ1_25_64, STQ1_0"),
    (dict(kind="TQ1_25_64"), "need uint8"),
    (dict(rows=64), r"64 rows of 384 weights need uint8"),
    (dict(rows=-1), "-1 rows"),
    (dict(x=torch.zeros(3, 100), columns=100), "rows are not whole blocks of 128"),
])  # fmt: skip
def test_wrong_arguments_raise_with_words(changed, message):
    given = dict(x=torch.zeros(3, 384), weight=torch.zeros(4290, dtype=torch.uint8), kind="TQ1_25", rows=65, columns=384)
    assert packed_linear(**given).shape == (3, 65)
    with pytest.raises((ValueError, RuntimeError), match=message):
        packed_linear(**given | changed)


def test_wrong_gradients_and_channels_raise_with_words():
    packed = Packed("TQ1_25", 65)
    with pytest.raises(ValueError, match=r"grad has shape \(3, 64\), the weights need \(..., 65\)"):
        packed_linear_transposed(torch.zeros(3, 64), *packed.args)
    for channels, message in [
        (torch.tensor([0, 384]), "channel 384 of 384"),
        (torch.tensor([-1]), "channel -1 of 384"),
        (torch.tensor([1], dtype=torch.int32), "channels are int32"),
        (torch.tensor([[1]]), r"int64 \(1, 1\), not int64 \(k,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_columns(*packed.args, channels)
