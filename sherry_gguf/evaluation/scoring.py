"""A GGUF in a process of its own that splits text and scores tokens: `llama_scorer`."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import llama_cpp
from ..errors import Stop
from .tools import child, failure

PACKAGES = Path(__file__).resolve().parents[2]


class Scorer:
    """A ready process.

    Attributes:
        process: the process.
        length: most tokens in a request.
        trained: the context length of the model's training.
        vocabulary: tokens in the vocabulary.
        bos, eos: ids of these tokens, or None.
        bos_text, eos_text: text of these tokens, or "".
    """

    vocabulary: int
    trained: int
    length: int
    bos: int | None
    eos: int | None
    bos_text: str
    eos_text: str

    def __init__(self, process: subprocess.Popen[str], said: Any, request: dict[str, Any]):
        self.process, self._said = process, said
        vars(self).update(self._ask(request))

    def tokenize(self, texts: Sequence[str], special: bool, parse: bool = True) -> list[list[int]]:
        """Token ids of each text. special: add BOS if the vocabulary wants it; parse: "</s>" becomes one token. Raises Stop."""
        return self._ask(["tokenize", [(text, special, parse) for text in texts]])

    def score(self, requests: Sequence[tuple[list[int], int]],
              done: Callable[[list[tuple[int, float, bool]]], object] = lambda answers: None) -> list[tuple[float, bool]]:  # fmt: skip
        """Score the last tokens of each request.

        Args:
            requests: token ids, and how many of them to score, less than all.
            done: called with each part of the answers: the request's number, and as below.

        Returns:
            For each request the sum of the tokens' log-probabilities in nats, and whether each of them is the likeliest.

        Raises:
            Stop: the model's probabilities are not numbers, or llama.cpp failed.
        """
        results: list[Any] = [None] * len(requests)
        answer = self._ask(["score", requests])
        while answer is not None:
            for i, logprob, greedy in answer:
                results[i] = logprob, greedy
            done(answer)
            answer = self._answer()
        return results

    def _ask(self, request: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            assert self.process.stdin
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise Stop(f"llama.cpp ended: {failure(self.process, self._said.read().splitlines())}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise Stop(answer["error"])
        return answer


@contextlib.contextmanager
def scorer(model: Path, length: int, threads: int, weights: bool = True, exact: bool = False) -> Iterator[Scorer]:
    """Load a GGUF in a process of its own until the end of the block. Raises Stop, NotBuilt.

    length: most tokens of a request, limited to the model's training context; weights: False loads only the vocabulary;
    exact: attention in float32.
    """
    library = llama_cpp.library("llama")
    request = {"gguf": str(model), "header": str(llama_cpp.source_dir() / "include" / "llama.h"), "library": str(library),
               "ggml": str(llama_cpp.library("ggml")), "backends": str(library.parent), "length": length, "threads": threads,
               "weights": weights, "exact": exact}  # fmt: skip
    path = [str(PACKAGES), *filter(os.path.isabs, sys.path)]  # nothing from the current directory, which may be a checkpoint
    code = f"import sys; sys.path[:] = {path!r}; from sherry_gguf.llama_scorer import serve; serve()"
    with tempfile.TemporaryFile("w+", errors="replace") as said, \
         child([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stderr=said) as process:  # fmt: skip
        yield Scorer(process, said, request)
