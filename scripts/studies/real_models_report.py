"""What real_models.py reports: a table and a plot."""

import statistics
from pathlib import Path
from typing import Any

from quality_report import grid

OURS = ("TQ1_25", "STQ1_0")
WORST = 100  # times the best perplexity: the end of the plot's scale


def table(results: dict) -> str:
    """The results in Markdown."""
    rows, speeds = results["rows"], results["speeds"]
    text, names, wanted = rows[0]["text"], list(rows[0]["tasks"]), rows[0]["wanted"]
    about = (f"{results['model']}, WikiText-2 by {text['chunks']} chunks of {wanted['context']} tokens, {text['scored']} of "
             "them scored; embeddings in Q8_0 but for F16")  # fmt: skip
    if names:
        documents = f"the first {wanted['limit']} documents of each task" if wanted["limit"] else "all documents"
        about += f"; accuracies in percent with their standard errors, {documents}"
    if speeds:
        count = len(next(iter(speeds["rounds"].values()))["tg32"])
        about += (f"; tokens a second with {speeds['threads']} threads on {speeds['machine']}, the median of {count} rounds and in "
                  "brackets the slowest and the fastest")  # fmt: skip
    head = ["layers' weights", "bits", "MiB", "perplexity", "nats/token", *names, *(["decode", "prompt"] if speeds else [])]
    cells = []
    for row in rows:
        accuracies = [f"{100 * task['acc']:.1f} ± {100 * task['acc_stderr']:.1f}" for task in row["tasks"].values()]
        speed = [with_range(speeds["rounds"][row["label"]][test]) for test in ("tg32", "pp512")] if speeds else []
        perplexity = row["text"]["perplexity"]
        shown = f"{perplexity:.1f}" if perplexity < 1e4 else f"{perplexity:.1e}"
        size = f"{row['wanted']['bytes'] / (1 << 20):.0f}"
        cells.append([row["label"], f"{row['bits']:.3f}", size, shown, f"{row['text']['nats']:.3f}", *accuracies, *speed])
    return f"{about}.\n\n{grid(head, cells)}\n"


def with_range(rounds: list[float]) -> str:
    """The median, the slowest and the fastest, since the medians of files of one layout differ by hundreds of tokens a second."""
    return f"{statistics.median(rounds):.0f} ({min(rounds):.0f}–{max(rounds):.0f})"


def plot(results: dict, path: Path) -> None:
    """Perplexity against tokens a second, a point for each type. What is too bad for the scale stands at its upper edge."""
    import matplotlib

    matplotlib.use("Agg")  # it measures text
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "sherry-gguf"  # the same plot from the same results
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    best = min(row["text"]["perplexity"] for row in results["rows"])
    edge, placed = best * WORST, []
    axes.set(yscale="log", ylim=(best * 0.8, edge * 1.3), title=f"{results['model']}, {results['speeds']['machine']}",
             xlabel="tokens a second, generating", ylabel="perplexity on WikiText-2 (triangles: beyond the scale)")  # fmt: skip
    points = [(statistics.median(results["speeds"]["rounds"][row["label"]]["tg32"]), row) for row in results["rows"]]
    axes.set_xlim(min(speed for speed, _ in points) * 0.9, max(speed for speed, _ in points) * 1.15)
    axes.grid(alpha=0.3, which="both")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is placed stays there
    names = []
    for speed, row in sorted(points, key=lambda point: -point[1]["text"]["perplexity"]):
        perplexity = row["text"]["perplexity"]
        beyond, color = perplexity > edge, "tab:red" if row["label"].startswith(OURS) else "tab:gray"
        (mark,) = axes.plot(speed, min(perplexity, edge), "^" if beyond else "o", color=color)
        placed.append(mark.get_window_extent().padded(4))
        names.append((f"{row['label']}: {row['bits']:.2f} bits" + (f", {perplexity:.0e}" if beyond else ""), mark, color))
    for name, mark, color in names:
        place(axes, name, (mark.get_xdata()[0], mark.get_ydata()[0]), placed, color)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def place(axes: Any, name: str, point: tuple[float, float], placed: list, color: str) -> None:
    """Write a name beside its point, where it covers none that was `placed` before; with a line if that is further away."""
    from matplotlib.text import Text

    figure, inside = axes.figure, axes.get_window_extent()
    for distance in range(0, 400, 9):
        for x, y, side in (8, -3, "left"), (-8, -3, "right"):
            for step in {-distance, distance}:
                line = dict(arrowstyle="-", color=color, lw=0.5) if distance else None
                text = axes.annotate(
                    name, point, (x, y + step), textcoords="offset points", ha=side, fontsize=7.5, color=color, arrowprops=line
                )
                text.update_positions(figure.canvas.get_renderer())
                box = Text.get_window_extent(text, figure.canvas.get_renderer()).padded(1)  # without its line
                fits = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
                if fits and not any(box.overlaps(other) for other in placed):
                    placed.append(box)
                    return
                text.remove()
