"""What real_training.py trains on: a trained model, text and tasks in one directory, which is all that a run needs.

The vocabulary is cut down to the tokens that the text and the tasks use. In a small model, most of a step's work is the softmax over all
262144 tokens, and most of the weights are their embeddings. All methods are compared in the same vocabulary.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sherry_gguf.errors import Stop
from sherry_gguf.qat.data import pack
from sherry_gguf.training.files import undamaged, write

TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
TEXTS = ("books.train.jsonl.xz", "books.heldout.jsonl.xz")
COMPLETE, PARTS, SUMS = "prepared.json", "parts", "SHA256SUMS"  # in --work
PIECE = 1 << 16  # characters that are split into tokens at a time


def prepare(source: Path, name: str, a: argparse.Namespace) -> None:
    """Fill --work with tokens.npz, tasks.json and model/, from a Hugging Face directory and --data. Raises Stop.

    name: the model's, for the report.
    """
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
    np.savez_compressed(a.work / "tokens.npz", train=number[train].astype(np.int32), held_out=number[held_out].astype(np.int32), used=used)
    for task in tasks.values():
        for row in task:
            row["requests"] = [number[request].tolist() for request in row["requests"]]
    (a.work / "tasks.json").write_text(json.dumps(tasks) + "\n")
    print("model", flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    with_tokens(model, torch.from_numpy(used), {int(old): int(number[old]) for old in special})
    shutil.rmtree(a.work / "model", ignore_errors=True)
    model.save_pretrained(a.work / "model")
    figures = {"model": name, "vocabulary": len(used), "train": len(train), "held_out": len(held_out),
               "bos": None if tokenizer.bos_token_id is None else int(number[tokenizer.bos_token_id]),
               "tasks": {name: len(task) for name, task in tasks.items()}, "parameters": model.num_parameters()}  # fmt: skip
    (a.work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    split_up(a.work, a.part_size << 20)
    finish(a.work, a.work / "figures.json")


def split_up(work: Path, size: int) -> None:
    """Copy what `run` needs into work/parts: files of `size` bytes at most, and their hashes."""
    parts, archive = work / PARTS, work / "archive.part"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("figures.json", "tokens.npz", "tasks.json", "model"):
            tar.add(work / name, COMPLETE if name == "figures.json" else name, filter=plain)
    sums: list[str] = []
    with archive.open("rb") as file:
        while data := file.read(size):
            name = f"{len(sums):03}.part"
            (parts / name).write_bytes(data)
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    archive.unlink()
    (parts / SUMS).write_text("".join(sums))  # last: with it they are complete


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files give the same digest everywhere."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def finish(work: Path, figures: Path) -> None:
    """Write prepared.json: the figures, and "data", which tells data sets apart. `figures`, a file, is removed."""
    write(work / COMPLETE, json.dumps(json.loads(figures.read_text()) | {"data": parts_digest(work)}, indent=1) + "\n")
    figures.unlink()


def parts_digest(work: Path) -> str:
    """The beginning of the digest of the parts' list, which holds their digests."""
    return hashlib.sha256((work / PARTS / SUMS).read_bytes()).hexdigest()[:16]


def join(work: Path) -> None:
    """Put the directory together from its parts, if only these are there.

    Raises Stop if a part is missing or damaged, or if the directory was made of others.
    """
    if not (work / PARTS / SUMS).exists():
        return
    if (mark := work / COMPLETE).exists():
        with undamaged(mark, "prepare it again"):
            data = json.loads(mark.read_text())["data"]
        if data != parts_digest(work):
            raise Stop(f"{work} was made of other parts than {work / PARTS} holds now: move these to a new --work")
        return
    archive, fresh = work / "archive.part", work / "fresh"
    with archive.open("wb") as out:
        for line in (work / PARTS / SUMS).read_text().splitlines():
            digest, name = line.split()
            path = work / PARTS / name
            if not path.exists() or hashlib.sha256(data := path.read_bytes()).hexdigest() != digest:
                raise Stop(f"{path} is missing or damaged: copy it again")
            out.write(data)
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(fresh, filter="data")
    archive.unlink()
    shutil.rmtree(work / "model", ignore_errors=True)
    for path in fresh.iterdir():
        if path.name != COMPLETE:
            path.replace(work / path.name)
    finish(work, fresh / COMPLETE)  # last
    fresh.rmdir()


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
    from sherry_gguf.evaluation import tasks as lm_tasks  # not on a machine that only trains

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
    join(work)
    mark = work / COMPLETE
    if not mark.is_file():
        raise Stop(f"{work} is not prepared: run `real_training.py prepare` first, or copy the folder {PARTS} of a prepared one there")
    with undamaged(mark, "prepare it again"), np.load(work / "tokens.npz") as z:
        figures = json.loads(mark.read_text())
        blocks = [pack(z[name], context, figures["bos"]) for name in ("train", "held_out")]
        tasks = json.loads((work / "tasks.json").read_text())
    random = np.random.default_rng(seed)
    for name, b in zip(("train", "held-out"), blocks, strict=True):
        if len(b) < 2:
            raise Stop(f"{work} has {len(b)} {name} sequences of {context} tokens: prepare more, or use a smaller --context")
    return figures, *(random.permutation(b) for b in blocks), tasks
