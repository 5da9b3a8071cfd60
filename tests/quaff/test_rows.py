"""Rows to fine-tune on: what is read, which tokens train, and what is refused."""

import json

import datasets
import pytest
import small_models
import tokenizers
import torch
import transformers
from quaff_models import CHATML

from sherry_gguf.errors import Stop
from sherry_gguf.quaff.arguments import FinetuneArguments
from sherry_gguf.quaff.rows import IGNORED, Collate, Encoder, Row
from sherry_gguf.training.texts import TextError, documents, read

FORGETS = CHATML.replace("{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}")


@pytest.fixture(scope="module", params=["bpe", "spm"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    small_models.save_tokenizer(directory, request.param)
    found = transformers.AutoTokenizer.from_pretrained(directory)
    found.chat_template = CHATML
    return found


def chat(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents)]


def trained(tokenizer, tokens):
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def encoded(tokenizer, row, **options):
    (tokens,) = Encoder(tokenizer, **{"context": 200} | options)(row)
    assert len(tokens.ids) == len(tokens.labels) and tokens.labels[0] == IGNORED
    assert all(label in (IGNORED, token) for token, label in zip(tokens.ids, tokens.labels))
    return tokens


def test_a_prompt_and_its_completion(tokenizer):
    row = {"prompt": "def f(x):\n    return", "completion": " x + 1"}
    tokens = encoded(tokenizer, row)
    assert trained(tokenizer, tokens).strip() == "x + 1" + tokenizer.eos_token
    assert tokens.ids[-1] == tokens.labels[-1] == tokenizer.eos_token_id
    assert tokens.ids[:-1] == tokenizer(row["prompt"] + row["completion"])["input_ids"]
    everything = encoded(tokenizer, row, answers=False)
    assert everything.ids == tokens.ids and everything.labels[1:] == tokens.ids[1:]


def test_a_chat_trains_each_answer_and_its_end(tokenizer):
    messages = chat("one", "import os", "two", "import sys")
    text = trained(tokenizer, encoded(tokenizer, {"messages": messages}))
    assert text.replace(" ", "") == "importos<|end|>\nimportsys<|end|>\n"
    as_prompt = encoded(tokenizer, {"prompt": messages[:3], "completion": messages[3:]})
    assert as_prompt.ids == encoded(tokenizer, {"messages": messages}).ids
    assert trained(tokenizer, as_prompt).replace(" ", "") == "importsys<|end|>\n"


def test_a_chat_may_begin_with_the_assistant(tokenizer):
    messages = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "you"}]
    assert "hello" in trained(tokenizer, encoded(tokenizer, {"messages": messages}))


def test_tokens_that_the_tokenizer_adds_or_trims(tmp_path):
    """An end of its own trains once; so do tokens of spaces, whose place in the text some tokenizers do not tell."""
    small_models.save_tokenizer(tmp_path, "bpe")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    row = {"prompt": "def f(x):\n", "completion": "        return x"}
    wanted = encoded(tokenizer, row)
    end = tokenizer.eos_token, tokenizer.eos_token_id
    added = tokenizers.processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    for processor in added, tokenizers.processors.ByteLevel(trim_offsets=True):
        changed = transformers.AutoTokenizer.from_pretrained(tmp_path)
        changed.backend_tokenizer.post_processor = processor
        assert encoded(changed, row) == wanted
    assert trained(tokenizer, wanted) == "        return x" + end[0]


def test_a_slow_tokenizer_is_refused(tmp_path):
    small_models.save_tokenizer(tmp_path, "spm")
    with pytest.raises(Stop, match="no fast version"):
        Encoder(transformers.LlamaTokenizer.from_pretrained(tmp_path), 10)


def test_long_rows(tokenizer):
    long = {"prompt": "a = 1\n" * 20, "completion": "b"}
    tokens = encoded(tokenizer, long, context=10)
    assert tokens.cut and len(tokens.ids) == 10 and set(tokens.labels) == {IGNORED}
    assert not encoded(tokenizer, long, context=1000).cut
    text = "def f(a, b):\n    return a + b\n" * 10
    pieces = Encoder(tokenizer, 16)({"text": text})
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert all(len(piece.ids) <= 16 and piece.ids[: len(begin)] == begin and not piece.cut for piece in pieces)
    joined = [token for piece in pieces for token in piece.ids[len(begin) :]]
    assert joined == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][: len(joined)]
    assert all(piece.labels[1:] == piece.ids[1:] for piece in pieces)


def test_templates_that_do_not_fit(tokenizer):
    for template, message in (
        (None, "has no chat template, which rows with messages need: give one with --chat_template FILE"),
        (FORGETS, "changes earlier messages when later ones are added.*--loss_on all"),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"does not take these messages \(roles user, assistant, user, assistant\): roles",
        ),
    ):
        changed = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
        changed.chat_template = template
        with pytest.raises(Stop, match=message):
            encoded(changed, {"messages": chat("a", "b", "c", "d")})
    changed.chat_template = FORGETS
    assert encoded(changed, {"messages": chat("a", "b", "c", "d")}, answers=False).ids


def test_what_is_read(tmp_path):
    rows = [
        {"messages": chat("a", "b"), "n": 1}, {"prompt": "p", "completion": "c"}, {"text": "t"}, {"text": None},
        {"prompt": chat("a"), "completion": [{"role": "assistant", "content": "b", "thinking": 1}]}, {"messages": None, "text": "u"},
        {"prompt": "p", "completion": None}, {"messages": None},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("plain")
    found = [json.loads(row) for row in read([tmp_path], Row())["row"]]
    assert [sorted(row) for row in found] == [
        ["messages"],
        ["completion", "prompt"],
        ["text"],
        ["completion", "prompt"],
        ["text"],
        ["text"],
    ]
    assert found[3]["completion"] == [{"role": "assistant", "content": "b", "thinking": 1}] and found[-1] == {"text": "plain"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"body": "x"}, "line 1 has neither 'messages', nor 'prompt' and 'completion', nor 'text', only body"),
        ({"prompt": "x"}, "line 1 has neither"),
        ({"prompt": "x", "completion": []}, "line 1: 'prompt' and 'completion' must both be strings, or both lists of messages"),
        ({"messages": "x"}, "line 1: 'messages' must be a list of messages"),
        ({"messages": [{"role": "user", "content": [{"image": 1}]}]}, "each with a role and a content, both strings"),
        ({"messages": [{"content": "x"}]}, "each with a role and a content, both strings"),
        ({"text": 3}, "line 1: 'text' must be a string, not int"),
        ({"text": "a\ud83d"}, r"line 1: '\\ud83d' is half a character \(a lone surrogate\): correct or remove it"),
    ],
)
def test_what_is_refused(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(TextError, match=message):
        read([tmp_path], Row())


def test_rows_of_a_named_data_set(tmp_path):
    """Rows without anything to train on are left out, as they are in files."""
    table = datasets.Dataset.from_list([{"messages": chat("a", str(i))} for i in range(3)] + [{"messages": None}])
    table.to_parquet(tmp_path / "train.parquet")
    train, held_out = documents(FinetuneArguments(dataset=str(tmp_path)), Row())
    assert sorted(json.loads(row)["messages"][1]["content"] for row in [*train["row"], *held_out["row"]]) == ["0", "1", "2"]
    table.select([3]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(Stop, match="its split 'train' has no text"):
        documents(FinetuneArguments(dataset=str(tmp_path)), Row())


def test_batches_are_padded():
    batch = Collate(7)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}])
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 2, 3], [4, 7, 7]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 2, 3], [-100, -100, -100]]))
