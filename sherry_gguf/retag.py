"""STQ1_0 files of before the type had its number: 42, which upstream's llama.cpp has given to Q2_0 since.

Both are told apart by the room that a tensor has in the file, up to the next one: STQ1_0 takes 42 bytes for 256 weights and
Q2_0 takes 72. Nothing else in the file is believed, and a tensor with another room is no reason to guess.

general.file_type has the same history: the first files have 41, which is Q2_0's now, or 42. It becomes 43 along with the tensors.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from . import atomic, stq1_0
from .errors import ConvertError
from .gguf_file import check_shard, is_shard, padded, split_files
from .reader import Entry, open_gguf

Q2_0 = (64, 18)  # weights and bytes of a block of upstream's type 42
OLD_FILE_TYPES = (41, 42)  # general.file_type in the first files
BACKUP = ".before-retag"  # behind the file's name: its old head, while a retag in place is at work


def old_tensors(path: Path) -> list[Entry]:
    """Those of STQ1_0 with the old number, maybe none. Raises ConvertError where a tensor of 42 may be anything else."""
    return _old_tensors(open_gguf(path, types=False))


def _old_tensors(reader) -> list[Entry]:
    path, entries, alignment = reader.path, reader.table, int(reader.alignment)
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
            return room == padded(needed, alignment) or (after is None and room == needed)

        old, new = fits(stq1_0.TYPE.size, stq1_0.TYPE.bytes), fits(*Q2_0)
        if not old and not new:
            raise ConvertError(
                f"{path}: tensor {e.name}, {shape}, of type 42 has {room} bytes, neither STQ1_0's 42 for each 256 weights nor "
                "Q2_0's 72: the file is damaged, or of another type"
            )
        if not old:
            raise ConvertError(
                f"{path}: tensor {e.name}, {shape}, has {room} bytes, 72 for each 256 weights: it is upstream's Q2_0, "
                "which has the number 42 now, and needs no change"
            )
        found.append(e)
        either += [e] * new
    if either and len(either) == len(found):  # no file has both types: what is one of them tells of the others
        raise ConvertError(
            f"{path}: tensor {either[0].name}, and each other one of type 42, is so small that, filled up to {alignment} bytes, "
            "it may be STQ1_0 or upstream's Q2_0: nothing tells which"
        )
    if problem := reader.problem(old=True):
        raise ConvertError(f"{path}: {problem}")
    return found


def _changes(path: Path) -> tuple[int, dict[int, int]]:
    """How many tensors have the old number, and which 32 bits of the file must become what: offset to value."""
    reader = open_gguf(path, types=False)
    found = _old_tensors(reader)
    numbers = {e.type_at: stq1_0.TYPE.type_id for e in found}
    if (at := reader.file_type_at()) is not None and reader.fields["general.file_type"].contents() in OLD_FILE_TYPES:
        if found or any(map(_has_stq1_0, split_files(path))):
            numbers[at] = stq1_0.TYPE.file_type
    return len(found), numbers


def _has_stq1_0(path: Path) -> bool:
    """Has a file STQ1_0 tensors, by either number? An earlier retag may have changed the numbers of the tensors alone."""
    try:
        reader = open_gguf(path, types=False)
        return any(e.type_id == stq1_0.TYPE.type_id for e in reader.table) or bool(_old_tensors(reader))
    except ConvertError:  # another file of the split, which is missing, or nothing that retag changes
        return False


def retag(source: Path, target: Path) -> tuple[int, bool]:
    """Write a copy of an old STQ1_0 file with the type's number of today.

    Returns how many tensors have another number, and whether general.file_type has. The target is there whole, or as it was
    before. Raises ConvertError.
    """
    source, target = Path(source), Path(target)
    check_shard(source, target)
    target = atomic.writable(target)
    if source.with_name(source.name + BACKUP).exists():
        raise ConvertError(f"{source.name + BACKUP} says that a retag of {source} in place was cut off: run it with --in-place again")
    count, numbers = _changes(source)
    if not numbers and not is_shard(source):  # of a split, one without any goes along
        raise _nothing(source)
    if target.exists() and target.samefile(source):
        raise ConvertError(f"{target} is the file itself: --in-place changes it where it is")
    with atomic.staging(target, source.stat().st_size) as staging:
        new = staging / target.name
        shutil.copyfile(source, new)
        with open(new, "r+b") as f:
            _set(f, numbers)
            os.fsync(f.fileno())
        _check(new, numbers)
        atomic.commit([new], [target])
    return count, len(numbers) > count


def retag_in_place(path: Path) -> tuple[int, bool]:
    """The same in the file itself. Raises ConvertError, also for a symbolic link, whose file has other users.

    Its head, up to the last number that changes, is kept beside it until the new one is on the disk; a run that was cut off
    in between is undone by the next one.
    """
    path = Path(path)
    backup = path.with_name(path.name + BACKUP)
    with _alone(path):
        if os.path.lexists(backup):
            _restore(path, backup)
        if path.is_symlink():
            raise ConvertError(
                f"{path} is a symbolic link to {path.resolve()}: --in-place would change that file, which others may read, "
                "as in a Hugging Face cache. Write a copy: sherry-gguf retag IN OUT"
            )
        count, numbers = _changes(path)
        if not numbers:
            raise _nothing(path)
        with _told(path), open(path, "r+b") as f:
            head = f.read(max(numbers) + 4)
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
            _set(f, numbers)
            os.fsync(f.fileno())
        _check(path, numbers)
        backup.unlink()
    return count, len(numbers) > count


def _nothing(path: Path) -> ConvertError:
    return ConvertError(f"{path} has no tensor of type {stq1_0.OLD_TYPE_ID}: there is nothing to change")


def _set(f: BinaryIO, numbers: dict[int, int]) -> None:
    for at, value in numbers.items():
        f.seek(at)
        f.write(struct.pack("<I", value))
    f.flush()


def _check(path: Path, numbers: dict[int, int]) -> None:
    data = open_gguf(path).data
    if any(data[at : at + 4].tobytes() != struct.pack("<I", value) for at, value in numbers.items()):
        raise ConvertError(f"{path} read back is not what was written: check the disk and its free space")


# What a retag changes, byte by byte: the new one, the old one.
_CHANGED = {(stq1_0.TYPE.type_id, stq1_0.OLD_TYPE_ID), *((stq1_0.TYPE.file_type, old) for old in OLD_FILE_TYPES)}


def _restore(path: Path, backup: Path) -> None:
    """Put back the head that a retag which was cut off had kept. It is whole: it came to its name by a rename."""
    if backup.is_symlink() or not backup.is_file():
        raise ConvertError(f"{backup} is in the way of a retag in place, and is not an ordinary file: remove it")
    head = backup.read_bytes()
    with _told(path), open(path, "r+b") as f:
        now = f.read(len(head))
        # but for the numbers that change it must be the file's own: somebody may have put another file in its place
        differ = [i for i, (a, b) in enumerate(zip(now, head)) if a != b]
        if len(now) != len(head) or any((now[i], head[i]) not in _CHANGED for i in differ):
            raise ConvertError(
                f"{backup} is of a retag that was cut off, but not of the {path.name} that is there now: remove it if that file is whole"
            )
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
