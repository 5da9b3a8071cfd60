"""Proves that llama.cpp's conversion classes only move the checkpoint's values.

Upstream's classes may permute, split, stack, transpose and rename tensors. Some also change values: BitNet's class quantizes its weights
again, norms get + 1, RWKV's output matrices are divided. So each tensor of the file is compared, as a multiset of values, with the
checkpoint's tensors that it was made from. These are read with the safetensors library, not through upstream's classes.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .rows import as_floats
from .upstream import evaluate

_CHUNK = 1 << 22  # values handled at a time
_DESCRIBED = 1 << 20  # values to look at when a change is described


class Tally:
    """A multiset of finite floats: float64 values in ascending order, and int64 counts. Both zeros are the same value."""

    def __init__(self, values: np.ndarray | None = None, counts: np.ndarray | None = None):
        self.values = np.empty(0) if values is None else values
        self.counts = np.empty(0, np.int64) if counts is None else counts

    @classmethod
    def of(cls, chunks: Iterable[np.ndarray]) -> Tally:
        """Count the values of float32 or float64 arrays of any shape."""
        parts = [_count(part) for x in chunks for part in np.array_split(x.reshape(-1), -(-x.size // _CHUNK) or 1)]
        return cls.merged(cls(*part) for part in parts)

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Tally:
        """The sum of multisets."""
        tallies = list(tallies)
        if len(tallies) == 1:
            return tallies[0]
        values = np.concatenate([t.values for t in tallies] or [np.empty(0)])
        counts = np.concatenate([t.counts for t in tallies] or [np.empty(0, np.int64)])
        values, place = np.unique(values, return_inverse=True)
        total = np.zeros(len(values), np.int64)
        np.add.at(total, place, counts)
        return cls(values, total)

    @property
    def size(self) -> int:
        return int(self.counts.sum())

    def lacks(self, other: Tally) -> bool:
        """Whether the other has a value that is missing here, or has it more often."""
        place = np.searchsorted(self.values, other.values)
        if (place == len(self.values)).any() or (self.values[place] != other.values).any():
            return True
        return bool((self.counts[place] < other.counts).any())


def _count(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x + x.dtype.type(0)  # -0 becomes 0
    if x.dtype == np.float32:
        # Most checkpoints hold 16-bit values: these are counted without sorting.
        bits = x.view(np.uint32)
        if not (bits & 0xFFFF).any():
            counts = np.bincount(bits >> 16, minlength=1 << 16)
            found = np.flatnonzero(counts)
            return _sorted((found.astype(np.uint32) << 16).view(np.float32), counts[found])
        with np.errstate(over="ignore", invalid="ignore"):  # NaN is reported elsewhere
            half = x.astype(np.float16)
        if np.array_equal(half, x):
            counts = np.bincount(half.view(np.uint16), minlength=1 << 16)
            found = np.flatnonzero(counts)
            return _sorted(found.astype(np.uint16).view(np.float16), counts[found])
    x.sort()
    first = np.flatnonzero(np.concatenate(([True], x[1:] != x[:-1])))
    return x[first].astype(np.float64), np.diff(first, append=x.size)


def _sorted(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values)
    return values[order].astype(np.float64), counts[order]


def fingerprint(chunks: Iterable[np.ndarray]) -> tuple[int, int]:
    """The number of values in float32 or float64 arrays, and the sum of their hashes modulo 2^64, which is the same in any order."""
    count = total = 0
    for x in chunks:
        x = x.reshape(-1)
        for start in range(0, x.size, _HASHED):
            part = x[start : start + _HASHED].astype(np.float64)
            part += 0.0  # -0 becomes 0
            h = part.view(np.uint64)
            for multiplier, shift in _MIXING:
                h ^= h >> shift
                h *= multiplier
            h ^= h >> np.uint64(32)
            count, total = count + h.size, total + int(h.sum())
    return count, total % (1 << 64)


_HASHED = 1 << 16  # values hashed at a time, in the cache
# the finalizer of SplitMix64 (Steele, Lea, Flood 2014)
_MIXING = ((np.uint64(0xBF58476D1CE4E5B9), np.uint64(30)), (np.uint64(0x94D049BB133111EB), np.uint64(27)))


class Checkpoint:
    """A checkpoint's tensors, by upstream's names, and their values.

    model: a `Recorder` after `prepare_tensors`, in which upstream replaces quantized tensors with ones that dequantize them. The values
    of these, `model.decoded`, count as the checkpoint's.
    """

    def __init__(self, model):
        self._tensors = model.model_tensors
        self._decoded = model.decoded
        self._given = model.given

        def of_all(measure: Callable[[Iterable[np.ndarray]], Any]) -> Callable[..., Any]:
            # keeps the last one: the parts of a split tensor follow one another
            return functools.lru_cache(1)(lambda *sources: measure(x for source in sources for x in self.values(source)))

        self._contents = functools.lru_cache(64)(_contents)
        self._fingerprint, self._tally = of_all(fingerprint), of_all(Tally.of)

    @functools.cached_property
    def _names(self) -> dict[Any, str]:
        """Place in a file to the name of the tensor that is stored there or decoded from there."""
        return {leaf: name for name, make in self._tensors.items() for leaf in _leaves(make())}

    def sources(self, name: str, tensor) -> list[str]:
        """The checkpoint's tensors from which upstream computes a lazy tensor; `name`: its name in the file."""
        known = [self._names[leaf] for leaf in _leaves(tensor) if leaf in self._names]
        # Values that upstream has already computed do not know where they came from.
        known = known or [source for source in self._given.get(name, ()) if source in self._tensors]
        return list(dict.fromkeys(known))

    def values(self, name: str) -> Iterator[np.ndarray]:
        """A tensor's values in order, in chunks: float64 if it is float64, else float32."""
        tensor = self._tensors[name]()
        place: tuple = next(_leaves(tensor), ())
        if name not in self._decoded and len(place) == 2:
            file, offset = place
            yield from _read(file, self._contents(file)[offset])
        else:  # decoded, or from a PyTorch file
            yield as_floats(evaluate(tensor)).reshape(-1)

    def change(self, sources: list[str], chunks: Callable[[], Iterable[np.ndarray]]) -> str:
        """How a tensor of the file differs from its `sources`, in words; "" if their values only moved.

        chunks: returns its values in order, float32 or float64. `fingerprint` compares all values; if a tensor has only a part of the
        sources' values, or some of them twice, they are counted one by one.
        """
        if not sources:
            return "made by llama.cpp"
        if self._fingerprint(*sources) == fingerprint(chunks()):
            return ""
        here = Tally.of(chunks())
        there = self._tally(*sources)
        if not there.lacks(here):
            return ""
        whole = len(sources) == 1 and here.size == there.size
        return (whole and _described(next(iter(chunks())), next(self.values(sources[0])))) or "values changed by llama.cpp"


def _leaves(tensor) -> Iterator[Any]:
    """Where a lazy tensor's data comes from: (file, offset), or (address, shape, strides) of tensors that PyTorch loaded."""
    import gguf
    import torch
    from gguf.utility import LocalTensor

    seen, waiting = set(), [tensor]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, LocalTensor):
            yield item.data_range.filename, item.data_range.offset
        elif isinstance(item, gguf.LazyBase):
            waiting += item._args if item._func is not None else [item._data]
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, torch.Tensor) and item.device.type != "meta":
            yield item.data_ptr(), tuple(item.shape), item.stride()  # tensors of a file may share storage


def _contents(file: Path) -> dict[int, str]:
    """Offset in a safetensors file to the name of the non-empty tensor there."""
    with open(file, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        head = json.loads(f.read(length))
    head.pop("__metadata__", None)
    return {8 + length + t["data_offsets"][0]: name for name, t in head.items() if math.prod(t["shape"])}


def _read(file: Path, name: str) -> Iterator[np.ndarray]:
    import safetensors

    with safetensors.safe_open(file, "pt") as f:
        part = f.get_slice(name)
        if not (shape := part.get_shape()):
            yield as_floats(part[...]).reshape(-1)
            return
        step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            yield as_floats(part[start : start + step]).reshape(-1)


def _described(x: np.ndarray, source: np.ndarray) -> str:
    """How values, in the same order, were changed, or "" if that is not simple."""
    n = min(x.size, source.size, _DESCRIBED)
    x, source = (np.asarray(a.reshape(-1)[:n], np.float64) for a in (x, source))
    if np.array_equal(x, source):  # the change is further on
        return ""
    if np.allclose(x, source + (c := float(np.median(x - source))), rtol=1e-5, atol=1e-7):
        return f"each value {'plus' if c > 0 else 'minus'} {abs(c):.6g}"
    if (known := source != 0).any() and np.allclose(x, source * (c := float(np.median(x[known] / source[known]))), rtol=1e-5):
        return f"each value times {c:.6g}"
    with np.errstate(over="ignore"):
        return "minus the exponential of each value" * np.allclose(x, -np.exp(source), rtol=1e-5)
