"""scripts/make_demo_checkpoint.py at a tiny size: it trains, resumes, repeats nothing and overwrites nothing."""

import contextlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import make_demo_checkpoint
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sherry_gguf import tq1_25

pytestmark = pytest.mark.slow

SCRIPT = Path(make_demo_checkpoint.__file__)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty files of made-up Python, the same on every machine."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["self", "value", "name", "path", "read", "write", "index", "data", "key", "result"]
    for i in range(40):
        lines = []
        while sum(map(len, lines)) < 4000:
            f, x, y = rng.sample(words, 3)
            returned = f"        return {y} + {rng.randrange(100)}"
            lines += [f"def {f}({x}, {y}):", f"    if {x}:", returned, f"    {x} = {y}", ""]
        (folder / f"m{i:02}.py").write_text("\n".join(lines))
    return folder


def heed_interrupts():
    """In a child process: a shell makes background programs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def arguments(out: Path, corpus: Path, **settings) -> list[str]:
    tiny = dict(steps=6, layers=1, hidden=128, intermediate=128, vocab=400, context=32, batch=2, precision="float32")
    flags = [x for k, v in (tiny | settings).items() for x in (f"--{k}", str(v))]
    return ["--out", str(out), "--corpus", str(corpus), *flags]


@pytest.fixture(scope="module")
def run():
    """Runs main in this process, as PyTorch takes seconds to start; gives status, stdout, stderr."""

    def call(*args, **settings):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = make_demo_checkpoint.main(arguments(*args, **settings))
        return types.SimpleNamespace(status=status, stdout=out.getvalue(), stderr=err.getvalue())

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # these models are too small for more
        torch.set_num_threads(1)
        yield call
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("trained") / "hf"
    result = run(out, corpus)
    assert result.status == 0, result.stderr
    assert "held-out loss" in result.stdout
    return out


def test_directory_is_a_checkpoint(trained):
    assert [p.name for p in trained.parent.iterdir()] == ["hf"]
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.sherry_config["weights"] == "fake_quantized"
    matrices = {k: v for k, v in load_file(trained / "model.safetensors").items() if k.endswith("_proj.weight")}
    assert len(matrices) == 7
    for name, weight in matrices.items():
        assert tq1_25.is_exact(weight.numpy()).all(), name
    assert json.loads((trained / "demo.json").read_text())["loss"] < math.log(400)  # a uniform guess among the pieces
    assert json.loads((trained / "training.json").read_text())["steps"] == 6


@pytest.mark.parametrize("use_fast", [True, False])
def test_tokenizer_keeps_every_character(trained, use_fast):
    tokenizer = AutoTokenizer.from_pretrained(trained, use_fast=use_fast)
    text = "  def f(x):\n\n\t    return 'é😀'  \n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.convert_tokens_to_ids("<0x0A>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_second_run_repeats_nothing(run, trained, corpus):
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    result = run(trained, corpus)
    assert result.status == 0 and "already trained" in result.stdout
    assert {p.name: p.stat().st_mtime_ns for p in trained.iterdir()} == before


def test_other_settings_are_refused(run, trained, corpus):
    result = run(trained, corpus, steps=7)
    assert result.status == 1
    assert "steps: 6 then, 7 now" in result.stderr


def test_foreign_directory_is_left_alone(run, tmp_path, corpus):
    (tmp_path / "mine").write_text("precious")
    result = run(tmp_path, corpus)
    assert result.status == 1 and "not a checkpoint that this program wrote" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]

    work = tmp_path / "hf.training"
    work.mkdir()
    (work / "mine").write_text("precious")
    result = run(tmp_path / "hf", corpus)
    assert result.status == 1 and "in the way" in result.stderr
    assert (work / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(hidden=192), "--hidden 192: it must be a multiple of 128"),
        (dict(intermediate=96), "--intermediate 96: it must be a multiple of 64"),
        (dict(vocab=10), "sentencepiece made no tokenizer of 10 pieces"),
        (dict(context=5_000_000), "shorter than one context of 5000000 tokens"),
    ],
)
def test_bad_settings_say_what_is_wrong(run, tmp_path, corpus, settings, says):
    result = run(tmp_path / "hf", corpus, **settings)
    assert result.status == 1 and says in result.stderr
    assert not (tmp_path / "hf").exists()


def test_missing_and_empty_corpus(run, tmp_path):
    assert "no such directory" in run(tmp_path / "hf", tmp_path / "none").stderr
    assert "too few to train on" in run(tmp_path / "hf", tmp_path).stderr


def test_interrupted_run_resumes_and_ends_the_same(run, tmp_path, corpus):
    steps = 300
    whole = run(tmp_path / "whole", corpus, steps=steps)
    assert whole.status == 0, whole.stderr

    out = tmp_path / "cut"
    first = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(out, corpus, steps=steps)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )
    for line in first.stdout:  # the steps follow at once
        if "training: " in line:
            break
    time.sleep(1.5)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "run the same command again" in errors and "Traceback" not in errors
    assert not out.exists()

    second = run(out, corpus, steps=steps)
    assert second.status == 0, second.stderr
    step = int(re.search(r"resuming from \S*checkpoint-(\d+)", second.stdout)[1])
    assert 0 < step < steps
    assert sorted(os.listdir(tmp_path)) == ["cut", "whole"]
    a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_damaged_files_are_named(run, trained, tmp_path, corpus):
    out, work = tmp_path / "hf", tmp_path / "hf.training"
    out.mkdir()
    for text in ("", "{}", "[]", '{"settings": {}, "loss": []}'):
        (out / "demo.json").write_text(text)
        result = run(out, corpus)
        assert result.status == 1
        assert f"{out}/demo.json is damaged" in result.stderr and f"remove {out} to" in result.stderr
    (out / "demo.json").unlink()
    work.mkdir()
    for text in ("", "[]"):
        (work / "settings.json").write_text(text)
        assert f"{work}/settings.json is damaged" in run(out, corpus).stderr
    settings = json.loads((trained / "demo.json").read_text())["settings"]
    (work / "settings.json").write_text(json.dumps(settings))
    (work / "start").mkdir()
    (work / "start/config.json").write_text("junk")
    result = run(out, corpus)
    assert result.status == 1 and f"{work}/start" in result.stderr and "not a valid JSON" in result.stderr


def test_interrupted_while_it_imports(tmp_path, corpus):
    (tmp_path / "numpy.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments(tmp_path / "hf", corpus)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SCRIPT.parents[1])])},
        preexec_fn=heed_interrupts,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; run the same command again" in errors
    assert "Traceback" not in errors and not (tmp_path / "hf").exists()
