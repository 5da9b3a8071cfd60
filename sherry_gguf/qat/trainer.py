"""A Hugging Face Trainer for quantized models: Arenas, monitoring, distillation, export."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sherry_gguf.training.run import bf16_time
from sherry_gguf.training.trainer import CpuTrainer

from .arenas import Arenas, ArenasCallback
from .hf_export import export
from .linear import quantized_layers
from .monitor import TrainingMonitor


class SherryTrainer(CpuTrainer):
    """`transformers.Trainer` for a model that went through `prepare`; torchrun, Accelerate, FSDP and DeepSpeed as usual.

    Args:
        arenas: the schedule of λ; None trains without Arenas.
        monitor: a TrainingMonitor whose figures go into the logs, or None.
        teacher: a causal language model to learn from, with the same vocabulary.
        distill: the teacher's share in the loss: (1 - distill) * cross entropy + distill * T² * KL(teacher, model).
        temperature: T, which divides both models' logits in the KL divergence.
        The others are Trainer's.

    Raises:
        ValueError: the teacher has another vocabulary, or `distill` is not between 0 and 1.
    """

    def __init__(self, *args, arenas: Arenas | None = None, monitor: TrainingMonitor | None = None, teacher: PreTrainedModel | None = None,
                 distill: float = 0.5, temperature: float = 1.0, **kwargs):  # fmt: skip
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:  # its loss is a mean over the micro-batch, so accumulation must divide it
            self.model_accepts_loss_kwargs = False
        if not 0 <= distill <= 1 or temperature <= 0:
            raise ValueError(f"distill is {distill} and temperature {temperature}: use 0 <= distill <= 1 and a temperature above 0")
        trained: Any = self.model
        if teacher is not None and (n := teacher.config.get_text_config().vocab_size) != (m := trained.config.get_text_config().vocab_size):
            raise ValueError(f"the teacher has {n} tokens, the model {m}: distillation needs the same vocabulary")
        self.monitor = monitor
        if quantized_layers(trained):  # without Arenas too, so that checkpoints record it
            self.add_callback(ArenasCallback(arenas or Arenas(peak=0.0)))
        elif arenas is not None:
            raise ValueError("Arenas has nothing to act on: call prepare(model) before the Trainer is made")
        if monitor is not None:
            self.add_callback(monitor)
        self.distill, self.temperature = distill, temperature
        frozen: Any = teacher
        self.teacher = None if frozen is None else frozen.to(self.args.device).eval().requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            wanted = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        kept = labels[:, 1:] != -100
        student = (outputs.logits[:, :-1][kept] / self.temperature).float().log_softmax(-1)
        wanted = (wanted[:, :-1][kept] / self.temperature).float().log_softmax(-1)
        kl = torch.nn.functional.kl_div(student, wanted, reduction="sum", log_target=True) * self.temperature**2
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # like the cross entropy
            kl = kl / num_items_in_batch
            if self.args.average_tokens_across_devices:
                kl = kl * self.accelerator.num_processes
        else:
            kl = kl / kept.sum().clamp(min=1)
        loss = (1 - self.distill) * loss + self.distill * kl
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:  # in a training step, not an evaluation
            for callback in self.callback_handler.callbacks:  # the Trainer may have restored another one
                if isinstance(callback, ArenasCallback) and callback.arenas.peak:
                    logs["residual"] = callback.residual
            if self.monitor is not None:
                logs.update(self.monitor.latest)
                self.monitor.latest = {}
        super().log(logs, start_time)

    def export(self, directory: str | os.PathLike, dtype: torch.dtype = torch.float16) -> Path:
        """`export` the model, however it is spread over processes. All of them must call this.

        Returns the directory, which is complete when any process returns. Raises what `export` does, in every process.
        """
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(self.model_wrapped) if spread else None
        error: list[Exception | None] = [None]
        if self.is_world_process_zero():
            try:
                export(self.accelerator.unwrap_model(self.model), directory, self.processing_class, dtype, state)
            except Exception as e:
                error[0] = e
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(error, device=self.args.device)
        if error[0] is not None:
            raise error[0]
        return Path(directory)


def bf16_is_faster() -> bool:
    """Whether bfloat16 products are clearly faster on this CPU."""
    return bf16_time() < 0.8
