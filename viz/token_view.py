"""What a click on a token shows: what its final state came from, and what it received and gave.

Made once for a run and filled at each click, as `edge_view.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from lmtt.graph.text import token_label
from lmtt.trace import Trace
from lmtt.viz import figures, tables
from lmtt.viz.panes import Ask, bokeh, change, fill, html

LISTED = 10


class TokenView:
    """The panes for one run in one theme. Of several calls of `show` the last one wins."""

    def __init__(self, trace: Trace, dark: bool, _ask: Ask[Any]) -> None:
        self._trace = trace
        self._latest = 0
        self._layer = np.repeat(np.arange(trace.n_layers), np.diff(trace.data.edges.layer_ptr))
        self._bars = figures.Bars(dark, title="what its final state came from, by all kept edges")
        self._title, self._received, self._gave = html(), html(), html()
        self._all = [self._title, bokeh(self._bars.plot), self._received, self._gave]

    async def show(self, position: int, title: str) -> list[Any]:
        """The panes, filled for a token."""
        self._latest += 1
        mine, trace, kept = self._latest, self._trace, self._trace.data.edges
        rolled = await asyncio.to_thread(trace.rollout, position)
        shares = np.asarray(rolled.shares)
        top = [int(p) for p in np.argsort(-shares, kind="stable")[:LISTED] if shares[p] > 0]
        names = [f"{token_label(trace.tokens[p], 14)} [{p}]" for p in top]
        received = self._listed(kept.destination, kept.source, position)
        gave = self._listed(kept.source, kept.destination, position)

        def filled() -> None:
            fill(self._title, title)
            self._bars.show(names, shares[top])
            fill(self._received, f"<h4>received: strongest attention edges into it</h4>{received}")
            fill(self._gave, f"<h4>gave: strongest attention edges out of it</h4>{gave}")

        if mine == self._latest:
            await change(filled)
        return self._all

    def _listed(self, mine: Any, other: Any, position: int) -> str:
        weight = self._trace.data.edges.weight
        rows = np.flatnonzero((mine == position) & (other != position))
        rows = rows[np.argsort(-weight[rows], kind="stable")[:LISTED]]
        if not len(rows):
            return "<p>nothing above the floor</p>"
        cells = [
            [
                str(self._layer[r]),
                tables.place(self._trace, int(other[r]), 16),
                f"{weight[r]:.4f}",
                tables.share(float(weight[r])),
            ]
            for r in rows
        ]
        return tables.table(["layer", "token", "contribution", ""], cells, numbers=(0, 2))
