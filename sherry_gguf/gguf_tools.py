"""`sherry-gguf gguf TOOL ...`: the tools of the published gguf package, on files with these types."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from . import atomic, gguf_type, signals
from .errors import ConvertError
from .reader import open_gguf

TOOLS = {  # name to what it does; gguf-NAME is the package's own program
    "dump": "show a file's metadata and tensors, also as JSON or Markdown",
    "set-metadata": "change a number in a file's metadata, in place",
    "new-metadata": "copy a file and change its name, chat template or special tokens",
    "hash": "print checksums of the tensors, which metadata do not change",
}
# Tensors are found with these: after a change, set-metadata could not even read the file to undo it.
LAYOUT = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.alignment")


def main(argv: list[str] | None = None, prog: str = "sherry-gguf gguf") -> int:
    """Run a tool with the rest of the arguments; returns its exit code: 2 without a known tool, 1 after an error.

    argv: the arguments; None: those of the process. prog: the command's name in help and messages. Raises SystemExit where the tool does.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in TOOLS:
        asked = argv[:1] in (["-h"], ["--help"])
        print(_help(prog), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    tool, rest = argv[0], argv[1:]
    if tool == "set-metadata":
        if key := next((a for a in rest if a in LAYOUT), ""):
            print(f"{prog} {tool}: {key} says where the tensors are: with another value no program could read the file", file=sys.stderr)
            return 1
    try:
        if tool == "set-metadata":
            rest = _with_truth(rest)
        with signals.raised(), _arguments([f"{prog} {tool}", *rest]), _guarded():
            importlib.import_module(f"gguf.scripts.gguf_{tool.replace('-', '_')}").main()
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as with `| head`
        sys.stdout = None  # type: ignore[assignment]  # it cannot be written, not even at exit
        return 1
    except EOFError:
        print(f"\n{prog} {tool}: it asks for YES, and there is no input: pass --force", file=sys.stderr)
        return 1
    except (ConvertError, OSError, ValueError, OverflowError, LookupError, AttributeError, TypeError) as e:
        print(f"{prog} {tool}: {e or type(e).__name__}", file=sys.stderr)
        return 1
    except signals.Interrupted as e:
        print(f"{prog} {tool}: interrupted", file=sys.stderr)
        return e.exit_code
    return 0


def _with_truth(words: list[str]) -> list[str]:
    """The arguments of set-metadata, which takes each text but "" for true. Raises ConvertError, ValueError."""
    places = [i for i, word in enumerate(words) if not re.match("--?[a-zA-Z]", word)]
    if len(places) != 3:
        return words
    file, key, value = (words[i] for i in places)
    field = open_gguf(Path(file)).fields.get(key)  # of this file alone, which may be one of a split
    if field and field.types == [gguf_type.register().GGUFValueType.BOOL]:
        if value.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{key} is true or false, not {value!r}")
        words[places[2]] = value.lower() if value.lower() in ("true", "1") else ""
    return words


def _help(prog: str) -> str:
    listed = "\n".join(f"  {name:14}{does}" for name, does in TOOLS.items())
    return f"usage: {prog} TOOL ...\n\nRun a tool of the gguf package on files with these types.\n\ntools, each with --help:\n{listed}"


@contextlib.contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Within the block, the process has these arguments: the tools read no others."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Within the block the gguf package knows the types, reads no damaged file, and writes a file whole or not at all.

    Its own writer empties a file first, even if that is the one that it copies.
    """
    gguf = gguf_type.register()
    plain_writer, plain_init = gguf.GGUFWriter, gguf.GGUFReader.__init__
    stack = contextlib.ExitStack()

    class Writer(plain_writer):  # type: ignore[misc, valid-type]
        def __init__(self, path, *args, **kwargs):
            self.target = atomic.writable(Path(path))
            self.staged = stack.enter_context(atomic.staging(self.target, 0)) / self.target.name
            super().__init__(self.staged, *args, **kwargs)

        def close(self):
            super().close()
            atomic.flushed_sha256(self.staged)
            atomic.commit([self.staged], [self.target])

    def init(self, path, *args, **kwargs):
        if type(self) is gguf.GGUFReader:  # and not the checking reader itself
            open_gguf(Path(path))
        plain_init(self, path, *args, **kwargs)

    gguf.GGUFWriter, gguf.GGUFReader.__init__ = Writer, init
    try:
        with stack:
            yield
    finally:
        gguf.GGUFWriter, gguf.GGUFReader.__init__ = plain_writer, plain_init
