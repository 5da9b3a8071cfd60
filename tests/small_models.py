"""Small random models, written by transformers like any checkpoint, with tokenizers trained on the standard library.

`make(directory, name)` writes one. Its linear layers are 3:4 sparse ternary with scales that fp16 holds, so a conversion
must be exact; `latent=True` leaves them as drawn.
"""

import functools
import io
import json
import sysconfig
from pathlib import Path

import numpy as np
import torch
import transformers

VOCAB = 512

# name: (model class of transformers, tokenizer, configuration). All run in llama.cpp, which would give a model named "phi3"
# other tokens.
_LLAMA = dict(
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
_GEMMA = _LLAMA | dict(head_dim=64)
_MOE = dict(num_local_experts=4, num_experts_per_tok=2)
FAST = ["llama", "llama-64", "smollm2", "qwen3", "mixtral"]  # what scripts/test.sh --fast converts
MODELS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "spm", _LLAMA | dict(tie_word_embeddings=False)),
    "llama-tied": ("LlamaForCausalLM", "spm", _LLAMA | dict(tie_word_embeddings=True)),
    "llama-64": ("LlamaForCausalLM", "spm", _LLAMA | dict(hidden_size=128, intermediate_size=192, tie_word_embeddings=False)),
    # SmolLM2's shape: no row is a multiple of 128
    "smollm2": (
        "LlamaForCausalLM",
        "bpe",
        _LLAMA | dict(hidden_size=192, intermediate_size=320, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "llama-bpe": ("LlamaForCausalLM", "bpe", _LLAMA | dict(tie_word_embeddings=False)),
    "llama-bpe-tied": ("LlamaForCausalLM", "bpe", _LLAMA | dict(tie_word_embeddings=True)),
    "qwen2": (
        "Qwen2ForCausalLM",
        "bpe",
        dict(
            hidden_size=896,
            intermediate_size=1152,
            num_hidden_layers=1,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": ("Qwen3ForCausalLM", "bpe", _LLAMA | dict(head_dim=128)),
    "mistral": ("MistralForCausalLM", "spm", _LLAMA | dict(sliding_window=None)),
    "mixtral": ("MixtralForCausalLM", "spm", _LLAMA | _MOE),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        "bpe",
        _LLAMA | dict(head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1),
    ),
    "gemma2": ("Gemma2ForCausalLM", "spm-plain", _GEMMA),
    "phi": ("Phi3ForCausalLM", "spm", _LLAMA | dict(pad_token_id=0)),
    "gpt2": ("GPT2LMHeadModel", "bpe", dict(n_embd=256, n_layer=2, n_head=4, n_positions=256, n_ctx=256)),
    "gptneox": ("GPTNeoXForCausalLM", "bpe", _LLAMA),
    "falcon": (
        "FalconForCausalLM",
        "bpe",
        dict(
            hidden_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            max_position_embeddings=256,
        ),
    ),
    "stablelm": ("StableLmForCausalLM", "bpe", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", "bpe", _LLAMA),
    "olmoe": ("OlmoeForCausalLM", "bpe", _LLAMA | dict(num_key_value_heads=4, num_experts=4, num_experts_per_tok=2)),
    "granite": ("GraniteForCausalLM", "bpe", _LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", "bpe", _LLAMA),
    "cohere": ("CohereForCausalLM", "bpe", _LLAMA),
    "mamba": ("MambaForCausalLM", "bpe", dict(hidden_size=256, num_hidden_layers=2, state_size=16, time_step_rank=16)),
    "gptoss": (
        "GptOssForCausalLM",
        "bpe",
        _LLAMA | dict(head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
    ),
    "deepseek2": (
        "DeepseekV2ForCausalLM",
        "bpe",
        _LLAMA
        | dict(
            num_key_value_heads=4,
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=128,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    ),
}


@functools.cache
def corpus() -> str:
    """A megabyte of Python, the same on each machine with the same Python."""
    out = io.StringIO()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        out.write(path.read_text("utf-8", errors="ignore"))
        if out.tell() > 1_000_000:
            break
    return out.getvalue()


@functools.cache
def _bpe():
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(corpus().splitlines(), vocab_size=VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@functools.cache
def spm(**settings) -> bytes:
    """A sentencepiece model of VOCAB pieces that leaves text unchanged, like those of published models."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus().splitlines()),
        model_writer=model,
        **dict(
            vocab_size=VOCAB,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pad_id=-1,
            minloglevel=2,
            num_threads=1,
        )
        | settings,
    )
    return model.getvalue()


def save_tokenizer(directory: Path, kind: str):
    """Write a tokenizer of VOCAB tokens as Hugging Face checkpoints hold them: "bpe", "spm", or "spm-plain" without a space in front."""
    if kind == "bpe":
        _bpe().save_pretrained(directory)
        return
    (directory / "tokenizer.model").write_bytes(spm(add_dummy_prefix=kind == "spm"))
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))


def sparse_ternary(x: torch.Tensor, generator: torch.Generator, group: int = 128) -> torch.Tensor:
    """float32 (..., n) to 3:4 sparse ternary: zeros and signs as in x, a random scale for each `group` of a row.

    The scales fit bfloat16 and float16.
    """
    lanes = x.reshape(-1, 4)
    kept = torch.ones_like(lanes).scatter_(1, lanes.abs().argmin(1, keepdim=True), 0)
    signs = torch.where(lanes < 0, -kept, kept).reshape(-1, min(group, x.shape[-1]))
    scale = (0.02 + 0.03 * torch.rand(len(signs), 1, generator=generator)).bfloat16().float()
    return (signs * scale).reshape(x.shape)


def make(
    directory: Path,
    name: str,
    *,
    dtype=torch.bfloat16,
    latent: bool = False,
    config: dict | None = None,
    shard: str = "5GB",
    safe: bool = True,
    seed: int = 0,
    group: int = 128,
) -> Path:
    """Write the model `name` of MODELS to a new directory, and return it. `config`: changes to its configuration."""
    architecture, tokenizer, settings = MODELS[name]
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = cls(cls.config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **(settings | (config or {}))))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, module in model.named_modules():
            linear = isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
            if linear and not latent and not key.endswith(("lm_head", "gate", "embed_out")):
                w = module.weight
                if isinstance(module, torch.nn.Linear) and w.shape[1] % 64 == 0:
                    w.copy_(sparse_ternary(w.float(), generator, group if w.shape[1] % group == 0 else 64))
                elif not isinstance(module, torch.nn.Linear):
                    w.copy_(sparse_ternary(w.float().T, generator, group).T)
        for p in model.parameters():
            if p.ndim == 1:  # away from their constant start, so that a mix-up shows
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    directory.mkdir(parents=True)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard, safe_serialization=safe)
    save_tokenizer(directory, tokenizer)
    if name == "gptoss":
        edit_config(directory, quantization_config={"quant_method": "mxfp4"})
        edit_weights(directory, mxfp4_experts)
    return directory


def mxfp4_experts(tensors: dict[str, torch.Tensor]):
    """What `edit_weights` does to a gptoss model to make its experts MXFP4, as its published checkpoints have them."""
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = experts, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 122, shape, generator=generator, dtype=torch.uint8)


def edit_config(directory: Path, **changes):
    """Set keys of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change, file: str = "model.safetensors"):
    """Rewrite a checkpoint's tensors: `change` gets the dict of them."""
    from safetensors import torch as st

    tensors = st.load_file(directory / file)
    change(tensors)
    st.save_file(tensors, directory / file, metadata={"format": "pt"})


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below a directory and its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in sorted(directory.rglob("*"))}


def random_rows(rows: int, n: int, seed: int = 0) -> np.ndarray:
    """float32 (rows, n), normal."""
    return np.random.default_rng(seed).standard_normal((rows, n), np.float32)
