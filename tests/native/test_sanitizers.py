"""The C files under AddressSanitizer and UBSan, the glue to ggml on threads under ThreadSanitizer too, and all compiled as
strictly as the compiler can."""

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

from sherry_gguf import attention, kernels, llama_cpp

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "ggml_patch" / "src"
CC, CXX = os.environ.get("CC", "cc"), os.environ.get("CXX", "c++")
WARNINGS = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion -Wstrict-prototypes -Werror".split()
MEMORY = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


def call(*command):
    subprocess.run(list(map(str, command)), check=True)


def compile_kernels(directory, flags):
    """The C files, and a function that links a program with them."""
    for number, source in enumerate(SOURCES.rglob("*.c")):
        call(CC, "-std=c11", "-O1", "-g", *flags, "-c", source, "-o", directory / f"{source.stem}-{number}.o")
    objects = sorted(directory.glob("*.o"))

    def link(source):
        compiler = [CC, "-std=c11"]
        if source.suffix == ".cpp":
            ggml = llama_cpp.source_dir() / "ggml"
            compiler = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror"]
            for headers in "include", "src", "src/ggml-cpu":
                compiler += ["-isystem", ggml / headers]
        call(*compiler, "-O1", "-g", *flags, "-I", SOURCES, source, *objects, "-lm", "-pthread", "-o", directory / source.stem)
        return directory / source.stem

    return link


@pytest.fixture(scope="module")
def with_memory_checks(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("memory"), MEMORY)


@pytest.fixture(scope="module")
def fuzz(with_memory_checks):
    return with_memory_checks(HERE / "fuzz_kernels.c")


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes(fuzz, seed):
    result = subprocess.run([fuzz, str(seed), "3000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    repacked = 2 * len(kernels.available_repacked()) + len(kernels.available_panels()) + len(kernels.available_wide())
    plain = 3 * (8 + len(kernels.available())) + 1
    assert int(result.stdout.split()[0]) == 3000 * plain + 3000 // 5 * (repacked + 3 + len(attention.available()))


@pytest.fixture(scope="module")
def with_race_checks(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("races"), THREADS)


def checked(command, env):
    """Run a program that a sanitizer checks."""
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if "unexpected memory mapping" in result.stderr:  # older ThreadSanitizers, where addresses are very random
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True, env=env)
    return result


@pytest.fixture(scope="module")
def programs(request):
    """A program of tests/llama_cpp by the sanitizer and its name, compiled once."""

    @functools.cache
    def program(sanitizer, name):
        return request.getfixturevalue(sanitizer)(HERE.parent / "llama_cpp" / f"{name}.cpp")

    return program


ATTENTION = {kernels.instruction_set(isa).attention: isa for isa in attention.available()}  # several sets have the same kernels


@pytest.mark.parametrize("sanitizer", ["with_memory_checks", "with_race_checks"])
@pytest.mark.parametrize("name, isa, operations", [
    *(("threads_repacked", isa, 112) for isa in kernels.available_repacked()),
    *(("threads_attention", isa, 156) for isa in ATTENTION.values()),
])  # fmt: skip
def test_threads_share_the_work(programs, sanitizer, name, isa, operations):
    """With and without NUMA, 1 to 8 threads; few and many columns, experts; few and many queries, heads, keys: right, and no race."""
    command, env = [programs(sanitizer, name), "1"], os.environ | {"SHERRY_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
    result = checked(command, env)
    assert result.returncode == 0 and result.stdout == f"{operations} operations\n", result.stdout + result.stderr[:8000]


@pytest.mark.parametrize("sanitizer", ["with_memory_checks", "with_race_checks"])
def test_threads_decode_a_matrix(request, sanitizer):
    program = request.getfixturevalue(sanitizer)(HERE / "threads_decode.c")
    result = checked([program, "1"], os.environ | {"TSAN_OPTIONS": "halt_on_error=1"})
    assert result.returncode == 0 and result.stdout == "15 right\n", result.stdout + result.stderr[:8000]


def test_attention_is_tested_with_the_memory_that_ggml_gives():
    """threads_attention.cpp repeats ggml_graph_plan's lines."""
    ggml = (llama_cpp.source_dir() / "ggml" / "src" / "ggml-cpu" / "ggml-cpu.c").read_text()
    ours = (HERE.parent / "llama_cpp" / "threads_attention.cpp").read_text()
    lines = re.findall(r"size_t (?:prefill|n_chunks|decode) .*;", ours)
    assert len(lines) == 3 and all(line in ggml for line in lines), lines
    assert "cur += MAX(prefill, decode);" in ggml and "work_size += CACHE_LINE_SIZE*(n_threads);" in ggml


@pytest.mark.skipif("avx512vnni" not in kernels.available(), reason="this CPU has no multiplication like AVX-VNNI's")
def test_avxvnni_by_the_multiplication_of_avx512(tmp_path):
    """CPUs with AVX-512 and without AVX-VNNI never choose its kernels: here they are compiled with the wider encoding."""
    flags = ['-DAVXVNNI="avx2,fma,f16c,avx512f,avx512vl,avx512vnni"', "-DDPBUSD=_mm256_dpbusd_epi32", *MEMORY]
    program = compile_kernels(tmp_path, flags)(HERE / "avxvnni.c")
    for seed in "1", "2":
        result = subprocess.run([program, seed], capture_output=True, text=True)
        assert result.returncode == 0 and int(result.stdout.split()[0]) > 10000, result.stdout + result.stderr


@pytest.mark.parametrize("source", sorted(SOURCES.rglob("*.c")), ids=lambda p: str(p.relative_to(SOURCES)))
def test_compiles_without_a_warning(source):
    # Intrinsics headers are not ours; every file compiles for a plain CPU, whatever instruction set it holds.
    call(CC, "-std=c11", "-O2", *WARNINGS, "-c", source, "-o", os.devnull)


@pytest.mark.parametrize("source", sorted(SOURCES.rglob("*.h")), ids=lambda p: str(p.relative_to(SOURCES)))
def test_headers_serve_cpp_too(source, tmp_path):
    (tmp_path / "use.cpp").write_text(f'#include "{source}"\nint main() {{ return sizeof(block_tq1_25) != 22; }}\n')
    ggml = llama_cpp.source_dir() / "ggml" / "include"
    call(CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", ggml, "-c", tmp_path / "use.cpp", "-o", os.devnull)
