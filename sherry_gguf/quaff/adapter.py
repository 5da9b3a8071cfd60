"""`sherry-gguf convert-adapter`: a PEFT adapter directory to a GGUF that llama.cpp's tools take as --lora, by llama.cpp's own converter."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from sherry_gguf import atomic, llama_cpp
from sherry_gguf.errors import ConvertError

TYPES = "f32", "f16", "bf16", "q8_0", "auto"
_NAME = "adapter.gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] ADAPTER_DIR"
    parser.description = (
        "Convert a LoRA adapter of PEFT to GGUF. llama-cli, llama-server and the other tools take it with --lora, beside a model in any "
        "type: packed weights stay as they are."
    )
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER_DIR", help="what peft's save_pretrained wrote")
    add(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the model's directory or its GGUF, for the configuration (default: the one that the adapter names)",
    )
    add("--outfile", type=Path, metavar="FILE", help="the GGUF to write (default: ADAPTER_DIR.gguf)")
    add("--outtype", choices=TYPES, default="f32", metavar="TYPE", help=f"type of its tensors: {', '.join(TYPES)} (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    target = args.outfile or Path(f"{os.path.normpath(args.adapter)}.gguf")
    convert_adapter(args.adapter, target, args.base, args.outtype)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


def convert_adapter(adapter: Path, target: Path, base: Path | None = None, outtype: str = "f32") -> None:
    """Write a LoRA adapter of PEFT as a GGUF, whole or not at all.

    base: the model's directory or its GGUF; None: the one in the adapter's configuration.
    Raises ConvertError if one of them is not what it should be or llama.cpp's converter fails, and NotBuilt.
    """
    named = _base_of(adapter, base)
    if not named.is_file() and not (named / "config.json").is_file():
        raise ConvertError(f"{named}: not a model directory, it has no config.json. Name the adapter's model with --base MODEL")
    inputs = [named, *(path for folder in (adapter, named) if folder.is_dir() for path in folder.iterdir() if path.suffix != ".gguf")]
    if target.exists() and any(map(target.samefile, inputs)):
        raise ConvertError(f"cannot write {target}: it is read. Choose another --outfile")
    source = llama_cpp.source_dir()
    target = atomic.writable(target)
    with atomic.staging(target.absolute(), 0) as staging:
        if named.is_file():
            from sherry_gguf.packed.gguf_model import gguf_config  # needs PyTorch

            config, named = gguf_config(named), staging / "base"
            config.save_pretrained(named)
        command = [sys.executable, source / "convert_lora_to_gguf.py", "--base", named.absolute(), "--outtype", outtype,
                   "--outfile", staging / _NAME, adapter.absolute()]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)),
            env=os.environ | {"PYTHONPATH": str(source / "gguf-py"), "NO_LOCAL_GGUF": "", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode or not (staging / _NAME).is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ConvertError(f"{adapter}: llama.cpp's convert_lora_to_gguf.py failed: {last}. Nothing was written")
        atomic.commit([staging / _NAME], [target])


def _base_of(adapter: Path, base: Path | None) -> Path:
    """The model's directory or GGUF: `base`, or else the one that the adapter's configuration names. Raises ConvertError."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        kind, name = config.get("peft_type"), config.get("base_model_name_or_path")
    except FileNotFoundError as e:
        raise ConvertError(f"{adapter}: not an adapter directory of PEFT, it has no adapter_config.json") from e
    except (OSError, ValueError, AttributeError) as e:
        raise ConvertError(f"{adapter}/adapter_config.json: {e}") from e
    if other := [name for name in ("use_rslora", "use_dora", "alpha_pattern") if config.get(name)]:
        raise ConvertError(f"{adapter}: an adapter with {other[0]}; llama.cpp scales every layer by lora_alpha / r and knows nothing else")
    if kind != "LORA":
        raise ConvertError(f"{adapter}: an adapter of the type {kind}; llama.cpp takes LORA only")
    if not any((adapter / file).is_file() for file in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ConvertError(f"{adapter}: an adapter without weights, it has no adapter_model.safetensors")
    if base:
        return base
    if not name or not Path(name).exists():
        raise ConvertError(f"{adapter}: its model {name!r} is not here. Name its directory or GGUF with --base MODEL")
    return Path(name)
