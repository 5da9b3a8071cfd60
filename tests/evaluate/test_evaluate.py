"""sherry-gguf evaluate: a checkpoint and its GGUFs give the same figures, and failures are reported."""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import small_models
import torch
from conftest import ENV
from evaluation_support import (
    DATA,
    DATA_ARGS,
    DOCUMENTS,
    EXACT,
    EXACT_NATS,
    F32_NATS,
    REPO,
    TERNARY_NATS,
    TEXT,
    accuracies,
    ask,
    children,
    local_task,
    our_documents,
    report_of,
    run,
    state,
)

from sherry_gguf.evaluation import command, comparison
from sherry_gguf.evaluation.command import PAPER
from sherry_gguf.evaluation.models import GgufLM, load, open_lm
from sherry_gguf.evaluation.scoring import scorer
from sherry_gguf.evaluation.tasks import load as load_tasks
from sherry_gguf.evaluation.tasks import measure

pytest_plugins = "evaluation_fixtures"
pytestmark = pytest.mark.usefixtures("offline")

SCRIPT = REPO / "scripts" / "evaluate.py"

# ---- the same figures ----


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_llama_cpp_gives_pytorchs_numbers(models, kind):
    """Every kind of request, on difficult text: no context, BOS in the text, characters of several tokens, too many tokens."""
    hf, f32, _ = models[kind]
    model, tokenizer = load(hf, "cpu", "float32")
    long = TEXT.read_text()[:3000]
    pairs = [("", "hello world"), ("a ", "𝕏 é 漢字"), (f"{tokenizer.bos_token}hi", " there"), (long, long[:100]),
             ("b", "☃")]  # fmt: skip
    texts = [long, "one — two ☃", "x"]
    prompts = [("def read(self", {"until": ["\n\n"], "max_gen_toks": 24}),
              # transformers and llama.cpp decode mixed ASCII and other byte tokens to different numbers of �: this prompt has none
              ("else:", {"until": ["None", "g"], "max_gen_toks": 40}),
              (long, {"until": [], "max_gen_toks": 8, "do_sample": False})]  # fmt: skip

    def answers(lm):
        return (
            lm.loglikelihood([ask("loglikelihood", *p) for p in pairs], disable_tqdm=True),
            lm.loglikelihood_rolling([ask("loglikelihood_rolling", t) for t in texts], disable_tqdm=True),
            lm.generate_until([ask("generate_until", *w) for w in prompts], disable_tqdm=True),
        )

    tasks, _ = load_tasks(PAPER, None, 0, DATA)
    with open_lm(hf, (model, tokenizer), argparse.Namespace(max_length=2048, batch_size=2)) as wanted:
        scores, totals, generated = answers(wanted)
        measured = {name: measure(wanted, name, task, None) for name, task in tasks.items()}
    with scorer(f32, 2049, 1, exact=True) as loaded:
        lm = GgufLM(f32, loaded, 2048, 2, 1, *EXACT)
        got = answers(lm)
        again = {name: measure(lm, name, task, None) for name, task in tasks.items()}
        assert (lm.prefix_token_id, lm.eot_token_id) == (wanted.prefix_token_id, wanted.eot_token_id)
    assert lm.requests == wanted.requests and len(lm.requests) == len(pairs) + 112 and lm.truncated == wanted.truncated == 1
    assert lm.max_length == wanted.max_length == 255
    assert [s[0] for s in got[0]] == pytest.approx([s[0] for s in scores], abs=EXACT_NATS)
    assert [s[1] for s in got[0]] == [s[1] for s in scores]
    assert got[1] == pytest.approx(totals, rel=1e-6)
    assert got[2] == generated
    for name in PAPER:
        assert accuracies(again[name]) == accuracies(measured[name]) != {}
        assert sum(again[name]["choices"], []) == pytest.approx(sum(measured[name]["choices"], []), abs=EXACT_NATS)


def test_what_is_greedy(models):
    """The greedy continuation is recognized, and one that differs in its last token is not."""
    hf, f32, _ = models["spm"]
    model, tokenizer = load(hf, "cpu", "float32")
    prompt = tokenizer.encode("def read(self")
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :].tolist()
    with scorer(f32, 129, 1, exact=True) as loaded:
        lm = GgufLM(f32, loaded, 128, 1, 1)
        requests = [(None, prompt, a) for a in (answer, answer[:-1] + [answer[-1] ^ 1])]
        assert [greedy for _, greedy in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_tasks_side_by_side(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLAMA_API_KEY", "secret")  # for another server of the user's
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")
    hf, f32, ternary = models["spm"]
    code, report = report_of(tmp_path / "r.json", hf, f32, ternary, *DATA_ARGS)
    out = capsys.readouterr().out
    assert code == 0 and not report["missing"]
    wanted, *others = report["models"]
    for name in PAPER:
        assert wanted["tasks"][name]["documents"] == DOCUMENTS[name]
        assert 0 <= wanted["tasks"][name]["acc"] <= 1
        assert ("acc_norm" in wanted["tasks"][name]) == (name != "winogrande")
    for other, allowed in zip(others, (F32_NATS, TERNARY_NATS)):
        for name in PAPER:
            x, y = wanted["tasks"][name], other["tasks"][name]
            assert [len(c) for c in x["choices"]] == [len(c) for c in y["choices"]]
            worst = max(abs(u - v) for p, q in zip(x["choices"], y["choices"]) for u, v in zip(p, q))
            assert 0 < worst < allowed
            gaps = (sorted(c)[-1] - sorted(c)[-2] for c in x["choices"])  # if it is small, another choice may be the likeliest
            assert abs(x["acc"] - y["acc"]) <= sum(gap < 2 * worst for gap in gaps) / DOCUMENTS[name]
    assert [c["documents"] for c in report["compared"]] == [38, 38]
    assert all(c["same_choice"] > 0.9 and "tokens" not in c for c in report["compared"])
    means = (f"{20 * sum(t['acc'] for t in m['tasks'].values()):.2f} % ± "
             f"{20 * math.hypot(*(t['acc_stderr'] for t in m['tasks'].values())):.2f}" for m in report["models"])  # fmt: skip
    assert re.search(rf"^mean of 5 +acc +{' +'.join(means)}$", out, re.M)
    assert re.search(r"^winogrande +10 +acc ", out, re.M) and "against spm: the same choice in " in out


def test_accuracy_is_that_of_the_likeliest_choice(models, tmp_path):
    """lm-eval's accuracy, recomputed from the log-likelihoods and our data."""
    code, report = report_of(tmp_path / "r.json", models["bpe"][2], *DATA_ARGS)
    data = our_documents()
    right = {
        "piqa": lambda d: d["label"],
        "arc_easy": lambda d: d["choices"]["label"].index(d["answerKey"]),
        "arc_challenge": lambda d: d["choices"]["label"].index(d["answerKey"]),
        "hellaswag": lambda d: int(d["label"]),
        "winogrande": lambda d: int(d["answer"]) - 1,
    }
    assert code == 0
    for name, task in report["models"][0]["tasks"].items():
        hits = [c.index(max(c)) == right[name](d) for c, d in zip(task["choices"], data[name], strict=True)]
        assert task["acc"] == pytest.approx(sum(hits) / len(hits))


def test_few_documents(models, tmp_path):
    """Their choices score as among all documents."""
    args = [models["spm"][1], *DATA_ARGS]
    few, many = (report_of(tmp_path / f"{n}.json", *args, "--limit", n)[1]["models"][0]["tasks"] for n in (3, 100))
    for name in PAPER:
        assert (few[name]["documents"], many[name]["documents"]) == (3, DOCUMENTS[name])
        flat = [sum(task[name]["choices"][:3], []) for task in (few, many)]
        assert flat[0] == pytest.approx(flat[1], abs=2e-3)  # measured: 4e-4, from sums in another order


def test_examples_before_the_question(models, tmp_path):
    args = [models["spm"][0], models["spm"][1], *DATA_ARGS, "--tasks", "piqa"]
    code, report = report_of(tmp_path / "r.json", *args, "--num-fewshot", 2, "--limit", 4)
    assert code == 0 and not any("tokens" in c for c in report["compared"])
    first, second = (m["tasks"]["piqa"]["choices"] for m in report["models"])
    assert sum(first, []) == pytest.approx(sum(second, []), abs=F32_NATS)


def test_different_tokens_are_reported(models, tmp_path, capsys):
    """With two tokenizers the figures are reported with a warning, and losses are compared per byte."""
    code, report = report_of(tmp_path / "r.json", models["spm"][1], models["bpe"][1], "--text", TEXT, "--chunks", 2,
                             "--tasks", "piqa", *DATA_ARGS, "--limit", 2)  # fmt: skip
    assert code == 0
    assert re.fullmatch(r"4 of 4 requests, such as '.*'; the text has \d+ and \d+ tokens, which differ from number 0 on",
                        report["compared"][0]["tokens"])  # fmt: skip
    out, err = capsys.readouterr()
    one, other = models["spm"][1], models["bpe"][1]
    before = err[: err.index(f"sherry-gguf evaluate: {one}: ")]  # any measuring
    for what in "the text", "4 of 4 samples of the tasks, such as '.*',":
        words = rf"DIFFERENT TOKENS: {other} splits {what} otherwise than {one}: \d+ tokens, not \d+; from number 1 on \[.*\], not \[1, "
        assert re.search(words, before)
    assert re.search(rf"the text: \d\.\d\d bytes a token by {one}\n", before) and "alike" not in err
    first, second = (m["text"] for m in report["models"])
    assert report["compared"][0]["text"] == pytest.approx(second["nats_per_byte"] / first["nats_per_byte"] - 1)
    assert re.search(r"loss on the text \S+ % per byte; DIFFERENT TOKENS", out) and "times as many tokens" not in err


def test_different_answers_are_listed(models, tmp_path, capsys):
    """In the report, all of them with both models' scores; on the terminal, the first few."""
    code, report = report_of(tmp_path / "r.json", models["spm"][0], models["bpe"][0], *DATA_ARGS)
    compared, tasks = report["compared"][0], [m["tasks"] for m in report["models"]]
    wanted = []
    for name in PAPER:
        for n, scores in enumerate(zip(*(t[name]["choices"] for t in tasks), strict=True)):
            chosen = [s.index(max(s)) for s in scores]
            if chosen[0] != chosen[1]:
                wanted.append({"task": name, "document": n, "choices": chosen, "scores": list(scores)})
    assert code == 0 and compared["differing"] == wanted and len(wanted) > 5
    assert compared["same_choice"] == pytest.approx(1 - len(wanted) / compared["documents"])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(f"different answers: {len(wanted)}; the first 5:")
    same = 38 - len(wanted)
    assert re.match(rf"bpe against spm: the same choice in {same} of 38 documents \(\d+\.\d\d %\), log-likelihoods ", lines[at - 1])
    assert lines[at + 1].split() == ["task", "document", "spm", "bpe"] and len(lines) == at + 2 + 5
    for line, d in zip(lines[at + 2 :], wanted):
        (x, y), (ours, theirs) = d["scores"], d["choices"]
        shown = f"{ours}: {x[ours]:.3f} > {x[theirs]:.3f} {theirs}: {y[theirs]:.3f} > {y[ours]:.3f}"
        assert line.split() == [d["task"], str(d["document"]), *shown.split()]


def test_one_different_answer_is_not_rounded_away():
    """Of 30000 answers, all but one are 100.00 %, but not all."""
    choices = [[-1.0, -2.0]] * 30000
    for other, shown in (
        ([*choices[1:], [-2.0, -1.0]], "29999 of 30000 documents (99.99 %)"),
        (choices, "30000 of 30000 documents (100.00 %)"),
    ):
        models = [{"model": name, "tasks": {"piqa": {"documents": 30000, "choices": c}}} for name, c in (("a", choices), ("b", other))]
        compared = comparison.compare(models, [comparison.Inputs(), comparison.Inputs()], 1)
        lines = list(comparison.summary({"models": models, "missing": {}, "compared": [compared]}))
        assert any(line.startswith(f"b against a: the same choice in {shown}, log-likelihoods ") for line in lines), lines


# ---- failures ----


@pytest.mark.parametrize(
    "args, message",
    [
        (["{tmp}/none"], "{tmp}/none: no such file or directory; name a Hugging Face directory"),
        (["{tmp}"], "{tmp}: not a Hugging Face checkpoint: it has no config.json"),
        (["{gguf}", "--text", "{tmp}/none"], "--text {tmp}/none: No such file or directory"),
        (["{gguf}", "--text", "{gguf}"], "--text {gguf}: byte "),
        (["{gguf}", "--include-path", "{tmp}/none"], "--include-path {tmp}/none: no such directory"),
        (["{gguf}", "--data", "{tmp}/none"], "--data {tmp}/none: no such directory"),
        (["{gguf}", "--output", "{tmp}/none/r.json", *DATA_ARGS], "--output {tmp}/none/r.json: No such file"),
        (["{gguf}", "--output", "{tmp}", *DATA_ARGS], "--output {tmp} is a directory; name a file"),
        (["{gguf}", "--output", "{gguf}", *DATA_ARGS], "--output {gguf} is also an input; name another file"),
        (["{gguf}", "--text", "{text}", "--output", "{text}"], "--output {text} is also an input"),
    ],
)  # fmt: skip
def test_bad_arguments(models, tmp_path, capsys, args, message):
    names = {"tmp": tmp_path, "gguf": tmp_path / "m.gguf", "text": tmp_path / "text.txt"}
    for path, original in (names["gguf"], models["spm"][2]), (names["text"], TEXT):
        shutil.copy(original, path)
    assert run(*(a.format(**names) for a in args)) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sherry-gguf evaluate: " + message.format(**names)) and err.count("\n") == 1


@pytest.mark.parametrize("args, message", [(["--batch-size", "0"], "invalid positive number value: '0'"),
                                           (["--tasks", ","], "name at least one task"),
                                           (["--num-fewshot", "-1"], "cannot be negative"),
                                           (["--context", "3"], "use at least 4 tokens")])  # fmt: skip
def test_wrong_arguments(capsys, args, message):
    with pytest.raises(SystemExit) as e:
        command.parse(["model", *args], "evaluate")
    assert e.value.code == 2 and message in capsys.readouterr().err


def broken(path, source, how):
    data = source.read_bytes()
    path.write_bytes({"empty": b"", "other": b"no model\n" * 100, "cut": data[: len(data) // 2]}[how])
    return path


@pytest.mark.parametrize("how, words", [("empty", "failed to read magic"),
                                        ("other", "invalid magic characters: 'no m'"),
                                        ("cut", "data is not within the file bounds")])  # fmt: skip
@pytest.mark.parametrize("what", ["tasks", "text"])
def test_a_broken_gguf(models, tmp_path, capsys, how, words, what):
    """llama.cpp's own message is shown, and the other model is still measured."""
    gguf = broken(tmp_path / "broken.gguf", models["spm"][2], how)
    more = {"text": ["--text", TEXT, "--chunks", 2], "tasks": [*DATA_ARGS, "--tasks", "arc_easy", "--limit", 1]}
    code, report = report_of(tmp_path / "r.json", gguf, models["spm"][2], *more[what])
    err = capsys.readouterr().err
    assert code == 1 and "Traceback" not in err
    assert re.search(rf"^sherry-gguf evaluate: {gguf}: llama.cpp refuses the vocabulary: .*{words}", err, re.M)
    assert "error" in report["models"][0] and "error" not in report["models"][1]
    assert report["models"][1]["tasks"] or report["models"][1]["text"]


def test_a_checkpoint_that_lacks_a_tensor(models, tmp_path, capsys):
    """transformers would fill it with random values."""
    shutil.copytree(models["spm"][0], tmp_path / "hf")
    small_models.edit_weights(tmp_path / "hf", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert run(tmp_path / "hf", "--text", TEXT) == 1
    assert "lacks 1 of its model's tensors, such as model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read(models, tmp_path, capsys):
    shutil.copytree(models["spm"][0], tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\0" * 100)
    assert run(tmp_path / "hf", "--text", TEXT) == 1
    err = capsys.readouterr().err
    assert "hf: transformers cannot load it: " in err and "Traceback" not in err


def test_latent_weights_are_reported(models, tmp_path, capsys):
    shutil.copytree(models["spm"][0], tmp_path / "hf")
    small_models.edit_config(tmp_path / "hf", sherry_config={"weights": "latent"})
    assert run(tmp_path / "hf", "--text", TEXT, "--chunks", 1) == 0
    assert "PyTorch runs its latent weights unquantized" in capsys.readouterr().err


def test_llama_cpp_is_not_built(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SHERRY_BUILD_DIR", str(tmp_path))
    assert run(models["spm"][2], *DATA_ARGS, "--limit", 1) == 1
    assert f"{tmp_path}/lib/libllama.so is not there: run scripts/build_llama_cpp.py" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interruption_leaves_no_process(models, tmp_path, number, code):
    """Even if the script is killed in the middle of a task."""
    documents = our_documents()["piqa"]
    rows = (d | {"goal": f"{i} {d['goal']}"} for i in range(400) for d in documents)
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    local_task(tmp_path, "many", tmp_path / "many.jsonl")
    command = [sys.executable, SCRIPT, models["spm"][2], "--include-path", tmp_path, "--tasks", "many", "--threads=1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=ENV | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip  # ignored in a shell's background jobs
    err = b""
    while b"Running loglikelihood" not in err:
        err += (part := os.read(process.stderr.fileno(), 1 << 16))
        assert part, err.decode()
    (scorer,) = children(process.pid)
    process.send_signal(number)
    rest = process.communicate(timeout=30)[1].decode()
    assert process.returncode == code and "Traceback" not in rest
    assert number == signal.SIGKILL or rest.endswith("evaluate.py: interrupted\n")
    gone = (None, "Z") if number == signal.SIGKILL else (None,)  # killed, the script cannot reap it
    until = time.monotonic() + 10
    while state(scorer) not in gone and time.monotonic() < until:
        time.sleep(0.05)
    assert state(scorer) in gone


def test_help_and_wrong_arguments_come_at_once():
    for args, code in (["--help"], 0), (["model", "--limit", "0"], 2):
        command = [sys.executable, "-X", "importtime", SCRIPT, *args]
        result = subprocess.run(command, capture_output=True, text=True, env=ENV)
        imported = set(re.findall(r"\| +(\w+)$", result.stderr, re.M))
        assert result.returncode == code and "argparse" in imported and imported.isdisjoint({"torch", "lm_eval", "transformers"})


def test_an_interruption_while_imports_run():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", SCRIPT, "model"],
        stderr=subprocess.PIPE,
        env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    err = b""
    while b" torch._utils" not in err:
        err += (part := os.read(process.stderr.fileno(), 1 << 16))
        assert part, err.decode()
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130 and err.endswith("evaluate.py: interrupted\n") and "Traceback" not in err
