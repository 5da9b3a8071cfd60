#!/usr/bin/env python3
"""Make build/arm/run-python, a Python for 64-bit ARM Linux, to test the kernels on another Debian machine.

It runs Debian's Python under qemu-aarch64, with this package cross-compiled, pytest and hypothesis. SHERRY_ARM_CPU chooses
the CPU for qemu-aarch64 -cpu (default: max).

First, as root: apt-get install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user
"""

import argparse
import hashlib
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import debian
from cross_arm import COMPILERS, EMULATOR, missing

try:
    from filelock import FileLock

    from sherry_gguf import _kernels_build, llama_cpp
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, run
except ImportError as error:
    sys.exit(f"arm.py: {error}: run it as .venv/bin/python scripts/build/arm.py, after scripts/setup.sh")

REPO = Path(__file__).resolve().parents[2]
DEBIAN = "python3", "libpython3-dev", "libstdc++6", "libgomp1"  # the last two for llama.cpp's libraries


def python(work: Path) -> Path:
    """Get Debian's Python and the packages that the tests need, unless they are up to date; return the directory of its headers."""
    root, site = work / "root", work / "site"
    requirements = (REPO / "requirements.txt").read_text()
    wanted = re.compile(r"(numpy==2\.2|gguf|cffi|pytest==|hypothesis|tqdm|setuptools)")
    pins = [line.split(";")[0].strip() for line in requirements.splitlines() if wanted.match(line)]
    stamp, state = work / "python.stamp", "\n".join([Path("/etc/os-release").read_text(), *DEBIAN, *pins])
    if not stamp.exists() or stamp.read_text() != state or not (root / "usr/include").exists() or not site.exists():
        stamp.unlink(missing_ok=True)
        for directory in root, site:
            shutil.rmtree(directory, ignore_errors=True)
        print("arm: unpacking Debian's Python for ARM", flush=True)
        debian.unpack(root, work, "arm64", DEBIAN)
        version = next(root.glob("usr/lib/python3.*")).name.removeprefix("python")
        platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("_2_28", "_2_17", "2014")]
        where = ["--target", site, "--only-binary=:all:", "--python-version", version, *platforms]
        call(sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *where, *pins)
        stamp.write_text(state)
    return next((root / "usr/include").glob("python3.*"))


def package(work: Path, include: Path) -> None:
    """Make a copy of this package with its kernels cross-compiled, unless it is up to date."""
    sources = sorted([*(REPO / "sherry_gguf").rglob("*.py"), *_kernels_build.SOURCES.rglob("*.[ch]")])
    state = hashlib.sha256(b"\0".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()
    stamp, target, fresh = work / "package.stamp", work / "sherry_gguf", work / "fresh"
    if stamp.exists() and stamp.read_text() == state and target.exists():
        return
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(REPO / "sherry_gguf", fresh, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "_kernels.c")
        _kernels_build.ffibuilder.emit_c_code(str(source))
        include_flags = [f"-I{path}" for path in (_kernels_build.SOURCES, include, include.parent)]
        files = [source, *sorted(_kernels_build.SOURCES.rglob("*.c")), "-o", fresh / "_kernels.abi3.so"]
        call(COMPILERS[0], *_kernels_build.FLAGS, "-fPIC", "-shared", *include_flags, *files)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    stamp.write_text(state)


def launcher(work: Path, python: str) -> None:
    """Write build/arm/run-python, which sets the paths and starts the emulator."""
    root, fresh = work / "root", work / "run-python.fresh"
    emulator = f'{EMULATOR} -cpu "${{SHERRY_ARM_CPU:-max}}" {shlex.join(["-L", str(root), f"{root}/usr/bin/{python}"])}'
    paths = shlex.quote(f"{work}:{work / 'site'}") + '"${PYTHONPATH:+:$PYTHONPATH}"'
    fresh.write_text(f"""#!/bin/sh
PYTHONHOME={shlex.quote(f"{root}/usr")} PYTHONSAFEPATH=1 PYTHONPATH={paths} exec {emulator} "$@"
""")
    fresh.chmod(0o755)
    fresh.replace(work / "run-python")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    if why := missing():
        raise Stop(why)
    work = llama_cpp.root() / "arm"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "arm.lock"):
        include = python(work)
        package(work, include)
        launcher(work, include.name)


if __name__ == "__main__":
    run(main, hint="; run it again to continue")
