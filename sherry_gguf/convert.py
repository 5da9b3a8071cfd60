"""A Hugging Face model directory becomes a TQ1_25 GGUF, on llama.cpp's own conversion classes.

Upstream's class for the architecture reads the checkpoint, renames and reshapes the tensors, and collects metadata and
tokenizer, as for an F16 file. Of that file's tensors, the ones that llama-quantize would quantize and that belong to
the blocks become TQ1_25; all others stay what upstream makes of them. Few architectures are known
here by name: those of `_AS_STORED` and `_NOT_WEIGHTS_OF`.

Tensors are read, converted and written in chunks of rows; the finished files are read back before they replace
anything.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import atomic, gguf_type, llama_cpp, packed, patterns, ternary, tq1_25, vocabulary
from .errors import ConvertError, NotBuilt, QuantizeError, VocabularyError
from .provenance import Checkpoint
from .report import progress_bar, starred
from .vocabulary import Vocabulary

FORMAT_VERSION = 1  # of the sherry.* metadata
CHUNK = 1 << 22  # weights handled at a time by a thread
EARLY = 1 << 29  # bytes of tensors from which on the tokenizer is looked at before they are converted, and not only after
WORKERS = min(8, os.cpu_count() or 1)  # threads

# The names of llama-quantize's --token-embedding-type and --output-tensor-type that need no importance matrix.
STORED_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q4_K",
    "Q3_K",
    "Q2_K",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    tq1_25.NAME,
)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
MISFIT = "rows of "  # begins why a matrix that would be quantized does not fit
IN_TRAINING = "full precision in training"
FALLBACK = "Q4_0"  # type of such matrices, as llama-quantize has it
_LARGEST = {"BF16": float(np.uint32(0x7F7F0000).view(np.float32))}  # else 65504: F16, and scales are fp16

_IN_BLOCK = re.compile(r"^((?:enc\.|dec\.)?blk)\.(\d+)\.")
# Matrices of the blocks that stay: what llama-quantize leaves alone (tensor_allows_quantization), what the graphs use
# otherwise than as a matrix product's weights (LLM_TENSOR_INFOS), the second embeddings and heads of multi-token
# prediction, and attn_k_b, whose rows run along the outputs of the layer that was trained.
_NOT_WEIGHTS = re.compile(
    r"norm|altup|laurel|indexer|hc_|_ape\b|_res_score|sinks|_rel_b\b|\.rel_pos|position_embd|patch_(?:embd|merger)"
    r"|ffn_gate_inp|tid2eid|exp_probs|ffn\.act\b|layer_output_scale|nextn\.(?:embed_tokens|shared_head_head)"
    r"|conv1d|shortconv\.conv\b|conv_base|ssm_(?:a|d|beta|[fg]_[ab])\b|channel_mix_lerp"
    r"|time_mix_(?:first|decay|lerp|ln|[wvag][0-2]|k_k|k_a|r_k)|attn_k_b\b"
)
_NOT_WEIGHTS_OF = {"glm5-next": re.compile(r"attn_kv_a_mqa|attn_v_b")}


class _BadRow(Exception):
    def __init__(self, row: int, cause: str):
        self.row, self.cause = row, cause


# ---- the pinned llama.cpp ----


@functools.cache
def upstream():
    """The pinned llama.cpp's `conversion` package, and in this process only the `gguf` package that belongs to it.

    Raises ConvertError if another gguf is already imported, NotBuilt.
    """
    source = llama_cpp.source_dir()
    gguf_py = source / "gguf-py"
    if (loaded := sys.modules.get("gguf")) and Path(loaded.__file__).resolve().parent.parent != gguf_py.resolve():
        raise ConvertError(
            f"another gguf package is already imported, from {loaded.__file__}: llama.cpp's conversion "
            f"code needs its own, in {gguf_py}. Convert and verify in a process of their own"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the model directory
    sys.path[:0] = [str(gguf_py), str(source)]
    import conversion

    gguf_type.register()
    return conversion


class _Recorder(Vocabulary):
    """Mixed in before upstream's class: notes what is asked of it, and makes nothing eager."""

    def tensor_force_quant(self, name, new_name, bid, n_dims):
        # The answer stays upstream's: only after it has told its own exceptions apart does make_plan choose a type.
        forced = super().tensor_force_quant(name, new_name, bid, n_dims)
        self.__dict__.setdefault("asked", {})[new_name] = name, forced
        return forced

    def modify_tensors(self, data_torch, name, bid):
        import torch

        lazy = upstream().LazyTorchTensor
        # float64 goes through upstream's class as it is and is cast after it, so that what the cast changes is seen.
        # Integers need no such care: those that float32 cannot hold are beyond fp16 too.
        if isinstance(data_torch, lazy) and _is_cast(data_torch, torch.float32):
            if data_torch._args[0].dtype is torch.float64:
                data_torch = data_torch._args[0]
        given = self.__dict__.setdefault("_waiting", [])
        given.append(name)
        yielded = False
        for new_name, data in super().modify_tensors(data_torch, name, bid):
            yielded = True
            self.__dict__.setdefault("given", {})[new_name] = tuple(given)
            if type(data) is torch.Tensor:
                data = lazy.from_eager(data)  # an eager one would be rounded to F16 at once
            if data.dtype is torch.float64:
                self.__dict__.setdefault("wide", {})[new_name] = data
                data = data.to(torch.float32)
            yield new_name, data
        if yielded:  # else upstream keeps the tensor back, to put it together with others
            given.clear()

    def dequant_model(self):
        # upstream's own way with packed ternary weights fails on lazy tensors, and takes all scales for inverted ones
        packed.unpack_bitnet(self)
        before = dict(self.model_tensors)
        super().dequant_model()
        changed = {name for name, make in self.model_tensors.items() if before.get(name) is not make}
        self.decoded = changed | self.__dict__.get("decoded", set())


# What upstream's classes do to weights that the checkpoint holds otherwise, undone: method by class. BitNet's quantizes each matrix
# again, with one scale.
_AS_STORED: dict[str, dict[str, Any]] = {"BitnetModel": {"weight_quant": lambda self, weight: weight}}

# Flags of upstream's script that only choose what its classes do: argparse settings by keyword of the class.
UPSTREAM_FLAGS = {
    "fuse_gate_up_exps": "store the gate and up experts as one tensor",
    "fuse_qkv": "store the Q, K and V weights as one tensor",
    "sentence_transformers_dense_modules": "include the dense modules of sentence-transformers",
}


@dataclasses.dataclass
class Options:
    """What a conversion is asked for; the command line's flags, one to one."""

    outfile: Path | None = None
    keep: tuple[str, ...] = ()
    require_exact: bool = False
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    fallback_type: str | None = None  # Q4_0, for matrices that training kept in full precision F16
    group_size: int | None = None
    granularity: str | None = None
    tokenizer_pre: str | None = None
    no_tokenizer_check: bool = False
    vocab_only: bool = False
    dry_run: bool = False
    split_max_tensors: int = 0
    split_max_size: int = 0  # bytes
    no_tensor_first_split: bool = False
    model_name: str | None = None
    metadata: Path | None = None
    mtp: bool = False
    no_nextn: bool = False
    target_model_dir: Path | None = None
    flags: tuple[str, ...] = ()  # of UPSTREAM_FLAGS
    progress: bool = False


def instantiate(model_dir: Path, options: Options, ftype: str, mixin: type | None = None):
    """Upstream's model object for a directory, `mixin` before its class. Raises ConvertError."""
    conversion = upstream()
    import gguf

    cls, arch = _model_class(_hparams(model_dir), model_dir)
    if (options.mtp or options.no_nextn) and not cls.supports_mtp_export:
        raise ConvertError(f"--mtp and --no-nextn are not for {arch}: it has no multi-token prediction head")
    kwargs: dict[str, Any] = dict.fromkeys(options.flags, True)
    if options.target_model_dir:
        kwargs["target_model_dir"] = options.target_model_dir

    def build(cls):
        attributes = _AS_STORED.get(cls.__name__, {}) | {
            "model_arch": cls.model_arch,
            "tokenizer_pre": _tokenizer_pre(options.tokenizer_pre),
            "mtp_only": options.mtp,
            "no_mtp": options.no_nextn,
        }
        cls = type(cls.__name__, (mixin, cls) if mixin else (cls,), attributes)
        return cls(
            model_dir,
            getattr(gguf.LlamaFileType, ftype),
            Path("model.gguf"),
            metadata_override=options.metadata,
            model_name=options.model_name,
            small_first_shard=options.no_tensor_first_split,
            **kwargs,
        )

    hint = ". If the checkpoint is without its multi-token prediction block, pass --no-nextn"
    with _telling(f"{arch} in {model_dir}", hint=hint * (cls.supports_mtp_export and not options.no_nextn)):
        model = build(cls)
        if isinstance(inner := vars(model).get("impl"), conversion.ModelBase):  # a class that only picks another
            model = build(type(inner))
    if type(model).__name__ == "BitnetModel" and any("sub_norm" in name for name in model.model_tensors):
        raise ConvertError(
            f"{model_dir} is a BitNet b1.58 as transformers has it (with ffn_sub_norm, and a squared ReLU): the pinned llama.cpp runs "
            "only the first BitNet models, of other names and with SiLU"
        )
    if type(model).write is not conversion.ModelBase.write:
        raise ConvertError(f"{arch}: llama.cpp stores this architecture in several files; that is not supported here")
    return model


def collect(model) -> dict[str, Any]:
    """Upstream's tensors of a model, name to TensorInfo, in the file's order; nothing is read yet."""
    with _telling(f"{model.dir_model}: llama.cpp's conversion, {type(model).__name__}, failed"):
        model.prepare_tensors()
    return {name: info for part in model.gguf_writer.tensors for name, info in part.items()}


def add_metadata(model):
    """Let upstream fill in hyperparameters and tokenizer."""
    import gguf

    model.ftype = gguf.LlamaFileType.MOSTLY_TQ1_25
    with contextlib.ExitStack() as stack:
        stack.enter_context(_telling(f"{model.dir_model}: its metadata or tokenizer cannot be converted"))
        if (name := name_of(model.dir_model)) != model.dir_model.resolve().name:
            # upstream makes name, size label and more of the directory's name, which in a cache is a commit's hash
            link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
            link.symlink_to(model.dir_model.resolve(), target_is_directory=True)
            model.dir_model_card = link
        model.prepare_metadata(vocab_only=False)
    for key, v in model.gguf_writer.kv_data[0].items():
        if key.startswith("general."):  # what --metadata sets
            with _telling(f"{key} cannot be {v.value!r}"):
                model.gguf_writer._pack_val(v.value, v.type, add_vtype=True, sub_type=v.sub_type)
    if model.unknown_pre:
        with _vocabulary_file(model) as file:
            raise ConvertError(vocabulary.unknown_pre(file, model.dir_model))


@contextlib.contextmanager
def _vocabulary_file(model) -> Iterator[Path]:
    """A GGUF of the metadata alone, from which llama.cpp loads a vocabulary; gone afterwards."""
    import gguf

    with tempfile.TemporaryDirectory() as directory:
        writer = gguf.GGUFWriter(None, model.gguf_writer.arch)
        writer.kv_data = [dict(model.gguf_writer.kv_data[0])]
        with contextlib.closing(writer), _telling(f"{model.dir_model}: its metadata cannot be written", but=(OSError,)):
            writer.write_header_to_file(file := Path(directory) / "vocabulary.gguf")
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        yield file


def tokenizer_problem(model, file: Path, options: Options) -> str:
    """How a file's tokenizer differs from the checkpoint's, or "". Raises NotBuilt."""
    kind = getattr(model.gguf_writer.kv_data[0].get("tokenizer.ggml.model"), "value", "none")
    if options.no_tokenizer_check or kind in ("none", "no_vocab"):
        return ""
    return vocabulary.problem(file, options.target_model_dir or model.dir_model, kind)


def _check_tokenizer(model, file: Path, options: Options):
    if problem := tokenizer_problem(model, file, options):
        raise ConvertError(f"{model.dir_model}: {problem}. Nothing was written")


def check_token_count(model, plan: list[Tensor]):
    """Raise ConvertError where embeddings or output are of more or fewer tokens than the tokenizer has; after `add_metadata`."""
    tokens = model.gguf_writer.kv_data[0].get("tokenizer.ggml.tokens")
    # A draft model's output may be of fewer tokens, which d2t names.
    names = EMBEDDINGS[:1] if any(t.name.startswith("d2t") for t in plan) else (EMBEDDINGS[0], OUTPUT)
    for t in plan if tokens else ():
        if t.name in names and t.shape[0] != len(tokens.value):
            raise ConvertError(
                f"{model.dir_model}: {t.source} has {t.shape[0]} rows, the vocabulary that config.json and the tokenizer give has "
                f"{len(tokens.value)} tokens (vocab_size is {model.hparams.get('vocab_size')}): llama.cpp would refuse the file. If the "
                f"rows belong to the model, set vocab_size to {t.shape[0]}"
            )


@contextlib.contextmanager
def _telling(what: str, but: tuple[type, ...] = (), hint: str = ""):
    """Upstream's classes fail in any way that there is on a checkpoint that is not as they expect.

    `hint` follows an error that has no text of its own.
    """
    try:
        yield
    except (ConvertError, NotBuilt, *but):
        raise
    except VocabularyError as e:
        raise ConvertError(str(e)) from e
    except Exception as e:
        text = str(e).strip()
        if text and not isinstance(e, AssertionError):
            plain = isinstance(e, (ValueError, ImportError, OSError))
            raise ConvertError(f"{what}: {text if plain else f'{type(e).__name__}: {text}'}") from e
        raise ConvertError(f"{what}: {' '.join(filter(None, [type(e).__name__, text]))} {_origin(e)}{hint}") from e


def _origin(e: BaseException) -> str:
    """Where an exception comes from: the line, and the tensor or token that upstream was at."""
    place = traceback.extract_tb(e.__traceback__)[-1]
    names, trace = [], e.__traceback__
    while trace:
        for name in ("name", "new_name", "token"):
            if isinstance(value := trace.tb_frame.f_locals.get(name), str):
                names.append(f"{'token' if name == 'token' else 'tensor'} {value}")
        trace = trace.tb_next
    about = f", {names[-1]}" if names else ""
    return f"at {Path(place.filename).name}, line {place.lineno} ({place.line}){about}"


def _hparams(model_dir: Path) -> dict[str, Any]:
    base = upstream().ModelBase
    config = model_dir / "config.json"
    if not config.is_file():
        if not (guess := base.load_hparams_guess(model_dir)):
            raise ConvertError(f"{model_dir} is not a model directory: it has no config.json")
        return guess
    names = read_json(config).get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ConvertError(f'{config}: "architectures" is {names!r}, not a list of names')
    with _telling(str(config)):
        return base.load_hparams(model_dir, False)


def _model_class(hparams: dict[str, Any], model_dir: Path) -> tuple[type, str]:
    conversion = upstream()
    config = model_dir / "config.json"
    try:
        with _telling(str(config), but=(ValueError,)):
            arch = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    except ValueError:
        raise ConvertError(f'{config} names no architecture (key "architectures")') from None
    try:
        return conversion.get_model_class(arch), arch
    except NotImplementedError:
        raise ConvertError(
            f"the architecture {arch} of {model_dir} is unknown to the pinned llama.cpp: --print-supported-models lists what it knows"
        ) from None


def _tokenizer_pre(name: str | None) -> str | None:
    if name and (known := vocabulary.known_pres()) and name not in known:
        raise ConvertError(f"--tokenizer-pre {name}: llama.cpp does not know it, only {', '.join(known)}")
    return name


# ---- the checkpoint ----


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConvertError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConvertError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return value


def check_directory(model_dir: Path):
    """Raises ConvertError."""
    if not model_dir.is_dir():
        raise ConvertError(f"{model_dir} is {'not a directory' if model_dir.exists() else 'not there: no such directory'}")


def check_input(model_dir: Path, options: Options):
    """Raises ConvertError for what can be told of a directory and of types before anything is loaded."""
    check_directory(model_dir)
    with _telling(str(model_dir)):
        vocabulary.check_files(model_dir)
    for name in (options.token_embedding_type, options.output_tensor_type, options.fallback_type):
        if name is not None and name.upper() not in STORED_TYPES:
            raise ConvertError(f"unknown tensor type {name or repr(name)}: there are {', '.join(STORED_TYPES)}")
    if options.fallback_type and options.fallback_type.upper() == tq1_25.NAME:
        raise ConvertError(
            f"--fallback-type {options.fallback_type}: it is for the matrices that {tq1_25.NAME} does not fit. Choose another type"
        )


def check_checkpoint(model_dir: Path):
    """Are the weight files that upstream will read all there, whole, and each tensor in one of them?

    Upstream reads the files that an index names, without one every file of such a name, and of a tensor that is in
    several the last. Raises ConvertError.
    """
    _hparams(model_dir)  # its error is the better one for what is no model at all
    names = upstream().ModelBase.get_model_part_names
    for prefix, suffix in ("model", ".safetensors"), ("pytorch_model", ".bin"):
        index = model_dir / f"{prefix}{suffix}.index.json"
        if (parts := names(model_dir, prefix, suffix)) or index.is_file():
            break
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ConvertError(f"{index} has no weight_map of tensors to files: download it again")
        parts = list(weight_map.values())
    else:
        for part in list(parts):
            if n := re.search(r"-\d{5}-of-(\d{5})\.", part):
                parts += [f"{part[: n.start()]}-{i + 1:05}-of-{n[1]}{suffix}" for i in range(int(n[1]))]
    parts = sorted(set(parts))
    if not parts:
        raise ConvertError(f"{model_dir} has no weights: neither model*.safetensors nor pytorch_model*.bin")
    if missing := [n for n in parts if not (model_dir / n).is_file()]:
        raise ConvertError(f"{model_dir} lacks {', '.join(missing)}: {len(missing)} of {len(parts)} weight files. Download the rest")
    found: dict[str, str] = {}
    for part in parts:
        for name in _tensor_names(model_dir / part):
            if name in found:
                raise ConvertError(
                    f"{model_dir}: the tensor {name} is in {found[name]} and in {part}: remove the file that does not belong to the model"
                )
            if weight_map.get(name, part) != part:
                raise ConvertError(f"{index} has {name} in {weight_map[name]}, it is in {part}: download the index and both again")
            found[name] = part


def _tensor_names(path: Path) -> list[str]:
    broken = f"{path} ({path.stat().st_size} bytes) is truncated or damaged, download it again: "
    if path.suffix == ".safetensors":
        import safetensors

        try:
            with safetensors.safe_open(path, "np") as f:  # checks that the header and the file's length agree
                return list(f.keys())
        except safetensors.SafetensorError as e:
            raise ConvertError(broken + str(e)) from e
    import torch

    if not zipfile.is_zipfile(path):
        raise ConvertError(broken + "no PyTorch zip archive (one saved before PyTorch 1.6 must be loaded and saved anew)")
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:
        cause = type(e).__name__
        raise ConvertError(f"{path} is damaged, or holds what only running its code could read: {cause}") from e
    if not isinstance(tensors, dict):
        raise ConvertError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    if other := {name: type(t).__name__ for name, t in tensors.items() if not isinstance(t, torch.Tensor)}:
        name = next(iter(other))
        raise ConvertError(f"{path} holds not only tensors by name: {name!r} is of type {other[name]}. Save the model's state_dict() alone")
    return list(tensors)


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which weights of a row share a scale, as the checkpoint was trained (config.json, key sherry_config)."""

    granularity: str = "per_group"  # or per_channel, per_tensor
    group_size: int = tq1_25.BLOCK  # of per_group
    weights: str = ""  # latent, fake_quantized, or not said
    kept: frozenset[str] = frozenset()  # names in the checkpoint of matrices that were in full precision

    @property
    def of_blocks(self) -> bool:
        return self.granularity == "per_group" and self.group_size == tq1_25.BLOCK

    def __str__(self):
        return f"groups of {self.group_size}" if self.granularity == "per_group" else self.granularity


def read_grouping(model_dir: Path, options: Options) -> Grouping:
    """The checkpoint's sherry_config, overruled by the options. Raises ConvertError for what TQ1_25 cannot hold."""
    config = read_json(path) if (path := model_dir / "config.json").is_file() else {}
    text = config.get("text_config")
    found = config.get("sherry_config") or (text.get("sherry_config") if isinstance(text, dict) else None) or {}
    if not isinstance(found, dict):
        raise ConvertError(f"{path}: sherry_config is {found!r}, not an object")
    where = f"{path}: sherry_config has "
    if (method := found.get("method", "sparse_absmean")) != "sparse_absmean":
        raise ConvertError(f"{where}method {method!r}; TQ1_25 stores sparse_absmean")
    if (pattern := (found.get("n", ternary.KEPT), found.get("m", ternary.GROUP))) != (ternary.KEPT, ternary.GROUP):
        raise ConvertError(f"{where}the sparsity {pattern[0]!r}:{pattern[1]!r}; TQ1_25 stores 3:4")
    if (weights := found.get("weights", "")) not in ("", "latent", "fake_quantized"):
        raise ConvertError(f"{where}weights {weights!r}, neither latent nor fake_quantized")
    kept = found.get("kept", [])
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ConvertError(f"{where}kept {kept!r}, not a list of tensor names")
    granularity, size = found.get("granularity", "per_group"), found.get("group_size", tq1_25.BLOCK)
    if options.group_size is not None:
        where, granularity, size = "--group-size is given: ", "per_group", options.group_size
    if options.granularity is not None:
        where, granularity = "--granularity is given: ", options.granularity
    if granularity not in ("per_group", "per_channel", "per_tensor"):
        raise ConvertError(f"{where}granularity {granularity!r}, none of per_group, per_channel, per_tensor")
    if granularity == "per_group" and (type(size) is not int or size <= 0 or size % tq1_25.BLOCK):
        raise ConvertError(
            f"{where}group_size {size!r}. A TQ1_25 block holds {tq1_25.BLOCK} weights under one scale, so groups must "
            f"be a multiple of {tq1_25.BLOCK}: train with such a group size, or pass --group-size {tq1_25.BLOCK} to "
            "quantize these weights anew, with loss"
        )
    return Grouping(granularity, size if granularity == "per_group" else tq1_25.BLOCK, weights, frozenset(kept))


# ---- the plan ----


@dataclasses.dataclass
class Tensor:
    """A tensor of the file to be."""

    name: str
    source: str  # of the tensor of the checkpoint that upstream was last given for it, or ""
    shape: tuple[int, ...]  # NumPy's order
    type: Any  # gguf.GGMLQuantizationType
    nbytes: int
    data: Any  # lazy, not rounded yet unless raw
    raw: bool = False  # bytes or integers that upstream made: copied
    why: str = ""  # it is not TQ1_25
    blocks: int = 0
    exact: int = 0  # of the blocks
    vanished: int = 0  # of the blocks: all zero, and were not
    # float64 (4,): error², weight², value², weight · value
    sums: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4))
    ternary: bool = False  # it has rows that are ternary, and not 3:4 sparse
    misfit: bool = False  # it would be TQ1_25 but for the length of its rows
    changed: str = ""  # how upstream changed the checkpoint's values, where it did not only move them
    sha256: bytes = b""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_exact(self) -> bool:
        """Whether every value that is stored is the checkpoint's."""
        return self.exact == self.blocks and not self.changed

    @property
    def relative_error(self) -> float:
        error, weight = self.sums[:2]
        return math.sqrt(error / weight) if weight else 0.0

    @property
    def cosine(self) -> float:
        _, weight, value, both = self.sums
        return both / math.sqrt(weight) / math.sqrt(value) if weight and value else float(weight == value)

    def add(self, blocks: int, exact: int, vanished: int, sums: np.ndarray | float, ternary: bool = False):
        """Count the blocks of some more rows; see `compare` and `_is_ternary`."""
        self.ternary = self.ternary or ternary
        self.blocks, self.exact, self.vanished = self.blocks + blocks, self.exact + exact, self.vanished + vanished
        self.sums = self.sums + sums


def make_plan(model, options: Options, grouping: Grouping) -> list[Tensor]:
    """Each tensor's type. Raises ConvertError."""
    import gguf

    types = gguf.GGMLQuantizationType
    keep = [_compiled(p) for p in options.keep]
    fallback = types[(options.fallback_type or FALLBACK).upper()]
    chosen = dict.fromkeys(EMBEDDINGS, options.token_embedding_type) | {OUTPUT: options.output_tensor_type}
    arch = gguf.MODEL_ARCH_NAMES[model.model_arch]
    plan = []
    for name, info in collect(model).items():
        source, forced = getattr(model, "asked", {}).get(name, ("", None))
        t = Tensor(name, source, tuple(int(n) for n in info.shape), info.dtype, info.nbytes, info.tensor)
        if not t.weights:
            raise ConvertError(f"{name} ({source}) has the shape {t.shape}: it holds no weights")
        plan.append(t)
        if info.dtype != types.F16 or type(forced) is not bool:
            if chosen.get(name):
                raise ConvertError(f"{name}: llama.cpp wants it as {info.dtype.name}, not {chosen[name]}")
            t.why = "as upstream"
            t.raw = info.dtype not in (types.F32, types.F16)
        elif chosen.get(name):
            t.why = "as asked" + ", which overrules --keep" * _kept(t, keep)
            _set_type(t, types[chosen[name].upper()])
        else:
            t.why = _why_kept(t, arch, keep, grouping.kept)
            if not t.why:
                _set_type(t, types.TQ1_25)
            elif options.fallback_type and t.why == IN_TRAINING and (misfit := _why_kept(t, arch, keep)):
                t.why = misfit
            if t.why.startswith(MISFIT):
                t.misfit = True
                if t.shape[-1] % (block := gguf.GGML_QUANT_SIZES[fallback][0]) == 0:
                    _set_type(t, fallback)
                else:
                    t.why += f" nor of {block}, which {fallback.name} needs"
        if info.dtype == types.F16:
            t.data = _unrounded(t.data)
    _check_groups(model, plan, grouping, options.keep)
    if options.output_tensor_type and not any(t.name == OUTPUT for t in plan):
        raise ConvertError(
            "--output-tensor-type: this model has no output tensor, its embeddings serve as both; use --token-embedding-type"
        )
    for p in keep:
        if not any(_kept(t, [p]) for t in plan):
            raise ConvertError(f"--keep {p.pattern}: no tensor has such a name; --dry-run without it lists them")
    if not any(t.type == types.TQ1_25 for t in plan):
        by_flag = [f"--keep keeps {sum(t.why == '--keep' for t in plan)} tensors"] * bool(keep)
        notes = "; ".join(by_flag + _kept_notes(plan))
        raise ConvertError(f"{model.dir_model}: no tensor can be {tq1_25.NAME}. {notes}")
    for t in plan:
        if t.type not in (types.F32, types.TQ1_25) and not t.raw:
            _fit(t, fixed=t.why.startswith("as "))
    return plan


def _kept(t: Tensor, keep: list[re.Pattern]) -> bool:
    return any(p.search(t.name) or p.search(t.source) for p in keep)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConvertError(f"--keep {pattern}: not a regular expression: {e}") from None


def _why_kept(t: Tensor, arch: str, keep: list[re.Pattern], in_training: frozenset[str] = frozenset()) -> str:
    if _kept(t, keep):
        return "--keep"
    if t.source in in_training:
        return IN_TRAINING
    if t.name in (*EMBEDDINGS, OUTPUT):
        return "embeddings and output"
    if not _IN_BLOCK.match(t.name) or not t.name.endswith(".weight") or len(t.shape) not in (2, 3):
        return "not a block's weights"
    if _NOT_WEIGHTS.search(t.name) or ((special := _NOT_WEIGHTS_OF.get(arch)) and special.search(t.name)):
        return "not a block's weights"
    if t.shape[-1] % tq1_25.BLOCK:
        return f"{MISFIT}{t.shape[-1]}, not a multiple of {tq1_25.BLOCK}"
    return ""


def _set_type(t: Tensor, qtype):
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[qtype]
    if t.shape[-1] % block:
        raise ConvertError(
            f"{t.name} has rows of {t.shape[-1]}, {qtype.name} needs a multiple of {block}: choose another type, such as Q8_0 or F16"
        )
    t.type, t.nbytes = qtype, t.weights // block * size


def _check_groups(model, plan: list[Tensor], grouping: Grouping, keep: tuple[str, ...]):
    """Raise ConvertError with all tensors whose rows or scales TQ1_25 cannot take in the checkpoint's groups."""
    quantized = [t for t in plan if t.type.name == tq1_25.NAME]

    def refuse(misfits: list[Tensor], what: str, flag: str):
        names = {t.name for t in misfits}
        pattern = patterns.matching(names, [t.name for t in quantized if t.name not in names])
        flags = "".join(f"--keep {shlex.quote(p)} " for p in (*keep, pattern))
        raise ConvertError(
            f"{len(misfits)} of {len(quantized)} matrices {what}: {starred(misfits)}. To keep them unquantized:\n  {flags}\n"
            f"or to quantize all weights anew, with loss:\n  {flag}"
        )

    if grouping.granularity == "per_group" and (misfits := [t for t in quantized if t.shape[-1] % grouping.group_size]):
        sizes = ", ".join(map(str, sorted({t.shape[-1] for t in misfits})))
        refuse(misfits, f"have rows of {sizes}, not a multiple of the group size, {grouping.group_size}", f"--group-size {tq1_25.BLOCK}")
    if grouping.granularity == "per_tensor":
        whole = model.model_tensors
        misfits = [t for t in quantized if t.source in whole and whole[t.source]().numel() not in (t.weights, math.prod(t.shape[-2:]))]
        if misfits:
            refuse(misfits, "are only parts of tensors of the checkpoint, so that per_tensor's scale is lost", "--granularity per_channel")


def check_blocks(model, plan: list[Tensor], options: Options):
    """Raise ConvertError where a block, or a matrix that its siblings have, is missing; after `add_metadata`.

    A matrix is missing where at most one block in eight (or one of fewer) lacks it and has nothing that half of the
    others lack, as blocks of another kind do. Where the metadata list a figure for each block, as those of hybrid and
    pruned models do, blocks may differ in any way, and only the last must be there.
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


def _fit(t: Tensor, fixed: bool):
    """A tensor with a weight that its type makes infinite, by itself or by its scale, stays F32 where it may."""
    import gguf

    limit = _LARGEST.get(t.type.name, 65504.0)
    largest = 0.0
    with computing(t):
        for start, load in row_loaders(t.data, t.shape[-1]):
            x = _load(load, t)
            largest = max(largest, float(x.max(initial=0)), -float(x.min(initial=0)))
            if not np.isfinite(x).all():
                raise _bad_row(t, start + _first_bad(x), "a weight is NaN or infinite")
    if largest > limit:
        if fixed:
            raise ConvertError(
                f"{t.name} ({t.source}) has a weight of magnitude {largest:.6g}, {t.type.name} holds "
                f"none beyond {limit:.6g}: {'F32 does' if t.type.name == 'BF16' else 'BF16 or F32 does'}"
            )
        t.why = f"a weight of magnitude {largest:.6g}, too large for F16"
        _set_type(t, gguf.GGMLQuantizationType.F32)


def _first_bad(x: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(x).all(axis=-1)))


def _bad_row(t: Tensor, row: int, cause: str) -> ConvertError:
    return ConvertError(
        f"{t.name} ({t.source or 'made by llama.cpp'}), row {row}: {cause}. The checkpoint is damaged or its training diverged"
    )


# ---- reading by rows ----


def _unrounded(tensor):
    """What upstream's `astype(float16)` was applied to."""
    import gguf

    if isinstance(tensor, gguf.LazyChunkedTensor):
        return gguf.LazyChunkedTensor(tensor._chunks, tensor.shape, np.float32)
    return tensor._args[0] if isinstance(tensor, gguf.LazyNumpyTensor) and tensor._data is None else tensor


def evaluate(tensor):
    """A lazy tensor's value. Upstream's own `to_eager` keeps every intermediate result for the tensor's life."""
    import gguf

    if not isinstance(tensor, gguf.LazyBase):
        return tensor
    if tensor._data is not None:
        return tensor._data
    return tensor._func(*gguf.LazyBase._recurse_apply(tensor._args, evaluate), **tensor._kwargs)


def _sources(tensor) -> Iterator[Any]:
    """The pieces, each of whole rows, that a lazy tensor is one after the other: ranges of a file, lazy tensors or arrays.

    Looks through what only changes the dtype to float32 or puts tensors one below the other; anything else upstream
    did to a tensor is done on the whole of it.
    """
    import gguf
    import torch
    from gguf.utility import LocalTensor

    if isinstance(tensor, gguf.LazyChunkedTensor):
        for load in tensor._chunks:
            yield load()
    elif not isinstance(tensor, gguf.LazyBase) or tensor._data is not None:
        yield tensor
    elif len(tensor._args) == 1 and isinstance(tensor._args[0], LocalTensor):
        yield tensor._args[0]
    elif _is_cast(tensor, torch.float32):
        yield from _sources(tensor._args[0])
    elif tensor._func in (torch.stack, torch.cat) and len(tensor.shape) > 1 and (*tensor._args[1:], *tensor._kwargs.values()) in ((), (0,)):
        for part in tensor._args[0]:
            yield from _sources(part)
    else:
        yield tensor


def is_stored(tensor) -> bool:
    """Whether a lazy tensor is read from a safetensors file as it is there."""
    from gguf.utility import LocalTensor

    return all(isinstance(piece, LocalTensor) for piece in _sources(tensor))


def _is_cast(tensor, float32) -> bool:
    import gguf

    args = tensor._args
    if not args or not isinstance(args[0], gguf.LazyBase) or tuple(args[0].shape) != tuple(tensor.shape):
        return False
    to_numpy = isinstance(tensor, gguf.LazyNumpyTensor) and not isinstance(args[0], gguf.LazyNumpyTensor)
    return not tensor._kwargs and (len(args) == 1 and to_numpy or len(args) == 2 and args[1] is float32)


def row_loaders(tensor, width: int) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
    """(first row, function that loads (rows, width)) for each chunk of rows, in order: float32, or the float64 of it.

    A tensor that is in a file as it is gets read by these functions, chunk by chunk, without a mapping that would
    count as memory; they may run in any thread.
    """
    import torch
    from gguf.utility import LocalTensor

    step = max(1, CHUNK // width)
    row = 0
    for piece in _sources(tensor):
        if isinstance(piece, LocalTensor):
            rows = math.prod(piece.shape) // width
        else:
            piece = evaluate(piece)
            piece = (torch.from_numpy(piece) if isinstance(piece, np.ndarray) else piece).reshape(-1, width)
            rows = len(piece)
        for start in range(0, rows, step):
            yield row + start, functools.partial(_load_rows, piece, start, min(step, rows - start), width)
        row += rows


def _load_rows(piece, start: int, count: int, width: int) -> np.ndarray:
    import torch

    if isinstance(piece, torch.Tensor):
        return _widened(piece[start : start + count])
    dtype = upstream().LazyTorchTensor._dtype_str_map[piece.dtype]
    stored = piece.data_range
    row_bytes = width * dtype.itemsize
    data = np.fromfile(stored.filename, np.uint8, count * row_bytes, offset=stored.offset + start * row_bytes)
    return _widened(torch.from_numpy(data).view(dtype).reshape(count, width))


def _widened(x) -> np.ndarray:
    import torch

    return (x if x.dtype is torch.float64 else x.to(torch.float32)).numpy()


def computing(t: Tensor):
    """Around what upstream does to a tensor when its values are asked for. A context manager; OSErrors pass."""
    return _telling(f"{t.name} ({t.source or 'made by llama.cpp'}): llama.cpp's conversion failed", but=(OSError,))


def _load(load: Callable[[], np.ndarray], t: Tensor) -> np.ndarray:
    try:
        return load()
    except (OSError, RuntimeError) as e:
        raise ConvertError(f"cannot read {t.source or t.name}: {e}") from e


# ---- encoding ----


class Encoder:
    """Turns a tensor into the file's bytes, chunk by chunk, on several threads."""

    def __init__(self, grouping: Grouping, pool: concurrent.futures.Executor, checkpoint: Checkpoint):
        from . import kernels

        self.grouping, self.pool, self.kernels, self.checkpoint = grouping, pool, kernels, checkpoint

    def chunks(self, t: Tensor) -> Iterator[tuple[int, Any]]:
        """(weights, bytes) of each chunk; t's exactness, error and sha256 are right once all are drawn."""
        digest = hashlib.sha256()
        if t.raw:
            data = _bytes(evaluate(t.data))
            digest.update(data)
            yield t.weights, data
        else:
            if not is_stored(t.data):
                sources = self.checkpoint.sources(t.name, t.data)
                t.changed = self.checkpoint.change(sources, lambda: self._in_order(t, lambda row, x: x))
            scale = self._tensor_scales(t)
            for data, n, *found in self._in_order(t, lambda row, x: self._encode(t, row, x, scale)):
                digest.update(data)
                t.add(*found)
                yield n, data
        t.sha256 = digest.digest()

    def _in_order(self, t: Tensor, work: Callable[[int, np.ndarray], Any]) -> Iterator[Any]:
        waiting: collections.deque = collections.deque()
        jobs = row_loaders(t.data, t.shape[-1] if t.shape else 1)
        try:
            while True:
                with computing(t):
                    more = list(itertools.islice(jobs, WORKERS + 1 - len(waiting)))
                for row, load in more:
                    waiting.append((row, self.pool.submit(lambda r=row, f=load: work(r, _load(f, t)))))
                if not waiting:
                    return
                row, future = waiting.popleft()
                try:
                    yield future.result()
                except _BadRow as e:
                    raise _bad_row(t, row + e.row, e.cause) from None
        finally:
            for _, future in waiting:
                future.cancel()

    def _encode(self, t: Tensor, row: int, source: np.ndarray, scale: np.ndarray | None):
        """(bytes, weights, blocks, exact ones, ones that vanished, sums) of rows, given as `row_loaders` has them."""
        import gguf

        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(source, np.float32)
        if not np.isfinite(x).all():
            raise _BadRow(_first_bad(x), "a weight is NaN or infinite")
        if t.type.name in ("F32", "F16", "BF16"):
            return _bytes(gguf.quants.quantize(x, t.type)), x.size, 0, 0, 0, 0.0
        if t.type.name != tq1_25.NAME:
            try:
                return _bytes(llama_cpp.quantize_rows(x, t.type.name)), x.size, 0, 0, 0, 0.0
            except ValueError as e:
                raise ConvertError(f"{t.name} ({t.source}) cannot be stored as {t.type.name}: {e}") from e
        if self.grouping.of_blocks:
            try:
                data = self.kernels.quantize(x)
            except QuantizeError as e:
                raise _BadRow(e.row, e.cause) from None
        else:
            data = self._quantize_groups(x, None if scale is None else scale[row : row + len(x)])
        exact, vanished, sums = compare(source, self.kernels.dequantize(data))
        blocks = x.size // tq1_25.BLOCK
        return _bytes(data), x.size, blocks, exact, vanished, sums, exact < blocks and _is_ternary(x)

    def _quantize_groups(self, x: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
        """Blocks whose scale is that of a wider group: per_group, per_channel, or per_tensor with `scale` by row."""
        size = self.grouping.group_size if self.grouping.granularity == "per_group" else x.shape[-1]
        lanes, d = ternary.sparse_absmean(x, size)
        if scale is not None:
            d = scale[:, None]
        with np.errstate(over="ignore"):
            half = d.astype(np.float16)
        if (too_large := np.isinf(half).any(axis=-1)).any():
            raise _BadRow(int(too_large.argmax()), f"a mean magnitude, {d.max():.6g}, is beyond fp16 (65504)")
        return tq1_25.pack(lanes, np.repeat(half, size // tq1_25.BLOCK, axis=-1))

    def _tensor_scales(self, t: Tensor) -> np.ndarray | None:
        """per_tensor: each row's scale, that of its matrix; a stack of experts is many matrices."""
        if t.type.name != tq1_25.NAME or self.grouping.granularity != "per_tensor":
            return None
        whole = self._in_order(t, lambda row, x: x.astype(np.float32))
        rows = [ternary.sparse_absmean(x, x.shape[-1])[1][:, 0] for x in whole]
        means = np.concatenate(rows).reshape(-1, t.shape[-2]).mean(axis=1)
        return means.repeat(t.shape[-2])


def _bytes(data: np.ndarray) -> memoryview:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def compare(x: np.ndarray, y: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Weights (rows, n), float32 or float64, and what is stored of them, float32 (rows, n), which is overwritten.

    Returns how many blocks are exact, how many that are not became all zero, and error², weight², value² and
    weight · value, each summed in float64.
    """
    same = (x == y).reshape(-1, tq1_25.BLOCK).all(axis=1)
    weight = _dot(x, x)
    if same.all():
        return same.size, 0, np.array([0.0, weight, weight, weight])
    vanished = ~same & ~y.reshape(-1, tq1_25.BLOCK).any(axis=1)
    value, both = _dot(y, y), _dot(x, y)
    error = np.subtract(x, y, out=y if x.dtype == y.dtype else None)
    return int(same.sum()), int(vanished.sum()), np.array([_dot(error, error), weight, value, both])


def _is_ternary(x: np.ndarray) -> bool:
    """Whether the first rows of (rows, n) hold 0, +d and -d alone in each block, and not one 0 in each group of four."""
    blocks = np.abs(x[: 1 + 4096 // x.shape[-1]].reshape(-1, tq1_25.BLOCK))
    d = blocks.max(axis=1, keepdims=True)
    sparse = ((blocks == 0).reshape(-1, ternary.GROUP).sum(axis=1) == ternary.GROUP - ternary.KEPT) | (
        blocks.reshape(-1, ternary.GROUP) == 0
    ).all(axis=1)
    return bool(((blocks == d) | (blocks == 0)).all() and not sparse.all())


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, y, dtype=np.float64))


# ---- writing ----


@dataclasses.dataclass
class Report:
    """What a conversion did, or with dry_run or vocab_only would do or did."""

    files: list[Path]
    tensors: list[Tensor]
    notes: list[str]


def convert(model_dir: Path, options: Options = Options()) -> Report:
    """Convert a model directory. Raises ConvertError, NotBuilt; then nothing was written or replaced."""
    model_dir = Path(model_dir)
    check_input(model_dir, options)
    target = _target(model_dir, options)
    grouping = read_grouping(model_dir, options)
    if options.metadata:
        read_json(options.metadata)
    import torch

    with torch.inference_mode(), concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        if not options.vocab_only:
            check_checkpoint(model_dir)
        model = instantiate(model_dir, options, "MOSTLY_F16", _Recorder)
        plan = [] if options.vocab_only else make_plan(model, options, grouping)
        _set_tensors(model.gguf_writer, plan, options)
        add_metadata(model)
        if options.require_exact and (lossy := [t for t in plan if t.misfit and t.type.name not in ("F32", "F16", "BF16")]):
            raise ConvertError(
                f"--require-exact: {len(lossy)} tensors would be stored as {lossy[0].type.name}, with loss, since their rows are not "
                f"a multiple of {tq1_25.BLOCK}: {starred(lossy)}. Pass --fallback-type F16 as well"
            )
        if plan:
            check_blocks(model, plan, options)
            check_token_count(model, plan)
        names = model.gguf_writer.format_shard_names(target)
        files = [_not_of_checkpoint(model_dir, f) for f in names]
        if len(set(files)) < len(files):
            raise ConvertError(f"cannot write {target}: two files of the split are symbolic links to the same place")
        notes = _kept_notes(plan)
        activation = model.hparams.get("hidden_act", "silu")
        if type(model).__name__ == "BitnetModel" and activation != "silu":
            notes.append(f"config.json says that hidden_act is {activation}, llama.cpp computes BitNet with silu: its text will be wrong")
        if others := _other_splits(target, names):
            notes.append(f"beside it, of another conversion and left as they are: {', '.join(others)}")
        if options.dry_run:
            return Report(files, plan, notes)
        if sum(t.nbytes for t in plan) > EARLY:
            with _vocabulary_file(model) as file:
                _check_tokenizer(model, file, options)
        _write(model, plan, target, files, Encoder(grouping, pool, Checkpoint(model)), grouping, options)
    if vanished := [t for t in plan if t.vanished]:
        notes.append(
            f"{sum(t.vanished for t in vanished)} blocks that are not all zero became so, their mean magnitude is "
            f"below what fp16 holds (6e-8): {starred(vanished)}"
        )
    if changed := [t for t in plan if t.changed and t.type.name == tq1_25.NAME]:
        notes += [f"not the checkpoint's weights: {change}" for change in _changes(model, changed)]
    if dense := [t for t in plan if t.ternary]:
        notes.append(
            f"ternary weights that are not 3:4 sparse lose precision in {tq1_25.NAME} (relative error up to "
            f"{max(t.relative_error for t in dense):.3f}): {starred(dense)}. TQ2_0 and TQ1_0 hold such weights"
        )
    if grouping.weights == "fake_quantized" and (inexact := [t for t in plan if not t.is_exact]):
        notes.append(
            f"the checkpoint says that its weights are fake_quantized, yet these are not 3:4 sparse ternary "
            f"in {grouping} and were quantized, with loss: {starred(inexact)}. --keep keeps them"
        )
    return Report(files, plan, notes)


def _target(model_dir: Path, options: Options) -> Path:
    kind = "vocab" if options.vocab_only else tq1_25.NAME
    default = f"{name_of(model_dir)}-{kind}.gguf"
    target = options.outfile or model_dir
    if os.path.isdir(target):
        target = target / default
    name = re.sub(r"\{(ftype|outtype)\}", kind.lower(), target.name)
    return _not_of_checkpoint(model_dir, target.with_name(name.replace("{FTYPE}", kind.upper())))


def name_of(model_dir: Path) -> str:
    """The model's name by its directory: that of the repository where it is a snapshot in the Hugging Face cache."""
    model_dir = model_dir.resolve()
    repository = model_dir.parent.parent.name
    if model_dir.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return model_dir.name


def _not_of_checkpoint(model_dir: Path, target: Path) -> Path:
    """`atomic.writable`, of what is no file of the checkpoint. Raises ConvertError."""
    target = atomic.writable(target)
    if target.exists() and any(f.is_file() and f.suffix != ".gguf" and f.samefile(target) for f in model_dir.iterdir()):
        raise ConvertError(f"cannot write {target}: it is a file of the checkpoint itself. Name another --outfile")
    return target


def _other_splits(target: Path, names: list[Path]) -> list[str]:
    pattern = re.compile(re.escape(target.stem) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(f.name for f in target.parent.iterdir() if pattern.fullmatch(f.name) and f not in names)


def _kept_notes(plan: list[Tensor]) -> list[str]:
    by_why = collections.defaultdict(list)
    for t in plan:
        if t.misfit or any(word in t.why for word in ("magnitude", "overrules")):
            by_why[t.type.name, t.why].append(t)
    notes = [
        f"{'kept in' if name in ('F32', 'F16', 'BF16') else 'stored as'} {name}, {why}: {starred(tensors)}"
        for (name, why), tensors in by_why.items()
    ]
    if misfits := [t for t in plan if t.misfit]:
        sizes = ", ".join(f"{name} {_size_as(misfits, name) / 1e6:.1f} MB" for name in ("Q4_0", "Q8_0", "F16"))
        notes.append(f"sizes of these by --fallback-type: {sizes}")
    return notes


def _size_as(tensors: list[Tensor], name: str) -> int:
    """Bytes of tensors as this type, or F16 where their rows are not whole blocks of it."""
    import gguf

    def size(t: Tensor) -> int:
        block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        return 2 * t.weights if t.shape[-1] % block else t.weights // block * nbytes

    return sum(map(size, tensors))


def _set_tensors(writer, plan: list[Tensor], options: Options):
    """Give upstream's writer the plan instead of its own tensors; only now does it split, by the final sizes."""
    writer.tensors = [{} for _ in range(1 + options.no_tensor_first_split)]
    writer.split_max_tensors, writer.split_max_size = options.split_max_tensors, options.split_max_size
    for t in plan:
        writer.add_tensor_info(t.name, t.shape, np.float32, t.nbytes, raw_dtype=t.type)


class _Stream:
    """What upstream's writer takes for a tensor."""

    def __init__(self, t: Tensor, encoder: Encoder, bar):
        self.nbytes, self.t, self.encoder, self.bar = t.nbytes, t, encoder, bar

    def tofile(self, file):
        for weights, data in self.encoder.chunks(self.t):
            file.write(data)
            self.bar.update(weights)
        self.t.data = None


def _write(
    model,
    plan: list[Tensor],
    target: Path,
    files: list[Path],
    encoder: Encoder,
    grouping: Grouping,
    options: Options,
):
    needed = sum(t.nbytes for t in plan)
    with atomic.staging(target, needed) as staging:
        writer = model.gguf_writer
        by_name = {t.name: t for t in plan}
        quantized = [t for t in plan if t.type.name == tq1_25.NAME]
        if quantized:
            offset = _add_sherry(writer, quantized, grouping)
        with (
            contextlib.closing(writer),
            progress_bar(options.progress, total=sum(t.weights for t in plan), unit=" weights", unit_scale=True) as bar,
        ):
            for part in writer.tensors:
                for name, info in part.items():
                    info.tensor = _Stream(by_name[name], encoder, bar)
            staged = writer.format_shard_names(staging / target.name)
            layout = [list(part) for part in writer.tensors]
            with _telling(f"{model.dir_model}: its metadata cannot be written", but=(OSError,)):
                writer.write_header_to_file(staging / target.name)
                writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=False)
        if options.require_exact:
            _check_exact(model, quantized, grouping)
        if quantized:
            with open(staged[0], "r+b") as f:  # what was exact is known only now; the length is the same
                f.seek(offset)
                f.write(_sherry_bytes(writer, sherry_metadata(quantized, grouping)))
        for path, names in zip(staged, layout):
            atomic.reread(path, [by_name[n] for n in names])
        _check_tokenizer(model, staged[0], options)
        atomic.commit(staged, files)


def _check_exact(model, quantized: list[Tensor], grouping: Grouping):
    """Raise ConvertError where a tensor is not the checkpoint's, value by value."""
    if changed := [t for t in quantized if t.changed]:
        raise ConvertError(
            f"--require-exact: {len(changed)} of {len(quantized)} tensors do not hold the checkpoint's values: "
            f"{'; '.join(_changes(model, changed))}. Nothing was written"
        )
    if inexact := [t for t in quantized if not t.is_exact]:
        raise ConvertError(
            f"--require-exact: {len(inexact)} of {len(quantized)} tensors are not 3:4 sparse ternary with fp16 scales "
            f"in {grouping}, bit for bit (relative error up to {max(t.relative_error for t in inexact):.2g}): {starred(inexact)}. "
            "Nothing was written"
        )


def _changes(model, tensors: list[Tensor]) -> Iterator[str]:
    by_change = collections.defaultdict(list)
    for t in tensors:
        by_change[t.changed].append(t)
    for change, changed in by_change.items():
        yield f"llama.cpp's {type(model).__name__} changes {starred(changed)}: {change}"


def sherry_metadata(quantized: list[Tensor], grouping: Grouping) -> dict[str, tuple]:
    """The sherry.* keys: value, type and, of arrays, type of the elements."""
    from gguf import GGUFValueType as V

    pairs: dict[str, tuple] = {
        "sherry.version": (FORMAT_VERSION, V.UINT32),
        "sherry.method": ("sparse_absmean", V.STRING),
        "sherry.granularity": (grouping.granularity, V.STRING),
    }
    if grouping.granularity == "per_group":
        pairs["sherry.group_size"] = (grouping.group_size, V.UINT32)
    if grouping.weights:
        pairs["sherry.weights"] = (grouping.weights, V.STRING)
    return pairs | {
        "sherry.exact": (all(t.is_exact for t in quantized), V.BOOL),
        "sherry.tensor.names": ([t.name for t in quantized], V.ARRAY, V.STRING),
        "sherry.tensor.exact": ([t.is_exact for t in quantized], V.ARRAY, V.BOOL),
        "sherry.tensor.relative_error": ([t.relative_error for t in quantized], V.ARRAY, V.FLOAT32),
    }


def _sherry_bytes(writer, pairs: dict[str, tuple]) -> bytes:
    from gguf import GGUFValueType as V

    return b"".join(
        writer._pack_val(k, V.STRING, add_vtype=False) + writer._pack_val(v[0], v[1], add_vtype=True, sub_type=v[2] if len(v) > 2 else None)
        for k, v in pairs.items()
    )


def _add_sherry(writer, quantized: list[Tensor], grouping: Grouping) -> int:
    """Put the sherry.* pairs behind the general ones, with figures that `_write` corrects in place. Returns their offset in the file."""
    pairs = writer.kv_data[0]
    head = {k: v for k, v in pairs.items() if k.startswith("general.")}
    before = {k: (v.value, v.type, v.sub_type) for k, v in head.items()}
    writer.kv_data[0] = head
    for key, value in sherry_metadata(quantized, grouping).items():
        writer.add_key_value(key, *value)
    head.update({k: v for k, v in pairs.items() if k not in head})
    return 24 + len(_sherry_bytes(writer, before))  # magic, version, two counts
