"""Charts: arrays in, a Bokeh figure out. Nothing is computed; all text is plain, whatever a token holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    AdaptiveTicker,
    ColorBar,
    ColumnDataSource,
    CrosshairTool,
    CustomJSTickFormatter,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NoOverlap,
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
UPRIGHT = 2  # characters that need no slant
LABELLED = 40  # tokens along an axis that may be labelled
MONO = "ui-monospace, DejaVu Sans Mono, monospace"

Array = NDArray[Any]
Picked = Callable[[int], None]


def theme_of(dark: bool) -> Theme:
    """The colours of one mode."""
    return DARK if dark else LIGHT


class Bars:
    """Horizontal bars, the first on top; a click on one is handed its index. `show` fills them."""

    def __init__(self, dark: bool, *, title: str, picked: Picked | None = None) -> None:
        theme = theme_of(dark)
        self._source = ColumnDataSource({"y": [], "value": [], "name": []})
        self.plot = blank(theme, title, height=90, x=(0, 1), y=(0.6, -0.6))
        drawn = self.plot.hbar(
            y="y", right="value", left=0, height=0.72, source=self._source,
            fill_color=theme.attention[3], line_color=None,
        )  # fmt: skip
        drawn.nonselection_glyph = drawn.glyph
        drawn.selection_glyph = drawn.glyph.clone(fill_color=theme.target)
        _labels(self.plot.yaxis[0], [""])
        self.plot.add_tools(
            HoverTool(renderers=[drawn], tooltips=[("", "@name"), ("value", "@value{0.00000}")])
        )
        if picked is not None:
            self.plot.add_tools(TapTool(renderers=[drawn]))
            _on_pick(self._source, picked)

    def show(self, names: Sequence[str], values: Array) -> Any:
        """The figure, with these bars in place of those before."""
        n = len(names)
        low, high = min(0.0, float(np.min(values, initial=0.0))), float(np.max(values, initial=0.0)) or 1.0
        self._source.selected.indices = []
        self._source.data = {
            "y": np.arange(n), "value": np.asarray(values, np.float64), "name": list(names),
        }  # fmt: skip
        self.plot.height = max(90, 46 + 19 * n)
        self.plot.x_range.update(start=low * 1.05, end=high * 1.12)
        self.plot.y_range.update(start=n - 0.4, end=-0.6)
        _name(self.plot.yaxis[0], names)
        return self.plot


class Maps:
    """Two [T, T] maps side by side (row i: destination), one zoom, one crosshair; `show` fills them."""

    def __init__(self, tokens: Sequence[str], dark: bool) -> None:
        theme, T = theme_of(dark), len(tokens)
        x, y = Range1d(-0.5, T - 0.5, bounds="auto"), Range1d(T - 0.5, -0.5, bounds="auto")
        cross = CrosshairTool(
            overlay=[
                Span(dimension=d, line_color=theme.target, line_width=1, line_alpha=0.8)
                for d in ("width", "height")
            ]
        )
        self._quantised = T > QUANTISED
        self._parts: list[tuple[Any, Any, Any]] = []  # figure, its source, its colours
        for ramp in (theme.attention, theme.mlp):
            plot = blank(theme, "", height=330, x=x, y=y, tools="pan,wheel_zoom,reset")
            mapper = LinearColorMapper(_ramp(theme, ramp), low=0, high=255 if self._quantised else 1)
            source = ColumnDataSource({"image": []})
            image = plot.image(
                image="image", x=-0.5, y=-0.5, dw=T, dh=T, source=source, color_mapper=mapper, level="image"
            )
            plot.add_tools(cross)
            _token_axes(plot, tokens)
            if not self._quantised:
                plot.add_tools(
                    HoverTool(renderers=[image], tooltips=[("value", "@image{0.00000}")], attachment="above")
                )
                plot.add_layout(_colour_bar(theme, mapper), "right")
            self._parts.append((plot, source, mapper))

    @property
    def left(self) -> Any:
        """The first map's figure."""
        return self._parts[0][0]

    @property
    def right(self) -> Any:
        """The second map's figure."""
        return self._parts[1][0]

    def show(self, left: Array, right: Array, titles: tuple[str, str]) -> None:
        """These maps in place of those before; the zoom stays."""
        for (plot, source, mapper), values, title in zip(self._parts, (left, right), titles, strict=True):
            top = float(np.max(values, initial=0.0)) or 1.0
            shown = _blocks(np.asarray(values, np.float32))
            if self._quantised:
                shown = np.round(shown * (255 / top)).astype(np.uint8)
            else:
                mapper.high = top
            plot.title.text = title
            source.data = {"image": [shown]}


def heat(
    values: Array,
    dark: bool,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    extra: dict[str, list[str]] | None = None,
    diverging: bool = False,
    ramp: str = "attention",
    high: float | None = None,
    picked: Callable[[int, int], None] | None = None,
    row_height: int = 17,
    wide: bool = False,
) -> Any:
    """A grid of cells, row 0 at the bottom; a click gives (row, column). `wide`: no scale at the right."""
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
    plot = blank(
        theme, title, height=int(110 + row_height * n), x=(-0.5, m - 0.5), y=(-0.5, n - 0.5), tools="save"
    )
    cells = plot.rect(
        x="column", y="row", width=0.97, height=0.95, source=source, line_color=None,
        fill_color={"field": "value", "transform": mapper}, name="cells",
    )  # fmt: skip
    cells.nonselection_glyph = cells.glyph
    cells.selection_glyph = cells.glyph.clone(line_color=theme.target, line_width=2)
    plot.add_tools(HoverTool(renderers=[cells], tooltips=tips))
    _labels(plot.xaxis[0], columns, slanted=max(map(len, columns)) > UPRIGHT)
    _labels(plot.yaxis[0], rows, policy=True)
    plot.add_layout(_colour_bar(theme, mapper, level=wide), "above" if wide else "right")
    if picked is not None:
        plot.add_tools(TapTool(renderers=[cells]))
        _on_pick(source, lambda index: picked(int(index) // m, int(index) % m))
    return plot


# --- pieces ---


def blank(theme: Theme, title: str, *, height: int, x: Any, y: Any, tools: str = "") -> Any:
    """A figure without anything in it."""
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
    """One label for each row or column, fewer where many are in view. A label is text, never a formula."""
    # A formatter rather than overrides: these are a model for each label, a second's work for long prompts.
    axis.formatter = CustomJSTickFormatter(code="return names[tick] ?? ''")
    many = len(names) > LABELLED
    axis.ticker = (
        AdaptiveTicker(mantissas=[1, 2, 5], min_interval=1, desired_num_ticks=16, num_minor_ticks=0)
        if many
        else FixedTicker()
    )
    _name(axis, names)
    axis.major_label_text_font = MONO
    if slanted:
        axis.major_label_orientation = 0.9
    if policy or many:
        axis.major_label_policy = NoOverlap()


def _name(axis: Any, names: Sequence[str]) -> None:
    """Other labels on an axis of `_labels`. No model is replaced: the server would go through all it has."""
    axis.formatter.args = {"names": list(names)}
    if isinstance(axis.ticker, FixedTicker):
        axis.ticker.ticks = list(range(len(names)))


def _token_axes(plot: Any, tokens: Sequence[str]) -> None:
    short = [token if len(token) <= 10 else token[:9] + "…" for token in tokens]
    for axis in (plot.xaxis[0], plot.yaxis[0]):
        _labels(axis, short, policy=True)
    plot.xaxis[0].major_label_orientation = 0.9


def _ramp(theme: Theme, ramp: Sequence[str]) -> list[str]:
    return list(interp_palette([theme.card, *ramp], 256))


def _colour_bar(theme: Theme, mapper: Any, *, level: bool = False) -> Any:
    size: dict[str, Any] = {"height": 6, "orientation": "horizontal"} if level else {"width": 8}
    return ColorBar(
        color_mapper=mapper, **size, label_standoff=4, background_fill_color=None, padding=2,
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
