#!/usr/bin/env python3
"""Send many requests to a llama-server; report lost or different answers, speed and memory.

The requests, all different, are first sent one after the other and then several at a time, to 127.0.0.1 only. The sampling is
greedy. Exits with 1 if an answer is lost or differs, or if the server's memory grows by more than a tenth while it answers several
requests at a time.
"""

import argparse
import http.client
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sherry_gguf import llama_cpp
from sherry_gguf.bench import cpu_name
from sherry_gguf.errors import Stop
from sherry_gguf.programs import HelpWithDefaults, run
from sherry_gguf.report import markdown_table

WORDS = "read write open close flush seek name size mode lines path buffer token index value key item next parse format".split()
LIMIT = 600  # seconds that an answer may take


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    seconds: float  # from sending the request to the whole answer


def prompts(count: int) -> list[str]:
    """Beginnings of Python functions, all different."""
    draw = random.Random(0)
    return [f"def {draw.choice(WORDS)}_{draw.choice(WORDS)}_{i}(self, {', '.join(draw.sample(WORDS, draw.randrange(1, 9)))}):"
            for i in range(count)]  # fmt: skip


def ask(port: int, prompt: str, tokens: int) -> Answer | None:
    """An answer of so many tokens, or None if there was none."""
    began = time.monotonic()
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            return None
        return Answer(answer["choices"][0]["text"], answer["usage"]["completion_tokens"], time.monotonic() - began)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


@contextmanager
def server(model: Path, parallel: int, context: int, threads: int, flags: list[str]) -> Iterator[tuple[int, int]]:
    """Run llama-server on a free port of 127.0.0.1; yields its process and the port. Raises Stop, NotBuilt."""
    command = [llama_cpp.tool("llama-server"), "-m", model, "--host", "127.0.0.1", "--port", 0, "-np", parallel,
               "-c", parallel * context, "-t", threads, *flags]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    with subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", env=environment, start_new_session=True) as process:  # fmt: skip
        assert process.stdout
        log = []
        try:
            for line in process.stdout:
                log.append(line)
                if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                    break
            else:
                raise Stop(f"llama-server cannot run {model}:\n{''.join(log[-10:])}")
            with ThreadPoolExecutor(1) as drain:  # a full pipe would block the server
                drain.submit(process.stdout.read)
                try:
                    yield process.pid, int(found[1])
                finally:
                    process.kill()
        finally:
            process.kill()


def resident(pid: int) -> float:
    """MiB of a process's memory. Raises Stop if the process has ended."""
    with suppress(OSError):
        if found := re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M):
            return int(found[1]) / 1024
    raise Stop("llama-server ended during the load")


def load(port: int, asked: list[str], parallel: int, tokens: int) -> tuple[list[Answer | None], float]:
    """The answers to these prompts, `parallel` at a time, and the seconds that all took."""
    began = time.monotonic()
    pool = ThreadPoolExecutor(parallel)
    try:
        return list(pool.map(lambda prompt: ask(port, prompt, tokens), asked)), time.monotonic() - began
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, end the server first: it answers no more


def summary(name: str, answers: list[Answer | None], seconds: float, memory: float) -> dict:
    """Figures of one load. memory: MiB after it."""
    came = [answer for answer in answers if answer]
    times = sorted(answer.seconds for answer in came) or [0.0]
    return {
        "requests": name,
        "answered": f"{len(came)} of {len(answers)}",
        "tokens a second": round(sum(answer.tokens for answer in came) / seconds, 1),
        "median, s": round(statistics.median(times), 3),
        "95 %, s": round(times[math.ceil(0.95 * len(times)) - 1], 3),
        "memory after, MiB": round(memory, 1),
    }


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpWithDefaults,
        usage="%(prog)s [options] MODEL [-- FLAG ...]",
        epilog="What follows -- goes to llama-server.",
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="the GGUF")
    p.add_argument("--requests", type=int, default=200, metavar="N", help="requests, at most 1000")
    p.add_argument("--parallel", type=int, default=8, metavar="N", help="requests at a time, at most 64")
    p.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of each answer")
    p.add_argument("--context", type=int, default=256, metavar="N", help="tokens of prompt and answer together")
    p.add_argument("--threads", type=int, default=2, metavar="N", help="threads of the server")
    ours = sys.argv[1:][: (*sys.argv[1:], "--").index("--")]
    a, flags = p.parse_args(ours), sys.argv[len(ours) + 2 :]
    if not (1 <= a.requests <= 1000 and 1 <= a.parallel <= 64):
        p.error("--requests must be 1 to 1000 and --parallel 1 to 64")
    asked = prompts(a.requests)
    with server(a.model, a.parallel, a.context, a.threads, flags) as (pid, port):
        load(port, asked[: a.parallel], a.parallel, a.tokens)  # warms up
        before = resident(pid)
        alone, took = load(port, asked, 1, a.tokens)
        rows = [summary("one at a time", alone, took, resident(pid))]
        together, took = load(port, asked, a.parallel, a.tokens)
        rows.append(summary(f"{a.parallel} at a time", together, took, resident(pid)))
    print(f"{a.model.name}, {cpu_name()}, {a.threads} threads; memory before {before:.1f} MiB\n")
    print(markdown_table([*rows[0]], [[*map(str, row.values())] for row in rows]))
    equal = sum(one is not None and both is not None and one.text == both.text for one, both in zip(alone, together))
    print(f"\n{equal} of {a.requests} answers are equal")
    first, last = (row["memory after, MiB"] for row in rows)
    if grown := last > 1.1 * first:
        print(f"memory has grown from {first} to {last} MiB")
    return int(equal < a.requests or grown)


if __name__ == "__main__":
    run(main)
