"""lm-eval's view of a model: PyTorch runs a checkpoint, llama-server a GGUF."""

import argparse
import contextlib
import functools
import itertools
import threading
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
from .tools import Server, serve


class _Recorder:
    """Records the requests to a model, to compare them with another model's."""

    truncated = 0  # how many requests were too long for the model
    max_length: int

    @functools.cached_property
    def requests(self) -> dict[tuple[str, str], int]:
        """Hashes of the tokens by (context, continuation)."""
        return {}

    def record(self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]]) -> None:
        for key, context, continuation in requests:
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            if len(continuation) > self.max_length:
                raise Stop(f"a continuation has {len(continuation)} tokens, and the model takes {self.max_length}")
            if key:
                self.requests[key] = hash((tuple(context), tuple(continuation)))


class TorchLM(_Recorder, HFLM):
    """lm-eval's class for transformers models, with recorded requests."""

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        self.record(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


class ServerLM(_Recorder, TemplateLM):
    """A llama-server as an lm-eval model. It tokenizes and truncates as HFLM does.

    max_length: longest input in tokens, limited to what the server's slots hold.
    """

    max_gen_toks = 256  # HFLM's default

    def __init__(self, server: Server, max_length: int):
        super().__init__()
        self.server = server
        self.max_length = min(max_length, server.length)
        self._tokenize = functools.lru_cache(1 << 12)(server.tokenize)  # a document's choices share a context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.server.bos or self.server.eos)
        return list(self._tokenize(string, add_special_tokens))

    @functools.cached_property
    def eot_token_id(self) -> int:
        return self.server.tokenize(self.server.eos, special=False)[0]

    @functools.cached_property
    def prefix_token_id(self) -> int:
        return self.server.tokenize(self.server.bos or self.server.eos, special=False)[0]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        self.record(requests)

        def score(slot: int, i: int) -> tuple[float, bool]:
            _, context, continuation = requests[i]
            tokens = (context + continuation)[-(self.max_length + 1) :]
            total, greedy = 0.0, True
            for j in range(len(tokens) - len(continuation), len(tokens)):
                logprob, best = self.server.score(slot, tokens[:j], tokens[j])
                total, greedy = total + logprob, greedy and best
            return total, greedy

        # Requests with the same context share a slot, one after the other. The longest come first: the bar's estimate is never too low.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1:]))
        groups = [list(g) for _, g in itertools.groupby(order, key=lambda i: requests[i][1])]
        return self._in_slots(groups, score, len(requests), "Running loglikelihood requests", disable_tqdm)

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
        def generate(slot: int, i: int) -> str:
            context, settings = requests[i].args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            stop, most = handle_stop_sequences(settings["until"], eos=None), settings["max_gen_toks"]
            if most >= self.max_length:
                raise Stop(f"a task asks for {most} tokens, and the model takes {self.max_length} including the question")
            sampled = settings["do_sample"] and settings.get("temperature", 1.0) > 0
            answer = self.server.ask(
                "POST", "/completion", prompt=prompts[i][-(self.max_length - most) :], n_predict=most, id_slot=slot,
                stop=[s for s in stop if s], cache_prompt=True, seed=1234, samplers=["top_k", "top_p", "temperature"],
                temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_k=settings.get("top_k", 50) if sampled else 1, top_p=settings.get("top_p", 1.0),
                response_fields=["content"])  # fmt: skip
            return postprocess_generated_text(answer["content"], stop, None)

        prompts = [self.tok_encode(r.args[0]) for r in requests]
        groups = [[i] for i in range(len(requests))]
        return self._in_slots(groups, generate, len(requests), "Running generate_until requests", disable_tqdm)

    def _in_slots(self, groups: list[list[int]], work: Callable[[int, int], Any], count: int, label: str, quiet: bool) -> list:
        """`work(slot, i)` for every i. A group runs in order in one slot. The first error ends everything."""
        results, over = [None] * count, threading.Event()

        def run_group(group: list[int]) -> int:
            slot = self.server.slots.get()
            try:
                for i in group:
                    if not over.is_set():
                        results[i] = work(slot, i)
            finally:
                self.server.slots.put(slot)
            return len(group)

        with ThreadPoolExecutor(self.server.slots.qsize()) as pool, tqdm(total=count, desc=label, disable=quiet) as bar:
            try:
                for done in as_completed([pool.submit(run_group, g) for g in groups]):
                    bar.update(done.result())
            except BaseException as e:
                over.set()
                if not isinstance(e, Exception):  # interrupted: don't wait for what is still being computed
                    self.server.tool.process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results


@contextlib.contextmanager
def open_lm(path: Path, checkpoint: tuple[Any, Any] | None, a: argparse.Namespace) -> Iterator[TorchLM | ServerLM]:
    """A loaded checkpoint, or else the GGUF at `path` in a llama-server, as an lm-eval model. Raises Stop, NotBuilt."""
    if checkpoint:
        model, tokenizer = checkpoint
        length = min(a.max_length, resolve_max_length(model.config, tokenizer) - 1)  # as in a server's slot
        yield TorchLM(pretrained=model, tokenizer=tokenizer, batch_size=a.batch_size, max_length=length)
    else:
        with serve(path, a.batch_size, a.max_length, a.threads) as server:
            yield ServerLM(server, a.max_length)


def load(path: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """A checkpoint's model and tokenizer. Raises Stop, also if tensors are missing."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
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
