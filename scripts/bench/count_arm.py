#!/usr/bin/env python3
"""Count the instructions that kernels for 64-bit ARM execute under qemu-aarch64, per 128 weights of a row and vector.

It counts instead of timing: an emulator doesn't know what takes long. The count is the difference between rows of 4096 and
of 2048 weights, so that the fixed cost of a call drops out. Making the tables of the activations, once for all rows, has its
own line. Attention is counted per query and key, for heads of 128. Upstream's kernels are compiled from the patched llama.cpp
for each level, with the same compiler and -O3.

Needs scripts/build_llama_cpp.py, and what scripts/build/arm.py needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build"))

from cross_arm import COMPILERS, EMULATOR, missing

from sherry_gguf import llama_cpp
from sherry_gguf.errors import Stop
from sherry_gguf.programs import Help, call, run
from sherry_gguf.report import markdown_table

REPO = Path(__file__).resolve().parents[2]
SOURCES = REPO / "ggml_patch" / "src"
LEVELS = {"neon": "armv8-a", "dotprod": "armv8.2-a+dotprod", "i8mm": "armv8.6-a+i8mm"}
TYPES = ["TQ1_25", "TQ1_25_64", "STQ1_0"]
ROWS = 64  # TQ1_25_TILE
N = 2048
KEYS = 256
MANY = [2, 4, 6, 8, 10, 12, 16, 24, 48]
QUERIES = [1, 2, 4, 8, 16, 64]  # that share a head of keys
CACHES = ["F16", "BF16", "Q8_0"]
NO_SUCH_KERNEL = 3  # count_arm.c


def build(work: Path) -> None:
    if why := missing():
        raise Stop(why)
    gcc, gxx = COMPILERS
    ggml = llama_cpp.source_dir() / "ggml"
    include = [f"-I{ggml / d}" for d in ("include", "src", "src/ggml-cpu")]
    ours = [*sorted(SOURCES.rglob("*.c")), Path(__file__).with_suffix(".c")]
    call(gcc, "-std=c11", "-O3", f"-I{SOURCES}", "-r", *ours, "-o", work / "ours.o")
    for level, march in LEVELS.items():
        arm = ggml / "src/ggml-cpu/arch/arm"
        flags = ["-O3", "-D_GNU_SOURCE", f"-march={march}", *include, "-c"]
        call(gcc, "-std=c11", *flags, arm / "quants.c", "-o", work / f"quants-{level}.o")
        call(gxx, "-std=c++17", *flags, arm / "repack.cpp", "-o", work / f"repack-{level}.o")
        # the kernels never call what is unresolved: it is for other types
        call(gxx, "-static", work / "ours.o", work / f"quants-{level}.o", work / f"repack-{level}.o", "-lm",
             "-Wl,--unresolved-symbols=ignore-all", "-o", work / level)  # fmt: skip


def instructions(program: Path, kernel: str, n: int, nc: int) -> int | None:
    """How many instructions a run executes; None if the program has no such kernel. Raises Stop."""
    with tempfile.NamedTemporaryFile() as log:
        command = [EMULATOR, "-cpu", "max", "-d", "in_asm,nochain,exec", "-D", log.name, program, kernel, str(n), str(nc)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == NO_SUCH_KERNEL:
            return None
        count = executed(log)
        if done.returncode or not count:
            raise Stop(f"{program.name} {kernel}: {done.returncode}, {count} instructions; {done.stderr}")
        return count


def executed(log: Iterable[bytes]) -> int:
    """How many instructions qemu ran: its log has each block's when it is translated, before it first runs, and a line for each run."""
    sizes: dict[bytes, int] = {}  # by the address of the translation
    translated = count = 0
    for line in log:
        if line.startswith(b"0x"):
            translated += 1
        elif line.startswith(b"Trace"):
            block = line.split(maxsplit=3)[2]
            if translated:
                sizes[block], translated = translated, 0
            if block not in sizes:
                raise Stop(f"{EMULATOR} logged no instructions of a block that it ran: try QEMU 7.2, Debian 12's")
            count += sizes[block]
    return count


def per_128(program: Path, kernel: str, rows: int, nc: int = 1) -> float | None:
    counts = [instructions(program, kernel, n, nc) for n in (N, 2 * N)]
    return None if None in counts else (counts[1] - counts[0]) / (N // 128) / rows / nc


def per_query(program: Path, kernel: str, queries: int) -> float:
    """Instructions for a query and a key with heads of 128, in attention over a cache of keys and values."""
    counts = [instructions(program, kernel, keys, queries) for keys in (KEYS, 2 * KEYS)]
    return (counts[1] - counts[0]) / KEYS / queries


def count(work: Path) -> dict:
    one, many, making = {}, {}, {}
    for level in LEVELS:
        plain = "dotprod" if level == "i8mm" else level  # i8mm uses dotprod's
        repacked = {"dotprod": "Q4_0 4x4 gemv", "i8mm": "Q4_0 4x8 gemv"}.get(level)
        lines = {
            **{kind: (f"{level} gemv {kind}", ROWS) for kind in TYPES},
            **{f"{kind}, --no-repack": (f"{plain} vec_dot {kind}", 1) for kind in TYPES},
            "TQ2_0": ("TQ2_0", 1),
            "TQ1_0": ("TQ1_0", 1),
            "Q2_K": ("Q2_K", 1),
            "Q4_0": (repacked, ROWS) if repacked else ("Q4_0", 1),
            "Q4_0, --no-repack": ("Q4_0", 1),
        }
        for name, (kernel, rows) in lines.items():
            one.setdefault(name, {})[level] = per_128(work / level, kernel, rows)
        making[level] = per_128(work / level, f"{level} table TQ1_25", 1)
        for nc in MANY:
            for name in [*(["codes"] if nc <= 16 else []), "panels"]:
                for kind in TYPES[:2]:  # STQ1_0's are TQ1_25's
                    found = per_128(work / level, f"{level} {name} {kind}", ROWS, nc)
                    many.setdefault(f"{kind}, {name}", {}).setdefault(level, {})[nc] = found
            if level != "neon" and nc % 4 == 0:
                kernel = "Q4_0 4x4 gemm" if level == "dotprod" else "Q4_0 4x8 gemm"
                many.setdefault("Q4_0", {}).setdefault(level, {})[nc] = per_128(work / level, kernel, ROWS, nc)
    attention = {cache: {queries: per_query(work / "neon", f"neon attention {cache}", queries) for queries in QUERIES} for cache in CACHES}
    compiler = subprocess.run([COMPILERS[0], "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"compiler": compiler, "one": one, "many": many, "making": making, "attention": attention}


def tables(result: dict) -> list[str]:
    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    one = [[name, *(figure(levels[level]) for level in LEVELS)] for name, levels in result["one"].items()]
    many = [
        [name, level, *(figure(counts.get(nc)) for nc in MANY)]
        for name, levels in result["many"].items()
        for level, counts in levels.items()
        if any(value is not None for value in counts.values())
    ]
    making = ", ".join(f"{figure(value)} ({level})" for level, value in result["making"].items())
    return [
        f"Instructions per 128 weights, counted under emulation, not timed ({result['compiler']}, -O3).",
        "",
        "One vector:",
        "",
        markdown_table(["type", *LEVELS], one),
        "",
        f"Making the tables of 128 activations, once for all rows: {making}",
        "",
        "Several vectors, for each:",
        "",
        markdown_table(["type", "CPU", *map(str, MANY)], many),
        "",
        "Attention with heads of 128, for each query and key, by the number of queries that share a head of keys:",
        "",
        markdown_table(["cache", *map(str, QUERIES)], [[c, *map(figure, counts.values())] for c, counts in result["attention"].items()]),
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the counts to FILE")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE, too")
    a = p.parse_args()
    work = llama_cpp.root() / "arm" / "count"
    work.mkdir(parents=True, exist_ok=True)
    build(work)
    result = count(work)
    text = "\n".join(tables(result)) + "\n"
    print(text, end="")
    if a.json:
        a.json.write_text(json.dumps(result, indent=1) + "\n")
    if a.markdown:
        a.markdown.write_text(text)


if __name__ == "__main__":
    run(main)
