"""The report of compare_quality.py: tables in Markdown, and a plot."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from quality_runs import METHODS, arenas_text
from study_runs import TIE, ordered, suffixed


def report(results: dict, out: Path) -> None:
    """Write out.json, out.md and out.png."""
    out.parent.mkdir(parents=True, exist_ok=True)
    suffixed(out, ".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    suffixed(out, ".md").write_text(table(results), encoding="utf-8")
    plot(results, suffixed(out, ".png"))


def table(results: dict) -> str:
    a = results["sizes"]
    parts = [
        "# Held-out loss by method",
        f"{results['parameters'] / 1e6:.1f} M parameters ({a['layers']} layers, hidden size {a['hidden']}, vocabulary of {a['vocab']} "
        f"tokens), {results['tokens'] / 1e6:.1f} M tokens of Python source ({results['corpus']}), {results['machine']}. A step is "
        f"{a['batch']} x {a['context']} tokens. Loss in nats per token, on {results['held_out']} held-out tokens; mean and standard "
        f"deviation over {a['seeds']} seeds that no rate was swept with. This deviation comes from training alone; the half for choices "
        "shows how much the differences depend on the text.",
    ]
    for setting, r in results["settings"].items():
        begin = (f"from a full-precision model of {a['base_steps']} steps of {a['base_batch']} x {a['context']} tokens "
                 f"(loss {results['base']['report']:.4f})" if setting == "pretrained" else "from scratch")  # fmt: skip
        parts.append(f"## {setting}: {a['steps']} steps {begin}")
        if setting == "pretrained":
            parts.append(f"Quantized by Sparse-AbsMean without any training, it has a loss of {r['before']:.4f}.")
        parts += methods_part(r) + rates_part(r) + ties_part(r, a["seeds"]) + arenas_part(r) + state_part(r) + lengths_part(r)
    return "\n\n".join(parts) + "\n"


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]])


def named(method: str, settings: dict) -> str:
    return METHODS[method] + (f" ({arenas_text(settings)})" if method == "arenas" else "")


def losses(values: Iterable[float]) -> list[str]:
    return [f"{x:.4f}" for x in values]


def methods_part(r: dict) -> list[str]:
    means = {m: ordered(statistics.mean(row["losses"])) for m, row in r["methods"].items()}
    rows = []
    for m in sorted(means, key=means.__getitem__):
        row = r["methods"][m]
        deviation = f" ± {statistics.stdev(row['losses']):.4f}" if len(row["losses"]) > 1 else ""
        rows.append([
            named(m, row["arenas"]), f"{row['lr']:g}{' (at the edge)' * row['open']}", f"{statistics.mean(row['losses']):.4f}{deviation}",
            *(paired(row["losses"], r["methods"][other]["losses"]) for other in ("absmean", "sherry")),
            f"{statistics.mean(row['choices']):.4f}", ", ".join(losses(row["losses"]))])  # fmt: skip
    head = ("method", "learning rate", "held-out loss", "against absmean, same seed", "against Sherry without Arenas",
            "on the half for choices", "each seed")  # fmt: skip
    parts = [grid(head, rows)]
    if "full" in means and (ahead := [METHODS[m] for m in means if means[m] < means["full"]]):
        parts.append("**The training is too short**: full precision, which can do everything the others can, is behind "
                     f"({', '.join(ahead)}). Use more --steps before you draw conclusions.")  # fmt: skip
    return parts


def rates_part(r: dict) -> list[str]:
    rates = sorted({float(lr) for row in r["methods"].values() for lr in row["sweep"]})
    rows = []
    for m, row in r["methods"].items():
        cells = [row["sweep"].get(f"{lr:g}") for lr in rates]
        best = row["sweep"][f"{row['lr']:g}"]
        rows.append([METHODS[m], *("" if x is None else f"**{x:.4f}**" if x == best else f"{x:.4f}" for x in cells)])
    return ["Learning rates, seed 0, on the half of the text that is for choices; the chosen ones in bold:",
            grid(["method", *(f"{lr:g}" for lr in rates)], rows)]  # fmt: skip


def ties_part(r: dict, seeds: int) -> list[str]:
    rows = [[named(m, x["arenas"]), f"{x['lr']:g}", *losses((statistics.mean(x["choice"]), statistics.mean(x["report"])))]
            for m, row in r["methods"].items() if len(row["led"]) > 1 for x in row["led"]]  # fmt: skip
    if not rows:
        return []
    return [f"Where a second choice came within {TIE:.1%}, both were trained with seeds 1 to {seeds}; means on the half for choices, "
            "which decides, and on the other:", grid(("method", "learning rate", "for choices", "reported"), rows)]  # fmt: skip


def arenas_part(r: dict) -> list[str]:
    rates = [f"{lr:g}" for lr in r["explored_rates"]]
    none = min(map(ordered, r["without"]))
    rows = [["none", *losses(r["without"]), ""]]
    rows += [[arenas_text(row["arenas"]), *losses(row["losses"]), f"{min(map(ordered, row['losses'])) / none - 1:+.2%}"]
             for row in r["explored"]]  # fmt: skip
    return ["Arenas' settings, seed 0, by their differences from the published ones (peak 1, warmup 0.1, cosine, end 1), best first; each "
            f"at {' and '.join(rates)}:", grid(["settings", *rates, "best, against none"], rows)]  # fmt: skip


def state_part(r: dict) -> list[str]:
    rows = []
    for m, row in r["methods"].items():
        if state := state_of(row["curve"]):
            near = f"{state['near_zeroing']:.1%}" if "near_zeroing" in state else ""
            rows.append([METHODS[m], f"{state['gradient_rank']:.1f}", f"{state['activation_rank']:.1f}", f"{state['flips']:.3%}",
                         f"{state['near_sign']:.1%}", near])  # fmt: skip
    return ["State of training, seed 1, mean of the looks in the second and third quarter: effective ranks of the gradients and of the "
            "layers' inputs, ternary values that a step changes, latent weights within a tenth of the scale of 0, groups equally close to "
            "another choice of their zero:",
            grid(("method", "gradient rank", "input rank", "changed by a step", "near 0", "near another zero"), rows)]  # fmt: skip


def lengths_part(r: dict) -> list[str]:
    rows = []
    for steps, of_length in r["lengths"].items():
        cell = {m: f"{x['loss']:.4f} ({x['lr']:g}{', at the edge' * x['open']})" for m, x in of_length.items()}
        against = {m: f"{x['loss'] / of_length['sherry']['loss'] - 1:+.2%}" for m, x in of_length.items()}
        rows.append([str(steps), cell["sherry"], cell["arenas"], against["arenas"], cell["arenas-published"], against["arenas-published"]])
    return ["Shorter and longer runs, seed 1, each at its best learning rate (in brackets; swept for that length):",
            grid(("steps", "without Arenas", "with", "against without", "as published", "against without"), rows)]  # fmt: skip


def state_of(curve: list[dict]) -> dict[str, float]:
    """The monitor's figures, averaged over the second and third quarter of its looks; {} if it did not look."""
    looks = [entry for entry in curve if "gradient_rank" in entry]
    looks = looks[len(looks) // 4 : -(len(looks) // 4) or None]
    keys = set.intersection(*map(set, looks)) if looks else ()
    return {key: statistics.mean(entry[key] for entry in looks) for key in keys}


def paired(losses: list[float], others: list[float]) -> str:
    """The mean of the relative differences at the same seed, and its standard error."""
    if losses == others:
        return ""
    differences = [a / b - 1 for a, b in zip(losses, others)]
    error = f" ± {100 * statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    return f"{100 * statistics.mean(differences):+.2f}{error} %"


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = results["settings"]
    color = dict(zip(METHODS, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(len(settings), 3, figsize=(15, 4.4 * len(settings)), squeeze=False)
    for (setting, r), (dots, curves, state) in zip(settings.items(), axes):
        order = sorted(r["methods"], key=lambda m: -ordered(statistics.mean(r["methods"][m]["losses"])))
        for y, m in enumerate(order):
            losses = r["methods"][m]["losses"]
            dots.plot(losses, [y] * len(losses), "o", color=color[m], alpha=0.6)
            dots.plot(statistics.mean(losses), y, "|", color=color[m], markersize=18, markeredgewidth=2)
        dots.set_yticks(range(len(order)), [METHODS[m] for m in order])
        for label, m in zip(dots.get_yticklabels(), order):  # the legend of the curves too
            label.set_color(color[m])
        dots.set_xlabel("held-out loss, nats per token (dots: seeds)")
        dots.set_title(f"{setting}, each at its best learning rate")
        dots.grid(axis="x", alpha=0.3)
        for m, row in r["methods"].items():
            curve = row["curve"][len(row["curve"]) // 8 :]
            curves.plot([c["step"] for c in curve], [c["loss"] for c in curve], color=color[m], lw=1.2)
        curves.set_xlabel("step")
        curves.set_title("training loss, seed 1, colors as on the left")
        second = state.twinx()
        for m in "sherry", "arenas", "arenas-published":
            looks = [c for c in r["methods"][m]["curve"] if "gradient_rank" in c]
            steps = [c["step"] for c in looks]
            state.plot(steps, [c["gradient_rank"] for c in looks], color=color[m], lw=1.4, label=METHODS[m])
            second.plot(steps, [100 * c["flips"] for c in looks], color=color[m], lw=1, ls=":")
        state.set_xlabel("step")
        state.set_ylabel("effective rank of gradients (lines)")
        second.set_ylabel("ternary values changed by a step, % (dots)")
        second.set_yscale("log")
        state.set_title("state of training, seed 1")
        state.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
