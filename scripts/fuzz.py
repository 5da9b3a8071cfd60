#!/usr/bin/env python3
"""Feed damaged GGUF files to the patched llama.cpp and to the Python readers, starting from the stored corpus.

loader   llama.cpp loads the file with --check-tensors and multiplies by its
         tensors of our types (tests/fuzz/fuzz_loader.cpp), under libFuzzer and
         AddressSanitizer. Needs clang (Debian: apt-get install clang); the
         first build takes four minutes.
readers  inspect, retag and transcode read the file
         (tests/fuzz/fuzz_readers.py), under Atheris, which setup.sh installs
         on Linux on x86-64.

Inputs that crash a target, or make it hang for 20 seconds or use 4 GiB, are left in build/fuzz/crashes/TARGET, and the exit
code is 1. --keep DIR keeps inputs that reach new code; without it they are lost at the end.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

try:
    from filelock import FileLock

    from sherry_gguf import llama_cpp
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, compiler_cache, last_lines
    from sherry_gguf.programs import run as run_program
except ImportError as error:
    sys.exit(f"fuzz.py: {error}: run it as .venv/bin/python scripts/fuzz.py, after scripts/setup.sh")

REPO = Path(__file__).resolve().parents[1]
TESTS = REPO / "tests"
CORPUS = TESTS / "fuzz" / "corpus"
FLAGS = "-O1 -g1 -DNDEBUG -fsanitize=address,fuzzer-no-link"
LIMITS = ["-timeout=20", "-rss_limit_mb=4096", "-malloc_limit_mb=2048", "-max_len=100000"]


def build_loader(work: Path) -> Path:
    """Build llama.cpp's library and the target with sanitizers, unless they are up to date; return the target."""
    if not shutil.which("clang++"):
        raise Stop("clang is missing: install it (Debian: apt-get install clang), or name only `readers`")
    source, cmake = llama_cpp.source_dir(), work / "cmake"
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    off = [f"LLAMA_BUILD_{part}" for part in "COMMON TOOLS EXAMPLES TESTS SERVER APP".split()]
    off += ["BUILD_SHARED_LIBS", "GGML_OPENMP", "GGML_NATIVE", "GGML_CCACHE"]
    if not (cmake / "build.ninja").exists():
        settings = ["C_COMPILER=clang", "CXX_COMPILER=clang++", "BUILD_TYPE=None", f"C_FLAGS={FLAGS}", f"CXX_FLAGS={FLAGS}"]
        flags = [*(f"-DCMAKE_{setting}" for setting in settings), *(f"-D{name}=OFF" for name in off), *compiler_cache(env)]
        call("cmake", "-G", "Ninja", "-S", source, "-B", cmake, *flags, env=env)
    print("fuzz: building llama.cpp with AddressSanitizer", flush=True)
    call("cmake", "--build", cmake, "--target", "llama", env=env)
    libraries = [cmake / "src/libllama.a", *(cmake / f"ggml/src/lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base"))]
    flags = ["-std=c++17", *FLAGS.replace("fuzzer-no-link", "fuzzer").split()]
    flags += [f"-I{source / directory}" for directory in ("include", "ggml/include", "ggml/src", "src")]
    files = [TESTS / "fuzz" / "fuzz_loader.cpp", *libraries, "-lpthread", "-ldl", "-lm", "-o", work / "loader"]
    call("clang++", *flags, *files)
    return work / "loader"


def fuzz(name: str, command: list, work: Path, a: argparse.Namespace) -> bool:
    """Run a target for its time or until it finds something; True if it found nothing. Prints how much it tried."""
    crashes = work / "crashes" / name
    crashes.mkdir(parents=True, exist_ok=True)
    log = work / f"{name}.log"
    begin, inputs, coverage, found = time.monotonic(), 0, 0, []
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        new, assertions = Path(scratch, "new"), Path(scratch, "assertions")
        new.mkdir()
        # llama.cpp leaks some memory when it refuses a file
        env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "FUZZ_ASSERTIONS": str(assertions), "PYTHONPATH": str(REPO)}
        while not found and (left := round(a.seconds - (time.monotonic() - begin))) > 0:
            before = set(crashes.iterdir())
            flags = [*LIMITS, f"-max_total_time={left}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
            flags += [f"-fork={a.jobs}"] if name == "loader" else []
            with open(log, "w") as output:
                done = code_of([*command, *flags, new, CORPUS], env, output)
            text = log.read_text(errors="replace")
            tried = max((int(n) for n in re.findall(r"^#(\d+)", text, re.M)), default=0)
            inputs += tried
            coverage = max([coverage, *(int(n) for n in re.findall(r"cov: (\d+)", text))])
            left_behind = sorted(set(crashes.iterdir()) - before)
            if done and not left_behind:
                raise Stop(f"{name} ended with {done} and left no input that shows why ({log}):\n{last_lines(text)}")
            for path in left_behind:
                # the memory of a thousand earlier inputs, or the load of other programs, is not this input's fault
                harmless = path.name.startswith(("oom-", "timeout-", "slow-unit-"))
                if harmless and code_of([*command, *LIMITS, path], env, subprocess.DEVNULL) == 0:
                    path.unlink()
                else:
                    found.append(path)
            if not tried and not found:
                raise Stop(f"{name} tried nothing ({log}):\n{last_lines(text)}")
        reached, took = len(list(new.iterdir())), time.monotonic() - begin
        print(f"fuzz: {name}: {inputs} inputs in {took:.0f} s, {coverage} edges reached, {reached} inputs that reach new code;", end=" ")
        print(f"found: {len(found) or 'nothing'}", flush=True)
        if assertions.exists():
            counts = Counter(re.sub(r"^.*?/llama.cpp/", "", line) for line in assertions.read_text().splitlines() if line)
            print(f"fuzz: {name}: assertions of llama.cpp on hyperparameters, vocabulary and types refused {counts.total()} inputs")
            for line, count in counts.most_common():
                print(f"  {count:7} {line}")
        for path in found:
            print(f"  {path}")
        if a.keep:
            a.keep.mkdir(parents=True, exist_ok=True)
            for path in new.iterdir():
                shutil.move(path, a.keep / f"{name}-{path.name}")
    return not found


def code_of(command: list, env: dict[str, str], output) -> int:
    return subprocess.run(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=env).returncode


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("targets", nargs="*", metavar="loader|readers", help="what to fuzz (default: both, one after the other)")
    p.add_argument("--seconds", type=int, default=60, metavar="N", help="seconds for each (default: 60)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes of the loader (default: all CPUs)")
    p.add_argument("--keep", type=Path, metavar="DIR", help="keep inputs that reach new code in DIR")
    a = p.parse_args()
    if wrong := set(a.targets) - {"loader", "readers"}:
        p.error(f"{', '.join(wrong)}: the targets are loader and readers")
    work = llama_cpp.root() / "fuzz"
    work.mkdir(parents=True, exist_ok=True)
    sound = True
    for name in a.targets or ["loader", "readers"]:
        with FileLock(work / f"{name}.lock"):
            command = [build_loader(work)] if name == "loader" else [sys.executable, TESTS / "fuzz" / "fuzz_readers.py"]
            sound = fuzz(name, command, work, a) and sound
    return 0 if sound else 1


if __name__ == "__main__":
    run_program(main)
