"""3:4 sparse ternary arrays: of each four consecutive weights, one is 0 and three are +d or -d.

Sparse-AbsMean (Sherry, arXiv 2601.07892, Eq. 4 and 5) and the 32 patterns of a group; `blocks` packs them.
"""

import numpy as np

GROUP = 4  # weights per group
KEPT = 3  # nonzero weights per group
CODES = 32  # patterns of a group: 4 positions of the zero times 2**3 signs


def _patterns() -> np.ndarray:
    """int8 (32, 4): the lanes of each code, `sign << 4 | zero lane << 2 | third differs << 1 | second differs`."""
    table = np.zeros((CODES, GROUP), np.int8)
    for code in range(CODES):
        first = -1 if code >> 4 else 1
        signs = first, -first if code & 1 else first, -first if code & 2 else first
        table[code, [lane for lane in range(GROUP) if lane != code >> 2 & 3]] = signs
    return table


PATTERNS = _patterns()
PATTERNS.flags.writeable = False


def codes_to_lanes(codes: np.ndarray) -> np.ndarray:
    """Codes, uint8 (...) of 0..31, to their lanes, int8 (..., 4) of -1, 0, +1 (docs/format.md)."""
    return PATTERNS[codes]


def lanes_to_codes(lanes: np.ndarray) -> np.ndarray:
    """Lanes, int8 (..., 4), to their codes, uint8 (...); the inverse of `codes_to_lanes`.

    Raises ValueError unless every group has one 0 and three of -1 or +1, and for another dtype or shape.
    """
    lanes = np.asarray(lanes)
    if lanes.dtype != np.int8:
        raise ValueError(f"lanes are {lanes.dtype}, not int8")
    if lanes.shape[-1:] != (GROUP,):
        raise ValueError(f"lanes have shape {lanes.shape}, the last axis must be {GROUP}")
    # A group's lanes are the base-3 digits of a table index: one gather instead of a search for the zero.
    index = (lanes.astype(np.int16) + 1) @ np.array([27, 9, 3, 1], np.int16)
    outside = ((lanes < -1) | (lanes > 1)).any(axis=-1)
    codes = np.where(outside, 255, _CODE_OF_DIGITS[np.where(outside, 0, index)])
    if (codes == 255).any():
        where = tuple(int(i) for i in np.argwhere(codes == 255)[0])
        raise ValueError(f"group {where} is {lanes[where].tolist()}: not one zero and three of -1 or +1")
    return codes.astype(np.uint8)


_CODE_OF_DIGITS = np.full(3**GROUP, 255, np.uint8)
_CODE_OF_DIGITS[(PATTERNS.astype(np.int16) + 1) @ np.array([27, 9, 3, 1])] = np.arange(CODES)


def sparse_absmean(x: np.ndarray, group_size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Sparse-AbsMean of each `group_size` consecutive weights of a row (paper Eq. 4 and 5).

    x: float (..., n), finite, n a multiple of `group_size`, itself a multiple of 4.
    Returns lanes int8 (..., n) of -1, 0, +1 and scale float64 (..., n / group_size), so that `lanes * scale` is
    nearest to x for these zeros. The zero is the weight of smallest magnitude of each four, the first among equals. A kept
    lane is negative if x < 0. The scale is the mean magnitude of the kept weights, summed in float64 in order, and not
    rounded: that is up to the storage.
    Raises ValueError for a size that does not fit.
    """
    x = np.asarray(x)
    if group_size <= 0 or group_size % GROUP:
        raise ValueError(f"group_size is {group_size}, not a positive multiple of {GROUP}")
    if x.ndim == 0 or x.shape[-1] % group_size:
        raise ValueError(f"rows of x, shape {x.shape}, are not a multiple of the group size, {group_size}")
    magnitude = np.abs(x).reshape(-1, group_size // GROUP, GROUP)
    smallest = magnitude[..., 0].copy()
    zero = np.zeros(smallest.shape, np.int8)
    for lane in range(1, GROUP):  # four strided passes: argmin over an axis of four is ten times slower
        less = magnitude[..., lane] < smallest
        zero[less] = lane
        np.minimum(smallest, magnitude[..., lane], out=smallest)
    kept = zero[..., None] != np.arange(GROUP, dtype=np.int8)

    total = np.zeros(len(magnitude), np.float64)
    addends = (magnitude * kept).reshape(-1, group_size).T  # adding the zero lane's 0 changes no sum
    with np.errstate(over="ignore"):
        for addend in addends:
            total += addend
    scale = total / (group_size // GROUP * KEPT)

    lanes = np.where(x.reshape(magnitude.shape) < 0, np.int8(-1), np.int8(1)) * kept
    return lanes.reshape(x.shape), scale.reshape(*x.shape[:-1], x.shape[-1] // group_size)
