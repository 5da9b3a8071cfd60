"""Write a trained model as a standard Hugging Face directory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from sherry_gguf.ternary import GROUP, KEPT

from .linear import SherryLinear


def export(model, tokenizer, directory, dtype: torch.dtype = torch.float16) -> Path:
    """Save `model` with its fake-quantized weights, its tokenizer, and `sherry_config` in config.json.

    Every weight of a `SherryLinear` is stored as the forward pass uses it: 0 or +-d with an fp16 d, exact in `dtype`.
    The other parameters are rounded to `dtype`: for figures that hold, evaluate what was saved, not `model`. float16
    loses nothing more in a GGUF, which keeps embeddings in F16.

    Args:
        model: a transformers `PreTrainedModel` that went through `prepare`.
        tokenizer: a transformers tokenizer, or None to save none.
        directory: where to; it must not exist yet, or be empty. It appears complete or not at all.
        dtype: torch.float16 or torch.float32.

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory has something in it.
        TypeError: another dtype.
        ValueError: the model has no SherryLinear, several group sizes, or a parameter that is not finite in `dtype`.
    """
    directory = Path(directory)
    if dtype not in (torch.float16, torch.float32):
        raise TypeError(f"dtype is {dtype}: use torch.float16 or torch.float32, which hold an fp16 scale")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already has something in it: remove it, or choose another directory")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SherryLinear)}
    if not layers:
        raise ValueError("the model has no SherryLinear: call prepare(model) before training")
    sizes = sorted({m.group_size for m in layers.values()})
    if len(sizes) > 1:
        raise ValueError(f"the model mixes group sizes {sizes}: a checkpoint can state only one")

    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".part", dir=directory.parent))
    try:
        model.save_pretrained(part, state_dict=_state_dict(model, layers, dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        for key in {"dtype", "torch_dtype"} & config.keys():
            config[key] = str(dtype).removeprefix("torch.")
        config["sherry_config"] = {
            "method": "sparse_absmean", "granularity": "per_group", "group_size": sizes[0], "n": KEPT, "m": GROUP,
            "weights": "fake_quantized",
        }
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in part, *part.iterdir():  # mkdtemp and safetensors make them private
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        os.replace(part, directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return directory


@torch.no_grad()
def _state_dict(model, layers: dict[str, SherryLinear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    saved: dict[tuple, torch.Tensor] = {}  # by address: tied parameters must stay one tensor
    state = {}
    for name, value in model.state_dict().items():
        key = value.data_ptr(), value.shape
        if key not in saved:
            layer = layers.get(name.removesuffix(".weight"))
            new = layer.quantized_weight() if layer is not None and name.endswith(".weight") else value
            new = new.to(dtype) if new.is_floating_point() else new
            if not torch.isfinite(new).all():
                raise ValueError(f"{name} has values that are not finite in {dtype}: did training diverge?")
            saved[key] = new
        state[name] = saved[key]
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
