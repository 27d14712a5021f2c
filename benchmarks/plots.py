"""Two pictures of a report: time and memory against the length of the prompt, both axes logarithmic.

    python benchmarks/plots.py benchmarks/results/cpu-NAME.json [FOLDER]

Mid-tone colours on no background, so that one file can be read on a light page and on a dark one. Every line
also has its own marker and its name at its end, so that colour is not needed to tell them apart.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from report import MIB, Figures, seconds_of, workspace_of

GREY = "#808890"  # the contrast with white and with #0d1117 is above 3.5
# (name, what, method, screen, colour, marker, line)
LINES = (
    ("materialised", "attention", "materialised", None, "#b06ac0", "v", "-"),
    ("FlashTrace 0.1.1", "attention", "flashtrace", None, "#c98500", "s", "-"),
    ("plain torch", "attention", "plain_torch", None, "#d6604d", "^", "-"),
    ("torch.compile", "attention", "compiled_torch", None, "#d6604d", ">", ":"),
    ("ours, screen off", "attention", "ours", 0.0, "#3b8ed0", "o", ":"),
    ("ours, screen 1e-4", "attention", "ours", 1e-4, "#3b8ed0", "o", "--"),
    ("ours, screen 1e-3", "attention", "ours", 1e-3, "#3b8ed0", "o", "-"),
    ("forward", "forward", "last", None, GREY, "", "-"),
)
LINE_HEIGHT = 0.062  # of the axes
MARKERS = "ovs^>D<"
HISTORY_COLOURS = ("#3b8ed0", "#d6604d", "#b06ac0", "#c98500", "#4a9a6a")
STYLE: Any = {
    "svg.hashsalt": "lmtt", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY,
}  # fmt: skip
Value = Callable[[dict[str, Any]], float]


def draw(report: dict[str, Any], folder: Path) -> None:
    """Write bench-time.svg and bench-memory.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    n_layers = report["model"]["n_layers"]

    def seconds(record: dict[str, Any]) -> float:
        return seconds_of(record) / (1 if "by_layer" in record else n_layers)

    def mebibytes(record: dict[str, Any]) -> float:
        return workspace_of(record) / MIB

    about = report["machine"]
    subtitle = f"{report['model']['name']}, one layer, {about['cpu']}, {about['threads']} threads"
    limit = report["settings"]["memory_limit_bytes"] / MIB
    _plot(
        report, folder / "bench-time.svg", f"Attention contributions of all heads\n{subtitle}",
        unit="seconds", value=seconds, forward="a layer's forward", ceiling=_fastest(report),
    )  # fmt: skip
    _plot(
        report, folder / "bench-memory.svg", f"Memory above inputs\n{subtitle}",
        unit="MiB", value=mebibytes, forward="the whole forward", ceiling=("memory limit", lambda _: limit),
    )  # fmt: skip


def _fastest(report: dict[str, Any]) -> tuple[str, Callable[[int], float]] | None:
    """Seconds that screening's multiply-adds take at the machine's ceiling."""
    rate = report["ceilings"].get(str(report["machine"]["threads"]), {}).get("multiply_adds")
    if rate is None:
        return None
    model = report["model"]
    width = model["n_heads"] * model["d_head"]
    return "screening at the ceiling", lambda T: (T * model["d_model"] * width + T * T * width) / (rate * 1e9)


def _plot(
    report: dict[str, Any],
    path: Path,
    title: str,
    *,
    unit: str,
    value: Value,
    forward: str,
    ceiling: tuple[str, Callable[[int], float]] | None,
) -> None:
    figures = Figures(report["figures"])
    tokens = sorted({r["tokens"] for r in report["figures"]})
    with mpl.rc_context(STYLE):
        picture, axes = pyplot.subplots(figsize=(8.4, 4.8))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends: list[tuple[float, str, str]] = []
        for name, what, method, screen, colour, marker, line in LINES:
            points = [
                (T, value(record))
                for T in tokens
                if (record := figures.get(what, method, T, screen)) is not None and value(record) > 0
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, line, color=colour, marker=marker, markersize=4.5, linewidth=1.6)
                stopped = x[-1] < tokens[-1]
                said = forward if what == "forward" else name
                ends.append((y[-1], f"{said} (to {x[-1]})" if stopped else said, colour))
        if ceiling is not None:
            name, limit = ceiling
            axes.plot(tokens, [limit(T) for T in tokens], "-.", color=GREY, linewidth=1)
            ends.append((limit(tokens[-1]), name, GREY))
        axes.set_xticks(tokens, [str(T) for T in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_ylabel(unit)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        _names(axes, ends)
        picture.tight_layout()
        picture.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(picture)


def draw_history(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Ratios of one machine by commit, each over its first value; below 1 is faster than it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for entry in entries for name in entry["ratios"]))
    with mpl.rc_context(STYLE):
        drawing, axes = pyplot.subplots(figsize=(8.4, 4.8))
        axes.set_yscale("log", base=2)
        ends: list[tuple[float, str, str]] = []
        for number, name in enumerate(names):
            points = [(n, e["ratios"][name][0]) for n, e in enumerate(entries) if name in e["ratios"]]
            x = [n for n, _ in points]
            y = [value / points[0][1] for _, value in points]
            colour = HISTORY_COLOURS[number % len(HISTORY_COLOURS)]
            axes.plot(
                x, y, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4.5, linewidth=1.4
            )
            ends.append((y[-1], name, colour))
        axes.axhline(1, color=GREY, linewidth=1, linestyle="-.")
        axes.set_xticks(range(len(entries)), [e["commit"][:7] for e in entries], rotation=45, ha="right")
        axes.minorticks_off()
        axes.set_ylabel("ratio over its first value")
        axes.set_title(f"Attribution by commit\n{entries[0]['machine']}", fontsize=11, loc="left")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        _names(axes, ends)
        drawing.tight_layout()
        drawing.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(drawing)


def _names(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Names of the lines in a column at the right, in the order of their ends and never on each other."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    ends = sorted(ends)
    heights = [(math.log(y) - low) / (high - low) for y, _, _ in ends]
    for n in range(1, len(heights)):  # from below, each above the one before
        heights[n] = max(heights[n], heights[n - 1] + LINE_HEIGHT)
    top = 1.0
    for n in reversed(range(len(heights))):  # and back down, where that left the picture
        heights[n] = top = min(heights[n], top)
        top -= LINE_HEIGHT
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axes.text(1.02, height, name, color=colour, transform=axes.transAxes, va="center", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(__file__).parent.parent / "docs" / "images"
    )
    options = parser.parse_args()
    draw(json.loads(options.report.read_text()), options.folder)


if __name__ == "__main__":
    main()
