#!/usr/bin/env python3
"""Measure what post-training quantization costs: size and held-out perplexity of one model in several types.

The model is the demo's, trained in full precision; the first run makes it with scripts/make_demo_checkpoint.py --method full.
It becomes a BF16 GGUF. llama-imatrix measures the importance of its inputs on training text, and llama-quantize writes each
type, with or without that matrix. Embeddings and output are always Q8_0, so that only the blocks' weights differ.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # python_corpus

import numpy as np
from quality_report import grid

from sherry_gguf import llama_cpp
from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.programs import HelpWithDefaults, call
from sherry_gguf.reader import open_gguf

# label: llama-quantize's type, whether it gets the importance matrix, further flags
RUNS = {
    "Q8_0": ("Q8_0", False, []),
    "Q4_K_M": ("Q4_K_M", True, []),
    "Q2_K": ("Q2_K", True, []),
    "Q2_K, no matrix": ("Q2_K", False, []),
    "TQ2_0": ("TQ2_0", False, []),
    "TQ1_0": ("TQ1_0", False, []),
    "TQ1_25, mixed": ("TQ1_25", True, []),
    "TQ1_25, --pure": ("TQ1_25", True, ["--pure"]),
    "TQ1_25, no matrix": ("TQ1_25", False, []),
    "STQ1_0, mixed": ("STQ1_0", True, []),
}


def prepare(a: argparse.Namespace) -> tuple[Path, Path]:
    """Make the BF16 GGUF and the importance matrix, unless they are there; returns their paths."""
    command = [sys.executable, ROOT / "scripts/make_demo_checkpoint.py", "--method", "full", "--out", a.model, *a.training]
    if subprocess.run(command).returncode:
        raise Stop("make_demo_checkpoint.py failed; see its message above")
    bf16, matrix, text = a.work / "bf16.gguf", a.work / "imatrix.gguf", a.work / "calibration.txt"
    made, wanted = a.work / "made.json", [json.loads((a.model / "demo.json").read_text()), a.calibration, a.context]
    if not made.exists() or json.loads(made.read_text()) != wanted:
        for old in made, bf16, matrix:
            old.unlink(missing_ok=True)
        made.write_text(json.dumps(wanted))
    if not bf16.exists():
        part = a.work / "part.gguf"
        call(sys.executable, llama_cpp.source_dir() / "convert_hf_to_gguf.py", a.model, "--outtype", "bf16", "--outfile", part)
        part.rename(bf16)
    if not matrix.exists():
        import python_corpus

        settings = json.loads((a.model / "demo.json").read_text())["settings"]
        texts, _ = python_corpus.read(Path(settings["corpus"]), settings["corpus_bytes"])
        order = np.random.default_rng(0).permutation(len(texts))
        text.write_text("".join(texts[i] for i in order)[: a.calibration])
        part = a.work / "part.gguf"
        call(llama_cpp.tool("llama-imatrix"), "-m", bf16, "-f", text, "-o", part, "-c", a.context, "-t", a.threads)
        part.rename(matrix)
    return bf16, matrix


def blocks_of(path: Path) -> tuple[float, dict[str, int]]:
    """Bits per weight of the blocks' matrices, and how many matrices have each type."""
    matrices = [t for t in open_gguf(path).tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    types = collections.Counter(t.tensor_type.name for t in matrices)
    return 8 * sum(t.n_bytes for t in matrices) / sum(t.n_elements for t in matrices), types


def measure(a: argparse.Namespace) -> dict:
    bf16, matrix = prepare(a)
    files = {"BF16": bf16}
    for label, (kind, weighed, flags) in RUNS.items():
        files[label] = a.work / f"{re.sub('[^A-Za-z0-9_]+', '-', label)}.gguf"
        call(llama_cpp.tool("llama-quantize"), *(["--imatrix", matrix] if weighed else []), *flags, "--token-embedding-type", "q8_0",
             "--output-tensor-type", "q8_0", bf16, files[label], kind, a.threads)  # fmt: skip
    found = a.work / "evaluated.json"
    call(sys.executable, ROOT / "scripts/evaluate.py", "--text", a.model / "held_out.txt", "--context", a.context, "--threads", a.threads,
         *(["--chunks", a.chunks] if a.chunks else []), "--output", found, *files.values())  # fmt: skip
    model = json.loads((a.model / "demo.json").read_text())
    del model["settings"]["corpus"]  # a path of this machine
    results = {"machine": cpu_name(), "model": model, "context": a.context, "rows": []}
    for label, measured in zip(files, json.loads(found.read_text())["models"]):
        bits, types = blocks_of(files[label])
        results["rows"].append({"label": label, "bits": bits, "types": types} | measured["text"])
    return results


def table(results: dict) -> str:
    rows, settings = results["rows"], results["model"]["settings"]
    about = (f"Llama of {settings['layers']} layers, hidden {settings['hidden']}, trained in full precision for {settings['steps']} steps; "
             f"held-out text of the Python standard library, {rows[0]['scored']} tokens scored, context {results['context']}. "
             f"{results['machine']}.")  # fmt: skip
    head = ("blocks' weights", "bits a weight", "loss", "against BF16", "perplexity", "tensors")
    cells = [(row["label"], f"{row['bits']:.3f}", f"{row['nats']:.4f}", f"{100 * (row['nats'] / rows[0]['nats'] - 1):+.2f} %",
              f"{row['perplexity']:.2f}", ", ".join(f"{n} {name}" for name, n in row["types"].items())) for row in rows]  # fmt: skip
    return f"{about}\n\n{grid(head, cells)}\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--work", type=Path, default=ROOT / "build/ptq", help="directory for the checkpoint and all files")
    p.add_argument("--out", type=Path, default=ROOT / "build/ptq/ptq", help="output path, to which .md and .json are added")
    p.add_argument("--calibration", type=int, default=400_000, metavar="N", help="characters of text for the importance matrix")
    p.add_argument("--context", type=int, default=256, metavar="N", help="tokens in a chunk")
    p.add_argument("--chunks", type=int, metavar="N", help="use only the first N chunks of the held-out text")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    p.add_argument("training", nargs="*", default=[], metavar="-- FLAG", help="flags of make_demo_checkpoint.py, after --")
    a = p.parse_args(argv)
    a.model = a.work / "hf"
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        results = measure(a)
        a.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        a.out.with_suffix(".md").write_text(table(results))
        print(table(results), end="")
        return 0
    except (Stop, OSError) as e:  # OSError includes NotBuilt
        print(f"compare_ptq: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
