#!/usr/bin/env python3
"""Make a Python for 64-bit ARM Linux on another Debian machine, for the tests of the kernels: build/arm/run-python [ARG ...].

It is Debian's, run by qemu-aarch64, with this package cross-compiled, pytest and hypothesis. SHERRY_ARM_CPU is the CPU that
qemu-aarch64 -cpu takes (max).

Needs, as root: apt-get install gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from cross_arm import COMPILERS, EMULATOR, Stop, call, missing

from sherry_gguf import _kernels_build, llama_cpp

REPO = Path(__file__).resolve().parents[2]
DEBIAN = "python3", "libpython3-dev", "libstdc++6", "libgomp1"  # the last two for llama.cpp's libraries


def debian(root: Path, work: Path) -> None:
    """Debian's Python for ARM and what it needs, unpacked; nothing is installed, and the system's own apt knows nothing of it."""
    state, cache = work / "apt", work / "apt" / "cache"
    for directory in state / "lists" / "partial", cache / "archives" / "partial":
        directory.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    apt = ["apt-get", "-qq", "-y"]
    for name, value in {"APT::Architecture": "arm64", "APT::Architectures": "arm64", "Dir::State": state, "Dir::State::status": state / "status",
                        "Dir::Cache": cache, "APT::Sandbox::User": "root", "APT::Install-Recommends": "false"}.items():  # fmt: skip
        apt += ["-o", f"{name}={value}"]
    call(*apt, "update")
    shutil.rmtree(cache / "archives")  # of other packages, or older
    (cache / "archives" / "partial").mkdir(parents=True)
    call(*apt, "--download-only", "install", *DEBIAN)
    for package in sorted((cache / "archives").glob("*.deb")):
        call("dpkg", "-x", package, root)


def python(work: Path) -> None:
    root, site, package = work / "root", work / "site", work / "sherry_gguf"
    requirements = (REPO / "requirements.txt").read_text()
    pins = [
        line.split(";")[0].strip()
        for line in requirements.splitlines()
        if re.match(r"(numpy==2\.2|gguf|cffi|pytest==|hypothesis|tqdm|setuptools)", line)
    ]
    stamp, wanted = work / "python.stamp", "\n".join([Path("/etc/os-release").read_text(), *DEBIAN, *pins])
    if not stamp.exists() or stamp.read_text() != wanted or not (root / "usr/include").exists() or not site.exists():
        stamp.unlink(missing_ok=True)
        for directory in root, site:
            shutil.rmtree(directory, ignore_errors=True)
        print("arm: unpacking Debian's Python for ARM", flush=True)
        debian(root, work)
        version = next(root.glob("usr/lib/python3.*")).name.removeprefix("python")
        platforms = [f"--platform=manylinux_{tag}_aarch64" for tag in ("2_28", "2_17")] + ["--platform=manylinux2014_aarch64"]
        call(sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--target", site, "--only-binary=:all:",
             "--python-version", version, *platforms, *pins)  # fmt: skip
        stamp.write_text(wanted)
    include = next((root / "usr/include").glob("python3.*"))
    sources = sorted([*(REPO / "sherry_gguf").rglob("*.py"), *_kernels_build.SOURCES.rglob("*.[ch]")])
    stamp, wanted = (
        work / "package.stamp",
        hashlib.sha256(b"\0".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest(),
    )
    if not stamp.exists() or stamp.read_text() != wanted or not package.exists():
        fresh = work / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(REPO / "sherry_gguf", fresh, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch, "_kernels.c")
            _kernels_build.ffibuilder.emit_c_code(str(source))
            call(COMPILERS[0], *_kernels_build.FLAGS, "-fPIC", "-shared", f"-I{_kernels_build.SOURCES}", f"-I{include}", f"-I{include.parent}",
                 source, *sorted(_kernels_build.SOURCES.rglob("*.c")), "-o", fresh / "_kernels.abi3.so")  # fmt: skip
        stamp.unlink(missing_ok=True)
        shutil.rmtree(package, ignore_errors=True)
        fresh.rename(package)
        stamp.write_text(wanted)
    run, fresh = work / "run-python", work / "run-python.fresh"
    emulator = (
        shlex.join([EMULATOR, "-cpu"]) + ' "${SHERRY_ARM_CPU:-max}" ' + shlex.join(["-L", str(root), f"{root}/usr/bin/{include.name}"])
    )
    fresh.write_text(f"""#!/bin/sh
PYTHONHOME={shlex.quote(f"{root}/usr")} PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(f"{work}:{site}")}"${{PYTHONPATH:+:$PYTHONPATH}}" exec {emulator} "$@"
""")
    fresh.chmod(0o755)
    fresh.replace(run)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if why := missing():
        raise Stop(why)
    work = llama_cpp.root() / "arm"
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "arm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python(work)


if __name__ == "__main__":
    try:
        main()
    except (Stop, OSError) as e:
        sys.exit(f"build_arm: {e}")
    except KeyboardInterrupt:
        sys.exit("build_arm: interrupted; run it again to go on")
