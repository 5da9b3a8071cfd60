"""What real_training.py trains on: a trained model, text and tasks in one directory, which is all that a run needs.

The vocabulary is cut down to the tokens that the text and the tasks use. In a small model, most of a step's work is the softmax over all
262144 tokens, and most of the weights are their embeddings. All methods are compared in the same vocabulary.
"""

import argparse
import json
import lzma
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.evaluation import tasks as lm_tasks
from sherry_gguf.qat.data import pack
from sherry_gguf.training.files import undamaged

TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
TEXTS = ("books.train.jsonl.xz", "books.heldout.jsonl.xz")
COMPLETE = "prepared.json"
PIECE = 1 << 16  # characters that are split into tokens at a time


def prepare(source: Path, a: argparse.Namespace) -> None:
    """Fill --work with tokens.npz, tasks.json and model/, from a Hugging Face directory and --data. Raises Stop."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    print("text", flush=True)
    train, held_out = (split(tokenizer, texts(a.data / name), n) for name, n in zip(TEXTS, (a.tokens, a.held_out_tokens)))
    print("tasks", flush=True)
    tasks = {name: questions(tokenizer, name, a) for name in a.tasks.split(",") if name}
    everything = [np.array(request) for task in tasks.values() for row in task for request in row["requests"]]
    special = np.array([i for i in tokenizer.all_special_ids if i is not None])
    used = np.unique(np.concatenate([train, held_out, special, *everything]))
    number = np.full(used.max() + 1, -1)
    number[used] = np.arange(len(used))
    np.savez(a.work / "tokens.npz", train=number[train].astype(np.int32), held_out=number[held_out].astype(np.int32), used=used)
    for task in tasks.values():
        for row in task:
            row["requests"] = [number[request].tolist() for request in row["requests"]]
    (a.work / "tasks.json").write_text(json.dumps(tasks) + "\n")
    print("model", flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    with_tokens(model, torch.from_numpy(used), {int(old): int(number[old]) for old in special})
    shutil.rmtree(a.work / "model", ignore_errors=True)
    model.save_pretrained(a.work / "model", max_shard_size=f"{a.part_size}MB")
    figures = {"model": a.model, "vocabulary": len(used), "train": len(train), "held_out": len(held_out),
               "bos": None if tokenizer.bos_token_id is None else int(number[tokenizer.bos_token_id]),
               "tasks": {name: len(task) for name, task in tasks.items()}, "parameters": model.num_parameters()}  # fmt: skip
    (a.work / COMPLETE).write_text(json.dumps(figures, indent=1) + "\n")


def texts(path: Path) -> Iterator[str]:
    """The documents of a .jsonl.xz file, in parts that are read in turns, so that a few tokens are from all of them."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    for i in range(max(map(len, documents), default=0) // PIECE + 1):
        for text in documents:
            if piece := text[i * PIECE : (i + 1) * PIECE]:
                yield piece


def split(tokenizer: Any, pieces: Iterable[str], most: int) -> np.ndarray:
    """The pieces' first tokens, int64 (n,), at most so many."""
    found, count = [], 0
    with tqdm(total=most, unit="token", unit_scale=True, leave=False) as bar:
        for piece in pieces:
            ids = np.array(tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"], np.int64)
            found.append(ids)
            count += len(ids)
            bar.update(len(ids))
            if count >= most:
                break
    return np.concatenate(found)[:most]


def questions(tokenizer: Any, name: str, a: argparse.Namespace) -> list[dict]:
    """The documents of one of lm-eval's tasks. Raises Stop.

    Each has "requests", for each choice the tokens of context and continuation, "scored", how many of them are the continuation, and
    "gold", the right choice.
    """
    loaded, missing = lm_tasks.load([name], None, 0, a.data)
    _, failed = lm_tasks.prepare(loaded, a.limit)
    if why := {**missing, **failed}.get(name):
        raise Stop(f"{name}: {why}")
    rows: dict[int, dict] = {}
    for instance in loaded[name].instances:
        context, continuation = instance.args
        start = tokenizer(context.rstrip())["input_ids"]  # lm-eval too gives the continuation the space between them
        whole = tokenizer(context + continuation)["input_ids"]
        row = rows.setdefault(instance.doc_id, {"requests": [], "scored": [], "gold": gold(loaded[name], instance.doc)})
        row["requests"].append(whole)
        row["scored"].append(len(whole) - len(start))
    return list(rows.values())


def gold(task: Any, document: dict) -> int:
    """The number of the right choice."""
    if task.multiple_input:  # WinoGrande: the contexts differ, and the target is the right one's number
        return int(task.doc_to_text(document))
    return int(task.doc_to_target(document))


def with_tokens(model: Any, used: torch.Tensor, special: dict[int, int]) -> None:
    """Cut a model's vocabulary down to these tokens (n,), in place. special: new numbers of the tokens that its config may name."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs.weight is inputs.weight
    inputs.weight = torch.nn.Parameter(inputs.weight.detach()[used].clone())
    outputs.weight = inputs.weight if tied else torch.nn.Parameter(outputs.weight.detach()[used].clone())
    if outputs.bias is not None:
        outputs.bias = torch.nn.Parameter(outputs.bias.detach()[used].clone())
    inputs.num_embeddings = outputs.out_features = len(used)
    inputs.padding_idx = None
    for config in {id(c): c for c in (model.config, model.config.get_text_config(), model.generation_config)}.values():
        for name in "bos_token_id", "eos_token_id", "pad_token_id":
            value = getattr(config, name, None)
            if isinstance(value, list):
                setattr(config, name, [special[i] for i in value if i in special])
            elif value is not None:
                setattr(config, name, special.get(value))
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(used)


def load(work: Path, context: int, seed: int = 0) -> tuple[dict, np.ndarray, np.ndarray, dict]:
    """The figures of `prepare`, blocks to train on and held-out ones, shuffled (n, context), and the tasks. Raises Stop."""
    mark = work / COMPLETE
    if not mark.is_file():
        raise Stop(f"{work} is not prepared: run `real_training.py prepare` first, or copy a prepared directory there")
    with undamaged(mark, "prepare it again"), np.load(work / "tokens.npz") as z:
        figures = json.loads(mark.read_text())
        blocks = [pack(z[name], context, figures["bos"]) for name in ("train", "held_out")]
        tasks = json.loads((work / "tasks.json").read_text())
    random = np.random.default_rng(seed)
    for name, b in zip(("train", "held-out"), blocks, strict=True):
        if len(b) < 2:
            raise Stop(f"{work} has {len(b)} {name} sequences of {context} tokens: prepare more, or use a smaller --context")
    return figures, *(random.permutation(b) for b in blocks), tasks
