"""What a build of the Vulkan backend needs: what is missing is named with its packages, and the build follows a change."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_llama_cpp
import debian
import portable
import pytest
import vulkan

from sherry_gguf.errors import Stop

REPO = Path(__file__).parents[2]
FILES = {  # as the packages install them
    "glslc": ["bin/glslc"],
    "headers": ["include/vulkan/vulkan.h", "include/vulkan/vulkan.hpp"],
    "loader": ["lib/libvulkan.so"],
    "spirv": ["share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake"],
}
PACKAGES = {  # on Debian and Ubuntu, Fedora, Arch
    "glslc": ("glslc", "glslc", "shaderc"),
    "headers": ("libvulkan-dev", "vulkan-headers", "vulkan-headers"),
    "loader": ("libvulkan-dev", "vulkan-loader-devel", "vulkan-icd-loader"),
    "spirv": ("spirv-headers", "spirv-headers-devel", "spirv-headers"),
}
ENV = build_llama_cpp.environment()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that installs parts under a prefix, and CMake's arguments with which it looks there and nowhere else."""
    monkeypatch.delenv("VULKAN_SDK", raising=False)
    monkeypatch.delenv("SHERRY_VULKAN", raising=False)
    prefix = tmp_path / "prefix"
    arguments = [f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=ENV['PATH'])}",
                 "-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=OFF",
                 f"-DCMAKE_CXX_COMPILER={shutil.which('c++')}", "-DCMAKE_CXX_COMPILER_FORCED=ON"]  # fmt: skip

    def install(*parts):
        shutil.rmtree(prefix, ignore_errors=True)
        for name in (name for part in parts for name in FILES[part]):
            (prefix / name).parent.mkdir(parents=True, exist_ok=True)
            (prefix / name).touch(0o755)
        return arguments

    return install


def build(*arguments, **env):
    done = subprocess.run([sys.executable, REPO / "scripts" / "build_llama_cpp.py", *arguments], env=os.environ | env,
                          capture_output=True, text=True)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("absent", [*FILES, "several", "nothing"])
def test_what_is_missing_is_named_with_its_packages(machine, absent):
    absent = {"several": ["glslc", "spirv"], "nothing": []}.get(absent, [absent])
    arguments = machine(*(part for part in FILES if part not in absent))
    assert vulkan.missing(arguments, ENV) == absent
    vulkan.check(arguments, ENV)  # which doesn't mind while nobody asks for Vulkan
    if not absent:
        return vulkan.check([*arguments, "-DGGML_VULKAN=ON"], ENV)
    with pytest.raises(Stop) as stop:
        vulkan.check([*arguments, "-DGGML_VULKAN=ON"], ENV)
    first, *commands, other = str(stop.value).splitlines()
    for part in FILES:
        assert (vulkan.PARTS[part][0] in first) == (part in absent)
    assert [line.split(":")[0].strip() for line in commands] == ["Debian, Ubuntu", "Fedora", "Arch"]
    for column, line in enumerate(commands):
        assert set(line.split(":")[1].split()[2:]) == {PACKAGES[part][column] for part in absent}, line
    assert "VULKAN_SDK" in other


def test_headers_without_the_c_plus_plus_one(machine, tmp_path):
    arguments = machine(*FILES)
    (tmp_path / "prefix/include/vulkan/vulkan.hpp").unlink()
    assert vulkan.missing(arguments, ENV) == ["headers"]


@pytest.mark.parametrize("how", ["--vulkan", "SHERRY_VULKAN", "-DGGML_VULKAN=ON", "-DGGML_VULKAN:BOOL=yes"])
def test_however_one_asks_the_build_stops_before_it_fetches_anything(machine, how, tmp_path):
    env = {"SHERRY_BUILD_DIR": str(tmp_path / "build")} | ({"SHERRY_VULKAN": "1"} if how == "SHERRY_VULKAN" else {})
    code, text = build(*machine("loader"), *([] if how in env else [how]), **env)
    assert code == 1 and "glslc (the shader compiler), Vulkan's headers" in text and "apt-get install glslc libvulkan-dev spirv" in text, (
        text
    )
    assert {path.name for path in (tmp_path / "build").iterdir()} <= {"lock"}


def test_what_asks_for_it(monkeypatch):
    assert vulkan.wanted([]) is None and vulkan.wanted(["-DGGML_VULKAN_DEBUG=ON"]) is None
    assert vulkan.wanted(["-DGGML_VULKAN=1"]) and vulkan.wanted(["-DGGML_VULKAN=OFF", "-DGGML_VULKAN:BOOL=true"])
    assert vulkan.wanted(["-DGGML_VULKAN=ON", "-DGGML_VULKAN=OFF"]) is False  # as CMake does
    for value, asks in ("", None), ("0", False), ("1", True):
        monkeypatch.setenv("SHERRY_VULKAN", value)
        assert vulkan.from_environment() is asks
    code, text = build(SHERRY_VULKAN="yes")
    assert code == 1 and "SHERRY_VULKAN=yes: set it to 1 to build with Vulkan, or to 0" in text, text


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A build directory that was configured without Vulkan, with compiled shaders, and a function that configures it again."""
    monkeypatch.setattr(build_llama_cpp, "BUILD", tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "cmake").write_text("#!/bin/sh\n")
    env = ENV | {"PATH": f"{programs}{os.pathsep}{ENV['PATH']}"}
    env.pop("VULKAN_SDK", None)
    shaders = tmp_path / "cmake" / "ggml" / "src" / "ggml-vulkan"
    shaders.mkdir(parents=True)
    (tmp_path / "cmake" / "build.ninja").touch()

    def configure(*arguments, glslc=""):
        """Returns whether it had been configured so, and whether the shaders are still there."""
        (programs / "glslc").write_text(f"#!/bin/sh\necho {glslc}\n")
        for program in programs.iterdir():
            program.chmod(0o755)
        made = shaders / "mul.comp.cpp", shaders / "ggml-vulkan-shaders.hpp"
        for file in made:
            file.touch()
        before = build_llama_cpp.is_configured([*arguments], env)
        build_llama_cpp.configure([*arguments], env)
        assert build_llama_cpp.is_configured([*arguments], env)
        (kept,) = {file.exists() for file in made}
        return before, kept

    assert configure() == (False, True)
    return configure


def test_a_build_follows_a_change(directory):
    on = "-DGGML_VULKAN=ON"
    assert directory() == (True, True)
    assert directory(glslc="2023") == (True, True)  # which it does not use
    assert directory(on, glslc="2023") == (False, False)
    assert directory(on, glslc="2023") == (True, True)
    assert directory(on, "-DGGML_NATIVE=OFF", glslc="2023") == (False, True)
    assert directory(on, "-DGGML_NATIVE=OFF", glslc="2025") == (False, False)  # in the same place
    assert directory() == (False, True)


@pytest.mark.parametrize("before, total, step", [(8, 40, 4), (1, 4, 1)])
def test_progress_leaves_out_the_build_of_the_shader_generator(before, total, step, tmp_path, monkeypatch, capsys):
    """Its two steps come after some of ours, which are few when most is up to date."""
    monkeypatch.setattr(build_llama_cpp, "BUILD", tmp_path)
    steps = [(0, 2), *((i, total) for i in range(1, before + 1)), (1, 2), (2, 2), *((i, total) for i in range(before + 1, total + 1))]
    (tmp_path / "cmake").write_text("#!/bin/sh\n" + "".join(f"echo '[{done}/{of}] x'\n" for done, of in steps))
    (tmp_path / "cmake").chmod(0o755)
    build_llama_cpp.build({"a": "a"}, ENV | {"PATH": f"{tmp_path}{os.pathsep}{ENV['PATH']}"})
    said = [line.split(",")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert said == [f"{i} of {total} steps" for i in range(step, total + 1, step)]


def test_portable_build_says_why_it_comes_without_vulkan(machine, capsys, monkeypatch):
    on = ["-DGGML_VULKAN=ON"]
    assert portable.vulkan_argument(machine(*FILES), False) == on and not capsys.readouterr().out
    assert portable.vulkan_argument(machine("headers", "loader"), False) == []
    said = capsys.readouterr().out
    assert said.startswith("portable: the archive comes without Vulkan: this machine lacks glslc (the shader compiler), SPIR-V's headers")
    assert said.count("\n") == 1
    assert portable.vulkan_argument(machine(*FILES), True) == [] and "without Vulkan: it is cross-compiled" in capsys.readouterr().out
    for value in "OFF", "ON":  # already decided
        assert portable.vulkan_argument([f"-DGGML_VULKAN={value}"], False) == []
    monkeypatch.setenv("SHERRY_VULKAN", "1")
    assert portable.vulkan_argument(machine(), False) == portable.vulkan_argument(machine(), True) == on  # the build says what is missing
    assert not capsys.readouterr().out
    monkeypatch.setenv("SHERRY_VULKAN", "0")
    assert portable.vulkan_argument(machine(*FILES), False) == [] and "SHERRY_VULKAN=0" in capsys.readouterr().out


# ---- another Debian's packages (scripts/build/debian.py) ----

SECURITY = "Packages main bookworm-security http://mirror/debian-security/"
OWN = "Packages main bookworm http://mirror/debian/"


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """Returns a function that replaces apt-get by a shell script."""

    def become(script):
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "apt-get").chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return become


@pytest.mark.parametrize("rows", [[SECURITY, OWN], [OWN, SECURITY], ["Sources main bookworm http://source/debian/", "odd", OWN]])
def test_the_system_says_where_its_packages_come_from(apt, rows):
    apt("\n".join(f"echo '{row}'" for row in rows))
    assert debian.archive() == "http://mirror/debian/"


@pytest.mark.parametrize("rows", [[], [SECURITY], ["Packages main stable http://elsewhere/node/"]])
def test_a_system_without_debian_packages_is_told_so(apt, rows):
    apt("\n".join(["true", *(f"echo '{row}'" for row in rows)]))
    with pytest.raises(Stop, match="apt has no source of Debian's packages"):
        debian.archive()


def test_a_failed_download_leaves_no_shader_compiler(apt, tmp_path):
    """The message is apt's, and the next run begins again."""
    apt(f"[ $1 = indextargets ] && echo '{OWN}' && exit\necho 'E: no such mirror'\nexit 100")
    done = subprocess.run([sys.executable, REPO / "scripts" / "build" / "glslc.py"], capture_output=True, text=True,
                          env=os.environ | {"SHERRY_BUILD_DIR": str(tmp_path / "build")})  # fmt: skip
    assert done.returncode == 1 and "E: no such mirror" in done.stderr and "run it again to continue" not in done.stderr, done.stderr
    assert not (tmp_path / "build" / "glslc" / "glslc").exists()
