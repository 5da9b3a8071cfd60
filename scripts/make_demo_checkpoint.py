#!/usr/bin/env python3
"""Train a small Sherry checkpoint on this machine's own Python standard library; write it as a Hugging Face directory.

A Llama with a sentencepiece tokenizer, trained by train_sherry.py from scratch. An interrupted run saves its state and the
next one goes on from there; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import sysconfig
from pathlib import Path


def interrupted() -> int:
    print("make_demo_checkpoint: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


if __name__ == "__main__":  # the imports take seconds, and an exception would come out of their middle
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))

# As in train_sherry.py, and here as well since OpenMP reads it when PyTorch is loaded, which python_corpus does first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import python_corpus
import torch

from sherry_gguf import qat
from sherry_gguf.qat import command
from sherry_gguf.qat.quantizer import METHODS

ROOT = Path(__file__).resolve().parent.parent
EVAL_TOKENS = 1 << 15


class Stop(Exception):
    """What a person can mend; the message says how."""


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        return run(a)
    except (Stop, python_corpus.CorpusError, OSError) as e:
        print(f"make_demo_checkpoint: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted()


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "build/demo/hf", help="directory to write")
    p.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="directory of .py files")
    p.add_argument("--corpus-bytes", type=int, default=12_000_000, help="read at most so much of it")
    p.add_argument("--vocab", type=int, default=2048, help="pieces of the tokenizer")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--hidden", type=int, default=256, help="a multiple of 128 and of 64, the size of a head")
    p.add_argument("--intermediate", type=int, default=768, help="a multiple of 128")
    p.add_argument("--context", type=int, default=256, help="tokens of a training sequence")
    p.add_argument("--batch", type=int, default=8, help="sequences of a step")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    p.add_argument("--method", choices=list(METHODS), default="sherry", help="full: in full precision, to be quantized after training")
    p.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the matrix products while training; auto measures which is faster",
    )
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def run(a: argparse.Namespace) -> int:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "out"}
    record = a.out / "demo.json"
    if record.is_file():
        with undamaged(record, a.out):
            done = json.loads(record.read_text(encoding="utf-8"))
            changed, loss = differences(done["settings"], settings), float(done["loss"])
        if changed:
            raise Stop(f"{a.out} was trained with other settings ({changed}): remove it, or choose another --out")
        print(f"checkpoint {a.out}: already trained, held-out loss {loss:.3f}", flush=True)
        return 0
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise Stop(f"{a.out} is not a checkpoint of this program: remove it, or choose another --out")
    python_corpus.check_sizes(a.hidden, a.intermediate)

    work = a.out.with_name(a.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another run is training in {work}: wait for it, or choose another --out") from None
        begin(work, settings)
        if not (work / "start/config.json").is_file():
            prepare(work, a)
        status = train(work, a)
        if status:
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


def differences(old: dict, new: dict) -> str:
    old = {"method": "sherry"} | old  # what earlier versions trained without saying so
    return ", ".join(f"{k}: {old.get(k)} then, {new.get(k)} now" for k in {**old, **new} if old.get(k) != new.get(k))


def begin(work: Path, settings: dict) -> None:
    """Leave in `work` only what an earlier run with the same settings made, on which this one can go on."""
    mark = work / "settings.json"
    rest = [path for path in work.iterdir() if path.name not in ("lock", "settings.json.part")]
    if mark.is_file():
        with undamaged(mark, work):
            changed = differences(json.loads(mark.read_text(encoding="utf-8")), settings)
        if not changed:
            return
        print(f"training: {work} was begun with other settings ({changed}): starting over", flush=True)
    elif rest:
        raise Stop(f"{work} is in the way and not of this program: remove it, or choose another --out")
    for path in rest:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(mark, json.dumps(settings).encode())


def write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def undamaged(path: Path, directory: Path):
    """What a file of an earlier run holds may make anything fail."""
    try:
        yield
    except Exception as e:
        raise Stop(f"{path} is damaged ({type(e).__name__}: {e}): remove {directory} to start over") from e


def prepare(work: Path, a: argparse.Namespace) -> None:
    """What train_sherry.py is given: train.jsonl and held_out.jsonl, and in `start` a model's first weights and tokenizer."""
    texts, held_out = python_corpus.read(a.corpus, a.corpus_bytes)
    for name, of_name in ("train", texts), ("held_out", held_out):
        write(work / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in of_name).encode())
    write(work / "held_out.txt", "".join(held_out).encode())
    write(work / "tokenizer.model", python_corpus.train_tokenizer(texts, a.vocab))
    model = python_corpus.small_llama(a.vocab, a.layers, a.hidden, a.intermediate, a.context, a.seed)
    shutil.rmtree(work / "start", ignore_errors=True)
    part = work / "start.part"
    python_corpus.hf_tokenizer(work / "tokenizer.model", a.context).save_pretrained(part)
    model.save_pretrained(part)
    os.replace(part, work / "start")
    print(f"corpus: {len(texts)} files of {a.corpus}, {len(held_out)} more held out, a tokenizer of {a.vocab} pieces", flush=True)


def train(work: Path, a: argparse.Namespace) -> int:
    """The status of train_sherry.py, which leaves its result in work/hf."""
    if "OMP_NUM_THREADS" not in os.environ:  # PyTorch's own default leaves out what it takes for hyperthreads
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    measured = work / "precision"  # once: a run that goes on must not change it
    if not measured.is_file():
        write(measured, b"bfloat16" if qat.bf16_is_faster() else b"float32")
    bf16 = (measured.read_text() if a.precision == "auto" else a.precision) == "bfloat16"
    shutil.rmtree(work / "hf", ignore_errors=True)
    flags = {
        "model": work / "start", "train": work / "train.jsonl", "validation": work / "held_out.jsonl",
        "context": a.context, "eval_tokens": EVAL_TOKENS, "export": work / "hf", "output_dir": work / "run",
        "method": a.method, "max_steps": a.steps, "per_device_train_batch_size": a.batch, "learning_rate": a.lr, "weight_decay": 0.1,
        "adam_beta2": 0.95, "optim": "adamw_torch_fused", "seed": a.seed, "bf16": bf16, "use_cpu": True,
        "save_strategy": "steps", "save_steps": max(1, a.steps // 10), "report_to": "none",
    }  # fmt: skip
    return command.main([x for k, v in flags.items() for x in (f"--{k}", str(v))], trained=False)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
