"""Products of repacked rows with every instruction set, their operands, and what they must give."""

import platform

import numpy as np
import pytest

from sherry_gguf import kernels, tq1_25, tq1_25_64

ffi, lib = kernels.ffi, kernels.lib
KINDS = [tq1_25.TYPE, tq1_25_64.TYPE]  # tests/format has STQ1_0's tests
ISAS = kernels.available_repacked()
PRODUCTS = {"tables": kernels.mul_tables, "codes": kernels.mul_codes, "wide": kernels.mul_wide, "panels": kernels.mul_panels}
HAS = {"tables": ISAS, "codes": ISAS, "wide": kernels.available_wide(), "panels": kernels.available_panels()}
TILE, COLUMNS, DEPTH = 64, 6, 64  # of tile.h and repack.h
IN_PAIRS = platform.machine() == "aarch64"  # panels: five columns cost what six do there
CODE_COLUMNS, CODE_TABLES = 16, 512
WIDE_COLUMNS, WIDE_TILES = 32, 32

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_product = pytest.mark.parametrize(
    "isa, product, kind",
    [pytest.param(isa, p, kind, id=f"{isa}-{p}-{kind.name}") for kind in KINDS for p in PRODUCTS for isa in HAS[p]],
)


def deep(kind):
    """Weights in a row of a block more than is decoded at a time: 17 blocks of TQ1_25, 33 of TQ1_25_64."""
    return 32 * DEPTH + kind.size


def halves(values):
    """fp16 little-endian, two bytes a value."""
    return np.ascontiguousarray(np.asarray(values, "<f2"))[..., None].view(np.uint8)


def random_rows(rng, rows, n, kind, d=None):
    """Random codes; scales are powers of two and some are 0, so that sums of a few thousand blocks are exact in float32."""
    b = rng.integers(0, 256, (rows, n // kind.size, kind.bytes), dtype=np.uint8)
    b[..., -2:] = halves(rng.choice([0, 0.5, 1, 2], b.shape[:2], p=[0.1, 0.3, 0.3, 0.3]) if d is None else d)
    return b.reshape(rows, b.shape[1] * kind.bytes)


def random_q8_0(rng, columns, n, d=None):
    """Any int8, scales likewise."""
    q = rng.integers(0, 256, (columns, n // 32, 34), dtype=np.uint8)
    q[..., :2] = halves(rng.choice([0.5, 1, 2], q.shape[:2]) if d is None else d)
    return q.reshape(columns, n // 32 * 34)


def floats(b, q8_0, kind):
    """Weights (rows, n) and activations (columns, n), float64."""
    lanes, d = kind.unpack(b)
    q = q8_0.reshape(len(q8_0), q8_0.shape[1] // 34, 34)
    dy = np.ascontiguousarray(q[..., :2]).view("<f2").astype(np.float64)
    with np.errstate(invalid="ignore"):
        y = (q[..., 2:].view(np.int8) * dy).reshape(len(q), 32 * q.shape[1])
        return lanes * np.repeat(d.astype(np.float64), kind.size, axis=-1), y


def multiply(product, isa, b, n, q8_0, kind, **kwargs):
    return PRODUCTS[product](kernels.repack(b, kind), len(b), n, q8_0, isa, kind=kind, **kwargs)


def check_exact(product, isa, b, q8_0, kind):
    w, y = floats(b, q8_0, kind)
    found = multiply(product, isa, b, w.shape[1], q8_0, kind)
    assert found.shape == (len(y), len(w)) and (found == y @ w.T).all()


class Guarded:
    """Bytes from a multiple of 64 with canaries to either side."""

    def __init__(self, size):
        self.all = kernels.aligned(size + 512)
        self.all[:] = 0xA5
        self.bytes = self.all[256:-256]
        self.pointer = ffi.from_buffer("uint8_t[]", self.all) + 256

    def intact(self):
        return (self.all[:256] == 0xA5).all() and (self.all[-256:] == 0xA5).all()
