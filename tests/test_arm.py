"""The NEON kernels under emulation: the tests of the kernels, as they are, in a Python for ARM on CPUs that have and that lack each variant."""

import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf import llama_cpp

REPO = Path(__file__).parent.parent
CPUS = {  # qemu's names: what it has
    "max": ["i8mm", "dotprod", "neon", "scalar"],
    "neoverse-n1": ["dotprod", "neon", "scalar"],
    "cortex-a72": ["neon", "scalar"],
}


def script(name):
    loader = importlib.machinery.SourceFileLoader(name, str(REPO / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


WHY_NOT = script("build_arm").missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


@pytest.fixture(scope="module")
def python():
    built = subprocess.run([sys.executable, REPO / "scripts" / "build_arm", "python"], capture_output=True, text=True)
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
