"""The proof that parts add up is on in every run, so it must cost next to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lmtt.engine import Engine

CHECKS = 0.05  # of a run
TOKENS = 256


@pytest.mark.model
def test_checks_cost_at_most_a_twentieth_of_a_run(
    demo_engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's own clock, on a model that is proved already; a loaded machine slows all of it alike.

    The first prompt of a model is checked in full and its layers are discovered: that is paid once.
    """
    ids = list(range(1000, 1000 + TOKENS))
    demo_engine.trace(input_ids=ids[:7])
    shares = []
    for _ in range(3):
        seconds = demo_engine.trace(input_ids=ids).data.cost["seconds"]
        shares.append((seconds["closure"] + seconds.get("discovery", 0.0)) / seconds["total"])
    with capsys.disabled():
        print(f" checks: {min(shares):.1%} of a run", end="")
    assert 0 < min(shares) <= CHECKS
