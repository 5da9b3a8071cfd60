"""scripts/build_llama_cpp: what it says when it cannot go on, and that it does nothing twice."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf import llama_cpp

REPO = Path(__file__).parent.parent
PATCH = (REPO / "ggml_patch" / "hooks.patch").read_text()


def build(*args, **env):
    result = subprocess.run([sys.executable, REPO / "scripts" / "build_llama_cpp", *args], env=os.environ | env,
                            capture_output=True, text=True)  # fmt: skip
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def checkout(tmp_path):
    """The files that the hooks touch, as they were before: a stand-in for a user's own checkout."""
    tree = tmp_path / "checkout"
    for name in set(re.findall(r"^--- a/(.*)$", PATCH, re.M)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(llama_cpp.source_dir() / name, tree / name)
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(["git", "apply", "-R", REPO / "ggml_patch" / "hooks.patch"], cwd=tree, env=env, check=True)
    return tree


def test_a_second_run_touches_nothing():
    before = {p: p.stat().st_mtime_ns for p in [llama_cpp.tool("llama-cli"), *llama_cpp.source_dir().rglob("*.c")]}
    code, text = build()
    assert code == 0 and "the patched source is up to date" in text, text
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_the_patch_shows_little_of_upstream():
    added = len(re.findall(r"^\+(?!\+\+)", PATCH, re.M))
    removed = len(re.findall(r"^-(?!--)", PATCH, re.M))
    assert removed <= 4 and added <= 60
    for hunk in re.split(r"^@@.*\n", PATCH, flags=re.M)[1:]:
        context = [line for line in hunk.split("\n--- ")[0].splitlines() if line.startswith(" ")]
        assert len(context) <= 6, hunk


def test_a_hunk_that_does_not_apply_is_named(checkout, tmp_path):
    file = checkout / "ggml" / "src" / "gguf.cpp"
    file.write_text(file.read_text().replace("blck_size = ggml_blck_size(info.t.type)", "blck_size = other(info)"))
    code, text = build(LLAMA_CPP_SRC=str(checkout), SHERRY_BUILD_DIR=str(tmp_path / "build"))
    assert code == 1
    assert re.search(rf"hooks.patch does not apply to {checkout}:\n  ggml/src/gguf.cpp, the hunk at line \d+\n.*made for "
                     r"llama.cpp 0c1e57098 \(ggml 0.25.3\)", text), text  # fmt: skip
    assert not (tmp_path / "build" / "llama.cpp").exists()


def test_ones_own_checkout_is_copied_patched_and_left_alone(checkout, tmp_path):
    before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()}
    code, text = build(LLAMA_CPP_SRC=str(checkout), SHERRY_BUILD_DIR=str(tmp_path / "build"))
    assert code == 1 and "cmake failed" in text, text  # it holds nothing but those files: no CMakeLists.txt at its root
    assert {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()} == before
    patched = tmp_path / "build" / "llama.cpp"
    for name in set(re.findall(r"^--- a/(.*)$", PATCH, re.M)):
        assert (patched / name).read_bytes() == (llama_cpp.source_dir() / name).read_bytes()
    assert (patched / "ggml/src/sherry/tq1_25.c").read_bytes() == (REPO / "ggml_patch/src/tq1_25.c").read_bytes()


def test_not_a_checkout(tmp_path):
    code, text = build(LLAMA_CPP_SRC=str(tmp_path), SHERRY_BUILD_DIR=str(tmp_path / "build"))
    assert code == 1 and f"LLAMA_CPP_SRC={tmp_path} is not a llama.cpp checkout" in text


def test_an_archive_with_another_hash_is_refused_and_removed(tmp_path):
    pin = dict(re.findall(r"^(\w+) = (.*)$", (REPO / "ggml_patch" / "UPSTREAM").read_text(), re.M))
    archive = tmp_path / "download" / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"something else")
    code, text = build(SHERRY_BUILD_DIR=str(tmp_path))
    assert code == 1 and "has sha256" in text and pin["sha256"] in text
    assert not archive.exists() and not (tmp_path / "llama.cpp").exists()


def test_unwritable_build_directory():
    code, text = build(SHERRY_BUILD_DIR="/proc/nowhere")
    assert code == 1 and "/proc/nowhere" in text and "Traceback" not in text
