"""`sherry-gguf pack`: a Sherry checkpoint to one whose weights are TQ1_25 blocks, which transformers loads (docs/transformers.md)."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import atomic, gguf_type, ternary
from .convert import Options, Report, command, findings
from .convert.checkpoint import Grouping, check_checkpoint, check_input, read_grouping
from .convert.encode import WORKERS, Encoder
from .convert.plan import make_plan, type_notes
from .convert.provenance import Checkpoint
from .convert.tensor import Tensor
from .convert.upstream import convert_errors, instantiate, read_json, upstream
from .convert.writer import check_exact
from .errors import ConvertError
from .packed import layout
from .report import progress_bar, starred

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")  # files that are not copied
_COPIED = 1 << 24  # bytes at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] MODEL_DIR"
    parser.description = (
        "Write a copy of a Hugging Face model directory whose layers hold TQ1_25 blocks, or TQ1_25_64 where convert would use these. "
        "transformers loads it after `import sherry_gguf`, and `sherry-gguf convert` makes the same GGUF of both."
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL_DIR", help="the model directory")
    add("--outfile", "--out", type=Path, metavar="DIR", help="directory to write (default: MODEL_DIR-packed)")
    add("--require-exact", action="store_true", help="fail unless every packed tensor is stored bit for bit")
    add("--max-shard-size", type=command.size, default=5 * 10**9, metavar="N(K|M|G)", help="size of a file, at most (default: 5G)")
    command.add_quantization_arguments(parser)


def run(args: argparse.Namespace) -> int:
    report = pack(args.model, command.options(args), args.max_shard_size)
    print("\n".join(command.summary(report, dry_run=False)))
    return 0


@dataclasses.dataclass
class _Piece:
    """A tensor of the packed checkpoint: `made` of blocks, or copied from a file."""

    name: str
    dtype: str  # of safetensors
    shape: tuple[int, ...]
    nbytes: int
    made: Tensor | None = None
    file: Path = Path()
    offset: int = 0


def pack(model_dir: Path, options: Options | None = None, shard: int = 5 * 10**9) -> Report:
    """Pack a model directory into options.outfile, a directory that must be new or empty.

    options: keep, group_size, granularity, require_exact and progress count. shard: bytes of a file, at most.
    Raises ConvertError, NotBuilt; then nothing was written.
    """
    model_dir, options = Path(model_dir), options or Options()
    check_input(model_dir, options)
    target = Path(os.path.realpath(options.outfile or f"{os.path.abspath(model_dir)}-packed"))
    if os.path.ismount(target):
        raise ConvertError(f"{target} is a mount point, which no finished directory can replace: name one inside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} already has something in it: remove it, or name another --out")
    if not target.parent.is_dir():
        raise ConvertError(f"cannot write {target}: {target.parent} is not a directory. Create it first")
    config = read_json(model_dir / "config.json") if (model_dir / "config.json").is_file() else {}
    if method := config.get("quantization_config"):
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise ConvertError(f"{model_dir} is quantized already ({name}): pack the checkpoint that it was made from")
    grouping = read_grouping(model_dir, options)
    import torch

    with torch.inference_mode(), concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        files = check_checkpoint(model_dir)
        if other := next((file for file in files.values() if file.suffix != ".safetensors"), None):
            raise ConvertError(f"{other}: only safetensors are packed. Load the model with transformers and save it again")
        model = instantiate(model_dir, options, "MOSTLY_F16")
        plan = make_plan(model, options, grouping)
        checkpoint = Checkpoint(model)
        layers, shapes = _modules(model_dir)
        pieces, unpacked = _pieces(model, plan, checkpoint, files, layers)
        for piece in pieces:
            original = piece.made.shape if piece.made else piece.shape
            name = piece.name.removesuffix(layout.TENSOR) + "weight" * bool(piece.made)
            if shapes.get(name, original) != original:
                raise ConvertError(
                    f"{model_dir}: {name} is {' x '.join(map(str, original))}, and {' x '.join(map(str, shapes[name]))} by config.json: "
                    "they do not belong together"
                )
        made = {piece.name: piece.made for piece in pieces if piece.made}
        if not made:
            raise ConvertError(f"{model_dir}: there is nothing to pack, transformers has no torch.nn.Linear for {starred(unpacked)}")
        packed = _config(config, grouping, pieces, complete=not unpacked and not options.keep)
        with atomic.staging(target, sum(piece.nbytes for piece in pieces)) as staging:
            new = staging / "model"
            new.mkdir()
            names = _write(new, pieces, Encoder(grouping, pool, checkpoint), shard, options.progress)
            if options.require_exact:
                check_exact(model, [*made.values()], grouping)
            for path in model_dir.iterdir():
                if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS) and path.name != "config.json":
                    shutil.copyfile(path, new / path.name)
            (new / "config.json").write_text(json.dumps(packed, indent=2) + "\n", "utf-8")
            atomic.commit_directory(new, target)
    notes = [*type_notes([t for t in plan if t.kind]), *findings(model, [*made.values()], grouping)]
    if unpacked:
        notes.append(f"kept as they are, since transformers has no torch.nn.Linear for them: {starred(unpacked)}")
    return Report([target / name for name in names], [t for p in pieces if (t := p.made or _kept(p))], notes)


def _modules(model_dir: Path) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """The names of transformers' torch.nn.Linear layers, and the shapes of all tensors, with and without the prefix of the base model."""
    import accelerate
    import torch
    import transformers

    with convert_errors(f"{model_dir}: transformers has no such causal language model"), accelerate.init_empty_weights():
        model: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model_dir))
    names = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return names | {name.removeprefix(prefix) for name in names}, {name.removeprefix(prefix): shapes[name] for name in shapes} | shapes


def _pieces(
    model: Any, plan: list[Tensor], checkpoint: Checkpoint, files: dict[str, Path], layers: set[str]
) -> tuple[list[_Piece], list[Tensor]]:
    """The tensors to write, and those of the plan that stay unpacked because transformers has no linear layer for them."""
    types = gguf_type.register().GGMLQuantizationType
    outs: dict[str, list[Tensor]] = {}
    for t in plan:
        for source in checkpoint.sources(t.name, t.data):
            outs.setdefault(source, []).append(t)
    pieces: list[_Piece] = []
    packed: set[str] = set()
    stored = {file: _contents(file) for file in set(files.values())}
    for name, file in files.items():
        local = stored[file][name]
        piece = _Piece(name, local.dtype, tuple(local.shape), local.data_range.size, None, file, local.data_range.offset)
        source, layer = (model.filter_tensors((name, None)) or ("",))[0], name.removesuffix(".weight")
        of = outs.get(source, [])
        kinds = {(t.kind, t.group, t.shape[-1]) if t.kind else None for t in of}
        if layer in layers and name.endswith(".weight") and len(kinds) == 1 and (only := kinds.pop()) and only[2:] == piece.shape[1:]:
            kind, group, n = only
            size = n // kind.size * kind.bytes
            t = Tensor(name, source, piece.shape, types[kind.name], piece.shape[0] * size, model.model_tensors[source](), group=group)
            piece = _Piece(f"{layer}.{layout.TENSOR}", "U8", (piece.shape[0], size), t.nbytes, t)
            packed.update(t.name for t in of)
        pieces.append(piece)
    return pieces, [t for t in plan if t.kind and t.name not in packed]


def _contents(file: Path) -> dict[str, Any]:
    """gguf's LocalTensor of each tensor in a safetensors file."""
    upstream()
    from gguf.utility import SafetensorsLocal

    with SafetensorsLocal(file) as tensors:
        return dict(tensors.items())


def _kept(piece: _Piece) -> Tensor | None:
    """A copied tensor, for the report."""
    types = gguf_type.register().GGMLQuantizationType.__members__
    if (qtype := types.get(piece.dtype)) is None:  # U8, BOOL
        return None
    return Tensor(piece.name, piece.name, piece.shape, qtype, piece.nbytes, None)


def _config(config: dict[str, Any], grouping: Grouping, pieces: list[_Piece], complete: bool) -> dict[str, Any]:
    """config.json of the packed checkpoint. complete: whether all ternary tensors of a GGUF are packed."""
    kinds = {p.name.removesuffix(f".{layout.TENSOR}"): p.made.kind for p in pieces if p.made and p.made.kind}
    others = [piece.name.rpartition(".")[0] for piece in pieces if not piece.made]
    sherry = {k: v for k, v in (config.get("sherry_config") or {}).items() if k not in ("group_size", "group_sizes")}
    sherry |= {"method": "sparse_absmean", "n": ternary.KEPT, "m": ternary.GROUP, "granularity": grouping.granularity}
    if grouping.granularity == "per_group":
        sherry["group_size"] = grouping.group_size
        if grouping.group_sizes:
            sherry["group_sizes"] = grouping.group_sizes
    if grouping.kept:
        sherry["kept"] = sorted(grouping.kept)
    if grouping.weights:
        sherry["weights"] = "fake_quantized" if complete else grouping.weights
    named = [key for key in ("dtype", "torch_dtype") if config.get(key)]
    half = any(piece.dtype == "F16" for piece in pieces)  # which transformers takes where config.json names none
    floats = {
        key: "float32" for key in named or ["dtype"] * half if config.get(key, "float16") == "float16"
    }  # packed layers multiply no F16
    return (
        config
        | floats
        | {
            "sherry_config": sherry,
            "quantization_config": {"quant_method": layout.METHOD, "modules": layout.modules_of(kinds, others)},
        }
    )


def _write(directory: Path, pieces: list[_Piece], encoder: Encoder, shard: int, progress: bool) -> list[str]:
    """Write the tensors as save_pretrained would, and read the files back; returns their names. Raises ConvertError."""
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {piece.name: piece for piece in pieces}
    split = split_state_dict_into_shards_factory(
        by_name, get_storage_size=lambda piece: piece.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )
    with progress_bar(progress, total=sum(piece.nbytes for piece in pieces), unit="B", unit_scale=True) as bar:
        for file, names in split.filename_to_tensors.items():
            digest = hashlib.sha256()
            with open(directory / file, "wb") as f:
                for data in _content([by_name[name] for name in names], encoder):
                    digest.update(data)
                    f.write(data)
                    bar.update(len(data))
            if atomic.flushed_sha256(directory / file) != digest.digest():
                raise ConvertError(f"{directory / file} read back is not what was written: check the disk and its free space")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return [*split.filename_to_tensors]


def _content(pieces: list[_Piece], encoder: Encoder) -> Iterator[Any]:
    """The bytes of a safetensors file. Larger elements come first, so that all are aligned."""
    pieces = sorted(pieces, key=lambda piece: -piece.nbytes // max(1, math.prod(piece.shape)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": (end, end := end + piece.nbytes)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        if piece.made:
            for _, data in encoder.chunks(piece.made):
                yield data
            piece.made.data = None
            continue
        with contextlib.closing(open(piece.file, "rb")) as f:
            f.seek(piece.offset)
            for begin in range(0, piece.nbytes, _COPIED):
                yield f.read(min(_COPIED, piece.nbytes - begin))
