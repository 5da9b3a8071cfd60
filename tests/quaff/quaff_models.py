"""A small Llama, and batches for it, for the tests of sherry_gguf.quaff."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZE, TOKENS = 64, 12
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def llama(seed=0, **options):
    torch.manual_seed(seed)
    config = dict(vocab_size=97, hidden_size=SIZE, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**config | options))
    with torch.no_grad():
        for block in model.model.layers:  # outliers as trained models have them: a norm with a few large weights
            block.input_layernorm.weight[[5, 40]] *= 60
            block.post_attention_layernorm.weight[[7]] *= 60
    return model


def batches(count=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, 97, (size, TOKENS), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
