"""The report of compare_finetuning.py: tables in Markdown, and a plot."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from finetune_runs import METHODS
from quality_report import grid, losses, paired, suffixed

from sherry_gguf import quaff
from sherry_gguf.report import counted

KINDS = [f"{kind}_proj" for kind in ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")]  # in the tables

BAR = 0.9  # hit rate that the Outlier Spatial Stability Hypothesis claims


def in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of layers as they follow each other in a block; those of other names at the end."""
    return sorted(kinds, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))


def report(results: dict, out: Path) -> None:
    """Write out.json, out.md and out.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixed(out, ".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(table(results), encoding="utf-8")
    plot(results, suffixed(out, ".png"))


def calibrated(channels: quaff.Channels, others: quaff.Channels) -> dict:
    """What was found: layers with channels, channels, and how many of them are also in `others`, by kind of layer."""
    kinds: dict[str, list[int]] = {}
    for name, found in channels.channels.items():
        row = kinds.setdefault(name.rpartition(".")[2], [0, 0, 0])
        row[0] += bool(len(found))
        row[1] += len(found)
        row[2] += len(set(found.tolist()) & set(others.channels[name].tolist()))
    return kinds


def table(results: dict) -> str:
    a = results["sizes"]
    return "\n\n".join([
        "# Fine-tuning by method",
        f"{results['model']}, LoRA of rank 16 on all linear layers but the head, on {results['machine']}. A step is {a['batch']} "
        f"questions of ARC-easy with the loss on the answers (nats per token), a run {a['steps']} steps. Losses are those of "
        f"{a['held_out']} held-out questions, after fine-tuning the mean and standard deviation over {counted(a['seeds'], 'seed')} that no "
        f"rate was swept with; the accuracy is lm-eval's on the first {a['test_questions']} test questions.",
        "## Loss and accuracy", *methods_part(results["methods"]),
        "## Errors of the layers", *errors_part(results["errors"]),
        "## Outlier channels", *outliers_part(results),
    ]) + "\n"  # fmt: skip


def spread(values: list[float], form: str = ".4f") -> str:
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def methods_part(rows: dict[str, dict]) -> list[str]:
    cells = []
    for m, row in rows.items():
        accuracies = [100 * x for x in row["acc"]]
        cells.append([
            METHODS[m].label, f"{row['lr']:g}{' (at the edge)' * row['open']}", f"{row['before']['report']:.4f}", spread(row["report"]),
            *(paired(row["report"], rows[other]["report"]) if other in rows else "" for other in ("full", "naive")),
            f"{100 * row['before']['acc']:.1f} %", f"{spread(accuracies, '.1f')} %"])  # fmt: skip
    head = ("method", "learning rate", "loss before", "after", "against full precision, same seed", "against naive int8", "accuracy before",
            "after")  # fmt: skip
    rates = sorted({float(lr) for row in rows.values() for lr in row["sweep"]})
    swept = []
    for m, row in rows.items():
        by_rate = {float(lr): loss for lr, loss in row["sweep"].items()}
        shown = {lr: losses([loss])[0] for lr, loss in by_rate.items()}
        swept.append([METHODS[m].label, *(f"**{shown[lr]}**" if lr == row["lr"] else shown.get(lr, "") for lr in rates)])
    return [grid(head, cells), "Learning rates, seed 0, on the questions for choices; the chosen ones in bold:",
            grid(["method", *(f"{lr:g}" for lr in rates)], swept)]  # fmt: skip


def share(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f} %"


def errors_part(errors: dict[str, dict[str, float]]) -> list[str]:
    kinds = in_order({kind: 0 for of_kind in errors.values() for kind in of_kind})
    rows = [[METHODS[m].label, *(share(of_kind.get(kind)) for kind in kinds)] for m, of_kind in errors.items()]
    return ["Relative errors of the layers' outputs before fine-tuning, on one batch of held-out questions with the inputs of full "
            "precision, root mean squares over layers; and of an adapter's first gradients:", grid(["method", *kinds], rows)]  # fmt: skip


def outliers_part(results: dict) -> list[str]:
    pairs, kinds = results["outliers"], in_order(next(iter(results["calibration"].values()))[0])
    found = []
    for i, (threshold, budget) in enumerate(pairs):
        for text, of_pair in results["calibration"].items():
            rows = [of_pair[i][k] for k in kinds]
            _, channels, both = map(sum, zip(*rows))
            found.append([f"{threshold:g}", share(budget), text, *(f"{n} in {layers}" for layers, n, _ in rows),
                          share(both / channels if channels else None)])  # fmt: skip
    hits, by_kind = [], []
    for m, of_pair in results["hits"].items():
        for (threshold, budget), hit in zip(pairs, of_pair):
            begin = [METHODS[m].label, f"{threshold:g}", share(budget)]
            steps = list(hit["steps"].values())
            hits.append([*begin, f"{hit['layers']} of {hit['of']}", f"{hit['fired']:.0f}", share(hit["elements"]), share(hit["channels"]),
                         share(steps[0]), share(steps[-1])])  # fmt: skip
            fired = hit["kinds_fired"]
            by_kind.append([*begin, *(f"{share(hit['kinds'][k])} ({fired[k]})" if fired[k] else "" for k in kinds)])
    hit_head = ("layers that fired", "channels that fired", "elements hit", "channels hit", "elements, first look", "last look")
    return [
        "An element of a layer's input fires where |x| is above the threshold times the mean of |x|. Calibration found these channels "
        "before fine-tuning, for each kind of layer. The last column is the share of them that calibration on questions finds too:",
        grid(("threshold", "budget", "calibrated on", *kinds, "also on questions"), found),
        "What fired while the adapters trained, in some of the steps; channels are the mean of these looks. The hit rates are the shares "
        "of elements and of channels that calibration on questions had found, over all layers:",
        grid(("method", "threshold", "budget", *hit_head), hits),
        "Elements hit by kind of layer, and how many layers fired:",
        grid(("method", "threshold", "budget", *kinds), by_kind),
    ]


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, hits = results["methods"], results["hits"]
    figure, (dots, depths, steps) = plt.subplots(1, 3, figsize=(15, 4.6))
    order = [m for m in rows if METHODS[m].base != "tq1_25"]  # whose losses would hide the differences of the others
    order.sort(key=lambda m: -statistics.mean(rows[m]["report"]))
    for y, m in enumerate(order):
        dots.plot(rows[m]["report"], [y] * len(rows[m]["report"]), "o", color=f"C{list(METHODS).index(m) % 10}", alpha=0.6)
        dots.plot(statistics.mean(rows[m]["report"]), y, "|", color=f"C{list(METHODS).index(m) % 10}", markersize=18, markeredgewidth=2)
    dots.set_yticks(range(len(order)), [METHODS[m].label for m in order])
    dots.set_xlabel("held-out loss after fine-tuning, nats per token (dots: seeds)")
    dots.set_title("int8, each method at its best learning rate")
    dots.grid(axis="x", alpha=0.3)
    if "quaff" in hits:
        for i, ((threshold, budget), hit) in enumerate(zip(results["outliers"], hits["quaff"])):
            label = f"{threshold:g} × mean, {100 * budget:g} % of the channels"
            for axis, by in (depths, "depths"), (steps, "steps"):
                known = [(int(k), 100 * x) for k, x in hit[by].items() if x is not None]
                axis.plot(*zip(*known) if known else ([], []), "o-", ms=3, lw=1.2, color=f"C{i}", label=label)
    for axis, name in (depths, "layer"), (steps, "step"):
        axis.axhline(100 * BAR, color="gray", lw=0.8, ls=":")
        axis.set_xlabel(name)
        axis.set_ylim(0, 102)
        axis.set_title(f"outliers in calibrated channels by {name}, %")
    steps.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
