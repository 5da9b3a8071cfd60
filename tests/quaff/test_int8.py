import copy

import pytest
import torch
import torch.utils.checkpoint

from sherry_gguf.quaff import int8
from sherry_gguf.quaff.int8 import DynamicLinear, Int8Linear, MixedLinear, QuaffLinear, StaticLinear, int8_product, quantize_rows

INPUTS, OUTPUTS, OUTLIER = 96, 80, 17


def layer(bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(INPUTS, OUTPUTS, bias)


def activations(tokens=50, factor=100.0, seed=1):
    """One channel is `factor` times the mean magnitude."""
    x = torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(seed))
    x[:, OUTLIER] = x[:, OUTLIER].sign() * factor * x.abs().mean()
    return x


def quaff(of, x, **options):
    return QuaffLinear(of, torch.tensor([OUTLIER]), x.abs().amax(0), **options)


def error(y, exact):
    return ((y - exact).norm() / exact.norm()).item()


def all_methods(of, x, granularity):
    maxima = x.abs().amax(0)
    return {
        "naive": Int8Linear(of, granularity),
        "quaff": quaff(of, x, granularity=granularity),
        "static": StaticLinear(of, maxima, granularity),
        "dynamic": DynamicLinear(of, granularity),
        "mixed": MixedLinear(of, granularity),
    }


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.9])
def test_decomposition_before_rounding(monkeypatch, gamma):
    """x' W + x' (s - 1) W of the outlier channels is x W."""
    of, x = layer(), activations()
    made = quaff(of, x, gamma=gamma)
    monkeypatch.setattr(
        int8, "quantize_rows", lambda x, channels, factors: (x.clone().index_copy_(1, channels, x[:, channels] / factors), 1)
    )
    monkeypatch.setattr(made, "multiply", lambda q, scales, dtype: q @ of.weight.t())
    for step in range(3):
        y = made(x * (1 + step))
        assert error(y, of(x * (1 + step))) < 1e-6
    assert made.scaling.factors.item() > 5


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_an_outlier_channel_costs_little(granularity):
    of, x = layer(), activations()
    made = all_methods(of, x, granularity)
    errors = {name: error(m(x), of(x)) for name, m in made.items()}
    # of the part without the outlier channel, which naive int8 rounds away
    small = torch.ones(INPUTS)
    small[OUTLIER] = 0
    rest = {name: (m(x) - of(x)).norm().item() for name, m in made.items()}
    assert rest["quaff"] * 10 <= rest["naive"], errors
    assert all(rest[name] < rest["naive"] / 2 for name in ("quaff", "static", "dynamic", "mixed")), errors


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_gradients_are_those_of_the_weights(granularity):
    of, x = layer(), activations()
    wanted = torch.randn(50, OUTPUTS, generator=torch.Generator().manual_seed(2))
    for name, made in all_methods(of, x, granularity).items():
        x.requires_grad_()
        x.grad = None
        (made(x) * wanted).sum().backward()
        # each weight is off by half a step, and so is each of the gradient's values, in which the steps of the weights are folded
        weight, steps = (made.qweight, made.scale) if name != "dynamic" else int8.quantize_weight(of.weight.detach(), granularity)
        folded = (wanted * steps.t()).abs()
        bound = folded.sum(1, keepdim=True) / 2 + folded.amax(1, keepdim=True) / 254 * weight.abs().float().sum(0)
        bound = bound / made.factors if name == "static" else bound
        assert ((x.grad - wanted @ of.weight.detach()).abs() <= 1.001 * bound).all(), name
        assert not any(p.requires_grad for p in made.parameters())
        x = x.detach()


def test_integers_are_exact():
    generator = torch.Generator().manual_seed(0)
    for m, k, n in [(1, 1, 1), (1, 576, 33), (17, 8, 8), (16, 7, 5), (0, 8, 8), (40, 2000, 3)]:
        a = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
        b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        assert (int8_product(a, b.t()).long() == a.long() @ b.t().long()).all(), (m, k, n)


def test_zeros_stay_zeros():
    of = layer()
    with torch.no_grad():
        of.weight[3] = 0
        of.weight[:, OUTLIER] = 0
    x = activations()
    x[4] = 0
    for name, made in all_methods(of, x, "channel").items():
        y = made(x.requires_grad_())
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all(), name
        assert (y[4] == of.bias).all() and (y[:, 3] == of.bias[3]).all(), name
        assert torch.isfinite(made(torch.zeros(0, INPUTS))).all()
        x = x.detach()


def test_rows_are_quantized_by_chunks_alike(monkeypatch):
    chunk = 7
    monkeypatch.setattr(int8, "CHUNK", 4 * INPUTS * chunk)
    x = activations(tokens=chunk * 2 + 3)
    kept = x.clone()
    channels, factors = torch.tensor([OUTLIER, 20]), torch.tensor([10.0, 2.0])
    q, scales = quantize_rows(x, channels, factors)
    assert (x == kept).all()
    for row in 0, chunk, len(x) - 1:
        one, scale = quantize_rows(x[row : row + 1], channels, factors)
        assert (one == q[row]).all() and scale == scales[row]
    x[:, channels] /= factors
    assert ((q * scales - x).abs() <= scales * 0.5001).all()


def test_factors_follow_in_training_only():
    of, x = layer(), activations()
    made = quaff(of, x, gamma=0.5)
    start = made.scaling.factors.clone()
    made.eval()
    made(x * 4)
    assert (made.scaling.factors == start).all()
    made.train()
    made(x * 4)  # the first step replaces them
    first = made.scaling.factors.clone()
    assert torch.allclose(first, start * 2)
    made(x)
    assert torch.allclose(made.scaling.factors, (first + start) / 2)


def test_a_recomputed_forward_pass_uses_the_same_factors():
    of = layer()
    for reentrant in True, False:
        x = activations().requires_grad_()
        made = quaff(of, x.detach(), gamma=0.5)
        made(x.detach() * 3)
        seen = []
        real = made.multiply
        made.multiply = lambda *args, made=made, seen=seen, real=real: (seen.append(made.scaling.factors.clone()), real(*args))[1]
        torch.utils.checkpoint.checkpoint(lambda x, made=made: made(x).tanh(), x, use_reentrant=reentrant).sum().backward()
        assert len(seen) == 2 and (seen[0] == seen[1]).all()


def test_state_goes_with_the_model():
    of, x = layer(), activations()
    made = quaff(of, x)
    made(x * 2)
    other = quaff(layer(seed=5), x * 7)
    other.load_state_dict(copy.deepcopy(made.state_dict()))
    assert (other.eval()(x) == made.eval()(x)).all()
    half = copy.deepcopy(made).bfloat16()
    assert half.scale.dtype == half.scaling.factors.dtype == torch.float32 and half.qweight.dtype == torch.int8
    assert error(half(x.bfloat16()).float(), of(x)) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16


def test_shapes():
    of, x = layer(bias=False), activations(tokens=12)
    made = quaff(of, x).eval()
    assert made(x.reshape(3, 4, INPUTS)).shape == (3, 4, OUTPUTS)
    assert made(x[0]).shape == (OUTPUTS,)
    assert (made(x.reshape(3, 4, INPUTS)).reshape(12, -1) == made(x)).all()


def test_wrong_options():
    for cls, args in (Int8Linear, ()), (DynamicLinear, ()):
        with pytest.raises(ValueError, match="granularity row: must be channel or tensor"):
            cls(layer(), *args, "row")
    with pytest.raises(ValueError, match="gamma 1.5: must be from 0 to 1"):
        quaff(layer(), activations(), gamma=1.5)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1024, 2), (4, 2500, 6)])
def test_the_product_without_oneDNN_is_exact(shape, monkeypatch):
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, size, dtype=torch.int8, generator=generator) for size in ((m, k), (k, n)))
    a[0], b[:, 0] = 127, 127  # the largest sum
    wanted = (a.long() @ b.long()).int()
    assert torch.equal(int8_product(a, b), wanted)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(int8_product(a, b), wanted)
