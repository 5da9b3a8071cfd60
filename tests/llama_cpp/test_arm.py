"""ARM under emulation: the tests of the kernels, in a Python for ARM, on CPUs with and without each variant; and llama.cpp's tools.

Emulation is slow, so not every test runs on every CPU. The best instruction set of max is i8mm, of neoverse-n1 dotprod, of
cortex-a72 neon:

| what | max | neoverse-n1 | cortex-a72 |
|---|---|---|---|
| kernels' tests | i8mm, scalar, all that names no set | dotprod, golden vectors | neon, golden vectors |
| attention's tests | | | neon, the only kernels that it has |
| ggml's operations against NumPy | TQ1_25 | STQ1_0 | TQ1_25_64 |
| test-backend-ops | all three types | TQ1_25, TQ1_25_64 | TQ1_25, STQ1_0 |
| test-quantize-fns, logits of the demo model (TQ1_25) | yes | yes | yes |

So each type meets each instruction set in llama.cpp. What runs natively alone: ggml's operations with the other types of each
CPU, the slowest tests of NumPy's code (any_bytes_decode_and_pack, exact_means, sparse_absmean), those of how attention is shared among
threads and streams (no instruction set has a part in that), the converter, and the programs beside these two, unless
SHERRY_WHOLE_ARCHIVES=1.
No emulated CPU has SVE of more than 256 bits, SME or big-endian memory.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG, WHOLE_ARCHIVES, Logits, backend_ops, check_same_sums, greedy, loaded, portable, shared_symbols
from cross_arm import COMPILERS, PREFIX, missing

from sherry_gguf import gguf_type, llama_cpp

REPO = Path(__file__).parents[2]
CPUS = {  # qemu's name: its instruction sets
    "max": ["i8mm", "dotprod", "neon", "scalar"],
    "neoverse-n1": ["dotprod", "neon", "scalar"],
    "cortex-a72": ["neon", "scalar"],
}
ROOT = "/usr/aarch64-linux-gnu"  # the cross compiler's C library
MAX = "max,sve-max-vq=2,sme=off"  # upstream's Q4_K and Q6_K are wrong with more than 256 bits of SVE; no CPU with i8mm has those
VARIANTS = {  # the library that the tools load there
    MAX: "armv8.6_2",
    "neoverse-n1": "armv8.2_2",
    "cortex-a72": "armv8.0_1",
}

WHY_NOT = missing()
pytestmark = [pytest.mark.emulated, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")]


@pytest.fixture(scope="module")
def python():
    built = subprocess.run([sys.executable, REPO / "scripts" / "build" / "arm.py"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return llama_cpp.root() / "arm" / "run-python"


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The archive's libraries, and test-backend-ops."""
    files, source = portable("aarch64", tmp_path_factory.mktemp("aarch64")), llama_cpp.source_dir()
    compiled = [COMPILERS[1], "-std=c++17", "-O2", f"-I{source}/ggml/include", source / "tests/test-backend-ops.cpp", "-L", files, "-lggml",
                "-lggml-base", "-Wl,-rpath,$ORIGIN", "-o", files / "test-backend-ops"]  # fmt: skip
    subprocess.run(compiled, check=True)
    return files


def run(python, cpu, *args, **env):
    # threads that wait for each other in NumPy's products take most of an emulator's time
    env = os.environ | {"SHERRY_ARM_CPU": cpu, "PYTHONPATH": str(REPO / "tests"), "OPENBLAS_NUM_THREADS": "1"} | env
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


@pytest.mark.parametrize("cpu, tests, least", [
    ("max", "not (dotprod or neon or any_bytes_decode_and_pack or exact_means or sparse_absmean)", 670),
    ("neoverse-n1", "dotprod or golden", 275),
    ("cortex-a72", "(neon or golden) and not test_threads and not streams", 269),
])  # fmt: skip
def test_the_tests_of_the_kernels(python, cpu, tests, least):
    """Each instruction set on a CPU that lacks the next; the rest on the one that has everything, but for long tests of NumPy alone."""
    files = ["native/test_kernels.py", "native/test_repack.py", "native/test_repack_pieces.py", "native/test_repacked.py"]
    files += ["format/test_stq1_0.py", "format/test_tq1_25.py", *["native/test_attention.py"] * (cpu == "cortex-a72")]
    done = run(python, cpu, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *files, "-k", tests)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, done.stdout[-2000:]


@pytest.mark.parametrize("cpu, kind", [(MAX, "TQ1_25"), ("neoverse-n1", "STQ1_0"), ("cortex-a72", "TQ1_25_64")])
def test_operations_of_ggml(python, tools, cpu, kind, tmp_path):
    """tests/llama_cpp/test_ops.py on the libraries that these CPUs load: against NumPy."""
    (tmp_path / "lib").mkdir()
    for name, file in {"libggml-base.so": "libggml-base.so", "libggml-cpu.so": f"libggml-cpu-{VARIANTS[cpu]}.so"}.items():
        (tmp_path / "lib" / name).symlink_to(tools / file)
    for how, parts in {
        "3": "mul_mat mul_mat_id get_rows cpy cpy_back set_rows",
        "repacked": "buffer memory mul_mat strided floats mul_mat_id",
    }.items():
        done = run(
            python,
            cpu,
            "llama_cpp/test_ops.py",
            kind,
            how,
            *["emulated"] * (not how.isdigit()),
            SHERRY_BUILD_DIR=str(tmp_path),
            SHERRY_ISA=CPUS[cpu.split(",")[0]][0],
        )
        assert done.returncode == 0 and done.stdout.split() == parts.split(), done.stdout + done.stderr


@pytest.mark.parametrize(
    "flags",
    ["-march=armv8-a+crypto", "-march=armv8.2-a+fp16", "-march=armv8.2-a+dotprod", "-march=armv8.6-a+sve", "-mcpu=cortex-a53+crypto",
     "-mcpu=cortex-a72+crypto", "-mcpu=cortex-a76", "-mcpu=thunderx2t99", "-mcpu=a64fx", "-mcpu=neoverse-v1"],
)  # fmt: skip
def test_compiles_for_any_cpu(flags, tmp_path):
    """As a build on that machine would: its flags neither contain a kernel's instruction set nor are part of it."""
    sources = sorted((REPO / "ggml_patch" / "src").rglob("*.c"))
    command = [COMPILERS[0], "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", flags, "-shared", "-fPIC", *sources, "-o", tmp_path / "x.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- llama.cpp's tools ----


def emulated(cpu, program):
    return ["qemu-aarch64", "-cpu", cpu, "-L", ROOT, program]


def test_variants_share_nothing(tools):
    assert not shared_symbols(tools, PREFIX)


@pytest.mark.parametrize("cpu, kinds", [
    (MAX, ["tq1_25", "tq1_25_64", "stq1_0"]),
    ("neoverse-n1", ["tq1_25", "tq1_25_64"]),
    ("cortex-a72", ["tq1_25", "stq1_0"]),
])  # fmt: skip
def test_backend_ops(tools, cpu, kinds):
    text = backend_ops(emulated(cpu, tools / "test-backend-ops"), kinds)
    assert set(loaded(text)) == {f"libggml-cpu-{VARIANTS[cpu]}.so"}, text


@pytest.mark.parametrize("cpu", VARIANTS)
def test_quantize_fns(tools, cpu, tmp_path):
    """It links to one ggml-cpu, so it is compiled here with this CPU's. Its loop over the types, slow under emulation, starts at ours."""
    source = llama_cpp.source_dir()
    loop = "for (int i = 0; i < GGML_TYPE_COUNT; i++)"
    program = (source / "tests/test-quantize-fns.cpp").read_text()
    assert program.count(loop) == 1
    (tmp_path / "test.cpp").write_text(program.replace(loop, loop.replace("i = 0", "i = GGML_TYPE_STQ1_0")))
    compiled = [COMPILERS[1], "-std=c++17", "-O2", f"-I{source}/ggml/include", f"-I{source}/ggml/src", tmp_path / "test.cpp",
                tools / f"libggml-cpu-{VARIANTS[cpu]}.so", tools / "libggml-base.so", "-o", tmp_path / "test"]  # fmt: skip
    subprocess.run(compiled, check=True)
    done = subprocess.run([*emulated(cpu, tmp_path / "test"), "-v"], capture_output=True, text=True, env={"LD_LIBRARY_PATH": str(tools)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(len(re.findall(rf"\b{kind.lower()} .*ok", done.stdout)) == 3 for kind in gguf_type.TYPES), done.stdout


ALL_SETS = pytest.mark.parametrize("cpu", [*VARIANTS, "max,sve=off"])  # i8mm without SVE: upstream's kernels have neither, ours the first


@pytest.fixture(scope="module")
def native_logits(demo, tmp_path_factory):
    """Of the native build: by (batch, repack)."""
    logits = Logits(tmp_path_factory.mktemp("native"), llama_cpp.library("llama").parent)
    return {case: logits(demo[2], demo[0] / "held_out.txt", *case, tokens=40)[0] for case in itertools.product((1, 40), (0, 1))}


@ALL_SETS
def test_logits_of_the_demo_model(tools, cpu, demo, native_logits):
    """Token by token, by tables, and all at once, by panels; from plain and repacked weights."""
    logits = Logits(tools, tools, COMPILERS[1], lambda program: emulated(cpu, program))
    for (batch, repack), expected in native_logits.items():
        found, said = logits(demo[2], demo[0] / "held_out.txt", batch, repack, tokens=40)
        assert ("CPU_REPACK" in said) == bool(repack) and set(loaded(said)) == {
            f"libggml-cpu-{VARIANTS.get(cpu, VARIANTS['neoverse-n1'])}.so"
        }, said
        check_same_sums(expected, found, f"{cpu}, batches of {batch}, repacked: {repack}")


@ALL_SETS
@pytest.mark.skipif(not WHOLE_ARCHIVES, reason="the archive for tests has no llama-cli for ARM")
def test_text_of_the_demo_model(tools, cpu, demo):
    for args in [], ["--no-repack"]:
        assert greedy(demo[2], *args, prompt=LONG, command=emulated(cpu, tools / "llama-cli")) == greedy(demo[2], *args, prompt=LONG)


# ---- what the kernels cost ----


def test_counted_instructions(tmp_path):
    """They are the published ones: nothing is timed, so the same compiler gives the same figures."""
    out, published = tmp_path / "arm.json", REPO / "scripts" / "results" / "arm.json"
    done = subprocess.run(
        [sys.executable, REPO / "scripts" / "bench" / "count_arm.py", "--json", out, "--markdown", tmp_path / "arm.md"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counted, before = json.loads(out.read_text()), json.loads(published.read_text())
    for level, count in counted["one"]["TQ1_25"].items():
        assert 0 < count < counted["one"]["TQ2_0"][level] < counted["one"]["TQ1_0"][level]
    if counted["compiler"] != before["compiler"]:
        pytest.skip(f"published figures are of {before['compiler']}")
    assert counted == before
    assert (tmp_path / "arm.md").read_text() == published.with_suffix(".md").read_text() == done.stdout
    page = (REPO / "docs" / "kernels.md").read_text()
    assert all(f": {count:.0f} instructions for 128 activations" in page for count in counted["making"].values())
    rows = {tuple(re.findall(r"\d+\.\d", line)) for line in page.splitlines() if line.startswith("|")}
    many = (counts for levels in counted["many"].values() for counts in levels.values())
    for counts in [*counted["one"].values(), *many, *counted["attention"].values()]:
        figures = tuple(f"{count:.1f}" for count in counts.values() if count is not None)
        assert not figures or figures in rows, figures
