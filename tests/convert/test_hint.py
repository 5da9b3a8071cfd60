"""The note that says which flag makes decoding read fewer bytes."""

import math
import re
from types import SimpleNamespace

import pytest
import small_models
from conftest import sherry

from sherry_gguf import gguf_type
from sherry_gguf.convert.hint import output_note
from sherry_gguf.convert.plan import BY_DEFAULT
from sherry_gguf.convert.tensor import Tensor

Q6_K, Q8_0, Q4_0 = 6.5625 / 16, 8.5 / 16, 4.5 / 16  # of F16's bytes
SHARE = re.compile(r"note: (\S+)(?: \(embeddings and output matrix\))? makes up (\d+) % of the weights, in bytes, that each token reads\. "
                   r"With (--\S+ \S+), each token reads (\d+) % fewer bytes, at a small loss of quality, and the file is ([\d.]+) MB "
                   r"smaller: decoding is up to ([\d.]+) times as fast\. "
                   r"With Q4_0, which loses more, it is up to ([\d.]+) times as fast")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("hints")
    return lambda name, **config: small_models.make(root / f"{name}-{len(list(root.iterdir()))}", name, config=config)


def planned(model, *args):
    """(note, {tensor: bytes}) of a dry run."""
    done = sherry("convert", model, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "each token reads" in line]
    assert len(notes) <= 1
    table = done.stdout.partition("\n\n")[0]
    return "".join(notes), {m[1]: int(m[2]) for m in re.finditer(r"^(\S+) +\S+ +\d+(?: x \d+)* +(\d+)\b", table, re.M)}


def check(note, output, read, flag, smaller):
    found = SHARE.match(note)
    assert found, note
    saved, most = output * (1 - smaller), output * (1 - Q4_0)
    assert found[2] == f"{100 * output / read:.0f}" and found[3] == flag and found[4] == f"{100 * saved / read:.0f}"
    assert found[5] == f"{saved / 1e6:.1f}"
    assert found[6] == f"{read / (read - saved):.1f}" and found[7] == f"{read / (read - most):.1f}"


def test_tied_embeddings_are_read_whole(made):
    note, sizes = planned(made("llama-tied"))
    output = sizes["token_embd.weight"]
    assert output == small_models.VOCAB * 256 * 2
    check(note, output, sum(sizes.values()), "--token-embedding-type Q6_K", Q6_K)
    assert "token_embd.weight (embeddings and output matrix) makes up" in note


def test_of_untied_embeddings_a_row_is_read(made):
    model = made("llama")
    note, sizes = planned(model)
    read = sum(sizes.values()) - sizes["token_embd.weight"]
    check(note, sizes["output.weight"], read, "--output-tensor-type Q6_K", Q6_K)
    assert note.endswith(
        f". --token-embedding-type Q6_K makes the file another {sizes['token_embd.weight'] * (1 - Q6_K) / 1e6:.1f} MB smaller, "
        "but decoding no faster"
    )
    note, _ = planned(model, "--token-embedding-type", "F16")
    assert note.endswith("times as fast") and "--token-embedding-type" not in note
    assert planned(model, "--output-tensor-type", "F16")[0] == ""


def test_only_the_experts_in_use_count(made):
    note, sizes = planned(made("mixtral"))
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    assert experts
    check(note, sizes["output.weight"], sum(sizes.values()) - sizes["token_embd.weight"] - experts / 2, "--output-tensor-type Q6_K", Q6_K)


def test_rows_that_do_not_fit_q6_k(made):
    note, sizes = planned(made("llama-64"))
    check(note, sizes["output.weight"], sum(sizes.values()) - sizes["token_embd.weight"], "--output-tensor-type Q8_0", Q8_0)


def test_where_there_is_nothing_to_say(made):
    tied = made("llama-tied")
    assert planned(tied)[0]
    for args in ["--token-embedding-type", "F16"], ["--token-embedding-type", "bf16"], ["--keep", "token_embd"], ["--vocab-only"]:
        assert planned(tied, *args)[0] == "", args
    assert planned(made("llama-tied", num_hidden_layers=8))[0] == ""  # less than a third


def test_what_training_kept_can_be_smaller_too(made):
    model = made("llama", sherry_config=dict(kept=["lm_head.weight", "model.embed_tokens.weight"]))
    note, sizes = planned(model)
    check(note, sizes["output.weight"], sum(sizes.values()) - sizes["token_embd.weight"], "--output-tensor-type Q6_K", Q6_K)
    assert "--token-embedding-type Q6_K" in note and planned(model, "--output-tensor-type", "Q6_K")[0] == ""


def of_f16(name, *shape):
    return Tensor(name, "", shape, gguf_type.register().GGMLQuantizationType.F16, 2 * math.prod(shape), None, why=BY_DEFAULT)


def read_of(plan, **figures):
    """The share of the bytes read for each token that the note gives to the output matrix, or None."""
    keys = {f"llama.{key}": SimpleNamespace(value=value) for key, value in figures.items()}
    found = re.search(r"makes up (\d+) %", output_note(SimpleNamespace(gguf_writer=SimpleNamespace(arch="llama", kv_data=[keys])), plan))
    return found and int(found[1])


def test_layers_that_predict_further_tokens_are_not_read():
    names = [f"blk.{i}.ffn_up.weight" for i in range(3)] + ["blk.2.nextn.eh_proj.weight", "blk.2.nextn.embed_tokens.weight"]
    plan = [of_f16("token_embd.weight", 320, 256), *(of_f16(name, 256, 256) for name in names)]
    assert read_of(plan, block_count=3, nextn_predict_layers=1) == 38  # 1.25 of 3.25
    assert read_of(plan, block_count=3) is None  # 1.25 of 6.25
    alone = [plan[0], *(t for t in plan if "blk.2" in t.name)]
    assert read_of(alone, block_count=3, nextn_predict_layers=1) is None  # --mtp: 1.25 of 4.25


@pytest.mark.parametrize("key, value", [("pooling_type", 1), ("attention.causal", False)])
def test_a_model_of_embeddings_has_no_output(key, value):
    plan = [of_f16("token_embd.weight", 512, 256)]
    keys = {}
    model = SimpleNamespace(gguf_writer=SimpleNamespace(arch="bert", kv_data=[keys]))
    assert output_note(model, plan)
    keys[f"bert.{key}"] = SimpleNamespace(value=value)
    assert output_note(model, plan) == ""
