"""A model from a GGUF with packed weights, for transformers and peft. Packed tensors are repacked, never decoded."""

import os
import re
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from torch import nn
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sherry_gguf import gguf_type
from sherry_gguf.errors import ConvertError
from sherry_gguf.gguf_file import Gguf, Stored, check_scales, read_gguf

from . import gguf_tokenizer, operators
from .linear import PackedLinear

# Key of an architecture's metadata to the name in transformers' configuration. All are needed.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_NUMBERS = {"attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
            "rope.scaling.factor", "rope.scaling.finetuned", "vocab_size"}  # fmt: skip
_OTHERS = {"rope.scaling.type", "tensor_data_layout"}
# Other keys of each architecture. A key that is not known changes what the model computes, so it is refused, unless it is 0.
ARCHITECTURES: dict[str, set[str]] = {
    "llama": set(),
    "qwen2": set(),
    "qwen3": set(),
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"},
    "phi3": {"attention.sliding_window", "rope.scaling.original_context_length"},  # llama.cpp ignores both without rope factors
}
_ROPE_FREQS = "rope_freqs.weight"
_CHUNK = 64 << 20  # bytes of weights that are decoded at a time
_INSTEAD = "Give the Hugging Face directory that the file was made from"


def load_gguf(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, tokenizer: str | os.PathLike | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """A model whose linear layers hold a GGUF's TQ1_25, TQ1_25_64 and STQ1_0 blocks, and its tokenizer.

    The result equals the checkpoint's model after quantize_for_finetuning(base="tq1_25", method="naive"): calibrate it, and put the
    outlier channels in with quantize_for_finetuning. Peak memory is near the packed model and its largest other tensor. All parameters are
    frozen, and the model is in evaluation mode.

    path: a file, or any file of a split. `model.config` names it.
    dtype: of all other weights and the activations, torch.float32 or torch.bfloat16.
    tokenizer: a directory whose tokenizer is used instead of the file's.

    Raises ConvertError for a file that cannot be read, is damaged or incomplete, has no packed tensors, or needs something that is not
    known here: an architecture, a setting, a tokenizer. Raises ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype {dtype}: must be torch.float32 or torch.bfloat16, packed weights multiply nothing else")
    path = Path(path)
    gguf = read_gguf(path)
    config = _config(path, gguf)
    if not any(t.type.name in operators.KINDS for t in gguf.tensors.values()):
        raise ConvertError(f"{path} has no {', '.join(operators.KINDS)} tensor: there is nothing packed to fine-tune. {_INSTEAD}")
    split = transformers.AutoTokenizer.from_pretrained(tokenizer) if tokenizer else gguf_tokenizer.from_gguf(path, gguf.fields)
    if len(split) > config.vocab_size:
        raise ConvertError(
            f"{path}: its tokenizer has {len(split)} tokens, its embeddings {config.vocab_size} rows: they do not belong together"
        )
    model = _empty(path, config, dtype)
    _fill(path, gguf, model, dtype)
    model.tie_weights()
    _check_complete(path, model)
    _scale_rope(path, gguf, model)
    if (turn := gguf.fields.get("tokenizer.ggml.eot_token_id")) not in (None, config.eos_token_id):
        model.generation_config.eos_token_id = [i for i in (config.eos_token_id, turn) if i is not None]  # type: ignore[union-attr]
    return model.requires_grad_(False).eval(), split


def gguf_config(path: str | os.PathLike) -> transformers.PretrainedConfig:
    """transformers' configuration of a GGUF's model, from its metadata and tensor table alone. Raises ConvertError."""
    return _config(Path(path), read_gguf(Path(path)))


# ---- the configuration ----


def _config(path: Path, gguf: Gguf) -> transformers.PretrainedConfig:
    name = gguf.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConvertError(f"{path}: a model of the architecture {name!r}; only {', '.join(ARCHITECTURES)} are read. {_INSTEAD}")
    of = _settings(path, gguf, name)
    values = {to: of[key] for key, to in _KEYS.items()} | _shape(path, gguf, name, of)
    for key, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"{key}_token_id"] = gguf.fields.get(f"tokenizer.ggml.{long}_token_id")
    values |= {"rope_theta": of.get("rope.freq_base", 10000.0), "tie_word_embeddings": "output.weight" not in gguf.tensors}
    if (scaling := of.get("rope.scaling.type", "none")) == "linear":
        values["rope_scaling"] = {"rope_type": "linear", "factor": float(of.get("rope.scaling.factor", 1.0))}
    elif scaling != "none":
        raise ConvertError(f"{path}: {name}.rope.scaling.type is {scaling}, only linear is known here. {_INSTEAD}")
    if name == "llama":
        values |= {"attention_bias": "blk.0.attn_q.bias" in gguf.tensors, "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors}
    elif name == "gemma2":
        # llama.cpp tells Gemma 2's 27B, whose queries are scaled in another way, by its layers
        is_27b = values["num_hidden_layers"] == 46
        values |= {
            "query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"] if is_27b else values["head_dim"],
            "attn_logit_softcapping": of.get("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": of.get("final_logit_softcapping", 30.0),
            "sliding_window": of.get("attention.sliding_window", 4096),
        }
    try:
        config = transformers.AutoConfig.for_model(name, **values)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]]
    except Exception as e:  # each configuration checks values in its own way
        raise ConvertError(f"{path}: transformers refuses its metadata, {values}: {e}") from e
    config.name_or_path = str(path.absolute())
    return config


def _settings(path: Path, gguf: Gguf, name: str) -> dict[str, Any]:
    """The architecture's metadata, without its name in front, all of them known here. Raises ConvertError."""
    of = {key[len(name) + 1 :]: value for key, value in gguf.fields.items() if key.startswith(f"{name}.")}
    if missing := [key for key in _KEYS if key not in of]:
        raise ConvertError(f"{path} lacks the metadata {name}.{missing[0]}: it is damaged, or not a model")
    known = _KEYS.keys() | _NUMBERS | _OTHERS | ARCHITECTURES[name]
    for key, value in of.items():
        if key not in known and value not in (0, "none"):
            raise ConvertError(f"{path}: {name}.{key} is {value}, which changes the model in a way that is not known here. {_INSTEAD}")
        if key in known - _OTHERS and not (isinstance(value, (int, float)) and value >= 0):
            raise ConvertError(f"{path}: {name}.{key} is {value}; only one number for all layers is known here. {_INSTEAD}")
    return of


def _shape(path: Path, gguf: Gguf, name: str, of: dict[str, Any]) -> dict[str, Any]:
    """Sizes that the metadata may leave out; those there must fit the tensors. Raises ConvertError."""
    numbers = [int(found[1]) for t in gguf.tensors if (found := re.match(r"blk\.(\d{1,9})\.", t))]
    layers, heads, width = of["block_count"], of["attention.head_count"], of["embedding_length"]
    embeddings = gguf.tensors.get("token_embd.weight")
    if not numbers or layers != max(numbers) + 1 or embeddings is None or embeddings.shape[1:] != (width,) or not heads:
        has = "no" if embeddings is None else embeddings.shape
        raise ConvertError(
            f"{path}: its metadata have {layers} layers, {width} embeddings and {heads} heads, its tensors {max(numbers, default=-1) + 1} "
            f"layers and embeddings of the shape {has}: it is damaged, or not a model"
        )
    head = of.get("attention.key_length", width // heads)
    values, rotated = of.get("attention.value_length", head), of.get("rope.dimension_count", head)
    if values != head or not 0 < rotated <= head or (rotated != head and name != "phi3"):
        raise ConvertError(
            f"{path}: heads of {head} keys and {values} values, of which {rotated} are rotated, are not known here. {_INSTEAD}"
        )
    partly = {"partial_rotary_factor": rotated / head} if name == "phi3" else {}
    kv = of.get("attention.head_count_kv", heads)
    return {"vocab_size": embeddings.shape[0], "head_dim": head, "num_key_value_heads": kv, **partly}


# ---- the weights ----


def _empty(path: Path, config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model with parameters on the meta device and buffers as they are."""
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # sizes that do not fit each other
        raise ConvertError(f"{path}: no {config.model_type} model fits its metadata: {type(e).__name__}: {e}") from e


def _fill(path: Path, gguf: Gguf, model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """All weights from the file. Raises ConvertError."""
    names = _names(model)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    processor = TENSOR_PROCESSORS.get(gguf.fields["general.architecture"], TensorProcessor)(config=model.config.to_dict())
    modules, decoded, packed = dict(model.named_modules()), {}, {}
    for stored in gguf.tensors.values():
        if stored.name == _ROPE_FREQS:
            continue
        if (name := names.get(stored.name)) is None:
            raise ConvertError(f"{path}: the tensor {stored.name} has no place in transformers' {type(model).__name__}. {_INSTEAD}")
        if shapes[name] != stored.shape:
            raise ConvertError(f"{path}: the tensor {stored.name} has the shape {stored.shape}, {name} needs {shapes[name]}: it is damaged")
        layer, _, what = name.rpartition(".")
        if stored.type.name in operators.KINDS and what == "weight" and isinstance(modules[layer], nn.Linear):
            packed[layer] = stored
        else:
            decoded[name] = torch.from_numpy(_permuted(processor, _decode(stored, dtype), stored)).to(dtype)
    model.load_state_dict(decoded, strict=False, assign=True)
    for layer, stored in packed.items():
        kind = operators.KINDS[stored.type.name]
        rows = stored.read()
        check_scales(stored, 0, rows, kind)
        blocks = _permuted(processor, rows, stored)
        model.set_submodule(layer, PackedLinear.from_blocks(modules[layer], blocks, kind))


def _names(model: transformers.PreTrainedModel) -> dict[str, str]:
    """A tensor's name in the file to its name in the model."""
    package = gguf_type.register()
    number = next(arch for arch, name in package.MODEL_ARCH_NAMES.items() if name == model.config.model_type)
    table = package.get_tensor_name_map(number, model.config.num_hidden_layers)
    return {table.get_name(name, (".weight", ".bias")): name for name in model.state_dict()}


def _permuted(processor: TensorProcessor, rows: np.ndarray, stored: Stored) -> np.ndarray:
    """Rows in transformers' order: llama.cpp permutes those of Llama's queries and keys. Norms of Gemma lose their 1."""
    return np.ascontiguousarray(processor.process(rows, stored.name).weights)


def _decode(stored: Stored, dtype: torch.dtype) -> np.ndarray:
    """float32 of a tensor's shape, decoded a few rows at a time."""
    dequantize = gguf_type.register().quants.dequantize
    out = np.empty(stored.shape, np.float32)
    rows = out.reshape(-1, stored.shape[-1])
    step = max(_CHUNK // (4 * stored.shape[-1]), 1)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        try:
            part[:] = dequantize(stored.read(begin, len(part)), stored.type)
        except NotImplementedError as e:
            raise ConvertError(
                f"{stored.path}: the tensor {stored.name} is {stored.type.name}, which the gguf package cannot decode"
            ) from e
        if not np.isfinite(part).all():
            raise ConvertError(f"{stored.path}: the tensor {stored.name} has weights that are not finite: the file is damaged")
    return out


def _check_complete(path: Path, model: nn.Module) -> None:
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConvertError(f"{path} lacks the tensor of {missing[0]}{more}: it is damaged, or made for another architecture")


def _scale_rope(path: Path, gguf: Gguf, model: nn.Module) -> None:
    """Divide the rotary frequencies by the file's factors, which is how llama.cpp stores Llama 3's scaling."""
    if (stored := gguf.tensors.get(_ROPE_FREQS)) is None:
        return
    factors = torch.from_numpy(_decode(stored, torch.float32))
    rotaries: list[Any] = [m for m in model.modules() if hasattr(m, "inv_freq")]
    for rotary in rotaries:
        if rotary.inv_freq.shape != factors.shape or not bool((factors > 0).all()):
            raise ConvertError(f"{path}: {_ROPE_FREQS} has {len(factors)} factors for {len(rotary.inv_freq)} frequencies: it is damaged")
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / factors
