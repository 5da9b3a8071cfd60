"""Teaches the `gguf` package the TQ1_25 type: enum members, sizes, codec."""

from __future__ import annotations

from . import tq1_25


def register():
    """Add TQ1_25 to the `gguf` package that this process imports, and return that package. Idempotent.

    The published package gets all of it; the pinned llama.cpp's own gguf-py already has the enum members and sizes.
    Afterwards `gguf.GGUFReader` reads such files, and `gguf.quants.quantize` and `dequantize` take the type; a row
    that is no whole number of blocks raises `gguf.QuantError`, a NaN `tq1_25.QuantizeError`.
    """
    import gguf  # here: a converting process first chooses which gguf package there is

    qtype = _member(gguf.GGMLQuantizationType, tq1_25.NAME, tq1_25.TYPE_ID)
    _member(gguf.LlamaFileType, f"MOSTLY_{tq1_25.NAME}", tq1_25.FILE_TYPE)
    gguf.GGML_QUANT_SIZES.setdefault(qtype, (tq1_25.BLOCK, tq1_25.BLOCK_BYTES))
    if qtype not in gguf.quants._type_traits:

        class TQ1_25(getattr(gguf.quants, "__Quant"), qtype=qtype):  # being defined registers it
            @classmethod
            def quantize_blocks(cls, blocks):
                return tq1_25.quantize(blocks)

            @classmethod
            def dequantize_blocks(cls, blocks):
                return tq1_25.dequantize(blocks)

    return gguf


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
