#!/usr/bin/env python3
"""Compare an adapter in PyTorch with the same adapter in llama.cpp, both on packed weights.

The model becomes a TQ1_25 GGUF, the adapter a GGUF beside it. llama-perplexity writes the distribution over the next token for the second
half of each chunk of a text; PyTorch computes the same on quantized activations. The table has the Kullback-Leibler divergence from PyTorch
to llama.cpp in nats, how often both have the same likeliest token, and how much the adapter changes and rounding alone does. Texts are
continued greedily too, without sampling.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

import numpy as np
import peft
import torch
import transformers
from quality_report import grid

from sherry_gguf import llama_cpp, quaff
from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.evaluation.tools import serve
from sherry_gguf.programs import HelpWithDefaults, call
from sherry_gguf.quaff.building import CHANNELS
from sherry_gguf.quaff.run import FACTORS
from sherry_gguf.quaff.scaling import load_factors

FLOOR = 16.0  # llama-perplexity writes no log-probability that is further below the highest
RUNS = {"repacked": [], "--no-repack": ["--no-repack"], "KV cache in F32": ["-ctk", "f32", "-ctv", "f32"]}
GREEDY = 16, 32, 48  # texts, at most; tokens of each; tokens that continue it


def convert(a: argparse.Namespace) -> tuple[Path, Path]:
    """The model and the adapter as GGUFs. In processes of their own: they load llama.cpp's gguf package."""
    gguf, adapter = a.work / "model.gguf", a.work / "adapter.gguf"
    command = [sys.executable, "-m", "sherry_gguf.cli"]
    call(*command, "convert", a.model, "--outfile", gguf)
    call(*command, "convert-adapter", a.adapter, "--base", a.model, "--outfile", adapter)
    return gguf, adapter


def of_llama(a: argparse.Namespace, gguf: Path, *flags: object) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 (chunks, context), and log-probabilities float32 (chunks, scored, vocabulary), by llama-perplexity."""
    path = a.work / "logits.kld"
    call(llama_cpp.tool("llama-perplexity"), "-m", gguf, "-f", a.text, "-c", a.context, "-b", a.context, "--chunks", a.chunks,
         "-t", a.threads, "-fit", "off", "--kl-divergence-base", path, *flags)  # fmt: skip
    try:
        return read(path.read_bytes())
    finally:
        path.unlink()


def read(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What llama-perplexity wrote: each log-probability is 16 bits between the token's lowest and highest."""
    magic, (context, vocabulary, chunks) = data[:8], np.frombuffer(data, "<i4", 3, 8)
    if magic != b"_logits_":
        raise Stop("llama-perplexity wrote no log-probabilities")
    tokens = np.frombuffer(data, "<i4", chunks * context, 20).reshape(chunks, context)
    scored, width = context - 1 - context // 2, vocabulary + vocabulary % 2 + 4
    rows = np.frombuffer(data, "<u2", chunks * scored * width, 20 + tokens.nbytes).reshape(chunks, scored, width)
    scale, lowest = (np.ascontiguousarray(rows[..., :4]).view("<f4")[..., i, None] for i in (0, 1))
    return tokens, rows[..., 4 : 4 + vocabulary] * scale + lowest


def packed(a: argparse.Namespace, adapter: bool = True) -> torch.nn.Module:
    """The model on packed weights as `sherry-gguf finetune` left it, with the adapter or without."""
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    scaled = (a.adapter / CHANNELS).exists()
    channels = quaff.Channels.load(a.adapter / CHANNELS) if scaled else None
    model = peft.PeftModel.from_pretrained(
        quaff.quantize_for_finetuning(model, channels, "tq1_25", method="quaff" if scaled else "naive"), a.adapter
    )
    if scaled:
        load_factors(model, a.adapter / FACTORS)
    return (model if adapter else model.unload()).eval()


def dequantized(a: argparse.Namespace) -> torch.nn.Module:
    """The same weights and activations in floating point, with the adapter. A Sherry checkpoint holds the packed weights' values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, a.adapter).eval()


@torch.no_grad()
def of_torch(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities as `of_llama` returns them; values below the floor become the floor."""
    first = tokens.shape[1] // 2
    found = []
    for chunk in torch.from_numpy(tokens.astype(np.int64)):
        logits = model(input_ids=chunk[None], use_cache=False).logits[0, first:-1].double().log_softmax(-1)
        found.append(torch.maximum(logits, logits.amax(-1, keepdim=True) - FLOOR).float().numpy())
    return np.stack(found)


def compare(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """KL(p || q) in nats over tokens, and the share of tokens whose likeliest next one is the same."""
    p, q = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(1)
    same = np.take_along_axis(q, p.argmax(1)[:, None], 1)[:, 0] == q.max(1)
    return {"mean": kl.mean(), "median": np.median(kl), "99.9 %": np.quantile(kl, 0.999), "top": same.mean()}


@torch.no_grad()
def greedy(model: torch.nn.Module, a: argparse.Namespace, gguf: Path, adapter: Path, tokens: np.ndarray) -> dict[str, int]:
    """Continue texts in both without sampling: how many of them alike, and how many tokens until the first difference."""
    count, given, more = GREEDY
    prompts = tokens[:count, :given]
    with serve(gguf, 1, given + more, a.threads, "--lora", adapter) as server:
        theirs = [server.ask("POST", "/completion", prompt=p.tolist(), n_predict=more, temperature=0, ignore_eos=True, return_tokens=True)
                  ["tokens"] for p in prompts]  # fmt: skip
    ours = [model.generate(input_ids=torch.from_numpy(p[None].astype(np.int64)), attention_mask=torch.ones(1, given, dtype=torch.int64),
                           do_sample=False, min_new_tokens=more, max_new_tokens=more, pad_token_id=0)[0, given:].tolist()
            for p in prompts]  # fmt: skip
    agreed = [next((i for i, (x, y) in enumerate(zip(*both)) if x != y), more) for both in zip(ours, theirs)]
    return {"texts": len(prompts), "same": sum(n == more for n in agreed), "tokens": len(prompts) * more, "agreed": sum(agreed)}


def measure(a: argparse.Namespace) -> dict:
    a.work.mkdir(parents=True, exist_ok=True)
    gguf, adapter = convert(a)
    theirs = {}
    for label, flags in RUNS.items():
        tokens, theirs[label] = of_llama(a, gguf, "--lora", adapter, *flags)
    tokens = tokens.copy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.model)
    if tokenizer.encode("a")[0] == tokenizer.bos_token_id:
        tokens[:, 0] = tokenizer.bos_token_id  # llama-perplexity puts it there too
    model = packed(a)
    ours = of_torch(model, tokens)
    continued = greedy(model, a, gguf, adapter, tokens)
    repacked = theirs["repacked"]
    pairs = [
        *((f"PyTorch, llama.cpp {label}", ours, found) for label, found in theirs.items()),
        ("llama.cpp repacked, --no-repack", repacked, theirs["--no-repack"]),
        ("PyTorch with activations not rounded, rounded", of_torch(dequantized(a), tokens), ours),
        ("PyTorch with the adapter, without", ours, of_torch(packed(a, adapter=False), tokens)),
        ("llama.cpp with the adapter, without", repacked, of_llama(a, gguf)[1]),
    ]
    return {"machine": cpu_name(), "scored": int(np.prod(ours.shape[:2])), "context": a.context, "scaled": (a.adapter / CHANNELS).exists(),
            "rows": [{"what": what} | compare(p, q) for what, p, q in pairs], "greedy": continued}  # fmt: skip


def table(r: dict) -> str:
    cells = [(row["what"], *(f"{row[k]:.2g}" for k in ("mean", "median", "99.9 %")), f"{100 * row['top']:.2f} %") for row in r["rows"]]
    g = r["greedy"]
    scaling = "with" if r["scaled"] else "without"
    about = (f"{r['scored']} tokens in chunks of {r['context']}; PyTorch {scaling} Quaff's scaling. Greedy text: {g['same']} of "
             f"{g['texts']} alike, {g['agreed']} of {g['tokens']} tokens before the first difference. {r['machine']}.")  # fmt: skip
    return f"{about}\n\n{grid(('', 'mean KL', 'median', '99.9 %', 'same top token'), cells)}\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Sherry checkpoint")
    p.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="a LoRA adapter for it, of sherry-gguf finetune or PEFT")
    p.add_argument("--text", type=Path, required=True, metavar="FILE", help="the text to compare on")
    p.add_argument("--work", type=Path, default=ROOT / "build/adapter", metavar="DIR", help="directory for the GGUFs")
    p.add_argument("--out", type=Path, default=ROOT / "build/adapter/adapter", help="output path, to which .md and .json are added")
    p.add_argument("--context", type=int, default=256, metavar="N", help="tokens in a chunk")
    p.add_argument("--chunks", type=int, default=40, metavar="N", help="use the first N chunks of the text")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    torch.set_num_threads(a.threads)
    try:
        results = measure(a)
        a.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(table(results))
        print(table(results), end="")
        return 0
    except (Stop, OSError, ValueError) as e:  # OSError includes NotBuilt
        print(f"compare_adapter: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
