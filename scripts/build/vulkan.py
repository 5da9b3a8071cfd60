"""What building llama.cpp's Vulkan backend needs of a machine: looks for it, and names the packages that bring it."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sherry_gguf.errors import Stop
from sherry_gguf.programs import call

# Looks where ggml-vulkan's CMakeLists.txt looks: CMake knows the paths of systems, toolchain files and the Vulkan SDK.
PROBE = """
cmake_minimum_required(VERSION 3.19)
project(probe CXX)
find_package(Vulkan QUIET COMPONENTS glslc)
if (DEFINED ENV{VULKAN_SDK})
    list(APPEND CMAKE_PREFIX_PATH "$ENV{VULKAN_SDK}")
endif()
find_package(SPIRV-Headers CONFIG QUIET)
set(found "")
if (EXISTS "${Vulkan_GLSLC_EXECUTABLE}")
    list(APPEND found glslc)
endif()
if (EXISTS "${Vulkan_INCLUDE_DIR}/vulkan/vulkan.hpp")
    list(APPEND found headers)
endif()
if (Vulkan_LIBRARY)
    list(APPEND found loader)
endif()
if (SPIRV-Headers_FOUND)
    list(APPEND found spirv)
endif()
file(WRITE "${CMAKE_BINARY_DIR}/found" "${found}")
"""
PARTS = {  # what it is, and its packages for Debian and Ubuntu, Fedora, Arch
    "glslc": ("glslc (the shader compiler)", "glslc", "glslc", "shaderc"),
    "headers": ("Vulkan's headers (vulkan/vulkan.hpp)", "libvulkan-dev", "vulkan-headers", "vulkan-headers"),
    "loader": ("Vulkan's loader (libvulkan.so)", "libvulkan-dev", "vulkan-loader-devel", "vulkan-icd-loader"),
    "spirv": ("SPIR-V's headers (SPIRV-HeadersConfig.cmake)", "spirv-headers", "spirv-headers-devel", "spirv-headers"),
}
INSTALL = {"Debian, Ubuntu": "apt-get install", "Fedora": "dnf install", "Arch": "pacman -S"}


def wanted(arguments: Sequence[str]) -> bool | None:
    """Whether these arguments for CMake ask for Vulkan; None if they don't say. CMake goes by the last one."""
    values = [a.partition("=")[2] for a in arguments if a.partition("=")[0] in ("-DGGML_VULKAN", "-DGGML_VULKAN:BOOL")]
    return values[-1].upper() in ("1", "ON", "TRUE", "Y", "YES") if values else None


def from_environment() -> bool | None:
    """Whether SHERRY_VULKAN asks for Vulkan; None if it isn't set. Raises Stop for a value other than 0 and 1."""
    value = os.environ.get("SHERRY_VULKAN", "")
    if value not in ("", "0", "1"):
        raise Stop(f"SHERRY_VULKAN={value}: set it to 1 to build with Vulkan, or to 0")
    return value == "1" if value else None


def missing(arguments: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """The PARTS that CMake doesn't find, with these arguments for it. Raises Stop if CMake can't look, for lack of a compiler."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "CMakeLists.txt").write_text(PROBE)
        settings = [a for a in arguments if a.startswith("-D")]
        call("cmake", "-G", "Ninja", "-S", scratch, "-B", f"{scratch}/build", *settings, env=env)
        found = Path(scratch, "build", "found").read_text().split(";")
    return [part for part in PARTS if part not in found]


def names(parts: Sequence[str]) -> str:
    """Parts in a sentence."""
    return ", ".join(PARTS[part][0] for part in parts)


def how_to_get(parts: Sequence[str]) -> str:
    """The commands that install these parts, a line for each kind of system."""
    lines = []
    for column, (system, command) in enumerate(INSTALL.items(), 1):
        packages = dict.fromkeys(PARTS[part][column] for part in parts)
        lines.append(f"  {system}: {command} {' '.join(packages)}")
    return "\n".join([*lines, "  Elsewhere: the Vulkan SDK, with VULKAN_SDK set to its directory (docs/platforms.md, Vulkan)"])


def check(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Raises Stop if these arguments for CMake ask for Vulkan and something is missing: says what, and which packages bring it."""
    if wanted(arguments) and (parts := missing(arguments, env)):
        raise Stop(f"the Vulkan backend needs what CMake doesn't find here: {names(parts)}\n{how_to_get(parts)}")


def shader_compiler(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """The path and version of the glslc that CMake will find; "" if there is none, or without Vulkan."""
    if not wanted(arguments):
        return ""
    given = [a.partition("=")[2] for a in arguments if a.partition("=")[0].partition(":")[0] == "-DVulkan_GLSLC_EXECUTABLE"]
    places = [f"{env['VULKAN_SDK']}/bin"] if "VULKAN_SDK" in env else []
    found = shutil.which(given[-1] if given else "glslc", path=os.pathsep.join([*places, env["PATH"]]))
    return f"{found} {call(found, '--version')}" if found else ""


def forget_shaders(cmake: Path) -> None:
    """Remove the compiled shaders of a build directory: neither CMake nor ninja notices that another glslc, which may know more of
    Vulkan's extensions, would make others."""
    made = cmake / "ggml" / "src" / "ggml-vulkan"
    for file in made / "ggml-vulkan-shaders.hpp", *made.glob("*.comp.cpp"):
        file.unlink(missing_ok=True)
