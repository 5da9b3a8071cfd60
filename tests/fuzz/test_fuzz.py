"""Each fuzzer runs for a minute and a half from the stored corpus; scripts/fuzz.py --seconds 3600 is the long run."""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_seeds
import pytest

REPO = Path(__file__).parents[2]
CORPUS = REPO / "tests" / "fuzz" / "corpus"


def test_the_corpus_has_the_seeds(tmp_path):
    stored = {p.read_bytes() for p in CORPUS.iterdir()}
    assert all(p.read_bytes() in stored for p in fuzz_seeds.write(tmp_path)), "run python tests/fuzz/fuzz_seeds.py tests/fuzz/corpus"


@pytest.mark.parametrize("death", ["kill -9 $$", "exit 3"])
def test_a_target_that_dies_silently_is_a_failure(tmp_path, death):
    with pytest.raises(fuzz.Stop, match="readers ended with -?\\d and left no input that shows why"):
        fuzz.fuzz("readers", ["sh", "-c", f"echo '#1000 cov: 5'; {death}"], tmp_path, argparse.Namespace(seconds=5, keep=None))


NO_CLANG = pytest.mark.skipif(not shutil.which("clang++"), reason="clang is missing: apt-get install clang")
NO_ATHERIS = pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="Atheris has no wheel for this platform")


@pytest.mark.fuzz
@pytest.mark.parametrize("target", [pytest.param("loader", marks=NO_CLANG), pytest.param("readers", marks=NO_ATHERIS)])
def test_nothing_is_found(target):
    result = subprocess.run([sys.executable, REPO / "scripts" / "fuzz.py", target, "--seconds", "90"], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    tried = re.search(rf"{target}: (\d+) inputs in \d+ s, (\d+) edges", result.stdout)
    assert int(tried[1]) > {"loader": 5000, "readers": 500}[target] and int(tried[2]) > {"loader": 10000, "readers": 300}[target], (
        result.stdout
    )
