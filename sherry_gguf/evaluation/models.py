"""lm-eval's view of a model: PyTorch runs a checkpoint, llama.cpp a GGUF."""

import argparse
import contextlib
import functools
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import transformers
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..errors import Stop
from . import first_line, say
from .resume import Answers, Request
from .scoring import Scorer, scorer
from .tools import Server, serve


class _Recorder:
    """Records the requests to a model, to compare them with another model's, and skips those with a known answer."""

    truncated = 0  # how many requests were too long for the model
    max_length: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.requests: dict[Request, int] = {}  # hashes of the tokens
        self.answers = Answers(None, "")  # those of the task that is measured
        hook: Any = self
        self.cache_hook = hook  # HFLM calls its `add_partial` for each answer

    def record(self, requests: list[tuple[Request | None, list[int], list[int]]]) -> None:
        for key, context, continuation in requests:
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            if len(continuation) > self.max_length:
                raise Stop(f"a continuation has {len(continuation)} tokens, and the model takes {self.max_length}")
            if key:
                self.requests[key] = zlib.crc32(repr((context, continuation)).encode())

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        self.record(requests)
        results = [self.answers.get(key) for key, _, _ in requests]
        left = [i for i, result in enumerate(results) if result is None]
        if left:
            for i, result in zip(left, self._compute([requests[i] for i in left], *args, **kwargs)):
                results[i] = result
        return results

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if kind == "loglikelihood":
            self.answers.add(request, answer)


class TorchLM(_Recorder, HFLM):
    """lm-eval's class for transformers models, with recorded requests."""

    def _compute(self, *args, **kwargs):
        return HFLM._loglikelihood_tokens(self, *args, **kwargs)


class GgufLM(_Recorder, TemplateLM):
    """A GGUF as an lm-eval model. It tokenizes and truncates as HFLM does.

    path: the GGUF; scorer: the same, loaded; slots, threads: for tasks that generate text, which llama-server does.
    max_length: longest input in tokens, limited to what llama-server's slots hold.
    """

    max_gen_toks = 256  # HFLM's default

    def __init__(self, path: Path, scorer: Scorer, max_length: int, slots: int, threads: int, *flags: object):
        super().__init__()
        self.scorer = scorer
        self.max_length = min(max_length, scorer.trained - 1)  # a slot reserves room for the next token
        self._serve = functools.partial(serve, path, slots, max_length, threads, *flags)
        self._tokens: dict[tuple[str, bool], list[int]] = {}  # by string, and whether BOS was added

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        key = string, self._begins(string) if add_special_tokens is None else add_special_tokens
        return list(self._tokens.get(key) or self.scorer.tokenize([string], key[1])[0])

    def _begins(self, string: str) -> bool:
        """Whether a string needs BOS."""
        return not has_bos_prefix(string, self.scorer.bos_text or self.scorer.eos_text)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        # Ask for all tokens at once: a question to another process takes longer than a short string's tokens.
        pairs = [r.args for r in requests if r.args[0]]
        wanted = {(s, self._begins(s)) for context, more in pairs for s in (context.rstrip(), context + more)}
        for special in True, False:
            keys = [key for key in wanted if key[1] == special]
            self._tokens.update(zip(keys, self.scorer.tokenize([string for string, _ in keys], special)))
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._tokens.clear()

    @property
    def eot_token_id(self) -> int:
        return self._first(self.scorer.eos)

    @property
    def prefix_token_id(self) -> int:
        return self._first(self.scorer.bos, self.scorer.eos)

    @staticmethod
    def _first(*tokens: int | None) -> int:
        token = next((t for t in tokens if t is not None), None)
        if token is None:
            raise Stop("the vocabulary has no token for the beginning or the end of a text, which the task needs")
        return token

    def _compute(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        pairs = [((context + continuation)[-(self.max_length + 1) :], len(continuation)) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:

            def done(answers: list[tuple[int, float, bool]]) -> None:
                bar.update(len(answers))
                for i, logprob, greedy in answers:
                    if key := requests[i][0]:
                        self.answers.add(key, (logprob, greedy))

            return self.scorer.score(pairs, done)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        def generate(server: Server, slot: int, i: int) -> str:
            context, settings = requests[i].args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            stop, most = handle_stop_sequences(settings["until"], eos=None), settings["max_gen_toks"]
            if most >= self.max_length:
                raise Stop(f"a task asks for {most} tokens, and the model takes {self.max_length} including the question")
            sampled = settings["do_sample"] and settings.get("temperature", 1.0) > 0
            answer = server.ask(
                "POST", "/completion", prompt=prompts[i][-(self.max_length - most) :], n_predict=most, id_slot=slot,
                stop=[s for s in stop if s], cache_prompt=True, seed=1234, samplers=["top_k", "top_p", "temperature"],
                temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_k=settings.get("top_k", 50) if sampled else 1, top_p=settings.get("top_p", 1.0),
                response_fields=["content"])  # fmt: skip
            return postprocess_generated_text(answer["content"], stop, None)

        prompts = [self.tok_encode(r.args[0]) for r in requests]
        with self._serve() as server:
            return in_slots(server, len(requests), functools.partial(generate, server), "Running generate_until requests", disable_tqdm)


def in_slots(server: Server, count: int, work: Callable[[int, int], Any], label: str, quiet: bool) -> list:
    """`work(slot, i)` for every i below `count`, in the server's slots. The first error ends everything."""
    results, over = [None] * count, threading.Event()

    def run(i: int) -> None:
        slot = server.slots.get()
        try:
            if not over.is_set():
                results[i] = work(slot, i)
        finally:
            server.slots.put(slot)

    with ThreadPoolExecutor(server.slots.qsize()) as pool, tqdm(total=count, desc=label, disable=quiet) as bar:
        try:
            for done in as_completed([pool.submit(run, i) for i in range(count)]):
                done.result()
                bar.update()
        except BaseException as e:
            over.set()
            if not isinstance(e, Exception):  # interrupted: don't wait for what is still being computed
                server.tool.process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


@contextlib.contextmanager
def open_lm(path: Path, checkpoint: tuple[Any, Any] | None, a: argparse.Namespace) -> Iterator[TorchLM | GgufLM]:
    """A loaded checkpoint, or else the GGUF at `path`, as an lm-eval model. Raises Stop, NotBuilt."""
    if checkpoint:
        model, tokenizer = checkpoint
        length = min(a.max_length, resolve_max_length(model.config, tokenizer) - 1)  # as in a server's slot
        yield TorchLM(pretrained=model, tokenizer=tokenizer, batch_size=a.batch_size, max_length=length)
    else:
        with scorer(path, a.max_length + 1, a.threads) as loaded:
            yield GgufLM(path, loaded, a.max_length, a.batch_size, a.threads)


def load_tokenizer(path: Path) -> Any:
    """A checkpoint's tokenizer. Raises Stop."""
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as e:  # transformers raises many kinds
        raise Stop(f"transformers cannot load its tokenizer: {first_line(e)}") from e


def load(path: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """A checkpoint's model and tokenizer. Raises Stop, also if tensors are missing."""
    tokenizer = load_tokenizer(path)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
        model, info = loaded
        model = model.to(device)
    except Exception as e:  # transformers, safetensors and PyTorch raise many kinds
        raise Stop(f"transformers cannot load it: {first_line(e)}") from e
    if lacking := [*info["missing_keys"], *(str(m[0]) for m in info["mismatched_keys"])]:  # transformers would use random weights
        raise Stop(f"the checkpoint lacks {len(lacking)} of its model's tensors, such as {lacking[0]}")
    if (getattr(model.config, "sherry_config", None) or {}).get("weights") == "latent":
        say(f"{path}: PyTorch runs its latent weights unquantized; export the model to evaluate it as trained")
    return model.eval(), tokenizer
