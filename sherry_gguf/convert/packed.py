"""Unpacks the weights of checkpoints whose quantization method is "sherry" (`sherry-gguf pack`) or "bitnet".

BitNet b1.58 2B and Falcon-E use the second one. A byte holds four weights in 2 bits each, as code - 1, from rows that are a quarter of
the matrix apart. A matrix has one scale, `weight_scale`: transformers' AutoBitLinear multiplies by it, its BitLinear divides.
"""

import functools

import numpy as np

from ..blocks import BlockType
from ..packed import layout

_VANISHED = 1e-9  # a scale that fp16 rounds to 0


def unpack_sherry(model) -> None:
    """Replace the blocks in an upstream model object by lazy float32 tensors, and add the tensors' names to `model.decoded`.

    Raises ValueError for blocks that quantization_config does not name.
    """
    if not layout.is_packed(model.hparams):
        return
    modules = layout.Modules(model.hparams.pop("quantization_config").get("modules"))
    tensors = {}  # in the same order
    for name, load in model.model_tensors.items():
        layer, _, what = name.rpartition(".")
        if what == layout.TENSOR:
            if (kind := modules.kind(layer)) is None:
                raise ValueError(f"the checkpoint has {name}, and quantization_config does not say which type it is: pack it again")
            load, name = functools.partial(_lazy_blocks, name, load, kind), f"{layer}.weight"
            model.decoded.add(name)
        tensors[name] = load
    model.model_tensors = tensors


def _lazy_blocks(name: str, load, kind: BlockType):
    import torch

    blocks = load()
    if blocks.dtype != torch.uint8 or len(blocks.shape) != 2 or blocks.shape[1] % kind.bytes or not blocks.numel():
        what = f"{blocks.dtype} {tuple(blocks.shape)}, not torch.uint8 (rows, bytes of {kind.name} blocks)"
        raise ValueError(f"{name} is {what}: the checkpoint is damaged")
    return type(blocks)._wrap_fn(
        lambda b: torch.from_numpy(weights_of(b.numpy(), kind)),
        meta_noop=(torch.float32, lambda shape: (shape[0], shape[1] // kind.bytes * kind.size)),
    )(blocks)


def weights_of(blocks: np.ndarray, kind: BlockType) -> np.ndarray:
    """uint8 (rows, bytes of a row) to float32 (rows, weights) that quantize to the same blocks.

    A block whose scale vanished in fp16 keeps codes that zeros would lose: it gets a tiny scale, which vanishes again.
    Raises ValueError if a scale is negative or not finite.
    """
    from .. import kernels  # which are compiled; other commands do without

    d = np.ascontiguousarray(blocks.reshape(-1, kind.bytes)[:, -2:]).view("<f2")[:, 0]
    if (bad := ~np.isfinite(d) | np.signbit(d)).any():
        raise ValueError(f"a scale is {d[bad][0]}, which no {kind.name} has: the checkpoint is damaged")
    weights = kernels.dequantize(np.ascontiguousarray(blocks), kind=kind)
    zeros = kind.quantize(np.zeros(kind.size, np.float32))
    vanished = (d == 0) & (blocks.reshape(-1, kind.bytes) != zeros).any(axis=1)
    if vanished.any():
        lanes, _ = kind.unpack(blocks.reshape(-1, kind.bytes)[vanished])
        weights.reshape(-1, kind.size)[vanished] = lanes * np.float32(_VANISHED)
    return weights


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
