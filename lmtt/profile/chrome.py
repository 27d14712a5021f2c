"""A profile as a file of the Trace Event format, which Perfetto and chrome://tracing open.

Phases lie within their layer, on the main thread's track; the memory is a counter track of its own. Times are
integer nanoseconds until they are written, so that what lies within something ends within it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lmtt.errors import InputError
from lmtt.profile.clock import PHASES, Span

PROCESS, MAIN = 1, 1
CLOCK = 1_000_000_000


def events(
    spans: Sequence[Span], samples: Sequence[tuple[float, int]] = (), name: str = "lmtt"
) -> list[dict[str, Any]]:
    """Metadata, then complete events by rising time, a layer before its phases."""
    found: list[dict[str, Any]] = [
        _metadata("process_name", name),
        _metadata("thread_name", "main thread"),
    ]
    ordered = sorted((span for span in spans if span.seconds > 0), key=lambda span: span.begin)
    for (layer, _), group in groupby(ordered, key=lambda span: (span.layer, span.prompt)):
        within = list(group)
        first, last = _ns(within[0].begin), max(_ns(s.begin) + _ns(s.seconds) for s in within)
        if layer is not None:
            prompt = within[0].prompt
            about = {"layer": layer} if prompt is None else {"layer": layer, "prompt": prompt}
            found.append(_complete(f"layer {layer}", "layer", first, last, about))
        at = first
        for span in within:
            begin = max(at, _ns(span.begin))  # rounding may make neighbours overlap by a nanosecond
            end = min(last, max(begin, _ns(span.begin) + _ns(span.seconds)))
            about = {"what": PHASES.get(span.phase, span.phase)}
            if span.inner:
                about["place"] = "its length is measured, its place among its neighbours is not"
            found.append(_complete(span.phase, "phase", begin, end, about))
            at = end
    found += [
        {"name": "memory that no file backs", "cat": "memory", "ph": "C", "pid": PROCESS, "tid": MAIN,
         "ts": _ns(moment) / 1000, "args": {"bytes": size}}
        for moment, size in samples
    ]  # fmt: skip
    return found


def write(
    path: str,
    spans: Sequence[Span],
    samples: Sequence[tuple[float, int]] = (),
    *,
    name: str = "lmtt",
    about: dict[str, Any] | None = None,
) -> None:
    """Write the file; InputError if it cannot be written."""
    content = {
        "traceEvents": events(spans, samples, name),
        "displayTimeUnit": "ms",
        "otherData": about or {},
    }
    try:
        Path(path).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", remedy="name a writable folder") from None


def defects(content: Any) -> Iterator[str]:
    """What the Trace Event format does not allow in a file like ours; nothing for a sound one.

    Checked: the object's form, the fields and types of each event, that times are finite and rise within a
    track, and that complete events of a track nest: layers on the outside, a layer never within another.
    """
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        yield "the file is not an object with a list traceEvents"
        return
    if content.get("displayTimeUnit") not in ("ms", "ns"):
        yield "displayTimeUnit is neither ms nor ns"
    tracks: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
    latest: dict[tuple[int, int, str], float] = {}  # by process, thread and kind
    for number, event in enumerate(content["traceEvents"]):
        where = f"event {number}"
        if not isinstance(event, dict):
            yield f"{where} is not an object"
            continue
        kind = event.get("ph")
        if kind not in ("M", "X", "C"):
            yield f"{where}: phase {kind!r}"
            continue
        if not all(_is_integer(event.get(key)) for key in ("pid", "tid")):
            yield f"{where}: pid or tid is not an integer"
            continue
        if not isinstance(event.get("name"), str) or not isinstance(event.get("args"), dict):
            yield f"{where}: no name or no args"
            continue
        if kind == "M":
            if not isinstance(event["args"].get("name"), str):
                yield f"{where}: metadata without a name"
            continue
        times: list[Any] = [event.get("ts"), *([event.get("dur")] if kind == "X" else [])]
        if not all(_is_number(t) and t >= 0 for t in times):
            yield f"{where}: ts or dur is not a number of microseconds"
            continue
        track = (event["pid"], event["tid"], kind)
        if event["ts"] < latest.get(track, 0.0):
            yield f"{where}: it begins before the one that it follows"
        latest[track] = event["ts"]
        if kind == "X":
            if not isinstance(event.get("cat"), str):
                yield f"{where}: no category"
            begin = round(event["ts"] * 1000)
            said = f"{event.get('cat')} {event['name']}"
            entry = (begin, begin + round(event["dur"] * 1000), said)
            tracks.setdefault((event["pid"], event["tid"]), []).append(entry)
        elif not all(_is_number(v) for v in event["args"].values()):
            yield f"{where}: a counter that is no number"
    for complete in tracks.values():
        yield from _crossings(complete)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _crossings(track: list[tuple[int, int, str]]) -> Iterator[str]:
    """Pairs of events that overlap without one lying in the other, in the order of their beginnings."""
    open_: list[tuple[int, int, str]] = []
    for begin, end, name in sorted(track, key=lambda e: (e[0], -e[1])):
        while open_ and open_[-1][1] <= begin:
            open_.pop()
        if open_ and end > open_[-1][1]:
            yield f"{name} at {begin} ns ends after {open_[-1][2]}, in which it began"
        if open_ and name.startswith("layer "):
            yield f"{name} at {begin} ns lies within {open_[-1][2]}"
        open_.append((begin, end, name))


def _metadata(kind: str, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": PROCESS, "tid": MAIN, "args": {"name": name}}


def _complete(name: str, category: str, first: int, last: int, about: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "pid": PROCESS, "tid": MAIN, "ts": first / 1000,
            "dur": (last - first) / 1000, "args": about}  # fmt: skip


def _ns(seconds: float) -> int:
    return round(seconds * CLOCK)
