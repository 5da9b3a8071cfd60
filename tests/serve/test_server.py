"""`sherry-gguf serve` with OpenAI's own client, and the program that loads it."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest
from conftest import ENV

from sherry_gguf import llama_cpp

pytestmark = pytest.mark.slow

LOAD = Path(__file__).parents[2] / "scripts" / "bench" / "serve.py"
ANSWER = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"], "additionalProperties": False}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
GREEDY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
HELLO = [{"role": "user", "content": "hello"}]


@contextlib.contextmanager
def serving(model, *flags):
    """A server's address, without /v1."""
    command = [sys.executable, "-m", "sherry_gguf", "serve", str(model), "--port", "0", "-t", "1", *flags]
    with subprocess.Popen(command, env=ENV, text=True, errors="replace", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            address = next(m[1] for line in process.stderr if (m := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line)))
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would block it
            yield address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(tiny):
    # a template under which a call is JSON, and nothing else
    template = llama_cpp.source_dir() / "models" / "templates" / "meta-llama-Llama-3.2-3B-Instruct.jinja"
    with serving(tiny, "-np", "4", "-c", "8192", "--metrics", "--chat-template-file", str(template)) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def metrics(url) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {name: float(value) for name, value in re.findall(r"^llamacpp:(\w+) (\S+)$", text, re.M)}


def test_chat_and_streaming(client):
    whole = client.chat.completions.create(messages=HELLO, max_tokens=12, **GREEDY)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    *parts, last = client.chat.completions.create(
        messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text and len(parts) > 4
    assert last.usage.completion_tokens == 12


def test_log_probabilities(client):
    answer = client.chat.completions.create(messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=3, **GREEDY)
    first = answer.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3 and first.logprob == max(likely.logprob for likely in first.top_logprobs) < 0


def test_json_schema(client):
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": ANSWER}}
    answer = client.chat.completions.create(messages=HELLO, response_format=schema, max_tokens=64, model="tiny", temperature=0)
    assert json.loads(answer.choices[0].message.content)["answer"] in ("yes", "no")


def test_tools(client):
    """A random model never begins a call, without a bias."""
    tool = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": CITY}}
    answer = client.chat.completions.create(
        messages=HELLO, tools=[tool], tool_choice="required", logit_bias={"{": 100}, max_tokens=512, model="tiny", temperature=0
    )
    (call, *_) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")


def test_more_requests_at_once_than_slots(url):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            calls = [client.completions.create(prompt=f"def {'read' * i}", max_tokens=8 + i, **GREEDY) for i in range(12)]
            return await asyncio.gather(*calls)

    before = metrics(url)["tokens_predicted_total"]
    assert [answer.usage.completion_tokens for answer in asyncio.run(ask_all())] == [8 + i for i in range(12)]
    assert metrics(url)["tokens_predicted_total"] == before + sum(8 + i for i in range(12))


def test_a_cancelled_request_frees_its_slot(client, url):
    """Four streams of 2000 tokens each, slow since each token lists the probabilities of all, are closed after the first."""
    before, slow = metrics(url)["tokens_predicted_total"], {"ignore_eos": True, "n_probs": 512}
    for _ in range(4):
        stream = client.completions.create(prompt="a", max_tokens=2000, stream=True, model="tiny", temperature=0, extra_body=slow)
        next(iter(stream))
        stream.close()
    answer = client.completions.create(prompt="a", max_tokens=4, **GREEDY)
    assert answer.usage.completion_tokens == 4
    for _ in range(600):
        if not metrics(url)["requests_processing"]:
            break
        time.sleep(0.1)
    assert not metrics(url)["requests_processing"]
    assert metrics(url)["tokens_predicted_total"] < before + 4000


def test_a_request_that_does_not_fit_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        client.completions.create(prompt="a b " * 5000, max_tokens=4, **GREEDY)


def test_embeddings(tiny):
    with serving(tiny, "--embeddings", "--pooling", "mean", "-c", "512") as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.embeddings.create(model="tiny", input=["def read", "class", "def read"])
    one, two, three = (item.embedding for item in answer.data)
    assert len(one) == 256 and sum(x * x for x in one) == pytest.approx(1, abs=1e-3)
    assert one == pytest.approx(three, abs=1e-3) and one != pytest.approx(two, abs=1e-2)


def test_the_load(tiny):
    done = subprocess.run([sys.executable, LOAD, tiny, "--requests", "12", "--parallel", "3", "--tokens", "4", "--threads", "1", "--",
                           "-fa", "off"], capture_output=True, text=True, env=ENV)  # fmt: skip
    assert done.returncode == 0 and "\n12 of 12 answers are equal\n" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^\| 3 at a time +\| +12 of 12 \| +\d", done.stdout, re.M), done.stdout
    done = subprocess.run([sys.executable, LOAD, tiny, "--requests", "2", "--", "--api-key", "secret"], capture_output=True,
                          text=True, env=ENV)  # fmt: skip
    assert done.returncode == 1 and "\n0 of 2 answers are equal\n" in done.stdout, done.stdout + done.stderr
