"""Arenas, monitor, distillation and export in a Trainer: λ by optimizer steps in every way to train, also in two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from sherry_gguf import tq1_25
from sherry_gguf.qat import (
    Arenas,
    ArenasCallback,
    SherryTrainer,
    TrainingMonitor,
    effective_rank,
    fake_quantize,
    prepare,
    quantized_layers,
)
from sherry_gguf.qat.data import Blocks, mean_loss, pack

pytestmark = pytest.mark.slow

STEPS = 8
HERE = Path(__file__).resolve().parent


def model(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            use_cache=False,
            **more,
        )
    )


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    """Learnable sequences: each token follows from the previous one, with some noise."""
    rng = np.random.default_rng(0)
    ids = np.zeros((256, 32), np.int64)
    ids[:, 0] = rng.integers(0, 64, 256)
    for i in range(1, 32):
        ids[:, i] = np.where(rng.random(256) < 0.1, rng.integers(0, 64, 256), (ids[:, i - 1] * 5 + 3) % 64)
    return ids


def arguments(out: Path, **more) -> TrainingArguments:
    settings = dict(max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, use_cpu=True, report_to="none",
                    disable_tqdm=True, save_strategy="no", logging_steps=1, seed=1)  # fmt: skip
    return TrainingArguments(output_dir=str(out), **settings | more)


def lambdas(m) -> list[float]:
    """A list that collects λ in each training pass of the first layer."""
    seen = []
    layer = next(iter(quantized_layers(m).values()))
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.residual) if module.training else None)
    return seen


# -------------------------------------------------------------------------------------------------------------- Arenas


def test_schedule_as_published():
    at = [Arenas().at(step, 100) for step in range(101)]
    assert at[0] == 0 and at[5] == pytest.approx(0.5) and at[10] == 1
    assert at[55] == pytest.approx(0.5) and at[100] == 0
    assert all(a < b for a, b in zip(at[:10], at[1:11])) and all(a > b for a, b in zip(at[10:], at[11:]))


@pytest.mark.parametrize("decay, half", [("cosine", 0.5), ("linear", 0.5), ("exponential", 0.0759)])
def test_schedule_settings(decay, half):
    arenas = Arenas(peak=0.4, warmup=0.0, decay=decay, end=0.5)
    assert arenas.at(0, 1000) == pytest.approx(0.4)
    assert arenas.at(250, 1000) == pytest.approx(0.4 * half, rel=1e-3)
    assert [arenas.at(s, 1000) for s in (500, 999)] == [0, 0]


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(decay="sine"), "decay is 'sine'"),
        (dict(peak=-1), "peak is -1"),
        (dict(peak=math.nan), "peak is nan"),
        (dict(warmup=0.5, end=0.5), "0 <= warmup < end <= 1"),
        (dict(end=1.5), "0 <= warmup < end <= 1"),
    ],
)
def test_schedule_errors(settings, says):
    with pytest.raises(ValueError, match=says):
        Arenas(**settings)


@pytest.mark.parametrize("accumulation, checkpointing", [(1, False), (3, False), (1, True), (2, True)])
def test_lambda_counts_optimizer_steps(tmp_path, blocks, accumulation, checkpointing):
    m = model()
    prepare(m)
    seen = lambdas(m)
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer = SherryTrainer(m, args, train_dataset=Blocks(blocks), arenas=Arenas(peak=0.7, warmup=0.3))
    trainer.train()
    forward = accumulation * (2 if checkpointing else 1)  # checkpointing computes each layer again
    expected = [Arenas(peak=0.7, warmup=0.3).at(step, STEPS) for step in range(STEPS) for _ in range(forward)]
    assert seen == expected and max(seen) > 0.5
    assert {layer.residual for layer in quantized_layers(m).values()} == {0.0}  # after training
    logged = [entry["residual"] for entry in trainer.state.log_history if "residual" in entry]
    assert logged == expected[::forward]


def test_accumulation_and_checkpointing_change_nothing(tmp_path, blocks):
    weights = []
    for more in (dict(per_device_train_batch_size=4), dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
                 dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})):  # fmt: skip
        m = model()
        prepare(m)
        SherryTrainer(m, arguments(tmp_path, **more), train_dataset=Blocks(blocks), arenas=Arenas()).train()
        weights.append(m.model.layers[1].mlp.up_proj.weight.detach())
    assert not torch.allclose(weights[0], model().model.layers[1].mlp.up_proj.weight, atol=1e-3)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=2e-5)  # Adam's steps are 1e-3


def test_label_smoothing_and_accumulation(tmp_path, blocks):
    """The smoothed loss is a mean over the micro-batch, and so is the teacher's part."""
    losses = []
    for more in (dict(per_device_train_batch_size=8), dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)):
        m = model()
        prepare(m)
        trainer = SherryTrainer(m, arguments(tmp_path, label_smoothing_factor=0.1, max_steps=1, logging_steps=1, **more),
                                train_dataset=Blocks(blocks), teacher=model(1))  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] < 5


def test_plain_trainer_takes_the_callback(tmp_path, blocks):
    m = model()
    prepare(m)
    seen = lambdas(m)
    Trainer(m, arguments(tmp_path), train_dataset=Blocks(blocks), callbacks=[ArenasCallback(Arenas())]).train()
    assert seen == [Arenas().at(step, STEPS) for step in range(STEPS)]


def test_evaluation_is_without_residual(tmp_path, blocks):
    m = model()
    prepare(m)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=16)
    evaluated = []

    class Watched(SherryTrainer):
        def evaluate(self, *a, **k):
            result = super().evaluate(*a, **k)
            assert m.model.layers[0].mlp.up_proj.residual > 0
            plain = model()
            plain.load_state_dict({k: v.clone() for k, v in m.state_dict().items()})
            for name in quantized_layers(m):
                plain.get_submodule(name).weight.data.copy_(fake_quantize(m.get_submodule(name).weight.data))
            evaluated.append((result["eval_loss"], mean_loss(plain, blocks[:32])))
            return result

    Watched(m, args, train_dataset=Blocks(blocks), eval_dataset=Blocks(blocks[:32]), arenas=Arenas()).train()
    assert len(evaluated) == 2
    for got, expected in evaluated:
        assert got == pytest.approx(expected, rel=1e-6)


def test_resumed_training_is_the_same(tmp_path, blocks):
    def trainer(out, **more):
        m = model()
        prepare(m)
        seen = lambdas(m)
        args = arguments(tmp_path / out, save_strategy="steps", save_steps=3, **more)
        return SherryTrainer(m, args, train_dataset=Blocks(blocks), arenas=Arenas(warmup=0.25)), m, seen

    whole, expected, _ = trainer("whole")
    whole.train()
    saved = json.loads((tmp_path / "whole/checkpoint-3/trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["ArenasCallback"]["attributes"] == {"residual": Arenas(warmup=0.25).at(2, STEPS), "steps": STEPS}
    assert saved["ArenasCallback"]["args"]["arenas"]["warmup"] == 0.25

    rest, m, seen = trainer("whole")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert seen == [Arenas(warmup=0.25).at(step, STEPS) for step in range(3, STEPS)]
    for (name, a), b in zip(expected.state_dict().items(), m.state_dict().values()):
        assert torch.equal(a, b), name

    # transformers' own way to restore callbacks gives the same
    restored, m, seen = trainer("whole", restore_callback_states_from_checkpoint=True)
    restored.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert seen == [Arenas(warmup=0.25).at(step, STEPS) for step in range(3, STEPS)]
    assert [e["residual"] for e in restored.state.log_history if "residual" in e][3:] == seen


@pytest.mark.parametrize(
    "then, now, says",
    [
        (Arenas(), Arenas(peak=0.5), r"\(peak 1.0, now 0.5\)"),
        (Arenas(), None, "peak 1.0, now 0.0"),
        (None, Arenas(), "peak 0.0, now 1.0"),
        (Arenas(), Arenas(), None),
        (None, None, None),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, blocks, then, now, says):
    for arenas, more in (then, {}), (now, {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")}):
        m = model()
        prepare(m)
        trainer = SherryTrainer(m, arguments(tmp_path, save_strategy="steps", save_steps=4), train_dataset=Blocks(blocks),
                                arenas=arenas)  # fmt: skip
        if more and says:
            with pytest.raises(ValueError, match=says):
                trainer.train(**more)
        else:
            trainer.train(**more)
    assert (tmp_path / "checkpoint-8").is_dir()


def test_resuming_a_checkpoint_of_a_plain_trainer(tmp_path, blocks):
    """It knows nothing of Arenas, so it was trained without; saving again must work."""
    for cls in Trainer, SherryTrainer:
        m = model()
        prepare(m)
        args = arguments(tmp_path, save_strategy="steps", save_steps=4)
        resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")} if cls is SherryTrainer else {}
        cls(m, args, train_dataset=Blocks(blocks)).train(**resume)
    assert "ArenasCallback" in (tmp_path / "checkpoint-8/trainer_state.json").read_text()


def test_callback_without_quantized_layers_says_so(tmp_path, blocks):
    with pytest.raises(ValueError, match="call prepare"):
        SherryTrainer(model(), arguments(tmp_path), train_dataset=Blocks(blocks), arenas=Arenas()).train()


# ------------------------------------------------------------------------------------------------------------- monitor


def test_effective_rank():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(9))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(3, 4)) == 0
    assert math.isnan(effective_rank(torch.tensor([[math.inf, 1.0]])))
    x = torch.diag(torch.tensor([2.0, 1.0, 1.0]))  # entropy of (1/2, 1/4, 1/4)
    assert effective_rank(x) == pytest.approx(math.exp(1.5 * math.log(2)))


def test_monitor_sees_what_training_does(tmp_path, blocks):
    """Its figures equal those computed here from the weights before and after each step."""
    m = model()
    prepare(m)
    name = "model.layers.1.mlp.up_proj"
    layer = m.get_submodule(name)
    monitor = TrainingMonitor(every=3, only=name)
    states, gradients = [], []

    class Watched(SherryTrainer):
        def training_step(self, *args, **kwargs):
            states.append(layer.weight.detach().clone())
            loss = super().training_step(*args, **kwargs)
            gradients.append(layer.weight.grad.clone())
            return loss

    trainer = Watched(m, arguments(tmp_path, learning_rate=0.02, logging_steps=1), train_dataset=Blocks(blocks), monitor=monitor)
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "flips" in entry}
    assert sorted(logged) == [2, 5, 8]  # a look at steps 0, 3 and 6 ends one step later
    for step, entry in logged.items():
        before, after = states[step - 2], states[step - 1]
        a, b = (fake_quantize(w).sign() for w in (before, after))
        assert entry["flips"] == pytest.approx((a != b).float().mean().item())
        assert entry["sign_flips"] == pytest.approx((a * b < 0).float().mean().item())
        scale = fake_quantize(before).abs().reshape(-1, 128).amax(-1, keepdim=True)
        assert entry["near_sign"] == pytest.approx((before.abs().reshape(-1, 128) < 0.1 * scale).float().mean().item())
        two = before.abs().reshape(len(scale), 32, 4).sort(-1).values
        assert entry["near_zeroing"] == pytest.approx((two[..., 1] - two[..., 0] < 0.1 * scale).float().mean().item())
        assert entry["gradient_rank"] == pytest.approx(effective_rank(gradients[step - 2]), rel=1e-3)
        assert 1 < entry["activation_rank"] < 128
    assert logged[5]["flips"] > 0 and logged[5]["sign_flips"] > 0
    assert layer.probe is None


def test_monitor_under_gradient_checkpointing(tmp_path, blocks):
    figures = []
    for more in {}, dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}):
        m = model()
        prepare(m)
        trainer = SherryTrainer(m, arguments(tmp_path, **more), train_dataset=Blocks(blocks), monitor=TrainingMonitor(3))
        trainer.train()
        figures.append([e for e in trainer.state.log_history if "flips" in e])
    assert len(figures[0]) == 3
    for a, b in zip(*figures):
        for key in "gradient_rank", "activation_rank", "flips", "near_zeroing":
            assert a[key] == pytest.approx(b[key], rel=1e-2), key
        assert a["gradient_rank"] > 1


def test_monitor_of_experts_and_frozen_layers(tmp_path, blocks):
    """Experts that see no token in one of the two steps, and layers without gradient, do not spoil the figures of the others."""
    torch.manual_seed(0)
    m = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=16, num_experts_per_tok=1, use_cache=False))  # fmt: skip
    names = prepare(m, keep="q_proj")
    assert len(names) == 3 + 16 * 3 and not any(n.endswith("gate") for n in names)  # the router stays
    m.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    monitor = TrainingMonitor(2, layers=len(names))
    args = arguments(tmp_path, max_steps=9, per_device_train_batch_size=1, learning_rate=1e-4)
    trainer = SherryTrainer(m, args, train_dataset=Blocks(blocks[:, :6]), monitor=monitor)
    trainer.train()
    looks = [e for e in trainer.state.log_history if "flips" in e]
    assert len(looks) == 4
    assert all(0 < e["gradient_rank"] < 128 for e in looks)
    # an expert is not compared with its state long ago
    stale = next(look for look in monitor._looks.values())
    stale.before = torch.zeros(1)
    monitor.on_step_begin(args, TrainerState(global_step=4, max_steps=9), None)
    assert stale.before is None


def test_monitor_errors(tmp_path, blocks):
    with pytest.raises(ValueError, match="at least 2"):
        TrainingMonitor(every=1)
    m = model()
    prepare(m)
    with pytest.raises(ValueError, match="no quantized layer 'conv'"):
        SherryTrainer(m, arguments(tmp_path), train_dataset=Blocks(blocks), monitor=TrainingMonitor(only="conv")).train()


# -------------------------------------------------------------------------------------------------------- distillation


def test_distillation_loss(tmp_path, blocks):
    """(1 - share) cross entropy + share T² KL, in one batch and in accumulated ones."""
    losses, batch = [], torch.from_numpy(blocks[:8])
    for more in dict(per_device_train_batch_size=8), dict(per_device_train_batch_size=2, gradient_accumulation_steps=4):
        m, teacher = model(), model(seed=5)
        prepare(m)
        trainer = SherryTrainer(
            m, arguments(tmp_path, max_steps=1, **more), train_dataset=Blocks(blocks[:8]), teacher=teacher, distill=0.7, temperature=2.0
        )
        trainer.train()
        losses.append(next(e["loss"] for e in trainer.state.log_history if "loss" in e))
    m = model()
    prepare(m)
    with torch.no_grad():
        student, wanted = (x(batch).logits[:, :-1].reshape(-1, 64).double() for x in (m, model(seed=5)))
    ce = torch.nn.functional.cross_entropy(student, batch[:, 1:].reshape(-1))
    p, q = (wanted / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 0.3 * ce + 0.7 * 4 * (p * (p / q).log()).sum(-1).mean()
    assert losses == pytest.approx([expected.item()] * 2, abs=2e-4)  # logged with four decimals


def test_distillation_brings_the_student_nearer(tmp_path, blocks):
    teacher = model(seed=5)
    m = model()
    prepare(m)
    args = arguments(tmp_path, max_steps=60, learning_rate=3e-3)
    trainer = SherryTrainer(m, args, train_dataset=Blocks(blocks), teacher=teacher, distill=1.0)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_distillation_errors(tmp_path, blocks):
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=65, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                           num_attention_heads=1, num_key_value_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="the teacher has 65 tokens, the model 64"):
        SherryTrainer(model(), arguments(tmp_path), train_dataset=Blocks(blocks), teacher=teacher)
    with pytest.raises(ValueError, match="distill is 2"):
        SherryTrainer(model(), arguments(tmp_path), train_dataset=Blocks(blocks), teacher=model(), distill=2)


# ---------------------------------------------------------------------------------------------------------------- data


def test_pack():
    ids = np.arange(10, 31, dtype=np.uint16)
    assert pack(ids, 6, 1).tolist() == [[1, 10, 11, 12, 13, 14], [1, 15, 16, 17, 18, 19], [1, 20, 21, 22, 23, 24],
                                        [1, 25, 26, 27, 28, 29]]  # fmt: skip
    assert pack(ids, 10, None).tolist() == [list(range(10, 20)), list(range(20, 30))]
    assert pack(ids, 64, 1).shape == (0, 64)
    with pytest.raises(ValueError, match="a context of 1"):
        pack(ids, 1, 1)


def test_mean_loss_weighs_blocks_alike(blocks):
    m = model()
    prepare(m)
    m.train()
    whole = mean_loss(m, blocks[:13], batch=13)
    assert mean_loss(m, blocks[:13], batch=4) == pytest.approx(whole, rel=1e-6) and m.training


# ---------------------------------------------------------------------------------------------------- two processes


def two_processes(out: Path, blocks: np.ndarray, mode: str) -> dict:
    """tests/two_processes.py under torchrun with gloo; returns what each process saw, by rank."""
    np.save(out / "blocks.npy", blocks)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", HERE / "two_processes.py", out, mode]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    return {rank: json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)}


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-bf16"])
def test_two_processes(tmp_path, blocks, mode):
    m = model()
    prepare(m)
    mode, bf16 = mode.removesuffix("-bf16"), mode.endswith("-bf16")
    one = SherryTrainer(m, arguments(tmp_path / "one", bf16=bf16), train_dataset=Blocks(blocks), arenas=Arenas(warmup=0.25),
                        monitor=TrainingMonitor(3))  # fmt: skip
    one.train()
    one.export(tmp_path / "one/hf", torch.float32)

    seen = two_processes(tmp_path, blocks, mode + "-bf16" * bf16)
    assert seen[0]["forward"] == "torch.float32"  # weights are quantized in float32 even if products are bfloat16
    assert seen[0]["type"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[mode]
    assert seen[0]["wrapper"] == {"ddp": "DistributedDataParallel", "fsdp": "FSDPLlamaForCausalLM"}[mode]
    if mode == "fsdp":  # each process holds its part
        assert sum(s["held"] for s in seen.values()) < 1.1 * m.num_parameters()
    expected = [Arenas(warmup=0.25).at(step, STEPS) for step in range(STEPS)]
    assert seen[0]["lambdas"] == seen[1]["lambdas"] == expected
    losses = [e["loss"] for e in one.state.log_history if "loss" in e]
    assert seen[0]["losses"] == pytest.approx(losses, abs=5e-3 if bf16 else 2e-3)
    flips = [e["flips"] for e in one.state.log_history if "flips" in e]
    assert seen[0]["flips"] == pytest.approx(flips, abs=1e-3) and len(flips) == 3

    a, b = (load_file(d / "hf/model.safetensors") for d in (tmp_path / "one", tmp_path))
    assert a.keys() == b.keys()
    changed = 0
    for name in quantized_layers(m):
        weight = b[f"{name}.weight"]
        assert tq1_25.is_exact(weight.numpy()).all(), name
        changed += (weight.sign() != a[f"{name}.weight"].sign()).sum().item()
    # another order of summation moves a few weights across a boundary
    assert changed < (1e-2 if bf16 else 1e-3) * sum(layer.weight.numel() for layer in quantized_layers(m).values())
    one_loss, two_loss = (mean_loss(AutoModelForCausalLM.from_pretrained(d / "hf", dtype=torch.float32), blocks[:64])
                          for d in (tmp_path / "one", tmp_path))  # fmt: skip
    assert two_loss == pytest.approx(one_loss, abs=5e-3 if bf16 else 2e-3)
    assert json.loads((tmp_path / "hf/config.json").read_text())["sherry_config"]["weights"] == "fake_quantized"
