"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8. After an error or a crash it holds what it held before."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    _sync(part)
    os.replace(part, path)


@contextlib.contextmanager
def appearing(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty directory to fill. At the end its files are in `directory` and on the disk; after an error, nothing is.

    A directory that exists already stays, as it may be a mount point or the target of a link: the files are renamed into it one by
    one, config.json last. A new one appears at once.

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
            _sync(path)
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


def _sync(path: Path) -> None:
    """Otherwise a rename may reach the disk before the data."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
