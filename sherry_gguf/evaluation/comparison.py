"""Differences between models, doubts about them, and the final table."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..report import table

# As a fraction of ln(vocabulary), the loss of guessing. Token frequencies alone reach 0.64 to 0.86 (counted on English and on
# Python, byte-level BPE of 300 to 32000 tokens), so a model above 0.9 has not even learned those.
NEAR_GUESSING = 0.9
# Good tokenizers of 32000 and more tokens differ by up to a third on ordinary text.
SUSPICIOUS_RATIO = 1.5
SHOWN = 5  # different answers that are printed; the report has all


@dataclasses.dataclass
class Inputs:
    """The tokens a model was given."""

    requests: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)  # hashes of the tokens by (context, continuation)
    text: list[int] = dataclasses.field(default_factory=list)


def compare(models: list[dict], inputs: list[Inputs], i: int) -> dict[str, Any]:
    """Compare model i with the first.

    Returns:
        "model" and "with", and if both models have the figures: "tokens", which inputs were tokenized differently, in words;
        "same_choice", the fraction of "documents" with the same likeliest choice; "differing", the documents without: "task",
        "document" (its number, from 0), "choices" (the first model's and the other's) and "scores" (both models' log-likelihoods of
        all choices); "log_likelihood", the mean absolute difference of the choices' log-likelihoods relative to their mean; "text",
        the relative difference of the losses per byte, which equals that per token if the tokens are the same.
    """
    first, other = models[0], models[i]
    out: dict[str, Any] = {"model": other["model"], "with": first["model"]}
    if notes := _token_notes(inputs[0], inputs[i]):
        out["tokens"] = "; ".join(notes)
    pairs = [(name, n, x, y) for name in first["tasks"] if name in other["tasks"] and "choices" in first["tasks"][name]
             for n, (x, y) in enumerate(zip(first["tasks"][name]["choices"], other["tasks"][name]["choices"]))]  # fmt: skip
    if pairs:
        likeliest = lambda x: max(range(len(x)), key=x.__getitem__)
        out["differing"] = [{"task": name, "document": n, "choices": [likeliest(x), likeliest(y)], "scores": [x, y]}
                            for name, n, x, y in pairs if likeliest(x) != likeliest(y)]  # fmt: skip
        out["documents"] = len(pairs)
        out["same_choice"] = 1 - len(out["differing"]) / len(pairs)
        flat = [(u, v) for _, _, x, y in pairs for u, v in zip(x, y)]
        out["log_likelihood"] = sum(abs(u - v) for u, v in flat) / max(sum(abs(u) for u, _ in flat), 1e-30)
    if "text" in first and "text" in other:
        out["text"] = other["text"]["nats_per_byte"] / first["text"]["nats_per_byte"] - 1
    return out


def _token_notes(first: Inputs, other: Inputs) -> list[str]:
    """Which requests and which part of the text the two models tokenize differently."""
    notes = []
    if unlike := [key for key in first.requests.keys() & other.requests.keys() if first.requests[key] != other.requests[key]]:
        context, continuation = min(unlike)
        notes.append(f"{len(unlike)} of {len(first.requests)} requests, such as {context[-40:] + continuation!r}")
    x, y = first.text, other.text
    if x and y and x != y:
        at = next((n for n, (u, v) in enumerate(zip(x, y)) if u != v), min(len(x), len(y)))
        notes.append(f"the text has {len(x)} and {len(y)} tokens, which differ from number {at} on")
    return notes


def doubts(models: list[dict]) -> Iterator[str]:
    """Reasons to doubt the losses on the text, a line each."""
    measured = [(m["model"], m["text"]) for m in models if "text" in m]
    for path, t in measured:
        if t["nats"] > NEAR_GUESSING * t["guessing"]:
            guess = f"the {t['guessing']:.2f} of guessing among its {t['vocabulary']} tokens"
            yield (f"{path}: its loss on the text, {t['nats']:.2f} nats, is close to {guess}: it is untrained or damaged, or its tokenizer "
                   "belongs to another model")  # fmt: skip
    for path, t in measured[1:]:
        ratio = measured[0][1]["bytes_per_token"] / t["bytes_per_token"]
        if max(ratio, 1 / ratio) >= SUSPICIOUS_RATIO:
            yield (f"{path} splits the text into {ratio:.2f} times as many tokens as {measured[0][0]}: one of the tokenizers may be wrong; "
                   "compare nats/byte, not nats/token")  # fmt: skip


def summary(report: dict) -> Iterator[str]:
    """The lines of the final table, and of the comparisons below it."""
    models = report["models"]
    short = [Path(m["model"]).name for m in models]
    columns = short if len(set(short)) == len(short) and all(short) else [m["model"] for m in models]
    rows = [*_task_rows(report), *_text_rows([m.get("text") for m in models])]
    if rows:
        yield from table(("task", "documents", "metric", *columns), rows, left=(0, 2))
    name = dict(zip((m["model"] for m in models), columns))
    for c in report["compared"]:
        parts = []
        if "same_choice" in c:
            same = c["documents"] - len(c["differing"])
            percent = 10000 * same // c["documents"] / 100  # rounded down: 100 % only if all are the same
            parts.append(f"the same choice in {same} of {c['documents']} documents ({percent:.2f} %), log-likelihoods "
                         f"{100 * c['log_likelihood']:.3f} % apart on average")  # fmt: skip
        if "text" in c:
            parts.append(f"loss on the text {100 * c['text']:+.3f} %" + " per byte" * ("tokens" in c))
        if "tokens" in c:
            parts.append(f"DIFFERENT TOKENS: {c['tokens']}")
        if parts:
            yield f"{name[c['model']]} against {name[c['with']]}: {'; '.join(parts)}"
        yield from _differing_rows(c.get("differing", []), name[c["with"]], name[c["model"]])


def _differing_rows(differing: list[dict], first: str, other: str) -> Iterator[str]:
    """The first documents with different answers: each model's choice, with its scores of this choice and of the other's."""
    if not differing:
        return
    yield f"different answers: {len(differing)}" + f"; the first {SHOWN}:" * (len(differing) > SHOWN)
    rows = []
    for d in differing[:SHOWN]:
        ours, theirs = d["choices"]
        scores = (f"{x[mine]:.3f} > {x[its]:.3f}" for x, mine, its in zip(d["scores"], (ours, theirs), (theirs, ours)))
        rows.append((d["task"], d["document"], *(f"{choice}: {text}" for choice, text in zip(d["choices"], scores))))
    yield from table(("task", "document", first, other), rows)


def _task_rows(report: dict) -> Iterator[tuple]:
    """A row for each task and metric, and the mean of the accuracies that all models have."""
    models, missing = report["models"], report["missing"]
    names = dict.fromkeys(n for m in models for n in m["tasks"])
    for name in names:
        found = [m["tasks"].get(name, {}) for m in models]
        metrics = dict.fromkeys(k for f in found for k, v in f.items() if isinstance(v, float) and "_stderr" not in k)
        for i, metric in enumerate(m for m in metrics if m != "seconds"):
            head = ("", "") if i else (name, next(f["documents"] for f in found if f))
            yield *head, metric, *(_figure(f, metric) for f in found)
    for name in missing:
        yield name, "no data", "", *("-" for _ in models)
    accuracies = [{n: t["acc"] for n, t in m["tasks"].items() if "acc" in t} for m in models]
    common = set.intersection(*(set(x) for x in accuracies if x)) if any(accuracies) else set()
    if len(common) > 1:
        asked = len({*missing, *names})
        label = f"mean of {len(common)}" + f" of {asked}" * (asked > len(common))
        yield label, "", "acc", *(_figure(_mean(m["tasks"], common), "acc") if x else "-" for m, x in zip(models, accuracies))


def _mean(tasks: dict[str, dict], names: set[str]) -> dict[str, Any]:
    """The mean accuracy of some tasks, and its standard error: that of independent estimates."""
    errors: list[Any] = [tasks[n].get("acc_stderr") for n in names]
    mean: dict[str, Any] = {"acc": sum(tasks[n]["acc"] for n in names) / len(names)}
    if all(isinstance(e, float) for e in errors):
        mean["acc_stderr"] = sum(e**2 for e in errors) ** 0.5 / len(names)
    return mean


def _text_rows(texts: list[dict | None]) -> Iterator[tuple]:
    if not any(texts):
        return
    counts = "/".join(dict.fromkeys(str(t["scored"]) for t in texts if t))
    head = ("text", f"{counts} tokens")
    for metric, key, form in (("nats/token", "nats", ".4f"), ("perplexity", "perplexity", ".3f"),
                              ("bytes/token", "bytes_per_token", ".3f"), ("nats/byte", "nats_per_byte", ".4f")):  # fmt: skip
        yield *head, metric, *(f"{t[key]:{form}}" if t else "-" for t in texts)
        head = ("", "")


def _figure(found: dict, metric: str) -> str:
    """A metric as text, with its standard error; accuracies in percent."""
    value, error = found.get(metric), found.get(f"{metric}_stderr")
    if value is None:
        return "-"
    if not metric.startswith(("acc", "exact_match")):
        return f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, float) else "")
    return f"{100 * value:.2f} %" + (f" ± {100 * error:.2f}" if isinstance(error, float) else "")
