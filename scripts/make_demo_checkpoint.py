#!/usr/bin/env python3
"""Train a small Sherry checkpoint on this machine's Python standard library, as a Hugging Face directory.

The model is a Llama with a sentencepiece tokenizer, trained from scratch. Ctrl-C saves a checkpoint; run the same command
again to resume. A finished run is not repeated.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from sherry_gguf import signals

PROGRAM = "make_demo_checkpoint.py"
INTERRUPTED = f"{PROGRAM}: interrupted; run the same command again to resume"

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background programs ignore it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sherry_gguf.training.command; python_corpus loads PyTorch before that does
with signals.exit_at_once(INTERRUPTED):
    import python_corpus
    import torch

    from sherry_gguf import qat
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import HelpWithDefaults
    from sherry_gguf.qat import command
    from sherry_gguf.qat.quantizer import METHODS
    from sherry_gguf.training.files import LOCK, differences, locked, undamaged, write

ROOT = Path(__file__).resolve().parent.parent
EVAL_TOKENS = 1 << 15


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        return run(a)
    except (Stop, OSError) as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--out", type=Path, default=ROOT / "build/demo/hf", help="directory to write")
    python_corpus.add_corpus(p, 12_000_000)
    python_corpus.add_sizes(p, context=256)
    p.add_argument("--steps", type=int, default=1500, help="training steps")
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    p.add_argument(
        "--method", choices=list(METHODS), default="sherry", help="how to quantize; full trains in full precision, to quantize later"
    )
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="precision of the matrix products; auto measures which is faster")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data")
    return p.parse_args(argv)


def run(a: argparse.Namespace) -> int:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "out"}
    record = a.out / "demo.json"
    if record.is_file():
        with undamaged(record, f"remove {a.out} to start over"):
            done = json.loads(record.read_text(encoding="utf-8"))
            changed, loss = differences({"method": "sherry"} | done["settings"], settings), float(done["loss"])  # old ones have no method
        if changed:
            raise Stop(f"{a.out} was trained with other settings ({changed}): remove it, or choose another --out")
        print(f"checkpoint {a.out}: already trained, held-out loss {loss:.3f}", flush=True)
        return 0
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise Stop(f"{a.out} is not a checkpoint that this program wrote: remove it, or choose another --out")
    python_corpus.check_sizes(a.hidden, a.intermediate)

    work = a.out.with_name(a.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, "--out"):
        begin(work, settings)
        if not (work / "start/config.json").is_file():
            prepare(work, a)
        if status := train(work, a):
            return status
        trained = json.loads((work / "hf/training.json").read_text(encoding="utf-8"))
        loss = trained["loss"]["held_out"]
        shutil.copyfile(work / "held_out.txt", work / "hf/held_out.txt")  # to measure perplexity on
        (work / "hf/demo.json").write_text(json.dumps({"settings": settings, "loss": loss}, indent=2) + "\n")
        shutil.copyfile(work / "run/training.png", work / "hf/training.png")
        os.replace(work / "hf", a.out)
        shutil.rmtree(work)
    print(f"checkpoint {a.out}: held-out loss {loss:.3f}", flush=True)
    return 0


def begin(work: Path, settings: dict) -> None:
    """Empty `work`, unless it holds a run with the same settings, from which this one resumes. Raises Stop."""
    mark = work / "settings.json"
    rest = [path for path in work.iterdir() if path.name not in (LOCK, "settings.json.part")]
    if mark.is_file():
        with undamaged(mark, f"remove {work} to start over"):
            changed = differences(json.loads(mark.read_text(encoding="utf-8")), settings)
        if not changed:
            return
        print(f"training: {work} was begun with other settings ({changed}): starting over", flush=True)
    elif rest:
        raise Stop(f"{work} is in the way, and this program did not write it: remove it, or choose another --out")
    for path in rest:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(mark, json.dumps(settings))


def prepare(work: Path, a: argparse.Namespace) -> None:
    """Write the input of the training command: train.jsonl, held_out.jsonl, and in `start` the first weights and the tokenizer."""
    texts, held_out = python_corpus.read(a.corpus, a.corpus_bytes)
    for name, of_name in ("train", texts), ("held_out", held_out):
        write(work / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in of_name))
    write(work / "held_out.txt", "".join(held_out))
    write(work / "tokenizer.model", python_corpus.train_tokenizer(texts, a.vocab))
    model = python_corpus.small_llama(a.vocab, a.layers, a.hidden, a.intermediate, a.context, a.seed)
    shutil.rmtree(work / "start", ignore_errors=True)
    part = work / "start.part"
    python_corpus.hf_tokenizer(work / "tokenizer.model", a.context).save_pretrained(part)
    model.save_pretrained(part)
    os.replace(part, work / "start")
    print(f"corpus: {len(texts)} files of {a.corpus}, {len(held_out)} more held out, a tokenizer of {a.vocab} tokens", flush=True)


def use_all_cores() -> None:
    """PyTorch's default leaves out what it takes for hyperthreads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def faster_in_bf16(work: Path) -> bool:
    """Whether bfloat16 products are clearly faster here: measured once and kept in `work`, since a resumed run must not change it."""
    measured = work / "precision"
    if not measured.is_file():
        write(measured, "bfloat16" if qat.bf16_is_faster() else "float32")
    return measured.read_text() == "bfloat16"


def train(work: Path, a: argparse.Namespace) -> int:
    """Run the training command, which leaves its result in work/hf; its exit status."""
    use_all_cores()
    faster = faster_in_bf16(work) if a.precision == "auto" else a.precision == "bfloat16"
    shutil.rmtree(work / "hf", ignore_errors=True)
    flags = {
        "model": work / "start", "train": work / "train.jsonl", "validation": work / "held_out.jsonl",
        "context": a.context, "eval_tokens": EVAL_TOKENS, "export": work / "hf", "output_dir": work / "run",
        "method": a.method, "max_steps": a.steps, "per_device_train_batch_size": a.batch, "learning_rate": a.lr, "weight_decay": 0.1,
        "adam_beta2": 0.95, "optim": "adamw_torch_fused", "seed": a.seed, "bf16": faster, "use_cpu": True,
        "save_strategy": "steps", "save_steps": max(1, a.steps // 10), "report_to": "none",
    }  # fmt: skip
    return command.main([x for k, v in flags.items() for x in (f"--{k}", str(v))], PROGRAM, trained=False)


if __name__ == "__main__":
    sys.exit(main())
