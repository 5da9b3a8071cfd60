"""kill -9 at random moments, and two at once: sources stay as they were, targets are absent, as before, or whole.

A command's imports take longer than its work, so a server that has them forks for each command, and the kill meets the work.
"""

import fcntl
import json
import os
import random
import signal
import subprocess
import time

import conftest
import numpy as np
import pytest
import small_models
from conftest import sherry

from sherry_gguf import atomic, cli, gguf_type, retag
from sherry_gguf.errors import ConvertError
from sherry_gguf.reader import open_gguf

pytestmark = pytest.mark.slow

SERVER = """
import json, os, signal, sys, time
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
from sherry_gguf import kernels
from sherry_gguf.cli import main
from sherry_gguf.convert import command, upstream
upstream.upstream()
fsync = os.fsync
os.fsync = lambda fd: (time.sleep(0.01), fsync(fd))  # a disk that takes its time: kills meet what waits for it too
print("ready", flush=True)
for line in sys.stdin:
    arguments, delay = json.loads(line)
    if (pid := os.fork()) == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in 0, 1, 2:
            os.dup2(nowhere, fd)
        os._exit(main(arguments))
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # which may have ended: until it is waited for, its number is its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    with conftest.python(SERVER, stdin=subprocess.PIPE, stderr=None) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def killed(server, arguments, delay):
    """Run a command and kill it after `delay` seconds, or let it end; its exit code."""
    print(json.dumps([list(map(str, arguments)), delay]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("checkpoint") / "m", "llama", latent=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """20 million weights of STQ1_0 with today's numbers and with the old ones."""
    gguf = gguf_type.register()
    directory = tmp_path_factory.mktemp("packed")
    writer = gguf.GGUFWriter(directory / "new.gguf", "llama")
    writer.add_file_type(43)
    rng = np.random.default_rng(0)
    for i in range(20):
        data = rng.integers(0, 256, (1000, 4, 42), np.uint8)
        data[..., 41] &= 63  # scales that are numbers
        writer.add_tensor(f"blk.{i}.weight", data.reshape(1000, -1), raw_dtype=gguf.GGMLQuantizationType.STQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old = bytearray((directory / "new.gguf").read_bytes())
    reader = open_gguf(directory / "new.gguf", types=False)
    old[reader.file_type_at()] = 41
    for e in reader.table:
        old[e.type_at] = 42
    (directory / "old.gguf").write_bytes(old)
    return directory


# command: its arguments, its source, how often it is killed
CASES = {
    "convert": (lambda source, to: ["convert", source, "--outfile", to], "checkpoint", 60),
    "convert-split": (lambda source, to: ["convert", source, "--outfile", to, "--split-max-tensors", 4], "checkpoint", 50),
    "retag": (lambda source, to: ["retag", source / "old.gguf", to], "packed", 60),
    "transcode": (lambda source, to: ["transcode", source / "new.gguf", to, "--to", "tq2_0"], "packed", 60),
}


@pytest.mark.parametrize("older", [False, True], ids=["absent", "older"])
@pytest.mark.parametrize("case", CASES)
def test_kill_9(server, case, older, tmp_path, request):
    """230 kills in all: half of them while there is an older target."""
    command, source, kills = CASES[case]
    source = request.getfixturevalue(source)
    before = files(source)
    directory = tmp_path / "whole"
    directory.mkdir()
    durations = []
    for _ in range(3):  # the first one may have to read what it runs
        begin = time.monotonic()
        assert killed(server, command(source, directory / "x.gguf"), None) == 0
        durations.append(time.monotonic() - begin)
    duration = min(durations)
    whole = files(directory)
    assert (len(whole) > 2) == (case == "convert-split") and all(data[:4] == b"GGUF" for data in whole.values())
    first = min(whole)
    directory = tmp_path / "killed"
    directory.mkdir()
    rng, at_work, ended = random.Random(case), 0, 0
    for _ in range(kills // 2):
        for name in whole:
            if older:
                (directory / name).write_bytes(b"an older target")
            else:
                (directory / name).unlink(missing_ok=True)
        code = killed(server, command(source, directory / "x.gguf"), rng.random() * duration * 1.1)
        assert code in (0, -signal.SIGKILL)
        ended += code == 0
        at_work += any(directory.glob(".sherry-gguf-*/*"))
        assert files(source) == before
        found = files(directory)
        if first not in found:  # the others of a split are found by it
            assert not older or len(whole) > 1
        elif found[first] == b"an older target":
            assert older and found == dict.fromkeys(whole, b"an older target")
        else:
            assert found == whole
    assert at_work >= kills // 2 // 10 and ended <= kills // 4, "the kills missed the work"
    # the next one removes what those left, but for the only copies of older files
    assert killed(server, command(source, directory / "x.gguf"), None) == 0
    left = [p for p in directory.iterdir() if p.is_dir()]
    assert files(directory) == whole and all(any(p.glob("*.old")) for p in left) and (older and len(whole) > 1 or not left)


def test_kill_9_in_place(server, packed, tmp_path):
    """40 kills: the file's numbers are old ones or new ones, and the next run makes them all new."""
    target = tmp_path / "x.gguf"
    old, new = (packed / "old.gguf").read_bytes(), (packed / "new.gguf").read_bytes()
    target.write_bytes(old)
    durations = []
    for _ in range(3):
        target.write_bytes(old)
        begin = time.monotonic()
        assert killed(server, ["retag", target, "--in-place"], None) == 0 and files(tmp_path) == {"x.gguf": new}
        durations.append(time.monotonic() - begin)
    duration = min(durations)
    rng, kept = random.Random(0), 0
    backup = target.name + retag.BACKUP
    for _ in range(40):
        target.write_bytes(old)
        killed(server, ["retag", target, "--in-place"], rng.random() * duration * 1.1)
        found = files(tmp_path)
        head = found.get(backup)
        kept += head is not None
        if found["x.gguf"] not in (old, new):
            assert head is not None and found["x.gguf"][len(head) :] == old[len(head) :]
        assert head is None or head == old[: len(head)]
        code = killed(server, ["retag", target, "--in-place"], None)
        assert code == (0 if head is not None or found["x.gguf"] == old else 1)  # 1: there is nothing left to change
        assert target.read_bytes() == new
        for p in tmp_path.iterdir():
            if p != target:
                assert p.name == backup + ".part"
                p.unlink()
    assert kept


SPLIT = ["--split-max-tensors", "4"]


@pytest.mark.parametrize("split", [[], SPLIT], ids=["one-file", "split"])
def test_two_conversions_to_one_target(checkpoint, split, tmp_path):
    """One wins, whole: the files are those of one of them, and nothing else is there."""
    different = ["--keep", "ffn_up"], ["--keep", "attn_q"]
    wanted = []
    for i, flags in enumerate(different):
        (tmp_path / str(i)).mkdir()
        done = sherry("convert", checkpoint, "--outfile", tmp_path / str(i) / "x.gguf", *split, *flags)
        assert done.returncode == 0, done.stderr
        wanted.append(files(tmp_path / str(i)))
    assert wanted[0].keys() == wanted[1].keys() and wanted[0] != wanted[1] and (len(wanted[0]) > 2) == bool(split)
    both = tmp_path / "both"
    both.mkdir()
    # they begin to put their files in place at the same time
    gate = tmp_path / "gate"
    gate.touch()
    code = f"""
import fcntl, os, sys
from sherry_gguf import atomic, cli
commit = atomic.commit
def waiting(*args):
    print("ready", flush=True)
    with open({str(gate)!r}) as f:
        fcntl.flock(f, fcntl.LOCK_SH)
    commit(*args)
atomic.commit = waiting
sys.exit(cli.main(sys.argv[1:]))
"""
    for _ in range(2):
        with open(gate) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            run = [
                conftest.python(
                    code, "convert", checkpoint, "--outfile", both / "x.gguf", *split, *flags, stderr=open(tmp_path / flags[1], "w")
                )
                for flags in different
            ]
            for process in run:
                while line := process.stdout.readline():
                    if line == "ready\n":
                        break
                assert line, process.wait()
        codes = [process.communicate() and process.returncode for process in run]
        assert codes == [0, 0], [(tmp_path / flags[1]).read_text() for flags in different]
        found = files(both)
        assert found in wanted and sorted(os.listdir(both)) == sorted(found)


class Renames:
    """os.rename, until a number of them have been; `after`: which of those behind do no more."""

    def __init__(self, good, after):
        self.rename, self.left, self.after = os.rename, good, after

    def __call__(self, here, there):
        self.left -= 1
        if self.left < 0 and self.after(here):
            raise PermissionError(13, "Permission denied")
        self.rename(here, there)


@pytest.mark.parametrize("good", range(6))
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("after", [lambda _: True, lambda path: path.name == "1.old"], ids=["all", "one"])
def test_what_cannot_be_put_back_is_kept(tmp_path, monkeypatch, good, old, after):
    """Whatever fails while the files of a split take their places, and again while the older ones are put back: these are not lost."""
    names = [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names if old else ():
        (tmp_path / name).write_text(f"old {name}")
    failing = Renames(good, lambda here: failing.left == -1 or after(here))
    with pytest.raises(ConvertError, match="cannot write .*: Permission denied") as says:
        with atomic.staging(tmp_path / "x.gguf", 1) as staging:
            for name in names:
                (staging / name).write_text(f"new {name}")
            with monkeypatch.context() as m:
                m.setattr(os, "rename", failing)
                atomic.commit([staging / name for name in names], [tmp_path / name for name in names])
            assert old is False and good >= 3, "nothing failed"
            raise PermissionError(13, "Permission denied")
    found = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    if old:
        assert {f"old {name}" for name in names} <= set(found.values())
        for place, text in found.items():
            if text.startswith("old") and place.name not in names:
                assert f"{text[4:]} is {tmp_path / place}" in str(says.value)
                os.rename(tmp_path / place, tmp_path / text[4:])  # as it says
        assert {name: (tmp_path / name).read_text() for name in names} == {name: f"old {name}" for name in names}
    else:
        assert all(text.startswith("new") for text in found.values())


def test_waiting_for_a_directory_can_be_interrupted(tmp_path):
    code = """
import sys
from pathlib import Path
from sherry_gguf import atomic
names = ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
with atomic.staging(Path("x.gguf"), 1) as staging:
    for name in names:
        (staging / name).write_text("new")
    print("ready", flush=True)
    atomic.commit([staging / name for name in names], [Path(name) for name in names])
"""
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        process = conftest.python(code, cwd=tmp_path)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # it waits now; before, it would be interrupted as well
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert "KeyboardInterrupt" in output and process.returncode and os.listdir(tmp_path) == [], output
    finally:
        os.close(fd)


def test_an_interrupted_retag_in_place_says_what_to_do(packed, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    target = tmp_path / "x.gguf"
    target.write_bytes((packed / "old.gguf").read_bytes())
    monkeypatch.setattr(os, "fsync", interrupted)
    assert cli.main(["retag", str(target), "--in-place"]) == 130
    assert "interrupted: run the same command again to finish" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["retag", str(target), "--in-place"]) == 0 and files(tmp_path) == {"x.gguf": (packed / "new.gguf").read_bytes()}
    assert cli.main(["retag", str(packed / "old.gguf"), str(tmp_path / "y.gguf")]) == 0


def test_two_retags_in_place(packed, tmp_path, capsys):
    target = tmp_path / "x.gguf"
    old = (packed / "old.gguf").read_bytes()
    target.write_bytes(old)
    with open(target) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert cli.main(["retag", str(target), "--in-place"]) == 1
    assert "is being changed by another retag" in capsys.readouterr().err and files(tmp_path) == {"x.gguf": old}
    assert cli.main(["retag", str(target), "--in-place"]) == 0 and target.read_bytes() == (packed / "new.gguf").read_bytes()
