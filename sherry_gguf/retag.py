"""Renumbers the type of old STQ1_0 files. They have 42, which upstream has since given to Q2_0.

A tensor's size tells the two types apart: 256 weights take 42 bytes as STQ1_0 and 72 as Q2_0. Nothing else in the file is trusted, and a
tensor of any other size stops the command.

general.file_type has the same history: it is 41 (now Q2_0's) or 42 in the first files and becomes 43 with the tensors.
"""

import argparse
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
from .gguf_file import check_shard, is_shard, split_files
from .reader import Entry, open_gguf, padded
from .report import counted

Q2_0 = (64, 18)  # weights and bytes of a block of upstream's type 42
OLD_FILE_TYPES = (41, 42)  # general.file_type in the first files
BACKUP = ".before-retag"  # suffix of the copy of the file's old head during a retag in place
# The changes that a retag makes, byte by byte: (new, old).
_CHANGED = {(stq1_0.TYPE.type_id, stq1_0.OLD_TYPE_ID), *((stq1_0.TYPE.file_type, old) for old in OLD_FILE_TYPES)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] GGUF (OUTPUT | --in-place)"
    parser.description = (
        "Make an old STQ1_0 file loadable: give its tensors the type number 43. The first files have 42, which upstream has since "
        "given to Q2_0. The size of a tensor tells which of the two it is."
    )
    parser.add_argument("gguf", type=Path, metavar="GGUF", help="the old file")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("output", type=Path, nargs="?", metavar="OUTPUT", help="write a copy to this file")
    where.add_argument("--in-place", action="store_true", help="change the file itself")


def run(args: argparse.Namespace) -> int:
    count, file_type = retag_in_place(args.gguf) if args.in_place else retag(args.gguf, args.output)
    changed = [counted(count, "tensor")] * (count > 0) + ["general.file_type"] * file_type
    have = "has" if count + file_type == 1 else "have"
    what = f"{' and '.join(changed)} now {have} STQ1_0's number, {stq1_0.TYPE.type_id}" if changed else "copied unchanged"
    print(f"{args.output or args.gguf}: {what}")
    return 0


def old_tensors(reader) -> list[Entry]:
    """The STQ1_0 tensors with the old number, of `open_gguf(path, types=False)`. Raises ConvertError if type 42 may be anything else."""
    path, alignment = reader.path, int(reader.alignment)
    starts = sorted({e.start for e in reader.table})
    size = path.stat().st_size
    found, ambiguous = [], []
    for e in reader.table:
        if e.type_id != stq1_0.OLD_TYPE_ID:
            continue
        i = bisect.bisect_right(starts, e.start)
        last = i == len(starts)
        space = (size if last else starts[i]) - e.start
        tensor = f"{path}: tensor {e.name}, {' x '.join(map(str, e.shape))},"
        if not math.prod(e.shape):
            raise ConvertError(f"{tensor} has no weights: its type cannot be determined")
        old = _fits(e, space, last, alignment, stq1_0.TYPE.size, stq1_0.TYPE.bytes)
        new = _fits(e, space, last, alignment, *Q2_0)
        if not old and not new:
            raise ConvertError(
                f"{tensor} of type 42 has {space} bytes, neither STQ1_0's 42 for each 256 weights nor Q2_0's 72: the file is damaged, or "
                "this is another type"
            )
        if not old:
            raise ConvertError(f"{tensor} has {space} bytes, 72 for each 256 weights: it is upstream's Q2_0, which has the number 42 now")
        found.append(e)
        ambiguous += [e] * new
    if ambiguous and len(ambiguous) == len(found):  # no file has both types, so one clear tensor would decide
        raise ConvertError(
            f"{path}: tensor {ambiguous[0].name} and all others of type 42 are so small that, padded to {alignment} bytes, they may be "
            "STQ1_0 or upstream's Q2_0: their type cannot be determined"
        )
    if problem := reader.problem(old=True):
        raise ConvertError(f"{path}: {problem}")
    return found


def _fits(e: Entry, space: int, last: bool, alignment: int, block: int, nbytes: int) -> bool:
    """Whether a tensor with blocks of `block` weights and `nbytes` bytes takes this space; a file's last may lack padding."""
    needed = math.prod(e.shape) // block * nbytes
    return e.shape[0] % block == 0 and (space == padded(needed, alignment) or (last and space == needed))


def _changes(path: Path) -> tuple[int, dict[int, int]]:
    """How many tensors change, and the new 32-bit values by their offset in the file."""
    reader = open_gguf(path, types=False)
    found = old_tensors(reader)
    numbers = {e.type_at: stq1_0.TYPE.type_id for e in found}
    if (at := reader.file_type_at()) is not None and reader.fields["general.file_type"].contents() in OLD_FILE_TYPES:
        if found or any(map(_has_stq1_0, split_files(path))):
            numbers[at] = stq1_0.TYPE.file_type
    return len(found), numbers


def _has_stq1_0(path: Path) -> bool:
    """Whether a file has STQ1_0 tensors with either number: an earlier retag may have changed the tensors' numbers alone."""
    try:
        reader = open_gguf(path, types=False)
        return any(e.type_id == stq1_0.TYPE.type_id for e in reader.table) or bool(old_tensors(reader))
    except ConvertError:  # another file of the split that is missing, or nothing that retag changes
        return False


def retag(source: Path, target: Path) -> tuple[int, bool]:
    """Write a copy of an old STQ1_0 file with today's type number.

    Returns the number of changed tensors, and whether general.file_type changed. Raises ConvertError; then the target is as it was.
    """
    source, target = Path(source), Path(target)
    check_shard(source, target)
    target = atomic.writable(target)
    if source.name and source.with_name(source.name + BACKUP).exists():
        raise ConvertError(f"{source.name + BACKUP} shows that a retag of {source} in place was cut off: run it with --in-place again")
    count, numbers = _changes(source)
    if not numbers and not is_shard(source):  # a split's file is copied without any, so that the split stays whole
        raise _nothing(source)
    if target.exists() and target.samefile(source):
        raise ConvertError(f"{target} is the input file: --in-place changes it")
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
    """`retag` the file itself. Raises ConvertError, also for a symbolic link, whose file may have other users.

    A copy of the file's head, up to the last number that changes, stays beside it until the new head is on the disk. The next run undoes
    one that was cut off in between.
    """
    path = Path(path)
    backup = path.with_name(path.name + BACKUP)
    with _locked(path):
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
        with _os_errors(path), open(path, "r+b") as f:
            head = f.read(max(numbers) + 4)
            part = backup.with_name(backup.name + ".part")
            part.unlink(missing_ok=True)
            try:
                with open(part, "xb") as b:  # fails on a link that somebody put there
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


def _restore(path: Path, backup: Path) -> None:
    """Put back the head that a cut-off retag kept. The backup is complete: it got its name by a rename."""
    if backup.is_symlink() or not backup.is_file():
        raise ConvertError(f"{backup} is in the way of a retag in place, and is not an ordinary file: remove it")
    head = backup.read_bytes()
    with _os_errors(path), open(path, "r+b") as f:
        now = f.read(len(head))
        # Only the renumbered bytes may differ, or else somebody has put another file in its place.
        if len(now) != len(head) or any(a != b and (a, b) not in _CHANGED for a, b in zip(now, head)):
            raise ConvertError(
                f"{backup} belongs to a retag that was cut off, but not to this {path.name}: remove it if {path.name} is whole"
            )
        f.seek(0)
        f.write(head)
        f.flush()
        os.fsync(f.fileno())
    backup.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the file if the system can, so that no run undoes the unfinished work of another.

    The file itself is locked. filelock would truncate it, and a lock file beside it would stay.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            if path.is_file():  # opening a pipe would wait
                fcntl.flock(stack.enter_context(open(path, "rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{path} is being changed by another retag: wait for its end") from None
        except OSError:
            pass  # open_gguf says what is wrong with the file
        yield


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open a directory
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn OSErrors into ConvertErrors."""
    try:
        yield
    except OSError as e:
        why = "there is no room for the copy of its head" if e.errno in (errno.ENOSPC, errno.EDQUOT) else e.strerror or e
        raise ConvertError(f"cannot change {path}: {why}") from e
