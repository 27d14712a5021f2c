"""The route view as a Panel component: the same JavaScript as in the exported page."""

from __future__ import annotations

from typing import Any, ClassVar

import param
from panel.custom import JSComponent

from lmtt.viz import theme
from lmtt.viz.script import bundle, source


class RouteView(JSComponent):  # type: ignore[misc] # panel ships no types
    """A store (of `store.pack`) to be looked at; threshold, position and picked follow what a person does."""

    store = param.Bytes(default=b"", doc="what is shown; empty for nothing")
    opened = param.String(
        default="", doc="the store that the page holds already (front.py), if none was sent"
    )
    wanted = param.Boolean(default=False, doc="the page holds another one: it has to be sent")
    threshold = param.Number(default=0.04, bounds=(0, 1))
    position = param.Integer(default=-1, doc="the start; -1 is the last token")
    picked = param.Dict(default={}, doc="what was clicked: {kind, layer, position, source, site}")
    dark = param.Boolean(default=False, doc="the reader's system is followed unless `by_hand`")
    by_hand = param.Boolean(default=False, doc="dark was switched; the browser remembers it")
    sent = param.Integer(default=0, doc="counts what the server sent; at first, that it is there")
    received = param.Integer(default=0, doc="the browser's answer")
    themes = param.String(default=theme.css(":root", system=False), constant=True, doc="CSS for the document")

    # What a person waits for; anything else Panel collects for 50 ms before it looks at it.
    _priority_changes: ClassVar[list[str]] = ["picked", "position", "threshold"]

    _esm: ClassVar[str] = bundle("panel.js")
    _stylesheets: ClassVar[list[Any]] = [
        source("view.css") + ":host, .rv { height: 100%; } .rv { background: transparent; }"
    ]
