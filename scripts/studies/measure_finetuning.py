#!/usr/bin/env python3
"""Measure what a step of fine-tuning costs by method: seconds, and the peak memory of a process that trains.

Each method has a process of its own, with LoRA of rank 16 on all linear layers but the head. The processes take their steps in
turn, one at a time. The model is a Hugging Face directory, or else a Llama with random sparse ternary weights. Tokens are random,
and so are the outlier channels: each layer has as many as a budget of 1 % allows.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in sherry_gguf.training.command; the processes inherit it

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # python_corpus, which other studies need

from sherry_gguf.bench import cpu_name
from sherry_gguf.programs import HelpWithDefaults
from sherry_gguf.report import markdown_table

METHODS = {
    "full": ("full", "int8"),
    "bf16": ("bf16", "int8"),
    "quaff": ("quaff", "int8"),
    "naive": ("naive", "int8"),
    "static": ("static", "int8"),
    "dynamic": ("dynamic", "int8"),
    "mixed": ("mixed", "int8"),
    "tq1_25-quaff": ("quaff", "tq1_25"),
}  # method and base of quantize_for_finetuning


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def restart_peak() -> None:
    """Give back what building left free, and count VmHWM anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


SHARE = 0.01  # the authors' budget; calibration of SmolLM2-135M finds 1.5 % with our defaults


def random_channels(layers):
    """Outlier channels for layers by name, in each of them as many as a budget of SHARE allows."""
    import torch

    from sherry_gguf import quaff
    from sherry_gguf.quaff.channels import budget_of

    generator = torch.Generator().manual_seed(0)
    channels = {name: torch.randperm(layer.in_features, generator=generator)[: budget_of(name, layer.in_features, SHARE, {})].sort().values
                for name, layer in layers.items()}  # fmt: skip
    return quaff.Channels(channels, {name: torch.ones(layer.in_features) for name, layer in layers.items()})


def quantized(module, method: str):
    from sherry_gguf import quaff
    from sherry_gguf.quaff.channels import linear_layers

    name, base = METHODS[method]
    return quaff.quantize_for_finetuning(module, random_channels(linear_layers(module)), base, method=name)


def random_llama(method: str, a: dict):
    """A quantized Llama with random sparse ternary weights. It is made and quantized layer by layer, so that it never is in memory whole
    in full precision."""
    import numpy as np
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from sherry_gguf import ternary

    config = transformers.LlamaConfig(hidden_size=a["hidden"], intermediate_size=a["intermediate"], num_hidden_layers=a["layers"],
        num_attention_heads=a["hidden"] // 64, num_key_value_heads=max(1, a["hidden"] // 512), vocab_size=a["vocab"])  # fmt: skip
    rng = np.random.default_rng(0)

    def fill(module):
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            if parameter.ndim == 1:
                torch.nn.init.ones_(parameter)
            else:
                codes = rng.integers(0, 32, parameter.numel() // 4, dtype=np.uint8)
                parameter.data.copy_(
                    torch.from_numpy(ternary.codes_to_lanes(codes).reshape(parameter.shape)).float().mul_(config.hidden_size**-0.5)
                )
        return module

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for block in model.model.layers:
        quantized(fill(block), method)
    kind = torch.bfloat16 if method == "bf16" else torch.float32
    for module in model.model.embed_tokens, model.model.norm, model.lm_head:
        fill(module).to(kind)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.requires_grad_(False)
    return model


def weights(model) -> dict[str, float]:
    """Bytes of the weights, and bits for each weight of the layers that are quantized."""
    from sherry_gguf.quaff.channels import linear_layers

    def size(module) -> int:
        return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))

    layers = linear_layers(model).values()
    return {"bytes": size(model), "bits": 8 * sum(map(size, layers)) / sum(layer.in_features * layer.out_features for layer in layers)}


def work(pipe, method: str, a: dict) -> None:
    """A process of one method: builds its model, then takes a step for each message."""
    import peft
    import torch
    import transformers

    import sherry_gguf.quaff  # noqa: F401 - so that `idle` counts it

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import logging

    logging.getLogger("sherry_gguf").setLevel(logging.ERROR)  # that weights which are not ternary lose much in TQ1_25
    torch.set_num_threads(a["threads"])
    idle = memory("VmRSS")
    if a["model"]:
        named = dict(gguf_file=a["gguf_file"]) if a["gguf_file"] else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(a["model"], dtype=torch.float32, **named)
        model = quantized(model, method)
    else:
        model = random_llama(method, a)
    found = {"idle": idle, "building": memory("VmHWM"), **weights(model)}
    if a["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (a["batch"], a["tokens"]), generator=torch.Generator().manual_seed(0))
    restart_peak()
    pipe.send(found | {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "parameters": model.num_parameters()})
    while pipe.recv():
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send([forward - began, backward - forward, time.perf_counter() - began, loss.item()])
        del loss
    pipe.send(memory("VmHWM"))


def measure(a: argparse.Namespace) -> dict[str, dict]:
    """Figures by method. Raises EOFError or BrokenPipeError if a process ends early."""
    context = multiprocessing.get_context("spawn")
    pipes, rows = {}, {}
    for method in a.methods:
        pipes[method], end = context.Pipe()
        context.Process(target=work, args=(end, method, vars(a)), daemon=True).start()
        end.close()
    for method, pipe in pipes.items():
        rows[method] = pipe.recv() | {"forward": [], "backward": [], "step": []}
        print(f"  {method}: built", flush=True)
    for turn in range(a.rounds + 1):
        for method, pipe in pipes.items():
            pipe.send(True)
            *seconds, loss = pipe.recv()
            if turn:  # the first warms up
                for part, x in zip(("forward", "backward", "step"), seconds):
                    rows[method][part].append(x)
            print(f"  {method}: {seconds[-1]:.2f} s, loss {loss:.3f}", flush=True)
    for method, pipe in pipes.items():
        pipe.send(False)
        rows[method]["peak"] = pipe.recv()
    return rows


def table(results: dict) -> str:
    rows, first = results["methods"], next(iter(results["methods"].values()))
    cells = []
    for method, row in rows.items():
        ratio = statistics.median(x / y for x, y in zip(row["step"], first["step"]))
        seconds = [f"{statistics.median(row[part]):.2f}" for part in ("forward", "backward", "step")]
        cells.append([method, *seconds, f"{ratio:.2f}", f"{row['peak'] / 1e6:.0f}", f"{row['peak'] / first['peak']:.2f}",
                      f"{row['bytes'] / 1e6:.0f}", f"{row['bits']:.3f}", f"{row['building'] / 1e6:.0f}"])  # fmt: skip
    base = next(iter(rows))
    head = ("method", "forward, s", "backward, s", "step, s", f"step, x {base}", "peak, MB", f"peak, x {base}", "weights, MB",
            "bits a weight in the layers", "peak of building, MB")  # fmt: skip
    return f"{about(results)}\n\n{markdown_table(head, cells)}\n"


def about(results: dict) -> str:
    first = next(iter(results["methods"].values()))
    checkpointing = "with gradient checkpointing, " * results["gradient_checkpointing"]
    return (f"{results['model']}: {first['parameters'] / 1e6:.0f} M parameters, {first['trained'] / 1e6:.1f} M of them trained; "
            f"{results['batch']} x {results['tokens']} tokens a step, {checkpointing}medians of {results['rounds']} rounds, "
            f"{results['threads']} threads, {results['machine']}. "
            f"Python and the libraries alone take {first['idle'] / 1e6:.0f} MB of each peak.")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    add = p.add_argument
    add("--model", metavar="DIR", help="Hugging Face directory; without it the model is random")
    add("--gguf-file", metavar="NAME", help="a GGUF in that directory to load instead, as transformers does")
    sizes = {"hidden": (2048, "hidden size"), "intermediate": (5632, "size of the MLPs"), "layers": (22, "number of layers"),
             "vocab": (32000, "size of the vocabulary")}  # fmt: skip
    for name, (default, help) in sizes.items():
        add(f"--{name}", type=int, default=default, metavar="N", help=f"random model: {help}")
    add("--methods", default=",".join(METHODS), help="methods to measure; the first is what the others are compared with")
    add("--batch", type=int, default=1, help="sequences in a step")
    add("--tokens", type=int, default=256, help="tokens in a sequence")
    add("--gradient-checkpointing", action="store_true", help="keep only each layer's input, and compute the rest again")
    add("--rounds", type=int, default=5, help="steps of each method, after one that warms up")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    add("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    a = p.parse_args(argv)
    a.methods = [m for m in a.methods.split(",") if m]
    if not a.methods or set(a.methods) - METHODS.keys():
        p.error(f"--methods {','.join(a.methods)}: choose from {', '.join(METHODS)}")
    for name in "batch", "rounds", "threads", "layers":
        if getattr(a, name) < 1:
            p.error(f"--{name} {getattr(a, name)}: at least 1")
    if a.tokens < 2:
        p.error(f"--tokens {a.tokens}: at least 2")
    return a


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    sizes = {name: getattr(a, name) for name in ("batch", "tokens", "rounds", "threads", "gradient_checkpointing")}
    name = Path(a.gguf_file or a.model).name if a.model else f"Llama of {a.layers} layers, hidden {a.hidden}, random ternary weights"
    try:
        results = {"model": name, "machine": cpu_name(), **sizes, "methods": measure(a)}
    except (EOFError, BrokenPipeError):
        print("measure_finetuning.py: a process ended early; its message is above", file=sys.stderr)
        return 1
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_name(f"{a.out.name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    a.out.with_name(f"{a.out.name}.md").write_text(table(results), encoding="utf-8")
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
