"""The process that scores tokens: shared beginnings change nothing, whatever a model's memory; its failures are reported."""

import os
import random
import re

import gguf
import numpy as np
import pytest
import small_models
from evaluation_support import DATA_ARGS, EXACT_NATS, report_of, run, state

from sherry_gguf import llama_cpp, llama_scorer
from sherry_gguf.errors import Stop
from sherry_gguf.evaluation.scoring import scorer

pytest_plugins = "evaluation_fixtures"

FACTS = {"header": str(llama_cpp.source_dir() / "include" / "llama.h"), "library": str(llama_cpp.library("llama")),
         "ggml": str(llama_cpp.library("ggml")), "backends": str(llama_cpp.library("llama").parent)}  # fmt: skip


def some_requests():
    """Questions with several answers; answers that are equal, begin alike or are part of another; a token alone."""
    rng = random.Random(0)
    tokens = lambda n: [rng.randrange(3, small_models.VOCAB) for _ in range(n)]
    examples, found = tokens(20), []
    for _ in range(30):
        question, answer = examples + tokens(rng.randrange(1, 9)), tokens(4)
        for end in answer[:1], answer, answer, answer[:2] + tokens(3), tokens(1), tokens(9):
            found.append((question + end, len(end)))
    found += [([7, token], 1) for token in range(3, 80)] + [(examples[:5], 4), (examples, 0), (examples[:1], 0)]
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("name", small_models.MODELS)
def test_shared_beginnings_change_nothing(zoo, name):
    """Attention, sliding windows, experts, latent attention, recurrent states: as if each request were the only one."""
    requests = some_requests()
    with scorer(zoo[0] / f"{name}.f32.gguf", 64, 1, exact=True) as loaded:
        parts = []
        together = loaded.score(requests, parts.append)
        alone = [loaded.score([request])[0] for request in requests]
    assert sorted(i for part in parts for i, _, _ in part) == list(range(len(requests))) and 1 < len(parts) < len(requests) / 8
    # Measured: 6e-6. gptoss has experts in MXFP4, whose inputs llama.cpp rounds to 8 bits: another order of float sums can tip a few
    # over an edge (AVX2: one of 260, by 1.0e-4 nats).
    far = [abs(a - b) for (a, _), (b, _) in zip(together, alone, strict=True) if a != pytest.approx(b, rel=1e-5)]
    assert not far or (name == "gptoss" and len(far) <= 3 and max(far) < EXACT_NATS), far
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert all(logprob == 0 and greedy for (_, n), (logprob, greedy) in zip(requests, together) if n == 0)


def test_small_batches(models, monkeypatch):
    """A request of several batches, few sequences at a time, and few tokens with logits in a batch."""
    requests, gguf_file = some_requests(), str(models["spm"][1])
    with scorer(gguf_file, 64, 1, exact=True) as loaded:
        wanted = loaded.score(requests)
    for name, value in ("BATCH", 7), ("SEQUENCES", 3), ("LOGITS", 0):
        monkeypatch.setattr(llama_scorer, name, value)
    small = llama_scorer.Scorer(gguf_file, **FACTS, length=64, threads=1, exact=True)
    parts = list(small.score(requests))
    small.close()
    got = {i: (logprob, greedy) for part in parts for i, logprob, greedy in part}
    assert max(map(len, parts)) == 3
    assert [got[i][0] for i in range(len(requests))] == pytest.approx([logprob for logprob, _ in wanted], abs=EXACT_NATS)
    assert [got[i][1] for i in range(len(requests))] == [greedy for _, greedy in wanted]


def test_a_tree():
    """Shared tokens once; a sequence's last token only as a target; batches end at either limit."""
    tree = llama_scorer.Tree()
    assert tree.nodes_with([1, 2, 3]) == 3
    tree.add(0, [1, 2, 3, 4], 2)
    assert tree.nodes_with([1, 2, 5]) == 4 and tree.nodes_with([1, 2]) == 3
    tree.add(1, [1, 2, 3, 9], 1)
    tree.add(2, [1, 2, 5, 6], 1)
    tree.add(3, [7, 8], 1)
    assert tree.tokens == [1, 2, 3, 5, 7] and tree.positions == [0, 1, 2, 2, 0]
    assert tree.sequences == [[0, 1, 2], [0, 1, 2], [0, 1], [2], [3]]
    assert tree.targets == {1: [(0, 3)], 2: [(0, 4), (1, 9)], 3: [(2, 6)], 4: [(3, 8)]}
    apart = llama_scorer.Tree(share=False)
    for i in range(2):
        apart.add(i, [1, 2, 3], 1)
    assert apart.tokens == [1, 2, 1, 2] and apart.sequences == [[0], [0], [1], [1]] and apart.targets == {1: [(0, 3)], 3: [(1, 3)]}
    assert list(tree.batches(10, 10)) == [range(5)] and list(tree.batches(2, 10)) == [range(2), range(2, 4), range(4, 5)]
    assert list(tree.batches(10, 2)) == [range(3), range(3, 5)] and not list(llama_scorer.Tree().batches(2, 2))


# ---- failures ----


def changed(source, path, name, value):
    """A copy of a GGUF with one value of a tensor replaced."""
    path.write_bytes(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == name)
    tensor.data.reshape(-1)[3] = value
    return path


def test_probabilities_that_are_not_numbers(models, tmp_path, capsys):
    path = changed(models["spm"][1], tmp_path / "nan.gguf", "output_norm.weight", np.nan)
    code, report = report_of(tmp_path / "r.json", path, *DATA_ARGS, "--tasks", "piqa")
    assert code == 1 and report["models"][0] == {"model": str(path), "tasks": {}, "error": "the model's probabilities are not numbers"}
    assert f"{path}: the model's probabilities are not numbers\n" in capsys.readouterr().err


def test_a_file_that_lacks_a_tensor(models, tmp_path, capsys):
    """Its vocabulary is whole."""
    path, name = tmp_path / "lacks.gguf", b"blk.1.ffn_up.weight"
    path.write_bytes(models["spm"][2].read_bytes().replace(name, name.replace(b"up", b"us")))
    assert run(path, *DATA_ARGS, "--tasks", "piqa") == 1
    assert re.search(rf"^sherry-gguf evaluate: {path}: llama.cpp refuses the model: .*'blk.1.ffn_up.weight'", capsys.readouterr().err, re.M)


def test_a_request_that_does_not_fit(models):
    with scorer(models["spm"][2], 64, 1) as loaded:
        with pytest.raises(Stop, match="a request has 600 tokens, and the cache holds 512"):
            loaded.score([([5] * 600, 1)])


def test_a_dead_process_is_reported(models):
    with scorer(models["spm"][2], 64, 1) as loaded:
        assert os.getpgid(loaded.process.pid) == loaded.process.pid != os.getpgid(0)
        assert loaded.tokenize(["a"], special=True)[0][0] == loaded.bos == 1 and loaded.bos_text == "<s>"
        loaded.process.kill()
        with pytest.raises(Stop, match=r"llama.cpp ended: no error message \(signal 9\)"):
            loaded.score([([1, 2], 1)])
    assert state(loaded.process.pid) is None


def test_a_token_that_does_not_exist(models):
    with scorer(models["spm"][2], 64, 1) as loaded, pytest.raises(Stop, match="llama_decode returns -1: .*invalid token"):
        loaded.score([([1, small_models.VOCAB + 5, 3], 1)])
