"""docs/format.md is enough: a codec made from its tables and formulas alone agrees with its example, the package and the golden vectors."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from vectors import ALL_BLOCKS, ALL_DOTS, VECTORS

from sherry_gguf import blocks, gguf_type, kernels, ternary, tq1_25

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
EXAMPLE = TEXT[TEXT.index("## A worked example") : TEXT.index("## Test vectors")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def formula(text: str):
    """A function of g and k (and i) from the page's notation."""
    code = compile(text.replace("·", "*").replace(" / ", " // "), "format.md", "eval")
    return lambda **names: eval(code, {}, names)


def found(pattern: str, text: str = TEXT) -> list[str]:
    match = re.search(pattern.replace(" ", r"\s+"), text, re.DOTALL)  # lines may break anywhere
    assert match, f"docs/format.md no longer says {pattern}"
    return list(match.groups())


def fenced(name: str) -> str:
    return found(rf"```{name}\n(.*?)```", EXAMPLE)[0]


def slot_patterns() -> dict[int, tuple[int, ...]]:
    """Slot -> lanes, from the table of the 32 codes."""
    rows = re.findall(r"(\d+) \| ([-+0] [-+0] [-+0] [-+0])(?= \||$)", found("### The 32 codes(.*)## Dequantizing")[0], re.MULTILINE)
    return {int(slot): tuple({"0": 0, "+": 1, "-": -1}[c] for c in lanes.split()) for slot, lanes in rows}


PATTERNS = slot_patterns()


class Codec:
    """What the page says of one type; `name` picks the column of the first table."""

    def __init__(self, name: str):
        rows = [cells(line) for line in TEXT[: TEXT.index("## The block")].splitlines() if line.startswith("|")]
        assert name in rows[0], f"the first table of docs/format.md has no column {name}"
        table = {row[0]: row[rows[0].index(name)] for row in rows}
        self.name, self.ggml_name = (table[f"name in {where}"].strip("`") for where in ("GGUF tools", "ggml"))
        self.type_id, self.file_type = (
            int(table["GGUF tensor type, `ggml_type`"]),
            int(table["`general.file_type`, `llama_ftype`, `ggml_ftype`"]),
        )
        self.weights, self.bytes, self.bits = int(table["weights a block"]), int(table["bytes a block"]), float(table["bits a weight"])
        section = found(rf"An? {name} block has {self.weights // 4} groups(.*?)\n\n[AD]")[0]
        self.fields = {r[2].strip("`"): (int(r[0]), int(r[1]), r[3]) for r in map(cells, section.splitlines()) if r[0].isdigit()}
        byte, low = found(r"in byte ([^,]*), the low nibble if (.*?), else", self.fields["qs"][2])
        self.byte, self.low = formula(byte), formula(low.replace("g is even", "g % 2 == 0"))
        bit, byte = found(r": bit ([^,]*?) of byte ([^,]*?)(?:,|$)", self.fields["sign"][2])
        self.sign_bit, self.sign_byte = formula(bit), formula(byte)
        self.place = formula(found(rf"\* ([^\n]*?) of an? {name} block")[0])
        self.groups = self.weights // 4
        self.kept = int(found(rf"Divide the sum by [^.]*?(\d+) in {name}\b")[0])
        self.q8_0 = int(found(rf"Q8_0 blocks per weight block \([^)]*?(\d+) in {name}\b")[0])

    def encode(self, x: np.ndarray) -> bytes:
        block, total = bytearray(self.bytes), 0.0
        for g in range(self.groups):
            w = [float(x[self.place(g=g, k=k)]) for k in range(4)]
            zero = min(range(4), key=lambda k: (abs(w[k]), k))
            total = sum((abs(w[k]) for k in range(4) if k != zero), total)
            lanes = tuple(0 if k == zero else -1 if w[k] < 0 else 1 for k in range(4))
            sign = lanes not in PATTERNS.values()
            slot = next(s for s, p in PATTERNS.items() if p == tuple(-v if sign else v for v in lanes))
            block[self.fields["qs"][0] + self.byte(g=g)] |= slot << (0 if self.low(g=g) else 4)
            block[self.fields["sign"][0] + self.sign_byte(g=g)] |= sign << self.sign_bit(g=g)
        block[self.fields["d"][0] :] = struct.pack("<e", total / self.kept)
        return bytes(block)

    def decode(self, block: bytes) -> tuple[list[int], float]:
        lanes = [0] * self.weights
        for g in range(self.groups):
            slot = block[self.fields["qs"][0] + self.byte(g=g)] >> (0 if self.low(g=g) else 4) & 15
            sign = block[self.fields["sign"][0] + self.sign_byte(g=g)] >> self.sign_bit(g=g) & 1
            for k in range(4):
                lanes[self.place(g=g, k=k)] = -PATTERNS[slot][k] if sign else PATTERNS[slot][k]
        return lanes, struct.unpack("<e", block[self.fields["d"][0] :])[0]


CODECS = {name: Codec(name) for name in gguf_type.TYPES}
X = np.array(fenced("x").split(), np.float32)


@pytest.mark.parametrize("name", CODECS)
def test_figures_are_the_packages(name):
    codec, kind = CODECS[name], gguf_type.TYPES[name]
    assert (codec.name, codec.ggml_name, codec.type_id, codec.file_type) == (kind.name, kind.name.lower(), kind.type_id, kind.file_type)
    assert (codec.weights, codec.bytes, codec.bits) == (kind.size, kind.bytes, kind.bytes * 8 / kind.size)
    end = 0
    for offset, size, _ in codec.fields.values():
        assert offset == end
        end += size
    assert end == kind.bytes and list(codec.fields) == ["qs", "sign", "d"]


def test_codes_are_the_packages():
    assert sorted(PATTERNS) == list(range(16))
    assert [PATTERNS[slot] for slot in range(16)] == [tuple(lanes) for lanes in ternary.PATTERNS[:16].tolist()]
    assert (ternary.PATTERNS[16:] == -ternary.PATTERNS[:16]).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("seed", range(5))
def test_the_pages_codec_gives_the_packages_bytes(name, seed):
    codec, kind = CODECS[name], gguf_type.TYPES[name]
    x = np.random.default_rng(seed).standard_normal(kind.size).astype(np.float32)
    x = np.round(x * 2) / 2 if seed % 2 else x  # ties and zeros
    block = codec.encode(x)
    assert block == kind.quantize(x).tobytes() == kernels.quantize(x, kind=kind).tobytes()
    for b in block, np.random.default_rng(seed).integers(0, 256, kind.bytes, np.uint8).tobytes():
        lanes, d = kind.unpack(np.frombuffer(b, np.uint8))
        found_lanes, found_d = codec.decode(b)
        assert found_lanes == lanes.tolist() and np.float16(found_d).tobytes() == d.tobytes()


@pytest.mark.parametrize("kind, name", ALL_BLOCKS)
def test_the_pages_codec_gives_the_golden_vectors(kind, name):
    x, block, lanes, d = VECTORS[kind].blocks[name]
    assert CODECS[kind].encode(x) == block.tobytes() and CODECS[kind].decode(block.tobytes()) == (lanes, d)


@pytest.mark.parametrize("kind, i", ALL_DOTS)
def test_the_pages_dot_product_gives_the_golden_vectors(kind, i):
    row, activations, q8_0, result = VECTORS[kind].dots[i]
    codec, total = CODECS[kind], 0.0
    for b in range(len(row) // codec.bytes):
        lanes, d_w = codec.decode(row[codec.bytes * b :][: codec.bytes].tobytes())
        of_block = 0.0
        for j in range(codec.q8_0):
            x = activations[codec.weights * b + 32 * j :][:32]  # float32, and so is what follows
            d = np.abs(x).max() / np.float32(127)
            products = x * (np.float32(1) / d if d else np.float32(0))
            q = [int(np.clip(np.copysign(np.floor(abs(p) + 0.5), p), -127, 127)) for p in products.astype(np.float64)]
            assert (float(np.float16(d)), q) == q8_0[codec.q8_0 * b + j]
            of_block += float(np.float16(d)) * sum(lane * v for lane, v in zip(lanes[32 * j :], q))
        total += d_w * of_block
    assert total == pytest.approx(result, rel=1e-12)


def test_a_block_is_two_blocks_of_64():
    text = r"the first has bytes 0 to (\d+) of its `qs` and bytes 0 and (\d+) of its `sign`, the second has the rest\."
    qs, sign = (int(n) + 1 for n in found(text))
    block = CODECS["TQ1_25"].encode(X)
    first, second = (
        CODECS["TQ1_25_64"].decode(b + block[20:]) for b in (block[:qs] + block[16 : 16 + sign], block[qs:16] + block[16 + sign : 20])
    )
    assert (first[0] + second[0], first[1]) == CODECS["TQ1_25"].decode(block)


def test_example_blocks():
    assert X.size == 128
    for name, x in ("TQ1_25", X), ("TQ1_25_64", X[:64]), ("STQ1_0", np.tile(X, 2)):
        block = bytes.fromhex(fenced(name.lower()))
        assert CODECS[name].encode(x) == block == gguf_type.TYPES[name].quantize(x).tobytes()
    lanes, d = CODECS["TQ1_25"].decode(bytes.fromhex(fenced("tq1_25")))
    assert lanes == ["-0+".index(c) - 1 for c in fenced("lanes").split()]
    total, mean, half, bits = found(r"sum to (\S+); the mean is (\S+), which fp16 rounds to (\S+), (0x\S+)\.", EXAMPLE)
    kept = np.sort(np.abs(X).reshape(-1, 4), axis=1)[:, 1:].astype(np.float64)
    assert kept.sum() == float(total) and kept.sum() / 96 == float(mean) and d == float(half)
    assert np.float16(mean).view(np.uint16) == int(bits, 16)
    assert f"times {half}:" in EXAMPLE and not tq1_25.is_exact(X).any()


def test_example_groups():
    codes = ternary.lanes_to_codes(tq1_25.unpack(tq1_25.quantize(X))[0].reshape(-1, 4))
    rows = [cells(line) for line in EXAMPLE.splitlines() if re.match(r"\| \d \| \S+ \S+ \S+ \S+ \|", line)]
    assert len(rows) == 8
    for g, (group, floats, zero, signs, slot, sign, where) in enumerate(rows):
        lanes = PATTERNS[int(slot)] if sign == "0" else tuple(-v for v in PATTERNS[int(slot)])
        assert int(group) == g and np.array_equal(np.array(floats.split(), np.float32), X[4 * g : 4 * g + 4])
        assert codes[g] == int(sign) << 4 | int(slot) and lanes.index(0) == int(zero.split()[0])
        assert ["-0+".index(c) - 1 for c in signs.split()] == [v for v in lanes if v]
        magnitudes = np.abs(X[4 * g : 4 * g + 4])
        assert ("tie" in zero) == ((magnitudes == magnitudes.min()).sum() > 1)
        codec = CODECS["TQ1_25"]
        assert where == f"byte {codec.byte(g=g)}, {'low' if codec.low(g=g) else 'high'} nibble"
    start, sign = found(r"begins with ([0-9a-f ]{11}), and the first byte of `sign` is [\d +]+ = (0x\S\S)", EXAMPLE)
    block = bytes.fromhex(fenced("tq1_25"))
    assert block.startswith(bytes.fromhex(start)) and block[16] == int(sign, 16)


def test_example_dot_product():
    y = formula(found(r"y\[i\] = (\S+ / \S+ - [\d.]+),", EXAMPLE)[0].replace(" / ", "/"))
    activations = np.array([y(i=i) for i in range(128)], np.float32)
    q8_0 = np.frombuffer(kernels.quantize_q8_0(activations).tobytes(), np.uint8).reshape(-1, 34)
    lanes = np.array(CODECS["TQ1_25"].decode(bytes.fromhex(fenced("tq1_25")))[0]).reshape(4, 32)
    rows = [cells(line) for line in EXAMPLE.splitlines() if re.match(r"\| \d \| 0\.\d+ \|", line)]
    assert len(rows) == 4
    for j, (block, scale, first, total) in enumerate(rows):
        q = q8_0[j, 2:].view(np.int8)
        assert int(block) == j and q8_0[j, :2].copy().view("<f2")[0] == float(scale)
        assert q[:4].tolist() == [int(v) for v in first.split()] and int(lanes[j] @ q.astype(int)) == int(total)
    result = float(found(r"\) = (-[\d.]+)\.\n", EXAMPLE)[0])
    assert result == tq1_25.vec_dot(tq1_25.quantize(X), activations)
    assert result == blocks.dot_q8_0(lanes.reshape(-1).astype(np.int8), np.array([1.1162109375], np.float16), q8_0)
