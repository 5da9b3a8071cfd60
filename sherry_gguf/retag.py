"""STQ1_0 files of before the type had its number: 42, which upstream's llama.cpp has given to Q2_0 since.

Both are told apart by the room that a tensor has in the file, up to the next one: STQ1_0 takes 42 bytes for 256 weights and
Q2_0 takes 72. Nothing else in the file is believed, and a tensor with another room is no reason to guess.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import math
import os
import shutil
import struct
from pathlib import Path
from typing import BinaryIO, Iterator

from . import convert, stq1_0, verify
from .convert import ConvertError
from .reader import Entry, open_gguf

Q2_0 = (64, 18)  # weights and bytes of a block of upstream's type 42
BACKUP = ".before-retag"  # behind the file's name: its old head, while a retag in place is at work


def old_tensors(path: Path) -> list[Entry]:
    """Those of STQ1_0 with the old number, maybe none. Raises ConvertError where a tensor of 42 may be anything else."""
    reader = open_gguf(path, types=False)
    entries, alignment = reader.table, int(reader.alignment)
    ends = sorted({e.start for e in entries})
    size = path.stat().st_size
    found, either = [], []
    for e in entries:
        if e.type_id != stq1_0.OLD_TYPE_ID:
            continue
        i = bisect.bisect_right(ends, e.start)
        after = ends[i] if i < len(ends) else None
        room = (size if after is None else after) - e.start
        weights = math.prod(e.shape)
        shape = " x ".join(map(str, e.shape))
        if not weights:
            raise ConvertError(f"{path}: tensor {e.name}, {shape}, has no weights: nothing tells its type")

        def fits(block: int, nbytes: int) -> bool:
            if e.shape[0] % block:
                return False
            needed = weights // block * nbytes
            # the last tensor of a file may lack its padding
            return room in (needed, -(-needed // alignment) * alignment) if after is None else room == -(-needed // alignment) * alignment

        old, new = fits(stq1_0.TYPE.size, stq1_0.TYPE.bytes), fits(*Q2_0)
        if not old and not new:
            raise ConvertError(f"{path}: tensor {e.name}, {shape}, of type 42 has {room} bytes, neither STQ1_0's 42 for each 256 weights nor "
                               "Q2_0's 72: the file is damaged, or of another type")
        if not old:
            raise ConvertError(f"{path}: tensor {e.name}, {shape}, has {room} bytes, 72 for each 256 weights: it is upstream's Q2_0, "
                               "which has the number 42 now, and needs no change")
        found.append(e)
        either += [e] * new
    if either and len(either) == len(found):  # no file has both types: what is one of them tells of the others
        raise ConvertError(f"{path}: tensor {either[0].name}, and each other one of type 42, is so small that, filled up to {alignment} bytes, "
                           "it may be STQ1_0 or upstream's Q2_0: nothing tells which")
    if problem := reader.problem(old=True):
        raise ConvertError(f"{path}: {problem}")
    return found


def retag(source: Path, target: Path) -> int:
    """Write a copy of an old STQ1_0 file with the type's number of today; the count of tensors. Raises ConvertError.

    The target is there whole, or as it was before.
    """
    source, target = Path(source), Path(target)
    verify.check_shard(source, target)
    target = convert.writable(target)
    if source.with_name(source.name + BACKUP).exists():
        raise ConvertError(f"{source.name + BACKUP} says that a retag of {source} in place was cut off: run it with --in-place again")
    found = old_tensors(source)
    if not found and not verify.is_shard(source):  # of a split, one without any goes along
        raise _nothing(source)
    if target.exists() and target.samefile(source):
        raise ConvertError(f"{target} is the file itself: --in-place changes it where it is")
    with convert._staging(target, source.stat().st_size) as staging:
        new = staging / target.name
        shutil.copyfile(source, new)
        with open(new, "r+b") as f:
            _set(f, found, stq1_0.TYPE.type_id)
            os.fsync(f.fileno())
        _check(new, found)
        convert._commit([new], [target])
    return len(found)


def retag_in_place(path: Path) -> int:
    """The same in the file itself; the count of tensors. Raises ConvertError.

    Its head, up to the last number that changes, is kept beside it until the new one is on the disk; a run that was cut off
    in between is undone by the next one.
    """
    path = Path(path)
    backup = path.with_name(path.name + BACKUP)
    with _alone(path):
        if os.path.lexists(backup):
            _restore(path, backup)
        found = old_tensors(path)
        if not found:
            raise _nothing(path)
        with _told(path), open(path, "r+b") as f:
            head = f.read(max(e.type_at for e in found) + 4)
            part = backup.with_name(backup.name + ".part")
            part.unlink(missing_ok=True)
            try:
                with open(part, "xb") as b:  # not through a link that somebody has put there
                    b.write(head)
                    b.flush()
                    os.fsync(b.fileno())
                os.replace(part, backup)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)
            _set(f, found, stq1_0.TYPE.type_id)
            os.fsync(f.fileno())
        _check(path, found)
        backup.unlink()
    return len(found)


def _nothing(path: Path) -> ConvertError:
    return ConvertError(f"{path} has no tensor of type {stq1_0.OLD_TYPE_ID}: there is nothing to change")


def _set(f: BinaryIO, entries: list[Entry], type_id: int) -> None:
    for e in entries:
        f.seek(e.type_at)
        f.write(struct.pack("<I", type_id))
    f.flush()


def _check(path: Path, found: list[Entry]) -> None:
    changed = {e.type_at: e for e in found}
    if sum(e.type_at in changed and e.type_id == stq1_0.TYPE.type_id for e in open_gguf(path).table) != len(found):
        raise ConvertError(f"{path} read back is not what was written: check the disk and its free space")


def _restore(path: Path, backup: Path) -> None:
    """Put back the head that a retag which was cut off had kept. It is whole: it came to its name by a rename."""
    if backup.is_symlink() or not backup.is_file():
        raise ConvertError(f"{backup} is in the way of a retag in place, and no ordinary file: remove it")
    head = backup.read_bytes()
    with _told(path), open(path, "r+b") as f:
        now = f.read(len(head))
        # but for the numbers of types it must be the file's own: somebody may have put another file in its place
        differ = [i for i, (a, b) in enumerate(zip(now, head)) if a != b]
        if len(now) != len(head) or any((now[i], head[i]) != (stq1_0.TYPE.type_id, stq1_0.OLD_TYPE_ID) for i in differ):
            raise ConvertError(f"{backup} is of a retag that was cut off, but not of the {path.name} that is there now: remove it if "
                               "that file is whole")
        f.seek(0)
        f.write(head)
        f.flush()
        os.fsync(f.fileno())
    backup.unlink()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock on the file, where there is such a thing: another retag's half of the work is no reason to undo it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # old_tensors says what is wrong with it
            if not path.is_file():  # a pipe would be waited for
                raise FileNotFoundError
            f = stack.enter_context(open(path, "rb"))
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConvertError(f"{path} is being changed by another retag: wait for its end") from None
        yield


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # not everywhere can one be opened
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        why = "there is no room for the copy of its head" if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror or e
        raise ConvertError(f"cannot change {path}: {why}") from e
