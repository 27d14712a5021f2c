"""Small tables as HTML; every text of others passes `markup.safe`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lmtt.graph.text import token_label
from lmtt.viz.markup import meter, safe

if TYPE_CHECKING:
    from lmtt.trace import Trace

__all__ = ["place", "safe", "scores", "sentence", "share", "table", "token", "words"]
CLIP = 28


def token(text: str, width: int = CLIP) -> str:
    """A token as a monospaced label, clipped."""
    return f'<span class="tok">{safe(token_label(text, width))}</span>'


def place(trace: Trace, position: int, width: int = CLIP) -> str:
    """A token of a run and, small beside it, its position."""
    return f'{token(trace.tokens[position], width)} <span class="dim">[{int(position)}]</span>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already; columns in `numbers` are set to the right."""
    right = [' class="n"' if i in numbers else "" for i in range(len(heads))]
    head = "".join(f"<th{r}>{h}</th>" for r, h in zip(right, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{r}>{cell}</td>" for r, cell in zip(right, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table class="list"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def scores(
    promoted: Iterable[tuple[str, int, float]],
    suppressed: Iterable[tuple[str, int, float]],
    unit: str = "logit",
) -> str:
    """Promoted and suppressed tokens side by side."""
    rows = [
        (token(p[0]), f"{p[2]:+.3f}", token(s[0]), f"{s[2]:+.3f}")
        for p, s in zip(promoted, suppressed, strict=True)
    ]
    return table(["promoted", unit, "suppressed", unit], rows, numbers=(1, 3))


def words(found: Iterable[tuple[str, int, float]]) -> str:
    """A few tokens in a row."""
    return " ".join(token(name, 14) for name, _, _ in found)


def share(value: float, of: float = 1.0) -> str:
    """A bar for a value's size, of another colour if it is negative."""
    bar = meter(min(1.0, abs(value) / of if of else 0.0))
    return bar.replace('class="meter"', 'class="meter minus"') if value < 0 else bar


def sentence(text: str) -> str:
    """One paragraph that says something to the reader."""
    return f'<p class="say">{safe(text)}</p>'
