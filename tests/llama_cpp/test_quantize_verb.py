"""`sherry-gguf quantize`: the bytes of llama-quantize, in a file that is whole or as it was."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import small_models
from conftest import ENV, sherry, upstream_f32

from sherry_gguf import llama_cpp, llama_quantize

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def f32(tmp_path_factory):
    root = tmp_path_factory.mktemp("f32")
    small_models.make(root / "hf", "llama")
    upstream_f32(root / "hf", root / "f32.gguf")
    upstream_f32(root / "hf", root / "split.gguf", "--split-max-tensors", 15)
    return root / "f32.gguf"


TYPES = ("--tensor-type", "ffn_up=tq1_25", "--tensor-type", "attn_q=q4_0")


@pytest.mark.parametrize("kind, flags", [((), ()), (("STQ1_0",), ()), (("TQ1_25_64",), ()), (("Q8_0", 1), ("--pure", *TYPES))])
def test_the_bytes_of_llama_quantize(f32, tmp_path, kind, flags):
    (tmp_path / "ours.gguf").write_bytes(b"older")
    done = sherry("quantize", *flags, f32, tmp_path / "ours.gguf", *kind)
    assert done.returncode == 0 and re.search(rf"wrote {tmp_path}/ours.gguf \(\d\.\d MB\)\n", done.stdout), done.stdout + done.stderr
    arguments = [*flags, f32, tmp_path / "theirs.gguf", *(kind or ("TQ1_25",))]
    assert llama_cpp.run("llama-quantize", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["ours.gguf", "theirs.gguf"]


def test_splits(f32, tmp_path):
    first = f32.with_name("split-00001-of-00002.gguf")
    assert sherry("quantize", "--keep-split", first, tmp_path / "q").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["q-00001-of-00002.gguf", "q-00002-of-00002.gguf"]
    before = first.read_bytes()
    done = sherry("quantize", "--keep-split", first, first.with_name("split"))
    assert done.returncode == 1 and f"{first} is an input file" in done.stderr and first.read_bytes() == before


def test_what_is_refused(f32, tmp_path):
    before = f32.read_bytes()
    for source, target, says in (
        (f32, f32, "is an input file: name another one to write"),
        (tmp_path / "none.gguf", tmp_path / "q.gguf", "none.gguf: no such file"),
        (tmp_path, tmp_path / "q.gguf", "not an ordinary file"),
        (f32, tmp_path / "none" / "q.gguf", "cannot write"),
        (f32, tmp_path, "not an ordinary file"),
    ):
        done = sherry("quantize", source, target)
        assert done.returncode == 1 and says in done.stderr, done.stderr
    for arguments in (f32, tmp_path / "q.gguf", "NOTYPE"), ("--imatrix", tmp_path / "none", f32, tmp_path / "q.gguf"):
        done = sherry("quantize", *arguments)
        assert done.returncode == 1 and "error: llama-quantize failed with exit code 1" in done.stderr, done.stderr
    for arguments in (f32,), ("--no-such-flag", f32, tmp_path / "q.gguf"):
        assert sherry("quantize", *arguments).returncode == 2
    assert f32.read_bytes() == before and not os.listdir(tmp_path)


def test_dry_run(f32, tmp_path):
    done = sherry("quantize", "--dry-run", f32, tmp_path / "q.gguf", "TQ1_25")
    assert done.returncode == 0 and not os.listdir(tmp_path), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_the_target(f32, tmp_path, number):
    """And the next one removes what a killed run has left."""
    (tmp_path / "q.gguf").write_bytes(b"older")
    build, fake = (
        tmp_path / "build" / "bin",
        f"#!{sys.executable}\nimport sys, time\nopen(sys.argv[-2], 'wb').write(b'half')\ntime.sleep(20)\n",
    )
    build.mkdir(parents=True)
    (build / "llama-quantize").write_text(fake)
    (build / "llama-quantize").chmod(0o755)
    command = [sys.executable, "-m", "sherry_gguf.cli", "quantize", f32, tmp_path / "q.gguf"]
    with subprocess.Popen(
        command, env=ENV | {"SHERRY_BUILD_DIR": str(build.parent)}, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as run:
        while not [*tmp_path.glob(".sherry-gguf-*/model.gguf")]:
            assert run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        _, text = run.communicate(timeout=30)
    assert (tmp_path / "q.gguf").read_bytes() == b"older"
    if number == signal.SIGTERM:
        assert run.returncode == 128 + number and "no half-written file is left" in text
        assert sorted(os.listdir(tmp_path)) == ["build", "q.gguf"]
    else:
        assert sherry("quantize", f32, tmp_path / "q.gguf").returncode == 0
        assert sorted(os.listdir(tmp_path)) == ["build", "q.gguf"] and (tmp_path / "q.gguf").stat().st_size > 10_000


def test_every_flag_of_llama_quantize():
    text = llama_cpp.run("llama-quantize", "--help", capture_output=True, text=True).stdout
    theirs = dict(re.findall(r"^  (--[\w-]+) ?(\S*)$", text, re.M))
    assert len(theirs) > 10 and {flag: bool(value) for flag, value in theirs.items()} == {
        flag: metavar is not None for flag, metavar, *_ in llama_quantize.FLAGS
    }


@pytest.mark.parametrize("name, kind", [("7/out.gguf", "Q8_0"), ("7.gguf", "2"), ("d.gguf/q", "Q4_0"), ("--q.gguf", "Q4_0")])
def test_paths_that_llama_quantize_would_take_for_something_else(f32, tmp_path, name, kind):
    """A number at the start was a type, a ".gguf" in the directory's name the end of a split's name, a dash a flag."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    first = f32.with_name("split-00001-of-00002.gguf")
    done = sherry("quantize", *["--keep-split"] * ("d." in name), "--", first, name, kind, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ([f"{name}-0000{i}-of-00002.gguf" for i in (1, 2)] if "d." in name else [name])
    assert not [p for p in f32.parent.iterdir() if p.name.startswith("ggml-model")]


def test_a_type_is_no_output(f32, tmp_path):
    done = sherry("quantize", f32, "q4_0", cwd=tmp_path)
    assert done.returncode == 1 and "error: OUTPUT is missing: q4_0 is a type" in done.stderr and not os.listdir(tmp_path)
