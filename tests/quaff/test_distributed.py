"""Several processes, as torchrun starts them: the same factors in all, those of one process, and nothing big is sent at each step."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from quaff_models import batches
from test_packed import packed
from test_quaff_models import CONFIGS, quantized
from transformers import MixtralConfig, MixtralForCausalLM

from sherry_gguf.quaff import calibrate, quantize_for_finetuning
from sherry_gguf.quaff.scaling import Targeted, TargetedScaling

BASES = {"int8": quantized, "tq1_25": packed}
STEPS = 4


def adapted(base, config="lora"):
    torch.manual_seed(0)
    return peft.get_peft_model(BASES[base](), CONFIGS[config]).train()


def trained(model, called, rank=0, size=1):
    """Train on each `size`-th row of some batches; what the model has then."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in batches(STEPS, seed=3):
        loss = called(**{name: rows[rank::size] for name, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = model.state_dict()
    return {"losses": losses} | {what: {k: v for k, v in state.items() if what in k} for what in ("factors", "lora_")}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_two_processes(base, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "127.0.0.1:0", Path(__file__).with_name("two_processes.py"), tmp_path, base]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = adapted(base)
    alone = trained(model, model)
    assert one["losses"] != other["losses"]  # their rows differ
    for what in "factors", "lora_":
        assert one[what].keys() == alone[what].keys() and len(alone[what]) >= 14
        for name, value in one[what].items():
            assert value.equal(other[what][name]), name
            assert torch.allclose(value, alone[what][name], rtol=0.02, atol=2e-3), name
    assert max(v.max() for v in one["factors"].values() if v.numel()) > 2
    assert [sum(pair) / 2 for pair in zip(one["losses"], other["losses"])] == pytest.approx(alone["losses"], abs=1e-3)
    assert one["sent"] < 500


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("config", [None, *CONFIGS])
def test_weights_are_not_sent_at_each_step(base, config):
    """As DistributedDataParallel looks for the names of what it shall not send."""
    model = adapted(base, config) if config else BASES[base]()
    sent = [name for name, _ in model.named_buffers() if name not in set(model._ddp_params_and_buffers_to_ignore)]
    ours = [name for name in sent if "proj" in name]
    assert len(ours) == 28 and {name.rpartition(".")[2] for name in ours} == {"factors", "started"}
    assert all("rotary_emb" in name for name in set(sent) - set(ours))


def test_maxima_over_the_processes(monkeypatch):
    def all_reduce(most, op):
        assert op == torch.distributed.ReduceOp.MAX
        most.clamp_(min=400)  # of another process

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for shared, expected in (True, 20), (False, 10):
        scaling = TargetedScaling(torch.tensor([3]))
        scaling.shared = shared
        scaling.update(torch.full((5, 1), 100.0), torch.ones(1))
        assert scaling.factors.tolist() == [expected]
    scaling.eval()
    scaling.update(torch.full((5, 1), 900.0), torch.ones(1))  # in evaluation nothing is sent
    assert scaling.factors.tolist() == [10]


def test_experts_wait_for_nobody():
    config = MixtralConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)  # fmt: skip
    model = MixtralForCausalLM(config)
    model = quantize_for_finetuning(model, calibrate(model, batches(), threshold=3, budget=0.1))
    shared = {name: m.scaling.shared for name, m in model.named_modules() if isinstance(m, Targeted)}
    assert len(shared) == 10 and all(value == ("experts" not in name) for name, value in shared.items())
