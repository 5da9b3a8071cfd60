#!/usr/bin/env python3
"""Train the small model of `sherry-gguf demo` on English books in the public domain, and write it as a GGUF with a model card.

First come rounds of training in full precision at a constant learning rate, then a finish that trains 3:4 sparse ternary weights
while the rate falls to zero. Ctrl-C saves a checkpoint; run the same command again to resume. The number of rounds may change
between runs: a finish starts after any round whose result exists, and more rounds may follow later.

--data holds books.train.jsonl.xz and books.heldout.jsonl.xz, one book in a line, with the fields title and text.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

from sherry_gguf import signals

PROGRAM = "make_demo_model.py"
INTERRUPTED = f"{PROGRAM}: interrupted; run the same command again to resume"

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background programs ignore it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see sherry_gguf.training.command
with signals.exit_at_once(INTERRUPTED):
    import books
    import make_demo_checkpoint
    import python_corpus

    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import HelpWithDefaults, call
    from sherry_gguf.qat import command
    from sherry_gguf.training.files import differences, locked, undamaged, write

VOCAB, LAYERS, HIDDEN, INTERMEDIATE, CONTEXT, BATCH = 4096, 6, 256, 768, 256, 8
RATE, FINISH_RATE = 2e-3, 1e-3
FINISH_SHARE = 3  # the finish takes the rounds' steps divided by this
EVAL_TOKENS = {"round": 1 << 15, "finish": 1 << 18}
LARGEST = 6_000_000  # bytes of the GGUF
EMBEDDINGS = "Q8_0"
CHUNKS = 1000  # of the held-out text that the GGUF's loss is measured on
NAME = "Sherry demo"
DESCRIPTION = "A small language model with 3:4 sparse ternary weights, trained on novels in the public domain. It continues a story."


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    try:
        a.work.mkdir(parents=True, exist_ok=True)
        with locked(a.work, "--work"):
            return run(a)
    except (Stop, OSError) as e:
        print(f"{PROGRAM}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpWithDefaults)
    p.add_argument("--data", type=Path, required=True, help="directory of the books")
    p.add_argument("--work", type=Path, required=True, help="directory for what training leaves; 300 MB")
    p.add_argument("--out", type=Path, required=True, help="GGUF to write; the model card goes beside it, as .md")
    p.add_argument("--rounds", type=int, default=8, help="rounds before the finish")
    p.add_argument("--round-steps", type=int, default=1000, help=f"steps of a round, of {BATCH * CONTEXT} tokens each")
    p.add_argument("--finish-steps", type=int, help=f"steps of the finish (default: those of all rounds, divided by {FINISH_SHARE})")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    a = p.parse_args(argv)
    if a.rounds < 1 or a.round_steps < 1:
        p.error("--rounds and --round-steps: at least 1")
    if a.finish_steps is None:
        a.finish_steps = max(1, a.rounds * a.round_steps // FINISH_SHARE)
    return a


def run(a: argparse.Namespace) -> int:
    make_demo_checkpoint.use_all_cores()
    begin(a.work, {"seed": a.seed, "round_steps": a.round_steps})
    if not (a.work / "start/config.json").is_file():
        prepare(a)
    before = a.work / "start"
    for n in range(1, a.rounds + 1):
        flags = {"method": "full", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100 if n == 1 else 20,
                 "learning_rate": RATE, "max_steps": a.round_steps, "export_dtype": "float32"}  # fmt: skip
        if status := train(a, f"round-{n}", before, n, flags):
            return status
        before = a.work / f"round-{n}/hf"
    finish = f"finish-{a.rounds}-{a.finish_steps}"
    flags = {"method": "sherry", "lr_scheduler_type": "linear", "warmup_steps": 20, "learning_rate": FINISH_RATE,
             "max_steps": a.finish_steps, "monitor_every": 0}  # fmt: skip
    if status := train(a, finish, before, 0, flags):
        return status
    return convert(a, finish)


def begin(work: Path, settings: dict) -> None:
    """Keep the settings of the first run in `work`. Raises Stop if they were others."""
    mark = work / "settings.json"
    if not mark.is_file():
        write(mark, json.dumps(settings))
    with undamaged(mark, f"remove {work} to start over"):
        changed = differences(json.loads(mark.read_text(encoding="utf-8")), settings)
    if changed:
        raise Stop(f"{work} was begun with other settings ({changed}): choose another --work")


def prepare(a: argparse.Namespace) -> None:
    """Write the input of the training command: train.jsonl, held_out.jsonl, and in `start` the first weights and the tokenizer."""
    texts = {}
    for name, file in ("train", "books.train.jsonl.xz"), ("held_out", "books.heldout.jsonl.xz"):
        books_, others = books.read(a.data / file)
        texts[name] = list(books_.values())
        write(a.work / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts[name]))
        print(f"{file}: {len(books_)} novels and tales, {sum(map(len, texts[name])) / 1e6:.1f} MB; {others} other books", flush=True)
    write(a.work / "tokenizer.model", python_corpus.train_tokenizer(texts["train"], VOCAB))
    model = python_corpus.small_llama(VOCAB, LAYERS, HIDDEN, INTERMEDIATE, CONTEXT, a.seed)
    shutil.rmtree(a.work / "start", ignore_errors=True)
    part = a.work / "start.part"
    python_corpus.hf_tokenizer(a.work / "tokenizer.model", CONTEXT).save_pretrained(part)
    model.save_pretrained(part)
    os.replace(part, a.work / "start")


def train(a: argparse.Namespace, name: str, before: Path, n: int, flags: dict) -> int:
    """Run the training command, from the weights in `before` to those in NAME/hf, unless they exist; its exit status."""
    out = a.work / name
    if not (out / "hf/config.json").is_file():
        print(f"==> {name}", flush=True)
        flags = {
            "model": before, "train": a.work / "train.jsonl", "validation": a.work / "held_out.jsonl", "context": CONTEXT,
            "eval_tokens": EVAL_TOKENS[name.partition("-")[0]], "output_dir": out, "per_device_train_batch_size": BATCH,
            "weight_decay": 0.1, "adam_beta2": 0.95, "optim": "adamw_torch_fused", "seed": a.seed + n, "use_cpu": True,
            "bf16": make_demo_checkpoint.faster_in_bf16(a.work), "save_strategy": "steps", "save_steps": 50, "report_to": "none",
        } | flags  # fmt: skip
        if status := command.main([x for k, v in flags.items() for x in (f"--{k}", str(v))], PROGRAM, trained=n != 1):
            return status
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return 0


def convert(a: argparse.Namespace, name: str) -> int:
    """Write the GGUF of NAME/hf, proven against it, its checksum and its model card. Raises Stop."""
    hf, part = a.work / name / "hf", a.work / "model.gguf"
    write(
        a.work / "metadata.json",
        json.dumps({"general.license.name": "MIT", "general.description": DESCRIPTION, "general.languages": ["en"]}),
    )
    sherry = [sys.executable, "-m", "sherry_gguf"]
    types = ["--token-embedding-type", EMBEDDINGS, "--output-tensor-type", EMBEDDINGS]
    call(*sherry, "convert", hf, "--outfile", part, "--require-exact", "--model-name", NAME, "--metadata", a.work / "metadata.json", *types)
    call(*sherry, "verify", part, hf, *types)
    if (size := part.stat().st_size) > LARGEST:
        raise Stop(f"{part} is {size} bytes; the limit is {LARGEST}")
    texts = [json.loads(line)["text"] for line in (a.work / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    write(a.work / "held_out.txt", "\n".join(texts))
    text = ["--text", a.work / "held_out.txt", "--context", CONTEXT, "--chunks", CHUNKS]
    call(*sherry, "evaluate", part, hf, *text, "--output", a.work / "losses.json")
    losses = [m["text"] for m in json.loads((a.work / "losses.json").read_text(encoding="utf-8"))["models"]]
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write(a.out.with_suffix(".md"), card(a, json.loads((hf / "training.json").read_text(encoding="utf-8")), losses, size))
    write(a.out.with_suffix(".sha256"), f"{digest}  {a.out.name}\n")
    write(a.out, part.read_bytes())
    print(f"{a.out}: {size / 1e6:.1f} MB, held-out loss {losses[0]['nats']:.3f}", flush=True)
    return 0


def card(a: argparse.Namespace, record: dict, losses: list[dict], size: int) -> str:
    """The model card, from the finish's training.json and the losses of the GGUF and of its checkpoint."""
    gguf, checkpoint = losses
    books_ = {name: len((a.work / f"{name}.jsonl").read_bytes().splitlines()) for name in ("train", "held_out")}
    steps, tokens = a.rounds * a.round_steps, BATCH * CONTEXT
    total = (steps + a.finish_steps) * tokens / 1e6
    bits = gguf["nats_per_byte"] / math.log(2)
    command = f"make_demo_model.py --rounds {a.rounds} --round-steps {a.round_steps} --finish-steps {a.finish_steps} --seed {a.seed}"
    return f"""# {NAME}

{DESCRIPTION}

| | |
|---|---|
| architecture | Llama: {LAYERS} layers, hidden size {HIDDEN}, feed-forward {INTERMEDIATE}, vocabulary {VOCAB}, context {CONTEXT} |
| file | {size / 1e6:.2f} MB: the layers' matrices TQ1_25, embeddings and output {EMBEDDINGS} |
| trained on | {books_["train"]} novels and tales in English, out of mlschmitt/classic-books-markdown |
| training | {steps} steps in full precision, then {a.finish_steps} with Sherry; {tokens} tokens a step, {total:.1f} M in all |
| held-out loss | {gguf["nats"]:.3f} nats a token, {bits:.3f} bits a byte: `llama-perplexity`, {books_["held_out"]} other books |
| the checkpoint's | {checkpoint["nats"]:.3f} by the same measure; {record["loss"]["held_out"]:.3f} over all tokens of a context |
| made by | `scripts/{command}` |
| licence | MIT, as this repository. The books are in the public domain in the United States |

It is a base model: it continues text, and answers nothing. It is far too small to know anything. What it writes is invented, and may
repeat the prejudices of books that are a hundred years old.
"""


if __name__ == "__main__":
    sys.exit(main())
