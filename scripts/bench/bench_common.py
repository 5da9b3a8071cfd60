"""What the benchmarks share: the machine's name, its memory's speed, and C programs beside the scripts."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from sherry_gguf import llama_cpp


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = {key: re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu family", "model")}
    if not found["model name"]:
        return "unknown CPU"
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {match[1]}" for key, match in list(found.items())[1:] if match)
    return f"{found['model name'][1]}{f' ({numbers})' * bool(numbers)}, {os.cpu_count()} threads"


def program(name: str, *libraries: str) -> Path:
    """scripts/NAME.c compiled against these of the built libraries, such as "ggml-cpu", if it or they are newer.

    Raises llama_cpp.NotBuilt, and CalledProcessError where the compiler fails.
    """
    source, out = Path(__file__).with_name(f"{name}.c"), llama_cpp.root() / name
    found = [llama_cpp.library(library) for library in libraries]
    if out.exists() and out.stat().st_mtime >= max(file.stat().st_mtime for file in [source, *found]):
        return out
    tree = llama_cpp.root() / "llama.cpp"
    includes = [f"-I{tree / part}" for part in ("include", "ggml/include", "ggml/src")] if libraries else []
    # rpath-link: libraries that only the libraries need
    link = [arg for file in found for arg in (file, f"-Wl,-rpath,{file.parent}", f"-Wl,-rpath-link,{file.parent}")]
    part = out.with_name(f"{name}.{os.getpid()}.part")  # two processes may need it at once
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = [os.environ.get("CC", "cc"), "-std=c11", "-O2", *includes, source, *link, "-pthread", "-o", part]
        subprocess.run(list(map(str, command)), check=True)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def memory_bandwidth(threads: int, rounds: int) -> list[float]:
    """GB/s that this many threads read from memory, each of some rounds of 2 GiB."""
    result = subprocess.run([program("bench_memory"), str(threads), str(rounds)], capture_output=True, text=True)
    if result.returncode:
        raise OSError(result.stderr.strip() or f"bench_memory ended with {result.returncode}")
    return [float(line.split()[1]) for line in result.stdout.splitlines()]
