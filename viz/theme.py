"""Colours, once for all views: of the page and the route graph (as CSS variables) and of the charts.

Families differ by hue (blue attention, orange MLP, grey residual, violet what was not taken apart) and by
shape; strength is width and lightness, so that the picture survives in grey. In the dark the ramps run the
other way.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Theme:
    """Colours of one mode; ramps go from weak to strong."""

    bg: str
    card: str
    line: str
    band: str
    text: str
    muted: str
    target: str  # the start, and what is selected
    node: str
    node_line: str
    opaque: str
    share: str  # r, g, b of the tokens' shading
    share_top: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    residual: tuple[str, ...]


LIGHT = Theme(
    bg="#f6f7f9",
    card="#ffffff",
    line="#e2e6ea",
    band="#f5f7f9",
    text="#1c2530",
    muted="#5f6b78",
    target="#c4007a",
    node="#ffffff",
    node_line="#8290a0",
    opaque="#7b5ea7",
    share="8, 76, 125",
    share_top=".55",
    attention=("#b9d7ea", "#7fb5d8", "#3f8fc4", "#0f6ba8", "#084c7d", "#052f52"),
    mlp=("#fbd7b0", "#f7b36b", "#ee8f2e", "#d5700b", "#a95304", "#713602"),
    residual=("#e6eaed", "#dde2e6", "#d2d8dd", "#c5cdd4", "#b5bfc8", "#a3afba"),
)
DARK = Theme(
    bg="#0f1317",
    card="#161b21",
    line="#2a323b",
    band="#1b2128",
    text="#dce2e8",
    muted="#93a0ad",
    target="#ff5ec4",
    node="#161b21",
    node_line="#7c8a99",
    opaque="#b79ee0",
    share="74, 160, 221",
    share_top=".6",
    attention=("#25506f", "#2b6b99", "#3686bf", "#4aa0dd", "#86c7f2", "#cdeaff"),
    mlp=("#4a2f12", "#74480f", "#a4640f", "#d6861d", "#f3ad52", "#ffd9a3"),
    residual=("#262d35", "#2c343d", "#343e48", "#3e4a55", "#4a5763", "#596775"),
)


def variables(theme: Theme) -> str:
    """The theme as CSS custom properties: --bg, --node-line, --a0 ... --a5 and so on."""
    found: list[tuple[str, str]] = []
    for field in fields(theme):
        value = getattr(theme, field.name)
        if isinstance(value, str):
            found.append((field.name.replace("_", "-"), value))
        else:
            found += [(f"{field.name[0]}{n}", colour) for n, colour in enumerate(value)]
    return " ".join(f"--{name}: {value};" for name, value in found)


def css(scope: str, *, system: bool = True) -> str:
    """Light; dark where the reader's system is, if `system`; and what `data-theme` on the scope says."""
    light, dark = variables(LIGHT), variables(DARK)
    media = f"@media (prefers-color-scheme: dark) {{ {scope} {{ {dark} }} }}\n" if system else ""
    return (
        f"{scope} {{ {light} }}\n{media}"
        f'{scope}[data-theme="light"] {{ {light} color-scheme: light; }}\n'
        f'{scope}[data-theme="dark"] {{ {dark} color-scheme: dark; }}\n'
    )
