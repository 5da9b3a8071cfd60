#!/usr/bin/env python3
"""Measure the kernels in one thread: our types on each instruction set, against types of a similar size.

Three parts: the plain dot product with rows in the L1 cache; a matrix by a vector with weights from memory, beside the memory
bandwidth; and a matrix of our types by several vectors, by tables, codes, wide tables and panels, beside the CPU's int8 peak where it is
known.
Kernels take turns in each round; the tables show medians.

Needs scripts/build_llama_cpp.py and a C compiler. Whole models: scripts/bench/models.py.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

try:
    from common import memory_bandwidth, program

    from sherry_gguf import llama_cpp
    from sherry_gguf.bench import cpu_name, median_ratio
    from sherry_gguf.programs import Help, run
    from sherry_gguf.report import markdown_table
except ImportError as error:
    sys.exit(f"kernels.py: {error}: run it as .venv/bin/python scripts/bench/kernels.py, after scripts/setup.sh")

TYPES = "tq1_25 tq1_25_64 stq1_0 tq1_0 tq2_0 q1_0 q2_0 iq1_s iq1_m iq2_xxs q2_K q4_0 q8_0".split()
BASELINE = "tq1_0"
PEERS = "tq1_25 tq1_25_64 stq1_0 tq1_0 tq2_0 q1_0 q2_K q4_0 q8_0".split()  # from memory


def bits(name: str) -> float:
    weights, size = llama_cpp.ggml().block(name.split("-")[0])
    return 8 * size / weights


def in_cache(n: int, rounds: int) -> dict[str, list[float]]:
    """vec_dot in L1: {kernel: its rounds, in 1e9 weights a second}."""
    command = [program("bench_kernels", "ggml-cpu", "ggml-base"), str(n), str(rounds), *TYPES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"kernels.py: {result.stderr.strip() or f'bench_kernels ended with {result.returncode}'}")
    rates: dict[str, list[float]] = {}
    for line in result.stdout.splitlines():
        name, seconds = line.split()
        rates.setdefault(name, []).append(round(1 / float(seconds), 3))
    return rates


def matmul(mib: int, rounds: int) -> dict[str, list[float]]:
    """{a line of bench_matmul without its rate: its rounds, in 1e9 multiply-adds a second}; "memory" is in GB/s."""
    command = [program("bench_matmul", "ggml-cpu", "ggml-base"), str(mib), *PEERS]
    rates: dict[str, list[float]] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for number in range(rounds + 1):  # the first warms up
            bandwidth = memory_bandwidth(1, 1)[0]
            process.stdin.write("\n")
            process.stdin.flush()
            lines = list(iter(process.stdout.readline, "end\n")) if process.poll() is None else []
            if not lines or "" in lines:
                sys.exit(f"kernels.py: bench_matmul ended with {process.wait()}")
            if number:
                rates.setdefault("memory", []).append(bandwidth)
                for line in lines:
                    name, rate = line.rsplit(maxsplit=1)
                    rates.setdefault(name, []).append(float(rate))
        process.stdin.close()
    return rates


def show_in_cache(rates: dict[str, list[float]], n: int, rounds: int) -> None:
    print(f"vec_dot in L1, rows of {n}, {rounds} rounds\n")
    rows = [
        (name.replace("-", ", "), f"{bits(name):.3f}", f"{statistics.median(own):.1f}", f"{median_ratio(own, rates[BASELINE]):.2f}")
        for name, own in sorted(rates.items(), key=lambda item: -statistics.median(item[1]))
    ]
    print(markdown_table(("kernel", "bits/weight", "1e9 weights/s (median)", f"x {BASELINE.upper()} (median of rounds)"), rows))


def show_vector(rates: dict[str, list[float]], mib: int, rounds: int) -> None:
    memory = rates["memory"]
    print(f"\nMatrix by vector, {mib} MiB of weights from memory, {rounds} rounds; "
          f"memory bandwidth {statistics.median(memory):.1f} GB/s (highest {max(memory):.1f})\n")  # fmt: skip
    vector = {key.split()[1]: own for key, own in rates.items() if key.startswith("vector ")}
    ours = {name.split("-")[0] for name in vector if "-" in name}
    rows = []
    for name, own in sorted(vector.items(), key=lambda item: -statistics.median(item[1])):
        read = [rate * bits(name) / 8 for rate in own]
        kind, _, isa = name.partition("-")
        label = f"{kind} repacked, {isa}" if isa else f"{kind} plain" if kind in ours else kind
        rows.append((label, f"{bits(name):.3f}", f"{statistics.median(own):.1f}", f"{median_ratio(own, vector['tq2_0']):.2f}",
                     f"{statistics.median(read):.1f}", f"{100 * median_ratio(read, memory):.0f} %"))  # fmt: skip
    print(markdown_table(("kernel", "bits/weight", "1e9 weights/s", "x TQ2_0", "GB/s", "of memory's"), rows))


def show_columns(rates: dict[str, list[float]]) -> None:
    """Show products with several vectors, if this CPU has repacked kernels; no share of a peak that is not known (0)."""
    columns: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}  # type and instruction set -> kernel -> columns -> rounds
    for key, own in rates.items():
        if key.startswith("columns "):
            _, kind, isa, kernel, count = key.split()
            columns.setdefault((kind, isa), {}).setdefault(kernel, {})[int(count)] = own
    if not columns:
        return
    print("\nMatrix by vectors, 1e9 multiply-adds/s: by tables / by codes / by wide tables or panels; bold: what llama.cpp uses\n")
    counts = sorted(next(iter(columns.values()))["codes"])
    rows = []
    for (kind, isa), of in sorted(columns.items()):

        def used(count: int, isa: str = isa, of: dict[str, dict[int, list[float]]] = of) -> str:
            return next((k for k in ("tables", "codes") if count <= rates[f"{k} {isa}"][0]), "wide" if "wide" in of else "panels")

        cells = []
        for count in counts:
            found = {k: f"{statistics.median(of[k][count]):.0f}" for k in ("tables", "codes", "wide", "panels") if count in of.get(k, {})}
            cells.append(" / ".join(f"**{v}**" if k == used(count) else v for k, v in found.items()))
        peak, most = rates[f"peak {isa}"], ["", ""]
        if min(peak) > 0:
            share = median_ratio(of[used(counts[-1])][counts[-1]], peak)
            most = [f"{statistics.median(peak):.0f}", f"{100 * share:.0f} %"]
        rows.append([kind, isa, *cells, *most])
    print(markdown_table(["type", "instruction set", *map(str, counts), "peak", f"{counts[-1]}, of the peak"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("-n", type=int, default=4096, help="weights in a row in L1, a multiple of 256 (default: 4096)")
    parser.add_argument("--rounds", type=int, default=101, help="rounds of vec_dot in L1 (default: 101)")
    parser.add_argument("--matmul-rounds", type=int, default=7, help="rounds of the matrix products (default: 7)")
    parser.add_argument("--mib", type=int, default=128, help="size of a matrix, far above the last-level cache (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round to FILE")
    args = parser.parse_args()
    print(f"{cpu_name()}; one thread\n")
    rates = in_cache(args.n, args.rounds)
    show_in_cache(rates, args.n, args.rounds)
    products = matmul(args.mib, args.matmul_rounds)
    show_vector(products, args.mib, args.matmul_rounds)
    show_columns(products)
    if args.json:
        report = json.dumps({"cpu": cpu_name(), "n": args.n, "rates": rates, "mib": args.mib, "matmul": products}, indent=1)
        args.json.write_text(re.sub(r"\[[^][]*\]", lambda rounds: " ".join(rounds[0].split()), report) + "\n")  # a kernel a line


if __name__ == "__main__":
    run(main)
