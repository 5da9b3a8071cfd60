"""llama.cpp's programs as child processes that never outlive us; llama-server's HTTP interface."""

import collections
import contextlib
import ctypes
import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import llama_cpp
from ..errors import Stop

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
BIAS = 1e9  # added to a token's logit to make the server choose it
FLOOR = -104.0  # llama-server's probabilities are floats, and e^-104 rounds to 0


class Tool:
    """A running tool: its `process` and the last lines of its output."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.last: collections.deque[str] = collections.deque(maxlen=500)

    def lines(self) -> Iterator[str]:
        """The output, line by line, until the tool closes it."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.last.append(line.rstrip())
            yield line

    def failure(self) -> str:
        """The tool's error messages and how it ended, in one line."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            code = None
        # "0.00.123.456 E message": time, level (debug, info, warning, error)
        lines = [re.sub(r"^\d+\.\d\d\.\d{3}\.\d{3} (?=[A-Z] )", "", line) for line in list(self.last) if line]
        errors = list(dict.fromkeys(line[2:] for line in lines if line.startswith("E ")))[:2]
        other = [line for line in lines if not re.match("[DIW] ", line)]  # an abort's message, followed by a debugger's lines
        errors = errors or [line for line in other if re.search(r"GGML_|what\(\)|[Ee]rror", line)][:1] or other[-3:]
        how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{'; '.join(errors) or 'no error message'} ({how})"


@contextlib.contextmanager
def tool(name: str, *args: object) -> Iterator[Tool]:
    """Start a built tool and kill it at the end of the block. Raises NotBuilt.

    Ctrl-C reaches only us, not the tool; if we are killed, so is the tool. Environment variables that configure llama.cpp are
    removed: results must not depend on them, and an API key would lock us out.
    """

    def die_with_parent():
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    command = [str(llama_cpp.tool(name)), *map(str, args)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", env=environment, start_new_session=True, preexec_fn=die_with_parent) as process:  # fmt: skip
        try:
            yield Tool(process)
        finally:
            process.kill()  # a server that is starting ignores SIGTERM, and no tool has anything to save


class Server:
    """A ready llama-server: it tokenizes text and gives the probability of a token after others.

    Attributes:
        tool: the running llama-server.
        slots: numbers of the free slots; a slot holds one sequence.
        length: most tokens in a sequence.
        trained: the context length of the model's training.
        vocabulary: tokens in the vocabulary.
        bos, eos: text of these tokens, or "".
    """

    def __init__(self, tool: Tool, port: int, slots: int):
        self.tool = tool
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(slots):
            self.slots.put(i)
        # One connection for each slot and one more: further ones would wait until the server drops an idle one.
        self._http = {i: http.client.HTTPConnection("127.0.0.1", port) for i in (None, *range(slots))}
        properties = self.ask("GET", "/props")
        self.length = properties["default_generation_settings"]["n_ctx"] - 1  # it reserves room for the next token
        about = self.ask("GET", "/v1/models")["data"][0]["meta"]
        self.vocabulary, self.trained = about["n_vocab"], about["n_ctx_train"]
        self.bos, self.eos = (properties[f"{name}_token"] for name in ("bos", "eos"))
        self._letter = self.tokenize("a", special=False)[-1]

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a request. Threads must not share a slot, and only one may send requests without a slot. Raises Stop."""
        connection, data = self._http[body.get("id_slot")], json.dumps(body) if body else None
        for last_try in False, True:  # the server closes connections that were idle for some seconds
            try:
                connection.request(method, path, data, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = json.loads(response.read())
                break
            except (OSError, http.client.HTTPException) as e:
                connection.close()
                if last_try or self.tool.process.poll() is not None:
                    raise Stop(f"llama-server does not answer ({type(e).__name__}): {self.tool.failure()}") from None
        if response.status != 200:
            raise Stop(f"llama-server refuses a request: {answer.get('error', {}).get('message', answer)}")
        return answer

    def close(self) -> None:
        for connection in self._http.values():
            connection.close()

    def tokenize(self, text: str, special: bool, parse: bool = True) -> list[int]:
        """Token ids. special: add BOS if the vocabulary wants it; parse: text such as "</s>" becomes one token."""
        return self.ask("POST", "/tokenize", content=text, add_special=special, parse_special=parse)["tokens"]

    def score(self, slot: int, prompt: list[int], token: int) -> tuple[float, bool]:
        """The log-probability of `token` after `prompt` in nats, at least FLOOR, and whether no token is likelier. Raises Stop.

        A bias makes the server choose our token, because it reports probabilities only of the token it chose and of the likeliest
        ones. They come from the unbiased logits over the whole vocabulary. It reuses the part of the prompt that the slot holds.
        """
        chosen = self._predict(slot, prompt, token, n_probs=1)
        if chosen:
            logprob, best = chosen["logprob"], chosen["top_logprobs"][0]["id"]
        else:  # the token ends within a character, so it gets no report: make the server choose another and list ours
            for n in dict.fromkeys((min(256, self.vocabulary), self.vocabulary)):
                likely = self._predict(slot, prompt, self._letter, n_probs=n)["top_logprobs"]
                logprob, best = next((p["logprob"] for p in likely if p["id"] == token), None), likely[0]["id"]
                if logprob is not None:
                    break
        if logprob is None:
            raise Stop("the model's probabilities are not numbers")
        return max(logprob, FLOOR), best == token

    def _predict(self, slot: int, prompt: list[int], token: int, n_probs: int) -> Any:
        """The server's report on the token after `prompt` if it is made to choose `token`; None if it gives none."""
        answer = self.ask("POST", "/completion", prompt=prompt, id_slot=slot, cache_prompt=True, n_predict=1,
                          logit_bias=[[token, BIAS]], samplers=["top_k"], top_k=1, n_probs=n_probs,
                          response_fields=["completion_probabilities"])  # fmt: skip
        return next(iter(answer.get("completion_probabilities") or []), None)


@contextlib.contextmanager
def serve(model: Path, slots: int, length: int, threads: int, *more: object) -> Iterator[Server]:
    """Run llama-server on a GGUF and a free local port until the end of the block. Raises Stop, NotBuilt.

    slots: sequences at once; length: tokens in a sequence, limited to the model's training context; more: further flags.
    """
    with tool("llama-server", "-m", model, "--host", "127.0.0.1", "--port", 0, "-np", slots, "-c", slots * (length + 1),
              "-t", threads, "-fit", "off", "--swa-full", "--cache-ram", 0, "--no-warmup", "--no-webui",
              "--no-jinja", "--chat-template", "chatml", *more) as process:  # fmt: skip  # the model's template may be broken
        ports: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def drain():
            for line in process.lines():  # all of them: a full pipe would block the server
                if m := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                    ports.put(int(m[1]))
            ports.put(None)

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        try:
            port = ports.get()
            if port is None:
                raise Stop(f"llama-server cannot run it: {process.failure()}")
            with contextlib.closing(Server(process, port, slots)) as server:
                yield server
        finally:
            process.process.kill()
            reader.join()
