"""The tools for 64-bit ARM Linux on another machine: Debian's cross compiler and QEMU."""

import platform
import shutil

PREFIX = "aarch64-linux-gnu-"
PACKAGES = "gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user"
COMPILERS = PREFIX + "gcc", PREFIX + "g++"
EMULATOR = "qemu-aarch64"


def missing(*programs: str) -> str:
    """Why these programs (default: compilers and emulator) can't run here, and how to get them; "" if they can."""
    absent = [program for program in programs or (*COMPILERS, EMULATOR) if not shutil.which(program)]
    if absent:
        return f"{', '.join(absent)} missing: apt-get install {PACKAGES}"
    system = platform.freedesktop_os_release()
    return "" if programs or system["ID"] == "debian" else f"this needs Debian's packages for ARM, and this system is {system['NAME']}"
