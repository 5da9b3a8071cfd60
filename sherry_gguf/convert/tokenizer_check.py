"""Proves that llama.cpp splits text into the same tokens as transformers.

A GGUF tells llama.cpp how to split text. If it tells it wrongly there is no error, but the model gets tokens that it was not trained on.
So both split sample texts: transformers with the tokenizer of the model directory, and the built llama.cpp with the finished GGUF, in a
process of its own (`llama_vocabulary`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import llama_cpp
from ..errors import CheckFailed
from ..llama_vocabulary import Text

SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and they're sure it'll do so again; "
    "I'd say it's 9:45, isn't it? Will-o'the-wisp o'er y'all'd've",
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
_SPECIAL = 128  # special tokens that are tried, the first and the last ones
_WITHIN = 32  # of these, how many are tried within a text
_SHOWN = 12  # tokens of a text that a message shows


@dataclasses.dataclass
class Difference:
    """A text that both split differently, into these token ids."""

    text: Text
    wanted: list[int]  # transformers'
    found: list[int]  # llama.cpp's


# ---- transformers ----


def load_tokenizer(model_dir: Path):
    """transformers' tokenizer of a model directory, from its tokenizer.json if it has one. Raises CheckFailed."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        fast = (model_dir / "tokenizer.json").is_file()
        return transformers.AutoTokenizer.from_pretrained(model_dir, use_fast=fast, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # anything, with so many tokenizers
        cause = str(e).strip().splitlines() or [""]
        if "trust_remote_code" in str(e):
            raise CheckFailed(f"the tokenizer of {model_dir} is Python code in that directory, which is not run to prove it") from e
        raise CheckFailed(f"transformers cannot load the tokenizer of {model_dir}: {type(e).__name__}: {cause[0]}") from e
    finally:
        transformers.logging.set_verbosity(verbosity)


def texts(tokenizer) -> list[Text]:
    """The texts to split with this tokenizer: the sample, and tokens added to its vocabulary, alone and within a text."""
    added = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if str(t).strip()]
    if len(added) > _SPECIAL:
        added = added[: _SPECIAL // 2] + added[-_SPECIAL // 2 :]
    wanted = [Text(t) for t in SAMPLE] + [Text(SAMPLE[0], special=True)] + [Text(t, parse=True) for t in added]
    if "▁" not in tokenizer.convert_ids_to_tokens(split_all(tokenizer, [Text("a b")])[0])[-1]:
        # not sentencepiece, whose tokenizers put spaces around such tokens in ways of their own
        wanted += [Text(text, parse=True) for t in added[:_WITHIN] for text in (f"x{t}y", f"a {t} b")]
    return wanted


def split_all(tokenizer, wanted: list[Text]) -> list[list[int]]:
    """Token ids of each text by transformers. Raises CheckFailed."""
    try:
        return [tokenizer.encode(t.text, add_special_tokens=t.special, split_special_tokens=not t.parse) for t in wanted]
    except Exception as e:
        raise CheckFailed(f"transformers cannot split a text: {type(e).__name__}: {e}") from e


def same(tokenizer, text: Text, wanted: list[int], found: list[int]) -> bool:
    """Whether both splits are the same. The space that transformers puts before a text may be missing before a special token."""
    if wanted == found or not text.parse:
        return wanted == found
    return [i for i in wanted if tokenizer.convert_ids_to_tokens(i) != "▁"] == found


# ---- llama.cpp ----


class Splitting:
    """llama.cpp's tokenizer for a GGUF, in a process that starts to load it at once and ends with the context.

    pres: names that replace the file's tokenizer.ggml.pre, one after the other. Raises NotBuilt.
    """

    def __init__(self, gguf: Path, pres: tuple[str, ...] = ("",)):
        self._pres = pres
        header = llama_cpp.source_dir() / "include" / "llama.h"
        self._request = {"gguf": str(gguf), "library": str(llama_cpp.library("llama")), "header": str(header)}
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
        # The modules of this process, but none from the current directory, which may be a checkpoint.
        path = [str(Path(__file__).resolve().parents[2]), *filter(os.path.isabs, sys.path)]
        code = f"import sys; sys.path[:] = {path!r}; from sherry_gguf.llama_vocabulary import serve; serve()"
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        env = os.environ | {"GGML_NO_BACKTRACE": "1"}
        self._process: Any = subprocess.Popen([sys.executable, "-I", "-c", code], text=True, env=env, **pipes)
        self._write(self._request | {"pres": pres})

    def _write(self, value: Any):
        with contextlib.suppress(BrokenPipeError):  # `answers` says why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def answers(self, wanted: list[Text]) -> Iterator[list[list[int]] | CheckFailed]:
        """For each pre: the token ids of each text, or why there are none."""
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
    """The texts that a GGUF's tokenizer and transformers' tokenizer split differently. Raises CheckFailed."""
    wanted = texts(tokenizer)
    mine = split_all(tokenizer, wanted)
    (found,) = splitting.answers(wanted)
    if isinstance(found, CheckFailed):
        raise found
    return [Difference(*row) for row in zip(wanted, mine, found) if not same(tokenizer, *row)]


def matching(gguf: Path, tokenizer, pres: list[str], most: int) -> list[str]:
    """The first of `pres`, at most `most`, with which llama.cpp splits every text as transformers does.

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
    """A difference in words: the text, and both splits from their first difference on."""
    wanted, found = difference.wanted, difference.found
    at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))

    def shown(ids: list[int]) -> str:
        rest = ids[at : at + _SHOWN]
        named = " ".join(f"{i}={piece!r}" for i, piece in zip(rest, tokenizer.convert_ids_to_tokens(rest)))
        return f"{len(ids)} tokens, from number {at + 1} on {named or 'none'}{' ...' * (len(ids) > at + _SHOWN)}"

    return f"{difference.text.text!r}: transformers {shown(wanted)}; llama.cpp {shown(found)}"
