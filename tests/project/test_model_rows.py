"""The table of models in docs/convert.md is what scripts/studies/model_rows.py prints."""

from pathlib import Path

import model_rows
import pytest
import transformers

CONVERT = Path(__file__).parents[2] / "docs" / "convert.md"


@pytest.mark.slow
def test_the_documents_table():
    assert f"\n\n{model_rows.table()}\n\n" in CONVERT.read_text(), "copy what scripts/studies/model_rows.py prints into docs/convert.md"


@pytest.mark.parametrize("name, config, sizes, documented", model_rows.MODELS, ids=lambda value: value if isinstance(value, str) else "")
def test_defaults_are_of_the_model_that_the_class_names(name, config, sizes, documented):
    if documented:
        assert documented in getattr(transformers, config).__doc__
    assert name.endswith(" *") == bool(sizes) and not (sizes and documented)


def test_rows_and_weights_of_small_models():
    """Experts, fused matrices and GPT-2's transposed ones; routers and embeddings do not count."""
    llama = dict(hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, vocab_size=99)
    attention = 2 * 192 * (192 + 64)
    wanted = {192: 2 * (attention + 2 * 320 * 192), 320: 2 * 320 * 192}
    assert model_rows.rows_of(model_rows.built("LlamaConfig", llama)) == wanted
    experts = dict(num_local_experts=5, head_dim=64)
    wanted = {192: 2 * (attention + 5 * 2 * 320 * 192), 320: 2 * 5 * 320 * 192}
    for config in "MixtralConfig", "GptOssConfig":
        assert model_rows.rows_of(model_rows.built(config, llama | experts)) == wanted
    gpt2 = model_rows.built("GPT2Config", dict(n_embd=192, n_layer=1, n_head=3))
    assert model_rows.rows_of(gpt2) == {192: 192 * (3 * 192 + 192 + 768), 768: 768 * 192}
    assert model_rows.line("a", "LlamaConfig", llama)[2:] == ["-", "192, 320", "-", "100 %", "1.500"]
    cells = model_rows.line("a", "LlamaConfig", llama | dict(hidden_size=256, intermediate_size=352, num_attention_heads=4))
    share = 1 - 352 * 256 / (2 * 256 * (256 + 64) + 3 * 352 * 256)
    assert cells[2:6] == ["256", "-", "352", f"{100 * share:.0f} %"] and float(cells[6]) == pytest.approx(
        share * 1.375 + (1 - share) * 4.5, abs=1e-3
    )
