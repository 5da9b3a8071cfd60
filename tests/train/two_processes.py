"""One process of the two that tests/train/test_training.py starts: trains, exports, and records what it saw."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from test_training import STEPS, Blocks, arguments, lambdas, model

from sherry_gguf.qat import Arenas, SherryTrainer, TrainingMonitor, prepare, quantized_layers

out, (mode, *bf16) = Path(sys.argv[1]), sys.argv[2].split("-")
more = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"sync_module_states": False, "transformer_layer_cls_to_wrap": [
    "LlamaDecoderLayer"]}} if mode == "fsdp" else {"ddp_find_unused_parameters": False}  # fmt: skip
m = model()
prepare(m)
seen = lambdas(m)
args = arguments(out / "trainer", per_device_train_batch_size=2, ddp_backend="gloo", bf16=bool(bf16), **more)
trainer = SherryTrainer(m, args, train_dataset=Blocks(np.load(out / "blocks.npy")), arenas=Arenas(warmup=0.25), monitor=TrainingMonitor(3))
forward = set()
next(iter(quantized_layers(m).values())).register_forward_pre_hook(lambda layer, _: forward.add(str(layer.weight.dtype)))
trainer.train()
assert trainer.state.global_step == STEPS and args.world_size == 2
history = trainer.state.log_history
(out / f"{os.environ['RANK']}.json").write_text(
    json.dumps(
        {
            "lambdas": seen,
            "forward": ", ".join(forward),
            "type": trainer.accelerator.distributed_type.value,
            "wrapper": type(trainer.model_wrapped).__name__,
            "held": sum((p.to_local() if mode == "fsdp" else p).numel() for p in m.parameters()),
            "losses": [e["loss"] for e in history if "loss" in e],
            "flips": [e["flips"] for e in history if "flips" in e],
        }
    )
)
trainer.export(out / "hf", torch.float32)
assert (out / "hf/config.json").is_file()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # as train_sherry.py's processes: a thread of Gloo may abort one that finalizes Python
