"""The build of llama.cpp for any x86-64 CPU: its libraries for generations of CPUs, as far as this CPU runs them."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import portable as portable_py
import pytest
from conftest import LONG, WHOLE_ARCHIVES, backend_ops, greedy, loaded, only, portable, shared_symbols

from sherry_gguf import kernels, llama_cpp

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
BUILD = REPO / "scripts" / "build" / "portable.py"
VARIANTS = {  # our instruction set on such a CPU
    "x64": "scalar", "sse42": "scalar", "sandybridge": "scalar", "ivybridge": "scalar", "piledriver": "scalar", "haswell": "avx2",
    "alderlake": "avxvnni", "skylakex": "avx512", "cannonlake": "avx512", "cascadelake": "avx512vnni", "icelake": "avx512vnni",
    "cooperlake": "avx512vnni", "zen4": "zen4", "sapphirerapids": "avx512vnni",
}  # fmt: skip
TESTED = portable_py.TESTED["x86_64"].split(";")  # our code carries its own flags: of those with one instruction set, one will do
BUILT = list(VARIANTS) if WHOLE_ARCHIVES else TESTED
here = pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="a build for x86-64 Linux is made there only")


@pytest.fixture(scope="session")
def x86(tmp_path_factory):
    return portable("x86_64", tmp_path_factory.mktemp("x86_64"))


def upstreams_variants(system, platform=""):
    """The variants in the pinned llama.cpp's CMake for a system (and its platform), each with its features."""
    text = (llama_cpp.source_dir() / "ggml" / "src" / "CMakeLists.txt").read_text()
    text = (
        text.split("\nif (GGML_CPU_ALL_VARIANTS)")[1].split(f'GGML_SYSTEM_ARCH STREQUAL "{system}"')[1].split("elseif(GGML_SYSTEM_ARCH")[0]
    )
    if platform:
        text = text.split(f'CMAKE_SYSTEM_NAME MATCHES "{platform}"')[1].split("elseif (")[0]
    return {name: features.split() for name, features in re.findall(r"^\s*ggml_add_cpu_backend_variant\((\S+?)(?: +(.*))?\)", text, re.M)}


def test_variants_of_the_pinned_llama_cpp():
    """VARIANTS are upstream's, with the instruction sets that their features give; the tested ones run every instruction set."""
    ours = {"AVX512_VNNI": "avx512vnni", "AVX512": "avx512", "AVX_VNNI": "avxvnni", "AVX2": "avx2"}
    x86 = {
        name: next((isa for feature, isa in ours.items() if feature in features), "scalar")
        for name, features in upstreams_variants("x86").items()
    }
    assert x86 | {"zen4": "zen4"} == VARIANTS and x86["zen4"] == "avx512vnni"
    ours = {"MATMUL_INT8": "i8mm", "DOTPROD": "dotprod"}
    arm = {
        name: next((isa for feature, isa in ours.items() if feature in features), "neon")
        for name, features in upstreams_variants("ARM", "Linux").items()
    }
    assert len(arm) == 8  # two of which need SME
    assert {arm[variant] for variant in portable_py.TESTED["aarch64"].split(";")} == {*arm.values()}


def score(files, variant):
    """What llama.cpp's loader goes by: 0 where the CPU lacks something. In a process of its own, which loads no more."""
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ggml_backend_score())"
    module = files / f"libggml-cpu-{variant}.so"
    return int(subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True).stdout)


@here
def test_has_its_variants_and_needs_nothing_from_here(x86):
    assert {VARIANTS[variant] for variant in TESTED} >= {*VARIANTS.values()} - {"avx512vnni"}  # which zen4's library runs on Intel's
    assert {p.name for p in x86.glob("libggml-cpu*")} == {f"libggml-cpu-{variant}.so" for variant in BUILT}
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
def test_tools_start_without_what_vulkan_needs(x86, tmp_path):
    """Only the plug-in needs Vulkan's loader. Where that can't be loaded or finds no driver, the tools say nothing of it."""
    if not (x86 / "libggml-vulkan.so").exists():
        pytest.skip("this archive comes without Vulkan")
    needs = {f.name for f in x86.iterdir() if not f.name.startswith("LICENSE")
             and "libvulkan" in subprocess.run(["readelf", "-d", f], capture_output=True, text=True, check=True).stdout}  # fmt: skip
    assert needs == {"libggml-vulkan.so"}
    (tmp_path / "libvulkan.so.1").touch()  # not a library
    for env in {"LD_LIBRARY_PATH": str(tmp_path)}, {"VK_DRIVER_FILES": "/nonexistent", "VK_ICD_FILENAMES": "/nonexistent"}:
        done = subprocess.run([x86 / "llama-cli", "--list-devices"], capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["Available", "devices:", "(none)"], ""), done


@here
def test_the_best_variant_is_taken(x86):
    best = max(BUILT, key=lambda variant: score(x86, variant))
    done = subprocess.run(
        [x86 / "test-backend-ops", "test", "-b", "CPU", "-o", "CPY", "-p", "tq1_25"], capture_output=True, text=True, env={}
    )
    assert done.returncode == 0 and loaded(done.stdout + done.stderr) == [f"libggml-cpu-{best}.so"], done.stdout + done.stderr


@here
@pytest.mark.parametrize("variant", BUILT)
def test_variant(x86, variant, demo, tmp_path):
    """llama.cpp's own test of our types passes with the kernels of such a CPU, and the text is the native build's with these and with
    this CPU's."""
    if not score(x86, variant):
        pytest.skip(f"this CPU lacks what {variant} needs")
    files = only(x86, f"libggml-cpu-{variant}.so", tmp_path / "files")
    expected, isa = greedy(demo[2], prompt=LONG), VARIANTS[variant]
    if isa == "zen4" and isa not in kernels.available():
        isa = "avx512vnni"  # an Intel CPU that runs this library
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
    assert "unrecognized arguments: -march=native" in refusal("aarch64", "-march=native")
    assert "ANDROID_NDK=: set it to an Android NDK" in refusal("android", ANDROID_NDK="")
    assert f"ANDROID_NDK={tmp_path}: set it" in refusal("android", ANDROID_NDK=str(tmp_path))
    assert "--tested: no test runs android" in refusal("android", "--tested")
    if platform.machine() == "x86_64":
        assert "aarch64-linux-gnu-gcc, aarch64-linux-gnu-g++ missing: apt-get install" in refusal("aarch64", PATH="/nonexistent")


@here
def test_unknown_variants(tmp_path):
    shutil.copytree(llama_cpp.root() / "download", tmp_path / "download")
    says = refusal("x86_64", "-DSHERRY_CPU_VARIANTS=haswell;hasswell", SHERRY_BUILD_DIR=str(tmp_path))
    assert "SHERRY_CPU_VARIANTS: there is no hasswell for this compiler; there are" in says and all(
        variant in says for variant in VARIANTS
    ), says
