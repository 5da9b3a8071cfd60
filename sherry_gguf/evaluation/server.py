"""A llama-server and its HTTP interface."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Stop
from .tools import Tool, tool

BIAS = 1e9  # added to a token's logit to make the server choose it
FLOOR = -104.0  # llama-server's probabilities are floats, and e^-104 rounds to 0


class Server:
    """A ready llama-server: it tokenizes text and gives the probability of a token after others.

    Args:
        tool: the running llama-server.
        port: its port.
        slots: how many sequences it holds at once.

    Attributes:
        slots: numbers of the free slots.
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

        The server reports the probabilities of the token it chose and of the likeliest ones, computed from the unbiased logits
        over the whole vocabulary, so a bias makes it choose ours. It reuses the part of the prompt that the slot already holds.
        """
        chosen = self._predict(slot, prompt, token, n_probs=1)
        if chosen:
            logprob, best = chosen["logprob"], chosen["top_logprobs"][0]["id"]
        else:  # the token ends within a character and gets no report: make the server choose another and list ours
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
    """Run llama-server on a free local port until the end of the block. Raises Stop, NotBuilt.

    Args:
        model: the GGUF.
        slots: sequences at once.
        length: tokens in a sequence, limited to the model's training context.
        threads: CPU threads.
        more: further flags of llama-server.
    """
    with tool("llama-server", "-m", model, "--host", "127.0.0.1", "--port", 0, "-np", slots,
              "-c", slots * (length + 1), "-t", threads, "-fit", "off", "--swa-full", "--cache-ram", 0, "--no-warmup",
              "--no-webui", "--no-jinja", "--chat-template", "chatml",  # the model's own may be broken
              *more) as process:  # fmt: skip
        ports: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def drain():
            for line in process.lines():  # until its end: a full pipe would block the server
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
