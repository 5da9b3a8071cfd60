"""Mixed precision: autocast to bfloat16 and models in bfloat16 train as in float32; packed weights refuse float16."""

import peft
import pytest
import torch
from quaff_models import batches
from test_packed import packed
from test_quaff_models import CONFIGS, quantized, steps

BASES = {"int8": quantized, "tq1_25": packed}
COUNT = 8
each_base = pytest.mark.parametrize("base", BASES)


def adapted(base, cast=lambda model: model):
    torch.manual_seed(0)
    return peft.get_peft_model(cast(BASES[base]()), CONFIGS["lora"]).train()


def factors(model):
    return {name: value for name, value in model.named_buffers() if name.endswith(".factors")}


def gradients(model):
    """Of the second matrices of LoRA; those of the first are 0 before the first step."""
    model(**next(batches(seed=5))).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}


def trained(model):
    """The losses of steps on one batch, small ones: larger ones magnify any rounding."""
    return steps(model, COUNT, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), same=True)


@each_base
def test_gradients_under_autocast(base):
    exact = gradients(adapted(base))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(adapted(base))
    assert len(exact) == 14
    for name, grad in exact.items():
        # no loss is scaled, and no gradient is lost
        assert grad.any() and found[name].dtype == torch.float32 and (found[name] - grad).norm() <= 0.1 * grad.norm(), name


@each_base
@pytest.mark.parametrize("way", ["autocast", "model"])
def test_training_in_bfloat16(base, way):
    exact, made = adapted(base), adapted(base, torch.nn.Module.bfloat16 if way == "model" else lambda model: model)
    losses = trained(exact)
    if way == "autocast":  # of the forward pass alone, as accelerate does
        made.forward = torch.autocast("cpu", torch.bfloat16)(made.forward)
    rounded = trained(made)
    assert made.eval()(**next(batches())).logits.dtype == torch.bfloat16
    assert losses[-1] < losses[0] - 0.02
    assert rounded == pytest.approx(losses, abs=0.01)
    assert {p.dtype for name, p in made.named_parameters() if "lora_" in name} == {torch.float32}
    assert len(factors(made)) == 14
    for (name, value), other in zip(factors(made).items(), factors(exact).values()):
        assert value.dtype == torch.float32 and torch.allclose(value, other, rtol=0.1), name


def test_int8_takes_float16():
    exact, made = quantized().eval(), quantized().eval()
    batch = next(batches(seed=5))
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        rounded = made(**batch).loss
    with torch.no_grad():
        assert rounded.item() == pytest.approx(exact(**batch).loss.item(), abs=0.01)


def test_packed_weights_refuse_float16():
    batch = next(batches())
    with pytest.raises(ValueError, match="x is torch.float16, not torch.float32 or torch.bfloat16: use bf16 instead of fp16"):
        packed().half()(**batch)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="use bf16 instead of fp16"):
        adapted("tq1_25")(**batch)
