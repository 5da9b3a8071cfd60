"""Draw README's chart: how fast one model generates and reads, by type.

.venv/bin/python scripts/bench/chart.py scripts/results/llama-1b.json docs/speed.svg
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from model_files import OURS, type_of

TITLES = {"tg": "Generating", "pp": "Reading a prompt"}


def rates(report: dict, kind: str) -> dict[str, float]:
    """Median tokens a second by type, the fastest first; `kind` is "tg" or "pp".

    Of several tests the first counts. Tests in a filled context are left out. So are rows without repacking, of the build before, or of one
    of several types of embeddings.
    """
    entries = [e for e in report["speed"] if e["kind"] == kind and not e["depth"] and e["type"] == type_of(e["type"])]
    medians = {e["type"]: statistics.median(e["rates"]) for e in reversed(entries)}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def draw(report: dict, path: Path) -> None:
    """Write the chart of a report of scripts/bench/models.py with one model; the same report gives the same file."""
    (model,) = report["models"].values()
    bits = {name: facts["bits_per_weight"] for name, facts in model["types"].items()}
    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, 2), TITLES.items()):
        bars = rates(report, kind)
        for y, (name, rate) in enumerate(bars.items()):
            weight = "bold" if name == OURS else "normal"
            axis.barh(y, rate, color="#c8102e" if name == OURS else "#8a8f98")
            axis.text(rate, y, f" {rate:.0f}", va="center", weight=weight)
        axis.set_yticks(range(len(bars)), [f"{name}, {bits[name]:.4g} bits" for name in bars])
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.margins(x=0.12)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{title}, tokens a second", fontsize=11, loc="left")
    figure.suptitle(f"{model['name']}'s shape on {report['cpu']}", fontsize=11)
    with matplotlib.rc_context({"svg.hashsalt": "sherry-gguf", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, metavar="REPORT", help="JSON that scripts/bench/models.py wrote")
    parser.add_argument("chart", type=Path, metavar="CHART", help="SVG or PNG to write")
    arguments = parser.parse_args()
    draw(json.loads(arguments.report.read_text()), arguments.chart)
