"""Hidden states of all sequences before each layer, in files: the full-precision model's and the quantized model's.

bfloat16, since the residual stream of some models does not fit float16. A layer's outputs go into new files, which get their names
when they are complete, so that a run that was cut off finds the last layer's.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from sherry_gguf.errors import Stop
from sherry_gguf.training.files import replacing

DTYPE = torch.bfloat16
FULL, QUANTIZED = KINDS = ("full", "quantized")


class Streams:
    """The files in `directory` of each of `kinds`, for `sequences` of `context` tokens with `hidden` numbers each."""

    def __init__(self, directory: Path, kinds: tuple[str, ...], sequences: int, context: int, hidden: int):
        self.directory, self.kinds, self.shape = directory, kinds, (sequences, context, hidden)

    def path(self, kind: str, layer: int) -> Path:
        """What the layer of this number gets; the last layer's outputs have the number after it."""
        return self.directory / f"{kind}-{layer:03}.states"

    def exist(self, layer: int) -> bool:
        return all(self.path(kind, layer).exists() for kind in self.kinds)

    def read(self, kind: str, layer: int) -> torch.Tensor:
        """bfloat16 (sequences, context, hidden), mapped from the file."""
        return read(self.path(kind, layer), self.shape)

    def write(self, kind: str, layer: int, batch: int, compute: Callable[[int, int], torch.Tensor], advance: Callable[[], object]) -> None:
        """Fill a file with `compute(begin, end)`, hidden states of these sequences."""
        write(self.path(kind, layer), self.shape, batch, compute, advance)

    def drop(self, layer: int) -> None:
        """Remove a layer's inputs."""
        for kind in self.kinds:
            with contextlib.suppress(FileNotFoundError):
                self.path(kind, layer).unlink()


def write(path: Path, shape: tuple[int, int, int], batch: int, compute: Callable[[int, int], torch.Tensor],
          advance: Callable[[], object]) -> None:  # fmt: skip
    """Write `compute(begin, end)`, hidden states of these of the sequences, to a file that appears when it is complete and on the disk.

    Raises OSError, also if the disk is too full.
    """
    size = torch.Size(shape).numel() * DTYPE.itemsize
    with replacing(path) as partial:
        with open(partial, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process when the states are mapped
            except OSError as e:
                raise OSError(e.errno, f"{e.strerror}, {size >> 20} MiB are needed", str(path)) from None
        states = read(partial, shape)
        for begin in range(0, shape[0], batch):
            end = min(begin + batch, shape[0])
            states[begin:end] = compute(begin, end).to(DTYPE)
            advance()


def read(path: Path, shape: tuple[int, int, int]) -> torch.Tensor:
    """bfloat16 (sequences, context, hidden), mapped from a file. Raises Stop if it has another size."""
    n = torch.Size(shape).numel()
    if (size := path.stat().st_size) != n * DTYPE.itemsize:  # mapping it would append zeros
        raise Stop(f"{path} is damaged: it has {size} bytes, not {n * DTYPE.itemsize}. Remove {path.parent} to start over")
    return torch.from_file(str(path), shared=True, size=n, dtype=DTYPE).view(shape)
