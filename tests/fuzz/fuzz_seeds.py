"""Small GGUF files that the fuzzers start from: `python tests/fuzz/fuzz_seeds.py DIRECTORY` writes them."""

import struct
import sys
from pathlib import Path

import numpy as np

from sherry_gguf import gguf_type
from sherry_gguf.reader import open_gguf

gguf = gguf_type.register()
Q = gguf.GGMLQuantizationType
TOKENS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", *(f"<0x{b:02X}>" for b in range(3))]


def model(path: Path, qtype, width: int, old: bool = False) -> Path:
    """A Llama of one layer with the blocks' matrices of a type; `old`: with the numbers that STQ1_0 had once."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(width // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{qtype.name}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 6, 6, 6])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def plain(name, *shape):
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    def packed(name, rows):
        writer.add_tensor(name, gguf.quants.quantize(rng.standard_normal((rows, width)).astype(np.float32), qtype), raw_dtype=qtype)

    plain("token_embd.weight", len(TOKENS), width)
    plain("blk.0.attn_norm.weight", width)
    packed("blk.0.attn_q.weight", width)
    packed("blk.0.attn_k.weight", width // 4)
    packed("blk.0.attn_v.weight", width // 4)
    packed("blk.0.attn_output.weight", width)
    plain("blk.0.ffn_norm.weight", width)
    packed("blk.0.ffn_gate.weight", width)
    packed("blk.0.ffn_up.weight", width)
    packed("blk.0.ffn_down.weight", width)
    plain("output_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if old:
        data = bytearray(path.read_bytes())
        reader = open_gguf(path, types=False)
        data[reader.file_type_at()] = 41
        for e in reader.table:
            if e.type_id == Q.STQ1_0:
                data[e.type_at] = 42
        path.write_bytes(data)
    return path


def table(path: Path) -> Path:
    """No model: a tensor of each of some types, in a kilobyte."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ1_25)
    writer.add_token_list(["a", "b"])
    for name in "F32", "F16", "Q8_0", "TQ2_0", "TQ1_25", "TQ1_25_64", "STQ1_0":
        block = gguf.GGML_QUANT_SIZES[Q[name]][0]
        x = rng.choice([-0.5, 0.0, 0.5], (2, max(block, 8))).astype(np.float16 if name == "F16" else np.float32)
        if name in gguf_type.TYPES:
            x = rng.standard_normal(x.shape).astype(np.float32)
        writer.add_tensor(name.lower(), x if name in ("F32", "F16") else gguf.quants.quantize(x, Q[name]), raw_dtype=Q[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shaped(path: Path, *dims: int) -> Path:
    """`table` with the last tensor's dimensions changed, of which nothing else in the file speaks."""
    data = table(path).read_bytes()
    at = open_gguf(path, types=False).table[-1].type_at
    dims_at = at - 4 - 2 * 8
    path.write_bytes(data[:dims_at] + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + data[at:])
    return path


def write(directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    most = (1 << 31) - 256
    return [
        table(directory / "table.gguf"),
        model(directory / "tq1_25.gguf", Q.TQ1_25, 128),
        model(directory / "tq1_25_64.gguf", Q.TQ1_25_64, 192),
        model(directory / "stq1_0.gguf", Q.STQ1_0, 256),
        model(directory / "stq1_0-old.gguf", Q.STQ1_0, 256, old=True),
        # two findings: gguf.cpp passed both, and an assertion of ggml_new_tensor ended the process
        shaped(directory / "found-most-weights.gguf", most, ((1 << 63) - 1) // most),
        shaped(directory / "found-no-rows.gguf", 1 << 31, 0, 1 << 32),
    ]


if __name__ == "__main__":
    for file in write(Path(sys.argv[1])):
        print(f"{file}: {file.stat().st_size} bytes")
