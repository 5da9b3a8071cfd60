"""Targets that cannot be written, and conversions that are interrupted: older targets stay, and nothing half-written is left."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
import small_models
import torch
from conftest import sherry

pytest_plugins = "conversion_fixtures"
pytestmark = pytest.mark.slow


# ---- the target ----


def test_no_target_directory(model, fails, tmp_path):
    fails(model, "--outfile", tmp_path / "none" / "x.gguf", says=["cannot write", "none does not exist. Create it first"])
    fails(model, "--outfile", tmp_path / "out.gguf" / "x.gguf", says=["cannot write", "out.gguf is not a directory"])


def test_unwritable_target(model, fails):
    fails(model, "--outfile", "/proc/x.gguf", says=["cannot write /proc/x.gguf", "Choose another place for it"])
    fails(model, "--outfile", "/dev/null", says=["cannot write /dev/null: it exists and is not an ordinary file"])


def test_unusable_target_names(model, fails, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop2")
    (tmp_path / "loop2").symlink_to(tmp_path / "loop")
    (tmp_path / "away").symlink_to(tmp_path / "none" / "x")
    for name in "loop", "away", "x" * 300:
        fails(model, "--outfile", tmp_path / name, says=["error: cannot write"])


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_every_file_of_a_split_is_checked(model, fails, tmp_path, flags):
    shards = [tmp_path / f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    flags = [*flags, "--split-max-tensors", 8]
    shards[1].mkdir()
    (shards[1] / "precious").write_text("x")
    fails(model, *flags, says=["out-00002-of-00003.gguf: it exists and is not an ordinary file"])
    shutil.rmtree(shards[1])
    os.link(model / "config.json", shards[1])
    fails(model, *flags, says=["out-00002-of-00003.gguf: it is a file of the checkpoint itself"])
    shards[1].unlink()
    for i in 0, 2:
        shards[i].symlink_to(tmp_path / "same")
    fails(model, *flags, says=["two files of the split are symbolic links to the same place"])


@contextlib.contextmanager
def mounted(directory, options):
    """An empty file system of its own; a test that needs one is skipped where that is not allowed."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield directory
        assert not list(directory.iterdir())
    finally:
        subprocess.run(["umount", directory], check=True)


def test_read_only(model, fails, tmp_path):
    if os.geteuid():
        (tmp_path / "ro").mkdir(mode=0o500)
        fails(model, "--outfile", tmp_path / "ro" / "x.gguf", says=["cannot write", "Permission denied"])
        return
    with mounted(tmp_path / "ro", "ro") as directory:
        fails(model, "--outfile", directory / "x.gguf", says=["cannot write", "Read-only file system"])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_target_is_input(model, fails, file):
    fails(model, "--outfile", model / file, says=[f"{file}: it is a file of the checkpoint itself"])
    (model.parent / "link.gguf").symlink_to(model / file)
    fails(model, "--outfile", model.parent / "link.gguf", says=[f"{file}: it is a file of the checkpoint itself"])


def test_disk_full_while_writing(model, fails):
    """A file size limit stops the write where a full disk would."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    fails(model, says=["no room for", "it takes 0.7 MB", "Nothing was written"], preexec_fn=limit)


def test_disk_full(model, fails, tmp_path):
    """A file system that really is too small: reported before anything is written."""
    with mounted(tmp_path / "small", "size=300k") as directory:
        fails(model, "--outfile", directory / "x.gguf", says=["no room for", "0.3 MB are free"])


# ---- interruptions ----


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A model that takes seconds to write: 60 million weights."""
    config = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    return small_models.make(tmp_path_factory.mktemp("slow") / "m", "llama", config=config, latent=True, dtype=torch.float32)


# Each chunk waits a little, so that the signal surely meets a half-written file.
SLOW = """
import sys, time
from sherry_gguf import cli
from sherry_gguf.convert import encode, rows
rows.CHUNK = 1 << 18
load = encode.load_chunk
encode.load_chunk = lambda *args: time.sleep(0.02) or load(*args)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("split", [False, True])
def test_interrupted(slow, tmp_path, number, code, split):
    (tmp_path / "out.gguf").write_bytes(b"an older target")
    (tmp_path / "out-00001-of-00006.gguf").write_bytes(b"an older target")
    before, input_before = small_models.snapshot(tmp_path), sorted(p.name for p in slow.iterdir())
    process = conftest.python(SLOW, "convert", slow, "--outfile", tmp_path / "out.gguf", *(["--split-max-tensors", 5] if split else []))
    deadline = time.monotonic() + 100
    while sum(p.stat().st_size for p in tmp_path.glob(".sherry*/*")) < 2_000_000:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "interrupted: no half-written file is left" in output and "Traceback" not in output
    assert small_models.snapshot(tmp_path) == before and sorted(p.name for p in slow.iterdir()) == input_before


@pytest.mark.parametrize(
    "error, code, says",
    [('OSError(5, "Input/output error")', 1, "Input/output error"), ("KeyboardInterrupt()", 130, "interrupted")],
)
def test_interrupted_commit(good, tmp_path, error, code, says):
    """A split that cannot be put in place as a whole is not put in place at all."""
    patch = f"""
import os
rename, calls = os.rename, []
def failing(a, b):
    calls.append(b)
    if len(calls) == 4:
        raise {error}
    rename(a, b)
os.rename = failing
"""
    for i in (1, 2, 3):
        (tmp_path / f"x-0000{i}-of-00003.gguf").write_bytes(b"older %d" % i)
    before = small_models.snapshot(tmp_path)
    done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", "--split-max-tensors", 8, patch=patch)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert small_models.snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_the_worst_moments(good, tmp_path, number):
    """While the staging directory is made: it goes again. While a split is put in place: all of it comes first."""
    patch = """
import os, signal, tempfile
def raising(function, call):
    calls = []
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(NUMBER)
        return result
    return wrapped
""".replace("NUMBER", str(int(number)))
    shards = [tmp_path / f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for shard in shards:
        shard.write_bytes(b"older")
    before = small_models.snapshot(tmp_path)
    arguments = ["convert", good, "--outfile", tmp_path / "x.gguf", "--split-max-tensors", 8]
    for where, call in ("tempfile.mkdtemp", 1), ("os.rename", 3):
        done = sherry(*arguments, patch=f"{patch}\n{where} = raising({where}, {call})")
        assert done.returncode == 128 + number and "Traceback" not in done.stderr, done.stderr
        if call == 1:
            assert small_models.snapshot(tmp_path) == before
    assert sorted(tmp_path.iterdir()) == shards
    assert all(shard.read_bytes()[:4] == b"GGUF" for shard in shards)


def test_killed(slow, good, tmp_path):
    """What a killed conversion left is removed by the next one; what another one is writing is not."""
    import fcntl

    convert = ["convert", good, "--outfile", tmp_path / "x.gguf"]
    assert sherry(*convert).returncode == 0  # the first one takes long, maybe longer than the slow one
    process = conftest.python(SLOW, "convert", slow, "--outfile", tmp_path / "out.gguf")
    deadline = time.monotonic() + 100
    while not (left := list(tmp_path.glob(".sherry*/out.gguf"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    old = left[0].parent
    assert sherry(*convert).returncode == 0 and old.is_dir()  # it is at work
    process.kill()
    process.communicate()
    others = [tmp_path / f".sherry-gguf-{name}" for name in ("abcdefgh.staging", "a_split_.staging", "notes", "earlier_")]
    for other in others:
        other.mkdir()
    (others[1] / "set-aside.old").mkdir()
    (others[1] / "set-aside.old" / "0.old").write_bytes(b"the only copy of an older file")
    (others[3] / "0.old").write_bytes(b"the same, as earlier versions kept it")
    lock = os.open(others[0], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert sherry(*convert).returncode == 0
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "x.gguf"])


@pytest.mark.parametrize("name", ["m.old", "0.old", "set-aside.old", ".staging"])
def test_names_that_could_be_taken_for_set_aside_files(good, tmp_path, name):
    """A conversion that fails, or is killed, leaves nothing under them; one that succeeds writes them."""
    failing = """
import os
def failing(fd):
    raise OSError(5, "Input/output error")
os.fsync = failing
"""
    command = ["convert", good, "--outfile", tmp_path / name]
    done = sherry(*command, patch=failing)
    assert done.returncode == 1 and "Input/output error" in done.stderr and not list(tmp_path.iterdir()), done.stderr
    killed = failing.replace('raise OSError(5, "Input/output error")', "os.kill(os.getpid(), 9)")
    assert sherry(*command, patch=killed).returncode == -9
    assert [p.name for p in tmp_path.glob(".sherry-gguf-*/*")] == [name]
    assert sherry(*command).returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    "where, error, says",
    [
        ("check_checkpoint", "MemoryError()", "error: not enough memory: MemoryError"),
        ("make_plan", 'RuntimeError("can\'t start new thread")', "error: can't start new thread"),
        ("write", 'OSError(24, "Too many open files")', "error: [Errno 24] Too many open files"),
    ],
)
def test_whatever_else(good, tmp_path, where, error, says):
    """One line, and a traceback only where it is asked for."""
    patch = f"""
from sherry_gguf import convert
def failing(*args, **kwargs):
    raise {error}
convert.{where} = failing
"""
    for flags in [], ["--verbose"]:
        done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", *flags, patch=patch)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == bool(flags), done.stderr
        assert flags or done.stderr == says + "\n"
    assert not list(tmp_path.iterdir())


def test_damage_on_the_way_to_the_disk(good, tmp_path):
    """What is read back must be what was written."""
    patch = """
import os
fsync = os.fsync
def damaging(fd):
    os.pwrite(fd, bytes([os.pread(fd, 1, 500_000)[0] ^ 1]), 500_000)
    fsync(fd)
os.fsync = damaging
"""
    done = sherry("convert", good, "--outfile", tmp_path / "x.gguf", patch=patch)
    assert done.returncode == 1 and "read back is not what was written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_not_built(good, fails, tmp_path):
    fails(
        good,
        says=["llama.cpp", "is not there: run scripts/build_llama_cpp.py"],
        env=conftest.ENV | {"SHERRY_BUILD_DIR": str(tmp_path / "none")},
    )


def test_verbose_shows_the_traceback(tmp_path):
    done = sherry("convert", tmp_path / "none", "--verbose")
    assert done.returncode == 1 and "Traceback" in done.stderr and "does not exist" in done.stderr


def test_output_that_cannot_be_shown(good, tmp_path):
    """A terminal's encoding that lacks the path's letters; a full device behind standard output."""
    target = tmp_path / "\u00f6 \u6a21.gguf"
    command = [sys.executable, "-m", "sherry_gguf.cli", "convert", str(good), "--outfile", str(target)]
    env = conftest.ENV | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and r"\xf6 \u6a21.gguf" in done.stdout, done.stderr
    target.unlink()
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=conftest.ENV, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "error: [Errno 28] No space left on device\n", done.stderr
    assert target.stat().st_size > 500_000


def test_runs_without_a_terminal(good, tmp_path):
    """A pipe that closes early does not make the conversion fail."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sherry_gguf.cli", "convert", str(good), "--outfile", str(tmp_path / "x.gguf")],
        env=conftest.ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, errors = process.communicate()
    assert b"Traceback" not in errors and (tmp_path / "x.gguf").stat().st_size > 500_000
