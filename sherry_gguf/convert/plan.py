"""Chooses each tensor's type, and checks that the tensors make a whole model.

Of the tensors of upstream's F16 file, the blocks' weights become TQ1_25, or TQ1_25_64 if rows or groups need it: those that llama-quantize
would quantize. All others stay what upstream makes of them.
"""

import collections
import dataclasses
import math
import re
import shlex
from typing import Any

import numpy as np

from .. import gguf_type, patterns, tq1_25, tq1_25_64
from ..blocks import BlockType
from ..errors import ConvertError
from ..packed import layout
from ..report import starred
from .checkpoint import Grouping
from .options import Options
from .provenance import Checkpoint
from .rows import computing, load_chunk, row_loaders, unrounded
from .tensor import Tensor, first_bad
from .upstream import collect

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
FLOATS = ("F32", "F16", "BF16")
BY_DEFAULT = "embeddings and output"  # `why` of these unless the user asks for a type
IN_TRAINING = "full precision in training"  # `why` of what sherry_config lists

_MISFIT = "rows of "  # begins `why` of a matrix whose rows are not a multiple of a block
_FALLBACK = "Q4_0"  # type of misfits, as in llama-quantize
_LARGEST = {"BF16": float(np.uint32(0x7F7F0000).view(np.float32))}  # else 65504: F16, and scales are fp16
_IN_BLOCK = re.compile(r"^((?:enc\.|dec\.)?blk)\.(\d+)\.")
# Matrices of the blocks that stay: those that llama-quantize leaves alone (tensor_allows_quantization), those that the graphs use other
# than as the weights of a matrix product (LLM_TENSOR_INFOS), the second embeddings and heads of multi-token prediction, and attn_k_b,
# whose rows run along the outputs of the trained layer.
_NOT_WEIGHTS = re.compile(
    r"norm|altup|laurel|indexer|hc_|_ape\b|_res_score|sinks|_rel_b\b|\.rel_pos|position_embd|patch_(?:embd|merger)"
    r"|ffn_gate_inp|tid2eid|exp_probs|ffn\.act\b|layer_output_scale|nextn\.(?:embed_tokens|shared_head_head)"
    r"|conv1d|shortconv\.conv\b|conv_base|ssm_(?:a|d|beta|[fg]_[ab])\b|channel_mix_lerp"
    r"|time_mix_(?:first|decay|lerp|ln|[wvag][0-2]|k_k|k_a|r_k)|attn_k_b\b"
)
_NOT_WEIGHTS_OF = {"glm5-next": re.compile(r"attn_kv_a_mqa|attn_v_b")}


def make_plan(model: Any, options: Options, grouping: Grouping) -> list[Tensor]:
    """The tensors of the file, each with its type. Raises ConvertError."""
    gguf = gguf_type.register()
    keep = [_compiled(p) for p in options.keep]
    checkpoint, grouping = Checkpoint(model), _by_upstreams_names(model, grouping)
    plan = []
    for name, info in collect(model).items():
        source, forced = model.asked.get(name, ("", None))
        t = Tensor(name, source, tuple(int(n) for n in info.shape), info.dtype, info.nbytes, info.tensor)
        if not t.weights:
            raise ConvertError(f"{name} ({source}) has the shape {t.shape}: it holds no weights")
        plan.append(t)
        _choose(t, checkpoint.sources(name, info.tensor), forced, gguf.MODEL_ARCH_NAMES[model.model_arch], keep, options, grouping)
        if info.dtype == gguf.GGMLQuantizationType.F16:
            t.data = unrounded(t.data)
    _check_groups(model, plan, grouping, options.keep)
    if options.output_tensor_type and not any(t.name == OUTPUT for t in plan):
        raise ConvertError(
            "--output-tensor-type: this model has no output tensor, its embeddings serve as both; use --token-embedding-type"
        )
    for p in keep:
        if not any(_kept(t, [p]) for t in plan):
            raise ConvertError(f"--keep {p.pattern}: no tensor has such a name; --dry-run without it lists them")
    if not any(t.kind for t in plan):
        by_flag = [f"--keep keeps {sum(t.why == '--keep' for t in plan)} tensors"] * bool(keep)
        reasons = "; ".join(by_flag + type_notes(plan))
        raise ConvertError(f"{model.dir_model}: no tensor can be {tq1_25.NAME} or {tq1_25_64.TYPE.name}. {reasons}")
    for t in plan:
        if t.type.name != "F32" and not t.kind and not t.raw:
            _fit(t, fixed=t.why.startswith("as "))
    return plan


def _by_upstreams_names(model: Any, grouping: Grouping) -> Grouping:
    """The grouping with the names that upstream gives the checkpoint's tensors, without those that it leaves out.

    Raises ConvertError if group_sizes has a module whose matrix the checkpoint lacks: the one meant would get other groups than trained.
    """
    # a packed checkpoint's blocks, which are unpacked later, have a name of their own
    known = {name.removesuffix(".weight").removesuffix(f".{layout.TENSOR}"): tensor for name, tensor in model.model_tensors.items()}

    def renamed(name: str) -> str:
        return (model.filter_tensors((name, None)) or ("",))[0]

    sizes = {}
    for name, size in grouping.group_sizes.items():
        if not (new := renamed(f"{name}.weight")):
            continue
        new = new.removesuffix(".weight")
        if new not in known or len(known[new]().shape) < 2:
            raise ConvertError(
                f"{model.dir_model / 'config.json'}: sherry_config has group_sizes for {name or repr(name)}, "
                "and the checkpoint has no such matrix. Correct the name, or pass --group-size to quantize all weights again, with loss"
            )
        sizes[new] = size
    return dataclasses.replace(grouping, group_sizes=sizes, kept=frozenset(map(renamed, grouping.kept)))


def _choose(t: Tensor, sources: list[str], forced: Any, arch: str, keep: list[re.Pattern], options: Options, grouping: Grouping):
    """Set a tensor's type, why, and group.

    sources: the checkpoint's tensors that it is made of; forced: upstream's answer to `tensor_force_quant`.
    """
    gguf = gguf_type.register()
    types = gguf.GGMLQuantizationType
    n, group = t.shape[-1] if t.shape else 1, grouping.size_of(sources)
    wanted = options.output_tensor_type if t.name == OUTPUT else options.token_embedding_type if t.name in EMBEDDINGS else None
    if t.type != types.F16 or type(forced) is not bool:
        if wanted:
            raise ConvertError(f"{t.name}: llama.cpp wants it as {t.type.name}, not {wanted}")
        t.why = "as upstream"
        t.raw = t.type not in (types.F32, types.F16)
        return
    if wanted:
        t.noted = _kept(t, keep)
        t.why = "as asked" + ", which overrules --keep" * t.noted
        _set_type(t, types[wanted.upper()])
        _set_group(t, grouping, group)
        return
    t.why = why_kept(t, arch, keep, not grouping.kept.isdisjoint(sources))
    smallest = min((grouping.group_size, *grouping.group_sizes.values()))
    if t.why == IN_TRAINING and options.fallback_type and n % smallest:  # why training kept it
        t.why = why_kept(t, arch, keep) or f"{_MISFIT}{n}, not a multiple of {smallest}"
    if not t.why:
        kind = block_type(n, group if grouping.granularity == "per_group" else n)
        assert kind
        if kind is not tq1_25.TYPE:
            t.noted = True
            t.why = (f"{_MISFIT}{n}" if n % tq1_25.BLOCK else f"groups of {group}") + f", not a multiple of {tq1_25.BLOCK}"
        _set_type(t, types[kind.name])
        _set_group(t, grouping, group)
    elif t.why.startswith(_MISFIT):
        t.misfit = t.noted = True
        fallback = types[(options.fallback_type or _FALLBACK).upper()]
        if n % (block := gguf.GGML_QUANT_SIZES[fallback][0]) == 0:
            _set_type(t, fallback)
        else:
            t.why += f" nor of {block}, which {fallback.name} needs"


def block_type(n: int, group: int = tq1_25.BLOCK) -> BlockType | None:
    """The type of matrices with rows of `n` weights that are trained in groups of `group`: the largest that holds both, if any does."""
    if n % tq1_25.BLOCK == group % tq1_25.BLOCK == 0:
        return tq1_25.TYPE
    return tq1_25_64.TYPE if n % tq1_25_64.TYPE.size == group % tq1_25_64.TYPE.size == 0 else None


def _kept(t: Tensor, keep: list[re.Pattern]) -> bool:
    return any(p.search(t.name) or p.search(t.source) for p in keep)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConvertError(f"--keep {pattern}: not a regular expression: {e}") from None


def why_kept(t: Tensor, arch: str, keep: list[re.Pattern], in_training: bool = False) -> str:
    """Why a tensor does not become TQ1_25 or TQ1_25_64, or "" if it does."""
    if _kept(t, keep):
        return "--keep"
    if in_training:
        return IN_TRAINING
    if t.name in (*EMBEDDINGS, OUTPUT):
        return BY_DEFAULT
    if not _IN_BLOCK.match(t.name) or not t.name.endswith(".weight") or len(t.shape) not in (2, 3):
        return "not a block's weights"
    if _NOT_WEIGHTS.search(t.name) or ((special := _NOT_WEIGHTS_OF.get(arch)) and special.search(t.name)):
        return "not a block's weights"
    if not block_type(t.shape[-1]):
        return f"{_MISFIT}{t.shape[-1]}, not a multiple of {tq1_25_64.TYPE.size}"
    return ""


def _set_type(t: Tensor, qtype: Any):
    block, size = gguf_type.register().GGML_QUANT_SIZES[qtype]
    if t.shape[-1] % block:
        raise ConvertError(
            f"{t.name} has rows of {t.shape[-1]}, {qtype.name} needs a multiple of {block}: choose another type, such as Q8_0 or F16"
        )
    t.type, t.nbytes = qtype, t.weights // block * size


def _set_group(t: Tensor, grouping: Grouping, size: int):
    """Set which weights of a ternary tensor share a scale, where the checkpoint has groups of `size`."""
    if not t.kind:
        return
    n, block = t.shape[-1], t.kind.size
    if grouping.granularity != "per_group":
        t.group = n
    elif size % block or (size == tq1_25.BLOCK and n % size):  # a type that was asked for; rows that do not fit the default
        t.group = block
    else:
        t.group = size


def _fit(t: Tensor, fixed: bool):
    """Make a tensor F32 if a weight is too large for its type or its type's scales; raise ConvertError if the type is `fixed`."""
    limit = _LARGEST.get(t.type.name, 65504.0)
    largest = 0.0
    with computing(t):
        for start, load in row_loaders(t.data, t.shape[-1]):
            x = load_chunk(load, t)
            largest = max(largest, float(x.max(initial=0)), -float(x.min(initial=0)))
            if (bad := first_bad(x)) is not None:
                raise t.bad_row(start + bad, tq1_25.NOT_FINITE)
    if largest > limit:
        if fixed:
            raise ConvertError(
                f"{t.name} ({t.source}) has a weight of magnitude {largest:.6g}, {t.type.name} holds "
                f"none beyond {limit:.6g}: {'F32 does' if t.type.name == 'BF16' else 'BF16 or F32 does'}"
            )
        t.why, t.noted = f"a weight of magnitude {largest:.6g}, too large for F16", True
        _set_type(t, gguf_type.register().GGMLQuantizationType.F32)


# ---- checks ----


def _check_groups(model: Any, plan: list[Tensor], grouping: Grouping, keep: tuple[str, ...]):
    """Raise a ConvertError that names all tensors whose rows or scales no block can hold in the checkpoint's groups."""
    quantized = [t for t in plan if t.kind]

    def refuse(misfits: list[Tensor], what: str, flag: str):
        asked = {t.name for t in misfits if t.why.startswith("as asked")}  # which overrules --keep
        names = {t.name for t in misfits} - asked
        ways = [
            f"--{'output-tensor' if name == OUTPUT else 'token-embedding'}-type with a type that is not ternary" for name in sorted(asked)
        ]
        if names:
            pattern = patterns.matching(names, [t.name for t in quantized if t.name not in names])
            ways.insert(0, "".join(f"--keep {shlex.quote(p)} " for p in (*keep, pattern)))
        some_left = len(misfits) < len(quantized)
        start = "".join(["To keep them unquantized:\n", *(f"  {way}\n" for way in ways), "or to"]) if some_left else "To"
        raise ConvertError(
            f"{len(misfits)} of {len(quantized)} matrices {what}: {starred(misfits)}. {start} quantize all weights again, "
            f"with loss:\n  {flag}"
        )

    if misfits := [t for t in quantized if t.shape[-1] % t.group]:
        rows, groups = (", ".join(map(str, sorted(set(sizes)))) for sizes in zip(*{(t.shape[-1], t.group) for t in misfits}))
        refuse(misfits, f"have rows of {rows}, not a multiple of the group size, {groups}", f"--group-size {tq1_25.BLOCK}")
    if grouping.granularity == "per_tensor":
        whole = model.model_tensors
        misfits = [t for t in quantized if t.source in whole and whole[t.source]().numel() not in (t.weights, math.prod(t.shape[-2:]))]
        if misfits:
            refuse(misfits, "are only parts of the checkpoint's tensors, so per_tensor's scale is lost", "--granularity per_channel")


def check_blocks(model: Any, plan: list[Tensor], options: Options):
    """Raise ConvertError if a block, or a matrix that its siblings have, is missing. To be called after `metadata.add_metadata`.

    A matrix is missing if at most one block in eight (at least one block) lacks it, and if these blocks have nothing that half of the
    others lack, as blocks of another kind do. Hybrid and pruned models list a figure for each block in the metadata: their blocks may
    differ in any way, and only the last one must be there.
    """
    if options.mtp:
        return
    arch = model.gguf_writer.arch
    hybrid = any(
        key.startswith(f"{arch}.") and isinstance(v.value, (list, tuple)) and len(v.value) == model.block_count
        for key, v in model.gguf_writer.kv_data[0].items()
    )
    wanted = model.find_hparam(["num_hidden_layers", "n_layers", "n_layer", "num_layers"], optional=True)
    wanted = min(wanted, model.block_count) if type(wanted) is int else 0
    stacks: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for t in plan:
        if m := _IN_BLOCK.match(t.name):
            names = stacks[m[1]][int(m[2])]
            if not _NOT_WEIGHTS.search(t.name) and "nextn." not in t.name:
                names.add(t.name[m.end() :])
    if (there := max((max(blocks) + 1 for blocks in stacks.values()), default=0)) < wanted:
        raise ConvertError(
            f"{model.dir_model}: its configuration has {wanted} blocks, its weights have {there}: "
            "a weight file is missing, or the configuration is another model's"
        )
    for stack, blocks in stacks.items() if not hybrid else ():
        n = max(blocks) + 1
        count = collections.Counter(name for names in blocks.values() for name in names)
        for i in range(n):
            lacking = sorted(name for name in count if name not in blocks[i] and count[name] >= n - max(1, n // 8))
            if lacking and not any(count[name] <= n / 2 for name in blocks[i]):
                raise ConvertError(
                    f"{model.dir_model}: {', '.join(f'{stack}.{i}.{name}' for name in lacking)} missing, which the "
                    "other blocks have: the checkpoint is not whole, download it again"
                )


def check_fallbacks(plan: list[Tensor]):
    """Raise ConvertError if a fallback type loses precision, for --require-exact."""
    if lossy := [t for t in plan if t.misfit and t.type.name not in FLOATS]:
        raise ConvertError(
            f"--require-exact: {len(lossy)} tensors would be stored as {lossy[0].type.name}, with loss, since their rows are not "
            f"a multiple of {tq1_25_64.TYPE.size}: {starred(lossy)}. Pass --fallback-type F16 as well"
        )


def type_notes(plan: list[Tensor]) -> list[str]:
    """Notes on tensors whose type a user may not expect, and why they have it."""
    by_why = collections.defaultdict(list)
    for t in plan:
        if t.noted:
            by_why[t.type.name, t.why].append(t)
    notes = []
    if any(name == tq1_25_64.TYPE.name for name, _ in by_why):
        counts = collections.Counter(t.type.name for t in plan if t.kind)
        notes.append(f"ternary matrices: {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}")
    notes += [
        f"{'kept in' if name in FLOATS else 'stored as'} {name}, {why}: {starred(tensors)}" for (name, why), tensors in by_why.items()
    ]
    if misfits := [t for t in plan if t.misfit]:
        sizes = ", ".join(f"{name} {_size_as(misfits, name) / 1e6:.1f} MB" for name in ("Q4_0", "Q8_0", "F16"))
        notes.append(f"sizes of these by --fallback-type: {sizes}")
    return notes


def _size_as(tensors: list[Tensor], name: str) -> int:
    """Bytes of tensors as this type, or as F16 if their rows are not a multiple of its block size."""
    gguf = gguf_type.register()
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return sum(2 * t.weights if t.shape[-1] % block else t.weights // block * nbytes for t in tensors)
