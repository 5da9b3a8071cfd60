#!/usr/bin/env python3
"""How fast the kernels are, in one thread: TQ1_25's, each instruction set, against the types of a size near it.

The plain dot product with rows in the L1 cache; a matrix by a vector with the weights from memory, beside the rate at
which memory can be read; TQ1_25's matrix by more vectors, beside the rate at which the CPU multiplies int8 at most, by
tables, codes and panels, which shows for how many vectors each is the fastest. Kernels take turns in each round; what is
printed are medians. Whole models: scripts/bench/models.py. Needs scripts/build_llama_cpp.py and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

try:
    from sherry_gguf import llama_cpp
except ImportError as error:
    sys.exit(f"bench: {error}: run it as .venv/bin/python scripts/bench/kernels.py, after scripts/setup.sh")

from bench_common import cpu_name, memory_bandwidth, program

TYPES = "tq1_25 tq1_0 tq2_0 q1_0 q2_0 iq1_s iq1_m iq2_xxs q2_K q4_0 q8_0".split()
BASELINE = "tq1_0"
PEERS = "tq1_25 tq1_0 tq2_0 q1_0 q2_K q4_0 q8_0".split()  # from memory


def bits(name: str) -> float:
    weights, size = llama_cpp.ggml().block(name.split("-")[0])
    return 8 * size / weights


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of rounds, in which both met the same disturbances."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def in_cache(n: int, rounds: int) -> dict[str, list[float]]:
    """vec_dot in L1: kernel -> its rounds, in 1e9 weights a second."""
    command = [program("bench_kernels", "ggml-cpu", "ggml-base"), str(n), str(rounds), *TYPES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"bench: {result.stderr.strip() or f'bench_kernels ended with {result.returncode}'}")
    rates: dict[str, list[float]] = {}
    for line in result.stdout.splitlines():
        name, seconds = line.split()
        rates.setdefault(name, []).append(1 / float(seconds))
    return rates


def matmul(mib: int, rounds: int) -> dict[str, list[float]]:
    """What bench_matmul prints, less the rate -> its rounds in 1e9 multiply-adds a second; "memory": GB/s."""
    command = [program("bench_matmul", "ggml-cpu", "ggml-base"), str(mib), *PEERS]
    rates: dict[str, list[float]] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for number in range(rounds + 1):  # the first warms up
            bandwidth = memory_bandwidth(1, 1)[0]
            process.stdin.write("\n")
            process.stdin.flush()
            lines = list(iter(process.stdout.readline, "end\n")) if process.poll() is None else []
            if not lines or "" in lines:
                sys.exit(f"bench: bench_matmul ended with {process.wait()}")
            if number:
                rates.setdefault("memory", []).append(bandwidth)
                for line in lines:
                    name, rate = line.rsplit(maxsplit=1)
                    rates.setdefault(name, []).append(float(rate))
        process.stdin.close()
    return rates


def show_in_cache(rates: dict[str, list[float]], n: int, rounds: int) -> None:
    print(f"vec_dot, in L1, rows of {n}, {rounds} rounds\n")
    print(f"| kernel | bits/weight | 1e9 weights/s (median) | x {BASELINE.upper()} (median of rounds) |\n|---|---|---|---|")
    for name, own in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        ratio = median_ratio(own, rates[BASELINE])
        print(f"| {name.replace('-', ', ')} | {bits(name):.3f} | {statistics.median(own):.1f} | {ratio:.2f} |")


def show_matmul(rates: dict[str, list[float]], mib: int, rounds: int) -> None:
    memory = rates["memory"]
    print(f"\nMatrix by vector, {mib} MiB of weights from memory, {rounds} rounds; "
          f"memory is read at {statistics.median(memory):.1f} GB/s (highest {max(memory):.1f})\n")  # fmt: skip
    print("| kernel | bits/weight | 1e9 weights/s | x TQ2_0 | GB/s | of memory's |\n|---|---|---|---|---|---|")
    vector = {key.split()[1]: own for key, own in rates.items() if key.startswith("vector ")}
    for name, own in sorted(vector.items(), key=lambda item: -statistics.median(item[1])):
        read = [rate * bits(name) / 8 for rate in own]
        label = name.replace("tq1_25-", "tq1_25 repacked, ").replace("tq1_25", "tq1_25 plain" if name == "tq1_25" else "tq1_25")
        print(f"| {label} | {bits(name):.3f} | {statistics.median(own):.1f} | {median_ratio(own, vector['tq2_0']):.2f} | "
              f"{statistics.median(read):.1f} | {100 * median_ratio(read, memory):.0f} % |")  # fmt: skip

    columns: dict[str, dict[str, dict[int, list[float]]]] = {}  # instruction set -> kernel -> columns -> rounds
    for key, own in rates.items():
        if key.startswith("columns "):
            _, isa, kernel, count = key.split()
            columns.setdefault(isa, {}).setdefault(kernel, {})[int(count)] = own
    print("\nMatrix by vectors, 1e9 multiply-adds/s: by tables / by codes / by panels; in bold what is used\n")
    counts = sorted(next(iter(columns.values()))["codes"])
    print(f"| instruction set | {' | '.join(map(str, counts))} | multiplies at most | {counts[-1]}, of that |")
    print("|---" * (len(counts) + 3) + "|")
    for isa, of in columns.items():

        def used(count: int) -> str:
            return next((k for k in ("tables", "codes") if count <= rates[f"{k} {isa}"][0]), "panels")

        cells = []
        for count in counts:
            found = {k: f"{statistics.median(of[k][count]):.0f}" for k in ("tables", "codes", "panels") if count in of.get(k, {})}
            cells.append(" / ".join(f"**{v}**" if k == used(count) else v for k, v in found.items()))
        most = rates[f"peak {isa}"]
        share = 100 * median_ratio(of[used(counts[-1])][counts[-1]], most)
        print(f"| {isa} | {' | '.join(cells)} | {statistics.median(most):.0f} | {share:.0f} % |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4096, help="weights of a row in L1, a multiple of 256 (default: 4096)")
    parser.add_argument("--rounds", type=int, default=101, help="rounds of vec_dot in L1 (default: 101)")
    parser.add_argument("--matmul-rounds", type=int, default=7, help="rounds of the products of matrices (default: 7)")
    parser.add_argument("--mib", type=int, default=128, help="size of a matrix, far more than the last-level cache (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there as well")
    args = parser.parse_args()
    print(f"{cpu_name()}; one thread\n")
    rates = in_cache(args.n, args.rounds)
    show_in_cache(rates, args.n, args.rounds)
    products = matmul(args.mib, args.matmul_rounds)
    show_matmul(products, args.mib, args.matmul_rounds)
    if args.json:
        args.json.write_text(json.dumps({"cpu": cpu_name(), "n": args.n, "rates": rates, "mib": args.mib, "matmul": products}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench: {error}")
