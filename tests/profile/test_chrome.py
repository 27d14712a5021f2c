"""The trace file is sound by the Trace Event format, nests by layer, and the check finds what is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmtt
from lmtt.errors import InputError
from lmtt.profile import chrome
from lmtt.profile.clock import PHASES, recording
from lmtt.profile.memory import Sampler
from lmtt.testing_models import tiny_model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    engine = lmtt.load(tiny_model("llama"))
    with recording() as recorder, Sampler(recorder.started) as sampler:
        engine.trace(input_ids=range(5, 16))
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    chrome.write(str(path), recorder.spans, sampler.samples, name="a <model>", about={"tokens": 11})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_sound_and_nested_by_layer(content: dict[str, Any]) -> None:
    assert list(chrome.defects(content)) == []
    complete = [event for event in content["traceEvents"] if event["ph"] == "X"]
    layers = [event for event in complete if event["cat"] == "layer"]
    assert {event["name"] for event in layers} == {"layer 0", "layer 1", "layer 2"}
    for name in ("forward", "closure", "reduction"):
        inside = [event for event in complete if event["name"] == name]
        assert len(inside) == 3, name
        for phase, layer in zip(inside, layers_of(layers, inside), strict=True):
            assert layer["ts"] <= phase["ts"]
            assert phase["ts"] + phase["dur"] <= layer["ts"] + layer["dur"] + 1e-3
    assert {event["name"] for event in complete if event["cat"] == "phase"} <= set(PHASES)
    assert any(event["ph"] == "C" for event in content["traceEvents"])


def layers_of(layers: list[dict[str, Any]], phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [next(la for la in layers if la["ts"] <= p["ts"] < la["ts"] + la["dur"]) for p in phases]


def _overlap(events: list[dict[str, Any]]) -> None:
    first = next(event for event in events if event["ph"] == "X")
    events.append({**first, "ts": first["ts"] + first["dur"] / 2, "name": "crossing"})


def _negative(events: list[dict[str, Any]]) -> None:
    next(event for event in events if event["ph"] == "X")["dur"] = -1


def _nameless(events: list[dict[str, Any]]) -> None:
    del next(event for event in events if event["ph"] == "X")["name"]


def _text(events: list[dict[str, Any]]) -> None:
    next(event for event in events if event["ph"] == "X")["ts"] = "soon"


def _unknown(events: list[dict[str, Any]]) -> None:
    events[-1]["ph"] = "Q"


def _infinite(events: list[dict[str, Any]]) -> None:
    next(event for event in events if event["ph"] == "X")["dur"] = float("inf")


def _truth(events: list[dict[str, Any]]) -> None:
    events[-1]["tid"] = True


def _backwards(events: list[dict[str, Any]]) -> None:
    complete = [number for number, event in enumerate(events) if event["ph"] == "X"]
    events[complete[1]], events[complete[-1]] = events[complete[-1]], events[complete[1]]


def _layer_in_a_layer(events: list[dict[str, Any]]) -> None:
    at = next(number for number, event in enumerate(events) if event.get("cat") == "layer")
    events.insert(at + 1, {**events[at], "dur": events[at]["dur"] / 2})


def _no_object(events: list[dict[str, Any]]) -> None:
    events.append("end")  # type: ignore[arg-type] # what is wrong with it


SPOILT = [_overlap, _negative, _nameless, _text, _unknown, _infinite, _truth, _backwards, _layer_in_a_layer,
          _no_object]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_the_check_finds_what_is_unsound(
    content: dict[str, Any], spoil: Callable[[list[dict[str, Any]]], None]
) -> None:
    spoilt = copy.deepcopy(content)
    spoil(spoilt["traceEvents"])
    assert list(chrome.defects(spoilt))


def test_every_phase_of_a_layer_lies_within_it(content: dict[str, Any]) -> None:
    """By the events' own times, as a viewer nests them; phases of the whole pass lie outside all layers."""
    complete = [event for event in content["traceEvents"] if event["ph"] == "X"]
    spans = [(event["ts"], event["ts"] + event["dur"], event["cat"], event["name"]) for event in complete]
    layers = [span for span in spans if span[2] == "layer"]
    assert {span[3] for span in layers} == {"layer 0", "layer 1", "layer 2"}
    for begin, end, _, name in spans:
        if name in ("forward", "closure"):
            assert any(first <= begin and end <= last + 1e-3 for first, last, *_ in layers), name
        elif name in ("prompt", "dry run", "lens"):
            assert all(end <= first + 1e-3 or begin >= last - 1e-3 for first, last, *_ in layers), name


def test_no_trace_file_at_all() -> None:
    assert list(chrome.defects([]))
    assert list(chrome.defects({"traceEvents": []}))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        chrome.write(str(tmp_path / "no" / "trace.json"), [])
