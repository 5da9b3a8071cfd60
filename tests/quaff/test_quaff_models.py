import copy
import gc
from pathlib import Path

import peft
import pytest
import torch
import transformers
from quaff_models import batches, llama

from sherry_gguf.quaff import METHODS, calibrate, load_factors, quantize_for_finetuning, save_factors
from sherry_gguf.quaff.int8 import QuaffLinear
from sherry_gguf.quaff.scaling import TargetedScaling

CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


def quantized(**options):
    model = llama()
    return quantize_for_finetuning(model, calibrate(model, batches(), threshold=10, budget=0.07), **options)


def steps(model, count, optimizer=None, seed=3, same=False):
    """The losses of training steps, on batches of their own or all on the first."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in [next(batches(seed=seed))] * count if same else batches(count, seed=seed):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", METHODS)
def test_logits_stay_near(method):
    exact, made = llama().eval(), quantized(method=method).eval()
    batch = next(batches(seed=7))
    with torch.no_grad():
        a, b = exact(**batch).logits, made(**batch).logits
    assert not any(p.requires_grad for p in made.parameters())
    assert (a - b).norm() / a.norm() < (0.4 if method == "naive" else 0.08)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_trains_saves_and_loads(name, tmp_path):
    base = quantized()
    model = peft.get_peft_model(base, CONFIGS[name])
    model.train()
    fixed = next(batches(seed=3))
    losses = steps(model, 12, same=True)
    assert losses[-1] < losses[0] - 0.01, losses
    model.save_pretrained(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "scaling" in k}
    again = quantized()
    again = peft.PeftModel.from_pretrained(again, tmp_path)
    again.load_state_dict(state, strict=False)
    model.eval(), again.eval()
    assert torch.allclose(model(**fixed).logits, again(**fixed).logits, atol=1e-5)


def test_adapters_cannot_be_merged():
    model = peft.get_peft_model(quantized(), CONFIGS["lora"])
    for safe in False, True:
        with pytest.raises(RuntimeError, match="an adapter cannot be merged into it"):
            model.merge_and_unload(safe_merge=safe)


def test_gradient_checkpointing_changes_nothing():
    results = []
    for reentrant in None, False, True:
        torch.manual_seed(0)
        model = peft.get_peft_model(quantized(), CONFIGS["lora"])
        model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = steps(model, 4)
        results.append((losses, {k: v.clone() for k, v in model.state_dict().items() if "factors" in k}))
    for losses, factors in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        assert all(torch.allclose(factors[k], v) for k, v in results[0][1].items())


def test_resumed_training_gives_the_same():
    def start():
        torch.manual_seed(0)
        model = peft.get_peft_model(quantized(), CONFIGS["lora"])
        model.train()
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = start()
    steps(model, 3, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wanted = steps(model, 3, optimizer, seed=4)
    model, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert steps(model, 3, optimizer, seed=4) == wanted


def test_what_is_replaced():
    model = quantized()
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert len(kinds) == 14 and set(kinds.values()) == {QuaffLinear}
    size = sum(b.numel() * b.element_size() for b in model.model.layers[0].mlp.up_proj.buffers())
    assert size < 128 * 64 * 1.25


def test_factors_of_one_adapter_fit_another(tmp_path):
    trained = peft.get_peft_model(quantized(), CONFIGS["lora"])
    trained.train()
    steps(trained, 2)
    save_factors(trained, tmp_path / "factors.safetensors")
    wanted = [m.factors for m in trained.modules() if isinstance(m, TargetedScaling)]
    for name in None, "prompt", "ia3":
        model = peft.get_peft_model(quantized(), CONFIGS[name]) if name else quantized()
        load_factors(model, tmp_path / "factors.safetensors")
        found = [m.factors for m in model.modules() if isinstance(m, TargetedScaling)]
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    other = quantize_for_finetuning(llama(), calibrate(llama(), batches(), threshold=2, budget=0.1))
    with pytest.raises(ValueError, match="the outlier channels of .* differ: the file belongs to another model or calibration"):
        load_factors(other, tmp_path / "factors.safetensors")


@pytest.mark.parametrize("method", METHODS[:5])
def test_scales_stay_exact_in_bfloat16(method):
    model = quantized(method=method)
    exact = {n: b.clone() for n, b in model.named_buffers() if n.rpartition(".")[2] in ("scale", "factors")}
    model.bfloat16()
    assert exact or method == "dynamic"
    assert all(torch.equal(model.get_buffer(n), b) for n, b in exact.items())


def test_weights_that_are_not_finite_are_refused():
    for base in "int8", "tq1_25":
        model = llama()
        channels = calibrate(model, batches())
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            quantize_for_finetuning(model, channels, base)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_the_checkpoint_does_not_stay_in_memory(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    file = str(tmp_path / "model.safetensors")
    assert file in Path("/proc/self/maps").read_text()
    quantize_for_finetuning(model, calibrate(model, batches()))
    gc.collect()
    assert file not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_not_quantized():
    for method, dtype in ("full", torch.float32), ("bf16", torch.bfloat16):
        model = quantize_for_finetuning(llama(), method=method)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(isinstance(m, QuaffLinear) for m in model.modules())


def test_wrong_arguments():
    model = llama()
    channels = calibrate(model, batches())
    with pytest.raises(ValueError, match="base int4: must be int8 or tq1_25"):
        quantize_for_finetuning(model, channels, "int4")
    with pytest.raises(ValueError, match="method none: must be one of quaff, naive"):
        quantize_for_finetuning(model, channels, method="none")
    with pytest.raises(ValueError, match="needs channels: run calibrate"):
        quantize_for_finetuning(model)
    with pytest.raises(ValueError, match="has 128 inputs, its channels are of"):
        quantize_for_finetuning(llama(hidden_size=128), channels)
    with pytest.raises(ValueError, match="layers.2.* is not in the channels"):
        quantize_for_finetuning(llama(num_hidden_layers=3), channels)
    assert not any(isinstance(m, QuaffLinear) for m in model.modules())
