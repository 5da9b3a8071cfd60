"""The NEON kernels under emulation: the tests of the kernels, as they are, in a Python for ARM on CPUs that have and that lack each variant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import backend_ops, greedy, loaded, portable
from cross_arm import COMPILERS, missing

from sherry_gguf import llama_cpp

REPO = Path(__file__).parent.parent
CPUS = {  # qemu's names: what it has
    "max": ["i8mm", "dotprod", "neon", "scalar"],
    "neoverse-n1": ["dotprod", "neon", "scalar"],
    "cortex-a72": ["neon", "scalar"],
}

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


@pytest.fixture(scope="module")
def python():
    built = subprocess.run([sys.executable, REPO / "scripts" / "build_arm"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return llama_cpp.root() / "arm" / "run-python"


def run(python, cpu, *args, **env):
    env = os.environ | {"SHERRY_ARM_CPU": cpu, "PYTHONPATH": str(REPO / "tests")} | env
    return subprocess.run([python, *map(str, args)], capture_output=True, text=True, env=env, cwd=REPO / "tests")


@pytest.mark.parametrize("cpu", CPUS)
def test_each_cpu_has_its_variants(python, cpu):
    done = run(python, cpu, "-c", "import json; from sherry_gguf import kernels; print(json.dumps(kernels.available()))")
    assert done.returncode == 0 and json.loads(done.stdout) == CPUS[cpu], done.stdout + done.stderr
    multiply = "import numpy as np; from sherry_gguf import kernels; x = np.ones(128, np.float32); kernels.vec_dot(kernels.quantize(x), x)"
    for isa in CPUS["max"]:
        done = run(python, cpu, "-c", multiply, SHERRY_ISA=isa)
        assert done.returncode == (isa not in CPUS[cpu]), done.stderr
        assert done.returncode == 0 or f"{isa}: this CPU lacks it; it runs {', '.join(CPUS[cpu])}" in done.stderr, done.stderr


@pytest.mark.parametrize("cpu", CPUS)
def test_the_tests_of_the_kernels(python, cpu):
    files = ["test_kernels.py", "test_repack.py", "test_stq1_0.py", "test_tq1_25.py"]
    done = run(python, cpu, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 300, done.stdout[-2000:]


# ---- llama.cpp's tools ----

ROOT = "/usr/aarch64-linux-gnu"  # where the cross compiler's C library is
VARIANTS = {  # what the tools load there
    "max,sve-max-vq=2": "armv8.6_2",  # with more than 256 bits of SVE upstream's Q4_K and Q6_K are wrong; no CPU with i8mm has them
    "neoverse-n1": "armv8.2_2",
    "cortex-a72": "armv8.0_1",
}


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    return portable("aarch64", tmp_path_factory.mktemp("aarch64"))


def emulated(cpu, program):
    return ["qemu-aarch64", "-cpu", cpu, "-L", ROOT, program]


@pytest.mark.parametrize("cpu", VARIANTS)
def test_backend_ops(tools, cpu):
    text = backend_ops(emulated(cpu, tools / "test-backend-ops"), {"MUL_MAT": 80, "MUL_MAT_ID": 120, "GET_ROWS": 10, "CPY": 20})
    assert set(loaded(text)) == {f"libggml-cpu-{VARIANTS[cpu]}.so"}, text


@pytest.mark.parametrize("cpu", VARIANTS)
def test_quantize_fns(tools, cpu, tmp_path):
    """It links to one ggml-cpu, so it is compiled here, with the one that is loaded on this CPU."""
    source = llama_cpp.source_dir()
    compiled = [COMPILERS[1], "-std=c++17", "-O2", f"-I{source}/ggml/include", f"-I{source}/ggml/src", source / "tests/test-quantize-fns.cpp",
                tools / f"libggml-cpu-{VARIANTS[cpu]}.so", tools / "libggml-base.so.0", "-o", tmp_path / "test"]  # fmt: skip
    subprocess.run(compiled, check=True)
    done = subprocess.run([*emulated(cpu, tmp_path / "test"), "-v"], capture_output=True, text=True, env={"LD_LIBRARY_PATH": str(tools)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"\btq1_25 .*ok", done.stdout)) == len(re.findall(r"\bstq1_0 .*ok", done.stdout)) == 3


@pytest.mark.parametrize("cpu", [*VARIANTS, "max,sve=off"])  # i8mm without SVE: upstream's kernels have neither, ours the first
def test_text_of_the_demo_model(tools, cpu, demo):
    for args in [], ["--no-repack"]:
        assert greedy(demo[2], *args, command=emulated(cpu, tools / "llama-cli")) == greedy(demo[2], *args)
