"""The tokenizer in a GGUF, for transformers, splitting text as llama.cpp does.

transformers' own reader of GGUF tokenizers takes BOS for EOS, splits every text before merging as GPT-2 did, and ignores add_bos_token.
"""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from sherry_gguf.errors import ConvertError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
ADDED = UNKNOWN, CONTROL, USER_DEFINED  # found in text before it is split

# How text is split before merging, by tokenizer.ggml.pre: expressions as published tokenizer.json files have them, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (_DIGITS, _GPT2)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_WORDS % r"\p{N}",)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_WORDS % r"\p{N}{1,3}",)),
}
LIKE_LLAMA3 = "llama-bpe", "llama3", "llama-v3", "falcon3"  # whole words need no merges, and BOS comes first unless the file says otherwise


def from_gguf(path: Path, fields: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a GGUF's metadata, with its chat template.

    path: for messages. Raises ConvertError for a tokenizer that is not known here, or damaged.
    """
    try:
        return _from_gguf(path, fields)
    except ConvertError:
        raise
    except Exception as e:  # merges of tokens that are not there, values of other types, and more
        raise ConvertError(f"{path}: its tokenizer is damaged: {type(e).__name__}: {e}. {_INSTEAD}") from e


def _from_gguf(path: Path, fields: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    kind, pre, tokens, types = field("model"), field("pre", "default"), field("tokens"), field("token_type")
    if kind not in ("llama", "gpt2") or (kind == "gpt2" and pre not in SPLITS):
        known = ", ".join(sorted(SPLITS))
        what = f"a tokenizer of the type {kind!r}" if kind != "gpt2" else f"a tokenizer that splits text as {pre!r} does"
        raise ConvertError(f"{path} has {what}, which is not known here (gpt2 with {known}; llama). {_INSTEAD}")
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise ConvertError(f"{path}: tokenizer.ggml.tokens is missing or names a token twice. {_INSTEAD}")
    if types is not None and (not isinstance(types, list) or len(types) != len(tokens)):
        raise ConvertError(f"{path}: tokenizer.ggml.token_type does not have a type for each of {len(tokens)} tokens. {_INSTEAD}")
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        number = field(f"{key}_token_id")
        if number is not None and number not in (-1, (1 << 32) - 1):  # none
            if not (isinstance(number, int) and 0 <= number < len(tokens)):
                raise ConvertError(f"{path}: tokenizer.ggml.{key}_token_id is {number}, there are {len(tokens)} tokens. {_INSTEAD}")
            special[name] = tokens[number]
    if kind == "llama":
        made = _sentencepiece(tokens, field("scores"), types, field("add_space_prefix", True))
    else:
        made = _bpe(tokens, field("merges"), pre)
    made.add_tokens([AddedToken(t, special=k != USER_DEFINED, normalized=False) for t, k in zip(tokens, types or ()) if k in ADDED])
    begin = [special["bos_token"]] if field("add_bos_token", kind == "llama" or pre in LIKE_LLAMA3) and "bos_token" in special else []
    end = [special["eos_token"]] if field("add_eos_token", False) and "eos_token" in special else []
    around = [(t, tokens.index(t)) for t in dict.fromkeys(begin + end)]
    template = processors.TemplateProcessing(
        single=[*begin, "$A", *end], pair=[*begin, "$A", *end, *(f"{t}:1" for t in begin), "$B:1", *(f"{t}:1" for t in end)],
        special_tokens=around,
    )  # fmt: skip
    made.post_processor = template if kind == "llama" else processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=fields.get("tokenizer.chat_template"), clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **special,
    )  # fmt: skip


_INSTEAD = "Give the directory of the tokenizer: --tokenizer DIR, in Python load_gguf(path, tokenizer=DIR)"


def _bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, ignore_merges=pre in LIKE_LLAMA3))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[pre]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int] | None, space: bool) -> Tokenizer:
    vocabulary = {t: i for i, t in enumerate(tokens)}
    unknown = next((t for t, k in zip(tokens, types or ()) if k == UNKNOWN), None)
    merges = generate_merges(vocabulary, list(zip(tokens, scores, strict=True)))
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made
