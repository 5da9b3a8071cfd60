#!/usr/bin/env python3
"""How fast whole models of real shapes run in the built llama.cpp: TQ1_25 against the types of a size near it.

Random weights, since speed does not depend on them; one file a shape and type, made once in build/bench/models. The
types take turns in each of some rounds, every test in a llama-bench process of its own; what is printed are medians,
and medians of the rounds' ratios. How fast memory can be read is measured between the rounds: decoding reads every
weight for every token. Also how long loading takes and how much memory it needs. Needs scripts/build_llama_cpp.py and a C
compiler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

try:
    import gguf
    import numpy as np
    from bench_common import cpu_name, memory_bandwidth, program
    from tqdm import tqdm

    from sherry_gguf import llama_cpp, tq1_25
except ImportError as error:
    sys.exit(f"bench_models: {error}: run it as .venv/bin/python scripts/bench/models.py, after scripts/setup.sh")

OURS = tq1_25.NAME
PLAIN = "-plain"  # after a type's name: weights as in the file, not repacked at load
TYPES = [OURS, OURS + PLAIN, "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "Q2_K", "Q4_0", "Q8_0", "F16"]
LOAD_TYPES = [OURS, OURS + PLAIN, "TQ2_0", "Q4_0"]
FILE_VERSION = 1  # of what `write_model` writes: to be raised with any change of it or of SHAPES
BANK = 128  # random rows of each length; a tensor repeats them
LOAD_LIBRARIES = ["llama", "ggml", "ggml-base"]
FIRST = 16  # tokens of a prompt that warms up
SAME = ("model", "type", "threads", "test")  # what makes two entries of a report's "speed" the same


# ---- models ----


@dataclass(frozen=True)
class Shape:
    name: str
    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_base: float
    qkv_bias: bool = False


SHAPES = {  # embeddings of all are tied: their matrix is the output matrix too
    "0.5b": Shape("Qwen2.5-0.5B", "qwen2", 896, 24, 14, 2, 64, 4864, 1e6, qkv_bias=True),
    "0.7b": Shape("BitNet 0.7B", "llama", 1536, 24, 16, 16, 96, 4096, 1e4),
    "1b": Shape("Llama-3.2-1B", "llama", 2048, 16, 32, 8, 64, 8192, 5e5),
    "3b": Shape("Llama-3.2-3B", "llama", 3072, 28, 24, 8, 128, 8192, 5e5),
    "tiny": Shape("tiny (for tests)", "llama", 256, 2, 4, 2, 64, 512, 1e4),
}
MODELS = ["0.5b", "0.7b", "1b", "3b"]

# What llama-quantize takes where a row is no whole number of a type's blocks, and F16 where that does not fit either.
FALLBACK = (
    dict.fromkeys("Q2_0 Q2_K Q3_K STQ1_0 TQ1_0 TQ1_25 TQ2_0".split(), "Q4_0")
    | dict.fromkeys("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS".split(), "IQ4_NL")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # (rows, n) or (n,), as NumPy has it
    type: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * llama_cpp.ggml().row_size(self.type, self.shape[-1])


def base(label: str) -> str:
    """The type of a row of the tables."""
    return label.removesuffix(PLAIN)


def stored_type(type_name: str, n: int) -> str:
    """The type that rows of n weights are stored in where `type_name` is asked for. Raises ValueError if none is."""
    if n % llama_cpp.ggml().block(type_name)[0] == 0:
        return type_name
    other = FALLBACK.get(type_name)
    if other is None and llama_cpp.ggml().block(type_name)[0] > 32:
        raise ValueError(f"rows of {n} weights are not whole {type_name} blocks, and llama-quantize names no other type")
    return other if other and n % llama_cpp.ggml().block(other)[0] == 0 else "F16"


def plan(shape: Shape, type_name: str, vocab: int, embeddings: str) -> list[Tensor]:
    """Every tensor of a model, in the order of the file."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = {"attn_q": (q, shape.hidden), "attn_k": (kv, shape.hidden), "attn_v": (kv, shape.hidden),
                "attn_output": (shape.hidden, q), "ffn_gate": (shape.ffn, shape.hidden),
                "ffn_up": (shape.ffn, shape.hidden), "ffn_down": (shape.hidden, shape.ffn)}  # fmt: skip
    tensors = [Tensor("token_embd.weight", (vocab, shape.hidden), stored_type(embeddings, shape.hidden))]
    for layer in range(shape.layers):
        tensors += [Tensor(f"blk.{layer}.{n}.weight", (shape.hidden,), "F32") for n in ("attn_norm", "ffn_norm")]
        for name, size in matrices.items():
            tensors.append(Tensor(f"blk.{layer}.{name}.weight", size, stored_type(type_name, size[1])))
            if shape.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                tensors.append(Tensor(f"blk.{layer}.{name}.bias", size[:1], "F32"))
    return [*tensors, Tensor("output_norm.weight", (shape.hidden,), "F32")]


def facts(shape: Shape, type_name: str, vocab: int, embeddings: str) -> dict:
    """What the tables tell of a file: its bytes, those that a token reads, and what its block matrices are stored as."""
    tensors = plan(shape, type_name, vocab, embeddings)
    blocks = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    weights = sum(math.prod(t.shape) for t in blocks)
    stored: dict[str, int] = {}
    for t in blocks:
        stored[t.type] = stored.get(t.type, 0) + math.prod(t.shape)
    return {
        "bytes": sum(t.bytes for t in tensors),
        "bytes_per_token": sum(t.bytes for t in tensors),  # all: the tied embeddings are read as the output matrix
        "bits_per_weight": 8 * sum(t.bytes for t in blocks) / weights,
        "stored": {name: count / weights for name, count in stored.items()},  # shares of the block weights
        "kept_rows": sorted({t.shape[1] for t in blocks if t.type != type_name}),
    }


def write_model(path: Path, shape: Shape, tensors: list[Tensor], vocab: int, done: Callable[[int], object]) -> None:
    """Write a planned model to a new file, there only when it is whole. `done` is told the bytes of each tensor."""
    random = np.random.default_rng(0)
    banks: dict[tuple[str, int], np.ndarray] = {}  # uint8 (BANK, bytes of a row)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, shape.arch)
    try:
        writer.add_name(f"{shape.name}, random")
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(vocab)
        writer.add_tokenizer_model("no_vocab")
        for t in tensors:
            # the id as a number: the published gguf package lacks some types that llama.cpp has
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.int8), t.bytes, llama_cpp.ggml().type_id(t.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            n = t.shape[-1]
            if len(t.shape) == 1:
                data = np.ones(n, np.float32) if "norm" in t.name else 0.02 * random.standard_normal(n, np.float32)
            else:
                if (t.type, n) not in banks:
                    x = 0.02 * random.standard_normal((BANK, n), np.float32)
                    importance = np.ones(n, np.float32) if t.type.startswith("IQ") else None  # some cannot do without
                    banks[t.type, n] = llama_cpp.ggml().quantize(t.type, x, importance)
                bank = banks[t.type, n]
                data = np.resize(bank, (t.shape[0], bank.shape[1]))  # repeats the rows
            writer.write_tensor_data(data)
            done(data.nbytes)
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- what is measured ----


@dataclass(frozen=True)
class Test:
    kind: str  # "pp": a prompt of so many tokens; "tg": so many tokens one after the other
    tokens: int
    depth: int = 0  # tokens that the context holds before
    batch: int = 2048
    ubatch: int = 512

    def __str__(self) -> str:
        sizes = f" b{self.batch} ub{self.ubatch}" * (self.kind == "pp" and (self.batch, self.ubatch) != (2048, 512))
        return f"{self.kind}{self.tokens}{sizes}{f' @ d{self.depth}' * bool(self.depth)}"


def llama_bench(file: Path, label: str, threads: int, test: Test) -> dict:
    """llama-bench's record of one run in a new process; "avg_ts" is tokens a second."""
    prompt, gen = (str(test.tokens), 0) if test.kind == "pp" else (0, test.tokens)
    warm_up = []
    if test.kind == "pp" and test.depth:
        warm_up = ["--no-warmup"]  # filling the context is one
    elif test.kind == "pp" and test.tokens > FIRST:
        # llama-bench's own would be the whole prompt once more; without any, the first touch of the mapped file shows
        prompt, warm_up = f"{FIRST},{prompt}", ["--no-warmup"]
    result = llama_cpp.run("llama-bench", "-m", file, "-o", "json", "-r", 1, "-t", threads, "-p", prompt, "-n", gen,
                           "-d", test.depth, "-b", test.batch, "-ub", test.ubatch, "--repack",
                           int(not label.endswith(PLAIN)), *warm_up,
                           stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    if result.returncode:
        last = result.stderr.strip().splitlines()[-3:]
        raise OSError(f"llama-bench ended with {result.returncode} on {file.name}, {test}: {' '.join(last)}")
    return json.loads(result.stdout)[-1]


def load(file: Path, label: str, threads: int) -> dict[str, dict[str, float]]:
    """Seconds and MiB of loading a model and of its first token, see bench_load.c."""
    command = [program("bench_load", *LOAD_LIBRARIES), file, str(int(not label.endswith(PLAIN))), str(threads)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"bench_load ended with {result.returncode}: {result.stderr.strip()}")
    rows = {}
    for line in result.stdout.splitlines():
        what, seconds, *kib = line.split()
        rows[what] = {"seconds": float(seconds)} | dict(zip(("anon", "file", "peak"), (int(k) / 1024 for k in kib)))
    return rows


def shortened(tokens: int, rate: float, seconds: float) -> int:
    """A half, a quarter, ... of so many tokens, at least 8, that takes no more than `seconds` (0: any time)."""
    while seconds and tokens // 2 >= 8 and tokens / rate > seconds:
        tokens //= 2
    return tokens


def lengths(tests: list[Test], rates: dict[str, dict[str, float]], threads: int, most: int, seconds: float) -> dict:
    """(the test of a group, then each type's own) for each of `tests`, made short enough.

    A group has one length, which its median type can do in `seconds`, so that all do the same; only a type that would
    need twice the time is given less. rates: for each type, tokens a second of "pp" and "tg" with `most` threads.
    """
    out = {}
    for test in tests:
        known = {label: rate[test.kind] * threads / most for label, rate in rates.items()}
        common = shortened(test.tokens, statistics.median(known.values()), seconds)
        own = {label: replace(test, tokens=shortened(common, rate, 2 * seconds)) for label, rate in known.items()}
        out[test] = replace(test, tokens=common), own
    return out


def rotated(items: list, by: int) -> list:
    return items[by % len(items) :] + items[: by % len(items)]


class Run:
    """One run of the benchmark: `report` is what was measured so far, as the JSON file has it."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.report: dict = {
            "cpu": cpu_name(),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": args.rounds,
            "complete": False,
            "isa": os.environ.get("SHERRY_ISA"),
            "vocab": args.vocab,
            "embeddings": args.embeddings,
            "models": {},
            "bandwidth": {str(t): [] for t in args.threads},
            "speed": [],
            "load": [],
        }
        for key in args.models:
            shape = SHAPES[key]
            files = {base(label): facts(shape, base(label), args.vocab, args.embeddings) for label in args.types}
            weights = sum(math.prod(t.shape) for t in plan(shape, "F16", args.vocab, "F16"))
            self.report["models"][key] = asdict(shape) | {"parameters": weights, "types": files}
        prompts = itertools.product(args.prompt, args.depth, args.batch, args.ubatch)
        self.tests = [Test("pp", *sizes) for sizes in prompts]
        self.tests += [Test("tg", *sizes) for sizes in itertools.product(args.generate, args.depth)]
        self.load_types = [label for label in LOAD_TYPES if label in args.types] if args.load_rounds else []

    def path(self, key: str, label: str) -> Path:
        name = f"{key}-{self.args.vocab}-{self.args.embeddings}-{base(label)}.v{FILE_VERSION}.gguf"
        return self.args.dir / name

    def missing(self) -> Iterator[tuple[str, str, int]]:
        """(model, type, bytes) of the files that are to be made."""
        for key, model in self.report["models"].items():
            for type_name, file in model["types"].items():
                if not self.path(key, type_name).exists():
                    yield key, type_name, file["bytes"]

    def estimate(self) -> float:
        """Seconds, roughly: 20e9 weights a second and thread, processes that start, map and repack 1.5 GB/s."""
        args, total = self.args, sum(size for *_, size in self.missing()) / 3e8
        for model in self.report["models"].values():
            for label in args.types:
                start = 0.3 + model["types"][base(label)]["bytes"] / 1.5e9
                total += start + args.load_rounds * (label in self.load_types) * start
                for test in self.tests:
                    for threads in args.threads:
                        rate = 20e9 * threads / model["parameters"]
                        tokens = shortened(test.tokens, rate, args.longest) + test.depth
                        total += args.rounds * (start + tokens / rate)
        return total

    def check(self) -> None:
        """Compile what is needed and say what is to come. Raises OSError if the disk is too small."""
        needed = sum(size for *_, size in self.missing())
        self.args.dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.args.dir).free
        if needed * 1.02 > free:
            raise OSError(f"{self.args.dir}: models of {needed / 1e9:.1f} GB are to be made, {free / 1e9:.1f} GB are free")
        sizes = {key: sum(f["bytes"] for f in model["types"].values()) for key, model in self.report["models"].items()}
        print(f"{cpu_name()}: about {self.estimate() / 60:.0f} min; {needed / 1e9:.1f} GB of models are to be "
              f"made in {self.args.dir}", file=sys.stderr)  # fmt: skip
        program("bench_memory")  # an error in compiling them had better come now
        if self.load_types:
            program("bench_load", *LOAD_LIBRARIES)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if max(sizes.values()) > 0.8 * memory:
            print(f"the files of a model, up to {max(sizes.values()) / 1e9:.1f} GB, do not stay in {memory / 1e9:.0f} GB "
                  "of memory: loading will show the disk's speed; fewer --types help", file=sys.stderr)  # fmt: skip

    def make(self) -> None:
        missing = list(self.missing())
        total = sum(size for *_, size in missing)
        with tqdm(total=total, desc="making models", unit="B", unit_scale=True, disable=None) as bar:
            for key, type_name, _ in missing:
                tensors = plan(SHAPES[key], type_name, self.args.vocab, self.args.embeddings)
                write_model(self.path(key, type_name), SHAPES[key], tensors, self.args.vocab, bar.update)

    def memory(self) -> None:
        for threads in self.args.threads:
            self.report["bandwidth"][str(threads)] += memory_bandwidth(threads, 3)

    def measure(self) -> None:
        args = self.args
        runs = args.rounds * len(self.tests) * len(args.threads) * len(args.types)
        steps = len(args.models) * (runs + len(args.types) + args.load_rounds * len(self.load_types))
        self.make()
        with tqdm(total=steps, desc="measuring", unit="run", disable=None) as bar:
            for key in args.models:
                self.measure_model(key, bar)
        self.report["complete"] = True

    def measure_model(self, key: str, bar: tqdm) -> None:
        args, most = self.args, max(self.args.threads)

        def step(label: str, what: str) -> Path:
            bar.set_postfix_str(f"{key} {label} {what}")
            bar.update()
            return self.path(key, label)

        # A first look at each file: brings it into the page cache, and says how long a test would take.
        rates = {}
        for label in args.types:
            file = step(label, "first look")
            records = {test.kind: llama_bench(file, label, most, test) for test in (Test("pp", 32), Test("tg", 4))}
            rates[label] = {kind: record["avg_ts"] for kind, record in records.items()}
            self.report["llama_cpp"] = records["pp"]["build_commit"]

        groups = []
        for threads in args.threads:
            for test, (common, own) in lengths(self.tests, rates, threads, most, args.longest).items():
                entries = {}
                for label in args.types:
                    which = {"model": key, "type": label, "threads": threads, "test": str(test)}
                    entries[label] = which | {"common": str(common), "run": str(own[label])} | asdict(own[label])
                    entries[label]["rates"] = []
                    self.report["speed"].append(entries[label])
                groups.append((threads, own, entries))
        for turn in range(args.rounds):
            self.memory()
            for threads, own, entries in groups:
                for label in rotated(args.types, turn):
                    file = step(label, f"{own[label]}, {plural(threads)}, round {turn + 1}")
                    entries[label]["rates"].append(llama_bench(file, label, threads, own[label])["avg_ts"])
        self.memory()

        entries = {label: {"model": key, "type": label, "rounds": []} for label in self.load_types}
        self.report["load"] += entries.values()
        for turn in range(args.load_rounds if entries else 0):
            for label in rotated(self.load_types, turn):
                entries[label]["rounds"].append(load(step(label, f"load, round {turn + 1}"), label, most))


# ---- what it comes to ----


def median_ratio(ours: list[float], theirs: list[float]) -> float | None:
    """The median of the ratios of the rounds that both have; None if there are none."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return statistics.median(ratios) if ratios else None


def summarize(report: dict) -> None:
    """Add the medians, ratios and shares to a report."""
    report["bandwidth_median"] = {t: statistics.median(r) for t, r in report["bandwidth"].items() if r}
    report["bandwidth_maximum"] = {t: max(r) for t, r in report["bandwidth"].items() if r}
    by_key = {tuple(entry[k] for k in SAME): entry for entry in report["speed"]}
    for entry in report["speed"]:
        rates = entry["rates"]
        ours = by_key.get((entry["model"], OURS, entry["threads"], entry["test"]))
        entry["median"] = statistics.median(rates) if rates else None
        entry["ours_ratio"] = median_ratio(ours["rates"], rates) if ours else None
        if entry["kind"] == "tg" and rates:
            size = report["models"][entry["model"]]["types"][base(entry["type"])]["bytes_per_token"]
            limit = report["bandwidth_median"].get(str(entry["threads"]))
            entry["gb_per_s"] = size * entry["median"] / 1e9
            entry["limit"] = limit * 1e9 / size if limit else None  # tokens a second
            entry["of_limit"] = entry["gb_per_s"] / limit if limit else None
    for entry in report["load"]:
        for what in ("load", "token"):
            for unit in ("seconds", "anon", "file", "peak"):
                values = [r[what][unit] for r in entry["rounds"]]
                entry[f"{what}_{unit}"] = statistics.median(values) if values else None


def number(x: float | None) -> str:
    """Three digits or more, never an exponent."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def shown(label: str) -> str:
    return label.replace(PLAIN, " plain")


def markdown(report: dict) -> str:
    """The tables of a summarized report."""
    intro = (
        f"{report['cpu']}; llama.cpp {report['llama_cpp']}; {report['date']}. Random weights, vocabulary of "
        f"{report['vocab']}, embeddings (tied: the output matrix too) {report['embeddings']}. llama-bench, the types in "
        f"turn, medians of {report['rounds']} rounds; pp: tokens a second of a prompt, tg: of generating."
    )
    if report["isa"]:
        intro += f" {OURS}'s kernels: SHERRY_ISA={report['isa']}."
    if not report["complete"]:
        intro += " **Ended early: some rounds are missing.**"
    legend = (
        f'"{OURS} ×": the median of the rounds\' ratios of {OURS}\'s rate to the row\'s. "of limit": what was read, every '
        "weight for every token, as a share of what memory can be read at:"
    )
    out = ["# Whole models", "", intro, "", legend, ""]
    for threads, rate in report["bandwidth_median"].items():
        rounds, highest = len(report["bandwidth"][threads]), report["bandwidth_maximum"][threads]
        out.append(f"* {plural(int(threads))}: {rate:.1f} GB/s, the median of {rounds} rounds (highest {highest:.1f})")
    for key, model in report["models"].items():
        shape = (
            f"{model['parameters'] / 1e6:,.0f} M parameters: {model['layers']} layers, hidden {model['hidden']}, "
            f"feed-forward {model['ffn']}, {model['heads']} heads of {model['head_dim']}, {model['kv_heads']} for keys "
            "and values."
        )
        out += ["", f"## {model['name']}", "", shape]
        entries = [e for e in report["speed"] if e["model"] == key]
        for threads in dict.fromkeys(e["threads"] for e in entries):
            out += speed_table(model, [e for e in entries if e["threads"] == threads], threads)
        out += load_table([e for e in report["load"] if e["model"] == key])
    return "\n".join(out) + "\n"


def fallen_back(file: dict, label: str) -> dict[str, float]:
    """Types that block weights are stored in instead of the one asked for, and their shares."""
    return {name: share for name, share in file["stored"].items() if name != base(label)}


def plural(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def speed_table(model: dict, entries: list[dict], threads: int) -> list[str]:
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f" [{notes.index(text) + 1}]"

    tests = list(dict.fromkeys(e["test"] for e in entries))
    table = {(e["type"], e["test"]): e for e in entries}
    head = ["type", "bits/weight", "MiB"]
    for test in tests:
        e = next(e for e in entries if e["test"] == test)
        head += [f"{e['common']} t/s", f"{OURS} ×", *["GB/s", "of limit"] * (e["kind"] == "tg")]
    out = ["", f"{plural(threads)}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label in dict.fromkeys(e["type"] for e in entries):
        file = model["types"][base(label)]
        others = fallen_back(file, label)
        kept = " and ".join(f"{100 * share:.0f} % of the block weights are {name}" for name, share in others.items())
        rows = " and ".join(map(str, file["kept_rows"]))
        mark = note(f"{kept}: rows of {rows} are no whole blocks of {base(label)}") if kept else ""
        row = [shown(label) + mark, f"{file['bits_per_weight']:.3f}", number(file["bytes"] / 2**20)]
        for test in tests:
            e = table[label, test]
            # another length is no secret: it may be another speed
            row += [number(e["median"]) + (note(f"{e['run']}, to save time") if e["run"] != e["common"] else "")]
            row += ["" if e["ours_ratio"] is None else f"{e['ours_ratio']:.2f}"]
            if e["kind"] == "tg":
                row += [number(e.get("gb_per_s")), f"{100 * e['of_limit']:.0f} %" if e.get("of_limit") else ""]
        out.append(f"| {' | '.join(row)} |")
    return out + [""] * bool(notes) + [f"[{i + 1}] {text}  " for i, text in enumerate(notes)]


def load_table(entries: list[dict]) -> list[str]:
    entries = [e for e in entries if e["rounds"]]
    if not entries:
        return []
    intro = (
        f"Loading, the file in the page cache, medians of {max(len(e['rounds']) for e in entries)}; memory of the "
        "process's own, of files, and the highest sum while loading:"
    )
    head = "type", "load s", "own MiB", "files MiB", "peak MiB", "first token s", "own MiB", "files MiB"
    out = ["", intro, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for e in entries:
        keys = ("load_seconds", "load_anon", "load_file", "load_peak", "token_seconds", "token_anon", "token_file")
        out.append(f"| {shown(e['type'])} | {' | '.join(number(e[key]) for key in keys)} |")
    return out


COLOURS = {OURS: "#c8102e", OURS + PLAIN: "#e8899a", "TQ1_0": "#1f5a96", "TQ2_0": "#5b9bd5", "Q1_0": "#2e7d5b",
           "Q2_0": "#74b89a", "Q2_K": "#8a6d3b", "Q4_0": "#c9a227", "Q8_0": "#8d8d8d", "F16": "#5a5a5a"}  # fmt: skip


def draw(report: dict, path: Path) -> None:
    """A panel for each test and number of threads (rows) and each model (columns), a bar for each type."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    speed = [e for e in report["speed"] if e["rates"]]
    order = {"tg": 0, "pp": 1}
    speed.sort(key=lambda e: order[e["kind"]])
    rows = list(dict.fromkeys((e["kind"], e["test"], e["threads"]) for e in speed))
    models = [key for key in report["models"] if any(e["model"] == key for e in speed)]
    types = list(dict.fromkeys(e["type"] for e in speed))
    inches = 2.2 + 3.1 * len(models), 1.4 + (0.7 + 0.22 * len(types)) * len(rows)
    fig = Figure(figsize=inches, layout="constrained", dpi=130)
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(rows), len(models), squeeze=False)
    for i, (kind, test, threads) in enumerate(rows):
        for j, key in enumerate(models):
            ax = axes[i][j]
            entries = {e["type"]: e for e in speed if (e["model"], e["test"], e["threads"]) == (key, test, threads)}
            end = (1.4 if kind == "pp" else 1.65) * max((e["median"] for e in entries.values()), default=1.0)
            for y, label in enumerate(types):
                if label not in entries:
                    continue
                e, ours = entries[label], label == OURS
                ax.barh(y, e["median"], 0.74, color=COLOURS.get(label, "#a9a9c9"), zorder=2)
                others = fallen_back(report["models"][key]["types"][base(label)], label)
                text = number(e["median"]) + " *" * (e["run"] != e["common"])
                if others:
                    text += f" ({', '.join(f'{100 * share:.0f} % {name}' for name, share in others.items())})"
                x, limit = e["median"], e.get("limit")
                if limit and limit < 0.98 * end:
                    ax.plot([limit] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.3, zorder=4)
                    width = 0.025 * len(text) * end  # about; where the limit would cross the text, it goes behind
                    x = limit if x - 0.03 * end < limit < x + width and limit + width < end else x
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                ax.text(x + 0.015 * end, y, text, va="center", fontsize=8, bbox=box, zorder=3,
                        fontweight="bold" if ours else "normal")  # fmt: skip
            ax.set_xlim(0, end)
            ax.set_ylim(len(types) - 0.4, -0.6)
            ax.set_yticks(range(len(types)), [shown(label) * (j == 0) for label in types], fontsize=8)
            for tick, label in zip(ax.get_yticklabels(), types):
                tick.set_fontweight("bold" if label == OURS else "normal")
            ax.tick_params(axis="x", labelsize=7, length=2)
            ax.tick_params(axis="y", length=0)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", color="#e4e4e4", zorder=0)
            common = next((e["common"] for e in entries.values()), test)
            ax.set_title(f"{report['models'][key]['name']}\n" * (i == 0) + f"{common}, {plural(threads)}", fontsize=9)
    notes = ["* a shorter run"] * any(e["run"] != e["common"] for e in speed)
    stored = [fallen_back(report["models"][e["model"]]["types"][base(e["type"])], e["type"]) for e in speed]
    notes += ["(..%) weights in another type"] * any(stored)
    title = "Tokens a second: tg generating, pp prompt", report["cpu"], "; ".join(notes)
    fig.suptitle("\n".join(filter(None, title)), fontsize=10)
    if any(e.get("limit") for e in speed):
        text = "limit: memory bandwidth / bytes of weights a token; further right where none is seen"
        line = Line2D([], [], color="black", linewidth=1.3, label=text)
        fig.legend(handles=[line], loc="outside lower center", fontsize=8, frameon=False)
    fig.savefig(path)


# ---- the command ----


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return list(dict.fromkeys(values))


def depths(text: str) -> list[int]:
    return [n - 1 for n in numbers(",".join(str(int(part) + 1) for part in text.split(",")))]


def thread_counts(text: str) -> list[int]:
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return sorted(numbers(text.replace("all", str(every))))


def model_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.lower().split(",")))
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"no model {name!r}: there are {', '.join(SHAPES)}")
    return names


def type_names(text: str) -> list[str]:
    names = []
    for part in text.split(","):
        name = part.strip().upper()
        label = f"{one_type(name.removesuffix(PLAIN.upper()))}{PLAIN * name.endswith(PLAIN.upper())}"
        names.append(label)
    return list(dict.fromkeys(names))


def one_type(text: str) -> str:
    """The name of a type that weights can be stored in."""
    ggml, name = llama_cpp.ggml(), text.upper()
    try:
        weights, _ = ggml.block(name)
        ggml.quantize(name, np.ones((1, weights), np.float32), np.ones(weights, np.float32))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def parse(argv: list[str] | None) -> argparse.Namespace:
    build = llama_cpp.root() / "bench"
    parser = argparse.ArgumentParser(prog="bench_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, said: str, text: str, **kwargs) -> None:
        parser.add_argument(flag, help=f"{text} (default: {said})", **kwargs)

    every, size = {"metavar": "LIST"}, {"metavar": "LIST", "type": numbers}
    add("--models", ",".join(MODELS), f"of {', '.join(SHAPES)}", type=model_names, **every)
    add("--types", ",".join(TYPES), f"with {PLAIN} at the end: not repacked", type=type_names, default=TYPES, **every)
    add("--threads", "1,all", "numbers of threads", type=thread_counts, default="1,all", **every)
    add("--prompt", "512", "tokens of a prompt", **size)
    add("--generate", "128", "tokens to generate", **size)
    add("--depth", "0", "tokens that the context holds before", type=depths, default=[0], **every)
    add("--batch", "2048", "llama-bench -b, for prompts", default=[2048], **size)
    add("--ubatch", "512", "llama-bench -ub, for prompts", default=[512], **size)
    add("--rounds", "3", "rounds of each test", type=int, metavar="N")
    add("--load-rounds", "3", "rounds of loading; 0: none", type=int, metavar="N")
    text = "a test that takes longer is run with a half, a quarter, ... of its tokens, and the tables say so; 0: never"
    add("--longest", "5", text, type=float, metavar="SECONDS")
    text = "a first look: 0.5b, 128 and 32 tokens, one round, 2 seconds"
    parser.add_argument("--quick", action="store_true", help=text)
    add("--vocab", "32000", "tokens of the vocabulary", type=int, default=32000, metavar="N")
    add("--embeddings", "Q4_0", "type of the embeddings, and so of the output matrix", type=one_type, default="Q4_0")
    add("--dir", "build/bench/models", "where the models are", type=Path, default=build / "models")
    add("--json", "build/bench/models.json", "every round", type=Path, default=build / "models.json", metavar="FILE")
    add("--markdown", "build/bench/models.md", "the tables", type=Path, default=build / "models.md", metavar="FILE")
    add("--plot", "that of --markdown with .png, if matplotlib is there", "the bars", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    defaults = {"models": MODELS, "prompt": [512], "generate": [128], "rounds": 3, "load_rounds": 3, "longest": 5.0}
    quick = {"models": ["0.5b"], "prompt": [128], "generate": [32], "rounds": 1, "load_rounds": 1, "longest": 2.0}
    for key, value in (quick if args.quick else defaults).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.rounds < 1 or args.load_rounds < 0 or args.longest < 0 or args.vocab < 1:
        parser.error("--rounds and --vocab are at least 1, --load-rounds and --longest at least 0")
    if args.load_rounds and sys.platform != "linux":
        print("bench_models: loading is measured on Linux only", file=sys.stderr)
        args.load_rounds = 0
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        if args.plot:
            parser.error("--plot needs matplotlib: .venv/bin/pip install matplotlib")
        print("bench_models: no plot, since matplotlib is not installed", file=sys.stderr)
    else:
        args.plot = args.plot or args.markdown.with_suffix(".png")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = Run(args)
    run.check()
    interrupted = False
    try:
        run.measure()
    except KeyboardInterrupt:
        interrupted = True
    finally:  # what was measured is written after an error as well
        if measured := any(entry["rates"] for entry in run.report["speed"]):
            summarize(run.report)
            for path in filter(None, (args.json, args.markdown, args.plot)):
                path.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(run.report, indent=1) + "\n")
            text = markdown(run.report)
            args.markdown.write_text(text)
            print(text, end="")
            if args.plot:
                draw(run.report, args.plot)
    if interrupted:
        print(f"bench_models: interrupted; {'what was measured so far is written' if measured else 'nothing is written'}",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # in the background shells have it ignore the first
        signal.signal(ending, signal.default_int_handler)
    try:
        main()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench_models: {error}")
