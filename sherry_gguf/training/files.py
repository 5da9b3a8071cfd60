"""A run's files: directories that appear whole or not at all, a lock, and the settings of an earlier run."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sherry_gguf.errors import Stop

LOCK = "lock"  # file in a run's directory, locked while a process trains there


def locked(directory: Path, flag: str) -> contextlib.AbstractContextManager:
    """Lock a directory until the end of the `with` block. Raises Stop, which names the directory's flag, if another process has it."""
    try:
        return FileLock(directory / LOCK).acquire(blocking=False)
    except Timeout:
        raise Stop(f"another run is using {directory}: wait for it, or choose another {flag}") from None


@contextlib.contextmanager
def undamaged(path: Path, remedy: str) -> Iterator[None]:
    """Raise any error that a file of an earlier run causes as Stop, with the `remedy`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:
        if "allocate memory" in str(e):  # PyTorch's allocator
            raise MemoryError(str(e)) from e
        raise Stop(f"{path} is damaged ({type(e).__name__}: {e}): {remedy}") from e


def differences(then: dict, now: dict) -> str:
    """The settings that differ from those of an earlier run, such as "steps: 6 then, 7 now", or ""."""
    return ", ".join(f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which replaces `path` at the end. After an error or a crash `path` holds what it held before."""
    part = path.with_name(path.name + ".part")
    yield part
    sync(part)
    os.replace(part, path)


def write(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8. After an error or a crash it holds what it held before."""
    with replacing(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def whole_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty directory to fill. At the end its files are in `directory` and on the disk; after an error, none are.

    A new directory appears at once. An existing one stays, as it may be a mount point or the target of a link: the files are renamed
    into it one by one, config.json last.

    Raises:
        FileExistsError: the directory is not empty.
        OSError: nothing can be written there.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already has something in it: remove it, or choose another directory")
    there = directory.is_dir()
    place = directory if there else directory.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place)) from None
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".part", dir=place))
    moved: list[Path] = []
    try:
        yield part
        for path in *part.iterdir(), part:
            sync(path)
            # mkdtemp and safetensors make them private
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
        if not there:
            os.rename(part, directory)  # fails if something but an empty directory appeared there meanwhile
        else:
            for path in sorted(part.iterdir(), key=lambda p: p.name == "config.json"):
                os.rename(path, directory / path.name)
                moved.append(directory / path.name)
            part.rmdir()
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flush a file or directory to the disk, which a rename may otherwise reach before the data."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
