"""`sherry-gguf VERB ...`: one command for everything."""

import argparse
import importlib
import logging
import sys

from . import signals
from .errors import ConvertError, NotBuilt

# Verb to its module and what it does. A module is imported only when its verb is used: some need PyTorch.
VERBS = {
    "convert": ("convert.command", "convert a Hugging Face model directory to a ternary GGUF"),
    "pack": ("pack", "pack a model directory's weights for transformers"),
    "verify": ("verify", "prove that a GGUF holds what a model directory holds"),
    "inspect": ("inspect", "show a GGUF's metadata, types, sizes, and what is exact"),
    "transcode": ("transcode", "change the type of a GGUF's ternary tensors"),
    "retag": ("retag", "make an old STQ1_0 file loadable"),
    "gguf": ("gguf_tools", "the gguf package's tools: dump, set-metadata, ..."),
    "quantize": ("llama_quantize", "quantize a GGUF of any model, with llama-quantize"),
    "convert-adapter": ("quaff.adapter", "convert a LoRA adapter of PEFT to a GGUF for llama.cpp"),
    "train": ("qat.command", "train a model with 3:4 sparse ternary weights"),
    "calibrate": ("calibration.command", "make a trained model 3:4 sparse ternary, layer by layer"),
    "finetune": ("quaff.command", "fine-tune an adapter on a frozen quantized model"),
    "evaluate": ("evaluation.command", "measure perplexity and accuracy of models"),
    "bench": ("bench", "compare how fast models run"),
    "demo": ("demo", "continue a story with a small model that comes along"),
    "run": ("launch", "answer a prompt or chat, with llama.cpp's tools"),
    "serve": ("launch", "serve a model over HTTP, with llama-server"),
}
# These parse their own arguments: the function of the module.
MAINS = dict.fromkeys(("train", "calibrate", "finetune", "evaluate", "bench", "gguf"), "main") | {"run": "run", "serve": "serve"}
WITH_LOG = ("convert", "pack", "verify")  # these run llama.cpp's converter


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run a verb; returns the exit code: 0, 1 after a reported failure, 2 without a verb, 128 + n after signal n.

    prog: the name in help and errors, instead of "sherry-gguf VERB".
    """
    try:
        return _main(sys.argv[1:] if argv is None else argv, prog)
    except ModuleNotFoundError as e:
        print(f"error: the Python package {e.name} is not installed: run scripts/setup.sh, or pip install {e.name}", file=sys.stderr)
        return 1


def _main(argv: list[str], prog: str | None) -> int:
    if argv and argv[0] in MAINS:
        return getattr(_module(argv[0]), MAINS[argv[0]])(argv[1:], prog or f"sherry-gguf {argv[0]}")
    parser = argparse.ArgumentParser(
        prog="sherry-gguf",
        usage="%(prog)s VERB [options]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert, run and train models with Sherry's 3:4 sparse ternary weights.",
        epilog="\n".join(["verbs, each with --help:", *(f"  {verb:15}  {does}" for verb, (_, does) in VERBS.items())]),
    )
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="what to do")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if argv[0] == "--version":
        print(f"sherry-gguf {importlib.import_module(__package__).__version__}")
        return 0
    verb = parser.parse_args(argv[:1]).verb
    module = _module(verb)
    parser = argparse.ArgumentParser(prog=prog or f"sherry-gguf {verb}")
    module.add_arguments(parser)
    log = "llama.cpp's log, and " * (verb in WITH_LOG)
    parser.add_argument("--verbose", action="store_true", help=f"show {log}a traceback on errors")
    return _run(module, parser.parse_args(argv[1:]))


def _module(verb: str):
    with signals.exit_at_once("interrupted"):  # some import PyTorch
        return importlib.import_module(f".{VERBS[verb][0]}", __package__)


def _run(module, args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a path's characters
    try:
        with signals.raised():
            code = module.run(args)
            if sys.stdout:
                sys.stdout.flush()
            return code
    except (ConvertError, MemoryError, OSError, RuntimeError) as e:
        if not isinstance(e, (ConvertError, NotBuilt)) and sys.stdout and not _flushes(sys.stdout):
            sys.stdout = None  # it cannot be written, not even at exit
            if isinstance(e, BrokenPipeError):  # the reader has gone, as with `| head`
                return 1
        if args.verbose:
            raise
        memory = "not enough memory: " if isinstance(e, MemoryError) else ""
        print(f"error: {memory}{str(e) or type(e).__name__}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, signals.Interrupted) as e:
        left = "run the same command again to finish" if getattr(args, "in_place", False) else "no half-written file is left"
        print(f"interrupted: {left}", file=sys.stderr)
        return e.exit_code if isinstance(e, signals.Interrupted) else 130


def _flushes(stream) -> bool:
    try:
        stream.flush()
        return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
