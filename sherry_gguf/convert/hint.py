"""A note on the output matrix, which decoding reads whole for each token."""

import re
from typing import Any

import numpy as np

from .. import gguf_type
from .plan import BY_DEFAULT, EMBEDDINGS, IN_TRAINING, OUTPUT
from .tensor import Tensor

_LOOKED_UP = (*EMBEDDINGS, "position_embd.weight", "token_types.weight")  # a row for each token
_SMALLER = ("Q6_K", "Q8_0")  # the first one whose blocks fit the rows
_FASTEST = "Q4_0"  # docs/benchmarks.md
_WORTH_IT = 1 / 3  # of the bytes read for each token


def output_note(model: Any, plan: list[Tensor]) -> str:
    """Which flag makes decoding read fewer bytes, and how many fewer, if the output matrix is F16 unasked and more than a third of them.

    Returns "" if there is nothing to say. To be called after `metadata.add_metadata`.
    """
    keys = {key: field.value for key, field in model.gguf_writer.kv_data[0].items()}
    arch = model.gguf_writer.arch
    if f"{arch}.pooling_type" in keys or not keys.get(f"{arch}.attention.causal", True):
        return ""  # a model of embeddings: it has no output
    tensors = {t.name: t for t in plan}
    embeddings = tensors.get(EMBEDDINGS[0])
    output = tensors.get(OUTPUT, embeddings)
    if not output or not (name := _smaller(output)):
        return ""
    # some models list a number for each layer
    experts = keys.get(f"{arch}.expert_count") or 1
    used = float(np.mean(keys.get(f"{arch}.expert_used_count", experts)) / np.mean(experts))
    further = keys.get(f"{arch}.nextn_predict_layers") or 0
    layers = _layers(plan, keys.get(f"{arch}.block_count", 0) - further) if further else plan
    decoding = [output, *(t for t in layers if not (t is output or t.name in _LOOKED_UP or t.name.startswith("enc.")))]
    read = sum(t.nbytes * (used if "_exps." in t.name else 1) for t in decoding)
    if output.nbytes <= _WORTH_IT * read:
        return ""

    def faster(name: str) -> str:
        return f"up to {read / (read - _saved(output, name)):.1f} times as fast"

    tied, saved = output is embeddings, _saved(output, name)
    what = f"{output.name}{' (embeddings and output matrix)' * tied}"
    flag = "--token-embedding-type" if tied else "--output-tensor-type"
    note = (
        f"{what} makes up {100 * output.nbytes / read:.0f} % of the weights, in bytes, that each token reads. "
        f"With {flag} {name}, each token reads {100 * saved / read:.0f} % fewer bytes, at a small loss of quality, "
        f"and the file is {saved / 1e6:.1f} MB smaller: decoding is {faster(name)}. "
        f"With {_FASTEST}, which loses more, it is {faster(_FASTEST)}"
    )
    if embeddings and not tied and (name := _smaller(embeddings)):
        saved = _saved(embeddings, name)
        note += f". --token-embedding-type {name} makes the file another {saved / 1e6:.1f} MB smaller, but decoding no faster"
    return note


def _layers(plan: list[Tensor], count: int) -> list[Tensor]:
    """The tensors without those of layers from number `count` on, which only predict further tokens; all if there are no others (--mtp)."""
    numbers = [int(m[1]) if (m := re.match(r"blk\.(\d+)\.", t.name)) else -1 for t in plan]
    alone = not any(0 <= n < count for n in numbers)
    return [t for t, n in zip(plan, numbers) if alone or n < count]


def _smaller(t: Tensor) -> str | None:
    """A type for an F16 tensor that nobody has asked for."""
    if t.type.name != "F16" or t.why not in (BY_DEFAULT, IN_TRAINING):
        return None
    return next((name for name in _SMALLER if t.shape[-1] % _block(name)[0] == 0), None)


def _saved(t: Tensor, name: str) -> int:
    """The bytes that a type saves."""
    block, size = _block(name)
    return t.nbytes - t.weights // block * size


def _block(name: str) -> tuple[int, int]:
    gguf = gguf_type.register()
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
