"""Regular expressions that name some layers and no others, for people to copy."""

import re

import pytest
import torch
import transformers

from sherry_gguf import patterns, qat


def layers(*names, blocks=3):
    return [f"model.layers.{i}.{name}" for i in range(blocks) for name in names]


ATTENTION, MLP = ("self_attn.q_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    "names, but, pattern",
    [
        (layers(*ATTENTION), layers(*MLP), "(?:q_proj|o_proj)"),
        (layers("mlp.down_proj"), layers("mlp.up_proj"), "down_proj"),
        ([f"{n}.weight" for n in layers("mlp.up")], [f"{n}.weight" for n in layers("mlp.up_proj")], r"\bup\b"),
        (layers("mlp.up_proj"), layers("expert.up_proj"), r"model\.layers\.\d+\.mlp\.up_proj"),
        (["model.layers.1.mlp.up_proj"], ["model.layers.2.mlp.up_proj"], r"^model\.layers\.1\.mlp\.up_proj$"),
    ],
)
def test_matching(names, but, pattern):
    assert patterns.matching(names, but) == pattern
    assert all(re.search(pattern, name) for name in names) and not any(re.search(pattern, name) for name in but)


def test_starred():
    assert (
        patterns.starred(["blk.0.attn_q.weight", "output.weight", "blk.1.attn_q.weight"]) == "blk.*.attn_q.weight (2 blocks), output.weight"
    )
    assert patterns.starred(["blk.7.attn_q.weight"]) == "blk.7.attn_q.weight"


def test_prepare_names_a_keep_that_works():
    """SmolLM2's shape: only one of seven matrices has rows of whole groups."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
                                      num_key_value_heads=3)  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    with pytest.raises(
        ValueError, match=r"12 of 14 layers have inputs that are not a multiple of 128.*576 inputs: model\.layers\.\*\.self_attn"
    ) as e:
        qat.prepare(model, qat.QuantConfig(group_size=128))
    keep = re.search(r"--keep '(.*)'", str(e.value))[1]
    assert qat.prepare(model, qat.QuantConfig(group_size=128), keep=keep) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
