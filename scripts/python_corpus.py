"""A corpus that every machine has, the source of Python's standard library; a sentencepiece tokenizer and a small Llama for it."""

import argparse
import io
import sysconfig
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from sherry_gguf.errors import Stop

BOS, EOS = 1, 2
FOREIGN = {"__pycache__", "dist-packages", "site-packages"}
SKIPPED = {"distutils", "encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "tkinter", "turtledemo"}
HELD_OUT = 20  # hold out one file in this many
SMALLEST = 100_000  # bytes
LINES = 1_000_000  # train a tokenizer on at most this many: more take minutes and add nothing
EMBEDDING_STD = 0.1  # in runs as short as those on a CPU, transformers' 0.02 costs 0.2 nats of held-out loss


def add_corpus(parser: argparse.ArgumentParser, limit: int) -> None:
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")), help="directory of .py files")
    parser.add_argument("--corpus-bytes", type=int, default=limit, help="read at most this many bytes of it")


def add_sizes(parser: argparse.ArgumentParser, context: int) -> None:
    """Flags for the sizes of `small_llama` and of its batches."""
    parser.add_argument("--vocab", type=int, default=2048, help="tokens of the tokenizer")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128: an even number of heads of 64")
    parser.add_argument("--intermediate", type=int, default=768, help="size of the feed-forward layers, a multiple of 64")
    parser.add_argument("--context", type=int, default=context, help="tokens of a training sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")


def read(directory: Path, limit: int, everything: bool = False) -> tuple[list[str], list[str]]:
    """The texts to train on and the held-out ones: at most `limit` bytes of the .py files below a directory.

    `everything` includes tests, tables and the like: three times as much text, and more varied. Raises Stop for a missing directory, or
    too little text in it.
    """
    if not directory.is_dir():
        raise Stop(f"--corpus {directory}: no such directory")
    texts, size = [], 0
    skipped = FOREIGN if everything else FOREIGN | SKIPPED
    for path in sorted(directory.rglob("*.py")):
        parts = path.relative_to(directory).parts
        if skipped & set(parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            text, length = path.read_text(encoding="utf-8"), path.stat().st_size
        except (UnicodeDecodeError, OSError):
            continue
        if size + length > limit:
            break
        texts.append(text)
        size += length
    if size < SMALLEST:
        raise Stop(f"{directory} holds {size} bytes of usable .py files, too few to train on: name another --corpus")
    return [t for i, t in enumerate(texts) if i % HELD_OUT], texts[::HELD_OUT]


def train_tokenizer(texts: list[str], vocab: int) -> bytes:
    """A sentencepiece BPE model that keeps every character, and that llama.cpp's tokenizer agrees with.

    Its sentences are lines, so a newline is always the byte piece <0x0A>; runs of spaces are pieces of their own.
    Raises Stop if the texts do not give `vocab` pieces, or if `encode` could not hold them.
    """
    if vocab > 1 << 16:
        raise Stop(f"--vocab {vocab}: at most {1 << 16}")
    model = io.BytesIO()
    lines = [line for text in texts for line in text.split("\n") if line]
    n = min(len(lines), LINES)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(lines[i * len(lines) // n] for i in range(n)), model_writer=model, model_type="bpe", vocab_size=vocab,
            byte_fallback=True, character_coverage=0.9999, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False, allow_whitespace_only_pieces=True,
            unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, minloglevel=2)  # fmt: skip
    except RuntimeError as e:
        raise Stop(f"sentencepiece made no tokenizer of {vocab} pieces: {e}") from None
    return model.getvalue()


def hf_tokenizer(model: Path, context: int) -> LlamaTokenizer:
    """The Hugging Face tokenizer of a sentencepiece model file."""
    tokenizer = LlamaTokenizer(str(model), legacy=True, add_prefix_space=False, model_max_length=context,
                               clean_up_tokenization_spaces=False)  # fmt: skip
    # With this template a chat program continues the user's text, which is all that a base model can do.
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def encode(model: bytes, texts: list[str]) -> np.ndarray:
    """The texts' tokens, uint16 (n,), with EOS after each text."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    return np.concatenate([[*ids, EOS] for ids in pieces.encode(texts)]).astype(np.uint16)


def check_sizes(hidden: int, intermediate: int) -> None:
    """Raises Stop if `small_llama` cannot have these sizes, or its matrices would not fit blocks."""
    if hidden <= 0 or hidden % 128:
        raise Stop(f"--hidden {hidden}: it must be a multiple of 128, for an even number of heads of 64")
    if intermediate <= 0 or intermediate % 64:
        raise Stop(f"--intermediate {intermediate}: it must be a multiple of 64, the weights of a TQ1_25_64 block")


def small_llama(vocab: int, layers: int, hidden: int, intermediate: int, context: int, seed: int) -> LlamaForCausalLM:
    """A Llama with heads of 64, two for each key and value. Raises Stop for sizes that `check_sizes` refuses."""
    check_sizes(hidden, intermediate)
    heads = hidden // 64
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=64, max_position_embeddings=context, tie_word_embeddings=False, bos_token_id=BOS,
        eos_token_id=EOS))  # fmt: skip
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    return model
