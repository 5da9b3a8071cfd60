"""A note on the output matrix, which decoding reads whole for each token."""

from typing import Any

import numpy as np

from .. import gguf_type
from .plan import BY_DEFAULT, EMBEDDINGS, OUTPUT
from .tensor import Tensor

_LOOKED_UP = (*EMBEDDINGS, "position_embd.weight", "token_types.weight")  # a row for each token
_SMALLER = ("Q6_K", "Q8_0")  # the first one whose blocks fit the rows
_WORTH_IT = 1 / 3  # of the bytes read for each token


def output_note(model: Any, plan: list[Tensor]) -> str:
    """Which flag makes decoding read fewer bytes, and how many fewer, if the output matrix is F16 by default and more than a third of them.

    Returns "" if there is nothing to say. To be called after `metadata.add_metadata`.
    """
    keys = {key: field.value for key, field in model.gguf_writer.kv_data[0].items()}
    arch = model.gguf_writer.arch
    if f"{arch}.pooling_type" in keys or not keys.get(f"{arch}.attention.causal", True):
        return ""  # a model of embeddings: it has no output
    tensors = {t.name: t for t in plan}
    embeddings = tensors.get(EMBEDDINGS[0])
    output = tensors.get(OUTPUT, embeddings)
    if not output or not (smaller := _smaller(output)):
        return ""
    # some models list a number for each layer
    experts = keys.get(f"{arch}.expert_count") or 1
    used = float(np.mean(keys.get(f"{arch}.expert_used_count", experts)) / np.mean(experts))
    decoding = [t for t in plan if t is output or not (t.name in _LOOKED_UP or t.name.startswith("enc."))]
    read = sum(t.nbytes * (used if "_exps." in t.name else 1) for t in decoding)
    if output.nbytes <= _WORTH_IT * read:
        return ""
    name, saved = smaller
    flag = "--token-embedding-type" if output is embeddings else "--output-tensor-type"
    both = ", embeddings and output matrix in one," if output is embeddings else ""
    note = (
        f"{output.name}{both} is {100 * output.nbytes / read:.0f} % of the bytes of weights read for each token. {flag} {name} reads about "
        f"{read / (read - saved):.1f} x fewer bytes per token, with a small loss, and makes the file {saved / 1e6:.1f} MB smaller"
    )
    if embeddings and output is not embeddings and (smaller := _smaller(embeddings)):
        note += f"; --token-embedding-type {smaller[0]} makes it {smaller[1] / 1e6:.1f} MB smaller, but no faster"
    return note


def _smaller(t: Tensor) -> tuple[str, int] | None:
    """A type for an F16 tensor that nobody has asked for, and the bytes that it saves."""
    gguf = gguf_type.register()
    if t.type != gguf.GGMLQuantizationType.F16 or t.why != BY_DEFAULT:
        return None
    for name in _SMALLER:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        if t.shape[-1] % block == 0:
            return name, t.nbytes - t.weights // block * size
    return None
