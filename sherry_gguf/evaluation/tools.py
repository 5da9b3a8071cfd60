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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import llama_cpp
from ..errors import Stop

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


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
        return failure(self.process, self.last)


def failure(process: subprocess.Popen[str], output: Iterable[str]) -> str:
    """The error messages in a program's output and how it ended, in one line."""
    try:
        code = process.wait(2)
    except subprocess.TimeoutExpired:
        code = None
    # "0.00.123.456 E message": time, level (debug, info, warning, error)
    lines = [re.sub(r"^\d+\.\d\d\.\d{3}\.\d{3} (?=[A-Z] )", "", line) for line in list(output) if line]
    errors = list(dict.fromkeys(line[2:] for line in lines if line.startswith("E ")))[:2]
    other = [line for line in lines if not re.match("[DIW] ", line)]  # an abort's message, followed by a debugger's lines
    errors = errors or [line for line in other if re.search(r"GGML_|what\(\)|[Ee]rror", line)][:1] or other[-3:]
    how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{'; '.join(errors) or 'no error message'} ({how})"


@contextlib.contextmanager
def child(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a program and kill it at the end of the block; its output is a pipe of text. `streams` go to `subprocess.Popen`.

    Ctrl-C reaches only us, not the program; if we are killed, so is the program. Environment variables that configure llama.cpp are
    removed: results must not depend on them, and an API key would lock us out.
    """

    def die_with_parent():
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")} | {"GGML_NO_BACKTRACE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment, start_new_session=True,
                          preexec_fn=die_with_parent, **streams) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()  # a server that is starting ignores SIGTERM, and no program has anything to save
            if process.stdin:
                with contextlib.suppress(BrokenPipeError):  # what it did not read
                    process.stdin.close()


@contextlib.contextmanager
def tool(name: str, *args: object) -> Iterator[Tool]:
    """Start a built tool and kill it at the end of the block. Raises NotBuilt."""
    command = [str(llama_cpp.tool(name)), *map(str, args)]
    with child(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        yield Tool(process)


class Server:
    """A ready llama-server.

    Attributes:
        tool: the running llama-server.
        slots: numbers of the free slots; a slot holds one sequence.
    """

    def __init__(self, tool: Tool, port: int, slots: int):
        self.tool = tool
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(slots):
            self.slots.put(i)
        # One connection for each slot and one more: further ones would wait until the server drops an idle one.
        self._http = {i: http.client.HTTPConnection("127.0.0.1", port) for i in (None, *range(slots))}

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
