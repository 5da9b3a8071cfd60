"""How a checkpoint's tokenizer gets into a GGUF, and the proof that llama.cpp splits text with it as transformers does.

Upstream chooses llama.cpp's tokenizer by the files that exist and by a hash of a few tokens. A wrong choice makes a wrong file without
an error, so `problem` lets llama.cpp and transformers split the same texts.
"""

import json
import logging
import re
from pathlib import Path

from .. import llama_cpp
from ..errors import CheckFailed, VocabularyError
from . import tokenizer_check

SENTENCEPIECE = "tokenizer.model"
NO_CHECK = "--no-tokenizer-check skips this check"
# Well-known names, tried and shown before others.
KNOWN = ("gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o", "deepseek-llm", "deepseek-v3", "starcoder", "falcon", "command-r", "mpt")


class Vocabulary:
    """Mixed in before upstream's class for an architecture: chooses the right kind of tokenizer.

    Attributes:
        tokenizer_pre: llama.cpp's name for how a byte-level BPE tokenizer splits text, instead of what upstream finds.
        unknown_pre: upstream does not know the tokenizer; "default" is stored until `unknown_pre` finds names that fit.
    """

    tokenizer_pre: str | None = None
    unknown_pre = False

    def get_vocab_base_pre(self, tokenizer):
        if self.tokenizer_pre:
            return self.tokenizer_pre
        logger = logging.getLogger("hf-to-gguf")
        level = logger.level
        logger.setLevel(logging.ERROR)  # its banner tells the user to edit llama.cpp
        try:
            return super().get_vocab_base_pre(tokenizer)
        except NotImplementedError:
            if _read(self.dir_model).get("model", {}).get("type") == "WordPiece":
                return "default"  # any name: llama.cpp has one way to split text for these
            if not byte_level(self.dir_model):
                raise VocabularyError(
                    f"{self.dir_model} lacks {SENTENCEPIECE}: its tokenizer is a sentencepiece model, which llama.cpp takes from "
                    "that file and not from tokenizer.json. Copy tokenizer.model from the model that this one comes from"
                ) from None
            self.unknown_pre = True
            return "default"
        finally:
            logger.setLevel(level)

    def get_vocab_base(self):
        try:
            return super().get_vocab_base()
        except AssertionError:
            from transformers import AutoTokenizer

            size = self.hparams.get("vocab_size", 0)
            ids = AutoTokenizer.from_pretrained(self.dir_model).get_vocab()
            beyond = {token: i for token, i in sorted(ids.items(), key=lambda item: item[1]) if i >= size}
            if not beyond:
                raise
            token = next(iter(beyond))
            raise VocabularyError(
                f"{self.dir_model}: the tokenizer has {len(beyond)} token{'s' * (len(beyond) > 1)} beyond the model's vocabulary, the "
                f"first {token!r} with id {beyond[token]}; config.json has vocab_size {size}. Remove them from the tokenizer, or resize "
                f"the model's embeddings: model.resize_token_embeddings({max(beyond.values()) + 1})"
            ) from None

    def set_vocab(self):
        try:
            super().set_vocab()
        except VocabularyError:
            raise
        except Exception:
            if cause := _damage(self.dir_model):
                raise VocabularyError(cause) from None
            raise
        # Some classes decide by the vocabulary's size, and contradict the tokenizer.
        wanted = _around(self.dir_model)
        for part in self.gguf_writer.kv_data:
            for token in wanted.keys() & {"bos", "eos"}:
                if value := part.get(f"tokenizer.ggml.add_{token}_token"):
                    value.value = wanted[token]

    def _set_vocab_sentencepiece(self, add_to_gguf=True):
        # Some of upstream's classes know only sentencepiece, but their models may have other tokenizers.
        if not (self.dir_model / SENTENCEPIECE).is_file() and byte_level(self.dir_model):
            return self._set_vocab_gpt2()
        super()._set_vocab_sentencepiece(add_to_gguf)
        key = "tokenizer.ggml.add_space_prefix"
        if add_to_gguf and not _sentencepiece(self.dir_model).normalizer_spec.add_dummy_prefix:
            if not any(key in part for part in self.gguf_writer.kv_data):  # upstream looks only at tokenizer_config.json
                self.gguf_writer.add_add_space_prefix(False)

    def _set_vocab_llama_hf(self):
        # Upstream looks at byte_fallback, which some byte-level tokenizers set too, without effect.
        return self._set_vocab_gpt2() if byte_level(self.dir_model) else super()._set_vocab_llama_hf()


def byte_level(model_dir: Path) -> bool:
    """Whether a model directory's tokenizer.json makes tokens of bytes, as GPT-2's does, and not of characters."""
    tokenizer = _read(model_dir)
    steps = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") == "ByteLevel":
                return True
            steps += [part for key in ("pretokenizers", "decoders") for part in step.get(key) or ()]
    return False


def _read(model_dir: Path) -> dict:
    """A model directory's tokenizer.json, or {} if it cannot be read."""
    try:
        tokenizer = json.loads((model_dir / "tokenizer.json").read_text("utf-8"))
    except (OSError, ValueError):  # `_damage` says what is wrong with it
        return {}
    return tokenizer if isinstance(tokenizer, dict) else {}


def _around(model_dir: Path) -> dict[str, bool]:
    """Whether a tokenizer.json's template puts "bos" before a text and "eos" after it; {} without a template."""
    import gguf

    processor = _read(model_dir).get("post_processor") or {}
    kinds = {part.get("type") for part in processor.get("processors") or [processor]}
    if "TemplateProcessing" not in kinds:
        return {}
    logger = logging.getLogger("gguf.vocab")  # which has said it already
    logger.disabled, disabled = True, logger.disabled
    try:
        return gguf.SpecialVocab(model_dir).add_special_token
    finally:
        logger.disabled = disabled


def _sentencepiece(model_dir: Path):
    """A model directory's sentencepiece model, as a protobuf message."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString((model_dir / SENTENCEPIECE).read_bytes())


def _damage(model_dir: Path) -> str:
    """What is obviously wrong with the tokenizer's files, or ""."""
    files = [path for path in model_dir.iterdir() if path.name.startswith(("tokenizer", "vocab", "spiece", "merges", "sentencepiece"))]
    if not [path for path in files if path.name != "tokenizer_config.json"]:
        return f"{model_dir} has no tokenizer: neither tokenizer.json nor {SENTENCEPIECE}. Copy it from the model that this one comes from"
    for name in "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json":
        path = model_dir / name
        try:
            if path.is_file() and not isinstance(json.loads(path.read_text("utf-8")), dict):
                return f"{path} is not a JSON object: download it again"
        except (OSError, ValueError) as e:
            return f"cannot read {path}: {e}"
    return ""


def check_files(model_dir: Path):
    """Raise VocabularyError if tokenizer.model is not a sentencepiece model but another kind of file."""
    path = model_dir / SENTENCEPIECE
    if path.is_dir():
        raise VocabularyError(f"{path} is a directory and not a sentencepiece model")
    if not path.is_file():
        return
    with open(path, "rb") as f:
        head = f.read(64)
    if head.startswith(b"GGUF"):
        raise VocabularyError(
            f"{path} is a GGUF file and not a sentencepiece model: transformers writes that when it saves a model that was loaded from a "
            "GGUF (gguf_file=). Put the tokenizer.model of the original model in its place; if that has none, as with "
            "byte-level BPE tokenizers, remove it"
        )
    if head.startswith(b"version https://git-lfs"):
        raise VocabularyError(f"{path} is a Git LFS pointer and not the file itself: fetch it with `git lfs pull`")


def known_pres() -> list[str]:
    """The values of tokenizer.ggml.pre that the pinned llama.cpp knows; none if its source has changed."""
    return sorted({name for names in _pres() for name in names})


def _pres() -> list[list[str]]:
    """The same, in groups that llama.cpp treats alike."""
    source = llama_cpp.source_dir() / "src" / "llama-vocab.cpp"
    text = source.read_text("utf-8") if source.is_file() else ""
    return [re.findall(r'"([^"]+)"', names) for names in re.findall(r'tokenizer_pre == (?:"[^"]+"(?:\s*\|\|\s*tokenizer_pre == )?)+', text)]


def problem(gguf: Path, model_dir: Path, kind: str) -> str:
    """How llama.cpp splits text differently from transformers, and what to do; "" if both agree.

    gguf: the file; kind: its tokenizer.ggml.model. Raises NotBuilt.
    """
    try:
        with tokenizer_check.Splitting(gguf) as splitting:  # both load their tokenizer at the same time
            tokenizer = tokenizer_check.load_tokenizer(model_dir)
            differences = tokenizer_check.compare(splitting, tokenizer)
        if not differences:
            return ""
        if all(difference.text.special for difference in differences):
            advice = f"Only the tokens around a text differ: see add_bos_token and add_eos_token in tokenizer_config.json. {NO_CHECK}"
        elif kind == "gpt2":
            advice = _pre_advice(gguf, tokenizer)
        elif kind == "bert":
            advice = f"llama.cpp's WordPiece drops more combining marks, such as those of Devanagari and Thai. {NO_CHECK}"
        else:
            advice = _sentencepiece_advice(model_dir)
    except OSError:  # NotBuilt among them
        raise
    except Exception as e:  # transformers' tokenizers fail in many ways
        cause = e if isinstance(e, CheckFailed) else f"{type(e).__name__}: {e}"
        return f"the tokenizer cannot be proven: {cause}. {NO_CHECK}"
    first = tokenizer_check.describe(differences[0], tokenizer)
    more = f" ({len(differences)} texts differ)" * (len(differences) > 1)
    return f"llama.cpp splits text into other tokens than the checkpoint's tokenizer{more}, such as {first}. {advice}"


def unknown_pre(gguf: Path, model_dir: Path) -> str:
    """What to do about a byte-level BPE tokenizer that upstream does not know; `gguf` stores it under any name."""
    try:
        advice = _pre_advice(gguf, tokenizer_check.load_tokenizer(model_dir))
    except CheckFailed as e:
        advice = str(e)
    return (
        f"llama.cpp does not know the BPE tokenizer of {model_dir} (it compares hashes with known ones): pass --tokenizer-pre with "
        f"the name of the way it splits text before merging. {advice}"
    )


def _pre_advice(gguf: Path, tokenizer) -> str:
    kinds = [next((name for name in KNOWN if name in names), names[0]) for names in _pres()]
    kinds.sort(key=lambda name: (name not in KNOWN, name))
    names = tokenizer_check.matching(gguf, tokenizer, kinds, 4)
    if not names:
        return f"No --tokenizer-pre gives the checkpoint's tokens for a sample of texts. {NO_CHECK}"
    return f"These give the checkpoint's tokens for a sample of texts: --tokenizer-pre {' or '.join(names)}"


def _sentencepiece_advice(model_dir: Path) -> str:
    path = model_dir / SENTENCEPIECE
    causes = []
    if path.is_file():
        model = _sentencepiece(model_dir)
        if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
            causes.append("it is a unigram model (llama.cpp merges pairs, as for BPE)")
        if model.normalizer_spec.precompiled_charsmap:
            causes.append(f"it normalizes characters ({model.normalizer_spec.name}; llama.cpp does not)")
        if model.normalizer_spec.remove_extra_whitespaces:
            causes.append("it removes extra whitespace (llama.cpp does not)")
    found = f"The cause is in {path}: {', '.join(causes)}. Published models have a sentencepiece BPE model, trained with "
    found += 'normalization_rule_name="identity" and remove_extra_whitespaces=False. '
    return f"{found * bool(causes)}{NO_CHECK}"
