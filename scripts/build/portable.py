#!/usr/bin/env python3
"""Build llama.cpp with TQ1_25 for other machines, and pack it: build/portable/ARCH/sherry-llama.cpp-ARCH.tar.gz.

x86_64   any x86-64 CPU under Linux
aarch64  any 64-bit ARM CPU under Linux; cross-compiled on other machines, with
         Debian's gcc-aarch64-linux-gnu and g++-aarch64-linux-gnu
android  any 64-bit ARM CPU under Android 9 or newer; ANDROID_NDK is the NDK's
         directory

Each archive has a libggml-cpu for every generation of CPUs, and the tools load the best one. It has libggml-vulkan for GPUs if
this machine can build that, unless it is cross-compiled. SHERRY_VULKAN=1 insists on it, SHERRY_VULKAN=0 leaves it out.

Arguments that begin with -D go to CMake: -DSHERRY_CPU_VARIANTS="haswell;zen4" builds only these two.
"""

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from cross_arm import COMPILERS, PREFIX, missing

try:
    import vulkan
    from filelock import FileLock

    from sherry_gguf import llama_cpp
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, run
except ImportError as error:
    sys.exit(f"portable.py: {error}: run it as .venv/bin/python scripts/build/portable.py, after scripts/setup.sh")

REPO = Path(__file__).resolve().parents[2]
ALL = ["-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DLLAMA_OPENSSL=OFF"]
# not the build's rpath, which CMake pads with a colon, and that stands for the current directory
ALL += ["-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DCMAKE_INSTALL_RPATH=$ORIGIN"]
ALL.append("-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON")  # one file for each library, by the name that llama-cpp-python opens
WAIT = "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE"
NDK = Path(os.environ.get("ANDROID_NDK") or os.devnull).expanduser().resolve()
VULKAN_HEADERS = Path("/usr/share/doc/libvulkan-dev/copyright")  # their C++ part is compiled into libggml-vulkan
UPSTREAM = (REPO / "ggml_patch" / "UPSTREAM").read_text()  # with the hash of the archive
ARCHITECTURES = "x86_64", "aarch64", "android"
# The CPU variants and tools that the tests run. Other variants differ from these only in compiler flags, which our kernels override.
TESTED = {"x86_64": "x64;haswell;alderlake;skylakex;zen4", "aarch64": "armv8.0_1;armv8.2_2;armv8.6_2"}
TESTED_TOOLS = {
    "x86_64": "llama-cli,llama-completion,llama-server,llama-quantize,llama-bench,test-backend-ops",
    "aarch64": "",  # their common code takes longer to compile than libllama and ggml, and none of it is ours
}


def cxx_of_ndk() -> Path:
    """The C++ library of the Android NDK. Raises Stop."""
    is_ndk = (NDK / "build/cmake/android.toolchain.cmake").is_file()
    found = next(NDK.rglob("aarch64-linux-android/libc++_shared.so"), None) if is_ndk else None
    if not found:
        raise Stop(
            f"ANDROID_NDK={os.environ.get('ANDROID_NDK', '')}: set it to an Android NDK, a directory with "
            "build/cmake/android.toolchain.cmake and aarch64-linux-android/libc++_shared.so"
        )
    return found


def settings(arch: str) -> tuple[list[str], str]:
    """CMake's arguments for an architecture, and the prefix of its binary tools. Raises Stop if it can't be built here."""
    if arch == "android":
        cxx_of_ndk()  # raises if NDK isn't one
        programs = next(NDK.glob("toolchains/llvm/prebuilt/*/bin"), NDK)
        # one shared C++ library, since exceptions cross libraries; Android lacks the NDK's OpenMP
        toolchain = f"-DCMAKE_TOOLCHAIN_FILE={NDK}/build/cmake/android.toolchain.cmake"
        android = [f"-DANDROID_{setting}" for setting in ("ABI=arm64-v8a", "PLATFORM=android-28", "STL=c++_shared")]
        return [toolchain, *android, "-DGGML_OPENMP=OFF"], f"{programs}/llvm-"
    if sys.platform != "linux":
        raise Stop(f"{arch} is built under Linux, and this is {platform.system()}")
    flags = [f"-DCMAKE_{kind}_LINKER_FLAGS=-Wl,--disable-new-dtags" for kind in ("EXE", "SHARED", "MODULE")]  # LD_LIBRARY_PATH comes second
    flags.append(f'-DCMAKE_CXX_STANDARD_LIBRARIES=-Wl,--wrap={WAIT} "{REPO}/scripts/build/condition_variable.cpp"')
    if platform.machine() == arch:  # a define that builds with one ggml-cpu have: a compiler cache then serves both
        return [*flags, *(f"-DCMAKE_{language}_FLAGS=-DGGML_BACKEND_SHARED" for language in ("C", "CXX"))], ""
    if arch == "x86_64":
        raise Stop(f"x86_64 can't be built on {platform.machine()}")
    if why := missing(*COMPILERS):
        raise Stop(why)
    return [*flags, f"-DCMAKE_TOOLCHAIN_FILE={REPO / 'scripts' / 'build' / 'aarch64-linux-gnu.cmake'}"], PREFIX


def vulkan_argument(arguments: list[str], crossed: bool) -> list[str]:
    """CMake's argument for the Vulkan backend, unless `arguments` has one. Where the archive comes without Vulkan, prints why.

    crossed: another machine than this one runs the tools. Raises Stop.
    """
    if vulkan.wanted(arguments) is not None:
        return []
    asked = vulkan.from_environment()
    if asked is False:
        why = "SHERRY_VULKAN=0"
    elif asked is None and crossed:
        why = "it is cross-compiled"
    else:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])  # cmake and ninja
        parts = [] if asked else vulkan.missing(arguments, os.environ | {"PATH": path})
        if not parts:
            return ["-DGGML_VULKAN=ON"]
        why = f"this machine lacks {vulkan.names(parts)}; docs/platforms.md says how to install that"
    print(f"portable: the archive comes without Vulkan: {why}", flush=True)
    return []


def needs(files: list[Path], prefix: str) -> str:
    """The newest symbol versions of system libraries that these files need."""
    highest: dict[str, tuple[int, ...]] = {}
    for library, number in re.findall(r"Name: (GLIBC|GLIBCXX|GCC|GOMP|OMP)_(\d[\d.]*)", call(f"{prefix}readelf", "-V", "-W", *files)):
        highest[library] = max(highest.get(library, (0,)), tuple(map(int, number.split("."))))
    return ", ".join(f"{library} {'.'.join(map(str, number))}" for library, number in sorted(highest.items()))


def pack(work: Path, arch: str, prefix: str) -> Path:
    """Put stripped tools and libraries side by side, and pack them into an archive. Raises Stop."""
    name = f"sherry-llama.cpp-{arch}"
    fresh, target, archive = work / f"{name}.fresh", work / name, work / f"{name}.tar.gz"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for file in sorted((work / "bin").iterdir()):
        shutil.copy(file, fresh)
    for file in sorted((work / "lib").glob("*.so")):
        shutil.copy(file, fresh)
    if arch == "android":
        shutil.copy(cxx_of_ndk(), fresh)
    fresh.chmod(0o755)
    binaries = sorted(fresh.iterdir())
    if not list(fresh.glob("libggml-cpu*")):
        raise Stop(f"{work / 'lib'} has no libggml-cpu: remove {work} and run it again")
    call(f"{prefix}strip", "--strip-unneeded", *binaries)
    source = work / "llama.cpp"
    licenses = {"llama.cpp": source / "LICENSE", "sherry-gguf": REPO / "LICENSE"}  # and below, those of what is built into it
    licenses |= {file.name.removeprefix("LICENSE-"): file for file in (source / "licenses").glob("LICENSE-*")}
    licenses |= {file.parent.name: file for file in (source / "vendor").rglob("LICENSE*")}
    if list(fresh.glob("libggml-vulkan*")) and VULKAN_HEADERS.exists():
        licenses["Vulkan-Headers"] = VULKAN_HEADERS
    for of, file in licenses.items():
        shutil.copy(file, fresh / f"LICENSE-{of}")
    print(f"portable: {len(binaries)} files; they need {needs(binaries, prefix) or 'no version of a library'}")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(target, name)
    partial.replace(archive)
    return archive


def main() -> None:
    usage = "%(prog)s [--tested] {x86_64,aarch64,android} [-D... ...]"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, usage=usage)
    p.add_argument("arch", choices=ARCHITECTURES)
    p.add_argument("--tested", action="store_true", help="build only what the tests run, in build/portable/ARCH-tested")
    further = [argument for argument in sys.argv[1:] if argument.startswith("-D")]
    a = p.parse_args([argument for argument in sys.argv[1:] if argument not in further])
    if a.tested and a.arch not in TESTED:
        p.error(f"--tested: no test runs {a.arch}")
    arguments, prefix = settings(a.arch)
    work = llama_cpp.root() / "portable" / f"{a.arch}{'-tested' * a.tested}"
    if a.tested:
        further += [f"--tools={TESTED_TOOLS[a.arch]}", f"-DSHERRY_CPU_VARIANTS={TESTED[a.arch]}"]
        if prefix:  # no compiler cache serves a cross build, so optimize only ggml
            further += [f"-DCMAKE_{language}_FLAGS_RELEASE=-O1 -DNDEBUG" for language in ("C", "CXX")]
            further.append(f"-DCMAKE_PROJECT_ggml_INCLUDE={REPO / 'scripts' / 'build' / 'optimized.cmake'}")
    else:
        further += vulkan_argument([*arguments, *further], bool(prefix))
    (work / "download").mkdir(parents=True, exist_ok=True)
    for archive in (llama_cpp.root() / "download").glob("*.tar.gz"):
        if not (work / "download" / archive.name).exists() and hashlib.sha256(archive.read_bytes()).hexdigest() in UPSTREAM:
            with tempfile.TemporaryDirectory(dir=work / "download") as scratch:
                Path(shutil.copy(archive, scratch)).rename(work / "download" / archive.name)
    command = [sys.executable, REPO / "scripts" / "build_llama_cpp.py", *ALL, *arguments, *further]
    if subprocess.run(command, env=os.environ | {"SHERRY_BUILD_DIR": str(work), "SHERRY_VULKAN": ""}).returncode:
        raise Stop("llama.cpp was not built: see above")
    with FileLock(work / "lock"):
        archive = pack(work, a.arch, prefix)
    print(f"portable: packed {archive}, {archive.stat().st_size / 1e6:.0f} MB; unpack it there{' and run its llama-cli' * (not a.tested)}")


if __name__ == "__main__":
    run(main, hint="; run it again to continue")
