"""STQ1_0 blocks: 256 weights of a 3:4 sparse ternary row in 42 bytes, as in Tencent's released Sherry models (docs/format.md).

A block is 32 bytes of 4-bit slots, 8 bytes of signs and an fp16 scale (ggml-org/llama.cpp pull request 22836). Group g
(0..63) holds the weights 64 * (g // 16) + g % 16 + 16 * lane. Its slot is nibble g, low nibbles first; its sign is bit g. The
patterns are those of TQ1_25.
"""

from .blocks import BlockType

OLD_TYPE_ID = 42  # in the first files; now upstream's number of Q2_0

TYPE = BlockType("STQ1_0", type_id=43, file_type=43, size=256, weights=(4, 16), nibbles=(64,))
