"""The loss on a text, by llama-perplexity's protocol."""

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.models.utils import resolve_max_length
from tqdm import tqdm

from ..errors import Stop
from . import first_line
from .scoring import scorer
from .tools import tool

# llama-perplexity sometimes loses its last lines: how often to run it, at least, and for how many seconds.
TRIES, PATIENCE = 3, 30.0
MEAN = re.compile(r"\s*\d+\s+{0}\s+({0})\s+{0}$".format(r"-?(?:\d+\.\d+|nan|inf)"))  # tokens, perplexity, mean loss, its deviation


@dataclasses.dataclass
class Loss:
    """The loss on a text."""

    nats: float  # mean loss of the scored tokens
    scored: int  # tokens that were scored
    chunks: int  # whole chunks that were used
    tokens: int  # tokens in the whole text

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf


def _count_chunks(tokens: int, context: int, most: int | None = None) -> tuple[int, int]:
    """Chunks, and their scored tokens, as llama-perplexity counts them. Raises Stop if the text is too short."""
    if tokens < 2 * context:
        raise Stop(f"the text has {tokens} tokens, and chunks of {context} need {2 * context}: give a longer text or a smaller --context")
    chunks = min(tokens // context, most or tokens)
    return chunks, chunks * (context - context // 2 - 1)


def _check_context(context: int, trained: int) -> None:
    if context > trained:
        raise Stop(f"--context {context}: the model was trained on {trained} tokens")


@torch.no_grad()
def held_out_loss(model, ids: Sequence[int], context: int, bos: int | None, chunks: int | None = None) -> Loss:
    """The loss on a text by llama-perplexity's protocol.

    The tokens are cut into chunks; the rest at the end is unused. In each chunk BOS replaces the first token, and tokens from
    context/2 + 1 on are scored, so that each is predicted from at least context/2 others.

    Args:
        model: a transformers causal language model.
        ids: the text's tokens, including a leading BOS if the tokenizer adds one.
        context: tokens in a chunk.
        bos: BOS's id, or None if the vocabulary does not use it.
        chunks: use only the first `chunks` chunks.

    Raises:
        Stop: the text is shorter than two chunks, or the loss is not finite.
    """
    count, scored = _count_chunks(len(ids), context, chunks)
    first, total = context // 2, 0.0
    training = model.training
    model.eval()
    for i in tqdm(range(count), desc="Running chunks", unit="chunk", mininterval=0.5):
        x = torch.tensor(ids[i * context : (i + 1) * context], device=model.device)[None]  # (1, context)
        if bos is not None:
            x[0, 0] = bos
        logits = model(input_ids=x, use_cache=False).logits[0, first:-1].float()
        total += F.cross_entropy(logits, x[0, first + 1 :], reduction="none").double().sum().item()
    model.train(training)
    if not math.isfinite(total):
        raise Stop(f"the loss is {total}")
    return Loss(total / scored, scored, count, len(ids))


def torch_text(model, tokenizer, ids: list[int], a: argparse.Namespace) -> tuple[Loss, int]:
    """A checkpoint's loss on the text, which has the tokens `ids`, and the vocabulary's size. Raises Stop."""
    bos = tokenizer.bos_token_id if tokenizer.encode("a")[0] == tokenizer.bos_token_id else None
    _check_context(a.context, resolve_max_length(model.config, tokenizer))
    try:
        return held_out_loss(model, ids, a.context, bos, a.chunks), model.config.get_text_config().vocab_size
    except (RuntimeError, IndexError) as e:
        raise Stop(f"PyTorch: {first_line(e)}") from e


def gguf_text(path: Path, ids: list[int], a: argparse.Namespace) -> tuple[Loss, int]:
    """The same for a GGUF. Raises Stop, NotBuilt."""
    with scorer(path, a.context, a.threads, weights=False) as vocabulary:
        _check_context(a.context, vocabulary.trained)
    return perplexity(path, a.text, len(ids), a), vocabulary.vocabulary


def perplexity(model: Path, text: Path, tokens: int, a: argparse.Namespace) -> Loss:
    """`held_out_loss` of a GGUF on a text of `tokens` tokens, by llama-perplexity. Raises Stop, NotBuilt."""
    chunks, scored = _count_chunks(tokens, a.context, a.chunks)
    began, tries = time.monotonic(), 0
    while True:  # llama-perplexity may exit before its thread that writes the log is done
        with tool("llama-perplexity", "-m", model, "-f", text, "-c", a.context, "-t", a.threads, "--chunks", chunks,
                  "-b", min(2048, 256 * a.context), "--ppl-output-type", 1, "-fit", "off") as process, \
             tqdm(total=chunks, desc="Running chunks", unit="chunk", mininterval=0.5) as bar:  # fmt: skip
            means = []
            for line in process.lines():
                if m := MEAN.match(line):  # of all chunks so far
                    means.append(float(m[1]))
                    bar.update()
            if process.process.wait():
                raise Stop(f"llama-perplexity: {process.failure()}")
        tries += 1
        if len(means) == chunks:
            break
        if tries >= TRIES and time.monotonic() - began > PATIENCE:
            raise Stop(f"llama-perplexity printed {len(means)} of {chunks} chunks: {process.failure()}")
    if not math.isfinite(means[-1]):
        raise Stop(f"the loss is {means[-1]}")
    return Loss(means[-1], scored, chunks, tokens)
