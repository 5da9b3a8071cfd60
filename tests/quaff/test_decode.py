"""The operators' way on other devices, forced on the CPU: it gives what the C kernels give."""

import numpy as np
import pytest
import torch
from test_operators import ROWS, Packed, bound, each_kind, exact_inputs
from test_packed import packed as packed_model

from sherry_gguf import kernels
from sherry_gguf.blocks import Q8_0_BYTES
from sherry_gguf.packed import operators
from sherry_gguf.packed.decode import decode, round_to_q8_0
from sherry_gguf.packed.operators import KINDS, packed_columns, packed_linear, packed_linear_transposed
from sherry_gguf.repacked import Matrix


@pytest.fixture
def decoded(monkeypatch):
    monkeypatch.setattr(operators, "_by_kernels", lambda weight: False)


@each_kind
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_weights_are_those_of_the_kernels(name, rows):
    kind = KINDS[name]
    for width in 1, 2, 5:
        b = np.random.default_rng(rows).integers(0, 256, (rows, width * kind.bytes), dtype=np.uint8)  # some scales are not finite
        matrix = Matrix.from_blocks(b, kind)
        found = decode(torch.from_numpy(matrix.data), kind, rows, width * kind.size)
        assert found.dtype == torch.float32 and np.array_equal(found.numpy(), matrix.decode(), equal_nan=True)


def q8_0(x, kind):
    """What kernels.quantize_q8_0 makes of x (tokens, n)."""
    rows = np.stack([kernels.quantize_q8_0(row) for row in kind.to_groups(x)]).reshape(-1, Q8_0_BYTES)
    return kind.from_groups((rows[:, 2:].view(np.int8) * np.ascontiguousarray(rows[:, :2]).view("<f2").astype(np.float32)).reshape(x.shape))


@each_kind
def test_activations_are_rounded_as_by_the_kernels(name):
    rng, kind = np.random.default_rng(0), KINDS[name]
    n = 2 * kind.size
    ties = rng.integers(-127, 127, (40, n)) + np.float32(0.5)
    ties[:, ::16] = 127
    scales = np.float32(10.0) ** rng.integers(-3, 4, (200, n // 32, 1))
    for x in ties, (rng.standard_normal((200, n // 32, 32), np.float32) * scales).reshape(200, n), np.zeros((3, n), np.float32):
        x = kind.from_groups(x.astype(np.float32))
        assert (round_to_q8_0(torch.from_numpy(x), kind).numpy() == q8_0(x, kind)).all()


@each_kind
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_those_of_the_kernels(name, rows, decoded):
    packed = Packed(name, rows, scales=[0, 0.5, 1, 2])
    x = packed.kind.from_groups(exact_inputs(5, packed.n))
    assert (packed_linear(torch.from_numpy(x), *packed.args).numpy() == x @ packed.w.T).all()
    packed = Packed(name, rows)
    x = torch.randn(2, 7, packed.n, generator=torch.Generator().manual_seed(0))
    expected, terms = packed.reference(x.numpy().reshape(14, -1))
    for dtype, most in (torch.float32, 1e-5 * terms), (torch.bfloat16, 0.02 * terms):
        found = packed_linear(x.to(dtype), *packed.args)
        assert found.dtype == dtype and (np.abs(found.float().numpy().reshape(14, rows) - expected) <= most).all()
    channels = torch.tensor([packed.n - 1, 0, 5, 5])
    assert (packed_columns(*packed.args, channels).numpy() == packed.w[:, channels]).all()
    assert packed_columns(*packed.args, channels[:0]).shape == (rows, 0)


@each_kind
def test_gradients_are_those_of_the_weights(name, decoded):
    packed = Packed(name, 130)
    x = torch.randn(5, packed.n, requires_grad=True)
    grad = torch.randn(5, 130, generator=torch.Generator().manual_seed(0))
    packed_linear(x, *packed.args).backward(grad)
    exact, most = bound(packed, grad.double().numpy())
    assert (np.abs(x.grad.double().numpy() - exact) <= most).all()
    rough = packed_linear_transposed(grad.to(torch.bfloat16), *packed.args)
    assert rough.dtype == torch.bfloat16
    assert (np.abs(rough.double().numpy() - exact) <= 0.02 * (np.abs(grad.double().numpy()) @ np.abs(packed.w))).all()


@each_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(name, value, decoded):
    packed = Packed(name, 70)
    x = torch.ones(20, packed.n)
    clean = packed_linear(x, *packed.args)
    x[3, 5] = value
    found = packed_linear(x, *packed.args)
    assert found[3].isnan().all() and (found[torch.arange(20) != 3] == clean[0]).all()


@each_kind
def test_opcheck(name, decoded):
    packed = Packed(name, 65)
    for x in torch.randn(3, packed.n), torch.randn(2, 3, packed.n, requires_grad=True), torch.randn(3, packed.n, dtype=torch.bfloat16):
        torch.library.opcheck(packed_linear, (x, *packed.args))
    torch.library.opcheck(packed_linear_transposed, (torch.randn(2, 3, 65), *packed.args))
    torch.library.opcheck(packed_columns, (*packed.args, torch.tensor([0, 3])))


def test_a_model_trains_alike(monkeypatch):
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for by_kernels in True, False:
        monkeypatch.setattr(operators, "_by_kernels", lambda weight, way=by_kernels: way)
        model = packed_model().train()
        embeddings = model.get_input_embeddings().weight.requires_grad_()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append((out.logits.detach(), embeddings.grad))
    for one, other in zip(*found):
        assert (one - other).norm() < 1e-2 * one.norm()  # a last bit moves an activation to its neighbour in Q8_0


def test_wrong_arguments_raise_with_words(decoded):
    given = dict(x=torch.zeros(3, 384), weight=torch.zeros(4290, dtype=torch.uint8), kind="TQ1_25", rows=65, columns=384)
    assert packed_linear(**given).shape == (3, 65)
    for changed, message in [
        (dict(weight=torch.zeros(4289, dtype=torch.uint8)), r"\(4289,\), 65 rows of 384 weights need uint8 \(4290,\)"),
        (dict(weight=torch.zeros(4290)), "packed weights are torch.float32, not torch.uint8"),
        (dict(kind="Q4_0"), "kind is 'Q4_0'"),
        (dict(x=torch.zeros(3, 384, dtype=torch.float16)), "x is torch.float16, not torch.float32 or torch.bfloat16"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_linear(**given | changed)
