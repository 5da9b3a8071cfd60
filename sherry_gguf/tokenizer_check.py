"""Proves that llama.cpp splits text into the tokens that transformers splits it into.

The converter's file says how llama.cpp is to split text, and may say it wrongly without any error: the model then gets
tokens that it was not trained on. So a sample of texts is split by both: by transformers' tokenizer of the model
directory, and by the built llama.cpp from the finished GGUF, in a process of its own, since llama.cpp ends the process
on vocabularies that it does not expect.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CheckFailed

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and they're sure it'll do so again; I'd say it's 9:45, isn't it? Will-o'the-wisp o'er y'all'd've",
    'def read(self, size=-1):\n    """Read up to size bytes."""\n\tif not self._file:\n        return b""\n'
    "    return self._file.read(size)  # [x] != 0x1F && y[i++] <= 3;\n",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 2026-11-28 192.168.0.1 x86_64 10000th",
    "a  b   c    d\te\t\tf\n\ng \n h\n\n\n    i \t j\r\nk",
    "HelloWorld HTTPServer getElementById snake_case CamelCase WE'RE I'LL don'T e.g. (x)...!? $9 ~/.cache #1 @you",
    "Ça coûte 5 € à l'école; Größe, naïve, señor, Łódź, Ærøskøbing. ¿Qué?",
    "Γειά σου Κόσμε. Привет, мир! Їжак, Ђорђе",
    "مرحبا بالعالم ١٢٣ שלום עולם नमस्ते दुनिया สวัสดีชาวโลก",
    "你好，世界。第１２３回 こんにちは世界 カタカナ 안녕하세요 세계",
    "🦙 👩‍👩‍👧 🇩🇪 ✓ → ∀x∈ℝ: ⌈x⌉ ½ ™ • “quoted” – ‘so’ …",
)
_WITHIN = 32  # of them, that are looked at within a text
_SPECIAL = 128  # special tokens that are looked at, the first and the last
_SHOWN = 12  # tokens that a message shows of a text


@dataclasses.dataclass(frozen=True)
class Text:
    """What is split: special, with the tokens that are put around a text; parse, names of special tokens are these tokens."""

    text: str
    special: bool = False
    parse: bool = False


@dataclasses.dataclass
class Difference:
    """A text that both split, and not alike: token ids."""

    text: Text
    wanted: list[int]  # transformers'
    found: list[int]  # llama.cpp's


# ---- transformers ----


def load_tokenizer(model_dir: Path):
    """transformers' tokenizer of a model directory, by its tokenizer.json where there is one. Raises CheckFailed."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        fast = (model_dir / "tokenizer.json").is_file()
        return transformers.AutoTokenizer.from_pretrained(model_dir, use_fast=fast, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # there are as many ways as there are tokenizers
        cause = str(e).strip().splitlines() or [""]
        if "trust_remote_code" in str(e):
            raise CheckFailed(f"the tokenizer of {model_dir} is Python code in that directory, which is not run to prove it") from e
        raise CheckFailed(f"transformers cannot load the tokenizer of {model_dir}: {type(e).__name__}: {cause[0]}") from e
    finally:
        transformers.logging.set_verbosity(verbosity)


def texts(tokenizer) -> list[Text]:
    """What is split with this tokenizer: the sample, and the tokens that it has beside its vocabulary, alone and within a text."""
    added = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if str(t).strip()]
    if len(added) > _SPECIAL:
        added = added[: _SPECIAL // 2] + added[-_SPECIAL // 2 :]
    wanted = [Text(t) for t in SAMPLE] + [Text(SAMPLE[0], special=True)] + [Text(t, parse=True) for t in added]
    if "▁" not in tokenizer.convert_ids_to_tokens(split_all(tokenizer, [Text("a b")])[0])[-1]:
        # Around such a token sentencepiece's tokenizers put spaces in ways of their own.
        wanted += [Text(text, parse=True) for t in added[:_WITHIN] for text in (f"x{t}y", f"a {t} b")]
    return wanted


def split_all(tokenizer, wanted: list[Text]) -> list[list[int]]:
    """Token ids of each text by transformers. Raises CheckFailed."""
    try:
        return [tokenizer.encode(t.text, add_special_tokens=t.special, split_special_tokens=not t.parse) for t in wanted]
    except Exception as e:  # of code that is not ours
        raise CheckFailed(f"transformers cannot split a text: {type(e).__name__}: {e}") from e


def same(tokenizer, text: Text, wanted: list[int], found: list[int]) -> bool:
    """Whether both splits are the same; a space that is put in front of a text may be missing before a special token."""
    if wanted == found or not text.parse:
        return wanted == found
    return [i for i in wanted if tokenizer.convert_ids_to_tokens(i) != "▁"] == found


# ---- llama.cpp ----


class Vocabulary:
    """llama.cpp's tokenizer for a GGUF; only the vocabulary is loaded.

    header, library: llama.h, and the library that belongs to it. pre: overrules the file's tokenizer.ggml.pre. Raises
    CheckFailed where llama.cpp refuses the file.
    """

    def __init__(self, gguf: str, header: str, library: str, pre: str = ""):
        import cffi

        text = Path(header).read_text("utf-8")
        self._ffi = ffi = cffi.FFI()
        ffi.cdef(_struct(text, "llama_model_kv_override") + _struct(text, "llama_model_params") + _FUNCTIONS)
        self._lib = lib = ffi.dlopen(library)
        log: list[str] = []

        @ffi.callback("void(int, const char *, void *)")
        def keep(level, text, _):
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                log.append(ffi.string(text).decode(errors="replace").strip())

        self._keep = keep
        lib.llama_log_set(keep, ffi.NULL)
        params = lib.llama_model_default_params()
        params.vocab_only = True
        if pre:
            overrides = ffi.new("struct llama_model_kv_override[2]")  # the last has no key
            overrides[0].tag, overrides[0].key, overrides[0].val_str = 3, b"tokenizer.ggml.pre", pre.encode()
            params.kv_overrides = self._overrides = overrides
        self._model = lib.llama_model_load_from_file(os.fsencode(gguf), params)
        if self._model == ffi.NULL:
            raise CheckFailed(f"llama.cpp refuses the vocabulary: {'; '.join(log) or 'it does not say why'}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def close(self):
        self._lib.llama_model_free(self._model)

    def split(self, text: Text) -> list[int]:
        """Token ids by llama.cpp."""
        data = text.text.encode()
        most = len(data) + 16
        ids = self._ffi.new("int32_t[]", most)
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, most, text.special, text.parse)
        if n < 0:
            raise CheckFailed(f"llama.cpp cannot split {text.text!r}")
        return list(ids[0:n])


_FUNCTIONS = """
void llama_log_set(void (*)(int, const char *, void *), void *);
struct llama_model_params llama_model_default_params(void);
struct llama_model * llama_model_load_from_file(const char *, struct llama_model_params);
void llama_model_free(struct llama_model *);
const struct llama_vocab * llama_model_get_vocab(const struct llama_model *);
int32_t llama_tokenize(const struct llama_vocab *, const char *, int32_t, int32_t *, int32_t, bool, bool);
"""


def _struct(header: str, name: str) -> str:
    """A structure as llama.h declares it, with enums as int and what else the header names as void *."""
    body = re.search(rf"struct {name} \{{\n.*?\n    \}};", header, re.S)[0]
    body = re.sub(r"//.*", "", body)
    body = re.sub(r"\benum \w+", "int", body)
    return re.sub(r"\b(?:ggml_backend_dev_t|llama_progress_callback)\b", "void *", body)


def serve() -> None:
    """Answer a request on standard input, lines of JSON: {"gguf", "header", "library", "pres"}, and the texts, which may follow later.

    For each of "pres" there is a line: the token ids of each text, or {"error"}.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is not an answer
    request = json.loads(sys.stdin.readline())
    wanted: list[Text] | None = None
    for pre in request["pres"]:
        try:
            vocabulary = Vocabulary(request["gguf"], request["header"], request["library"], pre)
            wanted = wanted or [Text(*text) for text in json.loads(sys.stdin.readline())]
            answer: Any = [vocabulary.split(text) for text in wanted]
            vocabulary.close()
        except CheckFailed as e:
            answer = {"error": str(e)}
        except Exception as e:  # no library, or another llama.h
            answer = {"error": f"llama.cpp's tokenizer cannot be run: {type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


class Splitting:
    """llama.cpp's tokenizer of a GGUF in a process of its own, which loads it at once.

    pres: names that overrule the file's tokenizer.ggml.pre, each in turn. A context manager, which ends the process. Raises
    NotBuilt.
    """

    def __init__(self, gguf: Path, pres: tuple[str, ...] = ("",)):
        from . import llama_cpp

        self._pres = pres
        self._request = {
            "gguf": str(gguf),
            "library": str(llama_cpp.library("llama")),
            "header": str(llama_cpp.source_dir() / "include" / "llama.h"),
        }
        self._start(pres)

    def __enter__(self) -> Splitting:
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _start(self, pres: tuple[str, ...]):
        # The modules that this process has, and none of the current directory, which may be a checkpoint.
        path = [str(Path(__file__).resolve().parent.parent), *filter(os.path.isabs, sys.path)]
        code = f"import sys; sys.path[:] = {path!r}; from sherry_gguf.tokenizer_check import serve; serve()"
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said,
                                         text=True, env=os.environ | {"GGML_NO_BACKTRACE": "1"})  # fmt: skip
        self._write(self._request | {"pres": pres})

    def _write(self, value: Any):
        with contextlib.suppress(BrokenPipeError):  # `answers` says why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def answers(self, wanted: list[Text]) -> Iterator[list[list[int]] | CheckFailed]:
        """For each pre, in turn, the token ids of each text, or why there are none."""
        count = 0
        while count < len(self._pres):
            self._write([dataclasses.astuple(text) for text in wanted])
            for line in self._process.stdout:
                answer = json.loads(line)
                count += 1
                yield CheckFailed(answer["error"]) if isinstance(answer, dict) else answer
            if count < len(self._pres):  # llama.cpp has ended the process
                self._process.wait()
                self._said.seek(0)
                said = [line.strip() for line in self._said if line.strip()] or [f"exit code {self._process.returncode}"]
                cause = [line for line in said if "GGML_ASSERT" in line or "what():" in line] or said[-1:]
                count += 1
                yield CheckFailed(f"llama.cpp ended on the vocabulary: {cause[0]}")
                self.__exit__()
                self._start(self._pres[count:])


# ---- both ----


def compare(splitting: Splitting, tokenizer) -> list[Difference]:
    """The texts that a GGUF's tokenizer splits into other tokens than transformers' tokenizer. Raises CheckFailed."""
    wanted = texts(tokenizer)
    mine = split_all(tokenizer, wanted)
    (found,) = splitting.answers(wanted)
    if isinstance(found, CheckFailed):
        raise found
    return [Difference(*row) for row in zip(wanted, mine, found) if not same(tokenizer, *row)]


def matching(gguf: Path, tokenizer, pres: list[str], most: int) -> list[str]:
    """The first values of tokenizer.ggml.pre, `most` at most, with which llama.cpp would split every text as transformers does.

    Raises CheckFailed, NotBuilt.
    """
    wanted = texts(tokenizer)
    mine = split_all(tokenizer, wanted)
    found: list[str] = []
    with Splitting(gguf, tuple(pres)) as splitting:
        for pre, answer in zip(pres, splitting.answers(wanted)):
            if isinstance(answer, list) and all(map(functools.partial(same, tokenizer), wanted, mine, answer)):
                found.append(pre)
                if len(found) == most:
                    break
    return found


def describe(difference: Difference, tokenizer) -> str:
    """A difference in words: the text, and both splits from where they begin to differ."""
    wanted, found = difference.wanted, difference.found
    at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))

    def shown(ids: list[int]) -> str:
        rest = ids[at : at + _SHOWN]
        named = " ".join(f"{i}={piece!r}" for i, piece in zip(rest, tokenizer.convert_ids_to_tokens(rest)))
        return f"{len(ids)} tokens, from number {at + 1} on {named or 'none'}{' ...' * (len(ids) > at + _SHOWN)}"

    return f"{difference.text.text!r}: transformers {shown(wanted)}; llama.cpp {shown(found)}"
