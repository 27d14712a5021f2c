"""The tabs that look at a whole run: lens, contrast, heads, output and cost. Numbers come from the trace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import panel as pn

from lmtt.graph.summary import not_taken_apart
from lmtt.graph.text import token_label, visible
from lmtt.trace import Trace
from lmtt.viz import cells, figures, tables
from lmtt.viz.edge_view import NO_MODEL
from lmtt.viz.panes import WIDE, Ask, bokeh

if TYPE_CHECKING:
    from lmtt.generate import Generation

LENS_POSITIONS = 64  # columns of the lens; of a longer prompt those before the start
LENS_ROWS = 40
LENS_WORD = 12  # characters of a token that a wide cell of the lens may show
LENS_STEP = 2  # layers to a question, so that others are answered in between
PARTS = 14
Html = Callable[[str], Any]
Pick = Callable[[dict[str, Any]], None]


async def lens(
    trace: Trace, position: int, shown: str, chosen: str, dark: bool, ask: Ask[Any], html: Html, pick: Pick
) -> list[Any]:
    """Layers × positions: the top token, shaded by probability, entropy or the rank of a token.

    chosen : that token; if empty, the one that the model says at `position`.
    """
    if not trace.has_model:
        return [html(tables.sentence(f"{NO_MODEL} the logit lens."))]
    T, L = len(trace.tokens), trace.n_layers
    last = max(min(T, position + 1), min(T, LENS_POSITIONS))
    positions = list(range(max(0, last - LENS_POSITIONS), last))
    layers = sorted({round(x) for x in np.linspace(0, L - 1, min(L, LENS_ROWS))})
    said = trace.next_tokens(position, 1)[0]
    parts = []
    for at in range(0, len(layers), LENS_STEP):
        some = layers[at : at + LENS_STEP]
        parts.append(await ask(partial(trace.lens_table, some, positions, chosen or said.id)))
    words = [list(row) for part in parts for row in part.token]
    columns = {
        "probability": np.concatenate([p.probability for p in parts]),
        "entropy": np.concatenate([p.entropy for p in parts]),
        "rank": np.concatenate([p.target_rank for p in parts]),
    }
    label = token_label(chosen or said.token, 20)
    p, rank = columns["probability"], columns["rank"]
    choices = {
        "top token": (p, "top token after each layer, shaded by its probability", 1.0, "attention"),
        "entropy": (columns["entropy"], "top token, shaded by entropy (nats)", None, "mlp"),
        "rank": (1 / (1 + rank), f"1 / rank of {label}: strongest where it comes first", 1.0, "attention"),
    }
    shade, title, high, ramp = choices[shown]
    extra = {
        "says": [token_label(w, 40) for row in words for w in row],
        "p": [f"{x:.4f}" for x in p.ravel()],
        "entropy": [f"{x:.3f} nats" for x in columns["entropy"].ravel()],
        f"rank of {label}".replace("{", "(").replace("}", ")"): [
            f"{r + 1:,}" for r in columns["rank"].ravel()
        ],
    }
    plot = figures.heat(
        shade, dark, title=title, columns=[token_label(trace.tokens[p], 12) for p in positions],
        rows=[f"{layer}" for layer in layers], extra=extra, high=high, ramp=ramp, wide=True,
        picked=lambda r, c: pick(
            {"kind": "node", "layer": layers[r], "site": "post", "position": positions[c]}
        ),
    )  # fmt: skip
    shown_words = cells.worded(plot, [[token_label(w, LENS_WORD) for w in row] for row in words], dark)
    left_out = f" Positions {positions[0]} to {positions[-1]} of {T}." if len(positions) < T else ""
    return [html(tables.sentence(f"Click a cell for its whole list.{left_out}")), bokeh(shown_words)]


async def contrast(
    trace: Trace, position: int, target: str, foil: str, dark: bool, ask: Ask[Any], html: Html
) -> list[Any]:
    """What wrote the target's logit, or target minus foil: parts, layers × heads, layers."""
    if not trace.has_model:
        return [html(tables.sentence(f"{NO_MODEL} what wrote a logit."))]
    best = trace.next_tokens(position, 2)
    what = target or best[0].id
    against = foil or None
    found = await ask(lambda: trace.logit_contributions(what, against, position))
    parts = found.top(PARTS)
    top = max((abs(p.logit) for p in parts), default=1.0)
    rows = [[f"{p.logit:+.3f}", tables.share(p.logit, top), tables.safe(p.what)] for p in parts]
    name = visible(found.name)
    heading = f"logit of {name}: {found.logit:.3f}" + (" (target − foil)" if against else "")
    mlps = found.neurons.sum(1, dtype=np.float64)
    L, H = found.per_head.shape
    plot = figures.heat(
        found.per_head, dark, title="by each head",
        columns=[str(h) for h in range(H)], rows=[str(layer) for layer in range(L)], diverging=True,
        row_height=11,
    )  # fmt: skip
    side = figures.heat(
        mlps[:, None], dark, title="by each MLP", columns=[""], rows=[str(layer) for layer in range(L)],
        diverging=True, row_height=11,
    )  # fmt: skip
    return [
        html(f"<h4>{tables.safe(heading)}</h4>{tables.table(['logit', '', 'part'], rows, numbers=(0,))}"),
        pn.Row(bokeh(plot), pn.pane.Bokeh(side, width=170, sizing_mode="fixed"), **WIDE),
    ]


async def heads(trace: Trace, position: int, threshold: float, per: str, dark: bool, pick: Pick) -> list[Any]:
    """Layers × heads: kept contributions summed over the route, or over the edges into one position."""
    H, L = int(trace.meta["model"]["n_heads"]), trace.n_layers
    total = np.zeros((L, H))
    strongest: dict[tuple[int, int], tuple[float, int, int]] = {}

    def gather() -> None:
        if per == "the route":
            route = trace.route(position, threshold)
            attention = route.edges[route.edges["kind"] == "attention"]
            for e in attention:
                span = route.heads[e["head_start"] : e["head_end"]]
                np.add.at(total[int(e["layer"])], span["head"], span["weight"])
                for head, weight in span.tolist():
                    at = (int(e["layer"]), head)
                    if weight > strongest.get(at, (0.0, 0, 0))[0]:
                        strongest[at] = (weight, int(e["source_position"]), int(e["target_position"]))
            return
        kept = trace.data.edges
        layer = np.repeat(np.arange(L), np.diff(kept.layer_ptr))
        for r in np.flatnonzero(kept.destination == position):
            part = slice(*kept.head_ptr[r : r + 2])
            np.add.at(total[layer[r]], kept.head[part], kept.head_weight[part])
            for head, weight in zip(kept.head[part].tolist(), kept.head_weight[part].tolist(), strict=True):
                at = (int(layer[r]), head)
                if weight > strongest.get(at, (0.0, 0, 0))[0]:
                    strongest[at] = (weight, int(kept.source[r]), position)

    await asyncio.to_thread(gather)

    def picked(layer: int, head: int) -> None:
        if (layer, head) in strongest:
            _, source, at = strongest[layer, head]
            pick({"kind": "attention", "layer": layer, "source": source, "position": at})

    plot = figures.heat(
        total, dark, title="kept contributions, summed (click: strongest edge)",
        columns=[str(h) for h in range(H)], rows=[str(layer) for layer in range(L)],
        picked=picked, row_height=16,
    )  # fmt: skip
    return [bokeh(plot)]


def output(generation: Generation | None, dark: bool, html: Html, pick: Pick) -> list[Any]:
    """Generated tokens × what each rests on; a click traces that token."""
    if generation is None:
        said = "This run generated nothing. How many tokens it should is among the options below the prompt."
        return [html(tables.sentence(said))]
    P, trace = generation.prompt, generation.trace
    labels = [token_label(token, 12) for token in trace.tokens]
    shares = generation.shares
    T = shares.shape[1]
    text = f"<p>{tables.safe(generation.text)}</p>"
    plot = figures.heat(
        shares[::-1], dark, title="what each of them rests on (click to trace it)",
        columns=labels[:T], rows=labels[P:][::-1], row_height=17,
        picked=lambda r, _c: pick({"kind": "trace", "position": P - 1 + len(generation.ids) - 1 - r}),
    )  # fmt: skip
    through = generation.through.tokens.mean(0)
    order = np.argsort(-through, kind="stable")[:10]
    rows = [
        [tables.token(trace.tokens[p]), str(p), f"{through[p]:.1%}", tables.share(float(through[p]))]
        for p in order
    ]
    listed = tables.table(["prompt token", "at", "share", ""], rows, numbers=(1, 2))
    return [
        html(f"<h4>generated</h4>{text}"),
        bokeh(plot),
        html(f"<h4>what the whole output rests on in the prompt, through the output in between</h4>{listed}"),
    ]


def cost(trace: Trace, dark: bool, html: Html) -> list[Any]:
    """Where this run's time and memory went, as it was planned and as it was measured."""
    found = trace.cost
    plan = found.get("plan") or {}
    planned, room = plan.get("seconds") or {}, plan.get("bytes") or {}
    measured = {str(name): float(value) for name, value in (found.get("seconds") or {}).items()}
    phases = sorted(
        {*measured, *planned} - {"total"}, key=lambda n: -max(measured.get(n, 0), planned.get(n, 0))
    )
    whole = measured.get("total", sum(measured.values()))
    rows = [
        [tables.safe(f"peak memory of the {kind}, everything included"), _mib(size)]
        for kind, size in (found.get("peak_bytes") or {}).items()
    ]
    if room.get("total"):
        rows.append(["memory planned, beyond what was held before", _mib(room["total"])])
    pairs = found.get("pairs") or {}
    if pairs:
        rows.append(["pairs evaluated exactly", f"{pairs['evaluated']:,} of {pairs['positive']:,}"])
    rows += [
        [tables.safe(f"{op} by"), tables.safe(str(name))] for op, name in (found.get("backend") or {}).items()
    ]
    model = trace.meta.get("model", {})
    rows += [
        ["model", tables.safe(str(model.get("name", "?")))],
        ["computed in", tables.safe(str(trace.meta.get("dtype", "?")))],
        ["largest error bound of a share", f"{float(trace.certificate.max(initial=0)):.2e}"],
        ["kept edges", f"{len(trace.data.edges.weight):,}"],
    ]
    views = []
    if whole > 0:
        names = [name for name in phases if measured.get(name)]
        labels = [f"{name} {_seconds(measured[name])}" for name in names]
        chart = figures.Bars(dark, title=f"{_seconds(whole)} in all")
        views.append(bokeh(chart.show(labels, np.array([measured[name] for name in names]))))
    if planned:
        times = [
            [tables.safe(name), *(_seconds(of[name]) if name in of else "" for of in (planned, measured))]
            for name in [*phases, "total"]
        ]
        views.append(html(tables.table(["phase", "planned", "measured"], times, numbers=(1, 2))))
    elif plan.get("unplanned"):
        views.append(html(tables.sentence(f"It could not be planned: {plan['unplanned']}")))
    views.append(html(tables.table(["", ""], rows, numbers=(1,))))
    return views


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def parts_as_one(trace: Trace) -> str:
    """A sentence for each kind of sublayer that was not taken apart, as HTML; empty if all were."""
    return "".join(
        tables.sentence(f"Not taken apart, {line}.") for line in not_taken_apart(trace.whole_sublayers)
    )
