"""A route as one page: self-contained, from a file or a notebook, asking no server for anything.

It holds the whole graph (`store.py`), so that start, threshold, folding and zoom work without a network;
`view.mjs` draws it, as in the dashboard. Tables and text are there without the script too. Nothing of the
model is computed here: shares and probabilities come with the route, reveal thresholds follow in the page by
the rule of `lmtt/graph/routes.py`.

Every string from a prompt, a vocabulary or a model's name goes through `markup.safe`, or into the store. None
enters the script or the styles, which are files beside this one; the page's policy admits these by their
hashes and nothing else: no request, no inline handler, no style attribute.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from string import Template

import numpy as np

from lmtt.graph.export import predictions
from lmtt.graph.routes import Route
from lmtt.graph.summary import heads_text, not_taken_apart, strongest_attention, strongest_tokens
from lmtt.graph.text import quoted, token_label
from lmtt.viz import theme
from lmtt.viz.markup import SHADES, meter, safe, step, token_cell
from lmtt.viz.script import bundle, source
from lmtt.viz.store import pack

PROMPT_TOKENS = 600  # of a longer prompt only the tokens on the route are shown as text
LISTED_EDGES = 20
LISTED_TOKENS = 10


def route_page(given: Route) -> str:
    """The whole page as text."""
    style, script = _style(), bundle("page.js")
    name = safe(str(given.trace.meta["model"]["name"]))
    said = predictions(given, k=1)[0].token
    store = pack(given.trace, renormalised_at=given.threshold if given.renormalized else None)
    return Template(source("page.html")).substitute(
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        store=base64.b64encode(store).decode(),
        start=f'data-threshold="{given.threshold!r}" data-position="{given.position}"',
        title=f"{name}: why {safe(quoted(said))}?",
        said=safe(token_label(said, 40)),
        target=token_cell(given, given.position),
        threshold=f"{given.threshold:g}",
        subtitle=_subtitle(given, name),
        prompt=_prompt(given),
        predictions=_predictions(given),
        sources=_sources(given),
        edges=_edge_table(given),
        footer=_footer(given),
    )


@cache
def _style() -> str:
    return theme.css(":root") + source("view.css") + source("page.css")


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


def _prompt(given: Route) -> str:
    tokens, shares = given.trace.tokens, given.token_shares.tokens
    shown: Sequence[int] = range(len(tokens))
    if len(tokens) > PROMPT_TOKENS:
        shown = np.unique(given.nodes["position"]).tolist()
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
        f"computed in {meta['dtype']}; {versions}. "
        + "".join(f"Not taken apart, {line}. " for line in not_taken_apart(meta.get("whole_sublayers", [])))
    )
