#!/usr/bin/env python3
"""Install a wheel on a machine that has Python and nothing else, and let it continue a text.

The machine is a root directory with a copy of this Python and the libraries that every Linux with Python has: no compiler, no git,
no shell. pip installs the wheel and what it needs from files that were downloaded before. Needs Linux and the programs unshare, mount
and chroot; user namespaces, or else root.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

try:
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, run
except ImportError as error:
    sys.exit(f"try_wheel.py: {error}: run it as .venv/bin/python scripts/build/try_wheel.py, after scripts/setup.sh")

PREFIX = Path(sys.base_prefix).resolve()
PYTHON = PREFIX / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
BASELINE = ("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libutil.so.1")  # PEP 600
# Run in namespaces of its own: $1 is the root, the rest a command in it.
INSIDE = """
root=$1; shift
for device in null zero urandom; do : >"$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -t proc proc "$root/proc"
program=$(command -v chroot)
PATH=/venv/bin exec "$program" "$root" "$@"
"""


def libraries(file: Path) -> set[Path]:
    """The files that the dynamic loader opens for a program or library, itself included."""
    found = subprocess.run(["ldd", str(file)], capture_output=True, text=True).stdout
    return {Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", found, re.M)}


def make_root(root: Path) -> None:
    """Fill a directory with Python, its libraries and nothing that could build anything."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    unneeded = shutil.ignore_patterns("__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "config-*", "*.a")
    shutil.copytree(stdlib, root / stdlib.relative_to("/"), ignore=unneeded, symlinks=True)
    files = {PYTHON.resolve(), *stdlib.rglob("lib-dynload/*.so")}
    for file in [*files]:
        files |= libraries(file)
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    for name in BASELINE:
        if found := re.search(rf"^\s+{re.escape(name)} .*x86-64.* => (/\S+)$", cache, re.M):
            files.add(Path(found[1]))
    for file in files:
        to = root / file.relative_to("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    for name in "dev", "proc", "tmp", "root":
        (root / name).mkdir(exist_ok=True)


def inside(root: Path, *command: object) -> list[str]:
    """The command line that runs a command with `root` as its root, without this machine's environment."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    clean = ["env", "-i", "HOME=/root", "LC_ALL=C.UTF-8"]
    return [*clean, shutil.which("unshare") or "unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "/bin/sh", "-ec",
            f"PATH=/usr/sbin:/usr/bin:/sbin:/bin\n{INSIDE}", "sh", str(root), *map(str, command)]  # fmt: skip


def show(root: Path, *command: object) -> float:
    """Run a command in `root` with its output here; return how many seconds it took. Raises Stop if it fails."""
    print(f"$ {shlex.join(map(str, command))}", flush=True)
    began = time.monotonic()
    if code := subprocess.run(inside(root, *command), stdin=subprocess.DEVNULL).returncode:
        raise Stop(f"{command[0]} failed with exit code {code}: see above")
    return time.monotonic() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("wheel", type=Path, help="the wheel, for this machine's CPU")
    p.add_argument("commands", nargs="+", metavar="COMMAND", help='what to run after pip, such as "sherry-gguf inspect /model.gguf"')
    p.add_argument("--model", type=Path, metavar="FILE", help="a GGUF that the commands find as /model.gguf")
    p.add_argument("--extras", default="", metavar="NAME,...", help="extras of the package to install too, such as convert")
    a = p.parse_args()
    if sys.platform != "linux":
        raise Stop("this needs Linux's namespaces")
    with tempfile.TemporaryDirectory(prefix="sherry-bare-") as scratch:
        root, wheels = Path(scratch), Path(scratch, "wheels")
        make_root(root)
        shutil.copy(a.wheel, root)
        if a.model:
            shutil.copy(a.model, root / "model.gguf")
        wanted = f"/{a.wheel.name}{f'[{a.extras}]' * bool(a.extras)}"
        print("downloading what the wheel needs", flush=True)
        call(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:", "-d", wheels,
             f"{a.wheel.resolve()}{wanted.removeprefix(f'/{a.wheel.name}')}")  # fmt: skip
        show(root, PYTHON.resolve(), "-m", "venv", "/venv")
        took = show(root, "/venv/bin/pip", "install", "-q", "--no-index", "--find-links", "/wheels", wanted)
        for command in a.commands:
            took += show(root, *shlex.split(command))
        print(f"from pip install to the end: {took:.1f} s")


if __name__ == "__main__":
    run(main)
