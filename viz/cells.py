"""Words in the cells of a heat map, and a strip of all its columns where not all can be in view.

How wide a cell is, only the browser knows: `cells.mjs` chooses the window and cuts the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, CustomJS, PanTool, RangeTool

from lmtt.viz.figures import MONO, blank, theme_of
from lmtt.viz.theme import Theme

LEAST = 27  # pixels of a cell in which four letters can be read
FONT = 10  # pixels
STRONG = 0.55  # of the scale: from there on the ink is the other one


def worded(plot: Any, words: Sequence[Sequence[str]], dark: bool) -> Any:
    """The figure of `figures.heat`, [rows][columns] words in it, above a strip of all its columns.

    In view are as many columns as can be read, the last ones at first; dragging figure or strip shows others.
    """
    theme, m = theme_of(dark), len(words[0])
    cells = next(renderer for renderer in plot.renderers if renderer.name == "cells")
    data, scale = cells.data_source.data, cells.glyph.fill_color.transform
    whole = [word for line in words for word in line]
    ink = np.where(np.abs(data["value"]) > STRONG * scale.high, theme.card, theme.text)
    written = ColumnDataSource({"x": data["column"], "y": data["row"], "word": [""] * len(whole), "ink": ink})
    plot.text(
        x="x", y="y", text="word", source=written, text_color="ink", text_align="center",
        text_baseline="middle", text_font_size=f"{FONT}px", text_font={"value": MONO},
    )  # fmt: skip
    plot.x_range.bounds = (-0.5, m - 0.5)
    pan = PanTool(dimensions="width")
    plot.add_tools(pan)
    plot.toolbar.active_drag = pan
    strip = _strip(theme, plot, cells)
    fit = CustomJS.from_file(
        Path(__file__).with_name("cells.mjs"), plot=plot, strip=strip, written=written, words=whole,
        columns=m, least=LEAST, font=f"{FONT}px {MONO}",
    )  # fmt: skip
    plot.js_on_change("inner_width", fit)
    plot.x_range.js_on_change("start", fit)
    plot.x_range.js_on_change("end", fit)
    return column(plot, strip, sizing_mode="stretch_width")


def _strip(theme: Theme, plot: Any, cells: Any) -> Any:
    """All columns in little, with a frame around those in view: to be dragged, or made wider."""
    strip = blank(theme, "", height=46, x=plot.x_range.bounds, y=(plot.y_range.start, plot.y_range.end))
    drawn = strip.rect(
        x="column", y="row", width=1, height=1, source=cells.data_source, line_color=None,
        fill_color=cells.glyph.fill_color,
    )  # fmt: skip
    drawn.nonselection_glyph = drawn.selection_glyph = drawn.glyph
    strip.axis.visible = False
    tool = RangeTool(x_range=plot.x_range, start_gesture="pan")
    tool.overlay.update(
        inverted=True, fill_color=theme.card, fill_alpha=0.7, line_color=theme.target, line_dash="solid",
        line_width=2,
    )  # fmt: skip
    strip.add_tools(tool)
    return strip
