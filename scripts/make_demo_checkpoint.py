#!/usr/bin/env python3
"""Train a small Sherry checkpoint on this machine's own Python standard library; write it as a Hugging Face directory.

A Llama with a sentencepiece tokenizer, every linear layer of its blocks 3:4 sparse ternary from the first step on.
An interrupted run saves its state and the next one goes on from there; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path


def interrupted() -> int:
    print("make_demo_checkpoint: interrupted; run the same command again to go on", file=sys.stderr, flush=True)
    return 128 + signal.SIGINT


if __name__ == "__main__":  # the imports take seconds, and an exception would come out of their middle
    signal.signal(signal.SIGINT, lambda *_: os._exit(interrupted()))
# PyTorch's threads wait for each other by spinning. Not to do so makes a step five times faster beside other work, and
# a third slower alone.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from sherry_gguf import qat

ROOT = Path(__file__).resolve().parent.parent
BOS, EOS = 1, 2
SKIPPED = {"__pycache__", "dist-packages", "distutils", "encodings", "idlelib", "lib2to3", "pydoc_data",
           "site-packages", "test", "tests", "tkinter", "turtledemo"}  # fmt: skip
EMBEDDING_STD = 0.1  # transformers' 0.02 costs 0.2 nats of held-out loss in runs this short
HELD_OUT = 20  # one file in so many
EVAL_TOKENS = 1 << 15
CORPUS_MIN = 100_000  # bytes
SAVE_EVERY = 30  # seconds


class Stop(Exception):
    """What a person can mend; the message says how."""


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        return run(a)
    except (Stop, OSError) as e:
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
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of the matrix products while training; auto measures which is faster")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def run(a: argparse.Namespace) -> int:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k != "out"}
    record = a.out / "training.json"
    if record.is_file():
        with undamaged(record, a.out):
            done = json.loads(record.read_text(encoding="utf-8"))
            changed, loss = differences(done["settings"], settings), float(done["loss"]["after"])
        if changed:
            raise Stop(f"{a.out} was trained with other settings ({changed}): remove it, or choose another --out")
        print(f"checkpoint {a.out}: already trained, held-out loss {loss:.3f}", flush=True)
        return 0
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise Stop(f"{a.out} is not a checkpoint of this program: remove it, or choose another --out")

    work = a.out.with_name(a.out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another run is training in {work}: wait for it, or choose another --out") from None
        begin(work, settings)
        tokenizer, train_ids, held_out = corpus(work, a)
        result = train(work, a, tokenizer, train_ids, held_out)
        if result is None:
            raise KeyboardInterrupt
        (work / "hf/training.json").write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")
        os.replace(work / "hf", a.out)
        shutil.rmtree(work)
    print(f"checkpoint {a.out}: held-out loss {result['loss']['after']:.3f}", flush=True)
    return 0


def differences(old: dict, new: dict) -> str:
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


# ---------------------------------------------------------------------------------------------------- text to tokens


def corpus(work: Path, a: argparse.Namespace) -> tuple[LlamaTokenizer, np.ndarray, np.ndarray]:
    """The tokenizer, and the token ids (uint16) of the training files and of the held-out ones."""
    saved = work / "tokens.npz"
    if not saved.is_file():
        texts = read(a.corpus, a.corpus_bytes)
        if a.vocab > 1 << 16:
            raise Stop(f"--vocab {a.vocab}: at most {1 << 16}")
        t = time.time()
        model = train_tokenizer([t for i, t in enumerate(texts) if i % HELD_OUT], a.vocab)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = [[*x, EOS] for x in pieces.encode(texts)]
        train_ids = np.concatenate([x for i, x in enumerate(ids) if i % HELD_OUT]).astype(np.uint16)
        held_out = np.concatenate(ids[::HELD_OUT]).astype(np.uint16)
        write(work / "tokenizer.model", model)
        write(work / "held_out.txt", "".join(texts[::HELD_OUT]).encode())
        buffer = io.BytesIO()
        np.savez(buffer, train=train_ids, held_out=held_out)
        write(saved, buffer.getvalue())
        print(f"corpus: {len(texts)} files of {a.corpus}, a tokenizer of {a.vocab} pieces, {len(train_ids)} tokens to "
              f"train on, {len(held_out)} held out, {time.time() - t:.0f} s", flush=True)
    with undamaged(saved, work), np.load(saved) as z:
        train_ids, held_out = z["train"], z["held_out"]
    for what, ids in ("train on", train_ids), ("hold out", held_out):
        if len(ids) <= a.context:
            raise Stop(f"{a.corpus} gives {len(ids)} tokens to {what}, fewer than a context of {a.context}: "
                       "use a larger --corpus")
    tokenizer = LlamaTokenizer(str(work / "tokenizer.model"), legacy=True, add_prefix_space=False,
                               model_max_length=a.context, clean_up_tokenization_spaces=False)
    # A chat program that gets this template continues the user's text, which is all that a base model can do.
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer, train_ids, held_out


def read(directory: Path, limit: int) -> list[str]:
    if not directory.is_dir():
        raise Stop(f"--corpus {directory}: no such directory")
    texts, size = [], 0
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).parts
        if SKIPPED & set(parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text, length = path.read_text(encoding="utf-8"), path.stat().st_size
        except (UnicodeDecodeError, OSError):
            continue
        if size + length > limit:
            break
        texts.append(text)
        size += length
    if size < CORPUS_MIN:
        raise Stop(f"{directory} holds {size} bytes of usable .py files, too few to train on: name another --corpus")
    return texts


def train_tokenizer(texts: list[str], vocab: int) -> bytes:
    """A sentencepiece BPE model that keeps every character, and that llama.cpp's tokenizer agrees with.

    Lines are its sentences, so a newline is always the byte piece <0x0A>; runs of spaces are pieces of their own.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line), model_writer=model,
            model_type="bpe", vocab_size=vocab, byte_fallback=True, character_coverage=0.9999, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, minloglevel=2)
    except RuntimeError as e:
        raise Stop(f"sentencepiece made no tokenizer of {vocab} pieces: {e}") from None
    return model.getvalue()


# ----------------------------------------------------------------------------------------------------------- training


def train(work: Path, a: argparse.Namespace, tokenizer, train_ids: np.ndarray, held_out: np.ndarray) -> dict | None:
    """Train, export to work/hf and evaluate what was exported. None after an interruption, with the state saved."""
    if "OMP_NUM_THREADS" not in os.environ:  # PyTorch's own default leaves out what it takes for hyperthreads
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    torch.manual_seed(a.seed)
    for name in "hidden", "intermediate":
        if getattr(a, name) % 128:
            raise Stop(f"--{name} {getattr(a, name)}: it must be a multiple of 128, a block's weights")
    heads = a.hidden // 64
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.intermediate, num_hidden_layers=a.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, max_position_embeddings=a.context,
        tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=EOS))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    ternary = qat.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    lines = np.flatnonzero(np.isin(train_ids, [tokenizer.convert_tokens_to_ids("<0x0A>"), EOS])) + 1
    lines = lines[lines < len(train_ids) - a.context]  # a sequence begins with a line, as a prompt does
    autocast = a.precision == "bfloat16" or a.precision == "auto" and bf16_is_faster()
    precision, threads = "bfloat16" if autocast else "float32", torch.get_num_threads()
    print(f"training: {model.num_parameters() / 1e6:.1f} M parameters, {len(ternary)} ternary matrices, {a.steps} "
          f"steps of {a.batch} x {a.context} tokens, {threads} threads, {precision} products", flush=True)

    state = work / "state.pt"
    step, seconds, before, mean = 0, 0.0, None, None
    if state.is_file():
        with undamaged(state, work):
            s = torch.load(state, weights_only=True)
            model.load_state_dict(s["model"])
            optimizer.load_state_dict(s["optimizer"])
            step, seconds, before, mean = s["step"], s["seconds"], s["before"], s["mean"]
        print(f"training: going on from step {step}", flush=True)
    if before is None:
        before = evaluate(model, held_out, a.context)
        print(f"training: held-out loss before {before:.3f}", flush=True)

    def save() -> None:
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds,
                    "before": before, "mean": mean}, buffer)
        write(state, buffer.getvalue())

    stop = []  # the signal, acted upon between two steps: in the middle of one the state would be torn
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        model.train()
        clock = saved = time.monotonic()
        with tqdm(total=a.steps, initial=step, unit="step", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
            while step < a.steps and not stop:
                for group in optimizer.param_groups:
                    group["lr"] = a.lr * rate(step, a.steps)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    x = batch(train_ids, lines, a, step)
                    loss = model(input_ids=x, labels=x).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                value = loss.item()
                if not math.isfinite(value):
                    raise Stop(f"the loss is {value} at step {step}: use a lower --lr than {a.lr}")
                mean = value if mean is None else 0.98 * mean + 0.02 * value
                step += 1
                now = time.monotonic()
                seconds, clock = seconds + now - clock, now
                bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
                bar.update()
                if now - saved > SAVE_EVERY:
                    save()
                    saved = now
        if stop or step == a.steps:
            save()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if stop:
        return None

    shutil.rmtree(work / "hf", ignore_errors=True)
    qat.export(model, tokenizer, work / "hf")
    shutil.copyfile(work / "held_out.txt", work / "hf/held_out.txt")  # to measure perplexity on
    exported = AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    after = evaluate(exported, held_out, a.context)
    print(f"training: held-out loss {before:.3f} before, {after:.3f} after, {seconds:.0f} s", flush=True)
    return {"loss": {"before": before, "train": mean, "after": after}, "seconds": round(seconds, 1), "threads": threads,
            "precision": precision}


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over 5 % of the steps, then a cosine down to 5 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.525 + 0.475 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def batch(ids: np.ndarray, lines: np.ndarray, a: argparse.Namespace, step: int) -> torch.Tensor:
    """int64 (batch, context): BOS, then text from a random line on, drawn from the step alone, so as to resume."""
    starts = np.random.default_rng((a.seed, step)).choice(lines, a.batch)
    return torch.from_numpy(np.stack([sequence(ids, s, a.context) for s in starts]))


def sequence(ids: np.ndarray, start: int, context: int) -> np.ndarray:
    return np.concatenate([[BOS], ids[start : start + context - 1]]).astype(np.int64)


@torch.no_grad()
def evaluate(model, ids: np.ndarray, context: int) -> float:
    """Mean loss in nats a token, over the first `EVAL_TOKENS` of `ids`, in float32."""
    model.eval()
    starts = range(0, min(len(ids), EVAL_TOKENS) - context + 1, context - 1)
    losses = []
    for s in starts:
        x = torch.from_numpy(sequence(ids, s, context))[None]
        losses.append(model(input_ids=x, labels=x).loss.item())
    return sum(losses) / len(losses)


def bf16_is_faster() -> bool:
    """Measured, as CPUs without bfloat16 instructions emulate them slowly; the weights stay float32 either way."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
        runs = []
        for _ in range(5):
            t = time.perf_counter()
            x @ w
            runs.append(time.perf_counter() - t)
        times[dtype] = min(runs)
    return times[torch.bfloat16] < 0.8 * times[torch.float32]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
