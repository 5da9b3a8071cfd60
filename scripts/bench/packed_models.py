#!/usr/bin/env python3
"""Measure a packed model in transformers against the same model in bfloat16: memory, logits, and decoded tokens a second.

The model is a Hugging Face directory, or else a Llama with random sparse ternary weights; `sherry-gguf pack` packs it. Both models are in
one process and decode in turns; the ratio is the median over the rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = "bench/packed_models.py"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads hang beside other programs

try:
    import numpy as np
    import torch
    import transformers

    import sherry_gguf
    from sherry_gguf.bench import cpu_name
    from sherry_gguf.packed import PackedLinear
    from sherry_gguf.programs import HelpWithDefaults
    from sherry_gguf.report import markdown_table
except ImportError as error:
    sys.exit(f"{PROGRAM}: {error}: run it as .venv/bin/python scripts/bench/packed_models.py, after scripts/setup.sh")


def random_checkpoint(directory: Path, a: argparse.Namespace) -> None:
    """Write a Llama with random 3:4 sparse ternary weights, in bfloat16."""
    config = transformers.LlamaConfig(
        hidden_size=a.hidden, intermediate_size=a.intermediate, num_hidden_layers=a.layers, num_attention_heads=a.hidden // 64,
        num_key_value_heads=max(1, a.hidden // 256), vocab_size=a.vocab, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    rng, state = np.random.default_rng(0), {}
    for name, p in model.named_parameters():
        if p.ndim == 1:
            state[name] = torch.ones(p.shape, dtype=torch.bfloat16)
            continue
        d = np.float16(0.02 if "embed" in name else (4 / 3 / p.shape[1]) ** 0.5)  # outputs have the variance of the inputs
        codes = rng.integers(0, 256, (p.shape[0], p.shape[1] // 128, 22), dtype=np.uint8)
        codes[..., 20:] = np.frombuffer(np.float16(torch.tensor(float(d)).bfloat16().item()).tobytes(), np.uint8)
        state[name] = torch.from_numpy(sherry_gguf.dequantize(codes.reshape(p.shape[0], -1))).bfloat16()
    model.save_pretrained(directory, state_dict=state)


def divergence(one: Any, two: Any, tokens: int) -> float:
    """The mean KL divergence of two models' next-token probabilities, nats, on random tokens."""
    ids = torch.randint(0, one.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    p, q = (m(ids).logits.float().log_softmax(-1) for m in (one, two))
    return float((p.exp() * (p - q)).sum(-1).mean())


def rate(model: Any, a: argparse.Namespace) -> float:
    """Tokens a second of `generate`, without the prompt."""
    ids = torch.randint(0, model.config.vocab_size, (1, a.prompt), generator=torch.Generator().manual_seed(1))
    took = []
    for new in 1, 1 + a.tokens:
        began = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        took.append(time.perf_counter() - began)
    return a.tokens / (took[1] - took[0])


@torch.inference_mode()
def measure(original: Path, packed: Path, a: argparse.Namespace) -> None:
    def load(directory: Path, dtype: torch.dtype) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)

    if a.kl_tokens:
        kl = divergence(load(original, torch.float32), load(packed, torch.float32), a.kl_tokens)
        print(f"KL divergence from the fake-quantized model, float32, {a.kl_tokens} random tokens: {kl:.2e} nats", flush=True)
    full, small = (load(directory, torch.bfloat16) for directory in (original, packed))
    layers = [m for m in small.modules() if isinstance(m, PackedLinear)]
    size, weights = sum(b.nbytes for m in layers for b in m.buffers()), sum(m.in_features * m.out_features for m in layers)
    print(f"packed layers: {len(layers)}, {weights / 1e6:.0f} M weights, {8 * size / weights:.4f} bits each in memory", flush=True)
    bytes_of = [sum(t.nbytes for t in {*m.parameters(), *m.buffers()}) for m in (full, small)]
    rates: list[list[float]] = []
    for turn in range(1 + a.rounds):
        both = [rate(m, a) for m in (full, small)]
        if turn:  # the first one warms up
            rates.append(both)
    rows = [
        (name, f"{size / 2**20:.0f}", f"{statistics.median(values):.1f}")
        for name, size, values in zip(("bfloat16", "packed, bfloat16"), bytes_of, zip(*rates))
    ]
    print(markdown_table(("model", "weights, MiB", "decoding, t/s"), rows))
    print(
        f"ratio {statistics.median(b / f for f, b in rates):.2f} ({min(b / f for f, b in rates):.2f} to {max(b / f for f, b in rates):.2f})"
    )
    print(f"{torch.get_num_threads()} threads of {cpu_name()}, {a.rounds} rounds of {a.tokens} tokens after a prompt of {a.prompt}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    add = p.add_argument
    add("--model", type=Path, metavar="DIR", help="a checkpoint instead of random weights")
    add("--work", type=Path, metavar="DIR", help="keep the checkpoints here, and use those that are here (default: a temporary directory)")
    for flag, default, text in (
        ("hidden", 2048, "size of the activations"), ("intermediate", 8192, "of the feed-forward network"), ("layers", 16, "layers"),
        ("vocab", 32000, "tokens in the vocabulary"), ("prompt", 16, "tokens of the prompt"), ("tokens", 24, "tokens to decode"),
        ("rounds", 5, "rounds"), ("threads", torch.get_num_threads(), "threads"),
        ("kl-tokens", 256, "tokens to compare logits on; 0: do not"),
    ):  # fmt: skip
        add(f"--{flag}", type=int, default=default, metavar="N", help=text)
    return p


def main(argv: list[str] | None = None) -> int:
    a = parser().parse_args(argv)
    torch.set_num_threads(a.threads)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        original, packed = a.model or work / "original", work / "packed"
        if not original.exists():
            random_checkpoint(original, a)
        if not packed.exists():
            subprocess.run([sys.executable, "-m", "sherry_gguf", "pack", original, "--out", packed], check=True, stdout=subprocess.DEVNULL)
        measure(original, packed, a)
    return 0


if __name__ == "__main__":
    sys.exit(main())
