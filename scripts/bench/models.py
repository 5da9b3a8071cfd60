#!/usr/bin/env python3
"""Measure whole models of real shapes in the built llama.cpp: TQ1_25 against types of a similar size.

The weights are random, since speed does not depend on them. Each shape and type is a file in build/bench/models, made once.
In every round the types take turns. The tables show medians, and medians of the rounds' ratios. Memory bandwidth is measured
between rounds, because generating reads every weight for every token. On Linux it also measures the time and memory of loading.

Each test with an empty context runs llama-bench in a new process. Tests with tokens in the context come last, all rounds of one
build in one llama-bench, which fills the context once; types with and without repacking, or of different lengths, do not share it.
--resume goes on after an interrupt.

Needs scripts/build_llama_cpp.py and a C compiler. To compare your own files: sherry-gguf bench.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

try:
    import numpy as np
    from common import memory_bandwidth, program
    from model_files import BEFORE, EMBEDDINGS, FILE_VERSION, OURS, PLAIN, SHAPES, Shape, base, facts, plan, type_of, write_model
    from model_report import SAME, draw, markdown, summarize
    from tqdm import tqdm

    from sherry_gguf import llama_cpp, signals
    from sherry_gguf.bench import Test, cpu_name, depths, llama_bench_each, numbers, rotated, thread_counts
    from sherry_gguf.programs import Help, run
    from sherry_gguf.report import counted
except ImportError as error:
    sys.exit(f"models.py: {error}: run it as .venv/bin/python scripts/bench/models.py, after scripts/setup.sh")

MODELS = ["0.5b", "0.7b", "1b", "3b"]
TYPES = [OURS, OURS + PLAIN, "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "Q2_K", "Q4_0", "Q8_0", "F16"]
LOAD_TYPES = [OURS, OURS + PLAIN, "TQ2_0", "Q4_0"]
LOAD_LIBRARIES = ["llama", "ggml", "ggml-base"]


def measure(files: list[Path], label: str, threads: int, test: Test, against: Path | None) -> Iterator[dict]:
    """llama-bench's records of one test of each file, in the build and with or without repacking as the label says."""
    build = against if label.endswith(BEFORE) else None
    return llama_bench_each(files, threads, test, repack=not label.removesuffix(BEFORE).endswith(PLAIN), build=build)


def fingerprint(build: Path) -> str:
    """Tells a build from others: a hash of llama-bench and the libraries beside it."""
    files = {file.resolve() for name in ("bin/llama-bench*", "bin/*.dll", "lib/*") for file in build.glob(name)}
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sorted(files))).hexdigest()[:16]


def load(file: Path, label: str, threads: int) -> dict[str, dict[str, float]]:
    """How long a model and its first token take, in seconds, and memory afterwards, in MiB; see bench_load.c."""
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
    """Halve `tokens`, down to 8, while they take longer than `seconds` (0: no limit) at `rate` tokens a second."""
    while seconds and tokens // 2 >= 8 and tokens / rate > seconds:
        tokens //= 2
    return tokens


def lengths(tests: list[Test], rates: dict[str, dict[str, float]], threads: int, most: int, seconds: float) -> dict:
    """Shorten each test: maps it to (the common test, {type: its own test}).

    All types run the length that the median type finishes in `seconds`; only a type that would take twice as long runs less.
    rates: for each type, tokens a second of "pp" and "tg" with `most` threads.
    """
    out = {}
    for test in tests:
        known = {label: rate[test.kind] * threads / most for label, rate in rates.items()}
        common = shortened(test.tokens, statistics.median(known.values()), seconds)
        own = {label: replace(test, tokens=shortened(common, rate, 2 * seconds)) for label, rate in known.items()}
        out[test] = replace(test, tokens=common), own
    return out


def in_turns(labels: list[str], turn: int) -> list[str]:
    """A round's order where labels of one build, repacked or not, share a process; the next round begins where this one ends."""
    return sorted(rotated(labels, turn), key=lambda label: (label.endswith(BEFORE), PLAIN in label), reverse=turn % 2 == 1)


class Run:
    """One run of the benchmark; `report` holds what was measured so far, as the JSON file does."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.shapes: dict[str, Shape] = {}
        self.report: dict = {
            "cpu": cpu_name(),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": args.rounds,
            "threads": args.threads,
            "longest": args.longest,
            "build": fingerprint(llama_cpp.root()),
            "against": args.against and fingerprint(args.against),
            "complete": False,
            "isa": os.environ.get("SHERRY_ISA"),
            "vocab": args.vocab or "real",
            "embeddings": ", ".join(args.embeddings),
            "reference": "before" if args.against else f"{args.embeddings[0]} embeddings" if len(args.embeddings) > 1 else None,
            "models": {},
            "bandwidth": {str(t): [] for t in args.threads},
            "speed": [],
            "load": [],
        }
        for key in args.models:
            shape = replace(SHAPES[key], vocab=args.vocab or SHAPES[key].vocab)
            self.shapes[key] = shape
            files = {base(label): facts(shape, type_of(label), self.embeddings(label)) for label in args.labels}
            weights = sum(math.prod(t.shape) for t in plan(shape, "F16", "F16"))
            self.report["models"][key] = asdict(shape) | {"parameters": weights, "types": files}
        self.tests = [
            Test("pp", *sizes) for sizes in itertools.product(filter(None, args.prompt), args.prompt_depth, args.batch, args.ubatch)
        ]
        self.tests += [Test("tg", *sizes) for sizes in itertools.product(filter(None, args.generate), args.depth)]
        self.load_types = [label for label in LOAD_TYPES if label in args.labels] if args.load_rounds else []
        self.earlier: dict[tuple, dict] = {}
        if args.resume:
            self.resume(self.saved(args.json))

    @staticmethod
    def saved(path: Path) -> dict:
        """The report in a file. Raises ValueError if it is none."""
        try:
            old = json.loads(path.read_text())
            if isinstance(old["bandwidth"], dict) and all(isinstance(entry, dict) for entry in (*old["speed"], *old["load"])):
                return old
        except (ValueError, TypeError, KeyError):
            pass
        raise ValueError(f"--resume: {path} is not a report of this program, or is damaged: start anew without --resume")

    def resume(self, old: dict) -> None:
        """Keep what an earlier run has measured. Raises ValueError if its settings were others."""
        settings = set(self.report) - {"date", "complete", "bandwidth", "speed", "load"}
        if others := sorted(key for key in settings if old.get(key) != self.report[key]):
            raise ValueError(
                f"--resume: {self.args.json} was measured with different settings ({', '.join(others)}): pass the same flags with the same "
                "build, or another --json"
            )
        self.earlier = {tuple(entry[k] for k in SAME): entry for entry in old["speed"]}
        self.earlier |= {(entry["model"], entry["type"]): entry for entry in old["load"]}
        self.report |= {key: old[key] for key in ("bandwidth", "llama_cpp", "speed", "load")}

    def is_measured(self, key: str) -> bool:
        """Whether an earlier run has every round of a model."""
        wanted = [(key, label, threads, str(test)) for label in self.args.labels for threads in self.args.threads for test in self.tests]
        rounds = {k: len(e["rates"]) if "rates" in e else len(e["rounds"]) for k, e in self.earlier.items()}
        loaded = all(rounds.get((key, label), 0) >= self.args.load_rounds for label in self.load_types)
        return loaded and min(rounds.get(k, 0) for k in wanted) >= self.args.rounds

    def embeddings(self, label: str) -> str:
        return base(label).partition(EMBEDDINGS)[2] or self.args.embeddings[0]

    def reference(self, label: str) -> str | None:
        """The label of the row that `label` is compared with, besides ours."""
        if self.args.against:
            return None if label.endswith(BEFORE) else label + BEFORE
        kind, _, plain = label.partition(EMBEDDINGS)
        return f"{kind}{EMBEDDINGS}{self.args.embeddings[0]}{PLAIN * plain.endswith(PLAIN)}" if plain else None

    def path(self, key: str, label: str) -> Path:
        return self.args.dir / f"{key}-{self.shapes[key].vocab}-{self.embeddings(label)}-{type_of(label)}.v{FILE_VERSION}.gguf"

    def missing(self) -> Iterator[tuple[str, str, int]]:
        """(model, type, bytes) of each file still to be made."""
        for key, model in self.report["models"].items():
            for label, file in model["types"].items():
                if not self.path(key, label).exists():
                    yield key, label, file["bytes"]

    def estimate(self) -> tuple[float, float]:
        """Roughly how many seconds it takes, and how many of them to fill contexts.

        As if a thread did 20e9 weights a second, 50e9 to fill, and a new process mapped 1.5 GB/s.
        """
        args, total, filling = self.args, sum(size for *_, size in self.missing()) / 3e8, 0.0
        builds = {(label.endswith(BEFORE), PLAIN in label) for label in args.labels}
        fills = 1 if len(builds) == 1 else 1 + args.rounds * (len(builds) - 1)  # in_turns
        for model in self.report["models"].values():
            for label in args.labels:
                start = 0.3 + model["types"][base(label)]["bytes"] / 1.5e9
                total += start + args.load_rounds * (label in self.load_types) * start
                for test in self.tests:
                    for threads in args.threads:
                        rate = 20e9 * threads / model["parameters"]
                        total += args.rounds * (start + shortened(test.tokens, rate, args.longest) / rate)
            filling += sum(test.depth * fills * model["parameters"] / 50e9 / threads for test in self.tests for threads in args.threads)
        return total + filling, filling

    def check(self) -> None:
        """Compile the C programs and print the estimate. Raises OSError if the disk is too small."""
        needed = sum(size for *_, size in self.missing())
        self.args.dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.args.dir).free
        if needed * 1.02 > free:
            raise OSError(f"{self.args.dir}: the models need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        total, filling = self.estimate()
        minutes = f"{total / 60:.0f} min" + f", {filling / 60:.0f} of them to fill contexts (--depth 0: none)" * bool(filling)
        print(f"{cpu_name()}: about {minutes}; {needed / 1e9:.1f} GB of models to make in {self.args.dir}", file=sys.stderr)
        program("bench_memory")  # so that a compiler error shows now
        if self.load_types:
            program("bench_load", *LOAD_LIBRARIES)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        largest = max(sum(file["bytes"] for file in model["types"].values()) for model in self.report["models"].values())
        if largest > 0.8 * memory:
            print(f"a model's files take {largest / 1e9:.1f} GB, more than {memory / 1e9:.0f} GB of memory can cache: loading will show "
                  "the disk's speed; choose fewer --types", file=sys.stderr)  # fmt: skip

    def make(self) -> None:
        missing = list(self.missing())
        total = sum(size for *_, size in missing)
        with tqdm(total=total, desc="making models", unit="B", unit_scale=True, disable=None) as bar:
            for key, label, _ in missing:
                tensors = plan(self.shapes[key], type_of(label), self.embeddings(label))
                write_model(self.path(key, label), self.shapes[key], tensors, bar.update)

    def memory(self) -> None:
        for threads in self.args.threads:
            self.report["bandwidth"][str(threads)] += memory_bandwidth(threads, 3)

    def measure(self) -> None:
        args = self.args
        runs = args.rounds * len(self.tests) * len(args.threads) * len(args.labels)
        steps = len(args.models) * (runs + len(args.labels) + args.load_rounds * len(self.load_types))
        self.make()
        with tqdm(total=steps, desc="measuring", unit="run", disable=None) as self.bar:
            for key in args.models:
                if not self.is_measured(key):
                    self.measure_model(key)
        self.report["complete"] = True

    def step(self, key: str, label: str, what: str) -> Path:
        """Show what comes next; returns the file."""
        self.bar.set_postfix_str(f"{key} {label} {what}")
        self.bar.update()
        return self.path(key, label)

    def measure_model(self, key: str) -> None:
        args, most = self.args, max(self.args.threads)

        # A first look brings each file into the page cache and shows how long a test would take.
        rates = {}
        for label in args.labels:
            file = self.step(key, label, "first look")
            records = {test.kind: list(measure([file], label, most, test, args.against))[0] for test in (Test("pp", 32), Test("tg", 4))}
            rates[label] = {kind: record["avg_ts"] for kind, record in records.items()}
            self.report["llama_cpp"] = records["pp"]["build_commit"]

        groups = []
        for threads in args.threads:
            for test, (common, own) in lengths(self.tests, rates, threads, most, args.longest).items():
                entries = {label: self.entry(key, label, threads, test, common, own) for label in args.labels}
                groups.append((threads, own, entries))

        empty, filled = ([g for g in groups if any(t.depth for t in g[1].values()) == deep] for deep in (False, True))
        for turn in range(args.rounds):
            self.memory()
            for group in empty:
                for label in rotated(args.labels, turn):
                    self.run(key, *group, [(turn, label)])
        for group in filled:
            self.memory()
            self.run(key, *group, [(turn, label) for turn in range(args.rounds) for label in in_turns(args.labels, turn)])
        self.memory()

        entries = {label: self.earlier.get((key, label)) or {"model": key, "type": label, "rounds": []} for label in self.load_types}
        self.report["load"] += [entry for entry in entries.values() if (key, entry["type"]) not in self.earlier]
        for turn in range(args.load_rounds if entries else 0):
            for label in rotated(self.load_types, turn):
                if len(entries[label]["rounds"]) <= turn:
                    entries[label]["rounds"].append(load(self.step(key, label, f"load, round {turn + 1}"), label, most))

    def run(self, key: str, threads: int, own: dict[str, Test], entries: dict[str, dict], turns: list[tuple[int, str]]) -> None:
        """Measure what is missing of [(round, label)]; those that follow each other and can share a process do."""
        turns = [(turn, label) for turn, label in turns if len(entries[label]["rates"]) <= turn]
        how = {label: (own[label], label.removesuffix(BEFORE).endswith(PLAIN), label.endswith(BEFORE)) for label in own}
        for (test, *_), together in itertools.groupby(turns, lambda item: how[item[1]]):
            part = list(together)
            records = measure([self.path(key, label) for _, label in part], part[0][1], threads, test, self.args.against)
            for turn, label in part:
                self.step(key, label, f"{test}, {counted(threads, 'thread')}, round {turn + 1}")
                entries[label]["rates"].append(next(records)["avg_ts"])
            for _ in records:
                pass  # raises if llama-bench failed at its end

    def entry(self, key: str, label: str, threads: int, test: Test, common: Test, own: dict[str, Test]) -> dict:
        """The report's entry of a test: a new one, or that of an earlier run, whose length then becomes `own`."""
        which = {"model": key, "type": label, "threads": threads, "test": str(test)}
        if entry := self.earlier.get(tuple(which[k] for k in SAME)):
            own[label] = replace(own[label], tokens=entry["tokens"])
            return entry
        entry = which | {"common": str(common), "run": str(own[label])} | asdict(own[label])
        if test.kind == "tg":  # on average half of the tokens are in the context, too
            entry["cache_bytes"] = SHAPES[key].cache_bytes(test.depth + (own[label].tokens + 1) / 2)
        self.report["speed"].append(entry | {"reference": self.reference(label), "rates": []})
        return self.report["speed"][-1]


# ---- the command ----


def model_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.lower().split(",")))
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"no model {name!r}: there are {', '.join(SHAPES)}")
    return names


def type_names(text: str) -> list[str]:
    names, plain = [part.strip().upper() for part in text.split(",")], PLAIN.upper()
    return list(dict.fromkeys(one_type(name.removesuffix(plain)) + PLAIN * name.endswith(plain) for name in names))


def stored_types(text: str) -> list[str]:
    return list(dict.fromkeys(map(one_type, text.split(","))))


def vocabulary(text: str) -> int:
    """A number from 1 on; 0 stands for the models' own."""
    if text != "real" and int(text) < 1:
        raise ValueError
    return 0 if text == "real" else int(text)


def labels(types: list[str], embeddings: list[str], against: Path | None) -> list[str]:
    """The rows of a table: types by embeddings, if there are several, by builds."""
    rows = types
    if len(embeddings) > 1:
        rows = [base(label) + EMBEDDINGS + e + PLAIN * label.endswith(PLAIN) for label in types for e in embeddings]
    return [label + suffix for label in rows for suffix in ["", BEFORE][: 1 + bool(against)]]


def one_type(text: str) -> str:
    """The name of a type that can store weights."""
    ggml, name = llama_cpp.ggml(), text.upper()
    try:
        weights, _ = ggml.block(name)
        ggml.quantize(name, np.ones((1, weights), np.float32), np.ones(weights, np.float32))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def parse(argv: list[str] | None) -> argparse.Namespace:
    build = llama_cpp.root() / "bench"
    parser = argparse.ArgumentParser(prog="models.py", description=__doc__, formatter_class=Help)

    def add(flag: str, shown: str, text: str, **kwargs) -> None:
        parser.add_argument(flag, help=f"{text} (default: {shown})", **{"default": shown, "metavar": "LIST"} | kwargs)

    add("--models", ",".join(MODELS), f"of {', '.join(SHAPES)}", type=model_names)
    add("--types", ", ".join(TYPES), f"append {PLAIN} for weights without repacking", type=type_names)
    add("--threads", "1,all", "numbers of threads", type=thread_counts)
    add("--prompt", "512", "tokens of a prompt; 0: none", type=depths)
    add("--generate", "128", "tokens to generate; 0: none", type=depths)
    add("--depth", "0,1024,4096,16384", "tokens in the context before generating", type=depths)
    add("--prompt-depth", "0", "tokens in the context before a prompt", type=depths)
    add("--batch", "2048", "llama-bench -b, for prompts", type=numbers)
    add("--ubatch", "512", "llama-bench -ub, for prompts", type=numbers)
    add("--rounds", "3", "rounds of each test", type=int, metavar="N")
    add("--load-rounds", "3", "rounds of loading; 0: none", type=int, metavar="N")
    text = "halve the tokens of a test until it takes no longer than this, and say so in the tables; 0: never"
    add("--longest", "5", text, type=float, metavar="SECONDS")
    parser.add_argument(
        "--quick", action="store_true", help="a first look: 0.5b, 128 and 32 tokens, an empty context, one round, 2 seconds"
    )
    add("--vocab", "32000", "tokens of the vocabulary; real: as many as the model has", type=vocabulary, metavar="N")
    add(
        "--embeddings",
        "Q4_0",
        "types of the embeddings, which are the output matrix too; rows are compared with the first",
        type=stored_types,
    )
    text = "another build's directory, as SHERRY_BUILD_DIR has it: each type also runs there, in turn"
    add("--against", "none", text, type=Path, metavar="DIR", default=None)
    parser.add_argument("--resume", action="store_true", help="continue the interrupted run saved in --json")
    add("--dir", "build/bench/models", "directory of the models", type=Path, default=build / "models", metavar="DIR")
    add("--json", "build/bench/models.json", "file for every round", type=Path, default=build / "models.json", metavar="FILE")
    add("--markdown", "build/bench/models.md", "file for the tables", type=Path, default=build / "models.md", metavar="FILE")
    text = "the name of --markdown with .png, if matplotlib is installed"
    add("--plot", text, "file for the bars", type=Path, default=None, metavar="FILE")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(models="0.5b", prompt="128", generate="32", depth="0", rounds=1, load_rounds=1, longest=2.0)
        args = parser.parse_args(argv)
    check_flags(parser, args)
    args.labels = labels(args.types, args.embeddings, args.against)
    if args.load_rounds and sys.platform != "linux":
        print("models.py: loading is measured on Linux only", file=sys.stderr)
        args.load_rounds = 0
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        if args.plot:
            parser.error("--plot needs matplotlib: .venv/bin/pip install matplotlib")
        print("models.py: no plot, since matplotlib is not installed", file=sys.stderr)
    else:
        args.plot = args.plot or args.markdown.with_suffix(".png")
    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message about flags that no run can have."""
    if args.rounds < 1 or args.load_rounds < 0 or args.longest < 0:
        parser.error("--rounds must be at least 1, --load-rounds and --longest at least 0")
    if not any(args.prompt + args.generate):
        parser.error("--prompt and --generate must not both be 0")
    if args.resume and not args.json.exists():
        parser.error(f"--resume: {args.json} is not there: pass the --json of the interrupted run, or no --resume")
    if args.against and len(args.embeddings) > 1:
        parser.error("--against takes one type of --embeddings")
    if args.against and not (args.against / "bin" / "llama-bench").exists():
        parser.error(f"--against: {args.against / 'bin' / 'llama-bench'} is not there")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = Run(args)
    run.check()
    interrupt = None
    try:
        with signals.raised():
            run.measure()
    except signals.Interrupted as ending:
        interrupt = ending
    finally:  # after an error, too, write what was measured
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
    if interrupt:
        wrote = "wrote what was measured so far, --resume goes on with it" if measured else "nothing is written"
        print(f"models.py: interrupted; {wrote}", file=sys.stderr)
        sys.exit(interrupt.exit_code)


if __name__ == "__main__":
    run(main)
