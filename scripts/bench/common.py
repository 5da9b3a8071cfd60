"""What the benchmarks share: compiling the C programs beside them, and measuring memory bandwidth."""

import os
import subprocess
from pathlib import Path

from sherry_gguf import llama_cpp


def program(name: str, *libraries: str) -> Path:
    """Compile scripts/bench/NAME.c against built libraries such as "ggml-cpu", unless it is up to date; return the program.

    Raises NotBuilt, and CalledProcessError if the compiler fails.
    """
    source, out = Path(__file__).with_name(f"{name}.c"), llama_cpp.root() / name
    found = [llama_cpp.library(library) for library in libraries]
    if out.exists() and out.stat().st_mtime >= max(file.stat().st_mtime for file in [source, source.with_name("bench.h"), *found]):
        return out
    tree = llama_cpp.root() / "llama.cpp"
    includes = [f"-I{tree / part}" for part in ("include", "ggml/include", "ggml/src")] if libraries else []
    # rpath-link: where to find the libraries that these libraries need
    link = [arg for file in found for arg in (file, f"-Wl,-rpath,{file.parent}", f"-Wl,-rpath-link,{file.parent}")]
    part = out.with_name(f"{name}.{os.getpid()}.part")  # several processes may compile it at once
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        command = [os.environ.get("CC", "cc"), "-std=c11", "-O2", *includes, source, *link, "-pthread", "-o", part]
        subprocess.run(list(map(str, command)), check=True)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def memory_bandwidth(threads: int, rounds: int) -> list[float]:
    """How fast `threads` threads read memory, in GB/s; each round reads 2 GiB. Raises OSError if the program fails."""
    result = subprocess.run([program("bench_memory"), str(threads), str(rounds)], capture_output=True, text=True)
    if result.returncode:
        raise OSError(result.stderr.strip() or f"bench_memory ended with {result.returncode}")
    return [float(line.split()[1]) for line in result.stdout.splitlines()]
