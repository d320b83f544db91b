"""The plots of docs/performance.md, as SVG: the same figures give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt

COLOURS = {
    "shimmy": "#d1495b",
    "raw loop": "#2e4057",
    "llama-cpp-python": "#8d96a3",
    "llama_cpp.server": "#edae49",
    "xllamacpp": "#00798c",
    "llama-server": "#6a4c93",
}
mpl.rcParams |= {
    "svg.hashsalt": "shimmy",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7, 3.6),
    "legend.frameon": False,
}


def save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # matplotlib ends some lines in blanks.
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def _line(axes: Any, label: str, points: list[tuple[float, float | None]]) -> None:
    known = [(x, y) for x, y in points if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", label=label, color=COLOURS.get(label), ms=4)


def _labels(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(label for row in found["rows"] for label in row["sides"]))


def throughput(found: dict[str, Any], limit: float | None, file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    for label in _labels(found):
        rows = [(row["clients"], row["sides"].get(label)) for row in found["rows"]]
        _line(left, label, [(n, side and side["rate"]) for n, side in rows])
        if label not in ("raw loop", "llama-cpp-python"):
            _line(right, label, [(n, side and side["gap_ms"]["p99"]) for n, side in rows])
    if limit:
        top = left.get_ylim()[1]
        clients = [row["clients"] for row in found["rows"]]
        left.plot(clients, [limit * n for n in clients], ":", color="black", label="memory's limit")
        left.set_ylim(0, top * 1.15)
    left.set(xlabel="clients", ylabel="tokens/s in all")
    right.set(xlabel="clients", ylabel="p99 between tokens, ms", yscale="log")
    left.legend(fontsize=8)
    save(figure, file)


def goodput(found: dict[str, Any], limit: float | None, file: Path) -> None:
    figure, axes = plt.subplots()
    for label in _labels(found):
        rows = [(row["rate"], row["sides"].get(label)) for row in found["rows"]]
        _line(axes, label, [(rate, side and side["good"]) for rate, side in rows])
    rates = [0, max(row["rate"] for row in found["rows"])]
    axes.plot(rates, rates, ":", color="black", label="all of them")
    axes.set(xlabel="arrivals/s", ylabel="good answers/s", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
    save(figure, file)


def busy(found: dict[str, Any], limit: float | None, file: Path) -> None:
    """The engine's rate to the right, the others' speed upwards: both is best."""
    rows = [row for row in found["rows"] if row["busy"]]
    figure, plots = plt.subplots(1, len(rows), squeeze=False, sharey=True)
    for axes, row in zip(plots[0], rows, strict=True):
        for i, (label, side) in enumerate(row["sides"].items()):
            colour = COLOURS.get(found["names"][label])
            marker = "o^sDvP*X"[i % 8]
            axes.plot(side["rate"], side["others"] or 0, marker, color=colour, label=label)
        if limit:
            axes.axvline(limit, ls=":", color="black")
        axes.set(xlabel="tokens/s", title=f"{row['busy']} busy", xlim=(0, None), ylim=(0, None))
    plots[0][0].set_ylabel("the others' speed, of theirs alone")
    handles, labels = plots[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=3, loc="outside lower center")
    figure.set_size_inches(7, 4.4)
    save(figure, file)


DRAWN = {"throughput": throughput, "goodput": goodput, "busy": busy}
