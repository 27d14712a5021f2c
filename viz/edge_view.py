"""What a click on an attention edge shows: its heads as bars; of one head its maps and what it says.

Made once for a run and filled at each click: to build a chart takes a browser several times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import panel as pn

from lmtt.graph.text import quoted, token_label
from lmtt.trace import Trace
from lmtt.viz import figures, tables
from lmtt.viz.panes import WIDE, Ask, bokeh, change, fill, html

HEADS = 12  # of an edge
LISTED = 10  # promoted and suppressed tokens
NO_MODEL = "This run was opened without its model; start `lmtt serve RUN --model MODEL` to see"


class EdgeView:
    """The panes for one run in one theme. Of several calls of `show` the last one wins."""

    def __init__(self, trace: Trace, dark: bool, ask: Ask[Any]) -> None:
        self._trace = trace
        self._ask = ask
        self._latest = 0
        self._edge = (0, 0, 0)  # layer, source, position
        self._order: list[int] = []
        self._bars = figures.Bars(dark, title="its heads (click one)", picked=self._clicked)
        self._title, self._here, self._whole = html(), html(), html()
        self._maps: figures.Maps | None = None
        below: list[Any] = [html(tables.sentence(f"{NO_MODEL} a head’s maps and what it promotes."))]
        if trace.has_model:
            self._maps = figures.Maps([token_label(token, 16) for token in trace.tokens], dark)
            pair = pn.Row(bokeh(self._maps.left), bokeh(self._maps.right), **WIDE)
            below = [pair, self._here, self._whole]
        self._all = [self._title, bokeh(self._bars.plot), *below]
        self._none = [self._title, html(tables.sentence("None of its heads is kept in this run."))]

    async def show(self, layer: int, source: int, position: int, title: str) -> list[Any]:
        """The panes, filled for an edge."""
        self._latest += 1
        mine, trace = self._latest, self._trace

        def look() -> Any:
            return trace.heads(layer, source=source, destination=position)

        shares = await self._ask(look) if trace.has_model else look()
        order = [int(h) for h in np.argsort(-shares, kind="stable")[:HEADS] if shares[h] > 0]
        if mine != self._latest:
            return self._all
        self._edge, self._order = (layer, source, position), order
        if not order:
            fill(self._title, title)
            return self._none
        found = await self._look(order[0])

        def filled() -> None:
            fill(self._title, title)
            self._bars.show([f"head {h}" for h in order], shares[order])
            self._fill(order[0], found)

        if mine == self._latest:
            await change(filled)
        return self._all

    def _clicked(self, index: int) -> None:
        if index < len(self._order):
            pn.state.execute(lambda: self._show_head(self._order[index]))

    async def _show_head(self, head: int) -> None:
        self._latest += 1
        mine = self._latest
        found = await self._look(head)
        if mine == self._latest:
            await change(lambda: self._fill(head, found))

    async def _look(self, head: int) -> Any:
        """Both maps of a head, and what it says by reading this source, and in all; None without a model."""
        trace, (layer, source, position) = self._trace, self._edge
        if self._maps is None:
            return None

        def look() -> tuple[Any, ...]:
            return (
                trace.attention_map(layer, head),
                trace.contribution_map(layer, head),
                trace.promoted(layer, position, ("head", head, source), k=LISTED),
                trace.promoted(layer, position, ("head", head), k=LISTED),
            )

        return await self._ask(look)

    def _fill(self, head: int, found: Any) -> None:
        if self._maps is None:
            return
        attention, contribution, here, whole = found
        _, source, position = self._edge
        self._maps.show(attention, contribution, (f"head {head}: attention", f"head {head}: contribution"))
        reading = tables.safe(quoted(self._trace.tokens[source]))
        at = tables.place(self._trace, position)
        fill(self._here, f"<h4>what head {head} says by reading {reading}</h4>{tables.scores(*here)}")
        fill(self._whole, f"<h4>what head {head} says at {at}</h4>{tables.scores(*whole)}")
