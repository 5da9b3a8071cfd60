"""What happens to other packages when this one is imported."""

import importlib
import subprocess
import sys

import pytest
from conftest import ENV

from sherry_gguf import plugins


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A package that calls no one, and the list of what was done with it; `gguf_type.register` stands for what is done."""
    done = []
    (tmp_path / "other_package").mkdir()
    (tmp_path / "other_package/__init__.py").write_text("ready = True\n")
    (tmp_path / "other_package/inner.py").write_text("from . import ready\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, plugins._Finder)])
    monkeypatch.setattr(plugins, "PLUGINS", {"other_package": "gguf_type:register", "other_package.inner": "gguf_type:register"})
    monkeypatch.setattr("sherry_gguf.gguf_type.register", lambda: done.append(getattr(sys.modules["other_package"], "ready", False)))
    yield done
    for name in "other_package", "other_package.inner":
        sys.modules.pop(name, None)


def test_after_a_later_import(other):
    plugins.install()
    plugins.install()
    assert not other
    module = importlib.import_module("other_package")
    assert other == [True] and module.__spec__.loader.get_source("other_package") == "ready = True\n"
    importlib.import_module("other_package.inner")
    importlib.import_module("other_package")
    assert other == [True, True]


def test_after_an_earlier_import(other):
    importlib.import_module("other_package")
    assert not other
    plugins.install()
    assert other == [True]


def test_a_package_that_fails_can_be_imported_again(other, tmp_path):
    plugins.install()
    path = tmp_path / "other_package/__init__.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("other_package")
    path.write_text("ready = True  # now\n")
    importlib.import_module("other_package")
    assert other == [True]
    (tmp_path / "other_package/inner.py").unlink()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("other_package.inner")


@pytest.mark.parametrize("first, second", [("sherry_gguf", "gguf"), ("gguf", "sherry_gguf")])
def test_gguf_knows_the_types(first, second):
    code = f"import {first}, {second}; print(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.TQ1_25])"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "(128, 22)\n", done.stderr


def test_transformers_knows_packed_checkpoints():
    code = "import transformers.quantizers.auto as auto, sherry_gguf; print(auto.AUTO_QUANTIZER_MAPPING['sherry'])"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "<class 'sherry_gguf.packed.quantizer.SherryQuantizer'>\n", done.stderr


def test_a_package_of_another_version_can_be_imported(other, monkeypatch):
    def refuse():
        raise AttributeError("there is no such enum")

    monkeypatch.setattr("sherry_gguf.gguf_type.register", refuse)
    plugins.install()
    with pytest.warns(UserWarning, match="sherry_gguf is not registered with other_package, which does not fit: there is no such enum"):
        assert importlib.import_module("other_package").ready


def test_a_second_import_of_this_package():
    code = """if True:
        import importlib, sys, sherry_gguf, transformers.quantizers.auto as auto
        first = auto.AUTO_QUANTIZER_MAPPING["sherry"]
        for name in [name for name in sys.modules if name.startswith("sherry_gguf")]:
            del sys.modules[name]
        import sherry_gguf
        assert auto.AUTO_QUANTIZER_MAPPING["sherry"] is not first
        assert "sherry" in importlib.reload(auto).AUTO_QUANTIZER_MAPPING
        print(sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path))"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_transformers_without_pytorch():
    code = "import sys; sys.modules['torch'] = None; import sherry_gguf, transformers.quantizers as q; print(q.__name__)"
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout == "transformers.quantizers\n", done.stderr
