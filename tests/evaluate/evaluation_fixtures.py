"""A pytest plugin for the tests of the evaluation: small models as checkpoints and GGUFs, and an offline hub."""

import datasets
import huggingface_hub
import pytest
import small_models
import torch
import transformers
from conftest import UPSTREAM, pre, python, sherry
from evaluation_support import REPO


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Checkpoint, upstream's F32 GGUF and our GGUF, by tokenizer: spm adds BOS, bpe does not."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for kind, name in ("spm", "llama"), ("bpe", "llama-bpe"):
        found[kind] = (small_models.make(root / kind, name), root / f"{kind}.f32.gguf", root / f"{kind}.gguf")
    upstream = python(UPSTREAM, *(hf for hf, _, _ in found.values()))
    for kind, name in ("spm", "llama"), ("bpe", "llama-bpe"):
        result = sherry("convert", found[kind][0], "--outfile", found[kind][2], *pre(name))
        assert result.returncode == 0, result.stderr
    output, _ = upstream.communicate()
    assert upstream.returncode == 0, output
    return found


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    """An empty cache and an unreachable hub; afterwards, the process as it was before a run."""
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    huggingface_hub.utils.reset_sessions()
