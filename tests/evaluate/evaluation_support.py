"""What the tests of the evaluation share: data, runs and processes."""

import json
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from lm_eval.api.instance import Instance

from sherry_gguf.evaluation import command
from sherry_gguf.evaluation.command import PAPER
from sherry_gguf.evaluation.tasks import EXAMPLES

REPO = Path(__file__).parents[2]
TEXT = REPO / "sherry_gguf" / "kernels.py"  # any ordinary text of 6000 characters or more
DATA = Path("tests/evaluate/eval_data")  # our own documents for each of the paper's tasks, in the hub's form
DATA_ARGS = ["--data", str(DATA)]
DOCUMENTS = dict(zip(PAPER, (10, 6, 4, 8, 10)))
EXACT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # attention in float32, like PyTorch's
# How far a choice's log-likelihood may be from PyTorch's, in nats; the average is 80. The largest differences measured on 110
# choices: 2e-5 with EXACT; 5e-3 with llama.cpp's defaults, whose attention uses fp16; 6e-2 for TQ1_25, which also rounds
# activations to 8 bits.
EXACT_NATS, F32_NATS, TERNARY_NATS = 2e-4, 0.02, 0.2


def run(*args):
    return command.main([*map(str, args), "--threads", "1"], "sherry-gguf evaluate")


def accuracies(task):
    return {k: v for k, v in task.items() if k.startswith("acc")}


def our_documents():
    """The documents in DATA by task."""
    files = {name: next(DATA.glob(f"{name}.*.jsonl")).read_text() for name in PAPER}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def report_of(path, *args):
    """A run's exit code and its JSON."""
    code = run(*args, "--output", path)
    return code, json.loads(path.read_text())


def ask(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("task", 0, 1))


def state(pid):
    """A process's state from /proc: "Z" for a zombie, None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cached(cache, name, config, rows):
    """Put a data set into a cache as if it had been downloaded from the hub."""
    namespace, short = name.split("/")
    directory = cache / f"{namespace}___{short}" / config / "0.0.0" / "0123456789abcdef"
    directory.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows)
    info = datasets.DatasetInfo(features=data.features, dataset_name=short, config_name=config, version="0.0.0",
                                splits=datasets.SplitDict(dataset_name=short))  # fmt: skip
    for split in "train", "validation", "test":
        writer = ArrowWriter(features=data.features, path=str(directory / f"{short}-{split}.arrow"))
        for row in data:
            writer.write(row)
        count, size = writer.finalize()
        info.splits[split] = datasets.SplitInfo(split, num_bytes=size, num_examples=count, dataset_name=short)
    info.write_to_directory(str(directory))


def in_the_hubs_form():
    """(name, configuration, rows) of the paper's data sets, with our documents as rows."""
    sets = (("baber/piqa", "default"), ("allenai/ai2_arc", "ARC-Easy"), ("allenai/ai2_arc", "ARC-Challenge"),
            ("Rowan/hellaswag", "default"), ("allenai/winogrande", "winogrande_xl"))  # fmt: skip
    return [(*names, rows) for names, rows in zip(sets, our_documents().values())]


def local_task(directory, name, data):
    """Write a new task on `data`, which has PIQA's form."""
    text = (EXAMPLES / "piqa.yaml").read_text()
    text = text.replace("task: piqa", f"task: {name}").replace("piqa.validation.jsonl", str(data))
    (directory / f"{name}.yaml").write_text(text)
