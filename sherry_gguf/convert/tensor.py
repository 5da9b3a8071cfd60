"""A tensor of the GGUF that is to be written."""

import dataclasses
import math
from typing import Any

import numpy as np

from .. import gguf_type
from ..blocks import BlockType
from ..errors import ConvertError


@dataclasses.dataclass
class Tensor:
    """What a tensor will be stored as and, once it is encoded, how well that holds the checkpoint's values."""

    name: str
    source: str  # the checkpoint's tensor that upstream was last given for it, or ""
    shape: tuple[int, ...]  # NumPy's order
    type: Any  # gguf.GGMLQuantizationType
    nbytes: int
    data: Any  # lazy, not rounded yet unless raw
    raw: bool = False  # bytes or integers that upstream made: copied
    why: str = ""  # why it is not TQ1_25
    noted: bool = False  # whether a note says why
    group: int = 0  # ternary: weights that share a scale; a row's length if more than a row do
    blocks: int = 0
    exact: int = 0  # blocks
    vanished: int = 0  # blocks that are all zero and were not
    # float64 (4,): error², weight², value², weight · value
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4))
    dense: bool = False  # it has rows that are ternary, but not 3:4 sparse
    in_64: bool = True  # groups of 64 would hold every value
    misfit: bool = False  # only the length of its rows keeps it from being ternary
    changed: str = ""  # how upstream changed the checkpoint's values; "" if it only moved them
    sha256: bytes = b""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def kind(self) -> BlockType | None:
        """The block type of a ternary tensor."""
        return gguf_type.TYPES.get(self.type.name)

    @property
    def is_exact(self) -> bool:
        """Whether every stored value is the checkpoint's."""
        return self.exact == self.blocks and not self.changed

    @property
    def needs_64(self) -> bool:
        """Whether --group-size 64 would store every value of the checkpoint, which its own group does not."""
        return self.in_64 and not self.is_exact and not self.changed and not self.why.startswith("as asked")

    @property
    def relative_error(self) -> float:
        error, weight = self.sums[:2]
        return math.sqrt(error / weight) if weight else 0.0

    @property
    def cosine(self) -> float:
        _, weight, value, both = self.sums
        return both / math.sqrt(weight) / math.sqrt(value) if weight and value else float(weight == value)

    def add(self, blocks: int, exact: int, vanished: int, sums: np.ndarray | float, dense: bool = False, in_64: bool = True):
        """Count the blocks of more rows; `encode.compare` returns the other arguments."""
        self.dense, self.in_64 = self.dense or dense, self.in_64 and in_64
        self.blocks, self.exact, self.vanished = self.blocks + blocks, self.exact + exact, self.vanished + vanished
        self.sums = self.sums + sums

    def bad_row(self, row: int, cause: str) -> ConvertError:
        """The error for a row that cannot be stored."""
        place = f"{self.name} ({self.source or 'made by llama.cpp'}), row {row}"
        return ConvertError(f"{place}: {cause}. The checkpoint is damaged or its training diverged")


def first_bad(x: np.ndarray) -> int | None:
    """The first row of (rows, n) with a NaN or an infinity, or None."""
    finite = np.isfinite(x).all(axis=-1)
    return None if finite.all() else int(np.argmin(finite))
