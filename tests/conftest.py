"""Shared by the tests: the commands, and a zoo of small models, each converted once by us and once by upstream."""

import atexit
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import small_models

from sherry_gguf import llama_cpp

# With several tests at once, waiting threads give way to others.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TESTS = Path(__file__).parent
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}

# Upstream's own script on each directory of argv; its one change takes any BPE tokenizer for GPT-2's.
UPSTREAM = """
import runpy, sys
from sherry_gguf import llama_cpp
source = llama_cpp.source_dir()
sys.path[:0] = [str(source / "gguf-py"), str(source)]
import conversion
conversion.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for directory in sys.argv[1:]:
    sys.argv = ["convert_hf_to_gguf.py", directory, "--outtype", "f32", "--outfile", directory + ".f32.gguf"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
"""

# Runs `sherry-gguf` commands in one process, since imports take longer than most conversions; commands that import the published
# gguf run in another than those with llama.cpp's. A command with a patch, Python code to run first, runs in a fork. A fork must
# not inherit threads, so there are none.
SERVER = """
import json, os, sys, traceback
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
from sherry_gguf.cli import main
done = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    arguments, directory, outputs, patch = json.loads(line)
    if patch and (pid := os.fork()):
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=done, flush=True)
        continue
    os.chdir(directory)
    for fd, path in zip((1, 2), outputs):
        new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(new, fd)
        os.close(new)
    try:
        exec(patch or "", {})
        code = main(arguments)
    except SystemExit as e:
        code = e.code
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if patch:
        os._exit(code)
    print(code, file=done, flush=True)
"""


def python(script: str, *args, **kwargs) -> subprocess.Popen:
    """Start Python code in a new process: conversion needs llama.cpp's gguf, the tests the published one."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        text=True,
        **({"env": ENV, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | kwargs),
    )


@functools.cache
def _server(llama_cpps_gguf: bool) -> tuple[subprocess.Popen, list[str]]:
    process = python(SERVER, stdin=subprocess.PIPE, stderr=None)
    directory = tempfile.TemporaryDirectory()
    atexit.register(lambda: (process.stdin.close(), process.wait(), directory.cleanup()))
    return process, [f"{directory.name}/{name}" for name in ("stdout", "stderr")]


def sherry(*args, cwd=".", patch="", **kwargs) -> subprocess.CompletedProcess:
    """Run a `sherry-gguf` command, after the Python code `patch` if any; keyword arguments are for a new process, which they start."""
    args = [str(a) for a in args]
    if kwargs:
        return subprocess.run(
            [sys.executable, "-m", "sherry_gguf.cli", *args],
            cwd=cwd,
            capture_output=True,
            text=True,
            **({"env": ENV} | kwargs),
        )
    process, outputs = _server(args[0] in ("convert", "pack", "verify"))
    print(json.dumps([args, os.path.abspath(cwd), outputs, patch]), file=process.stdin, flush=True)
    code = process.stdout.readline()
    stdout, stderr = (Path(p).read_text() for p in outputs)
    assert code, f"the process died: {stdout}{stderr}"
    return subprocess.CompletedProcess(args, int(code), stdout, stderr)


def pre(name: str) -> list[str]:
    """The flag that a model's tokenizer needs."""
    return ["--tokenizer-pre", "gpt-2"] if small_models.MODELS[name][1] == "bpe" else []


SLOW_FIXTURES = {"demo", "models", "tiny", "vulkan_build"}  # which train or run models


def pytest_collection_modifyitems(items):
    """Tests of such models, and of the zoo's beyond a few, are slow. The longest files come first: two processes end together then."""
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if SLOW_FIXTURES & {*item.fixturenames} or ("zoo" in item.fixturenames and name in {*small_models.MODELS} - {*small_models.FAST}):
            item.add_marker("slow")
    first = {item.path for item in items if item.get_closest_marker("emulated") or item.get_closest_marker("fuzz")}
    items.sort(key=lambda item: item.path not in first)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """transformers' TrainingArguments leaves bf16 in the environment, and later trainings of the process would take it from there. After
    the end that .ci/run sets, tests fail, so that CI ends with a summary."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if time.time() > float(os.environ.get("SHERRY_TESTS_END") or "inf"):
        pytest.fail("not run: the time is up (SHERRY_TESTS_END)", pytrace=False)


def shared(tmp_path_factory) -> Path:
    """A directory of this run, the same for each process of xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def _as_verbose_as_before():
    """Commands that a test runs in this process make transformers quiet, and a later test looks for what it prints."""
    yield
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def zoo(request, tmp_path_factory):
    """A directory with NAME/, NAME.f32.gguf by upstream and NAME.gguf by us, for each model of small_models (of FAST without slow tests).

    Returns it and our completed commands by name. Tests only read the files; one process makes them for all.
    """
    root = shared(tmp_path_factory) / "zoo"
    names = small_models.FAST if "not slow" in request.config.option.markexpr else list(small_models.MODELS)
    with filelock.FileLock(f"{root}.lock"):
        if not (root / "results.json").exists():
            for name in names:
                small_models.make(root / name, name)
            upstream = python(UPSTREAM, *(root / name for name in names))
            done = [sherry("convert", root / name, "--outfile", root / f"{name}.gguf", *pre(name)) for name in names]
            output, _ = upstream.communicate()
            assert upstream.returncode == 0, output
            (root / "results.json").write_text(json.dumps([vars(result) for result in done]))
    results = [subprocess.CompletedProcess(**result) for result in json.loads((root / "results.json").read_text())]
    return root, dict(zip(names, results))


# ---- the demo model ----


def upstream_f32(directory, outfile, *flags):
    """Run upstream's own script, which finds its gguf package by itself."""
    script = llama_cpp.source_dir() / "convert_hf_to_gguf.py"
    subprocess.run([sys.executable, script, directory, "--outtype", "f32", "--outfile", outfile, *map(str, flags)], check=True,
                   capture_output=True)  # fmt: skip


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's checkpoint after a quarter of its training, made once: (directory, upstream's F32 GGUF, our GGUF)."""
    hf, root = llama_cpp.root() / "tests" / "demo" / "hf", tmp_path_factory.mktemp("demo")
    hf.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(hf.parent / "tests.lock"):  # the script doesn't wait for another worker's
        script = TESTS.parent / "scripts" / "make_demo_checkpoint.py"
        subprocess.run([sys.executable, script, "--out", hf, "--steps", "400"], check=True)
    (root / "hf").symlink_to(hf)
    upstream_f32(root / "hf", root / "f32.gguf")
    result = sherry("convert", root / "hf", "--outfile", root / "demo.gguf", "--require-exact")
    assert result.returncode == 0, result.stderr
    return hf, root / "f32.gguf", root / "demo.gguf"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model's GGUF, with room for 4096 tokens."""
    root = tmp_path_factory.mktemp("tiny")
    small_models.make(root / "hf", "llama", config={"max_position_embeddings": 4096})
    done = sherry("convert", root / "hf", "--outfile", root / "tiny.gguf", "--require-exact")
    assert done.returncode == 0, done.stderr
    return root / "tiny.gguf"


@pytest.fixture(scope="session")
def adapter(tiny):
    """A random adapter of it, as a GGUF."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.with_name("hf"))
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tiny.with_name("adapter"))
    done = sherry("convert-adapter", tiny.with_name("adapter"))
    assert done.returncode == 0, done.stderr
    return tiny.with_name("adapter.gguf")


def greedy(model, *args, prompt="def read(self):", count=16, command=None, **kwargs):
    """llama-cli's greedy continuation of a prompt, to which the demo's chat template adds nothing; `command` runs llama-cli.

    Unlike llama-completion it waits for its output.
    """
    command = command or [llama_cpp.tool("llama-cli")]
    done = subprocess.run([*command, "-m", model, "-p", prompt, "-n", str(count), "--temp", "0", "-st", "-t", "2", "-c", "256",
                           "--simple-io", "--log-verbosity", "1", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace", timeout=600, **kwargs)  # fmt: skip
    answer = re.search(re.escape(f"> {prompt}\n") + r"(.*\S)\s*\[ Prompt: ", done.stdout, re.S)
    assert done.returncode == 0 and answer, done.stdout
    return answer[1]


class Logits:
    """logits.cpp on a build of llama.cpp, whose libraries are in `lib`: called with (model, text, batch, repack), it gives
    float32 (tokens, vocabulary) for a text's first tokens, and llama.cpp's log. `command` runs the program, made in `directory`."""

    def __init__(self, directory, lib, compiler=None, command=lambda program: [program]):
        source, self.out, program = llama_cpp.source_dir(), directory / "out", directory / "logits"
        build = [compiler or os.environ.get("CXX", "c++"), "-std=c++17", "-O1", f"-I{source}/include", f"-I{source}/ggml/include",
                 TESTS / "llama_cpp" / "logits.cpp", "-L", lib, "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib}",
                 "-Wl,--allow-shlib-undefined", "-o", program]  # fmt: skip
        subprocess.run(list(map(str, build)), check=True)
        self.command = command(program)

    def __call__(self, model, text, batch, repack, tokens=150):
        done = subprocess.run(list(map(str, [*self.command, model, text, tokens, batch, 2, repack, self.out])),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return np.fromfile(self.out, np.float32).reshape(tokens, -1).astype(np.float64), done.stderr


def divergence(logits, others):
    """Mean KL divergence, nats a token."""

    def log_softmax(x):
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(logits), log_softmax(others)
    return (np.exp(p) * (p - q)).sum(axis=1).mean()


def check_same_sums(logits, others, what):
    """Logits from equal integers whose float sums differ only in their order. In a model such a difference can push an activation over
    an edge of Q8_0, a whole step for the next matrix, so a token's logits are either equal to 1e-5 or off by such steps. Measured: up
    to 0.5 % of the logits' standard deviation (root mean square); KL divergence up to 1.1e-6 for random models and 1.0e-5 for the demo
    model, whose logits lie further apart. Plain weights alone give 1 to 4 % between batches of 1 and of 150 (random models)."""
    kl = divergence(logits, others)
    off = np.sqrt(((logits - others) ** 2).mean()) / logits.std()
    top = (logits.argmax(axis=1) == others.argmax(axis=1)).mean()
    print(f"{what}: {off:.2e} of the deviation, KL divergence {kl:.2e}, same top token {100 * top:.1f} %")
    assert off < 0.015 and abs(kl) < 5e-5 and top > 0.97


def squeezed(table):
    """Markdown without what fills the columns."""
    return re.sub(" +", " ", table)


# ---- builds for other machines ----


# More tokens than codes are used for, so that panels or wide tables multiply it where the CPU has them.
LONG = (
    "class Reader:\n    def __init__(self, file, size, encoding, errors):\n        self.file = file\n        self.size = size\n        self"
)
LEAST = {"MUL_MAT": 40, "MUL_MAT_ID": 60, "GET_ROWS": 5, "CPY": 10}  # upstream's cases with one of our types, at least

WHOLE_ARCHIVES = os.environ.get("SHERRY_WHOLE_ARCHIVES") == "1"  # docs/platforms.md


def portable(arch, directory):
    """Unpack the archive that scripts/build/portable.py makes in `directory`; return where its files are."""
    script = TESTS.parent / "scripts" / "build" / "portable.py"
    done = subprocess.run([sys.executable, script, arch, *([] if WHOLE_ARCHIVES else ["--tested"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    archive = Path(re.search(r"packed (.*\.tar\.gz), \d+ MB", done.stdout)[1])
    with tarfile.open(archive) as tar:
        tar.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return directory / archive.name.removesuffix(".tar.gz")


def only(files, module, directory):
    """Link the files of such a build from `directory`; of the libraries for CPU generations only `module`."""
    directory.mkdir()
    for file in files.iterdir():
        if file.name == module or not file.name.startswith("libggml-cpu-"):
            os.link(file, directory / file.name)
    return directory


def shared_symbols(files, prefix=""):
    """Symbols that the loaded libraries for CPU generations would share, such as an inline function's static: through one, code for a
    better CPU could run. Stripped libraries still name them."""
    modules = sorted(files.glob("libggml-cpu-*"))
    symbols = subprocess.run([f"{prefix}nm", "-DC", *modules], capture_output=True, text=True, check=True).stdout
    assert symbols.count(" ggml_backend_score\n") == len(modules) > 1
    return re.findall(r"^\S+ u (?!(?:guard variable for )?std::)(.*)$", symbols, re.M)


def loaded(text):
    """The libraries for CPU generations that a tool says it loaded."""
    return re.findall(r"loaded CPU backend from .*/(libggml-cpu-\S+\.so)", text)


# Upstream's cases of attention that take little time: each head size, type, and option. Keys are 113, and 512 where heads share them.
ATTENTION = (
    r"hsk=(64|72|80|96|128|192|256|576),.*kv=(113,nb=([13]|75)|512,nb=[13],mask=1),.*prec=f32,"
    r"type_K=(f16|bf16|q8_0),type_V=(f16|bf16|q8_0)"
)


def run_backend_ops(command, ops, which, backend="CPU", **kwargs):
    """Run test-backend-ops on the cases of these operations that match; return its output. All of them must pass."""
    done = subprocess.run([*command, "test", "-b", backend, "-o", ",".join(ops), "-p", which], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs)  # fmt: skip
    passed = re.search(r"(\d+)/(\d+) tests passed", done.stdout)
    assert done.returncode == 0 and passed and passed[1] == passed[2], done.stdout[-3000:]
    return done.stdout


def backend_ops(command, kinds=("tq1_25", "tq1_25_64", "stq1_0"), **kwargs):
    """Run test-backend-ops on our types; return its output. It starts once for all: building the list of all cases takes longest."""
    text = run_backend_ops(command, LEAST, "|".join(rf"\b{kind}\b" for kind in kinds), **kwargs)
    for kind, (op, least) in itertools.product(kinds, LEAST.items()):
        assert len(re.findall(rf"^ *{op}\(.*\b{kind}\b.*OK", text, re.M)) >= least, (kind, op, text[-3000:])
    return text


# ---- the build with Vulkan ----


@dataclasses.dataclass
class VulkanBuild:
    """llama.cpp with the Vulkan backend, and its first device.

    Attributes:
        directory: has `bin` and `lib`.
        env: the environment in which the tools find the device.
        description: how ggml describes it.
    """

    directory: Path
    env: dict[str, str]
    description: str

    def tool(self, name):
        return self.directory / "bin" / name

    def run(self, name, *args, code=0, env=None):
        """The output of a tool without input, which must end with `code`."""
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        env = self.env | (env or {})
        done = subprocess.run([self.tool(name), *map(str, args)], text=True, errors="replace", timeout=600, env=env, **pipes)
        assert done.returncode == code, f"{name} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout


@pytest.fixture(scope="session")
def vulkan_build():
    """The build in build/vulkan, with the device that GGML_VK_VISIBLE_DEVICES names (0: software, if there is no other). Skips if either
    is missing; a build of other shaders than the source's is an error."""
    directory, source = llama_cpp.root() / "vulkan", TESTS.parent / "ggml_patch" / "src"
    if not (directory / "lib" / "libggml-vulkan.so").exists():
        pytest.skip(f"{directory} has no build with --vulkan (docs/platforms.md, Vulkan)")
    for file in (file for file in source.rglob("*") if file.is_file()):
        built = directory / "llama.cpp" / "ggml" / "src" / "sherry" / file.relative_to(source)
        assert built.exists() and built.read_bytes() == file.read_bytes(), f"{directory} is older than {file}: build it again"
    build = VulkanBuild(directory, {"GGML_VK_VISIBLE_DEVICES": "0"} | os.environ, "")
    found = re.search(r"^ggml_vulkan: 0 = (.*)$", build.run("test-backend-ops", "test", "-b", "Vulkan0", "-o", "NONE"), re.M)
    if not found:
        pytest.skip("no Vulkan device: install the GPU's driver, or mesa-vulkan-drivers, which has one that needs no GPU")
    build.description = found[1]
    return build


@pytest.fixture(scope="module")
def one_thread():
    """These models are too small for more threads, and the same number everywhere gives the same results."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
