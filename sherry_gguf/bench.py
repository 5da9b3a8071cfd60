"""Compare how fast models run: llama-bench on each file, in turns (`sherry-gguf bench`)."""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from . import llama_cpp, signals
from .report import counted, markdown_table

MOST = 2**31 - 1
WARM_UP = 16  # tokens of the prompt that warms up


@dataclass(frozen=True)
class Test:
    """One test of llama-bench."""

    kind: str  # "pp": read a prompt of so many tokens; "tg": generate so many
    tokens: int
    depth: int = 0  # tokens in the context before
    batch: int = 2048
    ubatch: int = 512

    def __str__(self) -> str:
        sizes = f" b{self.batch} ub{self.ubatch}" * (self.kind == "pp" and (self.batch, self.ubatch) != (2048, 512))
        return f"{self.kind}{self.tokens}{sizes}{f' @ d{self.depth}' * bool(self.depth)}"


def cpu_name() -> str:
    """The CPU's model and number of threads, as Linux names it; "unknown CPU" elsewhere."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu family", "model")}
    if not (name := found.pop("model name")):
        return "unknown CPU"
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {match[1]}" for key, match in found.items() if match)
    return f"{name[1]}{f' ({numbers})' * bool(numbers)}, {os.cpu_count()} threads"


def llama_bench(file: Path, threads: int, test: Test) -> dict:
    """Run one test in a new process; returns its record. For the errors, see `llama_bench_each`."""
    (record,) = llama_bench_each([file], threads, test)
    return record


def llama_bench_each(files: list[Path], threads: int, test: Test, repack: bool = True, build: Path | None = None) -> Iterator[dict]:
    """Run one test on each file in turn, in one process; yields llama-bench's records, whose "avg_ts" is tokens a second.

    The first file fills the context, and the others of its shape take over what is in it: at a depth of 16384, filling takes minutes.
    build: the directory of another build, instead of `llama_cpp.root()`. Raises OSError if llama-bench fails, NotBuilt if it isn't there.
    """
    prompt, generate = (test.tokens, 0) if test.kind == "pp" else (0, test.tokens)
    prompts, warm_up = [prompt], []
    if prompt > WARM_UP:
        # llama-bench's own warm-up would read the whole prompt; without any, the first touch of the mapped file would count
        prompts, warm_up = [WARM_UP, prompt], ["--no-warmup"]
    command = [build / "bin" / "llama-bench" if build else llama_cpp.tool("llama-bench"), *(arg for file in files for arg in ("-m", file)),
               "-o", "jsonl", "-r", 1, "-t", threads, "-p", ",".join(map(str, prompts)), "-n", generate, "-d", test.depth,
               "-b", test.batch, "-ub", test.ubatch, "--repack", int(repack), *warm_up]  # fmt: skip
    done = 0
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                try:
                    record = json.loads(line)
                except ValueError as e:
                    raise OSError(f"llama-bench said on {files[min(done, len(files) - 1)].name}, {test}: {line.strip()}") from e
                if (record["n_prompt"], record["n_gen"]) == (prompt, generate):
                    done += 1
                    yield record
        except BaseException:
            process.kill()
            raise
        if process.wait() or done < len(files):
            errors.seek(0)
            last = " ".join(errors.read().strip().splitlines()[-3:])
            name = files[min(done, len(files) - 1)].name
            raise OSError(f"llama-bench ended with {process.returncode} on {name}, {test}: {last}")


def rotated(items: list, by: int) -> list:
    """The items, starting with another one each round."""
    return items[by % len(items) :] + items[: by % len(items)]


def median_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float | None:
    """The median ratio over the rounds that both have, which met the same disturbances; None without any."""
    ratios = [a / b for a, b in zip(ours, theirs)]
    return statistics.median(ratios) if ratios else None


def number(x: float | None) -> str:
    """Three digits or more, never an exponent."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def compare(files: list[Path], threads: list[int], tests: list[Test], rounds: int, report: dict) -> Iterator[str]:
    """Run each test on each file in each round, and fill `report` as it goes; yields what comes next.

    `report` gets "cpu", "date", "rounds", "llama_cpp", "files" (file, type, bytes, parameters) and "speed" (file, threads, test, and
    "rates", tokens a second in each round). Raises what `llama_bench` does.
    """
    measured: list[dict] = []
    report |= {"cpu": cpu_name(), "date": time.strftime("%Y-%m-%d"), "rounds": rounds, "files": measured, "speed": []}
    for file in files:  # this also brings it into memory
        yield f"{file.name}, first look"
        record = llama_bench(file, max(threads), Test("tg", 1))
        report["llama_cpp"] = record["build_commit"]
        kind, size, parameters = record["model_type"], record["model_size"], record["model_n_params"]
        measured.append({"file": str(file), "type": kind, "bytes": size, "parameters": parameters})
    groups = list(itertools.product(threads, tests))
    speed: dict[tuple, dict] = {
        (file, *group): {"file": str(file), "threads": group[0], "test": str(group[1]), "rates": []} for group in groups for file in files
    }
    report["speed"] += speed.values()

    def step(file: Path, count: int, test: Test, turn: int) -> str:
        return f"{file.name}, {test}, {counted(count, 'thread')}, round {turn + 1}"

    for turn in range(rounds):
        for count, test in groups:
            for file in rotated(files, turn) if not test.depth else ():
                yield step(file, count, test, turn)
                speed[file, count, test]["rates"].append(llama_bench(file, count, test)["avg_ts"])
    for count, test in groups:
        if test.depth:
            turns = [(file, turn) for turn in range(rounds) for file in rotated(files, turn)]
            records = llama_bench_each([file for file, _ in turns], count, test)
            for file, turn in turns:
                yield step(file, count, test, turn)
                speed[file, count, test]["rates"].append(next(records)["avg_ts"])
            for _ in records:
                pass  # raises if llama-bench failed at its end


def tables(report: dict) -> str:
    """A report as Markdown: for each number of threads a table with each rate and its ratio to the first file's."""
    after = ", @ d: after so many tokens" * any("@" in e["test"] for e in report["speed"])
    lines = [
        f"{report['cpu']}; llama.cpp {report['llama_cpp']}; {report['date']}.",
        f"Tokens a second, medians of {report['rounds']} rounds (pp: read a prompt, tg: generate{after}); x: ratio to the first file.",
    ]
    rates = {(e["file"], e["threads"], e["test"]): e["rates"] for e in report["speed"] if e["rates"]}
    tests = list(dict.fromkeys(e["test"] for e in report["speed"]))
    first = report["files"][0]["file"]
    for threads in dict.fromkeys(e["threads"] for e in report["speed"]):
        rows = []
        for file in report["files"]:
            row = [file["file"], file["type"], number(file["bytes"] / 2**20)]
            for test in tests:
                own = rates.get((file["file"], threads, test), [])
                ratio = median_ratio(own, rates.get((first, threads, test), []))
                row += [number(statistics.median(own) if own else None), "" if ratio is None else f"{ratio:.2f}"]
            rows.append(row)
        head = ["file", "model", "MiB", *itertools.chain.from_iterable((test, "x") for test in tests)]
        lines += ["", f"{counted(threads, 'thread')}:", "", markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def numbers(text: str, least: int = 1) -> list[int]:
    """A list of numbers from `least` on, such as "1,2", each once. Raises argparse.ArgumentTypeError."""
    try:
        values = list(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise argparse.ArgumentTypeError(f"not a list of numbers from {least} on: {text!r}")
    if max(values) > MOST:
        raise argparse.ArgumentTypeError(f"{max(values)} is more than llama-bench takes, {MOST}")
    return values


def depths(text: str) -> list[int]:
    """Like `numbers`, from 0 on."""
    return numbers(text, 0)


def thread_counts(text: str) -> list[int]:
    """Like `numbers`, sorted; "all" is the number of CPUs that this process may use."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return sorted(numbers(text.replace("all", str(every))))


def parse(argv: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, usage="%(prog)s [options] FILE ...",
        description="Compare how fast models run: llama-bench on each file in turn, for several rounds. "
        "Prints medians, and the median ratio to the first file.")  # fmt: skip
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="a GGUF; for a split, its first file")
    add("--threads", type=thread_counts, default="all", metavar="LIST", help="numbers of threads, such as 1,2 (default: all)")
    add("--prompt", type=depths, default="512", metavar="LIST", help="tokens of the prompt to read; 0: none (default: 512)")
    add("--generate", type=int, default=128, metavar="N", help="tokens to generate; 0: none (default: 128)")
    add("--depth", type=depths, default="0", metavar="LIST", help="tokens in the context before generating, such as 0,1024 (default: 0)")
    add("--rounds", type=int, default=3, metavar="N", help="rounds (default: 3)")
    add("--json", type=Path, metavar="FILE", help="also write every round to FILE")
    args = parser.parse_args(argv)
    args.tests = [Test("pp", tokens) for tokens in args.prompt if tokens]
    args.tests += [Test("tg", args.generate, depth) for depth in args.depth if args.generate]
    if args.generate < 0 or not args.tests or args.rounds < 1:
        parser.error("--prompt and --generate must be at least 0 and not both 0, --rounds at least 1")
    if any(args.depth) and not args.generate:
        parser.error("--depth is for generating: it needs --generate")
    args.files = list(dict.fromkeys(args.files))
    return args


def check(args: argparse.Namespace) -> None:
    """Raise OSError if a file cannot be measured or the report cannot be written."""
    if absent := [str(file) for file in args.files if not file.is_file()]:
        raise OSError(f"no such file: {', '.join(absent)}")
    if commas := [str(file) for file in args.files if "," in str(file)]:
        raise OSError(f"llama-bench takes a comma for the end of a file's name: rename {' and '.join(commas)}")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise OSError(f"cannot write {args.json}: it is a directory, or its directory does not exist")


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command and return its exit code: 0, 1 if a file is missing or llama-bench fails, 128 + n after signal n.

    Prints what was measured before a failure or a signal.
    """
    args = parse(argv, prog)
    report: dict = {}
    steps = len(args.files) * (1 + args.rounds * len(args.tests) * len(args.threads))
    code = 0
    try:
        check(args)
        with signals.raised(), tqdm(total=steps, desc="measuring", unit="run", disable=None) as bar:
            for step in compare(args.files, args.threads, args.tests, args.rounds, report):
                bar.set_postfix_str(step)
                bar.update()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except signals.Interrupted as ending:
        print("interrupted", file=sys.stderr)
        code = ending.exit_code
    try:
        if any(entry["rates"] for entry in report.get("speed", [])):
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
            print(tables(report), end="", flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader has gone, as with `| head`
            sys.stdout = None
        else:
            print(f"error: {error}", file=sys.stderr)
        code = 1
    return code
