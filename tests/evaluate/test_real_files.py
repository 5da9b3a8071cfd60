"""What real_models.py makes of a GGUF's tokenizer."""

import real_files
import sentencepiece
import small_models


def test_a_sentencepiece_model_from_a_gguf():
    """The rebuilt model splits text into the same ids, also text that needs bytes, and keeps the spaces."""
    model = small_models.spm(add_dummy_prefix=False)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(original.get_piece_size())
    kinds = [2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1 for i in ids]
    fields = {"tokens": [original.id_to_piece(i) for i in ids], "scores": [original.get_score(i) for i in ids], "token_type": kinds,
              "bos_token_id": original.bos_id(), "eos_token_id": original.eos_id(), "unknown_token_id": original.unk_id(),
              "add_space_prefix": False}  # fmt: skip
    rebuilt = sentencepiece.SentencePieceProcessor(
        model_proto=real_files.sentencepiece({f"tokenizer.ggml.{k}": v for k, v in fields.items()})
    )
    for text in "def f(x):\n    return x  # två", "  a   b ", "日本 🦙", small_models.corpus()[:2000]:
        assert rebuilt.encode(text) == original.encode(text) and rebuilt.decode(rebuilt.encode(text)) == text
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id()) == (original.bos_id(), original.eos_id(), original.unk_id())
