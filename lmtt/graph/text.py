"""Text that came from a prompt or a vocabulary, made safe to print: what a reader sees is what is there.

A token may hold anything: an escape sequence that repaints the terminal, a bidi override that reorders the
line around it, a NUL. Here every character that would not print as itself becomes a visible stand-in.
(Escaping for HTML comes after this, and is not done here.)
"""

from __future__ import annotations

import unicodedata

SPACE = "·"
_STAND_INS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}
_C0_PICTURES = 0x2400  # U+2400 + c is the picture of the control character c < 0x20


def visible(text: str, *, spaces: bool = False) -> str:
    """`text` without a character that controls how its surroundings are shown.

    Control characters become their pictures (⏎ ⇥ ␛), every other invisible or reordering character
    (bidi controls, zero-width, surrogates, private use, unassigned) its code point as ⟨U+202E⟩; a leading
    combining mark gets a ◌ to sit on. `spaces` shows blanks too: · and, for the unusual ones, the code point.
    """
    if text.isascii() and text.isprintable():
        return text.replace(" ", SPACE) if spaces else text
    shown = "".join(_shown(character, spaces) for character in text)
    return "◌" + shown if shown and unicodedata.category(shown[0]).startswith("M") else shown


def _shown(character: str, spaces: bool) -> str:
    if character == " ":
        return SPACE if spaces else " "
    if character.isprintable():
        return character
    if character in _STAND_INS:
        return _STAND_INS[character]
    if character < " ":
        return chr(_C0_PICTURES + ord(character))
    if not spaces and unicodedata.category(character) == "Zs":
        return " "
    return f"⟨U+{ord(character):04X}⟩"


def clipped(text: str, width: int) -> str:
    """At most `width` characters; a cut is marked by …"""
    return text if len(text) <= width else text[: width - 1] + "…"


def quoted(token: str, width: int = 24) -> str:
    """A token in quotation marks, safe, blanks as they are, at most `width` characters of it."""
    return f'"{clipped(visible(token), width)}"'


def token_label(token: str, width: int = 24) -> str:
    """A token standing alone: safe, blanks shown, at most `width` characters, ∅ if empty."""
    return clipped(visible(token, spaces=True), width) or "∅"
