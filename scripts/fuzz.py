#!/usr/bin/env python3
"""Feed damaged GGUF files to the patched llama.cpp and to the Python readers, from the stored corpus on.

loader   tests/fuzz/fuzz_loader.cpp: llama.cpp loads the file with --check-tensors and multiplies by what it has of our types; libFuzzer and
         AddressSanitizer. Needs clang (Debian: apt-get install clang) and four minutes to build it once, in build/fuzz.
readers  tests/fuzz/fuzz_readers.py: inspect, retag and transcode of the file; Atheris, which requirements.txt has for Linux on x86-64.

What makes one of them crash, hang for 20 seconds or take 4 GiB is left in build/fuzz/crashes/TARGET; the exit code is 1 then. Inputs that reach
code which none of the stored ones does are lost at the end, but with --keep: they go into DIR.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sherry_gguf import llama_cpp
from sherry_gguf.errors import NotBuilt

REPO = Path(__file__).resolve().parents[1]
TESTS = REPO / "tests"
CORPUS = TESTS / "fuzz" / "corpus"
FLAGS = "-O1 -g1 -DNDEBUG -fsanitize=address,fuzzer-no-link"
LIMITS = ["-timeout=20", "-rss_limit_mb=4096", "-malloc_limit_mb=2048", "-max_len=100000"]


class Stop(Exception):
    """What a person can mend; the message says how."""


def call(*command: object, **kwargs) -> None:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs)
    if done.returncode:
        raise Stop(f"{command[0]} failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))


def build_loader(work: Path) -> Path:
    """llama.cpp's library and the target, instrumented; what is up to date is not built again."""
    if not shutil.which("clang++"):
        raise Stop("clang is not there: install it (Debian: apt-get install clang), or name only `readers`")
    source, cmake = llama_cpp.source_dir(), work / "cmake"
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    off = "BUILD_SHARED_LIBS GGML_OPENMP GGML_NATIVE GGML_CCACHE LLAMA_BUILD_COMMON LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_TESTS LLAMA_BUILD_SERVER LLAMA_BUILD_APP"
    if not (cmake / "build.ninja").exists():
        call("cmake", "-G", "Ninja", "-S", source, "-B", cmake, "-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=None",
             f"-DCMAKE_C_FLAGS={FLAGS}", f"-DCMAKE_CXX_FLAGS={FLAGS}", *(f"-D{name}=OFF" for name in off.split()), env=env)  # fmt: skip
    print("fuzz: building llama.cpp with AddressSanitizer", flush=True)
    call("cmake", "--build", cmake, "--target", "llama", env=env)
    libraries = [cmake / "src/libllama.a", *(cmake / f"ggml/src/lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base"))]
    call("clang++", "-std=c++17", *FLAGS.replace("fuzzer-no-link", "fuzzer").split(), *(f"-I{source / d}" for d in ("include", "ggml/include", "src")),
         TESTS / "fuzz" / "fuzz_loader.cpp", *libraries, "-lpthread", "-ldl", "-lm", "-o", work / "loader")  # fmt: skip
    return work / "loader"


def fuzz(name: str, command: list, work: Path, a: argparse.Namespace) -> bool:
    """Run a target for its time, or until it has found something; whether it has not. Says how much was tried."""
    crashes = work / "crashes" / name
    crashes.mkdir(parents=True, exist_ok=True)
    log = work / f"{name}.log"
    begin, inputs, coverage, found = time.monotonic(), 0, 0, []
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        new, assertions = Path(scratch, "new"), Path(scratch, "assertions")
        new.mkdir()
        # llama.cpp keeps some of what it had read when it refuses a file
        env = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "FUZZ_ASSERTIONS": str(assertions), "PYTHONPATH": str(REPO)}
        while not found and (left := round(a.seconds - (time.monotonic() - begin))) > 0:
            before = set(crashes.iterdir())
            flags = [*LIMITS, f"-max_total_time={left}", f"-artifact_prefix={crashes}/", "-print_final_stats=1"]
            flags += [f"-fork={a.jobs}"] if name == "loader" else []
            with open(log, "w") as output:
                done = run([*command, *flags, new, CORPUS], env, output)
            text = log.read_text(errors="replace")
            tried = max((int(n) for n in re.findall(r"^#(\d+)", text, re.M)), default=0)
            inputs += tried
            coverage = max([coverage, *(int(n) for n in re.findall(r"cov: (\d+)", text))])
            left_behind = sorted(set(crashes.iterdir()) - before)
            if done and not left_behind:
                raise Stop(f"{name} ended with {done} and left no input that shows why ({log}):\n" + "\n".join(text.splitlines()[-25:]))
            for path in left_behind:
                # the memory of a thousand inputs, or another program's work, is not this one's fault
                if (
                    path.name.startswith(("oom-", "timeout-", "slow-unit-"))
                    and run([*command, *LIMITS, path], env, subprocess.DEVNULL) == 0
                ):
                    path.unlink()
                else:
                    found.append(path)
            if not tried and not found:
                raise Stop(f"{name} tried nothing ({log}):\n" + "\n".join(text.splitlines()[-25:]))
        print(f"fuzz: {name}: {inputs} inputs in {time.monotonic() - begin:.0f} s, {coverage} edges reached, {len(list(new.iterdir()))} inputs "
              f"that reach more than the stored ones; found: {len(found) or 'nothing'}", flush=True)  # fmt: skip
        if assertions.exists():
            counts = Counter(re.sub(r"^.*?/llama.cpp/", "", line) for line in assertions.read_text().splitlines() if line)
            print(f"fuzz: {name}: {counts.total()} inputs were refused by assertions of llama.cpp on hyperparameters, vocabulary and types")
            for line, count in counts.most_common():
                print(f"  {count:7} {line}")
        for path in found:
            print(f"  {path}")
        if a.keep:
            a.keep.mkdir(parents=True, exist_ok=True)
            for path in new.iterdir():
                shutil.move(path, a.keep / f"{name}-{path.name}")
    return not found


def run(command: list, env: dict[str, str], output) -> int:
    return subprocess.run(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, env=env).returncode


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("targets", nargs="*", metavar="loader|readers", help="which; default: both, one after the other")
    p.add_argument("--seconds", type=int, default=60, metavar="N", help="time for each (60)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes of the loader (all CPUs)")
    p.add_argument("--keep", type=Path, metavar="DIR", help="where to put inputs that reach code which no stored one does")
    a = p.parse_args()
    if wrong := set(a.targets) - {"loader", "readers"}:
        p.error(f"{', '.join(wrong)}: the targets are loader and readers")
    work = llama_cpp.root() / "fuzz"
    work.mkdir(parents=True, exist_ok=True)
    sound = True
    for name in a.targets or ["loader", "readers"]:
        with open(work / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = [build_loader(work)] if name == "loader" else [sys.executable, TESTS / "fuzz" / "fuzz_readers.py"]
            sound = fuzz(name, command, work, a) and sound
    return 0 if sound else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stop, NotBuilt) as e:
        sys.exit(f"fuzz: {e}")
    except KeyboardInterrupt:
        sys.exit("fuzz: interrupted")
