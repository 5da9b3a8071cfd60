"""`sherry-gguf quantize`: llama-quantize, with earlier checks and an output file that appears only when complete."""

import argparse
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import atomic, gguf_type, llama_cpp, tq1_25
from .errors import ConvertError
from .gguf_file import split_files

# llama-quantize's flags: flag, metavar or None, help, whether it is repeatable.
FLAGS: tuple[tuple[str, str | None, str, bool], ...] = (
    ("--imatrix", "FILE", "importance matrix, from llama-imatrix", False),
    ("--include-weights", "NAME", "use the importance matrix for this tensor only", True),
    ("--exclude-weights", "NAME", "do not use the importance matrix for this tensor", True),
    ("--pure", None, "give all matrices the same type", False),
    ("--leave-output-tensor", None, "do not quantize output.weight", False),
    ("--output-tensor-type", "TYPE", "type of output.weight", False),
    ("--token-embedding-type", "TYPE", "type of the token embeddings", False),
    ("--tensor-type", "NAME=TYPE", "type of the tensors whose name matches", True),
    ("--tensor-type-file", "FILE", "file with such pairs", False),
    ("--prune-layers", "LIST", "remove these layers, such as 3,4", False),
    ("--override-kv", "KEY=TYPE:VALUE", "change the metadata", True),
    ("--keep-split", None, "write a split if the input is one; OUTPUT is then its prefix", False),
    ("--allow-requantize", None, "quantize tensors again that are already quantized, with loss", False),
    ("--max-buffer-size", "MIB", "memory for the rows of one tensor (default: 8192)", False),
    ("--dry-run", None, "show the size, and write nothing", False),
)


_NAME = "model.gguf"  # of the file that llama-quantize writes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] INPUT OUTPUT [TYPE] [THREADS]"
    parser.description = (
        "Quantize the GGUF of any model with llama-quantize. With TQ1_25, matrices whose rows fit only TQ1_25_64 get that type. A model "
        "that was not trained for these types or STQ1_0 loses much quality in them: train it first, or convert a Sherry checkpoint with "
        "`sherry-gguf convert`."
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="the GGUF to read; for a split, its first file")
    add("output", type=Path, metavar="OUTPUT", help="the GGUF to write; it replaces an older one only when complete")
    add("type", metavar="TYPE", nargs="?", default=tq1_25.NAME, help="the type, by llama-quantize's name (default: %(default)s)")
    add("threads", metavar="THREADS", nargs="?", type=int, help="number of threads (default: all)")
    passed = parser.add_argument_group("llama-quantize's options")
    for flag, metavar, text, repeatable in FLAGS:
        if metavar is None:
            passed.add_argument(flag, action="store_true", help=text)
        else:
            passed.add_argument(flag, metavar=metavar, action=("store", "append")[repeatable], help=text + "; repeatable" * repeatable)


def run(args: argparse.Namespace) -> int:
    flags: list[str] = []
    for flag, metavar, _, repeatable in FLAGS:
        value = getattr(args, flag[2:].replace("-", "_"))
        if metavar is None:
            flags += [flag] * value
        elif value is not None:
            for v in value if repeatable else [value]:
                flags += [flag, v]
    if args.output.name.upper() in _types():
        raise ConvertError(f"OUTPUT is missing: {args.output} is a type. To write a file of this name, call it ./{args.output}.gguf")
    for file in quantize(args.input, args.output, args.type, flags, args.threads):
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


def quantize(source: Path, target: Path, kind: str = tq1_25.NAME, flags: Sequence[str] = (), threads: int | None = None) -> list[Path]:
    """Run llama-quantize; its output goes to stdout and stderr. Returns the files that it wrote.

    kind: llama-quantize's name of a type, such as "TQ1_25"; flags: its own; with --dry-run it writes nothing.
    Raises ConvertError, also if llama-quantize fails, and NotBuilt; then the target is as it was.
    """
    if not source.is_file():
        raise ConvertError(f"{source}: {'not an ordinary file' if source.exists() else 'no such file'}")
    target = _checked(target, source)
    # llama-quantize takes a path that begins with a number for a type, and one with dashes for a flag: an absolute path is neither.
    source, end = source.absolute(), [kind, *([str(threads)] if threads is not None else [])]
    if "--dry-run" in flags:
        _run([*flags, str(source), str(target.absolute()), *end])
        return []
    with atomic.staging(target.absolute(), 0) as staging:
        _run([*flags, str(source), str(staging / _NAME), *end])
        staged = sorted(staging.iterdir())
        if not staged:
            raise ConvertError(f"llama-quantize wrote nothing to {staging}")
        split = target.name.removesuffix(".gguf")  # with --keep-split llama-quantize numbers the files
        names = [target.name if f.name == _NAME else split + f.name.removeprefix(_NAME.removesuffix(".gguf")) for f in staged]
        files = [_checked(target.with_name(name), source) for name in names]
        atomic.commit(staged, files)
    return files


def _types() -> set[str]:
    """llama-quantize's names of types, most of them."""
    from gguf import LlamaFileType

    return {"COPY", *gguf_type.TYPES, *(kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType)}


def _checked(target: Path, source: Path) -> Path:
    """The path to write, which may not be an input file. Raises ConvertError."""
    target = atomic.writable(target)
    if target.exists() and any(file.exists() and file.samefile(target) for file in split_files(source)):
        raise ConvertError(f"{target} is an input file: name another one to write")
    return target


def _run(arguments: list[str]) -> None:
    done = llama_cpp.run("llama-quantize", *arguments, stdin=subprocess.DEVNULL)
    if done.returncode:
        how = f"exit code {done.returncode}" if done.returncode > 0 else f"signal {signal.Signals(-done.returncode).name}"
        raise ConvertError(f"llama-quantize failed with {how}: see its messages above. Nothing was written")
