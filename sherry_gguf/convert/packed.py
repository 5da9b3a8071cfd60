"""Unpacks ternary weights of transformers' quantization method "bitnet", which BitNet b1.58 2B and Falcon-E use.

A byte holds four weights in 2 bits each, as code - 1, from rows that are a quarter of the matrix apart. A matrix has one scale,
`weight_scale`: transformers' AutoBitLinear multiplies by it, its BitLinear divides.
"""


def unpack_bitnet(model) -> None:
    """Replace the packed tensors of an upstream model object with lazy float32 ones, remove their scales, and add the tensors' names to
    `model.decoded`.

    Raises ValueError for a scale without its matrix, and for a matrix with several scales.
    """
    config = model.hparams.get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "bitnet":
        return
    inverted = config.get("linear_class", "bitlinear") != "autobitlinear"
    for scale_name in [name for name in model.model_tensors if name.endswith(".weight_scale")]:
        name = scale_name.removesuffix("_scale")
        scale = model.model_tensors.pop(scale_name)
        if name not in model.model_tensors:
            raise ValueError(f"{scale_name} is there without {name}: the checkpoint is incomplete, download it again")
        if scale().numel() != 1:
            raise ValueError(f"{scale_name} has {scale().numel()} values, but a packed matrix has one scale")
        packed = model.model_tensors[name]
        model.model_tensors[name] = lambda packed=packed, scale=scale: _lazy(packed(), scale(), inverted)
        model.decoded.add(name)


def _lazy(weight, scale, inverted: bool):
    import torch

    if weight.dtype is not torch.uint8:  # not packed, but still scaled
        return weight.float() * (1 / scale.float() if inverted else scale.float())
    return type(weight)._wrap_fn(unpack)(weight, scale, inverted)


def unpack(weight, scale, inverted: bool):
    """torch.uint8 (rows / 4, n) and a scale of one value to torch.float32 (rows, n).

    Each value is the code's -1, 0 or +1 times the scale or its inverse, rounded once to float32. The method does not use code 3: it
    becomes NaN, which is reported as damage.
    """
    import torch

    factor = scale.float().reshape(())
    factor = 1 / factor if inverted else factor
    values = torch.stack([-factor, 0 * factor, factor, torch.full_like(factor, torch.nan)])
    parts = [((weight >> shift) & 3).long() for shift in (0, 2, 4, 6)]
    return values[torch.cat(parts)]
