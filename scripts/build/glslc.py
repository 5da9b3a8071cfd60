#!/usr/bin/env python3
"""Make build/glslc/glslc, the shader compiler of Debian 13, for the Vulkan backend on an x86-64 or ARM Debian 12.

Debian 12's own (2023.2) does not know integer dot products, and without it the backend lacks the shaders that use them. The program
comes with its C library and leaves the system as it is. Then:

  .venv/bin/python scripts/build_llama_cpp.py --vulkan \\
      -DVulkan_GLSLC_EXECUTABLE=$PWD/build/glslc/glslc
"""

import argparse
import os
import shlex
import shutil
import sys

try:
    from filelock import FileLock

    from sherry_gguf import llama_cpp
    from sherry_gguf.errors import Stop
    from sherry_gguf.programs import Help, call, run
except ImportError as error:
    sys.exit(f"glslc.py: {error}: run it as .venv/bin/python scripts/build/glslc.py, after scripts/setup.sh")
import debian

RELEASE = "trixie"  # Debian 13


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    if absent := [program for program in ("apt-get", "dpkg") if not shutil.which(program)]:
        raise Stop(f"{', '.join(absent)} missing: this needs Debian's package manager. Elsewhere, the Vulkan SDK brings a new glslc")
    work = llama_cpp.root() / "glslc"
    root, program = work / "root", work / "glslc"
    work.mkdir(parents=True, exist_ok=True)
    with FileLock(work / "glslc.lock"):
        if not program.exists():
            shutil.rmtree(root, ignore_errors=True)
            architecture = call("dpkg", "--print-architecture").strip()
            print("glslc: unpacking Debian 13's", flush=True)
            debian.unpack(root, work, architecture, ("glslc",), RELEASE)
            (loader,) = root.glob("usr/lib/*/ld-linux-*.so.*")
            command = [loader, "--library-path", loader.parent, root / "usr/bin/glslc"]
            fresh = work / "glslc.fresh"
            fresh.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
            fresh.chmod(0o755)
            fresh.replace(program)
    print(f"glslc: {os.path.relpath(program)}: {call(program, '--version').splitlines()[0]}")


if __name__ == "__main__":
    run(main, hint="; run it again to continue")
