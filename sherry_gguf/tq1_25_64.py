"""TQ1_25_64 blocks: 64 weights of a 3:4 sparse ternary row in 12 bytes (docs/format.md).

They are for rows that are not a multiple of 128, and for models trained in groups of 64. A block is 8 bytes of 4-bit slots, 2 bytes of
signs and an fp16 scale, in TQ1_25's order. A TQ1_25 block is two of these with one scale.
"""

from .blocks import BlockType

TYPE = BlockType("TQ1_25_64", type_id=126, file_type=126, size=64, weights=(64,), nibbles=(2, 2, 4))
