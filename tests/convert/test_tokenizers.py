"""The proof of the tokenizer: each kind that llama.cpp has, right ones, wrong ones, and files that say nothing right."""

import json
import os
import re
import shutil

import pytest
import small_models
import tokenizers
import transformers
from conftest import sherry
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from sherry_gguf import llama_cpp
from sherry_gguf.convert import tokenizer_check, vocabulary
from sherry_gguf.errors import CheckFailed

pytestmark = pytest.mark.slow

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
    return dict(re.findall(r"^  (tokenizer\.\S+) +(\S+)", sherry("inspect", model.parent / "out.gguf").stdout, re.M))


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


KNOWN = ("llama-bpe", "qwen2", "gpt-2")  # names that are taken for their way before others that it has
OWN_CODE = ("kimi-k2", "afmoe")  # their expressions are marks for code of llama.cpp's


def expressions():
    """A name of each of llama.cpp's ways to split text by regular expressions alone -> these, from its source."""
    types = {}
    for names, kind in re.findall(r'((?:tokenizer_pre == "[^"]+"\s*(?:\|\|)?\s*)+)\) \{\s*pre_type = (\w+);', SOURCE):
        names = re.findall(r'"([^"]+)"', names)
        types.setdefault(kind, next((name for name in KNOWN if name in names), names[0]))
    found = {}
    for cases, body in re.findall(r"((?:case LLAMA_VOCAB_PRE_TYPE_\w+:\s*)+)regex_exprs = \{(.*?)\};\n", SOURCE, re.S):
        body = re.sub(r"^\s*//.*$", "", body, flags=re.M)
        literals = [json.loads(f'"{text}"') for text in re.findall(r'"((?:[^"\\]|\\.)*)"', body)]
        found |= {types[case]: literals for case in re.findall(r"LLAMA_VOCAB_PRE_TYPE_\w+", cases) if case in types}
    return {name: literals for name, literals in found.items() if name not in OWN_CODE}


EXPRESSIONS = expressions()


def pre_tokenizer(name):
    split = [pre_tokenizers.Split(tokenizers.Regex(e), "isolated", invert=False) for e in EXPRESSIONS[name]]
    return pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_the_ways_to_split_are_all_there():
    assert {"gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "gpt-4o", "starcoder", "command-r", "falcon"} <= EXPRESSIONS.keys()
    assert len(EXPRESSIONS) >= 45


def test_the_sample_tells_the_ways_apart():
    """But for two pairs, which look the same for all texts: a class of one character at a time, and digits in a step of their own."""
    splits = {}
    for name, regular in EXPRESSIONS.items():
        pre = pre_tokenizer(name)
        key = json.dumps([pre.pre_tokenize_str(text) for text in tokenizer_check.SAMPLE])
        splits.setdefault(key, set()).add(json.dumps(regular))
    assert len(splits) >= len({json.dumps(regular) for regular in EXPRESSIONS.values()}) - 2


@pytest.mark.parametrize("name", sorted(EXPRESSIONS))
def test_byte_level_bpe(model, name):
    tokenizer = byte_level(pre_tokenizer(name))
    bos = {}
    if name == "llama-bpe":  # llama.cpp puts BOS before these, as their tokenizers do
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
        )
        bos = {"bos_token": "<|endoftext|>"}
    save(tokenizer, model, **bos)
    done = convert(model, "--vocab-only", "--tokenizer-pre", name)
    assert done.returncode == 0, done.stderr
    assert of_file(model)["tokenizer.ggml.pre"] == name


def test_another_way_to_split_is_an_error_that_names_the_right_ones(model):
    save(byte_level(pre_tokenizer("qwen2")), model)
    says = convert(model, "--tokenizer-pre", "gpt-2").stderr
    assert "llama.cpp splits text into other tokens than the checkpoint's tokenizer" in says
    # a text, and both splits
    assert any(repr(text) in says for text in tokenizer_check.SAMPLE) and ": transformers " in says and "; llama.cpp " in says
    names = re.search(r"--tokenizer-pre (\S+(?: or \S+)*)\. Nothing was written", says)[1].split(" or ")
    assert "qwen2" in names and "gpt-2" not in names
    assert convert(model, "--tokenizer-pre", names[0]).returncode == 0
    # who knows better may have it so, and verify sees it
    (model.parent / "out.gguf").unlink()
    flags = "--tokenizer-pre", "gpt-2", "--no-tokenizer-check"
    assert convert(model, *flags).returncode == 0
    assert sherry("verify", model.parent / "out.gguf", model, *flags).returncode == 0
    done = sherry("verify", model.parent / "out.gguf", model, *flags[:2])
    assert done.returncode == 1 and "differs: tokenizer: llama.cpp splits text into other tokens" in done.stdout


def test_an_unknown_tokenizer_is_an_error_that_names_the_right_ways(model):
    save(byte_level(pre_tokenizer("deepseek-llm")), model)
    for flags in [], ["--dry-run"]:
        done = sherry("convert", model, "--outfile", model.parent / "out.gguf", *flags)
        assert done.returncode == 1 and "does not know the BPE tokenizer" in done.stderr
        names = re.search(r"for a sample of texts: --tokenizer-pre (.*)", done.stderr)[1].split(" or ")
        assert "deepseek-llm" in names and "gpt-2" not in names
    assert not (model.parent / "out.gguf").exists()


def test_a_way_that_llama_cpp_does_not_have(model):
    save(
        byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
        model,
    )
    assert "No --tokenizer-pre gives the checkpoint's tokens" in convert(model).stderr


def test_special_tokens(model):
    """Tokens beside the vocabulary: those of a chat, and one that llama.cpp would take for text."""
    tokenizer = byte_level(pre_tokenizer("qwen2"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    save(tokenizer, model)
    small_models.edit_config(model, vocab_size=tokenizer.get_vocab_size())
    assert convert(model, "--vocab-only", "--tokenizer-pre", "qwen2").returncode == 0
    target = model.parent / "out.gguf"
    data = target.read_bytes()
    assert data.count(b"<|im_end|>") == 1
    target.write_bytes(data.replace(b"<|im_end|>", b"<|im_END|>"))
    with tokenizer_check.Splitting(target) as splitting:
        found, *within = tokenizer_check.compare(splitting, tokenizer_check.load_tokenizer(model))
    assert all("<|im_end|>" in difference.text.text for difference in within) and within
    assert found.text.text == "<|im_end|>" and found.text.parse and len(found.wanted) == 1 < len(found.found)


@pytest.mark.parametrize("flag, name", [("lstrip", "<mask>"), ("rstrip", "<mask>"), ("single_word", "cat")])
def test_added_tokens_within_a_text(model, flag, name):
    """What transformers does around such a token and llama.cpp does not."""
    tokenizer = byte_level(pre_tokenizer("gpt-2"))
    tokenizer.add_tokens([tokenizers.AddedToken(name, **{flag: True})])
    save(tokenizer, model)
    small_models.edit_config(model, vocab_size=tokenizer.get_vocab_size())
    done = convert(model, "--vocab-only", "--tokenizer-pre", "gpt-2")
    assert done.returncode == 1 and (f"'a {name} b'" in done.stderr or f"'x{name}y'" in done.stderr)


# ---- what transformers writes for SmolLM2: a Llama's class, a byte-level BPE, byte_fallback and a Sequence ----


def smollm(directory):
    tokenizer = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.ByteFallback()])
    save(tokenizer, directory, "LlamaTokenizer", bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>",
         add_bos_token=False, legacy=False)  # fmt: skip
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["byte_fallback"] = True
    path.write_text(json.dumps(content))


AS_UPSTREAM = "from sherry_gguf.convert.vocabulary import Vocabulary as V; del V._set_vocab_llama_hf, V._set_vocab_sentencepiece"


def test_a_byte_level_tokenizer_of_a_llama_class(model):
    smollm(model)
    assert "does not know the BPE tokenizer" in convert(model).stderr
    done = convert(model, "--tokenizer-pre", "smollm")
    assert done.returncode == 0, done.stderr
    said = of_file(model)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert sherry("verify", model.parent / "out.gguf", model, "--tokenizer-pre", "smollm").returncode == 0


def test_bos_is_put_before_a_text_where_the_tokenizer_says_so(model):
    """Upstream takes every Llama of 49152 tokens for one that wants none."""
    smollm(model)
    path = model / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(path))
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_bos_token": True}))
    small_models.edit_config(model, vocab_size=49152)
    done = convert(model, "--vocab-only", "--tokenizer-pre", "smollm")
    assert done.returncode == 0, done.stderr
    patch = "from sherry_gguf.convert.vocabulary import Vocabulary as V; del V.set_vocab"
    done = sherry("convert", model, "--outfile", model.parent / "y.gguf", "--vocab-only", "--tokenizer-pre", "smollm", patch=patch)
    assert done.returncode == 1 and "Only the tokens around a text differ" in done.stderr


def test_what_upstream_would_store_is_refused(model):
    """The check by itself: upstream's own choice for such a directory, whose file says "llama" and "default"."""
    smollm(model)
    target = model.parent / "out.gguf"
    done = sherry("convert", model, "--outfile", target, patch=AS_UPSTREAM)
    assert done.returncode == 1 and "the tokenizer cannot be proven: llama.cpp ended on the vocabulary" in done.stderr, done.stderr
    assert not target.exists()
    # the process that llama.cpp ends is not ours, and the next of the ways to split is tried in another one
    assert sherry("convert", model, "--outfile", target, "--no-tokenizer-check", patch=AS_UPSTREAM).returncode == 0
    assert of_file(model)["tokenizer.ggml.model"] == "llama"
    with tokenizer_check.Splitting(target, ("", "gpt-2")) as splitting:
        answers = list(splitting.answers([tokenizer_check.Text("ab")]))
    assert len(answers) == 2 and all("llama.cpp ended on the vocabulary" in str(answer) for answer in answers)


def test_a_class_of_upstreams_that_knows_of_sentencepiece_alone(tmp_path):
    model = small_models.make(tmp_path / "m", "gemma2")
    (model / "tokenizer.model").unlink()
    save(byte_level(pre_tokenizer("gpt-2")), model)
    assert convert(model, "--tokenizer-pre", "gpt-2").returncode == 0
    assert of_file(model)["tokenizer.ggml.model"] == "gpt2"


# ---- sentencepiece ----


def save_spm(directory, **settings):
    (directory / "tokenizer.model").write_bytes(small_models.spm(**settings))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_bpe(model, prefix):
    """Without a space in front, which sentencepiece's model says and llama.cpp is told."""
    save_spm(model, add_dummy_prefix=prefix)
    done = convert(model, "--vocab-only")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "settings, cause",
    [
        (dict(normalization_rule_name="nmt_nfkc"), "it normalizes characters (nmt_nfkc"),
        (dict(remove_extra_whitespaces=True), "it removes extra whitespace"),
        (dict(model_type="unigram"), "it is a unigram model"),
    ],
)
def test_sentencepiece_that_llama_cpp_does_otherwise(model, settings, cause):
    save_spm(model, **settings)
    says = convert(model, "--vocab-only").stderr
    assert "llama.cpp splits text into other tokens" in says and cause in says and "--no-tokenizer-check" in says


def test_sentencepiece_unigram_where_the_architecture_has_it(tmp_path):
    """T5's class stores the unigram kind as what it is; transformers and llama.cpp agree on it, normalization included."""
    torch = pytest.importorskip("torch")
    model = tmp_path / "m"
    model.mkdir()
    (model / "spiece.model").write_bytes(
        # digits by themselves: two ways to split a number may be as likely
        small_models.spm(
            model_type="unigram",
            byte_fallback=False,
            normalization_rule_name="nmt_nfkc",
            remove_extra_whitespaces=True,
            split_digits=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )  # fmt: skip
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=small_models.VOCAB, d_model=128, d_kv=64, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(model)
    tokenizer = transformers.T5Tokenizer(str(model / "spiece.model"), extra_ids=0, legacy=False)
    tokenizer.save_pretrained(model)
    done = convert(model, "--vocab-only")
    assert done.returncode == 0, done.stderr
    assert of_file(model)["tokenizer.ggml.model"] == "t5"


def test_a_sentencepiece_model_that_is_missing(tmp_path):
    """Gemma's tokenizer.json is of characters: llama.cpp's byte-level BPE would make noise of it, whatever its --tokenizer-pre."""
    model = small_models.make(tmp_path / "m", "gemma2")
    (model / "tokenizer.model").unlink()
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=small_models.VOCAB, special_tokens=["<unk>", "<s>", "</s>"],
                                                             show_progress=False))  # fmt: skip
    save(tokenizer, model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name in "Gemma2ForCausalLM", "Gemma3ForCausalLM":
        small_models.edit_config(model, architectures=[name], model_type=name[:6].lower())
        says = convert(model).stderr
        assert "tokenizer.model" in says and "--tokenizer-pre" not in says


@pytest.mark.parametrize(
    "head, says",
    [
        (b"GGUF\x03\0\0\0", "is a GGUF file and not a sentencepiece model: transformers writes that"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_sentencepiece_model_that_is_something_else(model, head, says):
    save_spm(model)
    (model / "tokenizer.model").write_bytes(head + bytes(100))
    assert says in convert(model).stderr


# ---- WordPiece ----


def test_wordpiece(tmp_path):
    """Of English: of Devanagari llama.cpp takes more marks away than transformers, where the vocabulary has them."""
    model = tmp_path / "m"
    config = transformers.BertConfig(vocab_size=small_models.VOCAB, hidden_size=128, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=128, max_position_embeddings=128)  # fmt: skip
    transformers.BertModel(config).save_pretrained(model)
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        small_models.corpus().encode("ascii", "ignore").decode().splitlines(), vocab_size=small_models.VOCAB, show_progress=False
    )
    tokenizer.save_model(str(model))
    transformers.BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    done = convert(model, "--vocab-only")
    assert done.returncode == 0, done.stderr
    assert of_file(model)["tokenizer.ggml.model"] == "bert"


# ---- what cannot be proven ----


def test_a_tokenizer_that_transformers_cannot_load(model):
    save(byte_level(pre_tokenizer("gpt-2")), model)
    patch = (
        "import sherry_gguf.convert.tokenizer_check as t; from sherry_gguf.errors import CheckFailed\n"
        "def load(directory): raise CheckFailed('transformers cannot load the tokenizer')\nt.load_tokenizer = load"
    )
    done = sherry("convert", model, "--outfile", model.parent / "out.gguf", "--tokenizer-pre", "gpt-2", patch=patch)
    assert done.returncode == 1 and "the tokenizer cannot be proven: transformers cannot load the tokenizer" in done.stderr
    assert "--no-tokenizer-check" in done.stderr and not (model.parent / "out.gguf").exists()


def test_a_vocabulary_that_llama_cpp_refuses(model):
    save(byte_level(pre_tokenizer("gpt-2")), model)
    assert convert(model, "--vocab-only", "--tokenizer-pre", "gpt-2").returncode == 0
    target = model.parent / "out.gguf"
    target.write_bytes(target.read_bytes()[:2000])
    with tokenizer_check.Splitting(target) as splitting:
        with pytest.raises(CheckFailed, match="llama.cpp refuses the vocabulary: .*failed"):
            tokenizer_check.compare(splitting, tokenizer_check.load_tokenizer(model))


def test_python_files_of_the_checkpoint_are_not_run(model, tmp_path):
    """Neither of the current directory, nor those that a tokenizer names."""
    save(byte_level(pre_tokenizer("gpt-2")), model)
    for name in "json", "cffi", "tempfile":
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    done = sherry("convert", ".", "--outfile", tmp_path / "x.gguf", "--tokenizer-pre", "gpt-2", cwd=model)
    assert done.returncode == 0 and not (tmp_path / "run").exists(), done.stderr
    config = model / "tokenizer_config.json"
    (model / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    config.write_text(json.dumps(dict(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})))
    with pytest.raises(CheckFailed, match="is Python code in that directory"):
        tokenizer_check.load_tokenizer(model)
    assert not (tmp_path / "run").exists()


def test_a_space_before_an_added_token(model):
    """A slow tokenizer puts one before a token that begins a text; llama.cpp does not."""
    save_spm(model)
    config = model / "tokenizer_config.json"
    added = {
        str(small_models.VOCAB): dict(content="<think>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    }
    config.write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", legacy=True, added_tokens_decoder=added)))
    small_models.edit_config(model, vocab_size=small_models.VOCAB + 1)
    done = convert(model, "--vocab-only")
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizer_check.load_tokenizer(model)
    text = tokenizer_check.Text("<think>", parse=True)
    (wanted,) = tokenizer_check.split_all(tokenizer, [text])
    assert wanted[-1] == small_models.VOCAB and tokenizer_check.same(tokenizer, text, wanted, [small_models.VOCAB])
    assert not tokenizer_check.same(tokenizer, text, wanted, wanted[:-1])


def test_memory_of_the_search(model):
    """Each vocabulary is given back before the next one is loaded."""
    save(byte_level(pre_tokenizer("gpt-2")), model)
    assert convert(model, "--vocab-only", "--tokenizer-pre", "gpt-2").returncode == 0
    small_models.edit_config(model, vocab_size=100_000)
    assert convert(model, "--vocab-only", "--tokenizer-pre", "gpt-2").returncode == 0

    def peak(count):
        with tokenizer_check.Splitting(model.parent / "out.gguf", ("gpt-2",) * count) as splitting:
            for answer in splitting.answers([tokenizer_check.Text("ab")]):
                assert isinstance(answer, list)
                status = open(f"/proc/{splitting._process.pid}/status").read()
            return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) if "VmHWM" in status else None

    if os.path.exists("/proc/self/status"):
        one, many = peak(2), peak(12)
        assert one and many < 1.5 * one


def test_known_ways_are_read_from_the_source():
    assert {name for names in re.findall(r'tokenizer_pre == "([^"]+)"', SOURCE) for name in [names]} == set(vocabulary.known_pres())
    assert len(vocabulary.known_pres()) > 80 and {"gpt-2", "qwen2", "smollm", *EXPRESSIONS} <= set(vocabulary.known_pres())
