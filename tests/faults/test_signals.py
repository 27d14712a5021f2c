"""SIGINT and SIGTERM: what is in hand is stored, the way to go on printed, a second one ends at once."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmtt.engine
from lmtt.cli import main
from lmtt.run.partial import read_partial

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
pytestmark = pytest.mark.usefixtures("always_streamed", "one_thread")


def contents(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != "cost.json"}


def in_layer(index: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a layer's work; for a process that ends soon."""
    real = lmtt.engine.capture_layer

    def captured(layer: Any, structure: Any, at: int, *rest: Any) -> Any:
        if at == index:
            action()
        return real(layer, structure, at, *rest)

    lmtt.engine.capture_layer = captured  # type: ignore[assignment]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_layer_in_hand_is_stored(
    tmp_path: Path, trace_command: Any, forked: Any, number: int, code: int
) -> None:
    run, whole = tmp_path / "a run", tmp_path / "whole"
    assert forked(lambda: main(trace_command(whole))).code == 0

    def attempt() -> int:
        in_layer(1, lambda: send(number))
        return main(trace_command(run, "--force"))

    ended = forked(attempt)
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    assert "2 of 4 layers are stored" in ended.err
    command = next(line for line in ended.err.splitlines() if line.startswith("  lmtt "))
    words = shlex.split(command)
    assert words[1:] == trace_command(run, "--resume")

    partial = read_partial(run)
    assert partial is not None
    assert (partial.done, partial.layers, partial.busy) == (2, 4, False)
    shown = forked(lambda: main(["show", str(run)]))
    assert shown.code == 0, shown.err
    assert "2 of 4 layers are stored" in shown.out

    again = forked(lambda: main(words[1:]))
    assert again.code == 0, again.err
    assert contents(run) == contents(whole)
    assert read_partial(run) is None


@pytest.mark.parametrize(("number", "code"), CODES)
def test_second_signal_ends_at_once(
    tmp_path: Path, trace_command: Any, forked: Any, number: int, code: int
) -> None:
    """Even while no Python runs: the second comes in the middle of a layer that takes half a minute."""

    def busy() -> None:
        send(number)
        send_later = f"sleep 0.3; kill -{int(number)} {os.getpid()}"
        os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", send_later)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.05)

    def attempt() -> int:
        in_layer(1, busy)
        return main(trace_command(tmp_path / "run"))

    begun = time.monotonic()
    ended = forked(attempt)
    assert ended.code == code, ended
    assert time.monotonic() - begun < 15
    assert forked(lambda: main(trace_command(tmp_path / "run", "--resume"))).code == 0


@pytest.mark.parametrize(("number", "code"), CODES)
def test_without_a_run_it_stops_at_once(folder: Path, forked: Any, number: int, code: int) -> None:
    def attempt() -> int:
        in_layer(1, lambda: send(number))
        return main(["trace", str(folder), "--prompt", "abc"])

    ended = forked(attempt)
    assert ended.code == code, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.out == ""


def test_one_process_at_a_time(tmp_path: Path, trace_command: Any, forked: Any) -> None:
    """The second one is refused by name, before it reads a model."""
    run = tmp_path / "run"

    def attempt() -> int:
        def second() -> None:
            lmtt.engine.load = None  # type: ignore[assignment]
            for more in ("--resume", "--force"):
                assert main(trace_command(run, more)) == 2
            assert main(["show", str(run)]) == 0

        in_layer(2, second)
        return main(trace_command(run))

    ended = forked(attempt)
    assert ended.code == 0, ended
    assert ended.err.count(f"lmtt: {run} is being written by another process") == 2
    assert len(ended.err.splitlines()) == 2, ended.err
    assert "is being written: 2 of 4 layers are stored" in ended.out
