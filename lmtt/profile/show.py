"""Profiles, costs of runs and comparisons as rich tables; nothing is computed here but shares and ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lmtt.graph.text import visible
from lmtt.profile.clock import PHASES
from lmtt.profile.planning import BYTES_OF, seconds_in_words

if TYPE_CHECKING:
    from lmtt.profile.report import Profile

MIB = 2**20
BEYOND = "in all, beyond what the process held when it loaded the model"
BAR = 12  # characters of a full bar


def profile_tables(profile: Profile) -> Iterator[RenderableType]:
    """Phases, layers, memory, screening."""
    yield Text.assemble(
        (visible(profile.model), "bold"),
        f"  {profile.tokens} tokens, {profile.dtype} on {profile.device}, {profile.threads} threads",
    )
    table = _table(
        "phase", "seconds", "share", "Gflop/s", "GB/s", "compute", "memory", "bound by", "peak MiB"
    )
    for phase in profile.phases:
        rate = phase.to_json()
        table.add_row(
            phase.name,
            seconds_in_words(phase.seconds),
            _bar(phase.seconds / profile.wall),
            _number(rate["flops_per_second"] / 1e9),
            _number(rate["bytes_per_second"] / 1e9),
            _share(phase.busy["compute"]),
            _share(phase.busy["memory"]),
            phase.bound if phase.work.operations + phase.work.memory + phase.work.disk > 0 else "",
            f"{phase.peak_bytes / MIB:,.0f}" if phase.peak_bytes else "",
        )
    table.add_row("in all", seconds_in_words(profile.wall), f"{profile.named / profile.wall:.1%} named")
    yield table
    c = profile.ceilings
    yield Text(
        f"ceilings ({c.source}): {c.product(profile.dtype) / 1e9:,.0f} Gflop/s of {profile.dtype} products, "
        f"{2 * c.lanes / 1e9:,.0f} of vector lanes, {c.memory / 1e9:.1f} GB/s of memory, "
        f"{c.disk / 1e9:.2f} of storage; compute and memory: how much of them the phase needed at least",
        "dim",
    )
    s = profile.screening
    yield Text(
        f"screening left {s['pairs_evaluated_share']:.2%} of {s['pairs']:,.0f} pairs and "
        f"{s['neurons_evaluated_share']:.2%} of neurons to exact evaluation; "
        f"{s['rows_reevaluated']:,.0f} rows were evaluated again"
    )
    if profile.overlap:
        read, seconds = profile.overlap["bytes_read"], profile.overlap["reading_seconds"]
        yield Text(f"beside the phases: {read / MIB:,.0f} MiB read in {seconds_in_words(seconds)}")
    yield Text(
        "memory: " + ", ".join(f"{name} {size / MIB:,.0f} MiB" for name, size in profile.memory.items())
    )
    yield layer_table(profile)
    yield Text(
        f"profiling took about {seconds_in_words(profile.overhead)}, {profile.overhead / profile.wall:.2%}",
        "dim",
    )


def layer_table(profile: Profile) -> Table:
    """One line for each layer."""
    names = [p.name for p in profile.phases if any(p.name in row["seconds"] for row in profile.layers)][:6]
    table = _table("layer", *names, "pairs left", "edges")
    for row in profile.layers:
        table.add_row(
            str(row["layer"]),
            *(seconds_in_words(row["seconds"].get(name, 0.0)) for name in names),
            f"{row['pairs_evaluated_share']:.2%}",
            f"{row.get('edges', 0):,}",
        )
    return table


def cost_tables(cost: Mapping[str, Any], name: str) -> Iterator[RenderableType]:
    """A stored run's plan beside what was measured."""
    yield Text.assemble((visible(name), "bold"), "  what it cost")
    plan = cost.get("plan") or {}
    predicted: Mapping[str, float] = plan.get("seconds") or {}
    measured = _seconds(cost)
    table = _table("phase", "planned", "measured", "share", "")
    total = measured.get("total", 0.0) or sum(measured.values())
    for phase in _order(measured, predicted):
        table.add_row(
            phase if phase != "total" else "in all",
            _time(predicted.get(phase)),
            _time(measured.get(phase)),
            _bar(measured.get(phase, 0.0) / total) if total > 0 and phase != "total" else "",
            Text(PHASES.get(phase, ""), "dim"),
        )
    yield table
    if plan.get("unplanned"):
        yield Text(f"it could not be planned: {visible(str(plan['unplanned']))}", "dim")
    elif not predicted:
        yield Text("no seconds were planned: `lmtt plan` had not measured this machine's ceilings yet", "dim")
    if plan.get("bytes"):
        table = _table("memory planned", "size", "")
        for part, size in plan["bytes"].items():
            if size:
                table.add_row(part, _size(size), Text(BYTES_OF.get(part, BEYOND), "dim"))
        yield table
    held: Mapping[str, Any] = cost.get("measured") or {}
    if held.get("bytes"):
        table = _table("memory measured", "peak", "")
        for part, size in held["bytes"].items():
            table.add_row(visible(str(part)), _size(size), Text(BEYOND if part == "total" else "", "dim"))
        yield table
        yield Text(f"measured by {visible(str(held.get('way', '')))}", "dim")
    peaks = cost.get("peak_bytes") or {}
    for kind, size in peaks.items():
        yield Text(f"measured: peak of the {visible(str(kind))} {_size(size)}, everything included")


def comparison(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> Iterator[RenderableType]:
    """Two costs phase by phase; the ratio is how many times the second is of the first."""
    a, b = _seconds(first), _seconds(second)
    table = _table("phase", *(visible(name) for name in names), "ratio")
    for phase in _order(a, b):
        x, y = a.get(phase), b.get(phase)
        ratio = f"{y / x:.2f} ×" if x and y else ""
        table.add_row(phase if phase != "total" else "in all", _time(x), _time(y), ratio)
    yield table


def compared(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON."""
    a, b = _seconds(first), _seconds(second)
    return {
        phase: {"first": a.get(phase), "second": b.get(phase),
                "ratio": b[phase] / a[phase] if a.get(phase) and phase in b else None}
        for phase in _order(a, b)
    }  # fmt: skip


def render(parts: Iterator[RenderableType], *, file: Any = None, width: int | None = None) -> None:
    """Print them; plain text where there is no terminal."""
    console = Console(file=file, highlight=False, markup=False, width=width)
    if not console.is_terminal and width is None:
        console = Console(file=file, highlight=False, markup=False, width=140)
    for part in parts:
        console.print(part)


def _seconds(cost: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in (cost.get("seconds") or {}).items()}


def _order(a: Mapping[str, float], b: Mapping[str, float]) -> list[str]:
    names = [name for name in dict.fromkeys([*a, *b]) if name != "total"]
    names.sort(key=lambda name: -max(a.get(name, 0.0), b.get(name, 0.0)))
    return [*names, "total"]


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="dim")
    for number, column in enumerate(columns):
        text = number == 0 or column in ("share", "bound by", "")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _bar(share: float) -> str:
    length = round(min(max(share, 0.0), 1.0) * BAR)
    return f"{share:5.1%} " + "█" * length


def _time(seconds: float | None) -> str:
    return "" if seconds is None else seconds_in_words(seconds)


def _size(count: float) -> str:
    return f"{count / MIB:,.1f} MiB"


def _number(value: float) -> str:
    return f"{value:.3g}" if value > 0 else ""


def _share(value: float) -> str:
    return f"{value:.0%}" if value > 0 else ""
