"""TQ1_25 blocks: 128 weights of a 3:4 sparse ternary row in 22 bytes (docs/format.md).

A block is 16 bytes of 4-bit slots, 4 bytes of signs and an fp16 scale. Group g (0..31) holds weights 4g..4g+3. Its
slot is in byte 4 * (g // 8) + g % 4: in the low nibble if g % 8 < 4, else in the high one. Its sign is bit g of the
sign word.
"""

from .blocks import NOT_FINITE, OVERFLOW, BlockType, dot_q8_0

TYPE = BlockType("TQ1_25", type_id=125, file_type=125, size=128, weights=(128,), nibbles=(4, 2, 4))

NAME, TYPE_ID, FILE_TYPE = TYPE.name, TYPE.type_id, TYPE.file_type
BLOCK, BLOCK_BYTES = TYPE.size, TYPE.bytes

pack, unpack = TYPE.pack, TYPE.unpack
quantize, dequantize, is_exact, vec_dot = TYPE.quantize, TYPE.dequantize, TYPE.is_exact, TYPE.vec_dot

__all__ = [
    "BLOCK", "BLOCK_BYTES", "FILE_TYPE", "NAME", "NOT_FINITE", "OVERFLOW", "TYPE", "TYPE_ID",
    "dequantize", "dot_q8_0", "is_exact", "pack", "quantize", "unpack", "vec_dot",
]  # fmt: skip
