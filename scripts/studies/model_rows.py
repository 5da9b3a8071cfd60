#!/usr/bin/env python3
"""Print which published models fit TQ1_25 and TQ1_25_64: the table in docs/convert.md.

The sizes come from the configuration classes of the transformers package. Where a class's defaults are those of a published model, they are
taken as they are; most of these classes name the model in their documentation. Other sizes are given here, with their source. Classes
whose defaults match no published model (Qwen2Config, Qwen3Config, OPTConfig, ...) are left out.

The models are built without memory for their weights, so the table counts every matrix of the layers: what `sherry-gguf convert` makes
ternary. Routers, embeddings and the output matrix are not counted.
"""

import argparse
import collections
import re
from typing import Any

from sherry_gguf.convert.plan import block_type
from sherry_gguf.report import markdown_table

# Name in the table; configuration class; sizes that are not its defaults; the model's name in the class's documentation.
MODELS: list[tuple[str, str, dict[str, int], str]] = [
    # docs/format.md; parameters as published
    ("SmolLM2-135M *", "LlamaConfig", dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                                           num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True), ""),
    ("SmolLM2-360M *", "LlamaConfig", dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
                                           num_key_value_heads=5, vocab_size=49152, tie_word_embeddings=True), ""),
    ("Qwen2.5-0.5B *", "Qwen2Config", dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                                           num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True), ""),
    # the 3B model of Sherry's paper, Table 4
    ("BitNet b1.58 3B *", "LlamaConfig", dict(hidden_size=3200, intermediate_size=8640, num_hidden_layers=26, num_attention_heads=32,
                                              vocab_size=32002, tie_word_embeddings=True), ""),
    ("GPT-2", "GPT2Config", {}, "openai-community/gpt2"),
    ("Phi-1", "PhiConfig", {}, "microsoft/phi-1"),
    ("StableLM-3B-4E1T", "StableLmConfig", {}, "stabilityai/stablelm-3b-4e1t"),
    ("SmolLM3-3B", "SmolLM3Config", {}, "HuggingFaceTB/SmolLM3-3B"),
    ("Phi-3-mini-4k", "Phi3Config", {}, "microsoft/Phi-3-mini-4k-instruct"),
    ("Llama-2-7B", "LlamaConfig", {}, "meta-llama/Llama-2-7b-hf"),
    ("OLMo-2-7B", "Olmo2Config", {}, "allenai/Olmo2-7B-1124-hf"),
    ("Falcon-7B", "FalconConfig", {}, "tiiuae/falcon-7b"),
    ("Mistral-7B-v0.1", "MistralConfig", {}, "mistralai/Mistral-7B-v0.1"),
    ("Gemma-7B", "GemmaConfig", {}, "google/gemma-7b"),
    ("GLM-4-9B", "GlmConfig", {}, "THUDM/glm-4-9b-chat"),
    ("Qwen1.5-MoE-A2.7B", "Qwen2MoeConfig", {}, "Qwen/Qwen1.5-MoE-A2.7B"),
    ("GPT-NeoX-20B", "GPTNeoXConfig", {}, "EleutherAI/gpt-neox-20b"),
    ("Command-R", "CohereConfig", {}, "CohereForAI/c4ai-command-r-v01"),
    ("Phi-3.5-MoE", "PhimoeConfig", {}, "microsoft/Phi-3.5-MoE-instruct"),
    ("Mixtral-8x7B", "MixtralConfig", {}, "mixtralai/Mixtral-8x7B"),
    ("gpt-oss-120b", "GptOssConfig", {}, ""),  # whose documentation names BERT
]  # fmt: skip
_LAYER = re.compile(r"\.(?:layers|h)\.\d+\.")


def built(name: str, sizes: dict[str, int]) -> Any:
    """A transformers model of a configuration class, on PyTorch's meta device."""
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))


def rows_of(model: Any) -> dict[int, int]:
    """Length of a row to the number of weights in such rows, of the layers' matrices."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from sherry_gguf.qat.linear import KEEP

    found: dict[int, int] = collections.Counter()
    for name, module in model.named_modules():
        if not _LAYER.search(f"{name}.") or re.search(KEEP, name):
            continue
        for p in module.parameters(recurse=False):
            if isinstance(module, (torch.nn.Linear, Conv1D)) and p.ndim == 2:
                found[p.shape[0 if isinstance(module, Conv1D) else 1]] += p.numel()
            elif p.ndim == 3:  # experts: (experts, inputs, outputs)
                found[p.shape[1]] += p.numel()
    return dict(sorted(found.items()))


def line(name: str, config: str, sizes: dict[str, int]) -> list[str]:
    """A model's cells in the table."""
    model = built(config, sizes)
    rows = rows_of(model)
    by_type: dict[str, list[int]] = collections.defaultdict(list)
    bits = 0.0
    for n, weights in rows.items():
        kind = block_type(n)
        by_type[kind.name if kind else ""].append(n)
        # Other rows become Q4_0 in blocks of 32, or F16.
        bits += weights * (8 * kind.bytes / kind.size if kind else 4.5 if n % 32 == 0 else 16)
    total, ternary = sum(rows.values()), sum(weights for n, weights in rows.items() if block_type(n))
    lengths = [", ".join(map(str, by_type[kind])) or "-" for kind in ("TQ1_25", "TQ1_25_64", "")]
    parameters = model.num_parameters() / 1e9
    return [name, f"{parameters:.{2 if parameters < 1 else 1}f} B", *lengths, f"{100 * ternary / total:.0f} %", f"{bits / total:.3f}"]


def table() -> str:
    """The table, in Markdown."""
    head = ["model", "parameters", "rows in TQ1_25", "in TQ1_25_64", "in neither", "ternary", "bits a weight"]
    return markdown_table(head, (line(name, config, sizes) for name, config, sizes, _ in MODELS))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print(table())
