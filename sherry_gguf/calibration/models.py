"""The model to calibrate: loading it, refusing those that cannot be calibrated, and what identifies it."""

import argparse
import hashlib
import re
from typing import Any

import torch

from sherry_gguf.errors import Stop
from sherry_gguf.qat.linear import AUTO, QuantConfig, prepare, quantized_layers
from sherry_gguf.training.models import check_fit, load_tokenizer, repair_generation_config
from sherry_gguf.training.models import load as load_checkpoint

from . import layers


def device(name: str) -> torch.device:
    """The device of this name, or the best one for "". Raises Stop."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as e:  # AssertionError: PyTorch without CUDA
        raise Stop(f"--device {name}: {str(e).splitlines()[0]}") from e
    return found


def load(a: argparse.Namespace) -> Any:
    """The model in its own dtype, for evaluation. Raises Stop."""
    model = load_checkpoint(a.model, "auto")
    if (getattr(model.config, "sherry_config", None) or {}).get("weights") == "latent":
        raise Stop(f"{a.model} holds latent weights of a training with Sherry: they are calibrated already. Export them, or convert them")
    repair_generation_config(model)
    return model.eval().requires_grad_(False)


def quantized(a: argparse.Namespace) -> tuple[Any, list[str]]:
    """`load`, with the layers' matrices prepared for quantization; and their names. Raises Stop."""
    model = load(a)
    name = layers.name(model)
    for key, p in layers.find(model).named_parameters():
        if p.ndim == 3 and 1 not in p.shape:
            raise Stop(f"{type(model).__name__}: {name}.{key} holds the matrices of several experts, which calibrate cannot train")
    try:
        names = prepare(
            model, QuantConfig(group_size=AUTO if a.group_size == AUTO else int(a.group_size)), a.keep, rf"^{re.escape(name)}\."
        )
    except (ValueError, re.error) as e:
        raise Stop(f"--keep {a.keep!r}: {e}" if isinstance(e, re.error) else str(e).replace("--group_size", "--group-size")) from e
    return model.requires_grad_(False), names


def tokenizer(a: argparse.Namespace, model: Any) -> Any:
    """The tokenizer, which must fit the model and --context. Raises Stop."""
    found = load_tokenizer(name := a.tokenizer or a.model)
    check_fit(model, found, name, a.context, 512)
    return found


@torch.no_grad()
def settle(module: torch.nn.Module) -> None:
    """Make a finished layer small: in float16, the quantized weights as they are used, which it holds exactly."""
    for m in quantized_layers(module).values():
        m.weight.data = m.quantized_weight()
    module.half()


def fingerprint(model: Any) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().contiguous().cpu().view(torch.uint8).numpy() if p.ndim else p.cpu().numpy().tobytes())
    return digest.hexdigest()
