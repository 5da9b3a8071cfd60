"""The build of llama.cpp for any x86-64 CPU: each of its libraries for a generation of CPUs, on this one as far as it has what they need."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, backend_ops, greedy, loaded, only, portable, shared_symbols

from sherry_gguf import kernels, llama_cpp

REPO = Path(__file__).parents[2]
BUILD = REPO / "scripts" / "build" / "portable.py"
VARIANTS = {  # what of ours such a CPU runs
    "x64": "scalar", "sse42": "scalar", "sandybridge": "scalar", "ivybridge": "scalar", "piledriver": "scalar", "haswell": "avx2",
    "alderlake": "avxvnni", "skylakex": "avx512", "cannonlake": "avx512", "cascadelake": "avx512vnni", "icelake": "avx512vnni",
    "cooperlake": "avx512vnni", "zen4": "zen4", "sapphirerapids": "avx512vnni",
}  # fmt: skip
here = pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="a build for x86-64 Linux is made there only")


@pytest.fixture(scope="session")
def x86(tmp_path_factory):
    return portable("x86_64", tmp_path_factory.mktemp("x86_64"))


def score(files, variant):
    """What llama.cpp's loader goes by: 0 where the CPU lacks something. In a process of its own, which loads no more."""
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ggml_backend_score())"
    module = files / f"libggml-cpu-{variant}.so"
    return int(subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True).stdout)


@here
def test_has_every_variant_and_needs_nothing_from_here(x86):
    assert {p.name for p in x86.glob("libggml-cpu*")} == {f"libggml-cpu-{variant}.so" for variant in VARIANTS}
    assert not [p for p in x86.iterdir() if p.is_symlink()]
    for file in x86.iterdir():
        if not file.name.startswith("LICENSE"):
            dynamic = subprocess.run(["readelf", "-d", file], capture_output=True, text=True, check=True).stdout
            assert set(re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic)) <= {"$ORIGIN"}, dynamic
            needed = subprocess.run(["ldd", file], capture_output=True, text=True, env={}).stdout
            assert "not found" not in needed, needed
            assert all(path.startswith((str(x86), "/lib", "/usr/lib")) for path in re.findall(r"=> (\S+)", needed)), needed


@here
def test_variants_share_nothing(x86):
    assert not shared_symbols(x86)


@here
def test_the_best_variant_is_taken(x86):
    best = max(VARIANTS, key=lambda variant: score(x86, variant))
    done = subprocess.run(
        [x86 / "test-backend-ops", "test", "-b", "CPU", "-o", "CPY", "-p", "tq1_25"], capture_output=True, text=True, env={}
    )
    assert done.returncode == 0 and loaded(done.stdout + done.stderr) == [f"libggml-cpu-{best}.so"], done.stdout + done.stderr


@here
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(x86, variant, demo, tmp_path):
    """llama.cpp's own test of our types by the kernels that a CPU of this kind would take, and the text as the native build has it, by
    these and by those that this CPU takes."""
    if not score(x86, variant):
        pytest.skip(f"this CPU lacks what {variant} needs")
    files = only(x86, f"libggml-cpu-{variant}.so", tmp_path / "files")
    expected, isa = greedy(demo[2], prompt=LONG), VARIANTS[variant]
    if isa == "zen4" and isa not in kernels.available():
        isa = "avx512vnni"  # an Intel CPU with what this library needs
    text = backend_ops([files / "test-backend-ops"], env={"SHERRY_ISA": isa})
    assert set(loaded(text)) == {f"libggml-cpu-{variant}.so"}, text
    for chosen in isa, "":
        assert greedy(demo[2], prompt=LONG, command=[files / "llama-cli"], env={"SHERRY_ISA": chosen}) == expected


def refusal(*args, **env):
    done = subprocess.run([sys.executable, BUILD, *args], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_be_built(tmp_path):
    assert "choose from" in refusal("riscv64")
    assert "unexpected arguments ['-march=native']" in refusal("aarch64", "-march=native")
    assert "ANDROID_NDK=: set it to an Android NDK" in refusal("android", ANDROID_NDK="")
    assert f"ANDROID_NDK={tmp_path}: set it" in refusal("android", ANDROID_NDK=str(tmp_path))
    if platform.machine() == "x86_64":
        assert "aarch64-linux-gnu-gcc, aarch64-linux-gnu-g++ not there: apt-get install" in refusal("aarch64", PATH="/nonexistent")


@here
def test_unknown_variants(tmp_path):
    shutil.copytree(llama_cpp.root() / "download", tmp_path / "download")
    told = refusal("x86_64", "-DSHERRY_CPU_VARIANTS=haswell;hasswell", SHERRY_BUILD_DIR=str(tmp_path))
    assert "SHERRY_CPU_VARIANTS: there is no hasswell for this compiler; there are" in told and all(
        variant in told for variant in VARIANTS
    ), told
