"""The pinned llama.cpp's conversion classes: how they are loaded, told what we want, and listened to.

They read the checkpoint, rename and reshape tensors, and collect metadata and tokenizer. BitNet is the only one that is known here by
name, and `plan` has one more architecture.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import gguf_type, llama_cpp
from ..errors import ConvertError, NotBuilt, VocabularyError
from . import packed, vocabulary
from .options import Options
from .vocabulary import Vocabulary


@functools.cache
def upstream() -> Any:
    """Import the pinned llama.cpp's `conversion` package, and the `gguf` package that belongs to it.

    Raises NotBuilt, and ConvertError if this process has already imported another gguf.
    """
    source = llama_cpp.source_dir()
    gguf_py = source / "gguf-py"
    if (loaded := sys.modules.get("gguf")) and Path(str(loaded.__file__)).resolve().parent.parent != gguf_py.resolve():
        raise ConvertError(
            f"another gguf package is already imported, from {loaded.__file__}: llama.cpp's conversion code needs its own, in {gguf_py}. "
            "Convert and verify in a process of their own"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the model directory
    sys.path[:0] = [str(gguf_py), str(source)]
    import conversion

    gguf_type.register()
    return conversion


# ---- errors ----


@contextlib.contextmanager
def convert_errors(what: str, but: tuple[type[BaseException], ...] = (), hint: str = "") -> Iterator[None]:
    """Turn exceptions other than `but` into ConvertErrors that begin with `what`.

    Upstream's classes fail in every way there is on a checkpoint that they do not expect. `hint` is added to errors without a text.
    """
    try:
        yield
    except VocabularyError as e:
        raise ConvertError(str(e)) from e
    except Exception as e:
        if isinstance(e, (ConvertError, NotBuilt, *but)):
            raise
        text = str(e).strip()
        if text and not isinstance(e, AssertionError):
            plain = isinstance(e, (ValueError, ImportError, OSError))
            raise ConvertError(f"{what}: {text if plain else f'{type(e).__name__}: {text}'}") from e
        raise ConvertError(f"{what}: {' '.join(filter(None, [type(e).__name__, text]))} {_origin(e)}{hint}") from e


def _origin(e: BaseException) -> str:
    """Where an exception was raised: the line, and the tensor or token that upstream was working on."""
    place = traceback.extract_tb(e.__traceback__)[-1]
    names, trace = [], e.__traceback__
    while trace:
        for name in ("name", "new_name", "token"):
            if isinstance(value := trace.tb_frame.f_locals.get(name), str):
                names.append(f"{'token' if name == 'token' else 'tensor'} {value}")
        trace = trace.tb_next
    about = f", {names[-1]}" if names else ""
    return f"at {Path(place.filename).name}, line {place.lineno} ({place.line}){about}"


# ---- lazy tensors ----


def evaluate(tensor: Any) -> Any:
    """A lazy tensor's value. Unlike upstream's `to_eager`, this does not keep every intermediate result as long as the tensor lives."""
    import gguf

    if not isinstance(tensor, gguf.LazyBase):
        return tensor
    if tensor._data is not None:
        return tensor._data
    assert tensor._func
    return tensor._func(*gguf.LazyBase._recurse_apply(tensor._args, evaluate), **tensor._kwargs)


def is_cast(tensor: Any, float32: Any) -> bool:
    """Whether a lazy tensor is another one of the same shape, as torch.float32 (which is given) or as a NumPy array."""
    gguf = gguf_type.register()
    args = tensor._args
    if not args or not isinstance(args[0], gguf.LazyBase) or tuple(args[0].shape) != tuple(tensor.shape):
        return False
    to_numpy = isinstance(tensor, gguf.LazyNumpyTensor) and not isinstance(args[0], gguf.LazyNumpyTensor)
    return not tensor._kwargs and (len(args) == 1 and to_numpy or len(args) == 2 and args[1] is float32)


# ---- models ----


class Recorder(Vocabulary):
    """Mixed in before upstream's class: records what is done with each tensor, and keeps all of them lazy.

    Attributes:
        asked: name in the GGUF to (name in the checkpoint, upstream's answer to `tensor_force_quant`).
        given: name in the GGUF to the checkpoint's names that `modify_tensors` was given for it.
        wide: name in the GGUF to the float64 tensor that it is cast from.
        decoded: the checkpoint's names of tensors that upstream or `packed` dequantizes.
    """

    asked: dict[str, tuple[str, Any]]
    given: dict[str, tuple[str, ...]]
    wide: dict[str, Any]
    decoded: set[str]

    def __init__(self, *args, **kwargs):
        self.asked, self.given, self.wide, self.decoded, self._waiting = {}, {}, {}, set(), []
        super().__init__(*args, **kwargs)

    def tensor_force_quant(self, name, new_name, bid, n_dims):
        # The answer stays upstream's, whose own exceptions come first; make_plan chooses the type afterwards.
        forced = super().tensor_force_quant(name, new_name, bid, n_dims)
        self.asked[new_name] = name, forced
        return forced

    def modify_tensors(self, data_torch, name, bid):
        import torch

        lazy = upstream().LazyTorchTensor
        # float64 passes through upstream's class and is cast afterwards, so that the values that the cast changes are seen.
        # Integers need no such care: those that float32 cannot hold are beyond fp16 too.
        if isinstance(data_torch, lazy) and is_cast(data_torch, torch.float32):
            if data_torch._args[0].dtype is torch.float64:
                data_torch = data_torch._args[0]
        self._waiting.append(name)
        yielded = False
        for new_name, data in super().modify_tensors(data_torch, name, bid):
            yielded = True
            self.given[new_name] = tuple(self._waiting)
            if type(data) is torch.Tensor:
                data = lazy.from_eager(data)  # an eager one would be rounded to F16 at once
            if data.dtype is torch.float64:
                self.wide[new_name] = data
                data = data.to(torch.float32)
            yield new_name, data
        if yielded:  # else upstream keeps the tensor to join it with later ones
            self._waiting.clear()

    def dequant_model(self):
        # For packed ternary weights upstream's own code fails on lazy tensors, and inverts every scale.
        packed.unpack_sherry(self)
        packed.unpack_bitnet(self)
        before = dict(self.model_tensors)
        super().dequant_model()
        self.decoded |= {name for name, make in self.model_tensors.items() if before.get(name) is not make}


# Methods, by upstream's class, that leave weights as the checkpoint has them: BitNet's class would quantize each matrix again, with one
# scale.
AS_STORED: dict[str, dict[str, Callable]] = {"BitnetModel": {"weight_quant": lambda self, weight: weight}}


def instantiate(model_dir: Path, options: Options, ftype: str) -> Any:
    """Upstream's model object for a directory, with a Recorder mixed in. Raises ConvertError."""
    conversion = upstream()
    import gguf

    cls, arch = _model_class(hparams(model_dir), model_dir)
    if (options.mtp or options.no_nextn) and not cls.supports_mtp_export:
        raise ConvertError(f"--mtp and --no-nextn are not for {arch}: it has no multi-token prediction head")
    kwargs: dict[str, Any] = dict.fromkeys(options.flags, True)
    if options.target_model_dir:
        kwargs["target_model_dir"] = options.target_model_dir

    def build(cls: Any) -> Any:
        attributes = AS_STORED.get(cls.__name__, {}) | {
            "model_arch": cls.model_arch,
            "tokenizer_pre": _tokenizer_pre(options.tokenizer_pre),
            "mtp_only": options.mtp,
            "no_mtp": options.no_nextn,
        }
        return type(cls.__name__, (Recorder, cls), attributes)(
            model_dir,
            getattr(gguf.LlamaFileType, ftype),
            Path("model.gguf"),
            metadata_override=options.metadata,
            model_name=options.model_name,
            small_first_shard=options.no_tensor_first_split,
            **kwargs,
        )

    hint = ". If the checkpoint is without its multi-token prediction block, pass --no-nextn"
    with convert_errors(f"{arch} in {model_dir}", hint=hint * (cls.supports_mtp_export and not options.no_nextn)):
        model = build(cls)
        if isinstance(inner := vars(model).get("impl"), conversion.ModelBase):  # a class that only picks another
            model = build(type(inner))
    if type(model).__name__ == "BitnetModel" and any("sub_norm" in name for name in model.model_tensors):
        raise ConvertError(
            f"{model_dir} is a BitNet b1.58 in transformers' form (with ffn_sub_norm and a squared ReLU): the pinned llama.cpp runs only "
            "the first BitNet models, which have other tensor names and SiLU"
        )
    if type(model).write is not conversion.ModelBase.write:
        raise ConvertError(f"{arch}: llama.cpp stores this architecture in several files; that is not supported here")
    return model


def activation_note(model: Any) -> str:
    """A warning if llama.cpp computes the model with another activation than config.json names, or ""."""
    activation = model.hparams.get("hidden_act", "silu")
    if type(model).__name__ != "BitnetModel" or activation == "silu":
        return ""
    return f"config.json says that hidden_act is {activation}, llama.cpp computes BitNet with silu: its text will be wrong"


def collect(model: Any) -> dict[str, Any]:
    """Upstream's tensors of a model: name to TensorInfo, in the file's order. Reads no values yet."""
    with convert_errors(f"{model.dir_model}: llama.cpp's conversion, {type(model).__name__}, failed"):
        model.prepare_tensors()
    return {name: info for part in model.gguf_writer.tensors for name, info in part.items()}


# ---- config.json ----


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConvertError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConvertError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise ConvertError(f"{path} does not hold a JSON object")
    return value


def hparams(model_dir: Path) -> dict[str, Any]:
    """The model's configuration as upstream loads it. Raises ConvertError if the directory is not a model's."""
    base = upstream().ModelBase
    config = model_dir / "config.json"
    if not config.is_file():
        if not (guess := base.load_hparams_guess(model_dir)):
            raise ConvertError(f"{model_dir} is not a model directory: it has no config.json")
        return guess
    names = read_json(config).get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ConvertError(f'{config}: "architectures" is {names!r}, not a list of names')
    with convert_errors(str(config)):
        return base.load_hparams(model_dir, False)


def _model_class(hparams: dict[str, Any], model_dir: Path) -> tuple[Any, str]:
    conversion = upstream()
    config = model_dir / "config.json"
    try:
        with convert_errors(str(config), but=(ValueError,)):
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
