"""The loss on a text: llama-perplexity's protocol, with the same result for a checkpoint and its GGUFs."""

import argparse
import contextlib
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import small_models
import tokenizers
import torch
import transformers
from conftest import sherry
from evaluation_support import TEXT, report_of, run

from sherry_gguf.errors import Stop
from sherry_gguf.evaluation import text as text_loss
from sherry_gguf.evaluation.comparison import SUSPICIOUS_RATIO, doubts
from sherry_gguf.evaluation.models import load
from sherry_gguf.evaluation.text import held_out_loss
from sherry_gguf.evaluation.tools import Tool
from sherry_gguf.qat import command as train

pytest_plugins = "evaluation_fixtures"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("offline")]


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_the_loss_on_a_text(models, kind, tmp_path, capsys):
    """Special tokens as text, characters outside the vocabulary and final newlines give the same tokens."""
    text = tmp_path / "text.txt"
    text.write_bytes(("é ☃ <s> </s> <|endoftext|>\r\n" + TEXT.read_text()[:6000] + "\n\n").encode())
    code, report = report_of(tmp_path / "r.json", *models[kind], "--text", text, "--context", 128)
    wanted, *others = (m["text"] for m in report["models"])
    assert code == 0 and wanted["chunks"] == wanted["tokens"] // 128 > 10 and wanted["scored"] == wanted["chunks"] * 63
    for other, allowed in zip(others, (1e-5, 2e-4)):  # measured: 2e-6 and 4e-5
        assert [other[k] for k in ("scored", "chunks", "tokens")] == [wanted[k] for k in ("scored", "chunks", "tokens")]
        assert other["nats"] == pytest.approx(wanted["nats"], rel=allowed)
        assert other["perplexity"] == pytest.approx(math.exp(other["nats"]))
    assert not any("tokens" in c for c in report["compared"])
    size = len(text.read_bytes()) - 1  # llama-perplexity drops the last newline
    for t in wanted, *others:
        assert t["bytes_per_token"] == pytest.approx(size / t["tokens"])
        assert t["nats_per_byte"] == pytest.approx(t["nats"] * t["tokens"] / size)
        assert t["vocabulary"] == small_models.VOCAB and t["guessing"] == pytest.approx(math.log(small_models.VOCAB))
    out, err = capsys.readouterr()
    assert re.search(rf"^ +bytes/token +{wanted['bytes_per_token']:.3f} ", out, re.M)
    assert re.search(rf"^ +nats/byte +{wanted['nats_per_byte']:.4f} ", out, re.M)
    for t in wanted, *others:
        assert (
            f": its loss on the text, {t['nats']:.2f} nats, is close to the 6.24 of guessing among its 512 tokens: it is untrained" in err
        )
    assert err.count("it is untrained") == 3 and "times as many tokens" not in err
    assert re.search(rf"^text +{wanted['scored']} tokens +nats/token +{wanted['nats']:.4f} ", out, re.M)
    assert "acc" not in out and len(re.findall(r"loss on the text [+-]0\.0\d\d %", out)) == 2


def test_the_loss_of_a_trained_model(tmp_path, capsys):
    """After training, export and conversion the GGUF's loss is within the promised half percent of the checkpoint's."""
    lines = [f"    {'abc'[i * i % 3]} = {'xyz'[i % 3]} + {i * 7 % 10}\n" for i in range(4000)]
    (tmp_path / "train.txt").write_text("def f(x, y, z):\n" + "".join(lines[:3500]))
    text = tmp_path / "held_out.txt"
    text.write_text("".join(lines[3500:]))
    start = small_models.make(tmp_path / "start", "llama", latent=True)
    flags = {"model": start, "train": tmp_path / "train.txt", "validation": text, "output_dir": tmp_path / "run", "context": 64,
             "max_steps": 60, "per_device_train_batch_size": 4, "learning_rate": 2e-3, "use_cpu": True, "monitor_every": 0,
             "report_to": "none", "disable_tqdm": True}  # fmt: skip
    assert train.main([x for k, v in flags.items() for x in (f"--{k}", str(v))]) == 0
    capsys.readouterr()  # training may warn about the random weights it starts from
    hf, gguf = tmp_path / "run/hf", tmp_path / "m.gguf"
    result = sherry("convert", hf, "--outfile", gguf, "--require-exact")
    assert result.returncode == 0, result.stderr
    code, report = report_of(tmp_path / "r.json", hf, gguf, "--text", text, "--context", 64)
    torch_loss, gguf_loss = (m["text"]["nats"] for m in report["models"])
    assert code == 0 and gguf_loss == pytest.approx(torch_loss, rel=5e-3)
    assert "guessing" not in capsys.readouterr().err
    # which means something, since the loss depends on the ternary matrices
    model, tokenizer = load(hf, "cpu", "float32")
    for name, p in model.named_parameters():
        if "_proj" in name:
            p.data.zero_()
    without = held_out_loss(model, tokenizer.encode(text.read_text()), 64, 1)
    assert torch_loss < 0.7 * without.nats


@pytest.mark.parametrize("bos, context, chunks", [(1, 64, None), (None, 64, None), (1, 33, 3)])
def test_the_protocol(models, bos, context, chunks):
    """Recomputed one token at a time."""
    model, tokenizer = load(models["spm"][0], "cpu", "float32")
    ids = tokenizer.encode(TEXT.read_text()[:900])
    before = list(ids)
    loss = held_out_loss(model, ids, context, bos, chunks)
    losses, count = [], chunks or len(ids) // context
    for i in range(count):
        x = ids[i * context : (i + 1) * context]
        x = x if bos is None else [bos, *x[1:]]
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([x])).logits[0].double(), -1)
        losses += [-math.log(p[at - 1, x[at]]) for at in range(context // 2 + 1, context)]
    assert ids == before
    assert (loss.chunks, loss.scored, loss.tokens) == (count, len(losses), len(ids))
    assert loss.nats == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_byte_tokenizer_is_reported(models, tmp_path, capsys):
    """It gives twice as many tokens as the model's own, which no figure per token shows."""
    shutil.copytree(models["bpe"][0], tmp_path / "hf")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([], vocab_size=257, special_tokens=["<|endoftext|>"], show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "hf")
    code, report = report_of(tmp_path / "r.json", models["bpe"][0], tmp_path / "hf", "--text", TEXT, "--chunks", 2)
    own, other = (m["text"] for m in report["models"])
    assert code == 0 and other["bytes_per_token"] == 1 < SUSPICIOUS_RATIO < own["bytes_per_token"]
    warning = (
        f"sherry-gguf evaluate: {tmp_path}/hf splits the text into {own['bytes_per_token']:.2f} times as many tokens as "
        f"{models['bpe'][0]}: one of the tokenizers may be wrong; compare nats/byte, not nats/token\n"
    )
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("nats, per_token, count", [((5.6, 5.6), (2, 2), 0), ((5.7, 5.6), (2, 2), 1), ((5.7, 9.0), (2, 2), 2),
                                                    ((3, 3), (3, 2.1), 0), ((3, 3), (3, 1.9), 1), ((3, 3), (1.9, 3), 1)])  # fmt: skip
def test_what_is_doubtful(nats, per_token, count):
    """A loss above 0.9 ln(512) = 5.61; 1.5 times as many tokens as the first model's, or as few."""
    found = [{"model": "m", "text": {"nats": n, "bytes_per_token": b, "vocabulary": 512, "guessing": math.log(512)}}
             for n, b in zip(nats, per_token)]  # fmt: skip
    assert len(list(doubts([*found, {"model": "failed"}]))) == count


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize(
    "size, context, message",
    [(1500, 256, "tokens, and chunks of 256 need 512: give a longer"), (6000, 257, "--context 257: the model was trained on 256 tokens")],
)
def test_a_text_that_does_not_fit(models, tmp_path, capsys, which, size, context, message):  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text(("x = 1\n" * 1000)[: size // 6])
    assert run(models["spm"][which], "--text", text, "--context", context) == 1
    assert message in capsys.readouterr().err


def test_lost_lines_are_printed_again(monkeypatch):
    """llama-perplexity may exit before it has written its last lines, especially on a busy machine."""
    runs = []

    @contextlib.contextmanager
    def tool(*_):
        runs.append(1)
        lines = ["       0  544.7954  6.300410  0.026470", "      64  540.1000  6.200000  0.020000"]
        with subprocess.Popen(["printf", "%s\\n", *lines[: 1 + (len(runs) > 5)]], stdout=subprocess.PIPE, text=True) as process:
            yield Tool(process)

    monkeypatch.setattr(text_loss, "tool", tool)
    a = argparse.Namespace(context=64, chunks=2, threads=1, text="text")
    assert text_loss.perplexity(Path("model"), Path("text"), 1000, a).nats == 6.2 and len(runs) == 6
    monkeypatch.setattr(text_loss, "PATIENCE", 0.0)
    runs.clear()
    with pytest.raises(Stop, match="printed 1 of 2 chunks"):
        text_loss.perplexity(Path("model"), Path("text"), 1000, a)
    assert len(runs) == 3
