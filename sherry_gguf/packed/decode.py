"""Repacked weights and Q8_0's rounding in plain PyTorch, for devices that the C kernels do not run on. The same values as theirs."""

import numpy as np
import torch

from sherry_gguf import ternary
from sherry_gguf.blocks import Q8_0, BlockType
from sherry_gguf.repacked import PLACES, TILE


def _swapped(x: torch.Tensor, shape: tuple[int, ...], back: bool = False) -> torch.Tensor:
    """x (..., n) with each piece of n viewed in `shape` and its last two axes swapped (blocks.py); back: the inverse."""
    if len(shape) == 1:
        return x
    if back:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return x.unflatten(-1, (-1, *shape)).swapaxes(-1, -2).reshape(x.shape)


def _weights(slots: torch.Tensor, signs: torch.Tensor, d: torch.Tensor, nibbles: tuple[int, ...], kind: BlockType) -> torch.Tensor:
    """Blocks to float32 (rows, blocks, size).

    slots: uint8 (rows, blocks, groups / 2), two in a byte, in the order `nibbles`. signs: uint8 (rows, blocks, groups / 8).
    d: float16 (rows, blocks).
    """
    bits = signs[..., None] >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    codes = _swapped(torch.stack([slots & 15, slots >> 4], -1).flatten(-2), nibbles, back=True) | bits.flatten(-2) << 4
    patterns = torch.from_numpy(ternary.PATTERNS.astype(np.float32)).to(codes.device)
    lanes = _swapped(patterns[codes.int()].flatten(-2), kind.weights, back=True)
    return lanes * d[..., None].float()


def decode(weight: torch.Tensor, kind: BlockType, rows: int, columns: int, blocks: torch.Tensor | None = None) -> torch.Tensor:
    """A repacked matrix, uint8 (bytes,) (kernels.repack, tile.h), as float32 (rows, columns), on its device.

    blocks: int64 (k,), decode only these blocks of each row: float32 (rows, k * kind.size).
    """
    width, whole = columns // kind.size, rows // TILE * TILE
    tiles, rest = weight[: whole * width * kind.bytes], weight[whole * width * kind.bytes :]
    tiles, rest = tiles.view(-1, width, TILE * kind.bytes), rest.view(-1, width, kind.bytes)
    if blocks is not None:
        tiles, rest = tiles[:, blocks], rest[:, blocks]
    signs, parts = kind.groups // 2, kind.groups // 8  # bytes
    # a tile has parts of four bytes of slots and one of signs, each byte in 64 rows; then the scales
    part = tiles[..., : parts * 5 * TILE].unflatten(-1, (parts, 5, TILE)).permute(0, 4, 1, 2, 3)  # (tile, row, block, part, byte)
    d = tiles[..., parts * 5 * TILE :].contiguous().view(torch.float16)[..., PLACES].transpose(1, 2)
    of_tiles = _weights(part[..., :4].flatten(-2).flatten(0, 1), part[..., 4].flatten(0, 1), d.flatten(0, 1), (parts, 2, 4), kind)
    d = rest[..., signs + parts :].contiguous().view(torch.float16)[..., 0]
    of_rest = _weights(rest[..., :signs], rest[..., signs : signs + parts], d, kind.nibbles, kind)
    return torch.cat([of_tiles, of_rest]).flatten(1)


def round_to_q8_0(x: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """x (..., n) as the products with `kind` see it: rounded to Q8_0 as ggml does, float32 (..., n). NaN where not finite."""
    blocks = _swapped(x.float(), kind.weights).unflatten(-1, (-1, Q8_0))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * torch.where(d == 0, 0, 1 / d)
    q = scaled.trunc()
    q += scaled.sign() * ((scaled - q).abs() >= 0.5)  # halves away from zero
    return _swapped((q * d.half().float()).flatten(-2), kind.weights, back=True)
