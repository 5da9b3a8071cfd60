"""Model files for scripts/bench/models.py: real shapes, random weights."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from sherry_gguf import llama_cpp, tq1_25, tq1_25_64

OURS = tq1_25.NAME
# What a label of the tables has after the type's name, in this order:
EMBEDDINGS = "+"  # and their type, if files differ in it
PLAIN = "-plain"  # weights stay as in the file, without repacking
BEFORE = "-before"  # the build that this one is compared with
FILE_VERSION = 1  # increment it when `write_model` or one of SHAPES changes
BANK = 128  # random rows of each length; a tensor repeats them


@dataclass(frozen=True)
class Shape:
    name: str
    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rope_base: float
    vocab: int = 32000
    qkv_bias: bool = False
    window: int = 0  # tokens that five of six layers see, in gemma3

    def cache_bytes(self, context: float) -> float:
        """Bytes of keys and values, F16, that a token reads of a context of so many tokens."""
        local = self.layers - self.layers // 6 if self.window else 0
        tokens = local * min(context, self.window) + (self.layers - local) * context
        return 2 * 2 * self.kv_heads * self.head_dim * tokens


SHAPES = {  # all tied: the embeddings' matrix is also the output matrix
    "135m": Shape("SmolLM2-135M", "llama", 576, 30, 9, 3, 64, 1536, 1e5, vocab=49152),
    "270m": Shape("Gemma-3-270m", "gemma3", 640, 18, 4, 1, 256, 2048, 1e6, vocab=262144, window=512),
    "0.5b": Shape("Qwen2.5-0.5B", "qwen2", 896, 24, 14, 2, 64, 4864, 1e6, vocab=151936, qkv_bias=True),
    "0.7b": Shape("BitNet 0.7B", "llama", 1536, 24, 16, 16, 96, 4096, 1e4, vocab=32002),
    "1b": Shape("Llama-3.2-1B", "llama", 2048, 16, 32, 8, 64, 8192, 5e5, vocab=128256),
    "1.5b": Shape("Qwen2.5-1.5B", "qwen2", 1536, 28, 12, 2, 128, 8960, 1e6, vocab=151936, qkv_bias=True),
    "3b": Shape("Llama-3.2-3B", "llama", 3072, 28, 24, 8, 128, 8192, 5e5, vocab=128256),
    "3b-bitnet": Shape("BitNet 3B", "llama", 3200, 26, 32, 32, 100, 8640, 1e4, vocab=32002),
    "tiny": Shape("tiny (for tests)", "llama", 256, 2, 4, 2, 64, 512, 1e4, vocab=512),
}

# What llama-quantize uses for rows that are not a multiple of the type's block; F16 if they do not fit these types either.
FALLBACK = (
    dict.fromkeys("Q2_0 Q2_K Q3_K STQ1_0 TQ1_0 TQ1_25 TQ1_25_64 TQ2_0".split(), "Q4_0")
    | dict.fromkeys("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS".split(), "IQ4_NL")
    | {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # (rows, n) or (n,), as NumPy has it
    type: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape[:-1]) * llama_cpp.ggml().row_size(self.type, self.shape[-1])


def base(label: str) -> str:
    """What of a label names a file: TQ1_25+F16 of TQ1_25+F16-plain."""
    return label.removesuffix(BEFORE).removesuffix(PLAIN)


def type_of(label: str) -> str:
    """The type that a label names: TQ1_25 of TQ1_25+F16-plain."""
    return base(label).partition(EMBEDDINGS)[0]


def stored_type(type_name: str, n: int) -> str:
    """The type that stores rows of n weights when `type_name` is wanted. Raises ValueError if there is none."""
    if n % llama_cpp.ggml().block(type_name)[0] == 0:
        return type_name
    if type_name == OURS and n % tq1_25_64.TYPE.size == 0:
        return tq1_25_64.TYPE.name  # before any fallback
    other = FALLBACK.get(type_name)
    if other is None and llama_cpp.ggml().block(type_name)[0] > 32:
        raise ValueError(f"rows of {n} weights are not a multiple of {type_name}'s block, and llama-quantize has no fallback for it")
    return other if other and n % llama_cpp.ggml().block(other)[0] == 0 else "F16"


def plan(shape: Shape, type_name: str, embeddings: str) -> list[Tensor]:
    """Every tensor of a model, in file order."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = {"attn_q": (q, shape.hidden), "attn_k": (kv, shape.hidden), "attn_v": (kv, shape.hidden),
                "attn_output": (shape.hidden, q), "ffn_gate": (shape.ffn, shape.hidden),
                "ffn_up": (shape.ffn, shape.hidden), "ffn_down": (shape.hidden, shape.ffn)}  # fmt: skip
    tensors = [Tensor("token_embd.weight", (shape.vocab, shape.hidden), stored_type(embeddings, shape.hidden))]
    for layer in range(shape.layers):
        norms = dict.fromkeys(("attn_norm", "ffn_norm"), shape.hidden)
        if shape.arch == "gemma3":
            norms |= dict.fromkeys(("post_attention_norm", "post_ffw_norm"), shape.hidden)
            norms |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), shape.head_dim)
        tensors += [Tensor(f"blk.{layer}.{name}.weight", (n,), "F32") for name, n in norms.items()]
        for name, size in matrices.items():
            tensors.append(Tensor(f"blk.{layer}.{name}.weight", size, stored_type(type_name, size[1])))
            if shape.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                tensors.append(Tensor(f"blk.{layer}.{name}.bias", size[:1], "F32"))
    return [*tensors, Tensor("output_norm.weight", (shape.hidden,), "F32")]


def facts(shape: Shape, type_name: str, embeddings: str) -> dict:
    """A file's figures for the tables: its bytes, the bytes read for each token, and the types of its block matrices."""
    tensors = plan(shape, type_name, embeddings)
    blocks = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    weights = sum(math.prod(t.shape) for t in blocks)
    output, size = tensors[0], sum(t.bytes for t in tensors)  # the tied embeddings are the output matrix
    stored: dict[str, int] = {}
    for t in blocks:
        stored[t.type] = stored.get(t.type, 0) + math.prod(t.shape)
    return {
        "bytes": size,
        "bytes_per_token": size,
        "output": output.type,
        "output_share": output.bytes / size,
        "bits_per_weight": 8 * sum(t.bytes for t in blocks) / weights,
        "stored": {name: count / weights for name, count in stored.items()},  # shares of the block weights
        "kept_rows": sorted({t.shape[1] for t in blocks if t.type != type_name}),
    }


def write_model(path: Path, shape: Shape, tensors: list[Tensor], done: Callable[[int], object]) -> None:
    """Write a planned model to `path`, which appears only when complete. Calls `done` with the size of each tensor."""
    random = np.random.default_rng(0)
    banks: dict[tuple[str, int], np.ndarray] = {}  # uint8 (BANK, bytes of a row)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, shape.arch)
    try:
        writer.add_name(f"{shape.name}, random")
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.ffn)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(shape.vocab)
        if shape.window:
            writer.add_sliding_window(shape.window)
        writer.add_tokenizer_model("no_vocab")
        for t in tensors:
            # a number, since the published gguf package lacks some of llama.cpp's types
            writer.add_tensor_info(t.name, t.shape, np.dtype(np.int8), t.bytes, llama_cpp.ggml().type_id(t.type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            n = t.shape[-1]
            if len(t.shape) == 1:
                data = np.ones(n, np.float32) if "norm" in t.name else 0.02 * random.standard_normal(n, np.float32)
            else:
                if (t.type, n) not in banks:
                    x = 0.02 * random.standard_normal((BANK, n), np.float32)
                    importance = np.ones(n, np.float32) if t.type.startswith("IQ") else None  # some need one
                    banks[t.type, n] = llama_cpp.ggml().quantize(t.type, x, importance)
                bank = banks[t.type, n]
                data = np.resize(bank, (t.shape[0], bank.shape[1]))  # repeats the rows
            writer.write_tensor_data(data)
            done(data.nbytes)
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
