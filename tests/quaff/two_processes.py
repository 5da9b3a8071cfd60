"""One process of those that test_distributed.py starts: trains an adapter on its share of each batch, and records what it has then."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_distributed import adapted, trained
from torch.nn.parallel import DistributedDataParallel

out, base = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
model = adapted(base)
ddp = DistributedDataParallel(model)
sent = sum(b.numel() * b.element_size() for b in ddp.modules_buffers)
torch.save({"sent": sent, **trained(model, ddp, rank, size)}, out / f"{rank}.pt")
dist.barrier()
sys.stdout.flush()
os._exit(0)  # a thread of Gloo may abort a process that finalizes Python
