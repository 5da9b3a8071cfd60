#!/usr/bin/env python3
"""Measure what quantization costs in training: time and memory of an optimizer step, against full precision.

Every method trains the same Llama on the same random tokens. For times, the methods take turns in every round of one process;
ratios are medians over the rounds. For memory, each method has its own process: the figure is the peak of a few steps, less
what the process had before it made the model (on a GPU, the most that PyTorch allocated).
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = "bench/training.py"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in sherry_gguf.training.command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # python_corpus

try:
    import python_corpus
    import torch

    from sherry_gguf import qat
    from sherry_gguf.bench import cpu_name
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import HelpWithDefaults
except ImportError as error:
    sys.exit(f"{PROGRAM}: {error}: run it as .venv/bin/python scripts/bench/training.py, after scripts/setup.sh")

WAYS = {  # method, λ of Arenas
    "full precision": ("full", 0.0),
    "Sherry": ("sherry", 0.0),
    "Sherry with Arenas": ("sherry", 0.5),
    "absmean ternary": ("absmean", 0.0),
    "TWN ternary": ("twn", 0.0),
    "binary": ("binary", 0.0),
}
FULL = next(iter(WAYS))


class Training:
    """A model and its optimizer, step by step."""

    def __init__(self, way: str, a: argparse.Namespace):
        method, residual = WAYS[way]
        self.a, self.device = a, "cuda" if torch.cuda.is_available() else "cpu"
        self.model = python_corpus.small_llama(a.vocab, a.layers, a.hidden, a.intermediate, a.context, seed=0).to(self.device)
        self.model.config.use_cache = False
        qat.prepare(self.model, qat.QuantConfig(method))
        qat.set_residual(self.model, residual)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.randint(0, a.vocab, (a.batch, a.context), device=self.device)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=not self.a.float32):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began


def peak(way: str, a: argparse.Namespace) -> float:
    """Peak memory of a few steps in MiB. Call it in a process that has done nothing else."""
    torch.ones(256, 256) @ torch.ones(256, 256)  # makes the libraries allocate their buffers
    before = resident()
    training = Training(way, a)
    for _ in range(4):
        training.step()
    if training.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before


def resident() -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 2**10 for line in f if line.startswith("VmRSS"))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    python_corpus.add_sizes(p, context=256)
    p.add_argument("--rounds", type=int, default=15, help="steps of each method that are timed")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    p.add_argument("--float32", action="store_true", help="multiply in float32, not bfloat16")
    p.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak:
        print(peak(a.peak, a))
        return 0
    try:
        python_corpus.check_sizes(a.hidden, a.intermediate)
    except Stop as e:
        p.error(str(e))
    memory = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", way]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(f"{PROGRAM}: {way}: {result.stderr.strip()[-500:]}", file=sys.stderr)
            return 1
        memory[way] = float(result.stdout)
    trainings = {way: Training(way, a) for way in WAYS}
    for training in trainings.values():
        training.step()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for n in range(a.rounds):
        for way in list(WAYS)[:: 1 if n % 2 else -1]:  # forwards and backwards in turn
            times[way].append(trainings[way].step())

    model = trainings[FULL].model
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}; {a.threads} threads used"
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {a.batch} x {a.context} tokens a step, "
          f"{'float32' if a.float32 else 'bfloat16'} products, {where}; medians of {a.rounds} rounds\n")  # fmt: skip
    print("| method | ms a step | x full precision | MiB | x full precision |\n|---|---|---|---|---|")
    for way in WAYS:
        ratio = statistics.median(t / full for t, full in zip(times[way], times[FULL]))
        print(f"| {way} | {1e3 * statistics.median(times[way]):.0f} | {ratio:.2f} | {memory[way]:.0f} | {memory[way] / memory[FULL]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
