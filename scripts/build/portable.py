#!/usr/bin/env python3
"""Build llama.cpp with TQ1_25 for machines other than this one, and pack it: build/portable/ARCH/sherry-llama.cpp-ARCH.tar.gz.

x86_64   any x86-64 CPU under Linux
aarch64  any 64-bit ARM CPU under Linux; elsewhere than on such a machine it is cross-compiled, with Debian's
         gcc-aarch64-linux-gnu and g++-aarch64-linux-gnu
android  any 64-bit ARM CPU under Android 9 or newer; ANDROID_NDK is the NDK's directory

Each holds a libggml-cpu for every generation of CPUs, of which the tools load the best one. Further arguments that begin with
-D go to CMake: -DSHERRY_CPU_VARIANTS="haswell;zen4" makes these two only.
"""

from __future__ import annotations

import argparse
import fcntl
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

from cross_arm import COMPILERS, PREFIX, Stop, call, missing

from sherry_gguf import llama_cpp

REPO = Path(__file__).resolve().parents[2]
ALL = [
    "-DGGML_NATIVE=OFF",
    "-DGGML_BACKEND_DL=ON",
    "-DGGML_CPU_ALL_VARIANTS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    "-DCMAKE_INSTALL_RPATH=$ORIGIN",
]  # CMake pads the other's with a colon, which stands for the current directory
NDK = Path(os.environ.get("ANDROID_NDK") or os.devnull).expanduser().resolve()
UPSTREAM = (REPO / "ggml_patch" / "UPSTREAM").read_text()  # with the hash of the archive
ARCHITECTURES = "x86_64", "aarch64", "android"


def cxx_of_ndk() -> Path:
    """The C++ library of the Android NDK."""
    found = (
        next(NDK.rglob("aarch64-linux-android/libc++_shared.so"), None) if (NDK / "build/cmake/android.toolchain.cmake").is_file() else None
    )
    if not found:
        raise Stop(f"ANDROID_NDK={os.environ.get('ANDROID_NDK', '')}: set it to an Android NDK; it has build/cmake/android.toolchain.cmake "
                   "and aarch64-linux-android/libc++_shared.so")  # fmt: skip
    return found


def settings(arch: str) -> tuple[list[str], str]:
    """CMake's arguments for an architecture, and what the names of its binary tools begin with."""
    if arch == "android":
        cxx_of_ndk()  # is it one?
        programs = next(NDK.glob("toolchains/llvm/prebuilt/*/bin"), NDK)
        # one C++ library for all, since exceptions go from one to another; the NDK's OpenMP is no part of Android
        return [f"-DCMAKE_TOOLCHAIN_FILE={NDK}/build/cmake/android.toolchain.cmake", "-DANDROID_ABI=arm64-v8a", "-DANDROID_PLATFORM=android-28",
                "-DANDROID_STL=c++_shared", "-DGGML_OPENMP=OFF"], f"{programs}/llvm-"  # fmt: skip
    if sys.platform != "linux":
        raise Stop(f"{arch} is built under Linux, and this is {platform.system()}")
    flags = [f"-DCMAKE_{kind}_LINKER_FLAGS=-Wl,--disable-new-dtags" for kind in ("EXE", "SHARED", "MODULE")]  # LD_LIBRARY_PATH comes second
    if platform.machine() == arch:  # as builds with one ggml-cpu have it, so that a compiler cache serves both
        return [*flags, *(f"-DCMAKE_{language}_FLAGS=-DGGML_BACKEND_SHARED" for language in ("C", "CXX"))], ""
    if arch == "x86_64":
        raise Stop(f"x86_64 can't be built on {platform.machine()}")
    if why := missing(*COMPILERS):
        raise Stop(why)
    return [*flags, f"-DCMAKE_TOOLCHAIN_FILE={REPO / 'scripts' / 'build' / 'aarch64-linux-gnu.cmake'}"], PREFIX


def needs(files: list[Path], prefix: str) -> str:
    """The newest symbol versions of the system's libraries that these files ask for."""
    highest: dict[str, tuple[int, ...]] = {}
    for library, number in re.findall(r"Name: (GLIBC|GLIBCXX|GCC|GOMP|OMP)_(\d[\d.]*)", call(f"{prefix}readelf", "-V", "-W", *files)):
        highest[library] = max(highest.get(library, (0,)), tuple(map(int, number.split("."))))
    return ", ".join(f"{library} {'.'.join(map(str, number))}" for library, number in sorted(highest.items()))


def pack(work: Path, arch: str, prefix: str) -> Path:
    """Tools and libraries side by side, without symbols, and an archive of them."""
    name = f"sherry-llama.cpp-{arch}"
    fresh, target, archive = work / f"{name}.fresh", work / name, work / f"{name}.tar.gz"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for file in sorted((work / "bin").iterdir()):
        shutil.copy(file, fresh)
    for file in sorted((work / "lib").iterdir()):
        asked_for = re.search(r"\(SONAME\).*\[(.*)\]", call(f"{prefix}readelf", "-d", file))
        # backends are opened by the names of their files, the others by the name that those before were linked with
        if file.name == asked_for[1] if asked_for and not re.match("libggml-(cpu|rpc)", file.name) else file.suffix == ".so":
            shutil.copy(file, fresh)
    if arch == "android":
        shutil.copy(cxx_of_ndk(), fresh)
    fresh.chmod(0o755)
    binaries = sorted(fresh.iterdir())
    if not list(fresh.glob("libggml-cpu*")):
        raise Stop(f"{work / 'lib'} has no libggml-cpu: remove {work} and run it again")
    call(f"{prefix}strip", "--strip-unneeded", *binaries)
    source = work / "llama.cpp"
    licenses = {"llama.cpp": source / "LICENSE", "sherry-gguf": REPO / "LICENSE"}  # and of what is built into it
    licenses |= {file.name.removeprefix("LICENSE-"): file for file in (source / "licenses").glob("LICENSE-*")}
    licenses |= {file.parent.name: file for file in (source / "vendor").rglob("LICENSE*")}
    for of, file in licenses.items():
        shutil.copy(file, fresh / f"LICENSE-{of}")
    print(f"portable: {len(binaries)} files that need {needs(binaries, prefix) or 'no version of a library'}")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as tar:
        tar.add(target, name)
    partial.replace(archive)
    return archive


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("arch", choices=ARCHITECTURES)
    a, further = p.parse_known_args()
    if wrong := [argument for argument in further if not argument.startswith("-D")]:
        p.error(f"unexpected arguments {wrong}; CMake's begin with -D")
    arguments, prefix = settings(a.arch)
    work = llama_cpp.root() / "portable" / a.arch
    (work / "download").mkdir(parents=True, exist_ok=True)
    for archive in (llama_cpp.root() / "download").glob("*.tar.gz"):
        if not (work / "download" / archive.name).exists() and hashlib.sha256(archive.read_bytes()).hexdigest() in UPSTREAM:
            with tempfile.TemporaryDirectory(dir=work / "download") as scratch:
                Path(shutil.copy(archive, scratch)).rename(work / "download" / archive.name)
    if subprocess.run([sys.executable, REPO / "scripts" / "build_llama_cpp.py", *ALL, *arguments, *further],
                      env=os.environ | {"SHERRY_BUILD_DIR": str(work)}).returncode:  # fmt: skip
        raise Stop("llama.cpp was not built: see above")
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        archive = pack(work, a.arch, prefix)
    print(f"portable: packed {archive}, {archive.stat().st_size / 1e6:.0f} MB; unpack it there and run its llama-cli")


if __name__ == "__main__":
    try:
        main()
    except (Stop, OSError) as e:
        sys.exit(f"build_portable: {e}")
    except KeyboardInterrupt:
        sys.exit("build_portable: interrupted; run it again to go on")
