"""The C files under AddressSanitizer and UBSan, compiled as strictly as the compiler can."""

import os
import subprocess
from pathlib import Path

import pytest

from sherry_gguf import kernels

HERE = Path(__file__).parent
SOURCES = HERE.parent / "ggml_patch" / "src"
CC = os.environ.get("CC", "cc")
WARNINGS = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wstrict-prototypes -Werror".split()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzz") / "fuzz_kernels"
    command = [CC, "-std=c11", "-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-I", SOURCES,
               HERE / "fuzz_kernels.c", *sorted(SOURCES.glob("*.c")), "-lm", "-o", out]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes(program, seed):
    result = subprocess.run([program, str(seed), "3000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout.split()[0]) == 3000 * (8 + len(kernels.available()))


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.c")), ids=lambda p: p.name)
def test_compiles_without_a_warning(source):
    # Intrinsics headers are not ours; every file compiles for a plain CPU, whatever instruction set it holds.
    subprocess.run([CC, "-std=c11", "-O2", *WARNINGS, "-c", str(source), "-o", os.devnull], check=True)


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.h")), ids=lambda p: p.name)
def test_headers_serve_cpp_too(source, tmp_path):
    (tmp_path / "use.cpp").write_text(f'#include "{source}"\nint main() {{ return sizeof(block_tq1_25) != 22; }}\n')
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-c",
                    str(tmp_path / "use.cpp"), "-o", os.devnull], check=True)  # fmt: skip
