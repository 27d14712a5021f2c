"""The panes that all views are made of, and how those that are shown already are filled again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import panel as pn

from lmtt.viz.script import source

T = TypeVar("T")
Ask = Callable[[Callable[[], T]], Awaitable[T]]  # the answer of the worker's thread
WIDE = {"sizing_mode": "stretch_width"}
# Panel lays half a white sheet over what is being filled, also over a dark page.
FILLING = ":host(.pn-loading):after { background-color: rgba(127, 127, 127, 0.12) !important; }"


def html(text: str = "") -> Any:
    """A pane of our own HTML, which is safe already."""
    return pn.pane.HTML(_framed(text), stylesheets=[source("dashboard.css")], **WIDE)


def fill(pane: Any, text: str) -> None:
    """Other HTML in a pane of `html`."""
    pane.object = _framed(text)


def bokeh(figure: Any) -> Any:
    """A figure in a pane as wide as there is room."""
    return pn.pane.Bokeh(figure, **WIDE)


async def change(figures: Callable[[], None]) -> None:
    """Change figures that a browser may be showing: under the lock of its document, in one message."""
    document = pn.state.curdoc
    if document is None or document.session_context is None:
        figures()
        return
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def now() -> None:
        try:
            figures()
        except BaseException as error:  # it belongs to whoever waits
            done.set_exception(error)
        else:
            done.set_result(None)

    document.add_next_tick_callback(now)
    await done


def _framed(text: str) -> str:
    return f'<div class="lmtt">{text}</div>'
