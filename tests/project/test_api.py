"""What `import sherry_gguf` gives."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ENV

import sherry_gguf

REPO = Path(__file__).parents[2]


def test_the_import_needs_nothing(tmp_path):
    code = "import sys, sherry_gguf; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "sherry_gguf" in done.stdout.split()
    assert not {"numpy", "gguf", "cffi", "_cffi_backend", "torch", "transformers", "tqdm"} & set(done.stdout.split())


def test_every_name_is_there_and_documented():
    assert sorted(sherry_gguf.__all__) == sorted(set(sherry_gguf.__all__)) and set(sherry_gguf.__all__) <= set(dir(sherry_gguf))
    assert all(re.fullmatch("__.*__", name) for name in set(dir(sherry_gguf)) - set(sherry_gguf.__all__))
    for name in sherry_gguf.__all__:
        assert getattr(sherry_gguf, name) is not None
        assert re.search(rf"\b{name}\b", sherry_gguf.__doc__) or name in ("__version__", "kernels", "llama_cpp"), name
    for module, name in re.findall(r"^    (\w+)\.(\w+)  ", sherry_gguf.__doc__, re.M):
        assert callable(getattr(getattr(sherry_gguf, module), name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sherry_gguf.nothing  # noqa: B018
    assert (REPO / "sherry_gguf/py.typed").is_file()


def test_the_version_is_pyprojects():
    assert f'\nversion = "{sherry_gguf.__version__}"\n' in (REPO / "pyproject.toml").read_text()


@pytest.mark.parametrize("kind", [sherry_gguf.TQ1_25, sherry_gguf.TQ1_25_64, sherry_gguf.STQ1_0], ids=lambda kind: kind.name)
def test_kernels_and_reference_agree(kind):
    x = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    packed = sherry_gguf.quantize(x, kind=kind)
    assert np.array_equal(packed, kind.quantize(x)) and np.array_equal(sherry_gguf.dequantize(packed, kind), kind.dequantize(packed))


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(sherry_gguf.QuantizeError(3, "a cause")))
    assert (error.row, error.cause, str(error)) == (3, "a cause", "row 3: a cause")
