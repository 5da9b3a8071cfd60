"""scripts/build_llama_cpp.py does nothing twice, and says why when it can't continue."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sherry_gguf import llama_cpp

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
PATCH = (REPO / "ggml_patch" / "hooks.patch").read_text()


def build(*args, **env):
    clean = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_SRC"}
    result = subprocess.run([sys.executable, REPO / "scripts" / "build_llama_cpp.py", *args], env=clean | env,
                            capture_output=True, text=True)  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def unpatch(tree, tmp_path):
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    subprocess.run(["git", "apply", "-R", REPO / "ggml_patch" / "hooks.patch"], cwd=tree, env=env, check=True)


@pytest.fixture
def checkout(tmp_path):
    """The pinned llama.cpp as it was before the patch, as a user's own checkout."""
    tree = tmp_path / "checkout"
    shutil.copytree(llama_cpp.source_dir(), tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tree / "ggml" / "src" / "sherry")
    unpatch(tree, tmp_path)
    return tree


@pytest.fixture
def unconfigured(tmp_path):
    """A build directory with the patched source, whose configuration failed because the compiler is missing."""
    directory = tmp_path / "unconfigured"
    shutil.copytree(llama_cpp.root() / "download", directory / "download")
    code, text = build("-DCMAKE_C_COMPILER=/nonexistent", SHERRY_BUILD_DIR=str(directory))
    assert code == 1 and "cmake failed" in text and "/nonexistent" in text, text
    return directory


def test_a_second_run_touches_nothing():
    before = {p: p.stat().st_mtime_ns for p in [llama_cpp.tool("llama-cli"), *llama_cpp.source_dir().rglob("*.c")]}
    code, text = build()
    assert code == 0 and "the patched source is up to date" in text, text
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_failed_configuration_is_not_taken_for_the_next_one(unconfigured):
    """The failure left CMake's cache behind, which names a missing compiler."""
    code, text = build("-DCMAKE_C_COMPILER=/nonexistent/either", SHERRY_BUILD_DIR=str(unconfigured))
    assert code == 1 and "the patched source is up to date" in text and "/nonexistent/either" in text, text


def test_a_damaged_source_is_mended(unconfigured):
    source = unconfigured / "llama.cpp"
    before = {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()}
    (source / "ggml" / "src" / "ggml.c").write_text("")
    (source / "CMakeLists.txt").unlink()
    (source / "extra.txt").write_text("")
    code, text = build("-DCMAKE_C_COMPILER=/nonexistent", SHERRY_BUILD_DIR=str(unconfigured))
    assert code == 1 and "unpacking" in text, text
    after = {p: p.stat().st_mtime_ns for p in source.rglob("*") if p.is_file()}
    assert after.keys() == before.keys()
    assert {p.name for p in before if before[p] != after[p]} == {"ggml.c", "CMakeLists.txt"}
    assert (source / "ggml" / "src" / "ggml.c").read_bytes() == (llama_cpp.source_dir() / "ggml/src/ggml.c").read_bytes()


def test_the_patch_changes_and_shows_little_of_upstream():
    readme = (REPO / "ggml_patch" / "README.md").read_text()
    changed, added = map(int, re.search(r"changes (\d+) lines of upstream.* at most (\d+) in a place", readme).groups())
    total = int(re.search(r"patch has (\d+) lines with a `\+`", readme)[1])
    hunks = [hunk.split("\n--- ")[0].splitlines() for hunk in re.split(r"^@@.*\n", PATCH, flags=re.M)[1:]]
    assert sum(line.startswith("-") for hunk in hunks for line in hunk) == changed <= 8
    assert sum(line.startswith("+") for hunk in hunks for line in hunk) == total <= 143
    for hunk in hunks:
        assert sum(line.startswith("+") for line in hunk) <= added <= 5, hunk
        assert sum(line.startswith(" ") for line in hunk) <= 6, hunk


def test_a_hunk_that_does_not_apply_is_named(checkout, tmp_path):
    file = checkout / "ggml" / "src" / "gguf.cpp"
    file.write_text(file.read_text().replace("blck_size = ggml_blck_size(info.t.type)", "blck_size = other(info)"))
    code, text = build(LLAMA_CPP_SRC=str(checkout), SHERRY_BUILD_DIR=str(tmp_path / "build"))
    assert code == 1
    assert re.search(rf"hooks.patch does not apply to {checkout}:\n  ggml/src/gguf.cpp, the hunk at line \d+\n.*made for "
                     r"llama.cpp 0c1e57098 \(ggml 0.25.3\)", text), text  # fmt: skip
    assert not (tmp_path / "build" / "llama.cpp").exists()


def files(tree):
    return {p.relative_to(tree): p.read_bytes() for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_ones_own_checkout_is_copied_whole_patched_and_left_alone(checkout, tmp_path):
    (checkout / ".git").mkdir()
    (checkout / ".git" / "HEAD").write_text("ref: refs/heads/master\n")
    (checkout / "out").mkdir()
    (checkout / "out" / "CMakeCache.txt").write_text("an old build")
    before = files(checkout)
    code, text = build("-DCMAKE_C_COMPILER=/nonexistent", LLAMA_CPP_SRC=str(checkout), SHERRY_BUILD_DIR=str(tmp_path / "build"))
    assert code == 1 and "/nonexistent" in text, text  # no need to build it all
    assert files(checkout) == before
    assert files(tmp_path / "build" / "llama.cpp") == files(llama_cpp.source_dir())


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


def test_unknown_arguments():
    code, text = build("--tools", "llama-cli,llama-what")
    assert code == 1 and "--tools llama-what: no such tool; the tools are llama-cli, " in text
    code, text = build("-DGGML_NATIVE=OFF", "Release")
    assert code == 1 and "unexpected arguments ['Release']" in text


def test_unwritable_build_directory():
    code, text = build(SHERRY_BUILD_DIR="/proc/nowhere")
    assert code == 1 and "/proc/nowhere" in text and "Traceback" not in text
