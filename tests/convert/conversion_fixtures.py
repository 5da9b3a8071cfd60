"""A pytest plugin for the tests of conversions that fail."""

import shutil

import pytest
import small_models
from conftest import sherry


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small_models.make(tmp_path_factory.mktemp("good") / "m", "llama")


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


@pytest.fixture
def fails(tmp_path):
    """Convert, which must fail with a message that holds all `says`, and leave every file as it was."""
    target = tmp_path / "out.gguf"
    target.write_bytes(b"an older target")

    def check(*args, says, code=1, **kwargs):
        before = small_models.snapshot(tmp_path)
        done = sherry("convert", *args, *([] if "--outfile" in args else ["--outfile", target]), **kwargs)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        for text in says:
            assert text in done.stderr, done.stderr
        assert small_models.snapshot(tmp_path) == before
        return done

    return check
