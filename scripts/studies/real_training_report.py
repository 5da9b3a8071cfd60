"""The report of real_training.py: tables in Markdown, and a plot. It shows the runs that are done, however many these are."""

import json
import statistics
from pathlib import Path

import numpy as np
from quality_report import grid, paired
from real_training_files import COMPLETE
from real_training_runs import METHODS
from study_runs import ordered, suffixed

from sherry_gguf.errors import Stop

FURTHER = 8  # times the tokens: how far the plot extrapolates


def report(work: Path, out: Path) -> None:
    """Write out.json, out.md and out.png. Raises Stop."""
    path = work / "runs.jsonl"
    if not path.is_file() or not (results := [json.loads(line) for line in path.read_text().splitlines()]):
        raise Stop(f"no run is complete in {work}")
    figures = json.loads((work / COMPLETE).read_text())
    shown = {shape: best(rows) for shape, rows in by_shape(results).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixed(out, ".json").write_text(json.dumps({"prepared": figures, "runs": results}, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(
        "\n\n".join([title(figures), *(table(results, *item) for item in shown.items())]) + "\n", encoding="utf-8"
    )
    plot(shown, suffixed(out, ".png"))


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
    names = sorted({name for rows in methods.values() for row in rows for name in row["tasks"]})
    lines = []
    for method, rows in sorted(methods.items(), key=lambda item: statistics.mean(ordered(row["report"]) for row in item[1])):
        losses = [row["report"] for row in rows]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        against = [paired(*same_seeds(rows, methods.get(other, []))) if other != method else "" for other in ("absmean", "sherry")]
        lines.append([METHODS[method][0], f"{rows[0]['run']['lr']:g}", f"{statistics.mean(losses):.4f}{spread}",
                      str(len(rows)) if rows[0]["run"]["seed"] else "rates only", *against,
                      *(accuracies([row["tasks"][name] for row in rows if name in row["tasks"]]) for name in names)])  # fmt: skip
    before = methods.get("sherry", next(iter(methods.values())))[0]["before"]
    machines = ", ".join(sorted({row["machine"] for rows in methods.values() for row in rows}))
    minutes = sum(row["seconds"] for row in results if by_shape([row]).keys() == {shape}) / 60
    text = (f"**{steps * batch * context / 1e6:.2f} M tokens** ({steps} steps of {batch} x {context}), "
            f"{'groups of 128 or 64' if granularity == 'per_group' else 'a scale for each row'}; {machines}, {minutes:.0f} minutes for all "
            f"runs. Sherry's loss before the first step: {before:.3f}.")  # fmt: skip
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(shown), figsize=(9 * len(shown), 5.5), squeeze=False, layout="constrained")
    colors = dict(zip(METHODS, plt.get_cmap("tab10").colors))
    for (shape, methods), axis in zip(shown.items(), axes[0]):
        for method, rows in methods.items():
            curves = [[(look["tokens"] / 1e6, look["loss"]) for look in row["curve"] if look["tokens"]] for row in rows]
            length = min(map(len, curves))
            tokens = np.array([x for x, _ in curves[0][:length]])
            losses = np.array([[y for _, y in curve[:length]] for curve in curves])
            mean = losses.mean(0)
            axis.plot(tokens, mean, color=colors[method], label=METHODS[method][0])
            axis.fill_between(tokens, losses.min(0), losses.max(0), color=colors[method], alpha=0.2, lw=0)
            if length >= 4:
                half = length // 2
                slope, offset = np.polyfit(np.log(tokens[half:]), mean[half:], 1)
                further = np.array([tokens[-1], tokens[-1] * FURTHER])
                axis.plot(further, slope * np.log(further) + offset, ":", color=colors[method], lw=1)
        granularity, steps, batch, context = shape
        axis.set(xscale="log", xlabel="tokens seen, millions (dotted: extrapolated, a straight line through the second half)",
                 ylabel="held-out loss, nats a token",
                 title=f"{granularity.replace('_', ' ')}, {steps} steps of {batch} x {context}")  # fmt: skip
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
