"""The report of real_training.py: tables in Markdown, and a plot. It shows the runs that are done, however many these are."""

import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from quality_report import grid, paired
from real_training_files import COMPLETE
from real_training_runs import METHODS
from study_runs import RUNS, SETTINGS, ordered, suffixed

FURTHER = 8  # times the tokens: how far the plot extrapolates


def report(work: Path, out: Path) -> list[str]:
    """Write out.md, out.json and, if matplotlib is there, out.png; returns their suffixes, none if there is nothing to report."""
    path, results = work / RUNS, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a line that an interruption cut off; that run is repeated
            results.append(json.loads(line))
    if not results:
        return []
    figures = json.loads((work / COMPLETE).read_text())
    shown = {shape: best(rows) for shape, rows in by_shape(results).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = {"prepared": figures, "settings": json.loads((work / SETTINGS).read_text()), "runs": results}
    suffixed(out, ".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(
        "\n\n".join([title(figures), *(table(results, *item) for item in shown.items())]) + "\n", encoding="utf-8"
    )
    try:
        plot(shown, suffixed(out, ".png"))
    except ImportError:  # a machine that only trains may lack it
        print("no plot: matplotlib is not installed here")
        return [".md", ".json"]
    return [".md", ".json", ".png"]


def by_shape(results: list[dict]) -> dict[tuple, list[dict]]:
    """Results that can be compared: those of one granularity, and of as many steps, sequences and tokens."""
    found: dict[tuple, list[dict]] = {}
    for result in results:
        run = result["run"]
        found.setdefault((run["granularity"], run["steps"], run["batch"], run["context"]), []).append(result)
    return found


def best(rows: list[dict]) -> dict[str, list[dict]]:
    """For each method its results at one rate: seed 0's in the sweep while there are no others, then the reported seeds'.

    These may have trained at several leading rates: of the rates with the most seeds, the one with the lowest mean loss for choices.
    """
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
    return (f"{figures['model']}, trained with each method from the same weights; {figures['parameters'] / 1e6:.0f} M parameters "
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
    beside = " or ".join(f"{jobs} at a time, with {threads} thread{'s' * (threads > 1)} each"
                         for jobs, threads in sorted({(row["jobs"], row["threads"]) for row in mine}))  # fmt: skip
    text = (f"**{steps * batch * context / 1e6:.2f} M tokens** ({steps} steps of {batch} x {context}), "
            f"{'groups of 128 or 64' if granularity == 'per_group' else 'a scale for each row'}; {machines}. {len(mine)} runs took "
            f"{minutes / len(mine):.0f} minutes each, {beside}.")  # fmt: skip
    before = next((row["before"] for row in methods.get("sherry", []) if row["before"] is not None), None)
    if before is not None:
        text += f" Sherry's loss before the first step: {before:.3f}."
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
    """A column for each kind of training: held-out losses and, below if a run looked at the tasks on its way, accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({(granularity, batch, context) for granularity, _, batch, context in shown})
    looked = any(len(looks(row)) > 1 for methods in shown.values() for rows in methods.values() for row in rows)
    height = 1 + looked
    figure, axes = plt.subplots(height, len(kinds), figsize=(9 * len(kinds), 5.5 * height), squeeze=False, layout="constrained")
    shades = matplotlib.color_sequences["tab20"]  # dark ones and their light ones in turn
    colors = dict(zip(METHODS, [*shades[::2], *shades[1::2]]))
    for (granularity, batch, context), column in zip(kinds, axes.T):
        lengths = [shown[shape] for shape in sorted(shown) if (shape[0], *shape[2:]) == (granularity, batch, context)]
        plot_losses(column[0], lengths, colors)
        column[0].set_title(f"{granularity.replace('_', ' ')}, steps of {batch} x {context}")
        if looked:
            plot_accuracies(column[1], lengths, colors)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_losses(axis: Any, lengths: list[dict[str, list[dict]]], colors: dict) -> None:
    """A line for each method and length: its held-out losses. Dotted: a straight line through the ends of runs of several lengths."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for methods in lengths:
        for method, rows in methods.items():
            losses = np.array([[look["loss"] for look in row["curve"] if look["tokens"]] for row in rows])
            tokens = np.array([look["tokens"] / 1e6 for look in rows[0]["curve"] if look["tokens"]])
            band(axis, tokens, losses, colors[method], METHODS[method][0] if method not in ends else None)
            axis.plot(tokens[-1], losses.mean(0)[-1], "o", ms=3, color=colors[method])  # all there is of a sweep
            ends.setdefault(method, []).append((tokens[-1], losses.mean(0)[-1]))
    several = {method: np.array(found).T for method, found in ends.items() if len(found) > 1}
    for method, (tokens, losses) in several.items():
        slope, offset = np.polyfit(np.log(tokens), losses, 1)
        further = np.array([tokens[-1], tokens[-1] * FURTHER])
        axis.plot(further, slope * np.log(further) + offset, ":", color=colors[method], lw=1)
    dotted = " (dotted: extrapolated from the ends of shorter and longer runs)" * bool(several)
    axis.set(xscale="log", xlabel=f"tokens seen, millions{dotted}", ylabel="held-out loss, nats a token")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def plot_accuracies(axis: Any, lengths: list[dict[str, list[dict]]], colors: dict) -> None:
    """A line for each method and length: its mean accuracy over the tasks, from before its first step on."""
    drawn: set[str] = set()
    for methods in lengths:
        for method, rows in methods.items():
            if found := [seen for row in rows if len(seen := looks(row)) > 1]:
                points = np.array(found)  # (seeds, looks, 3)
                x, y, error = points[0, :, 0], points[:, :, 1], points[:, :, 2].mean(0)  # all seeds answer the same documents
                band(axis, x, y, colors[method], METHODS[method][0] if method not in drawn else None)
                axis.vlines(x, y.mean(0) - error, y.mean(0) + error, colors=colors[method], lw=1)
                drawn.add(method)
    if not drawn:
        axis.set_axis_off()
        return
    axis.set(xlabel="tokens seen, millions", ylabel="accuracy in percent, mean over the tasks, with its standard error")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def looks(row: dict) -> list[tuple[float, float, float]]:
    """A run's looks at the tasks: millions of tokens seen, the mean accuracy over the tasks and its standard error in percent."""
    seen = []
    for look in row["tasks"]:
        if found := [task for name, task in look.items() if name != "tokens"]:
            error = sum(task["acc_stderr"] ** 2 for task in found) ** 0.5 / len(found)
            seen.append((look["tokens"] / 1e6, 100 * statistics.mean(task["acc"] for task in found), 100 * error))
    return seen


def band(axis: Any, x: np.ndarray, ys: np.ndarray, color: Any, label: str | None) -> None:
    """A line of the mean over seeds, ys (seeds, n), and the range between them."""
    axis.plot(x, ys.mean(0), color=color, label=label)
    axis.fill_between(x, ys.min(0), ys.max(0), color=color, alpha=0.2, lw=0)
