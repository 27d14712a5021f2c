"""Tokens grouped into words, sentences or chat turns, and shares summed over the groups.

1. The engine notes where each token lies in the prompt: by the tokenizer's own offsets where it has them,
   else by decoding a few tokens at a time. The note is part of a trace's meta, so a stored run groups too.
2. The text is cut: words at Unicode word boundaries (UAX 29), sentences after . ! ? … 。 and at line breaks
   (abbreviations are not known), turns where the chat template starts one.
3. A token belongs to the piece that holds its first character that is not blank; groups are runs of tokens.
   So a token is never cut, and one that has no text (an added special token) is a group of its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import regex
from numpy.typing import NDArray

from lmtt.errors import InputError, RunError
from lmtt.graph.text import clipped, quoted, visible
from lmtt.run.data import TraceData

F64 = NDArray[np.float64]
Unit = Literal["token", "word", "sentence", "turn"]
UNITS: tuple[Unit, ...] = ("token", "word", "sentence", "turn")
Turn = dict[str, str]  # role, content

_WORD = regex.compile(r"\b", regex.WORD | regex.VERSION1)
# After a full stop a lower-case letter goes on with the sentence; a line break always ends it.
_SENTENCE = regex.compile(
    r"(?<=[.!?…][\"'”’)\]]*)\s+(?=\S)(?!\p{Ll})|(?<=[。！？][」』”’）]*)(?![」』”’）])|(?<=\n)(?!\n)",
    regex.VERSION1,
)
_INCOMPLETE = "\ufffd"  # what a decoder gives for part of a character
_LONGEST_CHARACTER = 4  # bytes of UTF-8, hence tokens that one character may need


@dataclass(frozen=True)
class Span:
    """A run of tokens: first <= token < last, and start <= character < end in the prompt's text."""

    text: str
    first: int
    last: int
    start: int
    end: int
    role: str | None = None  # of a chat turn

    def label(self, width: int = 48) -> str:
        """`user: "Who was it?" [12]`: role, text and first token, safe to print."""
        role = f"{clipped(visible(self.role), 16)}: " if self.role else ""
        return f"{role}{quoted(self.text.strip(' '), width)} [{self.first}]"

    def until(self, last: int, data: TraceData) -> Span:
        """The part of it before a token."""
        end = prompt_text(data).end[last - 1]
        return replace(self, last=last, end=end, text=self.text[: end - self.start])


@dataclass(frozen=True, eq=False)
class SpanShares:
    """What each group accounts for of one position: shares.sum() + bias + unattributed == 1."""

    spans: tuple[Span, ...]
    shares: F64  # [n]
    bias: float
    unattributed: float
    direct: F64 | None = None  # [n]: what attention heads wrote to the target's logit from there


@dataclass(frozen=True)
class PromptText:
    """A prompt's text, where its tokens lie in it, and the turns of a chat."""

    text: str
    start: tuple[int, ...]  # [T] characters, never falling
    end: tuple[int, ...]  # [T]
    turns: tuple[tuple[str, int], ...] = ()  # role, first token

    def with_turns(self, turns: Sequence[tuple[str, int]]) -> PromptText:
        """turns: role, first character; those that no token is left for are dropped."""
        begun = [(role, bisect_left(self.start, at)) for role, at in turns]
        return replace(self, turns=tuple((role, n) for role, n in begun if n < len(self.start)))

    def to_meta(self) -> dict[str, Any]:
        """As JSON, in flat lists."""
        return {
            "text": self.text,
            "start": list(self.start),
            "end": list(self.end),
            "roles": [role for role, _ in self.turns],
            "turns": [first for _, first in self.turns],
        }


# --- grouping ---


def spans_of(data: TraceData, unit: str) -> list[Span]:
    """The prompt's tokens, words, sentences or chat turns, in order; every token is in exactly one.

    Raises InputError for another unit, or for turns of a prompt that is no chat.
    """
    if unit not in UNITS:
        raise InputError("unknown unit", expected=", ".join(UNITS), got=repr(unit))
    prompt, T = prompt_text(data), len(data.tokens)
    roles: list[str | None] = []
    if unit == "token":
        first = list(range(T))
    elif unit == "turn":
        if not prompt.turns:
            raise InputError("the prompt has no turns", expected="a chat", remedy="trace with chat=[...]")
        begun = dict(reversed([(at, role) for role, at in prompt.turns]))
        first = sorted(begun)
        roles = [begun[at] for at in first]
        if first[0] > 0:
            first, roles = [0, *first], [None, *roles]
    else:
        pattern = _WORD if unit == "word" else _SENTENCE
        first = _runs(prompt, [m.end() for m in pattern.finditer(prompt.text)])
    last = [*first[1:], T]
    spans = []
    for n, (a, b) in enumerate(zip(first, last, strict=True)):
        start, end = prompt.start[a], max(prompt.end[a:b])
        text = prompt.text[start:end] or "".join(data.tokens[a:b])
        spans.append(Span(text, a, b, start, end, roles[n] if roles else None))
    return spans


def _runs(prompt: PromptText, cuts: list[int]) -> list[int]:
    """First tokens of the runs that lie in one piece of the text cut at `cuts` (rising)."""
    first: list[int] = []
    before: object = None
    for n, (start, end) in enumerate(zip(prompt.start, prompt.end, strict=True)):
        within = prompt.text[start:end]
        blanks = len(within) - len(within.lstrip())
        at = start + (blanks if blanks < len(within) else 0)
        piece: object = bisect_right(cuts, at) if within else ("no text", n)
        if piece != before:
            first.append(n)
        before = piece
    return first


def summed(values: NDArray[Any], spans: Sequence[Span]) -> F64:
    """[..., n]: values [..., T] added up over each span."""
    starts = [span.first for span in spans]
    result: F64 = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
    return result


# --- where tokens lie ---


def prompt_text(data: TraceData) -> PromptText:
    """What the engine noted; for a trace without a note, the tokens' own texts one after the other."""
    noted, T = data.meta.get("prompt"), len(data.tokens)
    if noted is None:
        ends = np.cumsum([len(token) for token in data.tokens]).tolist()
        return PromptText("".join(data.tokens), (0, *ends[:-1]), tuple(ends))
    try:
        prompt = PromptText(
            noted["text"],
            tuple(noted["start"]),
            tuple(noted["end"]),
            tuple(zip(noted["roles"], noted["turns"], strict=True)),
        )
        valid = (
            isinstance(prompt.text, str)
            and all(type(n) is int for n in (*prompt.start, *prompt.end))
            and len(prompt.start) == len(prompt.end) == T
            and list(prompt.start) == sorted(prompt.start)
            and all(0 <= a <= b <= len(prompt.text) for a, b in zip(prompt.start, prompt.end, strict=True))
            and all(isinstance(r, str) and type(n) is int and 0 <= n < T for r, n in prompt.turns)
        )
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise RunError("the trace's note of its prompt does not fit its tokens", expected=f"{T} tokens")
    return prompt


def from_offsets(
    text: str, offsets: Sequence[tuple[int, int]], turns: Sequence[tuple[str, int]] = ()
) -> PromptText | None:
    """A tokenizer's offsets; None if they do not rise through the text. turns: role, first character."""
    start, end = [int(a) for a, _ in offsets], [int(b) for _, b in offsets]
    for n in range(1, len(start)):
        if end[n] == 0:  # special tokens are given (0, 0) wherever they are
            start[n] = end[n] = end[n - 1]
    if start != sorted(start) or not all(0 <= a <= b <= len(text) for a, b in zip(start, end, strict=True)):
        return None
    begun = [(role, bisect_left(start, at)) for role, at in turns]
    return PromptText(text, tuple(start), tuple(end), tuple((role, n) for role, n in begun if n < len(start)))


def from_decoding(ids: Sequence[int], decode: Callable[[list[int]], str]) -> PromptText:
    """Text and places by decoding each token after the piece before it, as its text may depend on that.

    Tokens that share a character share its place.
    """
    text, start, end = "", [], []
    before = done = 0  # the piece before the next token begins, and ends, at these tokens
    for n in range(len(ids)):
        known = decode(list(ids[before:done]))
        piece = decode(list(ids[before : n + 1]))[len(known) :]
        waits = piece.endswith(_INCOMPLETE) and n + 1 < len(ids) and n - done + 1 < _LONGEST_CHARACTER
        if waits:
            continue
        start += [len(text)] * (n + 1 - done)
        text += piece
        end += [len(text)] * (n + 1 - done)
        before, done = done, n + 1
    return PromptText(text, tuple(start), tuple(end))


def chat_turns(
    text: str, chat: Sequence[Turn], render: Callable[[list[Turn]], str | None]
) -> tuple[tuple[str, int], ...]:
    """(role, first character) of each turn in a rendered chat, of what the template itself adds too.

    render: the template applied to some turns without a generation prompt, None where it refuses. A turn
    starts where the chat up to it ends; where the template renders a chat otherwise than the beginning of a
    longer one, at its content.
    """
    turns: list[tuple[str, int]] = []
    at = 0
    for n, turn in enumerate(chat):
        rendered = render(list(chat[:n])) if n else ""
        content = text.find(turn["content"].strip(), at)
        if rendered is not None and text.startswith(rendered) and len(rendered) >= at:
            at = len(rendered)
        elif content >= 0:
            at = content
        turns.append((turn["role"], at))
        at = max(at, content + len(turn["content"].strip()) if content >= 0 else at)
    own = _own_system_turn(text, chat, render)
    if own:
        turns = [("system", 0), (turns[0][0], own), *turns[1:]]
    whole = render(list(chat))
    if whole is not None and text.startswith(whole) and len(whole) < len(text):
        turns.append(("assistant", len(whole)))  # the generation prompt
    return tuple(turns)


def _own_system_turn(
    text: str, chat: Sequence[Turn], render: Callable[[list[Turn]], str | None]
) -> int | None:
    """Where the first turn starts if the template puts a system message of its own before it.

    Found by giving it another one: from the end of the system turn on, both renderings are the same.
    """
    if chat[0]["role"] == "system":
        return None
    mark = "\u2042"
    alone, whole = render([{"role": "system", "content": mark}]), render(list(chat))
    other = render([{"role": "system", "content": mark}, *chat])
    if alone is None or whole is None or other is None or not other.startswith(alone):
        return None
    rest = other[len(alone) :]
    own = len(whole) - len(rest)
    return own if rest and own > 0 and whole.endswith(rest) and text.startswith(whole[:own]) else None
