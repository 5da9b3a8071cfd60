"""The note that says which flag makes decoding read fewer bytes."""

import re
from types import SimpleNamespace

import pytest
import small_models
from conftest import sherry

from sherry_gguf import gguf_type
from sherry_gguf.convert.hint import output_note
from sherry_gguf.convert.plan import BY_DEFAULT
from sherry_gguf.convert.tensor import Tensor

Q6_K, Q8_0 = 6.5625 / 16, 8.5 / 16  # of F16's bytes
SHARE = re.compile(r"note: (\S+?),? .*is (\d+) % of the bytes of weights read for each token\. (--\S+ \S+) reads about ([\d.]+) x fewer "
                   r"bytes per token, with a small loss, and makes the file ([\d.]+) MB smaller")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("hints")
    return lambda name, **config: small_models.make(root / f"{name}-{len(list(root.iterdir()))}", name, config=config)


def planned(model, *args):
    """(note, {tensor: bytes}) of a dry run."""
    done = sherry("convert", model, "--dry-run", *args)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "read for each token" in line]
    assert len(notes) <= 1
    table = done.stdout.partition("\n\n")[0]
    return "".join(notes), {m[1]: int(m[2]) for m in re.finditer(r"^(\S+) +\S+ +\d+(?: x \d+)* +(\d+)\b", table, re.M)}


def check(note, output, read, flag, smaller):
    found = SHARE.match(note)
    assert found, note
    saved = output * (1 - smaller)
    assert found[3] == flag and found[4] == f"{read / (read - saved):.1f}"
    assert found[2] == f"{100 * output / read:.0f}" and found[5] == f"{saved / 1e6:.1f}"


def test_tied_embeddings_are_read_whole(made):
    note, sizes = planned(made("llama-tied"))
    output = sizes["token_embd.weight"]
    assert output == small_models.VOCAB * 256 * 2
    check(note, output, sum(sizes.values()), "--token-embedding-type Q6_K", Q6_K)
    assert "embeddings and output matrix in one" in note


def test_of_untied_embeddings_a_row_is_read(made):
    model = made("llama")
    note, sizes = planned(model)
    read = sum(sizes.values()) - sizes["token_embd.weight"]
    check(note, sizes["output.weight"], read, "--output-tensor-type Q6_K", Q6_K)
    assert note.endswith(
        f"; --token-embedding-type Q6_K makes it {sizes['token_embd.weight'] * (1 - Q6_K) / 1e6:.1f} MB smaller, but no faster"
    )
    note, _ = planned(model, "--token-embedding-type", "F16")
    assert note.endswith("MB smaller") and "--token-embedding-type" not in note
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


@pytest.mark.parametrize("key, value", [("pooling_type", 1), ("attention.causal", False)])
def test_a_model_of_embeddings_has_no_output(key, value):
    f16 = gguf_type.register().GGMLQuantizationType.F16
    plan = [Tensor("token_embd.weight", "", (512, 256), f16, 512 * 256 * 2, None, why=BY_DEFAULT)]
    keys = {}
    model = SimpleNamespace(gguf_writer=SimpleNamespace(arch="bert", kv_data=[keys]))
    assert output_note(model, plan)
    keys[f"bert.{key}"] = SimpleNamespace(value=value)
    assert output_note(model, plan) == ""
