"""A route as one page: self-contained, static, readable without its script, from a file or a notebook.

Nothing of the model is computed here: reveal thresholds, shares and probabilities come with the route, and
the page's slider only hides what is not revealed above it.

Every string from a prompt, a vocabulary or a model's name goes through `markup.safe`. None enters the script
or the styles, which are two files beside this one; the page's policy admits these by their hashes and nothing
else: no request, no inline handler, no style attribute.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from string import Template

import numpy as np

from lmtt.graph.export import predictions
from lmtt.graph.routes import Route, route
from lmtt.graph.summary import heads_text, strongest_attention, strongest_tokens
from lmtt.graph.text import quoted, token_label
from lmtt.viz.drawing import FOLD, Layout, axis, graph, legend
from lmtt.viz.markup import SHADES, meter, safe, step, token_cell

MAX_EDGES = 3000  # drawn at most: beyond, neither the eye nor the browser follows
PROMPT_TOKENS = 600  # a longer prompt is shown folded too
LISTED_EDGES = 20
LISTED_TOKENS = 10
SLIDER_TOP = 0.8


def route_page(given: Route) -> str:
    """The whole page as text."""
    drawn = _drawn(given)
    layout = Layout.of(given, drawn)
    page, style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")
    )
    name = safe(str(given.trace.meta["model"]["name"]))
    said = predictions(given, k=1)[0].token
    return Template(page).substitute(
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        title=f"{name}: why {safe(quoted(said))}?",
        said=safe(token_label(said, 40)),
        subtitle=_subtitle(given, name),
        prompt=_prompt(given, layout),
        legend=legend(given),
        slider=_slider(given, drawn),
        axis=axis(layout),
        graph=graph(given, drawn, layout),
        hint="Point at an edge or a node for its numbers." + _folded(given, layout),
        predictions=_predictions(given),
        sources=_sources(given),
        edges=_edge_table(given),
        footer=_footer(given),
    )


def _drawn(given: Route) -> Route:
    """The route whose edges are drawn: the strongest MAX_EDGES of it.

    It goes lower than asked, for the slider, where every token has a column and no weight depends on the
    threshold.
    """
    wide = given
    if not given.renormalized and given.position < FOLD:
        wide = route(given.trace, given.position, float(given.trace.meta["floor"]))
    edges = wide.edges[:MAX_EDGES]
    return Route(wide.trace, wide.position, wide.threshold, wide.renormalized, wide.nodes, edges, wide.heads)


def _slider(given: Route, drawn: Route) -> str:
    """A threshold to move; out of sight without the script, and the page then shows what was asked for."""
    if len(given.edges) > len(drawn.edges):
        return f"<span>the strongest {len(drawn.edges):,} of {len(given.edges):,} edges are drawn</span>"
    if given.renormalized:
        return "<span>renormalised weights depend on the threshold: the page shows this one</span>"
    # All edges revealed above `lowest` are drawn: the first one left out is revealed no higher than the last.
    cut = float(drawn.edges["reveal"][-1]) if len(drawn.edges) == MAX_EDGES else 0.0
    lowest = min(given.threshold, max(drawn.threshold, cut)) or 1e-4  # 0 has no logarithm
    value = math.log10(max(given.threshold, lowest))
    return (
        '<label class="slider" hidden>threshold <input id="tau" type="range" '
        f'min="{math.log10(lowest):.4f}" max="{max(math.log10(SLIDER_TOP), value):.4f}" step="0.005" '
        f'value="{value:.4f}" data-threshold="{given.threshold!r}">'
        f'<output id="tau-badge" for="tau">{given.threshold:g}: {len(given.edges):,} edges</output></label>'
    )


def _hash(text: str) -> str:
    """How a Content-Security-Policy names one inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- what is said around the drawing ---


def _subtitle(given: Route, name: str) -> str:
    trace = given.trace
    attention = int(np.count_nonzero(given.edges["kind"] == "attention"))
    tokens = len(np.unique(given.nodes["position"]))
    target = f'<span class="tok">{safe(token_label(trace.tokens[given.position], 40))}</span>'
    return (
        f"{name} · {'renormalised route' if given.renormalized else 'route'} to {target} at position "
        f"{given.position}: {len(given.edges):,} edges above {given.threshold:g}, {attention:,} of them "
        f"attention, through {tokens:,} of {len(trace.tokens):,} tokens and {len(trace.parallel)} layers"
    )


def _prompt(given: Route, layout: Layout) -> str:
    tokens, shares = given.trace.tokens, given.token_shares.tokens
    shown: Iterable[int] = range(len(tokens)) if len(tokens) <= PROMPT_TOKENS else layout.column
    parts, previous = [], -1
    for position in shown:
        if position > previous + 1:
            parts.append(f'<span class="gap" title="{position - previous - 1} tokens">⋯</span>')
        place = "target" if position == given.position else "later" if position > given.position else ""
        parts.append(
            f'<span class="tok s{step(shares[position], SHADES)} {place}" '
            f'title="[{position}] share {shares[position]:.4f}">{safe(tokens[position]) or "∅"}</span>'
        )
        previous = position
    return "".join(parts)


def _folded(given: Route, layout: Layout) -> str:
    out = given.position + 1 - len(layout.column)
    return f" {out:,} tokens that are not on the route are folded away (⋯)." if out else ""


def _row(name: str, share: float, kind: str = "") -> str:
    cells = f'<td class="name">{name}</td><td>{meter(share)}</td><td class="n">{share:.1%}</td>'
    return f'<tr class="{kind}">{cells}</tr>'


def _predictions(given: Route) -> str:
    return "".join(
        _row(f'<span class="tok">{safe(token_label(p.token))}</span>', p.probability)
        for p in predictions(given)
    )


def _sources(given: Route) -> str:
    shares, top = given.token_shares, strongest_tokens(given, LISTED_TOKENS)
    rows = [_row(token_cell(given, p), float(shares.tokens[p])) for p in top]
    remaining = {
        "other tokens": float(shares.tokens.sum() - shares.tokens[top].sum()),
        "biases": shares.bias,
        "unattributed": shares.unattributed,
    }
    rows += [_row(name, share, "other") for name, share in remaining.items() if share >= 5e-4]
    return "".join(rows)


def _edge_table(given: Route) -> str:
    rows = []
    for row in strongest_attention(given, LISTED_EDGES):
        edge = given.edges[row]
        source, target = (token_cell(given, edge[f"{end}_position"]) for end in ("source", "target"))
        rows.append(
            f'<tr><td class="n">{edge["layer"]}</td><td>{source}</td><td>{target}</td>'
            f'<td class="n">{edge["weight"]:.4f}</td><td>{meter(float(edge["weight"]))}</td>'
            f"<td>{heads_text(given, row, 5)}</td></tr>"
        )
    return "".join(rows) or '<tr><td colspan="6">none is on this route</td></tr>'


def _footer(given: Route) -> str:
    meta = given.trace.meta
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return safe(
        "An edge is on the route if its contribution, and every one on some way from it to the target, "
        f"is above the threshold. Measure {meta['measure']}; edges kept above {meta['floor']:g}; "
        f"computed in {meta['dtype']}; {versions}."
    )
