"""Text that the model writes itself, for `sherry-gguf calibrate --generated`."""

import json
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from test_calibrate import CONTEXT, KINDS, arguments, tiny
from transformers import AutoTokenizer

from sherry_gguf.calibration import command, generation, layers, sequences
from sherry_gguf.calibration import run as running

pytest_plugins = "training_runs"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("model") / "llama", "llama", latent=True)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_the_model_computes_what_it_computes_at_once(kind):
    """Cache, positions, windows and our attention: the same hidden states as over the whole sequences."""
    model = tiny(kind, **KINDS[kind])
    before, seen = model.config._attn_implementation, []
    hook = layers.body(model).register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    ids = generation.generate(model, torch.arange(320), 1, 3, CONTEXT, 0, lambda: None)
    hook.remove()
    assert model.config._attn_implementation == before
    assert ids.shape == (3, CONTEXT) and ids.dtype == torch.int64 and (ids[:, 0] == 1).all()
    with torch.no_grad():
        wanted = layers.body(model)(input_ids=ids).last_hidden_state[:, :-1]
    torch.testing.assert_close(torch.cat(seen, 1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox"])
def test_tokens_are_drawn_from_the_models_probabilities(kind):
    """Of 700 tokens, so that the last group is not full; 8192 draws of the second token after a fixed first one."""
    model = tiny(kind, **KINDS[kind], vocab_size=800)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.div_(model(input_ids=torch.tensor([[1]])).logits.std())  # probabilities that differ
    allowed = torch.cat([torch.arange(0, 300), torch.arange(400, 800)])
    ids = generation.generate(model, allowed, 1, 8192, 2, 0, lambda: None)[:, 1]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[1]])).logits[0, 0, allowed].softmax(-1)
    found = torch.bincount(ids, minlength=800)
    assert found[300:400].sum() == 0
    expected = 8192 * p.double()
    chi2 = ((found[allowed] - expected).square() / expected).sum()
    assert p.max() > 8 * p.min()
    assert abs(chi2 - 699) < 5 * (2 * 699) ** 0.5  # its mean and deviation over fair draws
    uniform = ((found[allowed] - 8192 / 700) ** 2 / (8192 / 700)).sum()
    assert uniform > 2 * 699


def test_another_seed_gives_other_text():
    model = tiny("llama")
    a, b, c = (generation.generate(model, torch.arange(320), 1, 2, 8, seed, lambda: None) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("bos", [1, None])
def test_prompts(bos):
    """Each sequence begins with one of them, and goes on with what the model finds likely after it."""
    model, prompts = tiny("gemma2"), [[7, 8, 9], [10, 11], [300]]
    seen = []
    hook = layers.body(model).register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
    ids = generation.generate(model, torch.arange(20, 280), bos, 32, CONTEXT, 0, lambda: None, prompts)
    hook.remove()
    chosen = []
    for row in ids.tolist():
        own = row if bos is None else row[1:]
        assert bos is None or row[0] == bos
        [prompt] = [p for p in prompts if own[: len(p)] == p]
        chosen.append(len(prompt))
        assert all(20 <= token < 280 for token in own[len(prompt) :])
    assert {1, 2, 3} == set(chosen)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(seen, 1), layers.body(model)(input_ids=ids).last_hidden_state[:, :-1], rtol=1e-4, atol=1e-4)


def test_a_file_of_prompts(model, text, tmp_path, capfd):
    prompts, work = tmp_path / "prompts.txt", tmp_path / "hf.work"
    prompts.write_text("One day\\n\n\n  the sea \n", encoding="utf-8")
    argv = [*arguments(model, text, tmp_path / "hf", "--generated", 0.5, "--prompts"), str(prompts)]
    assert command.main(argv) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    begun = [tokenizer.encode(p, add_special_tokens=False) for p in ("One day\n", "  the sea ")]
    [written] = work.glob("written-*")
    rows = np.load(written)[:, 1:].tolist()
    assert {next(i for i, p in enumerate(begun) if row[: len(p)] == p) for row in rows} == {0, 1}
    again = [*arguments(model, text, tmp_path / "again", "--generated", 0.5, "--work", work, "--prompts"), str(prompts)]
    prompts.write_text("One night\n", encoding="utf-8")
    capfd.readouterr()
    assert command.main(again) == 1 and "was begun with other settings (prompts: " in capfd.readouterr().err
    for data, says in (
        (b"\n", "is empty: write a prompt in each line"),
        (b"\xff", "is not UTF-8"),
        (b"x" * 999, "more than half a sequence"),
    ):
        prompts.write_bytes(data)
        assert command.main(again) == 1 and says in capfd.readouterr().err
    prompts.unlink()
    assert command.main(again) == 1 and "No such file" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*arguments(model, text, tmp_path / "again", "--prompts"), str(prompts)])
    assert "argument --prompts: it needs --generated" in capfd.readouterr().err


def test_the_prompts_of_examples(model):
    """They are complete, differ, and fit a sequence of any usual length."""
    path = Path(__file__).parents[2] / "examples" / "prompts" / "encyclopedia.txt"
    a = command.parse([str(model), "--output", "x", "--generated", "1", "--context", "256", "--prompts", str(path)], "calibrate")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = sequences.Source(a, tokenizer, "").prompts
    said = {tokenizer.decode(p) for p in prompts}
    assert len(said) == len(prompts) == len(path.read_text(encoding="utf-8").splitlines()) > 100
    assert all(text.startswith(" = ") and text.count("\n") >= 2 and not text.endswith((" ", "\n")) for text in said)


def test_without_a_first_token():
    ids = generation.generate(tiny("llama"), torch.arange(7, 320), None, 64, 3, 0, lambda: None)
    assert ids.min() >= 7 and len(ids[:, 0].unique()) > 32


def test_characters_of_the_text(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    every = generation.candidates(tokenizer, set(), 1 << 30)
    assert not set(tokenizer.all_special_ids) & set(every.tolist()) and len(every) > 100
    some = generation.candidates(tokenizer, set("abc"), 1 << 30).tolist()
    assert tokenizer.encode("cab", add_special_tokens=False)[-1] in some
    assert 0 < len(some) < len(every) and all(set(tokenizer.decode([i])) <= set("abc \n") for i in some)
    assert generation.candidates(tokenizer, set(), 50).max() == 49


def test_memory_for_keys_and_values():
    config = tiny("llama").config
    assert generation.batch_size(config, 32, 2) == generation.MOST
    config.num_hidden_layers, config.num_key_value_heads, config.head_dim = 32, 8, 128
    assert generation.batch_size(config, 512, 4) == (2 << 30) // (32 * 8 * 128 * 2 * 4 * 512)


def test_the_command(model, text, tmp_path, capfd):
    """Half of the sequences, others for the distillation than for the layers; continued from its files."""
    out = tmp_path / "hf"
    argv = arguments(model, text, out, "--generated", 0.5)
    assert command.main(argv) == 0
    says = capfd.readouterr().out
    assert f"text: {24 * CONTEXT} tokens in sequences of 32, 2 of 24 held out" in says and "; 12 written by the model" in says
    report = json.loads((out / running.REPORT).read_text())
    assert report["distillation"]["after"] < report["distillation"]["before"]
    written = sorted((tmp_path / "hf.work").glob("written-*"))
    assert [len(np.load(path)) for path in written] == [20]

    source = sequences.Source(command.parse(argv, "calibrate"), AutoTokenizer.from_pretrained(model), report["settings"]["weights"])
    assert source.lacks() == 0
    ids = source.for_layers()
    more = source.for_distillation(ids)
    both = {tuple(row) for row in ids.tolist()} & {tuple(row) for row in more.tolist()}
    assert not both and ids.shape == (24, CONTEXT) and more.shape == (16, CONTEXT)
    for change in {"seed": 1}, {"context": 64}, {"text": []}:  # what another run wrote is not taken
        a = command.parse(argv, "calibrate")
        vars(a).update(change)
        another = sequences.Source(a, source.tokenizer, report["settings"]["weights"])
        assert another.lacks() == sum(another.generated) > 0
    assert sequences.Source(command.parse(argv, "calibrate"), source.tokenizer, "another model").lacks() == 20


def test_no_text(model, tmp_path, capfd):
    argv = [
        str(x)
        for x in (model, "--output", tmp_path / "hf", "--tokens", 8 * CONTEXT, "--context", CONTEXT, "--passes", 1, "--device", "cpu")
    ]
    with pytest.raises(SystemExit):
        command.main(argv)
    assert "required: --text (or --generated 1)" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*argv, "--generated", "1.5"])
    assert "argument --generated: invalid share from 0 to 1 value: '1.5'" in capfd.readouterr().err
    assert command.main([*argv, "--generated", "1"]) == 0
    assert "8 written by the model" in capfd.readouterr().out
    next((tmp_path / "hf.work").glob("written-*")).write_bytes(b"x")
    (tmp_path / "hf" / "config.json").unlink()
    assert command.main([*argv, "--generated", "1", "--output", str(tmp_path / "other"), "--work", str(tmp_path / "hf.work")]) == 1
    assert "-000.npy is damaged" in capfd.readouterr().err
