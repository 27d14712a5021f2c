"""Fixtures that several folders share, and the rule that CI may not skip a whole layer in silence."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lmtt.engine import Engine

GOLDEN = Path(__file__).parent / "golden"
# markers of which at least one test must have run in CI
LAYERS = ("native", "model", "browser", "interpreter", "aot")
_passed: Counter[str] = Counter()


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def demo_engine() -> Engine:
    """SmolLM2-135M-Instruct in float32 on the CPU, loaded once."""
    import lmtt

    return lmtt.load(device="cpu")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> None:
    if call.when == "call" and call.excinfo is None:
        _passed.update(layer for layer in LAYERS if item.get_closest_marker(layer))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    whole_suite = not session.config.option.keyword and session.config.args_source.name != "ARGS"
    if os.environ.get("LMTT_CI") and whole_suite and exitstatus == 0:
        silent = [layer for layer in LAYERS if not _passed[layer]]
        if silent:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            raise pytest.UsageError(f"no test of {silent} ran: a whole layer was skipped")
