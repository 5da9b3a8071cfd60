"""Atheris target: any bytes as a GGUF file for the Python readers: inspect, retag and transcode.

Each ends, or refuses with a ConvertError that names the file, and leaves the file as it is and nothing half written; what transcode
writes can be read. scripts/fuzz.py runs it: `python tests/fuzz/fuzz_readers.py [libFuzzer's flags] CORPUS`.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gguf", "sherry_gguf"]):
    import gguf  # noqa: F401  which sherry_gguf imports late

    from sherry_gguf import inspect, retag, transcode
    from sherry_gguf.errors import ConvertError
    from sherry_gguf.reader import open_gguf

directory = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
source, target = directory / "x.gguf", directory / "y.gguf"


def attempt(function, *args) -> bool:
    try:
        function(*args)
        return True
    except ConvertError as e:
        assert str(source) in str(e) or "--to" in str(e), f"does not name the file: {e}"
        return False


def one(data: bytes) -> None:
    source.write_bytes(data)
    attempt(lambda: list(inspect.inspect(source, tensors=True)))
    for write, args in ((retag.retag, ()), *((transcode.transcode, (to,)) for to in transcode.TARGETS)):
        if attempt(write, source, target, *args):
            open_gguf(target)
            target.unlink()
        assert os.listdir(directory) == [source.name]
    assert source.read_bytes() == data


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
