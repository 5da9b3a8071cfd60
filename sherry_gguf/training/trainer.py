"""transformers' Trainer for several processes on CPUs."""

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer


class CpuTrainer(Trainer):
    """`transformers.Trainer`, with which torchrun works on CPUs as it does on GPUs."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        states = self.accelerator.state, PartialState()  # each new AcceleratorState copies the PartialState
        if self.args.device.type == "cpu":  # with several processes it is cpu:0, cpu:1, ..., which nothing can be loaded to
            self.args.__dict__["_setup_devices"] = torch.device("cpu")  # a functools.cached_property
            for state in states:
                state.device = torch.device("cpu")
        # Accelerate supports FSDP only on accelerators: on CPUs (gloo) it would silently train with DDP.
        if self.args.fsdp and self.args.world_size > 1 and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            # Its other settings come from the environment. FSDP 1 crashes on CPUs when it gathers a state dict.
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
            for state in states:
                state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            # Accelerate's policy would lower the precision of latent weights, so that training and export would quantize them
            # differently, and with FSDP 2 that of the loss. Autocast lowers the precision of the products anyway.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
