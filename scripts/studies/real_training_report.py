"""The report of real_training.py: tables in Markdown, and a plot. It shows the runs that are done, however many these are."""

import contextlib
import json
import statistics
from pathlib import Path

import numpy as np
from quality_report import grid, paired
from real_training_files import COMPLETE
from real_training_runs import METHODS
from study_runs import ordered, suffixed

FURTHER = 8  # times the tokens: how far the plot extrapolates


def report(work: Path, out: Path) -> bool:
    """Write out.json, out.md and out.png; whether there was something to report."""
    path, results = work / "runs.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a line that an interruption cut off; that run is repeated
            results.append(json.loads(line))
    if not results:
        return False
    figures = json.loads((work / COMPLETE).read_text())
    shown = {shape: best(rows) for shape, rows in by_shape(results).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixed(out, ".json").write_text(json.dumps({"prepared": figures, "runs": results}, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(
        "\n\n".join([title(figures), *(table(results, *item) for item in shown.items())]) + "\n", encoding="utf-8"
    )
    plot(shown, suffixed(out, ".png"))
    return True


def by_shape(results: list[dict]) -> dict[tuple, list[dict]]:
    """Results that can be compared: those of one granularity, and of as many steps, sequences and tokens."""
    found: dict[tuple, list[dict]] = {}
    for result in results:
        run = result["run"]
        found.setdefault((run["granularity"], run["steps"], run["batch"], run["context"]), []).append(result)
    return found


def best(rows: list[dict]) -> dict[str, list[dict]]:
    """For each method its results at the best rate, which seed 0 chose: the other seeds', or that one's while there are none."""
    found = {}
    for method in METHODS:
        mine = [row for row in rows if row["run"]["method"] == method]
        seeded = [row for row in mine if row["run"]["seed"]]
        if not mine:
            continue
        groups: dict[float, list[dict]] = {}
        for row in seeded or mine:
            groups.setdefault(row["run"]["lr"], []).append(row)
        found[method] = min(groups.values(), key=lambda group: (-len(group), statistics.mean(ordered(row["choice"]) for row in group)))
    return found


def title(figures: dict) -> str:
    return (f"{figures['model']}, trained from its full-precision weights with each method; {figures['parameters'] / 1e6:.0f} M parameters "
            f"in the vocabulary of {figures['vocabulary']} tokens that text and tasks use. Held-out loss in nats a token: mean over the "
            "seeds, and their standard deviation. Accuracies in percent, with the standard error of one seed's.")  # fmt: skip


def table(results: list[dict], shape: tuple, methods: dict[str, list[dict]]) -> str:
    granularity, steps, batch, context = shape
    mine = [row for row in results if by_shape([row]).keys() == {shape}]
    names = sorted({name for rows in methods.values() for row in rows for look in row["tasks"][-1:] for name in look if name != "tokens"})
    lines = []
    for method, rows in sorted(methods.items(), key=lambda item: statistics.mean(ordered(row["report"]) for row in item[1])):
        losses = [row["report"] for row in rows]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        others = [f"{other}-teacher" if method.endswith("-teacher") else other for other in ("absmean", "sherry")]
        against = [paired(*same_seeds(rows, methods.get(other, []))) if other != method else "" for other in others]
        rate = rows[0]["run"]["lr"]
        swept = {row["run"]["lr"] for row in mine if row["run"]["method"] == method and not row["run"]["seed"]}
        edge = " (at the edge)" * (rate in (min(swept, default=0), max(swept, default=0)))
        lines.append([METHODS[method][0], f"{rate:g}{edge}", f"{statistics.mean(losses):.4f}{spread}",
                      str(len(rows)) if rows[0]["run"]["seed"] else "rates only", *against,
                      *(accuracies([row["tasks"][-1][name] for row in rows if row["tasks"]]) for name in names)])  # fmt: skip
    machines = ", ".join(sorted({row["machine"] for row in mine}))
    minutes = sum(row["seconds"] for row in mine) / 60
    text = (f"**{steps * batch * context / 1e6:.2f} M tokens** ({steps} steps of {batch} x {context}), "
            f"{'groups of 128 or 64' if granularity == 'per_group' else 'a scale for each row'}; {machines}, {minutes:.0f} minutes for all "
            "runs.")  # fmt: skip
    if "sherry" in methods:
        text += f" Sherry's loss before the first step: {methods['sherry'][0]['before']:.3f}."
    head = ["method", "learning rate", "held-out loss", "seeds", "against absmean, same seed", "against Sherry", *names]
    return f"{text}\n\n{grid(head, lines)}"


def same_seeds(rows: list[dict], others: list[dict]) -> tuple[list[float], list[float]]:
    """The losses of the seeds that both have; two equal lists if there are none."""
    theirs = {row["run"]["seed"]: row["report"] for row in others}
    mine = {row["run"]["seed"]: row["report"] for row in rows}
    seeds = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def accuracies(found: list[dict]) -> str:
    if not found:
        return ""
    return f"{100 * statistics.mean(x['acc'] for x in found):.1f} ± {100 * found[0]['acc_stderr']:.1f}"


def plot(shown: dict[tuple, dict[str, list[dict]]], path: Path) -> None:
    """A line for each method and length: its held-out losses. Dotted: a straight line through the ends of runs of several lengths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({(granularity, batch, context) for granularity, _, batch, context in shown})
    figure, axes = plt.subplots(1, len(kinds), figsize=(9 * len(kinds), 5.5), squeeze=False, layout="constrained")
    colors = dict(zip(METHODS, plt.get_cmap("tab20").colors))
    for (granularity, batch, context), axis in zip(kinds, axes[0]):
        ends: dict[str, list[tuple[float, float]]] = {}
        for _, methods in sorted(item for item in shown.items() if (item[0][0], *item[0][2:]) == (granularity, batch, context)):
            for method, rows in methods.items():
                losses = np.array([[look["loss"] for look in row["curve"] if look["tokens"]] for row in rows])
                tokens = np.array([look["tokens"] / 1e6 for look in rows[0]["curve"] if look["tokens"]])
                label = METHODS[method][0] if method not in ends else None
                axis.plot(tokens, losses.mean(0), color=colors[method], label=label)
                axis.fill_between(tokens, losses.min(0), losses.max(0), color=colors[method], alpha=0.2, lw=0)
                ends.setdefault(method, []).append((tokens[-1], losses.mean(0)[-1]))
        several = {method: np.array(found).T for method, found in ends.items() if len(found) > 1}
        for method, (tokens, losses) in several.items():
            slope, offset = np.polyfit(np.log(tokens), losses, 1)
            further = np.array([tokens[-1], tokens[-1] * FURTHER])
            axis.plot(further, slope * np.log(further) + offset, ":", color=colors[method], lw=1)
        dotted = " (dotted: extrapolated from the ends of shorter and longer runs)" * bool(several)
        axis.set(xscale="log", xlabel=f"tokens seen, millions{dotted}", ylabel="held-out loss, nats a token",
                 title=f"{granularity.replace('_', ' ')}, steps of {batch} x {context}")  # fmt: skip
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
