"""The file's metadata: upstream's, the tokenizer and its check, and the sherry.* keys."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import gguf_type, tq1_25_64
from ..errors import ConvertError
from . import vocabulary
from .checkpoint import Grouping, name_of
from .options import Options
from .plan import EMBEDDINGS, OUTPUT
from .tensor import Tensor
from .upstream import convert_errors

FORMAT_VERSION = 1  # of the sherry.* keys


def add_metadata(model: Any, plan: list[Tensor]):
    """Let upstream fill in hyperparameters and tokenizer. Raises ConvertError."""
    file_types = gguf_type.register().LlamaFileType
    only_64 = {t.kind for t in plan if t.kind} == {tq1_25_64.TYPE}
    model.ftype = file_types.MOSTLY_TQ1_25_64 if only_64 else file_types.MOSTLY_TQ1_25
    with contextlib.ExitStack() as stack:
        stack.enter_context(convert_errors(f"{model.dir_model}: its metadata or tokenizer cannot be converted"))
        if (name := name_of(model.dir_model)) != model.dir_model.resolve().name:
            # Upstream derives name, size label and more from the directory's name, which in a cache is a commit's hash.
            link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / name
            link.symlink_to(model.dir_model.resolve(), target_is_directory=True)
            model.dir_model_card = link
        model.prepare_metadata(vocab_only=False)
    for key, v in model.gguf_writer.kv_data[0].items():
        if key.startswith("general."):  # --metadata sets these
            with convert_errors(f"{key} cannot be {v.value!r}"):
                model.gguf_writer._pack_val(v.value, v.type, add_vtype=True, sub_type=v.sub_type)
    if model.unknown_pre:
        with _vocabulary_file(model) as file:
            raise ConvertError(vocabulary.unknown_pre(file, model.dir_model))


def write_header(writer: Any, model: Any, path: Path):
    """Write the file's header and metadata. Raises ConvertError, OSError."""
    with convert_errors(f"{model.dir_model}: its metadata cannot be written", but=(OSError,)):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()


# ---- tokenizer ----


@contextlib.contextmanager
def _vocabulary_file(model: Any) -> Iterator[Path]:
    """A temporary GGUF of the metadata alone, from which llama.cpp loads a vocabulary."""
    import gguf

    with tempfile.TemporaryDirectory() as directory:
        writer = gguf.GGUFWriter(None, model.gguf_writer.arch)
        writer.kv_data = [dict(model.gguf_writer.kv_data[0])]
        with contextlib.closing(writer):
            write_header(writer, model, file := Path(directory) / "vocabulary.gguf")
            writer.write_ti_data_to_file()
        yield file


def tokenizer_problem(model: Any, file: Path, options: Options) -> str:
    """How a file's tokenizer differs from the checkpoint's, or "". Raises NotBuilt."""
    kind = getattr(model.gguf_writer.kv_data[0].get("tokenizer.ggml.model"), "value", "none")
    if options.no_tokenizer_check or kind in ("none", "no_vocab"):
        return ""
    return vocabulary.problem(file, options.target_model_dir or model.dir_model, kind)


def check_tokenizer(model: Any, options: Options, file: Path | None = None):
    """Raise ConvertError if the tokenizer of a file, or of the metadata so far, differs from the checkpoint's."""
    with contextlib.ExitStack() as stack:
        if problem := tokenizer_problem(model, file or stack.enter_context(_vocabulary_file(model)), options):
            raise ConvertError(f"{model.dir_model}: {problem}. Nothing was written")


def check_token_count(model: Any, plan: list[Tensor]):
    """Raise ConvertError if embeddings or output have more or fewer tokens than the tokenizer. To be called after `add_metadata`."""
    tokens = model.gguf_writer.kv_data[0].get("tokenizer.ggml.tokens")
    # A draft model's output may have fewer tokens, which d2t lists.
    names = EMBEDDINGS[:1] if any(t.name.startswith("d2t") for t in plan) else (EMBEDDINGS[0], OUTPUT)
    for t in plan if tokens else ():
        if t.name in names and t.shape[0] != len(tokens.value):
            raise ConvertError(
                f"{model.dir_model}: {t.source} has {t.shape[0]} rows, the vocabulary that config.json and the tokenizer give has "
                f"{len(tokens.value)} tokens (vocab_size is {model.hparams.get('vocab_size')}): llama.cpp would refuse the file. If the "
                f"rows belong to the model, set vocab_size to {t.shape[0]}"
            )


# ---- sherry.* ----


def sherry_metadata(quantized: list[Tensor], grouping: Grouping) -> dict[str, tuple]:
    """The sherry.* keys: value, type and, for arrays, the elements' type."""
    from gguf import GGUFValueType as V

    pairs: dict[str, tuple] = {
        "sherry.version": (FORMAT_VERSION, V.UINT32),
        "sherry.method": ("sparse_absmean", V.STRING),
        "sherry.granularity": (grouping.granularity, V.STRING),
    }
    groups = [t.group for t in quantized]
    if grouping.granularity == "per_group":
        pairs["sherry.group_size"] = (grouping.group_size if len(set(groups)) > 1 else groups[0], V.UINT32)
    if grouping.weights:
        pairs["sherry.weights"] = (grouping.weights, V.STRING)
    pairs |= {
        "sherry.exact": (all(t.is_exact for t in quantized), V.BOOL),
        "sherry.tensor.names": ([t.name for t in quantized], V.ARRAY, V.STRING),
        "sherry.tensor.exact": ([t.is_exact for t in quantized], V.ARRAY, V.BOOL),
        "sherry.tensor.relative_error": ([t.relative_error for t in quantized], V.ARRAY, V.FLOAT32),
    }
    if grouping.granularity == "per_group" and len(set(groups)) > 1:
        pairs["sherry.tensor.group_size"] = (groups, V.ARRAY, V.UINT32)
    return pairs


def add_sherry(writer: Any, quantized: list[Tensor], grouping: Grouping) -> int:
    """Insert the sherry.* keys after the general.* ones; return their offset in the file, where `sherry_bytes` corrects them later."""
    pairs = writer.kv_data[0]
    head = {k: v for k, v in pairs.items() if k.startswith("general.")}
    before = {k: (v.value, v.type, v.sub_type) for k, v in head.items()}
    writer.kv_data[0] = head
    for key, value in sherry_metadata(quantized, grouping).items():
        writer.add_key_value(key, *value)
    head.update({k: v for k, v in pairs.items() if k not in head})
    return 24 + len(_packed(writer, before))  # magic, version, two counts


def sherry_bytes(writer: Any, quantized: list[Tensor], grouping: Grouping) -> bytes:
    """The sherry.* keys as they stand in the file. Their length does not depend on what is exact."""
    return _packed(writer, sherry_metadata(quantized, grouping))


def _packed(writer: Any, pairs: dict[str, tuple]) -> bytes:
    string = gguf_type.register().GGUFValueType.STRING
    return b"".join(
        writer._pack_val(k, string, add_vtype=False) + writer._pack_val(v[0], v[1], add_vtype=True, sub_type=v[2] if len(v) > 2 else None)
        for k, v in pairs.items()
    )
