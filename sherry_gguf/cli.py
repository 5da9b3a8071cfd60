"""`sherry-gguf convert | verify | inspect | retag | transcode`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from . import convert, inspect, patterns, report, retag, tq1_25, transcode, verify
from .convert import Options
from .errors import ConvertError, NotBuilt


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure that is told, 128 and the signal's number when
    interrupted.

    With `prog`, the command's parser is used alone, under that name.
    """
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "convert": (_convert_parser, _convert),
        "verify": (_verify_parser, _verify),
        "inspect": (_inspect_parser, _inspect),
        "retag": (_retag_parser, _retag),
        "transcode": (_transcode_parser, _transcode),
    }
    if prog:
        make, run = commands[argv[0]]
        parser = argparse.ArgumentParser(prog=prog)
        make(parser)
        args = parser.parse_args(argv[1:])
    else:
        parser = argparse.ArgumentParser(prog="sherry-gguf", description="Sherry models (3:4 sparse ternary) as GGUF.")
        sub = parser.add_subparsers(dest="command", required=True)
        for name, (make, _) in commands.items():
            make(sub.add_parser(name))
        args = parser.parse_args(argv)
        run = commands[args.command][1]

    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not args.verbose:
        logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)  # many classes of upstream set a key twice
        logging.getLogger("gguf.vocab").addFilter(_worth_saying)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding does not
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) != signal.SIG_IGN}

    def terminate(number, frame):
        for s in previous:  # what cleans up is not to be interrupted again
            signal.signal(s, signal.SIG_IGN)
        raise _Terminated(number)

    try:
        for number in previous:
            signal.signal(number, terminate)
        code = run(args, parser)
        if sys.stdout:
            sys.stdout.flush()
        return code
    except (ConvertError, MemoryError, OSError, RuntimeError) as e:
        if not isinstance(e, (ConvertError, NotBuilt)) and sys.stdout and not _flushes(sys.stdout):
            sys.stdout = None  # nothing can be written there, at the exit neither
            if isinstance(e, BrokenPipeError):  # the reader of our output has gone, as with `| head`
                return 1
        if args.verbose:
            raise
        told = str(e) or type(e).__name__
        print(f"error: {'not enough memory: ' * isinstance(e, MemoryError)}{told}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, _Terminated) as e:
        in_place = getattr(args, "in_place", False)
        print(f"interrupted: {'the same command again finishes it' if in_place else 'no half-written file is left'}", file=sys.stderr)
        return 128 + (e.number if isinstance(e, _Terminated) else signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _flushes(stream) -> bool:
    try:
        stream.flush()
        return True
    except OSError:
        return False


class _Terminated(BaseException):
    def __init__(self, number: int):
        self.number = number


# ---- convert ----


def _convert_parser(parser: argparse.ArgumentParser):
    parser.description = (
        "Convert a Hugging Face model directory to a GGUF with the blocks' weights as TQ1_25: "
        "bit for bit where they are 3:4 sparse ternary, else by Sparse-AbsMean."
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="the model directory")
    add("--outfile", type=Path, help=f"file to write (default: <model>/<its name>-{tq1_25.NAME}.gguf)")
    add("--require-exact", action="store_true", help="fail unless every quantized tensor is stored bit for bit")
    add("--dry-run", action="store_true", help="print each tensor's type and size, write nothing")
    add("--vocab-only", action="store_true", help="write only the vocabulary")
    add("--split-max-tensors", type=_size, default=0, metavar="N", help="most tensors in one file")
    add("--split-max-size", type=_size, default=0, metavar="N(K|M|G)", help="most bytes of tensors in one file")
    add("--no-tensor-first-split", action="store_true", help="put no tensors in the first file of a split")
    add("--model-name", help="name of the model")
    add("--metadata", type=Path, help="JSON file that overrides authorship metadata, as for convert_hf_to_gguf.py")
    add("--print-supported-models", action="store_true", help="list the architectures and exit")
    _tensor_flags(parser)


def _tensor_flags(parser: argparse.ArgumentParser):
    """What changes tensors, tokenizer or metadata: convert and verify must be given the same."""
    add = parser.add_argument
    add(
        "--keep",
        metavar="REGEX",
        action="append",
        default=[],
        help="keep the tensors whose GGUF name or Hugging Face name matches anywhere, as F16; repeatable",
    )
    for flag, of in (
        ("--token-embedding-type", "token embeddings; with tied embeddings of the output too"),
        ("--output-tensor-type", "output tensor"),
    ):
        add(flag, metavar="TYPE", help=f"type of the {of} (default: F16): {', '.join(convert.STORED_TYPES)}")
    add(
        "--fallback-type",
        metavar="TYPE",
        help="type of the blocks' matrices whose rows are not a multiple of 128: Q8_0, F16, ... (default: Q4_0, as llama-quantize has "
        "it, but F16 for those that training kept in full precision, and where rows do not fit the type either)",
    )
    add(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale, a multiple of 128; overrules the checkpoint's sherry_config (default: what that says, else 128)",
    )
    add("--granularity", choices=("per_group", "per_channel", "per_tensor"), help="likewise what shares a scale")
    add(
        "--tokenizer-pre",
        metavar="NAME",
        help="llama.cpp's name of how a BPE tokenizer splits text, such as gpt-2, "
        "llama-bpe or qwen2; needed for tokenizers trained at home, which llama.cpp cannot recognise",
    )
    add(
        "--no-tokenizer-check",
        action="store_true",
        help="do not compare how llama.cpp and transformers split a sample of texts into tokens",
    )
    add("--mtp", action="store_true", help="only the multi-token prediction head")
    add("--no-nextn", "--no-mtp", action="store_true", help="without the multi-token prediction head")
    add("--target-model-dir", type=Path, help="for draft models: the directory of their target model")
    for flag, text in convert.UPSTREAM_FLAGS.items():
        add("--" + flag.replace("_", "-"), action="append_const", dest="flags", const=flag, default=[], help=text)
    add("--verbose", action="store_true", help="show llama.cpp's log, and a traceback on errors")


def _worth_saying(record: logging.LogRecord) -> bool:
    return "Unknown separator token" not in record.getMessage()  # Llama's template for two texts has BOS between them


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in "KMG" and text else (text, "")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, optionally followed by K, M or G")
    return int(number) * 1000 ** " KMG".index(unit or " ")


def _convert(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.print_supported_models:
        from_map = convert.upstream().TEXT_MODEL_MAP
        print("\n".join(sorted(from_map)))
        return 0
    if args.model is None:
        parser.error("the following arguments are required: model")
    if args.mtp and args.no_nextn:
        parser.error("--mtp and --no-nextn exclude each other")
    done = convert.convert(args.model, _options(args))
    if args.dry_run:
        rows = [(t.name, t.type.name, " x ".join(map(str, t.shape)), t.nbytes, t.source) for t in done.tensors]
        print("\n".join(report.table(("tensor", "type", "shape", "bytes", "from"), rows)))
    print("\n".join(_summary(done, args.dry_run)))
    return 0


def _options(args: argparse.Namespace) -> Options:
    return Options(**{k: v for k, v in vars(args).items() if k in Options.__dataclass_fields__}, progress=True)


def _summary(done: convert.Report, dry_run: bool):
    """The final table: the tensors of one place in all blocks, of one type, are a line."""
    groups: dict[tuple, list[convert.Tensor]] = {}
    for t in done.tensors:
        groups.setdefault((patterns.star(t.name), t.type.name), []).append(t)
    rows = [(name, qtype, len(ts), *report.sizes(ts), _quality(ts, dry_run)) for (name, qtype), ts in groups.items()]
    if rows:
        quantized = [t for t in done.tensors if t.type.name == tq1_25.NAME]
        rows.append(("total", "", len(done.tensors), *report.sizes(done.tensors), _quality(quantized, dry_run)))
        yield ""
        yield from report.table(("tensor", "type", "tensors", "weights", "bytes", "bits/weight", "stored"), rows)
    for note in done.notes:
        yield f"note: {note}"
    verb = "would write" if dry_run else "wrote"
    for file in done.files:
        yield f"{verb} {file}" + ("" if dry_run else f" ({file.stat().st_size / 1e6:.1f} MB)")


def _quality(tensors: list[convert.Tensor], dry_run: bool) -> str:
    changes = "".join(f", {change}" for change in dict.fromkeys(t.changed for t in tensors if t.changed))
    misfit = all(t.misfit for t in tensors)
    tensors = [t for t in tensors if t.type.name == tq1_25.NAME]
    if dry_run or not tensors:
        return "" if tensors else f"{'fallback' if misfit else 'kept'}{changes}"
    inexact = [t for t in tensors if not t.is_exact]
    if not inexact:
        return f"exact {len(tensors)}/{len(tensors)}"
    share = sum(t.exact for t in tensors if not t.changed) / sum(t.blocks for t in tensors)
    return (
        f"exact {len(tensors) - len(inexact)}/{len(tensors)}, {100 * share:.1f} % of blocks; quantized: error "
        f"<= {max(t.relative_error for t in inexact):.4f}, cosine >= {min(t.cosine for t in inexact):.4f}{changes}"
    )


# ---- verify, inspect ----


def _verify_parser(parser: argparse.ArgumentParser):
    parser.description = (
        "Prove, tensor by tensor, that a TQ1_25 GGUF holds what a model directory holds. Give the flags below that "
        "the conversion was given."
    )
    parser.add_argument("gguf", type=Path, help="the GGUF; of a split, any of its files")
    parser.add_argument("model", type=Path, help="the model directory that it was made from")
    _tensor_flags(parser)


def _verify(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    verdict = verify.verify(args.gguf, args.model, _options(args))
    for problem in verdict.problems:
        print(f"differs: {problem}")
    for change, tensors in verdict.changed.items():
        print(f"note: {change}, as llama.cpp stores it: {report.starred(tensors)}")
    kept = ", ".join(f"{n} {qtype}" for qtype, n in sorted(verdict.kept.items()))
    print(
        f"{verdict.exact} {tq1_25.NAME} tensors bit for bit as in the checkpoint, {verdict.quantized} as the "
        f"reference quantizes them, {verdict.kept.total()} kept in another type{f' ({kept})' * bool(kept)}; "
        f"{len(verdict.problems) or 'no'} "
        f"difference{'s' * (len(verdict.problems) != 1)}"
    )
    return 1 if verdict.problems else 0


def _inspect_parser(parser: argparse.ArgumentParser):
    parser.description = "Print what is in a GGUF file: metadata, types, sizes, and what was stored exactly."
    parser.add_argument("gguf", type=Path, help="the GGUF; of a split, any of its files")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--verbose", action="store_true", help="a traceback on errors")


def _inspect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for line in inspect.inspect(args.gguf, args.tensors):
        print(line)
    return 0


# ---- retag ----


def _retag_parser(parser: argparse.ArgumentParser):
    parser.description = (
        "Give the STQ1_0 tensors of an old file the type's number of today, 43. The first files have 42, which upstream has "
        "given to Q2_0 since: which of both a tensor is shows in its size."
    )
    parser.add_argument("gguf", type=Path, help="the file")
    parser.add_argument("output", type=Path, nargs="?", help="the copy to write")
    parser.add_argument("--in-place", action="store_true", help="change the file itself")
    parser.add_argument("--verbose", action="store_true", help="a traceback on errors")


def _retag(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if (args.output is None) != args.in_place:
        parser.error("give a file to write, or --in-place")
    count, file_type = retag.retag_in_place(args.gguf) if args.in_place else retag.retag(args.gguf, args.output)
    print(f"{args.output or args.gguf}: {count} tensors are STQ1_0 by number 43 now{', and so is general.file_type' * file_type}")
    return 0


# ---- transcode ----


def _transcode_parser(parser: argparse.ArgumentParser):
    parser.description = (
        "Write a GGUF file with its ternary tensors in another type, exactly where that can hold the values, and say where not. "
        "Everything else is copied."
    )
    parser.add_argument("gguf", type=Path, help="the file; of a split, each is a call")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--to", required=True, choices=transcode.TARGETS, help="the type")
    parser.add_argument("--require-exact", action="store_true", help="fail unless every value is kept")
    parser.add_argument("--verbose", action="store_true", help="a traceback on errors")


def _transcode(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for line in transcode.summary(*transcode.transcode(args.gguf, args.output, args.to, args.require_exact, progress=True)):
        print(line)
    print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
