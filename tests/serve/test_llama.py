"""sherry_gguf.Llama: llama-cpp-python's class on our libraries, or words why not. examples/llama.py shows what it does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENV

from sherry_gguf import llama_cpp, llama_cpp_python
from sherry_gguf.evaluation import tools

UPSTREAM = Path(__file__).parents[2] / "ggml_patch" / "UPSTREAM"


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=ENV | env, capture_output=True, text=True)


def refused(code: str, **env: str) -> str:
    """The last line that this code ends with, an error."""
    done = python(code, **env)
    assert done.returncode == 1 and not done.stdout, done
    return done.stderr.splitlines()[-1]


def test_the_version_is_the_pins():
    assert f"\nversion = {llama_cpp_python.VERSION}\n" in UPSTREAM.read_text()
    import llama_cpp as package

    assert package.__version__ == llama_cpp_python.VERSION and llama_cpp_python.Llama is package.Llama


def test_its_text_is_llama_servers(tiny):
    with tools.serve(tiny, 1, 128, 1, "-fa", "off") as server:  # as it is there
        wanted = server.ask("POST", "/completion", prompt="def read", n_predict=24, temperature=0)["content"]
    code = f"""
from sherry_gguf import Llama
model = Llama({str(tiny)!r}, n_ctx=128, n_threads=1, verbose=False)
import json; print(json.dumps(model("def read", max_tokens=24, temperature=0.0)["choices"][0]["text"]))
"""
    said = json.loads(python(code, LLAMA_CPP_LIB_PATH="/nowhere").stdout)
    assert said == wanted.replace("\N{REPLACEMENT CHARACTER}", "")  # it leaves out broken characters
    assert len(said) > 10


def test_other_libraries_are_refused(tmp_path):
    """The package was imported with a copy of the libraries, which stand for others."""
    for file in llama_cpp.library("llama").parent.glob("*.so*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    said = refused("import llama_cpp; import sherry_gguf; sherry_gguf.Llama", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert said.startswith("ImportError: llama_cpp was imported before with ") and f"{tmp_path}/libllama.so" in said


@pytest.mark.parametrize(
    "found, says",
    [
        ("raise metadata.PackageNotFoundError", "ModuleNotFoundError: llama-cpp-python is not installed: "),
        ("return '0.3.35'", r"ImportError: llama-cpp-python 0\.3\.35 does not fit /.*libllama\.so: "),
    ],
)
def test_another_version_or_none_is_refused(found, says):
    code = f"""
from importlib import metadata
def version(name):
    {found}
metadata.version = version
from sherry_gguf import Llama
"""
    said = refused(code)
    assert re.match(says, said) and said.endswith(f"pip install --no-cache-dir llama-cpp-python=={llama_cpp_python.VERSION}"), said


def test_libraries_that_are_not_built(tmp_path):
    said = refused("from sherry_gguf import Llama", SHERRY_BUILD_DIR=str(tmp_path))
    assert re.search(rf"NotBuilt: {tmp_path}/.*libllama.so is not there: ", said)


def test_the_other_names_do_not_hinder(tmp_path):
    """The package imports nothing of llama_cpp until Llama is asked for, and `import *` never does."""
    code = "from sherry_gguf import *\nimport sys, sherry_gguf; assert 'Llama' not in dir(sherry_gguf) and 'llama_cpp' not in sys.modules"
    assert python(code).returncode == 0
