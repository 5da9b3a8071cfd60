"""The wheel: what is in it, and what it does on a machine that has Python and nothing else."""

import json
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest
from conftest import WHOLE_ARCHIVES, Logits, check_same_sums, greedy
from cross_arm import COMPILERS, EMULATOR, missing

from sherry_gguf import llama_cpp

here = platform.machine() == "x86_64" and sys.platform == "linux"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not here, reason="the wheel is built under x86-64 Linux only")]

REPO = Path(__file__).parents[2]
BUILD = REPO / "scripts" / "build"
PROMPT = "def read(self):"
TOOLS = {"llama-bench", "llama-cli", "llama-completion", "llama-quantize", "llama-server"}


def script(name, *args, env=None):
    """Run a script of scripts/build; its output, stdout and stderr together."""
    done = subprocess.run([sys.executable, BUILD / name, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=os.environ | (env or {}))  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def built(arch):
    if platform.libc_ver() > ("glibc", "2.36"):  # compared as texts, good from 2.10 to 2.99
        pytest.skip("this system's compiler asks for a newer glibc than the wheels may need: they are built on Debian 12")
    return Path(re.search(r"^wheel: (.*\.whl), [\d.]+ MB", script("wheel.py", arch, *([] if WHOLE_ARCHIVES else ["--tested"])), re.M)[1])


@pytest.fixture(scope="session")
def wheel():
    return built("x86_64")


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The package from the wheel, beside this environment's other packages: runs its command."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", target, wheel], check=True
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHERRY_")} | {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}

    def run(*command, **more):
        return subprocess.run([sys.executable, "-m", "sherry_gguf", *map(str, command)], cwd=target, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, env=env | more)  # fmt: skip

    return target, run


def test_what_is_in_it(wheel):
    assert re.fullmatch(r"sherry_gguf-[\d.]+-cp310-abi3-manylinux_2_34_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
        metadata = archive.read(next(name for name in modes if name.endswith(".dist-info/METADATA"))).decode()
    ours = {path.relative_to(REPO).as_posix() for path in (REPO / "sherry_gguf").rglob("*.py")}
    assert ours <= modes.keys() and "sherry_gguf/_kernels.abi3.so" in modes and "sherry_gguf/py.typed" in modes
    tools = {Path(name).name: mode for name, mode in modes.items() if name.startswith("sherry_gguf/_llama/bin/llama-")}
    assert tools.keys() >= TOOLS and all(mode & stat.S_IXOTH for mode in tools.values())
    assert {name.split("/")[0] for name in modes} == {"sherry_gguf", "sherry_gguf.libs", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert not [name for name in modes if "test-" in name or "__pycache__" in name]
    licences = {Path(name).name for name in modes if "LICENSE" in name}
    assert licences >= {"LICENSE", "LICENSE-llama.cpp", "LICENSE-sherry-gguf", "LICENSE-cpp-httplib"}
    assert "Requires-Python: >=3.10" in metadata and "Provides-Extra: convert" in metadata


def test_needs_only_what_the_platform_has(wheel):
    said = subprocess.run([sys.executable, "-m", "auditwheel", "show", wheel], capture_output=True, text=True, check=True).stdout
    assert re.search(r'is consistent with the following platform tag: "manylinux_2_34_x86_64"', " ".join(said.split())), said


def namespaces():
    """Whether this user may have a file system of his own, which some containers and systems forbid."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return (
        shutil.which("unshare")
        and not subprocess.run(["unshare", *user, "--mount", "--pid", "--fork", "true"], capture_output=True).returncode
    )


@pytest.mark.skipif(not here or not namespaces(), reason="needs Linux's namespaces")
def test_on_a_machine_with_python_alone(wheel, demo):
    said = script("try_wheel.py", wheel, "--model", demo[2], "sherry-gguf inspect /model.gguf",
                  f"sherry-gguf run /model.gguf -p '{PROMPT}' -n 16 --temp 0 -t 2")  # fmt: skip
    assert "TQ1_25 tensors are marked exact" in said and re.search(r"from pip install to the end: [\d.]+ s$", said.strip()), said
    text = re.sub(r"\s+", " ", greedy(demo[2]))
    assert text in re.sub(r"\s+", " ", said), said


def test_convert(installed, demo, tmp_path):
    _, run = installed
    done = run("convert", demo[0], "--outfile", tmp_path / "model.gguf", "--require-exact")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.gguf").read_bytes() == demo[2].read_bytes()
    done = run("verify", tmp_path / "model.gguf", demo[0])
    assert done.returncode == 0 and "no differences" in done.stdout, done.stdout + done.stderr


def test_quantize_and_transcode(installed, demo, tmp_path):
    target, run = installed
    for command in ("quantize", demo[1], tmp_path / "q.gguf", "TQ2_0"), ("transcode", demo[2], tmp_path / "t.gguf", "--to", "tq2_0"):
        done = run(*command)
        assert done.returncode == 0, done.stderr
        assert "TQ2_0" in run("inspect", command[2]).stdout


def test_bench_and_serve(installed, demo):
    target, run = installed
    done = run("bench", demo[2], "--prompt", "8", "--generate", "4", "--rounds", "1")
    assert done.returncode == 0 and re.search(r"\| +\d", done.stdout), done.stdout + done.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHERRY_")} | {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "sherry_gguf", "serve", str(demo[2]), "--port", str(port), "-c", "256"]
    with subprocess.Popen(command, env=env, cwd=target, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            log = []
            for line in server.stdout:
                log.append(line)
                if "listening on" in line:
                    break
            else:
                pytest.fail("".join(log))
            body = json.dumps({"prompt": PROMPT, "max_tokens": 16, "temperature": 0}).encode()
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
            answer = json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["text"]
        finally:
            server.kill()
    assert " ".join(answer.split()) == " ".join(greedy(demo[2]).split())


def test_lacks_a_tool(installed, tmp_path):
    """A tool that the wheel lacks is named with a way out; SHERRY_BUILD_DIR still names another build."""
    target, _ = installed
    code = "from sherry_gguf import llama_cpp; print(llama_cpp.root()); llama_cpp.tool('llama-nothing')"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHERRY_")} | {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == str(target / "sherry_gguf" / "_llama")
    assert "the installed package lacks it. Install it again, or set SHERRY_BUILD_DIR" in done.stderr
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env=env | {"SHERRY_BUILD_DIR": str(tmp_path)})  # fmt: skip
    assert done.stdout.strip() == str(tmp_path) and "run scripts/build_llama_cpp.py, or set SHERRY_BUILD_DIR" in done.stderr


def test_llama(installed, demo, tmp_path):
    """llama-cpp-python on the wheel's libraries, whose backends are files beside them."""
    target, _ = installed
    env = {k: v for k, v in os.environ.items() if not k.startswith("SHERRY_")} | {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, REPO / "examples" / "llama.py", demo[2]], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    answer = re.search(r"^completion: '(.*)', 16 tokens$", done.stdout, re.M)[1].encode().decode("unicode_escape")
    assert " ".join(answer.split()) == " ".join(greedy(demo[2]).split())


@pytest.mark.emulated
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_for_arm(demo, tmp_path):
    """The wheel for 64-bit ARM, under emulation: its kernels give the reference's blocks, its llama.cpp the native logits,
    and in the wheel that users get, llama-cli the native text."""
    arm = built("aarch64")
    assert arm.name.endswith("-cp310-abi3-manylinux_2_34_aarch64.whl")
    with zipfile.ZipFile(arm) as archive:
        archive.extractall(tmp_path)
    code = (f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import numpy as np, sherry_gguf as s; from sherry_gguf import kernels; "
            "x = np.random.default_rng(0).standard_normal((8, 256), np.float32); assert (s.quantize(x) == s.TQ1_25.quantize(x)).all(); "
            "print(s.__file__, kernels.available())")  # fmt: skip
    script("arm.py")
    done = subprocess.run([llama_cpp.root() / "arm" / "run-python", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / "sherry_gguf/__init__.py"), "['i8mm',", "'dotprod',", "'neon',", "'scalar']"], done.stderr
    files = tmp_path / "sherry_gguf/_llama/bin"
    command = [EMULATOR, "-cpu", "neoverse-n1", "-L", "/usr/aarch64-linux-gnu"]
    (tmp_path / "native").mkdir()
    emulated = Logits(files, files, COMPILERS[1], lambda program: [*command, program])
    native = Logits(tmp_path / "native", llama_cpp.library("llama").parent)
    found, expected = (logits(demo[2], demo[0] / "held_out.txt", 40, 1, tokens=40)[0] for logits in (emulated, native))
    check_same_sums(expected, found, "from the wheel")
    if WHOLE_ARCHIVES:
        (files / "llama-cli").chmod(0o755)
        assert greedy(demo[2], prompt=PROMPT, command=[*command, files / "llama-cli"]) == greedy(demo[2], prompt=PROMPT)
