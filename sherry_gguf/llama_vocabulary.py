"""llama.cpp's tokenizer through its C interface, for a process of its own, since llama.cpp ends the process on an unexpected vocabulary.

Imports only what that process needs.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .errors import CheckFailed


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to split. special: add the tokens around a text, such as BOS; parse: read names of special tokens as these tokens."""

    text: str
    special: bool = False
    parse: bool = False


class Vocabulary:
    """llama.cpp's tokenizer for a GGUF. Loads only the vocabulary.

    header, library: paths of llama.h and its library; pre: replaces the file's tokenizer.ggml.pre. Raises CheckFailed if llama.cpp refuses
    the file.
    """

    _structs: tuple[str, ...] = "llama_model_kv_override", "llama_model_params"  # of llama.h, which the functions use
    _functions = """
    void llama_log_set(void (*)(int, const char *, void *), void *);
    struct llama_model_params llama_model_default_params(void);
    struct llama_model * llama_model_load_from_file(const char *, struct llama_model_params);
    void llama_model_free(struct llama_model *);
    const struct llama_vocab * llama_model_get_vocab(const struct llama_model *);
    int32_t llama_tokenize(const struct llama_vocab *, const char *, int32_t, int32_t *, int32_t, bool, bool);
    """

    def __init__(self, gguf: str, header: str, library: str, pre: str = "", weights: bool = False):
        import cffi

        text = Path(header).read_text("utf-8")
        self._ffi = ffi = cffi.FFI()
        ffi.cdef("".join(_struct(text, name) for name in self._structs) + self._functions)
        self._lib = lib = ffi.dlopen(library)
        self._errors: list[str] = []

        @ffi.callback("void(int, const char *, void *)")
        def keep(level, text, _):
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                self._errors.append(ffi.string(text).decode(errors="replace").strip())

        self._keep = keep
        lib.llama_log_set(keep, ffi.NULL)
        params = lib.llama_model_default_params()
        params.vocab_only = not weights
        if pre:
            overrides = ffi.new("struct llama_model_kv_override[2]")  # the last has no key
            overrides[0].tag, overrides[0].key, overrides[0].val_str = 3, b"tokenizer.ggml.pre", pre.encode()
            params.kv_overrides = self._overrides = overrides
        self._model = lib.llama_model_load_from_file(os.fsencode(gguf), params)
        if self._model == ffi.NULL:
            raise CheckFailed(f"llama.cpp refuses the {'model' if weights else 'vocabulary'}: {self._why()}")
        self._vocab = lib.llama_model_get_vocab(self._model)

    def _why(self) -> str:
        return "; ".join(dict.fromkeys(self._errors)) or "it does not say why"

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


def _struct(header: str, name: str) -> str:
    """A structure as llama.h declares it, with int for enums, int32_t for ids, and void * for other types of the header."""
    found = re.search(rf"struct {name} \{{\n.*?\n    \}}", header, re.S)
    assert found, name
    body = re.sub(r"\benum \w+", "int", re.sub(r"//.*", "", found[0]))
    body = re.sub(r"\bllama_(?:token|pos|seq_id)\b", "int32_t", body)
    return re.sub(r"\b(?:ggml_backend_dev_t|llama_progress_callback|ggml_\w+_callback)\b", "void *", body) + ";"


def serve() -> None:
    """Answer a request on standard input: two lines of JSON, {"gguf", "header", "library", "pres"} and, perhaps later, the texts.

    Prints a line for each of "pres": the token ids of each text, or {"error"}.
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
