"""Builds sherry_gguf._kernels from ggml_patch/src, the same files that llama.cpp's build compiles."""

import os
import re
import sys
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "ggml_patch" / "src"
FLAGS = ["-std=c11", "-O3"]

HEADERS = ["tq1_25.h", "attention.h", "tile.h", "isas.h", "repack.h"]
BODY = r"(?: .*\n|\n)*?\}"  # indented lines, then a brace; cffi gets code of any other layout as it is

NOT_OPEN = "(?! tq1_25_isa| sherry_attention)"  # of these types Python uses the members


def declarations(header: str) -> str:
    """The declarations in one of our headers, as cffi reads them; the compiler fills in each `...`.

    Relies on clang-format's layout, such as closing braces at the start of a line.
    """
    text = re.sub(r"//.*", "", header)
    constants = re.findall(r"^#define (\w+) +[(\d]", text, re.M)
    text = re.sub(r"^#ifdef __cplusplus\n(?:.*\n)*?#endif|^ *#.*(?:\\\n.*)*|TQ1_25_ASSERT.*;|TQ1_25_API", "", text, flags=re.M)
    text = re.sub(r"^((?:typedef )?(?:struct|union)" + NOT_OPEN + r"[^;{]*)\{\n" + BODY, r"\1{ ...; }", text, flags=re.M)  # types
    text = re.sub(r"^static inline (.*\)) \{(?:.*\}$|\n" + BODY + ")", r"\1;", text, flags=re.M)  # functions
    text = re.sub(r" = \{\n" + BODY, "", text)  # arrays
    return "".join(f"#define {name} ...\n" for name in constants) + re.sub(r"\[[A-Z]\w*\]", "[...]", text)


def builder(directory: Path) -> cffi.FFI:
    """The declarations of our headers in `directory`. Raises ValueError, which names the header that can't be parsed."""
    ffi = cffi.FFI()
    for name in HEADERS:
        try:
            ffi.cdef(declarations((directory / name).read_text()))
        except (cffi.CDefError, cffi.FFIError) as error:
            raise ValueError(f"{directory / name}: format it with clang-format, or extend declarations() in {__file__}: {error}") from error
    return ffi


ffibuilder = builder(SOURCES)
ffibuilder.set_source(
    "sherry_gguf._kernels",
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[os.path.relpath(path) for path in sorted(SOURCES.rglob("*.c"))],
    depends=[os.path.relpath(path) for pattern in ("*.h", "*.inc") for path in sorted(SOURCES.rglob(pattern))],
    include_dirs=[os.path.relpath(SOURCES)],
    extra_compile_args=[] if sys.platform == "win32" else FLAGS,
)
