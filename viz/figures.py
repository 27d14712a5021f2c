"""Charts: arrays in, a Bokeh figure out. Nothing is computed; all text is plain, whatever a token holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    CrosshairTool,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NoOverlap,
    PlainText,
    Range1d,
    Span,
    TapTool,
)
from bokeh.palettes import interp_palette
from bokeh.plotting import figure
from numpy.typing import NDArray

from lmtt.viz.theme import DARK, LIGHT, Theme

LARGEST_MAP = 512  # of a larger one, blocks show their largest value
QUANTISED = 256  # a map of more tokens is sent as bytes
LABELLED = 40  # tokens along an axis that may be labelled
MONO = "ui-monospace, DejaVu Sans Mono, monospace"

Array = NDArray[Any]
Picked = Callable[[int], None]


def theme_of(dark: bool) -> Theme:
    """The colours of one mode."""
    return DARK if dark else LIGHT


def bars(names: Sequence[str], values: Array, dark: bool, *, title: str, picked: Picked | None = None) -> Any:
    """Horizontal bars, the first on top; a click on one is handed its index."""
    theme, n = theme_of(dark), len(names)
    source = ColumnDataSource(
        {"y": np.arange(n), "value": np.asarray(values, np.float64), "name": list(names)}
    )
    low, high = min(0.0, float(np.min(values, initial=0.0))), float(np.max(values, initial=0.0)) or 1.0
    plot = _plot(theme, title, height=max(90, 46 + 19 * n), x=(low * 1.05, high * 1.12), y=(n - 0.4, -0.6))
    drawn = plot.hbar(
        y="y",
        right="value",
        left=0,
        height=0.72,
        source=source,
        fill_color=theme.attention[3],
        line_color=None,
    )
    drawn.nonselection_glyph = drawn.glyph
    drawn.selection_glyph = drawn.glyph.clone(fill_color=theme.target)
    _labels(plot.yaxis[0], names)
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[("", "@name"), ("value", "@value{0.00000}")]))
    if picked is not None:
        plot.add_tools(TapTool(renderers=[drawn]))
        _on_pick(source, picked)
    return plot


def maps(
    left: Array, right: Array, tokens: Sequence[str], dark: bool, *, titles: tuple[str, str]
) -> tuple[Any, Any]:
    """Two [T, T] maps side by side (row i: destination) with one zoom and one crosshair."""
    theme, T = theme_of(dark), len(tokens)
    x, y = Range1d(-0.5, T - 0.5, bounds="auto"), Range1d(T - 0.5, -0.5, bounds="auto")
    cross = CrosshairTool(
        overlay=[
            Span(dimension=d, line_color=theme.target, line_width=1, line_alpha=0.8)
            for d in ("width", "height")
        ]
    )
    found = []
    for values, title, ramp in ((left, titles[0], theme.attention), (right, titles[1], theme.mlp)):
        plot = _plot(theme, title, height=330, x=x, y=y, tools="pan,wheel_zoom,reset")
        top = float(np.max(values, initial=0.0)) or 1.0
        mapper = LinearColorMapper(_ramp(theme, ramp), low=0, high=top)
        shown = _blocks(np.asarray(values, np.float32))
        if T > QUANTISED:
            shown = np.round(shown * (255 / top)).astype(np.uint8)
            mapper = LinearColorMapper(_ramp(theme, ramp), low=0, high=255)
        image = plot.image(image=[shown], x=-0.5, y=-0.5, dw=T, dh=T, color_mapper=mapper, level="image")
        plot.add_tools(cross)
        if T <= QUANTISED:
            plot.add_tools(
                HoverTool(renderers=[image], tooltips=[("value", "@image{0.00000}")], attachment="above")
            )
        _token_axes(plot, tokens)
        if T <= QUANTISED:
            plot.add_layout(_colour_bar(theme, mapper), "right")
        found.append(plot)
    return found[0], found[1]


def heat(
    values: Array,
    dark: bool,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    words: Sequence[Sequence[str]] | None = None,
    extra: dict[str, list[str]] | None = None,
    diverging: bool = False,
    ramp: str = "attention",
    high: float | None = None,
    picked: Callable[[int, int], None] | None = None,
    row_height: int = 17,
) -> Any:
    """A grid of cells, row 0 at the bottom, with words in them if they fit; a click gives (row, column)."""
    theme = theme_of(dark)
    n, m = values.shape
    flat = np.nan_to_num(np.asarray(values, np.float64)).ravel()
    top = high or float(np.abs(flat).max(initial=0.0)) or 1.0
    if diverging:
        colours = [*reversed(theme.mlp), theme.card, *theme.attention]
        mapper = LinearColorMapper(interp_palette(colours, 255), low=-top, high=top)
    else:
        mapper = LinearColorMapper(_ramp(theme, getattr(theme, ramp)), low=0, high=top)
    row, column = np.divmod(np.arange(n * m), m)
    data = {
        "row": row, "column": column, "value": flat,
        "row_name": [rows[r] for r in row], "column_name": [columns[c] for c in column],
    }  # fmt: skip
    tips = [("", "@row_name"), ("at", "@column_name"), ("value", "@value{0.0000}")]
    for name, texts in (extra or {}).items():
        data[name] = texts
        tips.append((name, f"@{{{name}}}"))
    source = ColumnDataSource(data)
    plot = _plot(
        theme, title, height=int(110 + row_height * n), x=(-0.5, m - 0.5), y=(-0.5, n - 0.5), tools="save"
    )
    cells = plot.rect(
        x="column", y="row", width=0.97, height=0.95, source=source, line_color=None,
        fill_color={"field": "value", "transform": mapper},
    )  # fmt: skip
    cells.nonselection_glyph = cells.glyph
    cells.selection_glyph = cells.glyph.clone(line_color=theme.target, line_width=2)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tips))
    if words is not None:
        flat_words = [word for line in words for word in line]
        strong = np.abs(flat) > 0.55 * top
        ink = np.where(strong, theme.card, theme.text)
        inked = ColumnDataSource({"x": column, "y": row, "word": flat_words, "ink": ink})
        plot.text(
            x="x", y="y", text="word", source=inked, text_color="ink", text_align="center",
            text_baseline="middle", text_font_size="10px", text_font={"value": MONO},
        )  # fmt: skip
    _labels(plot.xaxis[0], columns, slanted=True)
    _labels(plot.yaxis[0], rows, policy=True)
    plot.add_layout(_colour_bar(theme, mapper), "right")
    if picked is not None:
        plot.add_tools(TapTool(renderers=[cells]))
        _on_pick(source, lambda index: picked(int(index) // m, int(index) % m))
    return plot


# --- pieces ---


def _plot(theme: Theme, title: str, *, height: int, x: Any, y: Any, tools: str = "") -> Any:
    plot = figure(
        title=title,
        height=height, sizing_mode="stretch_width", x_range=_range(x), y_range=_range(y), tools=tools,
        toolbar_location="above" if tools else None, min_border=4, background_fill_color=None,
        border_fill_color=None, outline_line_color=None, lod_threshold=None,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.grid.visible = False
    plot.title.text_color, plot.title.text_font_size, plot.title.text_font_style = (
        theme.text,
        "12px",
        "normal",
    )
    for axis in plot.axis:
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.major_label_text_color = theme.muted
        axis.major_label_text_font_size = "11px"
    return plot


def _range(given: Any) -> Any:
    return given if isinstance(given, Range1d) else Range1d(*given)


def _labels(axis: Any, names: Sequence[str], *, slanted: bool = False, policy: bool = False) -> None:
    """One label for each row or column. As plain text: a token between $$ is no formula."""
    axis.ticker = FixedTicker(ticks=list(range(len(names))))
    axis.major_label_overrides = {i: PlainText(text=name or " ") for i, name in enumerate(names)}
    axis.major_label_text_font = MONO
    if slanted:
        axis.major_label_orientation = 0.9
    if policy or len(names) > LABELLED:
        axis.major_label_policy = NoOverlap()


def _token_axes(plot: Any, tokens: Sequence[str]) -> None:
    short = [token if len(token) <= 10 else token[:9] + "…" for token in tokens]
    for axis in (plot.xaxis[0], plot.yaxis[0]):
        _labels(axis, short, policy=True)
    plot.xaxis[0].major_label_orientation = 0.9


def _ramp(theme: Theme, ramp: Sequence[str]) -> list[str]:
    return list(interp_palette([theme.card, *ramp], 256))


def _colour_bar(theme: Theme, mapper: Any) -> Any:
    return ColorBar(
        color_mapper=mapper, width=8, label_standoff=4, background_fill_color=None, padding=2,
        border_line_color=None, bar_line_color=None, major_tick_line_color=None,
        major_label_text_color=theme.muted, major_label_text_font_size="10px",
    )  # fmt: skip


def _blocks(values: Array) -> Array:
    """Large maps shrink: each cell is the largest of its block, so that no peak is lost."""
    T = len(values)
    if T <= LARGEST_MAP:
        return values
    size = -(-T // LARGEST_MAP)
    padded = np.pad(values, [(0, -T % size)] * 2)
    n = len(padded) // size
    largest: Array = padded.reshape(n, size, n, size).max((1, 3))
    return largest


def _on_pick(source: Any, picked: Picked) -> None:
    def changed(_attribute: str, _old: Any, new: list[int]) -> None:
        if new:
            picked(new[0])

    source.selected.on_change("indices", changed)
