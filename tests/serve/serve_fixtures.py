"""A pytest plugin: a small model to serve."""

import pytest
import small_models
from conftest import sherry


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model's GGUF, with room for 4096 tokens."""
    root = tmp_path_factory.mktemp("tiny")
    small_models.make(root / "hf", "llama", config={"max_position_embeddings": 4096})
    done = sherry("convert", root / "hf", "--outfile", root / "tiny.gguf", "--require-exact")
    assert done.returncode == 0, done.stderr
    return root / "tiny.gguf"
