"""Teaches the `gguf` package the TQ1_25, TQ1_25_64 and STQ1_0 types: enum members, sizes, codecs."""

from typing import Any

from . import stq1_0, tq1_25, tq1_25_64
from .blocks import BlockType

TYPES: dict[str, BlockType] = {kind.name: kind for kind in (tq1_25.TYPE, tq1_25_64.TYPE, stq1_0.TYPE)}


def register():
    """Add TQ1_25, TQ1_25_64 and STQ1_0 to the `gguf` package that this process imports, and return that package. Idempotent.

    Afterwards `gguf.GGUFReader` reads such files, and `gguf.quants.quantize` and `dequantize` take the types. They raise
    `gguf.QuantError` for a row that is not a multiple of the block size, and `errors.QuantizeError` for a NaN.
    """
    import gguf  # late: a converting process first chooses its gguf package

    for kind in TYPES.values():
        qtype = _member(gguf.GGMLQuantizationType, kind.name, kind.type_id)
        _member(gguf.LlamaFileType, f"MOSTLY_{kind.name}", kind.file_type)
        gguf.GGML_QUANT_SIZES.setdefault(qtype, (kind.size, kind.bytes))
        if qtype not in gguf.quants._type_traits:
            _codec(getattr(gguf.quants, "__Quant"), qtype, kind)
    return gguf


def _codec(base: Any, qtype, kind: BlockType):
    class Codec(base, qtype=qtype):  # type: ignore[call-arg]  # its definition registers it
        @classmethod
        def quantize_blocks(cls, blocks):
            return kind.quantize(blocks)

        @classmethod
        def dequantize_blocks(cls, blocks):
            return kind.dequantize(blocks)


def _member(enum, name: str, value: int):
    """The member of an IntEnum, added if it is missing. Raises ValueError if another has its name or value."""
    if name not in enum.__members__ and value not in enum._value2member_map_:
        member = int.__new__(enum, value)
        member._name_, member._value_ = name, value
        enum._member_names_.append(name)
        enum._member_map_[name] = enum._value2member_map_[value] = member
        type.__setattr__(enum, name, member)  # Enum's own refuses new members
    member = enum.__members__.get(name)
    if member is None or member.value != value:
        raise ValueError(
            f"{enum.__name__} of this gguf package has {enum._value2member_map_.get(value)!r} as {value} "
            f"and {member!r} as {name}: it cannot hold {name} = {value}"
        )
    return member
