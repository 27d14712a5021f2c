"""Reading a report's figures: ratios, gates, and the tables that say both. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

SCREENING_ALONE = 0.999  # nothing is above it: what is left of the time is screening
# Lanes of vector instructions of exact evaluation, per coordinate: the whole's sign given to the part,
# multiply-subtract, maximum, addition; for each four parts that sign and the whole's size; and per block of
# 16 coordinates a multiplication and a comparison that may pass it over.
EVALUATION_INSTRUCTIONS = 4 + 2 / 4 + 2 / 16
MARKERS = ("<!-- results -->", "<!-- end of results -->")
PICTURES = """
![Time against tokens](../docs/images/bench-time.svg)

![Memory against tokens](../docs/images/bench-memory.svg)
"""
BUSY = 0.1  # processors that others used in the mean, above which figures are not to be trusted
GIB, MIB = 2**30, 2**20

Record = dict[str, Any]  # a Figure's fields that identify it, and what was measured


@dataclass(frozen=True)
class Gate:
    """One number that must be shown."""

    name: str
    required: str
    got: float | None  # None: its figures were not measured
    passed: bool | None
    text: str  # got, with its unit


# --- reading figures --------------------------------------------------------------------------------------


def layer_seconds(record: Record, layers: set[int] | None = None) -> float:
    """Mean over (some of) the measured layers of each one's median."""
    return mean(
        float(median(one["seconds"]))
        for one in record["by_layer"]
        if layers is None or one["layer"] in layers
    )


def seconds_of(record: Record) -> float:
    """A layer's seconds for kernels, a pass's for the rest."""
    return layer_seconds(record) if "by_layer" in record else float(median(record["seconds"]))


def workspace_of(record: Record) -> int:
    """Bytes above what was resident before."""
    if "by_layer" in record:
        return max(int(one["workspace"]) for one in record["by_layer"])
    return int(record["workspace"])


class Figures:
    """Looks records up; None where one was not measured."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = [r for r in records if r["status"] == "ok"]

    def get(self, what: str, method: str, tokens: int, screen: float | None = None) -> Record | None:
        found = [
            r
            for r in self.records
            if (r["what"], r["method"], r["tokens"]) == (what, method, tokens)
            and (not method.startswith("ours") or r["screen"] == screen)
        ]
        return min(found, key=seconds_of) if found else None  # of FlashTrace's chunkings the fastest

    def faster(self, peer: str, tokens: int, screen: float) -> float | None:
        """How many times faster ours is than a peer, on the layers that both were measured on; by calls that
        took turns where there are any."""
        own, other = self.turns(peer, tokens, screen)
        if own:
            return mean(map(median, other)) / mean(map(median, own))
        theirs, ours = self.get("attention", peer, tokens), self.get("attention", "ours", tokens, screen)
        if theirs is None or ours is None:
            return None
        common = {one["layer"] for one in theirs["by_layer"]} & {one["layer"] for one in ours["by_layer"]}
        return layer_seconds(theirs, common) / layer_seconds(ours, common) if common else None

    def turns(self, peer: str, tokens: int, screen: float) -> tuple[list[list[float]], list[list[float]]]:
        """Seconds of ours and of a peer that took turns, by layer; both empty where they did not."""
        name = f"ours {screen:g}"
        layers = [
            one["turns"]
            for record in self.records
            if (record["what"], record["tokens"]) == ("turns", tokens)
            for one in record["by_layer"]
            if {name, peer} <= one["turns"].keys()
        ]
        return [one[name] for one in layers], [one[peer] for one in layers]

    def of_forward(
        self, tokens: int, screen: float | None, head: str, field: str = "attribution"
    ) -> float | None:
        """Attribution of everything (or `seconds`: the whole trace), as a multiple of the plain forward."""
        ours, forward = self.get("everything", "ours", tokens, screen), self.get("forward", head, tokens)
        if ours is None or forward is None:
            return None
        if head == "all" and ours.get("paired"):
            own, theirs = paired(ours, field)
            return median(own) / median(theirs)
        return median(ours[field]) / seconds_of(forward)

    def workspace_beyond_forward(self, tokens: int, screen: float = 1e-3) -> float | None:
        """Bytes, without what the trace keeps."""
        ours, forward = self.get("everything", "ours", tokens, screen), self.get("forward", "last", tokens)
        if ours is None or forward is None:
            return None
        return float(workspace_of(ours) - ours["result_bytes"] - workspace_of(forward))

    def exponent(
        self, what: str, method: str, screen: float | None = None, least: int = 1024
    ) -> float | None:
        """Slope of log time against log T, fitted over T >= least."""
        points = []
        for T in sorted({r["tokens"] for r in self.records if r["tokens"] >= least}):
            record = self.get(what, method, T, screen)
            if record is not None:
                seconds = median(record["attribution"]) if what == "everything" else seconds_of(record)
                points.append((math.log(T), math.log(seconds)))
        if len(points) < 2:
            return None
        x0, y0 = mean(x for x, _ in points), mean(y for _, y in points)
        return sum((x - x0) * (y - y0) for x, y in points) / sum((x - x0) ** 2 for x, _ in points)

    def patching(self, tokens: int) -> tuple[float, float] | None:
        """Seconds of one forward for each (layer, head, position), and that over a trace's seconds."""
        record, ours = (
            self.get("patching", "zero one head", tokens),
            self.get("everything", "ours", tokens, 1e-3),
        )
        if record is None or ours is None:
            return None
        total = seconds_of(record) * record["importances"]
        return total, total / median(ours["seconds"])


def paired(record: Record, field: str) -> tuple[list[float], list[float]]:
    """`attribution`, or the `seconds` of whole traces, and the plain forwards that took turns with them."""
    column = {"attribution": 0, "seconds": 1}[field]
    return [pair[column] for pair in record["paired"]], [pair[2] for pair in record["paired"]]


def kernel_share(figures: Figures, tokens: int, screen: float, model: Record) -> float | None:
    """Lanes per second of exact evaluation, over the multiply-adds in registers beside it; see README.md."""
    record = figures.get("share", "ours, nothing skipped", tokens, screen)
    if record is None:
        return None
    D, E = int(model["d_model"]), int(model["d_head"])
    shares = []
    for one in record["by_layer"]:
        lanes = one["evaluated"] * D * EVALUATION_INSTRUCTIONS + one["sources"] * E * D  # u, once for each
        pairs = zip(one["seconds"], one["ceiling"], strict=True)
        shares.append(median(lanes / (seconds * ceiling) for seconds, ceiling in pairs))
    return mean(shares)


def screening_share(figures: Figures, tokens: int, model: Record, ceiling: float) -> float | None:
    """Multiply-adds of screening per second, over the same ceiling."""
    alone = figures.get("attention", "ours", tokens, SCREENING_ALONE)
    if alone is None:
        return None
    width = int(model["n_heads"]) * int(model["d_head"])
    return (tokens * int(model["d_model"]) * width + tokens**2 * width) / layer_seconds(alone) / ceiling


# --- the gates --------------------------------------------------------------------------------------------


def gates(report: Record) -> list[Gate]:
    """Every number that must be shown; those whose figures are missing are neither passed nor failed."""
    figures = Figures(report["figures"])
    found: list[Gate] = []

    def at_least(name: str, least: float, got: float | None, unit: str = "×") -> None:
        text = "not measured" if got is None else f"{got:.3g} {unit}".strip()
        passed = None if got is None else bool(got >= least)  # NaN does not pass
        found.append(Gate(name, f"≥ {least:g} {unit}".strip(), got, passed, text))

    def at_most(name: str, most: float, got: float | None, unit: str) -> None:
        text = "not measured" if got is None else f"{got:.3g} {unit}".strip()
        passed = None if got is None else bool(got <= most)
        found.append(Gate(name, f"≤ {most:.3g} {unit}".strip(), got, passed, text))

    for T in (256, 1024):
        at_least(
            f"attention vs plain torch, screen 1e-3, T = {T}", 20, figures.faster("plain_torch", T, 1e-3)
        )
    for T in (256, 1024):
        at_least(f"attention vs plain torch, screen off, T = {T}", 5, figures.faster("plain_torch", T, 0.0))
    at_least(
        "attention vs materialised, screen 1e-3, T = 256", 500, figures.faster("materialised", 256, 1e-3)
    )
    for T, least in ((256, 90), (1024, 250)):
        at_least(
            f"attention vs FlashTrace, screen 1e-3, T = {T}", least, figures.faster("flashtrace", T, 1e-3)
        )
    for screen, most in ((1e-3, 0.5), (0.0, 2.0)):
        name = "1e-3" if screen else "off"
        got = figures.of_forward(512, screen, "all")
        at_most(f"everything vs forward with all logits, screen {name}, T = 512", most, got, "×")
    beyond = figures.workspace_beyond_forward(1024)
    at_most("workspace beyond the forward, T = 1024", 100, None if beyond is None else beyond / MIB, "MiB")
    longest = figures.get("everything", "ours", 8192, 1e-3)
    at_most("peak of a whole trace, T = 8192", 6, None if longest is None else longest["peak"] / GIB, "GiB")
    own, forward = figures.exponent("everything", "ours", 1e-3), figures.exponent("forward", "all")
    limit = 2.0 if forward is None else max(2.0, forward)  # screening is a T² of its own
    at_most("exponent of time in T, everything, T ≥ 1024", limit, own, "")
    model = report["model"]
    for name, screen, needed in (("dense exact", 0.0, 0.6), ("survivors'", 1e-3, 0.4)):
        share = kernel_share(figures, 1024, screen, model)
        at_least(f"{name} kernel vs ceiling of lanes, T = 1024", needed, share, "")
    return found


# --- tables -------------------------------------------------------------------------------------------------


def brief(record: Record) -> str:
    """One record as a cell of a table."""
    if record["status"] != "ok":
        return str(record["status"])
    if record["what"] == "share":
        return f"{duration(layer_seconds(record))} of exact evaluation"
    if record["what"] == "turns":
        layers = [one["turns"] for one in record["by_layer"]]
        return ", ".join(f"{name} {duration(mean(median(x[name]) for x in layers))}" for name in layers[0])
    if record["what"] == "everything":
        return f"{duration(median(record['attribution']))} of {duration(median(record['seconds']))}"
    return duration(seconds_of(record))


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size(count: float) -> str:
    return f"{count / MIB:.3g} MiB" if abs(count) < GIB else f"{count / GIB:.3g} GiB"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


ROWS = (
    ("ours, screen 1e-3", "attention", "ours", 1e-3),
    ("ours, screen 1e-4", "attention", "ours", 1e-4),
    ("ours, screen off", "attention", "ours", 0.0),
    ("plain torch", "attention", "plain_torch", None),
    ("torch.compile", "attention", "compiled_torch", None),
    ("FlashTrace 0.1.1", "attention", "flashtrace", None),
    ("materialised", "attention", "materialised", None),
    ("neurons, screen 1e-3", "neurons", "ours", 1e-3),
    ("neurons, screen off", "neurons", "ours", 0.0),
)


def tables(report: Record) -> str:
    """The whole report in Markdown."""
    records, figures = report["figures"], Figures(report["figures"])
    tokens = sorted({r["tokens"] for r in records})
    m = report["machine"]
    lines = [
        f"{m['cpu']} ({m['isa']}, {m['cores']} cores, {m['threads']} threads), "
        f"{report['model']['name']} in float32, torch {report['versions']['torch']}, "
        f"commit {report['commit']['commit'][:10]}"
        f"{' with changes' if report['commit']['modified'] else ''}, {report['created'][:10]}.",
        "",
    ]
    if m["busy_with_others"] > BUSY:
        used = f"{m['busy_with_others']:.2g}"
        lines += [f"**Others used {used} processors meanwhile: these figures are not to be quoted.**", ""]

    def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if any(any(cell not in ("–", "") for cell in row[1:]) for row in rows):
            lines.extend([f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)])
            lines.extend("| " + " | ".join(row) + " |" for row in rows)
            lines.append("")

    def cell(
        what: str, method: str, T: int, screen: float | None, of: Any = seconds_of, show: Any = duration
    ) -> str:
        record = figures.get(what, method, T, screen)
        if record is not None:
            return str(show(of(record)))
        found = [
            str(r["status"])
            for r in records
            if (r["what"], r["method"], r["tokens"]) == (what, method, T)
            and (not method.startswith("ours") or r["screen"] == screen)
        ]
        # Of FlashTrace's chunkings, the one that was tried says more than those that were not.
        return min(found, key=lambda status: status.startswith("not run")) if found else "–"

    head = ["", *(f"T = {T}" for T in tokens)]
    layers = ", ".join(str(layer) for layer in report["layers"])
    which = f"mean of layers {layers} of {report['model']['n_layers']}, fewer where slow"
    rows = [[row, *(cell(what, method, T, s) for T in tokens)] for row, what, method, s in ROWS]
    table(f"Time for one layer (median; {which})", head, rows)
    rows = [
        [row, *(cell(what, method, T, s, workspace_of, size) for T in tokens)]
        for row, what, method, s in ROWS
        if what == "attention"
    ]
    table("Memory above inputs, one layer", head, rows)
    rows = [
        [f"{row}, screen {name}", *(times(figures.faster(method, T, s)) for T in tokens)]
        for row, _, method, peer_screen in ROWS
        if peer_screen is None
        for name, s in (("1e-3", 1e-3), ("off", 0.0))
    ]
    table("How many times faster ours is", head, rows)

    def everything(T: int, screen: float | None, field: str) -> str:
        record = figures.get("everything", "ours", T, screen)
        return "–" if record is None else duration(median(record[field]))

    whole = [
        ["plain forward, last logits", *(cell("forward", "last", T, None) for T in tokens)],
        ["plain forward, all logits", *(cell("forward", "all", T, None) for T in tokens)],
    ]
    for name, screen in (("screen 1e-3", 1e-3), ("default (attention 1e-4)", None), ("screen off", 0.0)):
        whole.append([f"everything, {name}", *(everything(T, screen, "attribution") for T in tokens)])
        whole.append([f"whole trace, {name}", *(everything(T, screen, "seconds") for T in tokens)])
    for name, screen in (("1e-3", 1e-3), ("off", 0.0)):
        for head_name, which in (("all logits", "all"), ("last logits", "last")):
            whole.append([f"everything / forward ({head_name}), screen {name}",
                          *(times(figures.of_forward(T, screen, which)) for T in tokens)])  # fmt: skip
        whole.append([f"whole trace / forward (all logits), screen {name}",
                      *(times(figures.of_forward(T, screen, "all", "seconds")) for T in tokens)])  # fmt: skip
    table(
        "All layers: attention, neurons at every position and routes, beside running the model", head, whole
    )

    memory = [
        [
            "plain forward, last logits",
            *(cell("forward", "last", T, None, workspace_of, size) for T in tokens),
        ],
        ["plain forward, all logits", *(cell("forward", "all", T, None, workspace_of, size) for T in tokens)],
        ["whole trace", *(cell("everything", "ours", T, 1e-3, workspace_of, size) for T in tokens)],
        [
            "of which results",
            *(cell("everything", "ours", T, 1e-3, lambda r: r["result_bytes"], size) for T in tokens),
        ],
    ]
    beyond = [figures.workspace_beyond_forward(T) for T in tokens]
    memory.append(["workspace beyond the forward", *("–" if b is None else size(b) for b in beyond)])
    table("Memory above the loaded model, screen 1e-3", head, memory)

    patching = [(T, figures.patching(T)) for T in tokens]
    table("Activation patching of every (layer, head, position), multiplied out: another, causal question",
          ["", *(f"T = {T}" for T, p in patching if p)],
          [["all of them", *(f"{p[0] / 3600:.3g} h" for _, p in patching if p)],
           ["over one whole trace", *(f"{p[1]:.3g} ×" for _, p in patching if p)]])  # fmt: skip

    rate = report["ceilings"].get(str(m["threads"]), {}).get("multiply_adds")
    if rate is not None:
        model, peak = report["model"], rate * 1e9
        shares = [
            ["screening", *(times(screening_share(figures, T, model, peak)) for T in tokens)],
            *(
                [f"exact, screen {name}", *(times(kernel_share(figures, T, screen, model)) for T in tokens)]
                for name, screen in (("off", 0.0), ("1e-3", 1e-3))
            ),
        ]
        table(f"Share of the ceiling of {rate:.3g} G lanes/s", head, shares)
    exponents = [
        (name, figures.exponent(what, method, screen))
        for name, what, method, screen in (
            ("forward, all logits", "forward", "all", None),
            ("everything, screen 1e-3", "everything", "ours", 1e-3),
            ("attention alone, screen 1e-3", "attention", "ours", 1e-3),
        )
    ]
    if any(e is not None for _, e in exponents):
        lines += ["Exponents of time in T, fitted over T ≥ 1024: "
                  + ", ".join(f"{name} {times(e)}" for name, e in exponents) + ".", ""]  # fmt: skip
    lines += ["**Gates**", "", "| | required | measured | |", "|---|---|---|---|"]
    word = {True: "PASS", False: "FAIL", None: "not measured"}
    lines += [f"| {g.name} | {g.required} | {g.text} | {word[g.passed]} |" for g in gates(report)]
    return "\n".join(lines) + "\n"


def write_readme(text: str, readme: Path) -> None:
    """Put the tables and the pictures that were drawn with them between the markers of the README."""
    before, rest = readme.read_text().split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    readme.write_text(f"{before}{MARKERS[0]}\n{text}{PICTURES}{MARKERS[1]}{after}")
