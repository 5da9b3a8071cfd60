import copy
import logging

import peft
import pytest
import torch
from quaff_models import batches, llama
from test_quaff_models import CONFIGS, steps

from sherry_gguf import kernels, tq1_25, tq1_25_64
from sherry_gguf.packed.linear import kind_of
from sherry_gguf.quaff import calibrate, quantize_for_finetuning
from sherry_gguf.quaff.packed import PackedLinear


def ternary(weight):
    """The nearest weights that blocks hold exactly."""
    kind = kind_of(weight.shape[1])
    return torch.from_numpy(kernels.dequantize(kernels.quantize(weight.detach().numpy(), kind=kind), kind=kind))


def sherry(**options):
    """A model as training with Sherry leaves it."""
    model = llama(**options)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.copy_(ternary(layer.weight))
    return model


def packed(method="quaff", **options):
    model = sherry(**options)
    channels = calibrate(model, batches(), threshold=10, budget=0.07)
    return quantize_for_finetuning(model, channels, "tq1_25", method=method)


def test_types_by_rows():
    assert kind_of(256) is tq1_25.TYPE and kind_of(192) is tq1_25_64.TYPE
    with pytest.raises(ValueError, match="100 inputs: rows must be a multiple of 64"):
        kind_of(100)


@pytest.mark.parametrize("inputs, outputs", [(128, 70), (192, 64), (256, 5)])
def test_product_and_gradient(inputs, outputs):
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(ternary(layer.weight))
    x = torch.randn(33, inputs)
    x[:, 9] *= 100
    naive = PackedLinear.of(layer, torch.zeros(0, dtype=torch.int64), torch.zeros(inputs))
    made = PackedLinear.of(layer, torch.tensor([9]), x.abs().amax(0))
    exact = layer(x).detach()
    errors = [(m(x).detach() - exact).norm() / exact.norm() for m in (naive, made)]
    assert errors[1] * 5 < errors[0]  # in Q8_0 only the 32 channels of a block share the outlier's scale
    wanted = torch.randn(33, outputs)
    x.requires_grad_()
    (made(x) * wanted).sum().backward()
    assert torch.allclose(x.grad, wanted @ layer.weight.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(made.outlier_weights(), layer.weight.detach()[:, [9]])


def test_memory_is_the_blocks():
    layer = torch.nn.Linear(1024, 512, bias=False)
    made = PackedLinear.of(layer, torch.tensor([1, 2, 3]), torch.ones(1024))
    size = sum(b.numel() * b.element_size() for b in made.buffers())
    assert made.qweight.numel() * 8 == 1.375 * 1024 * 512 and size * 8 < 1.38 * 1024 * 512


@pytest.mark.parametrize("method", ["quaff", "naive"])
def test_logits_stay_near(method):
    exact, made = sherry().eval(), packed(method).eval()
    batch = next(batches(seed=7))
    with torch.no_grad():
        a, b = exact(**batch).logits, made(**batch).logits
    assert (a - b).norm() / a.norm() < (0.4 if method == "naive" else 0.08)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_adapters_train_save_and_load(name, tmp_path):
    model = peft.get_peft_model(packed(), CONFIGS[name])
    model.train()
    fixed = next(batches(seed=3))
    losses = steps(model, 12, same=True)
    assert losses[-1] < losses[0] - 0.01, losses
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(model.state_dict())
    again = peft.PeftModel.from_pretrained(packed(), tmp_path)
    again.load_state_dict(state)
    assert torch.allclose(model.eval()(**fixed).logits, again.eval()(**fixed).logits, atol=1e-5)


def test_weights_that_are_not_ternary_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        packed_by_hand = quantize_for_finetuning(llama(), None, "tq1_25", method="naive")
    assert isinstance(packed_by_hand.model.layers[0].mlp.up_proj, PackedLinear)
    assert "14 layers are not 3:4 sparse ternary; packing them loses" in caplog.text and "mlp.down_proj (2 blocks)" in caplog.text
    caplog.clear()
    packed()
    assert not caplog.text


def test_wrong_arguments():
    with pytest.raises(ValueError, match="method static with base tq1_25: must be quaff or naive"):
        quantize_for_finetuning(llama(), None, "tq1_25", method="static")
    model = llama(intermediate_size=100)
    with pytest.raises(ValueError, match="down_proj: 100 inputs: .*; name it in `keep`, or use base int8"):
        quantize_for_finetuning(model, None, "tq1_25", method="naive")
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
