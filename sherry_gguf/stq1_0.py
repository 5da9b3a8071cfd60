"""STQ1_0 blocks: 256 weights of a 3:4 sparse ternary row in 42 bytes, as Tencent's released Sherry models have them.

A block is 32 bytes of 4-bit slots, 8 bytes of signs and an fp16 scale (ggml-org/llama.cpp pull request 22836). Group g
(0..63) is in chunk g // 16 of 64 weights, at place g % 16, and holds the weights chunk * 64 + place + 16 * lane; its slot is
nibble g, low ones first, its sign bit g. The patterns are those of TQ1_25.
"""

from __future__ import annotations

from .blocks import BlockType

OLD_TYPE_ID = 42  # of the first files; upstream has given it to Q2_0 since

TYPE = BlockType("STQ1_0", type_id=43, file_type=43, size=256, weights=(4, 16), nibbles=(64,))
