"""The proof of the tokenizer: each kind that llama.cpp has, right ones, wrong ones, and files that say nothing right."""

import json
import re
import shutil

import pytest
import small_models
import tokenizers
import transformers
from conftest import sherry
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sherry_gguf import llama_cpp, tokenizer_check, vocabulary

LINES = small_models.corpus().splitlines() + list(tokenizer_check.SAMPLE)
SOURCE = (llama_cpp.source_dir() / "src" / "llama-vocab.cpp").read_text()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("good") / "m", "llama")


@pytest.fixture
def model(good, tmp_path):
    """A small Llama without a tokenizer."""
    directory = shutil.copytree(good, tmp_path / "m")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    return directory


def convert(model, *args):
    target = model.parent / "out.gguf"
    done = sherry("convert", model, "--outfile", target, *args)
    assert (done.returncode == 0) == target.is_file(), done.stderr
    return done


def of_file(model):
    return {key: field for key, field in re.findall(r"^  (tokenizer\.\S+) +(\S+)", sherry("inspect", model.parent / "out.gguf").stdout, re.M)}


def save(tokenizer, directory, cls="PreTrainedTokenizerFast", **settings):
    """A tokenizer of the tokenizers package as transformers saves it for a class that config.json names."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls, **settings}))


def byte_level(pre, *, first=(), size=small_models.VOCAB):
    """A trained byte-level BPE tokenizer that splits text by `pre` before merging."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", *first], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


# ---- byte-level BPE: each way of llama.cpp to split text before merging ----


def expressions():
    """llama.cpp's name of each way that is regular expressions alone -> these, from its source."""
    types = dict()
    for names, kind in re.findall(r"((?:tokenizer_pre == \"[^\"]+\"(?: \|\|)?\s*)+)\) \{\s*pre_type = (\w+);", SOURCE):
        types.setdefault(kind, re.findall(r'"([^"]+)"', names)[0])
    found = {}
    for cases, body in re.findall(r"((?:case LLAMA_VOCAB_PRE_TYPE_\w+:\s*)+)regex_exprs = \{(.*?)\};\n", SOURCE, re.S):
        body = re.sub(r"^\s*//.*$", "", body, flags=re.M)
        literals = [json.loads(f'"{text}"') if "\\x" not in text else None for text in re.findall(r'"((?:[^"\\]|\\.)*)"', body)]
        for case in re.findall(r"LLAMA_VOCAB_PRE_TYPE_\w+", cases):
            if case in types and None not in literals:
                found[types[case]] = literals
    return found


EXPRESSIONS = expressions()


def pre_tokenizer(name):
    split = [
        pre_tokenizers.Split(tokenizers.Regex(expression), "isolated", invert=False) for expression in EXPRESSIONS[name]
    ]
    return pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_ways_to_split_are_found():
    assert {"gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "gpt-4o", "starcoder", "command-r"} <= EXPRESSIONS.keys()
    assert len(EXPRESSIONS) >= 30
