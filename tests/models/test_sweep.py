"""Every causal-LM type of the installed transformers keeps the state it once had, or gains a better one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from lmtt.testing_sweep import ORDER, Verdict, fallen, render, sweep_type
from lmtt.testing_types import swept_types

HERE = Path(__file__).parent
LISTED: dict[str, str] = json.loads((HERE / "supported.json").read_text())
PAGE = HERE.parent.parent / "docs" / "models.md"
DISCOVERY_SECONDS = 0.5
_verdicts: dict[str, Verdict] = {}


@pytest.fixture(autouse=True, scope="module")
def quiet_and_one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits for the first."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)


def verdict(model_type: str) -> Verdict:
    if model_type not in _verdicts:
        _verdicts[model_type] = sweep_type(model_type)
    return _verdicts[model_type]


@pytest.mark.parametrize("model_type", swept_types())
def test_no_type_falls(model_type: str) -> None:
    """Raises SilentlyWrongError, too, where a type is accepted and should not be."""
    found = verdict(model_type)
    before = {t: s for t, s in LISTED.items() if t == model_type}
    assert not fallen(before, {model_type: found}), found.why
    assert found.state == "full" or found.why, "a reason is owed"


def test_the_list_is_whole_and_so_is_the_page() -> None:
    """Improved states are written down by `make models`; seconds are measured and not on the page."""
    now = {model_type: verdict(model_type) for model_type in swept_types()}
    assert {t: v.state for t, v in now.items()} == LISTED, "run `make models`"
    assert render(now) == PAGE.read_text(), "run `make models`"


def test_as_many_types_decompose_as_was_asked_for() -> None:
    states = [verdict(model_type).state for model_type in swept_types()]
    print({state: states.count(state) for state in ORDER})
    assert states.count("full") + states.count("opaque") >= 125


def test_discovery_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Of this thread's processor time, all layers of a tiny model; the slowest is printed.

    A type over the limit is measured again: one garbage collection of the whole test run is not discovery.
    """
    seconds = {t: verdict(t).seconds for t in swept_types()}
    for model_type in [t for t, taken in seconds.items() if taken > DISCOVERY_SECONDS]:
        seconds[model_type] = min(sweep_type(model_type).seconds for _ in range(3))
    slowest = max(seconds, key=lambda t: seconds[t])
    with capsys.disabled():
        median = sorted(seconds.values())[len(seconds) // 2]
        print(f" discovery: median {median:.3f} s, slowest {slowest} with {seconds[slowest]:.3f} s")
    assert seconds[slowest] <= DISCOVERY_SECONDS


def test_a_type_that_falls_is_noticed() -> None:
    worse, same, gone = {"a": "full"}, {"a": "opaque"}, {"b": "refused"}
    now = {"a": Verdict("opaque", "why")}
    assert fallen(worse, now) == {"a": "full before, opaque now"}
    assert fallen(same, now) == {}
    assert fallen(gone, now) == {"b": "refused before, gone now"}
