"""Export a trained model as a standard Hugging Face directory."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch

from sherry_gguf.training.files import whole_directory

from .linear import QuantizedLayer, lossy_sizes, quantized_layers, sherry_config

logger = logging.getLogger(__name__)

SENTENCEPIECE = "tokenizer.model"  # some converters need it, and transformers does not save every tokenizer's


def export(model, directory: str | os.PathLike, tokenizer=None, dtype: torch.dtype = torch.float16,
           state: dict[str, torch.Tensor] | None = None) -> Path:  # fmt: skip
    """Save `model` with its fake-quantized weights, its tokenizer, and for Sherry `sherry_config` in config.json.

    Weights of quantized layers are stored as evaluation uses them: 0 or +-d with an fp16 d, exact in `dtype`. The other
    parameters are rounded to `dtype`, so evaluate the export rather than `model`. float16 loses nothing more in a GGUF, which
    keeps embeddings in F16. (Autocast rounds products further in training.)

    Args:
        model: a transformers `PreTrainedModel` that went through `prepare`, with any method.
        directory: must be new or empty. It appears complete or not at all (`files.whole_directory`).
        tokenizer: a transformers tokenizer, or None to save none.
        dtype: torch.float16 or torch.float32.
        state: the state dict to save, with latent weights, if the model itself does not hold all of it (FSDP, DeepSpeed:
            `Accelerator.get_state_dict`).

    Returns:
        The directory.

    Raises:
        FileExistsError: the directory is not empty.
        TypeError: another dtype.
        ValueError: a parameter is not finite in `dtype`, `state` lacks a quantized one, or the model was loaded with latent weights
            and has not gone through `prepare`.
    """
    if dtype not in (torch.float16, torch.float32):
        raise TypeError(f"dtype is {dtype}: use torch.float16 or torch.float32, which hold an fp16 scale")
    layers = quantized_layers(model)
    claimed = getattr(getattr(model, "config", None), "sherry_config", None)
    if not layers and isinstance(claimed, dict) and claimed.get("weights") == "latent":
        raise ValueError("the model's weights are latent, says its config, but its layers do not quantize them: call "
                         "prepare(model, QuantConfig(...)) first, as in its training")  # fmt: skip
    sherry = sherry_config(model, "fake_quantized")
    if lossy := lossy_sizes(model):
        logger.warning("groups of %s: TQ1_25 stores multiples of 128 and TQ1_25_64 multiples of 64, so neither can store these weights "
                       "without loss", lossy)  # fmt: skip
    with whole_directory(directory) as part:
        model.save_pretrained(part, state_dict=_quantized(state or model.state_dict(), layers, dtype))
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
            model_file = Path(tokenizer.name_or_path) / SENTENCEPIECE
            if model_file.is_file() and not (part / SENTENCEPIECE).exists():
                shutil.copyfile(model_file, part / SENTENCEPIECE)
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        for key in {"dtype", "torch_dtype"} & config.keys():
            config[key] = str(dtype).removeprefix("torch.")
        config.pop("sherry_config", None)
        if sherry:
            config["sherry_config"] = sherry
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


@torch.no_grad()
def _quantized(state: dict[str, torch.Tensor], layers: dict[str, QuantizedLayer], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if missing := [name for name in layers if f"{name}.weight" not in state]:
        raise ValueError(f"the state dict lacks {missing[0]}.weight: is it this model's, complete and with the same names?")
    saved: dict[tuple, torch.Tensor] = {}  # by address, so that tied parameters stay one tensor
    result = {}
    for name, value in state.items():
        key = value.data_ptr(), value.shape
        if key not in saved:
            layer = layers.get(name.removesuffix(".weight"))
            # on the CPU, which adds in the reference's order
            new = layer.quantized_weight(value.cpu()) if layer is not None and name.endswith(".weight") else value
            new = new.to(dtype) if new.is_floating_point() else new
            if not torch.isfinite(new).all():
                raise ValueError(f"{name} has values that are not finite in {dtype}: did training diverge?")
            saved[key] = new.cpu()
        result[name] = saved[key]
    return result
