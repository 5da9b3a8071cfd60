"""Puts files in place whole or not at all, even if a command fails, is interrupted or is killed.

Files are written to a staging directory beside the target, flushed, read back, and renamed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from . import signals
from .errors import ConvertError, NotBuilt
from .gguf_file import Stored
from .reader import open_gguf

_STAGING = ".sherry-gguf-"
_SET_ASIDE = "set-aside.old"  # a directory in the staging directory; a file of this name is a target that a user named so
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Written(Protocol):
    """A tensor as it was written."""

    name: str
    shape: tuple[int, ...]  # NumPy's order
    type: Any  # gguf.GGMLQuantizationType
    sha256: bytes  # of its data


def writable(target: Path) -> Path:
    """The path to write for a target, with symbolic links resolved.

    Raises ConvertError if the directory is missing or something other than an ordinary file is there.
    """
    try:
        if target.is_symlink():
            target = target.resolve()  # written through, as by any program
        if not target.parent.is_dir():
            raise ConvertError(
                f"cannot write {target}: {target.parent} "
                + ("is not a directory" if target.parent.exists() else "does not exist. Create it first")
            )
        if target.exists() and not target.is_file():
            raise ConvertError(f"cannot write {target}: it exists and is not an ordinary file")
    except (OSError, RuntimeError) as e:  # a name too long, a loop of symbolic links
        raise ConvertError(f"cannot write {target}: {e}") from e
    return target


@contextlib.contextmanager
def staging(target: Path, needed: int, holes: int = 0) -> Iterator[Path]:
    """A new directory beside the target, removed at the end in any case.

    needed: bytes that will be written; holes: how many of these take no space. Raises ConvertError if they exceed the free space, and
    for any OSError within the block but NotBuilt.
    """
    directory = lock = None
    try:
        _sweep(target.parent)
        with uninterrupted():
            while directory is None or not directory.exists():  # another process may have swept it before it was locked
                directory = Path(tempfile.mkdtemp(".staging", _STAGING, target.parent))
                lock = _lock(directory, wait=True)
        if needed - holes > (free := shutil.disk_usage(directory).free):
            raise ConvertError(_disk_full(target, needed, free))
        yield directory
    except OSError as e:
        if isinstance(e, NotBuilt):
            raise
        if e.errno in _DISK_FULL:
            raise ConvertError(_disk_full(target, needed, shutil.disk_usage(target.parent).free)) from e
        raise ConvertError(f"cannot write {target}: {e.strerror or e}. Choose another place for it") from e
    finally:
        with uninterrupted():
            if directory and not _holds_older(directory):
                shutil.rmtree(directory, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _disk_full(target: Path, needed: int, free: int) -> str:
    sizes = f"it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free there"
    return f"no room for {target}: {sizes} (or a quota or file size limit is reached). Nothing was written"


def _lock(directory: Path, wait: bool = False) -> int | None:
    """Lock a directory until the returned descriptor is closed or the process ends; None if another process has the lock or this system
    cannot lock.

    filelock would need a file: that would stay beside the target, or take a name in the staging directory that a target may have.
    """
    try:
        import fcntl

        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BaseException as e:
        os.close(fd)
        if isinstance(e, OSError):
            return None
        raise


def _sweep(directory: Path):
    """Remove the staging directories of killed processes, which nobody locks any more."""
    for old in directory.glob(f"{_STAGING}{'?' * 8}.staging"):
        if (lock := _lock(old)) is not None:
            if not _holds_older(old):
                shutil.rmtree(old, ignore_errors=True)
            os.close(lock)


def _holds_older(directory: Path) -> bool:
    """Whether a staging directory has older files of a split that `commit` neither replaced nor put back: perhaps the only copies."""
    return any((directory / _SET_ASIDE).glob("*"))


def reread(path: Path, expected: Sequence[Written]):
    """Flush a GGUF file to the disk and read it back. Raises ConvertError if its tensors are not the expected ones."""
    with open(path, "r+b") as f:
        _flush(f.fileno())
        stored = [Stored.of(tensor, path) for tensor in open_gguf(path).tensors]
        good = [(s.name, s.shape, s.type) for s in stored] == [(t.name, t.shape, t.type) for t in expected]
        for t, s in zip(expected, stored if good else ()):
            f.seek(s.offset)
            good = good and _sha256(f, s.nbytes) == t.sha256
    if not good:
        raise ConvertError(f"{path} read back is not what was written: check the disk and its free space")


def flushed_sha256(path: Path) -> bytes:
    """Flush a file to the disk and read it back: the SHA-256 of what is there."""
    with open(path, "r+b") as f:
        _flush(f.fileno())
        return _sha256(f, path.stat().st_size)


def _flush(fd: int) -> None:
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):  # forget the cached pages
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sha256(f: IO[bytes], left: int) -> bytes:
    digest = hashlib.sha256()
    while left and (data := f.read(min(left, 1 << 24))):
        digest.update(data)
        left -= len(data)
    return digest.digest()


def commit_directory(staged: Path, target: Path) -> None:
    """Flush a staged directory of files and move it to its place, which must be new or an empty directory. Raises OSError."""
    for path in [*staged.iterdir(), staged]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    os.rename(staged, target)


def commit(staged: list[Path], files: list[Path]):
    """Move staged files to their places, all or none, with the permissions of the files that they replace.

    Programs find a split by its first file. So the old first file is removed first and the new one installed last: if this process is
    killed, nobody meets files of two conversions. Another commit of a split to the same directory waits.
    """

    def copy_permissions():
        for new, file in zip(staged, files):
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(file, new)

    if len(files) == 1:
        copy_permissions()
        os.replace(staged[0], files[0])
        return
    lock = _lock(files[0].parent, wait=True)  # can be interrupted
    try:
        with uninterrupted():
            copy_permissions()
            _replace_all(staged, files)
    finally:
        if lock is not None:
            os.close(lock)


def _replace_all(staged: list[Path], files: list[Path]):
    undo: list[tuple[Path, Path]] = []
    aside = staged[0].with_name(_SET_ASIDE)

    def move(here: Path, there: Path):
        os.rename(here, there)
        undo.append((there, here))

    try:
        aside.mkdir()
        for i, file in enumerate(files):
            if file.is_file():
                move(file, aside / f"{i}.old")
        for new, file in reversed([*zip(staged, files)]):
            move(new, file)
    except BaseException as e:
        left = []
        for there, here in reversed(undo):
            try:
                os.rename(there, here)
            except OSError:
                left.append((there, here))
        if left:
            places = ", ".join(f"{here.name} is {there}" for there, here in left if there.parent == aside) or "no earlier files existed"
            raise ConvertError(
                f"cannot write {files[0]}: {getattr(e, 'strerror', None) or e}. The earlier files could not be put back either: {places}. "
                "Move them by hand"
            ) from e
        raise
    for there, _ in undo:
        if there.parent == aside:  # else `_holds_older` would keep the staging directory
            with contextlib.suppress(OSError):
                there.unlink()


@contextlib.contextmanager
def uninterrupted():
    """Hold back SIGINT, SIGTERM and SIGHUP until the end, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    try:
        with signals.handled(held.append):
            yield
    finally:
        for number in held[:1]:
            signal.raise_signal(number)
