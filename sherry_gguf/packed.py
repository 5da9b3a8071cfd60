"""Checkpoints of packed ternary weights: transformers' quantization method "bitnet", as BitNet b1.58 2B and Falcon-E have it.

A byte holds four weights of 2 bits, code - 1, of rows that are a quarter of the matrix apart. One scale belongs to the
matrix, `weight_scale`: transformers' AutoBitLinear multiplies by it, its BitLinear divides.
"""

from __future__ import annotations

METHOD = "bitnet"


def config_of(model) -> dict | None:
    """The quantization_config of an upstream model object if it is of this method."""
    config = model.hparams.get("quantization_config")
    return config if isinstance(config, dict) and config.get("quant_method") == METHOD else None


def unpack_bitnet(model) -> None:
    """Replace the packed tensors of an upstream model object by lazy float32 ones, and take the scales away.

    The names of these tensors are added to `model.decoded`. Raises ValueError for a scale that is not one per matrix,
    and for one without its matrix.
    """
    if (config := config_of(model)) is None:
        return
    inverted = config.get("linear_class", "bitlinear") != "autobitlinear"
    decoded = model.__dict__.setdefault("decoded", set())
    for scale_name in [name for name in model.model_tensors if name.endswith(".weight_scale")]:
        name = scale_name.removesuffix("_scale")
        scale = model.model_tensors.pop(scale_name)
        if name not in model.model_tensors:
            raise ValueError(f"{scale_name} is there without {name}: the checkpoint is incomplete, download it again")
        if scale().numel() != 1:
            raise ValueError(f"{scale_name} has {scale().numel()} values, packed weights have one scale for a matrix")
        packed = model.model_tensors[name]
        model.model_tensors[name] = lambda packed=packed, scale=scale: _lazy(packed(), scale(), inverted)
        decoded.add(name)


def _lazy(weight, scale, inverted: bool):
    import torch

    if weight.dtype is not torch.uint8:  # not packed: the scale still belongs to it
        return weight.float() * (1 / scale.float() if inverted else scale.float())
    return type(weight)._wrap_fn(unpack)(weight, scale, inverted)


def unpack(weight, scale, inverted: bool):
    """torch.uint8 (rows / 4, n) and a scale of one value to torch.float32 (rows, n).

    Each value is the code's -1, 0 or +1 by the scale, or by its inverse, rounded once to float32. The code 3, which the
    method does not use, becomes NaN, and so is found as any damage is.
    """
    import torch

    factor = scale.float().reshape(())
    factor = 1 / factor if inverted else factor
    values = torch.stack([-factor, 0 * factor, factor, torch.full_like(factor, torch.nan)])
    parts = [((weight >> shift) & 3).long() for shift in (0, 2, 4, 6)]
    return values[torch.cat(parts)]
