"""The small pieces of HTML and SVG that the pages share; all text of others passes `safe`."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from lmtt.graph.text import token_label, visible

if TYPE_CHECKING:
    from lmtt.graph.routes import Route

SHADES = (0.005, 0.02, 0.06, 0.15, 0.3)  # steps of a token's share: classes s0 ... s5


def safe(text: str) -> str:
    """Visible, then escaped for an element or a quoted attribute."""
    return html.escape(visible(text), quote=True)


def token_cell(route: Route, position: int) -> str:
    """A token and, small beside it, its position."""
    label = safe(token_label(route.trace.tokens[int(position)]))
    return f'<span class="tok">{label}</span> <span class="at">{position}</span>'


def step(value: float, steps: tuple[float, ...]) -> int:
    """Which of the steps a value has reached, from 0."""
    return int(np.searchsorted(steps, float(value), side="right"))


def meter(share: float) -> str:
    """A bar from 0 to 1."""
    return (
        '<svg class="meter" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8" rx="2"/>'
        f'<rect width="{100 * share:.1f}" height="8" rx="2"/></svg>'
    )
