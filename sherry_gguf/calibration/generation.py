"""Text that the full-precision model writes itself, to calibrate on what it knows and the user's text lacks.

The idea is LLM-QAT's (Liu et al. 2023, arXiv:2305.17888): a model's own samples cover what it was trained on. Here all tokens are
drawn from the model's probabilities, at temperature 1, so that they are a fair sample.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from . import layers

CACHE = 2 << 30  # bytes of keys and values at a time
MOST = 256  # sequences at a time: more gain nothing
GROUP = 512  # tokens of the vocabulary that are summed up before one of them is drawn
ATTENTION = "one query of many sequences"


class GrownLayer(DynamicLayer):
    """A layer's keys and values in a buffer of `length` tokens. DynamicLayer copies all of them for each token."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.used = length, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None):
        """Append tokens; returns keys and values (batch, heads, tokens, head size) of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            self.buffers = [x.new_empty(*x.shape[:2], self.length, x.shape[-1]) for x in (key_states, value_states)]
        begin, self.used = self.used, self.used + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : self.used] = new
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self.buffers)
        return self.keys, self.values


def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one new token in each sequence: the heads that share keys count as so many tokens.

    As separate heads, PyTorch's CPU kernel reads their keys and values again for each, which takes 7 times as long.

    query: (batch, heads, 1, head size). key, value: (batch, key heads, tokens, head size). Returns (batch, 1, heads, head size).
    """
    batch, heads, _, size = query.shape
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    together = query.reshape(batch, key.shape[1], -1, size)
    out = torch.nn.functional.scaled_dot_product_attention(together, key, value, mask, scale=scaling)
    return out.reshape(batch, 1, heads, size), None


def candidates(tokenizer: Any, characters: set[str], vocabulary: int) -> torch.Tensor:
    """Tokens that may be drawn, int64 (n,): those made of these characters, or all if there are none; no special ones."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    plain = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
    if characters:
        characters = characters | {" ", "\n"}
        pieces = tokenizer.batch_decode([[i] for i in plain], clean_up_tokenization_spaces=False)
        plain = [i for i, piece in zip(plain, pieces, strict=True) if characters.issuperset(piece)]
    return torch.tensor(plain)


def batch_size(config: Any, context: int, itemsize: int) -> int:
    """How many sequences to write at a time, so that their keys and values, of `itemsize` bytes each, take at most CACHE bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(1, min(MOST, CACHE // (2 * itemsize * config.num_hidden_layers * heads * size * context)))


@torch.inference_mode()
def generate(model: Any, allowed: torch.Tensor, bos: int | None, batch: int, context: int, seed: int, advance: Callable[[], object],
             prompts: Sequence[list[int]] = ()) -> torch.Tensor:  # fmt: skip
    """Draw sequences from the model: tokens, int64 (batch, context), on the CPU.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        allowed: tokens that may be drawn, int64 (n,); the others' probabilities count as 0.
        bos: the first token of each; None: a random one.
        seed: of the draw.
        advance: called after each token.
        prompts: tokens to begin with after `bos`, shorter than the context; each sequence takes one of them at random.
    """
    before = model.config._attn_implementation
    if before == "sdpa":  # others may do more than scale and mask
        transformers.AttentionInterface.register(ATTENTION, attention)
        transformers.AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    try:
        return _generate(model, allowed, bos, batch, context, seed, advance, prompts)
    finally:
        model.set_attn_implementation(before)


def _generate(model, allowed, bos, batch, context, seed, advance, prompts) -> torch.Tensor:
    random = torch.Generator(model.device).manual_seed(seed)
    allowed = allowed.to(model.device)
    config, head = model.config.get_text_config(), layers.Head(model, allowed)
    padding = -len(allowed) % GROUP
    cache = Cache(layers=[GrownLayer(context) for _ in range(config.num_hidden_layers)])
    first = allowed[torch.randint(len(allowed), (batch, 1), generator=random, device=model.device)]
    given = torch.full((context, batch), -1)  # -1: the model writes
    if bos is not None:
        given[0] = bos
    if prompts:
        begin, chosen = int(bos is not None), torch.randint(len(prompts), (batch,), generator=random, device=model.device)
        for i, prompt in enumerate(prompts[int(k)] for k in chosen):
            given[begin : begin + len(prompt), i] = torch.tensor(prompt)
    given = given.to(model.device).unsqueeze(-1)
    ids = torch.where(given[0] < 0, first, given[0])
    found = [ids]
    for place in range(1, context):
        logits = head(head.body(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1])
        share = torch.nn.functional.pad(logits.softmax(-1, dtype=torch.float32), (0, padding)).view(batch, -1, GROUP)
        group = torch.multinomial(share.sum(-1), 1, generator=random)[:, 0]
        token = torch.multinomial(share[torch.arange(batch, device=model.device), group], 1, generator=random)
        ids = torch.where(given[place] < 0, allowed[group[:, None] * GROUP + token], given[place])
        found.append(ids)
        advance()
    return torch.cat(found, 1).cpu()
