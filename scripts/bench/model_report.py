"""What scripts/bench/models.py measured, as tables and bars."""

import statistics
from pathlib import Path

from model_files import EMBEDDINGS, OURS, PLAIN, base, type_of

from sherry_gguf.bench import median_ratio, number
from sherry_gguf.report import counted, markdown_table

SAME = ("model", "type", "threads", "test")  # what identifies an entry of a report's "speed"


def summarize(report: dict) -> None:
    """Add medians, ratios and shares to a report."""
    report["bandwidth_median"] = {t: statistics.median(r) for t, r in report["bandwidth"].items() if r}
    report["bandwidth_maximum"] = {t: max(r) for t, r in report["bandwidth"].items() if r}
    by_key = {tuple(entry[k] for k in SAME): entry for entry in report["speed"]}
    for entry in report["speed"]:
        rates = entry["rates"]
        ours, reference = (
            by_key.get((entry["model"], label, entry["threads"], entry["test"]))
            for label in (ours_like(entry["type"]), entry.get("reference"))
        )
        entry["median"] = statistics.median(rates) if rates else None
        entry["ours_ratio"] = median_ratio(ours["rates"], rates) if ours else None
        entry["reference_ratio"] = median_ratio(rates, reference["rates"]) if reference else None
        if entry["kind"] == "tg" and rates:
            size = report["models"][entry["model"]]["types"][base(entry["type"])]["bytes_per_token"] + entry.get("cache_bytes", 0)
            limit = report["bandwidth_median"].get(str(entry["threads"]))
            entry["gb_per_s"] = size * entry["median"] / 1e9
            entry["limit"] = limit * 1e9 / size if limit else None  # tokens a second
            entry["of_limit"] = entry["gb_per_s"] / limit if limit else None
    for entry in report["load"]:
        for what in ("load", "token"):
            for unit in ("seconds", "anon", "file", "peak"):
                values = [r[what][unit] for r in entry["rounds"]]
                entry[f"{what}_{unit}"] = statistics.median(values) if values else None


def ours_like(label: str) -> str:
    """Our type with the same embeddings, in this build."""
    return OURS + "".join(base(label).partition(EMBEDDINGS)[1:])


def has_peers(entries: list[dict]) -> bool:
    """Whether some rows are to be compared with ours, which was measured."""
    types = {e["type"] for e in entries}
    return any(label != ours_like(label) in types for label in types)


def shown(label: str) -> str:
    kind, _, embeddings = base(label).partition(EMBEDDINGS)
    return kind + f", {embeddings} embeddings" * bool(embeddings) + label.removeprefix(base(label)).replace("-", " ")


def markdown(report: dict) -> str:
    """A summarized report as tables."""
    vocabulary = "the models' own vocabularies" if report["vocab"] == "real" else f"a vocabulary of {report['vocab']}"
    intro = (
        f"{report['cpu']}; llama.cpp {report['llama_cpp']}; {report['date']}. Random weights, {vocabulary}, tied embeddings in "
        f"{report['embeddings']}. llama-bench runs the types in turn; medians of {report['rounds']} rounds, in tokens a second. "
        "pp: read a prompt; tg: generate."
    )
    if any("@" in e["test"] for e in report["speed"]):
        intro += " @ d: after so many tokens."
    if report["isa"]:
        intro += f" {OURS}'s kernels: SHERRY_ISA={report['isa']}."
    if not report["complete"]:
        intro += " **Ended early: some rounds are missing.**"
    legend = (
        'Ratios are medians of the rounds\' ratios. "GB/s": generating reads every weight and the keys and values of the context for every '
        'token. "of limit": GB/s as a share of the memory bandwidth:'
    )
    if has_peers(report["speed"]):
        legend = f"\"{OURS} ×\": {OURS}'s rate over the row's. {legend}"
    if reference := report.get("reference"):
        what = "--against's build" if reference == "before" else f"the same type with {reference}"
        legend = f'"× {reference}": the row\'s rate over that of {what}. {legend}'
    out = ["# Whole models", "", intro, "", legend, ""]
    for threads, rate in report["bandwidth_median"].items():
        rounds, highest = len(report["bandwidth"][threads]), report["bandwidth_maximum"][threads]
        out.append(f"* {counted(int(threads), 'thread')}: {rate:.1f} GB/s, the median of {rounds} rounds (highest {highest:.1f})")
    for key, model in report["models"].items():
        size = f"{model['parameters'] / 1e6:,.0f} M parameters: {model['layers']} layers, hidden {model['hidden']}"
        size += f", a vocabulary of {model['vocab']}" if report["vocab"] == "real" else ""
        heads = f"{model['heads']} heads of {model['head_dim']}, {model['kv_heads']} for keys and values"
        out += ["", f"## {model['name']}", "", f"{size}, feed-forward {model['ffn']}, {heads}."]
        entries = [e for e in report["speed"] if e["model"] == key]
        for threads in dict.fromkeys(e["threads"] for e in entries):
            out += speed_table(model, [e for e in entries if e["threads"] == threads], threads, reference)
        out += load_table([e for e in report["load"] if e["model"] == key])
    return "\n".join(out) + "\n"


def fallen_back(file: dict, label: str) -> dict[str, float]:
    """The types that store block weights in place of the wanted one, and their shares."""
    return {name: share for name, share in file["stored"].items() if name != type_of(label)}


def speed_table(model: dict, entries: list[dict], threads: int, reference: str | None) -> list[str]:
    """One model's rates with this number of threads: a row for each type, and footnotes. For `reference`, see the report's legend."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f" [{notes.index(text) + 1}]"

    tests = list(dict.fromkeys(e["test"] for e in entries))
    cells = {(e["type"], e["test"]): e for e in entries}
    peers = has_peers(entries)
    outputs = any(EMBEDDINGS in e["type"] for e in entries)
    head = ["type", "bits/weight", "MiB", *["output matrix", "of the bytes"] * outputs]
    for test in tests:
        e = next(e for e in entries if e["test"] == test)
        head += [
            f"{e['common']} t/s",
            *[f"{OURS} ×"] * peers,
            *[f"× {reference}"] * bool(reference),
            *["GB/s", "of limit"] * (e["kind"] == "tg"),
        ]
    body = []
    for label in dict.fromkeys(e["type"] for e in entries):
        file = model["types"][base(label)]
        others = fallen_back(file, label)
        kept = " and ".join(f"{100 * share:.0f} % of the block weights are {name}" for name, share in others.items())
        rows = " and ".join(map(str, file["kept_rows"]))
        mark = note(f"{kept}: rows of {rows} are not a multiple of {type_of(label)}'s block") if kept else ""
        row = [shown(label) + mark, f"{file['bits_per_weight']:.3f}", number(file["bytes"] / 2**20)]
        row += [file["output"], f"{100 * file['output_share']:.0f} %"] if outputs else []
        for test in tests:
            e = cells[label, test]
            # say so if the length differs: the speed may, too
            row += [number(e["median"]) + (note(f"{e['run']}, to save time") if e["run"] != e["common"] else "")]
            ratios = [e["ours_ratio"]] * peers + [e.get("reference_ratio")] * bool(reference)
            row += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            if e["kind"] == "tg":
                row += [number(e.get("gb_per_s")), f"{100 * e['of_limit']:.0f} %" if e.get("of_limit") else ""]
        body.append(row)
    out = ["", f"{counted(threads, 'thread')}:", "", markdown_table(head, body)]
    return out + [""] * bool(notes) + [f"[{i + 1}] {text}  " for i, text in enumerate(notes)]


def load_table(entries: list[dict]) -> list[str]:
    """What loading a model takes: a row for each type."""
    entries = [e for e in entries if e["rounds"]]
    if not entries:
        return []
    intro = (
        f"Loading from the page cache, medians of {max(len(e['rounds']) for e in entries)}. Memory: the process's own, mapped "
        "files, and the peak of both while loading."
    )
    head = "type", "load s", "own MiB", "files MiB", "peak MiB", "first token s", "own MiB", "files MiB"
    keys = "load_seconds", "load_anon", "load_file", "load_peak", "token_seconds", "token_anon", "token_file"
    return ["", intro, "", markdown_table(head, [[shown(e["type"]), *(number(e[key]) for key in keys)] for e in entries])]


COLOURS = {OURS: "#c8102e", OURS + PLAIN: "#e8899a", "TQ1_0": "#1f5a96", "TQ2_0": "#5b9bd5", "Q1_0": "#2e7d5b",
           "Q2_0": "#74b89a", "Q2_K": "#8a6d3b", "Q4_0": "#c9a227", "Q8_0": "#8d8d8d", "F16": "#5a5a5a"}  # fmt: skip


def draw_bar(ax, y: int, end: float, entry: dict, others: dict[str, float]) -> None:
    """A type's bar at height `y`, its rate, and its limit as a line; the axis ends at `end`."""
    ax.barh(y, entry["median"], 0.74, color=COLOURS.get(entry["type"], "#a9a9c9"), zorder=2)
    text = number(entry["median"]) + " *" * (entry["run"] != entry["common"])
    if others:
        text += f" ({', '.join(f'{100 * share:.0f} % {name}' for name, share in others.items())})"
    x, limit = entry["median"], entry.get("limit")
    if limit and limit < 0.98 * end:
        ax.plot([limit] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.3, zorder=4)
        width = 0.025 * len(text) * end  # about; if the limit would cross the text, the text goes behind it
        x = limit if x - 0.03 * end < limit < x + width and limit + width < end else x
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    weight = "bold" if entry["type"] == OURS else "normal"
    ax.text(x + 0.015 * end, y, text, va="center", fontsize=8, bbox=box, zorder=3, fontweight=weight)


def draw(report: dict, path: Path) -> None:
    """Draw the bars: a row of panels for each test and number of threads, a column for each model, a bar for each type."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    speed = [e for e in report["speed"] if e["rates"]]
    order = {"tg": 0, "pp": 1}
    speed.sort(key=lambda e: order[e["kind"]])
    rows = list(dict.fromkeys((e["kind"], e["test"], e["threads"]) for e in speed))
    models = [key for key in report["models"] if any(e["model"] == key for e in speed)]
    types = list(dict.fromkeys(e["type"] for e in speed))
    inches = 2.2 + 3.1 * len(models), 1.4 + (0.7 + 0.22 * len(types)) * len(rows)
    fig = Figure(figsize=inches, layout="constrained", dpi=130)
    FigureCanvasAgg(fig)
    axes = fig.subplots(len(rows), len(models), squeeze=False)
    for i, (kind, test, threads) in enumerate(rows):
        for j, key in enumerate(models):
            ax = axes[i][j]
            entries = {e["type"]: e for e in speed if (e["model"], e["test"], e["threads"]) == (key, test, threads)}
            end = (1.4 if kind == "pp" else 1.65) * max((e["median"] for e in entries.values()), default=1.0)
            for y, label in enumerate(types):
                if label in entries:
                    others = fallen_back(report["models"][key]["types"][base(label)], label)
                    draw_bar(ax, y, end, entries[label], others)
            ax.set_xlim(0, end)
            ax.set_ylim(len(types) - 0.4, -0.6)
            ax.set_yticks(range(len(types)), [shown(label) * (j == 0) for label in types], fontsize=8)
            for tick, label in zip(ax.get_yticklabels(), types):
                tick.set_fontweight("bold" if label == OURS else "normal")
            ax.tick_params(axis="x", labelsize=7, length=2)
            ax.tick_params(axis="y", length=0)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", color="#e4e4e4", zorder=0)
            common = next((e["common"] for e in entries.values()), test)
            ax.set_title(f"{report['models'][key]['name']}\n" * (i == 0) + f"{common}, {counted(threads, 'thread')}", fontsize=9)
    notes = ["* a shorter run"] * any(e["run"] != e["common"] for e in speed)
    stored = [fallen_back(report["models"][e["model"]]["types"][base(e["type"])], e["type"]) for e in speed]
    notes += ["(..%) weights in another type"] * any(stored)
    title = "Tokens a second: tg generating, pp prompt", report["cpu"], "; ".join(notes)
    fig.suptitle("\n".join(filter(None, title)), fontsize=10)
    if any(e.get("limit") for e in speed):
        text = "limit: memory bandwidth / bytes of weights a token; further right where none is seen"
        line = Line2D([], [], color="black", linewidth=1.3, label=text)
        fig.legend(handles=[line], loc="outside lower center", fontsize=8, frameon=False)
    fig.savefig(path)
