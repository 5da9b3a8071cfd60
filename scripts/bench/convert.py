#!/usr/bin/env python3
"""Measure a conversion's time and memory: a random bf16 checkpoint of Llama-3.2-1B's shape, 1.24 B parameters.

The checkpoint is made once (2.5 GB in several shards). Half of its layers are 3:4 sparse ternary, the others are latent
weights. Needs scripts/build_llama_cpp.py, and scripts/demo.sh for a tokenizer. Linux or macOS.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

try:
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    from sherry_gguf import llama_cpp, qat
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, run
except ImportError as error:
    sys.exit(f"convert.py: {error}: run it as .venv/bin/python scripts/bench/convert.py, after scripts/setup.sh")

HIDDEN, INTERMEDIATE, LAYERS, KV, VOCAB = 2048, 8192, 16, 512, 128256
SHARD = 4  # layers


def make(directory: Path, tokenizer: Path) -> None:
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int, exact: bool) -> torch.Tensor:
        w = 0.02 * torch.randn(rows, columns, generator=generator)
        # powers of two fit both bfloat16 and the fp16 scale
        return (qat.sparse_absmean(w).sign() * 2.0**-6 if exact else w).to(torch.bfloat16)

    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
              "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE)}  # fmt: skip
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shards = [{"model.embed_tokens.weight": weight(VOCAB, HIDDEN, False), "model.norm.weight": ones}]
    index = {}
    count = 1 + LAYERS // SHARD
    for number in tqdm(range(count), desc="making the checkpoint", unit="file", disable=None):
        shard = shards.pop() if shards else {}
        for layer in range((number - 1) * SHARD, number * SHARD) if number else ():
            for name, shape in shapes.items():
                shard[f"model.layers.{layer}.{name}.weight"] = weight(*shape, exact=layer < LAYERS // 2)
            for name in "input_layernorm", "post_attention_layernorm":
                shard[f"model.layers.{layer}.{name}.weight"] = ones.clone()
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(shard, part / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (part / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": VOCAB, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2}, indent=2))  # fmt: skip
    for file in "tokenizer.model", "tokenizer_config.json":
        shutil.copy(tokenizer / file, part)
    part.replace(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--dir", type=Path, default=llama_cpp.root() / "bench", help="working directory (default: build/bench)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="conversions (default: 3)")
    args = parser.parse_args()
    model, out = args.dir / "llama-1b", args.dir / "llama-1b-TQ1_25.gguf"
    tokenizer = llama_cpp.root() / "demo" / "hf"
    if not (tokenizer / "tokenizer.model").exists():
        raise Stop("this needs the demo's tokenizer: run scripts/demo.sh first")
    if not model.exists():
        make(model, tokenizer)
    parameters = HIDDEN * (VOCAB + 1) + LAYERS * HIDDEN * (2 * HIDDEN + 2 * KV + 3 * INTERMEDIATE + 2)
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    print(f"{parameters / 1e9:.2f} B parameters, {size / 1e9:.2f} GB of bf16, {os.cpu_count()} cores")
    for _ in range(args.rounds):
        out.unlink(missing_ok=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "sherry_gguf.cli", "convert", model, "--outfile", out],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20 if sys.platform == "linux" else 1 << 30)
        print(f"{seconds:.1f} s, peak memory {peak:.2f} GiB (of all rounds so far), {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    run(main)
