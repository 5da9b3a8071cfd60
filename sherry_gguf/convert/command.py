"""`sherry-gguf convert`: its flags, and the table that it prints."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from .. import patterns, tq1_25
from ..report import sizes, table
from . import Report, convert
from .options import STORED_TYPES, UPSTREAM_FLAGS, Options
from .tensor import Tensor
from .upstream import upstream


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] MODEL_DIR"
    parser.description = (
        "Convert a Hugging Face model directory to a GGUF whose blocks have TQ1_25 weights, or TQ1_25_64 where the rows or the groups of "
        "training are not a multiple of 128: bit for bit if they are 3:4 sparse ternary, else by Sparse-AbsMean."
    )
    parser.set_defaults(usage_error=parser.error)
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL_DIR", help="the model directory")
    add("--outfile", type=Path, metavar="FILE", help=f"file to write (default: MODEL_DIR/NAME-{tq1_25.NAME}.gguf)")
    add("--require-exact", action="store_true", help="fail unless every quantized tensor is stored bit for bit")
    add("--dry-run", action="store_true", help="print each tensor's type and size, and write nothing")
    add("--vocab-only", action="store_true", help="write only the vocabulary")
    add("--split-max-tensors", type=size, default=0, metavar="N", help="split into files of at most N tensors")
    add("--split-max-size", type=size, default=0, metavar="N(K|M|G)", help="split into files of at most N bytes of tensors")
    add("--no-tensor-first-split", action="store_true", help="put no tensors in the first file of a split")
    add("--model-name", metavar="NAME", help="the model's name in the metadata")
    add("--metadata", type=Path, metavar="FILE", help="JSON file that overrides authorship metadata, as for convert_hf_to_gguf.py")
    add("--print-supported-models", action="store_true", help="list the architectures and exit")
    add_checkpoint_arguments(parser)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that change tensors, tokenizer or metadata: `verify` needs the ones that `convert` was given."""
    add_quantization_arguments(parser)
    add = parser.add_argument
    for flag, what in (
        ("--token-embedding-type", "token embeddings, and of the output if it shares them"),
        ("--output-tensor-type", "output tensor"),
    ):
        add(flag, metavar="TYPE", help=f"type of the {what} (default: F16): {', '.join(STORED_TYPES)}")
    add(
        "--fallback-type",
        metavar="TYPE",
        help="type of the blocks' matrices whose rows are not a multiple of 64: Q8_0, F16, ... (default: Q4_0, as in llama-quantize; "
        "F16 for matrices that training kept in full precision, and if the rows do not fit Q4_0)",
    )
    add(
        "--tokenizer-pre",
        metavar="NAME",
        help="how a BPE tokenizer splits text, by llama.cpp's name, such as gpt-2, llama-bpe or qwen2; needed if llama.cpp does not "
        "recognize the tokenizer",
    )
    add("--no-tokenizer-check", action="store_true", help="do not compare llama.cpp's tokens with transformers' on sample texts")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--mtp", action="store_true", help="only the multi-token prediction head")
    heads.add_argument("--no-nextn", "--no-mtp", action="store_true", help="without the multi-token prediction head")
    add("--target-model-dir", type=Path, metavar="DIR", help="for a draft model: the directory of its target model")
    for flag, text in UPSTREAM_FLAGS.items():
        add("--" + flag.replace("_", "-"), action="append_const", dest="flags", const=flag, default=[], help=text)


def add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which tensors become ternary, and how."""
    add = parser.add_argument
    add(
        "--keep",
        metavar="REGEX",
        action="append",
        default=[],
        help="keep the tensors whose GGUF or Hugging Face name contains a match as they are; repeatable",
    )
    add(
        "--group-size",
        type=int,
        metavar="N",
        help="weights that share a scale, a multiple of 64 (default: the checkpoint's sherry_config, else 128, and 64 in TQ1_25_64)",
    )
    add("--granularity", choices=("per_group", "per_channel", "per_tensor"), help="which weights share a scale (default: likewise)")


def size(text: str) -> int:
    """ "500M" to 500,000,000. Raises argparse.ArgumentTypeError."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in "KMG" and text else (text, "")
    if not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, optionally followed by K, M or G")
    return int(number) * 1000 ** " KMG".index(unit or " ")


def options(args: argparse.Namespace) -> Options:
    """The options that the command line gives. Quiets llama.cpp's log unless --verbose is given."""
    if not args.verbose:
        logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)  # many upstream classes set a key twice
        # Llama's template for two texts has BOS between them
        logging.getLogger("gguf.vocab").addFilter(lambda record: "Unknown separator token" not in record.getMessage())
    return Options(**{k: v for k, v in vars(args).items() if k in Options.__dataclass_fields__}, progress=True)


def run(args: argparse.Namespace) -> int:
    if args.print_supported_models:
        print("\n".join(sorted(upstream().TEXT_MODEL_MAP)))
        return 0
    if args.model is None:
        args.usage_error("the following arguments are required: MODEL_DIR")
    report = convert(args.model, options(args))
    if args.dry_run:
        rows = [(t.name, t.type.name, " x ".join(map(str, t.shape)), t.nbytes, t.source) for t in report.tensors]
        print("\n".join(table(("tensor", "type", "shape", "bytes", "from"), rows)))
    print("\n".join(summary(report, args.dry_run)))
    return 0


def summary(report: Report, dry_run: bool) -> Iterator[str]:
    """The final table. A line stands for the tensors of one type that differ only in the block's number."""
    groups: dict[tuple[str, str], list[Tensor]] = {}
    for t in report.tensors:
        groups.setdefault((patterns.star(t.name), t.type.name), []).append(t)
    rows = [(name, qtype, len(ts), *sizes(ts), _quality(ts, dry_run)) for (name, qtype), ts in groups.items()]
    if rows:
        quantized = [t for t in report.tensors if t.kind]
        rows.append(("total", "", len(report.tensors), *sizes(report.tensors), _quality(quantized, dry_run)))
        yield ""
        yield from table(("tensor", "type", "tensors", "weights", "bytes", "bits/weight", "stored"), rows)
    for note in report.notes:
        yield f"note: {note}"
    for file in report.files:
        yield f"would write {file}" if dry_run else f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB)"


def _quality(tensors: list[Tensor], dry_run: bool) -> str:
    changes = "".join(f", {change}" for change in dict.fromkeys(t.changed for t in tensors if t.changed))
    quantized = [t for t in tensors if t.kind]
    if not quantized:
        return ("fallback" if all(t.misfit for t in tensors) else "kept") + changes
    if dry_run:
        return ""
    inexact = [t for t in quantized if not t.is_exact]
    exact = f"exact {len(quantized) - len(inexact)}/{len(quantized)}"
    if not inexact:
        return exact
    share = sum(t.exact for t in quantized if not t.changed) / sum(t.blocks for t in quantized)
    error, cosine = max(t.relative_error for t in inexact), min(t.cosine for t in inexact)
    return f"{exact}, {100 * share:.1f} % of blocks; quantized: error <= {error:.4f}, cosine >= {cosine:.4f}{changes}"
