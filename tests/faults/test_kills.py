"""The command line's own streamed trace, killed or failing anywhere: resuming ends with the same bytes."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmtt.cli import main

# LMTT_EVERY_FAULT=1 takes four minutes: 64 kills, and every step of a run failing once. Otherwise a part.
EVERY = os.environ.get("LMTT_EVERY_FAULT") == "1"
KILLS = 64 if EVERY else 16
STEPS = ("open", "write", "fsync", "replace", "unlink")  # what a commit asks of the system
pytestmark = pytest.mark.usefixtures("always_streamed", "one_thread")


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but what was measured."""
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != "cost.json"}


Fault = Callable[[str, Callable[[], Any], Any], Any]


class Steps:
    """Counts the calls that write a run, and lets one of them go wrong."""

    def __init__(self, at: int | None, fault: Fault) -> None:
        self.count = 0
        self._at, self._fault = at, fault
        self._real = {name: getattr(os, name) for name in STEPS}
        for name in STEPS:
            setattr(os, name, self._counted(name))

    def restore(self) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _counted(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)  # reading is not a step
            if name == "write" and args[0] <= 2:
                return real(*args, **kwargs)
            self.count += 1
            if self.count - 1 == self._at:
                return self._fault(name, lambda: real(*args, **kwargs), args)
            return real(*args, **kwargs)

        return call


def kill(name: str, call: Callable[[], Any], args: Any) -> Any:
    """Half of a write gets to the file, of other calls nothing."""
    if name == "write":
        os.pwrite(args[0], bytes(args[1][: len(args[1]) // 2]), 0)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(name: str, call: Callable[[], Any], args: Any) -> Any:
    call()
    os.kill(os.getpid(), signal.SIGKILL)


def fail(name: str, call: Callable[[], Any], args: Any) -> Any:
    number = errno.EIO if name in ("fsync", "replace", "unlink") else errno.ENOSPC
    raise OSError(number, os.strerror(number))


@pytest.fixture
def whole(tmp_path: Path, trace_command: Any, forked: Any) -> tuple[dict[str, bytes], int]:
    """The undisturbed run's files, and how many steps it takes."""
    counted = tmp_path / "steps"

    def undisturbed() -> int:
        steps = Steps(None, kill)
        code = main(trace_command(tmp_path / "whole"))
        steps.restore()
        counted.write_text(str(steps.count))
        return code

    ended = forked(undisturbed)
    assert ended.code == 0, ended.err
    files = contents(tmp_path / "whole")
    assert "run.json" in files
    assert len(files) >= 1 + 4 + 5  # and a residual stream for every layer
    return files, int(counted.read_text())


@pytest.mark.slow
def test_killed_at_random_steps(
    whole: tuple[dict[str, bytes], int], tmp_path: Path, trace_command: Any, forked: Any
) -> None:
    """Kills, and between them resumed runs that are killed again, until one gets through."""
    want, steps = whole
    chance = random.Random(0)
    killed = finished = 0
    run = tmp_path / "run-0"
    while killed < KILLS:
        at, fault = chance.randrange(steps), chance.choice([kill, kill_after])

        def attempt(at: int = at, fault: Any = fault, run: Path = run) -> int:
            Steps(at, fault)
            return main(trace_command(run, "--resume"))

        ended = forked(attempt)
        if ended.code == -signal.SIGKILL:
            killed += 1
            continue
        assert ended.code == 0, ended.err
        assert contents(run) == want
        finished += 1
        run = tmp_path / f"run-{finished}"
    ended = forked(lambda: main(trace_command(run, "--resume")))
    assert ended.code == 0, ended.err
    assert contents(run) == want
    print(f"{killed} kills, {finished + 1} runs, {steps} steps each")


@pytest.mark.slow
def test_every_step_fails_once(
    whole: tuple[dict[str, bytes], int], tmp_path: Path, trace_command: Any, forked: Any
) -> None:
    """ENOSPC or EIO of a single call: one line and exit code 2, or none where nothing is lost by it."""
    want, steps = whole
    refused = 0
    for at in range(0, steps, 1 if EVERY else 8):
        run = tmp_path / f"run-{at}"

        def attempt(at: int = at, run: Path = run) -> int:
            Steps(at, fail)
            return main(trace_command(run))

        ended = forked(attempt)
        assert ended.code in (0, 2), ended
        assert "Traceback" not in ended.err
        if ended.code == 2:
            refused += 1
            assert ended.err.startswith("lmtt: ")
            assert len(ended.err.splitlines()) == 1, ended.err
            assert str(tmp_path) in ended.err
        again = forked(lambda run=run: main(trace_command(run, "--resume")))
        assert again.code == 0, again.err
        assert contents(run) == want, at
    assert refused > 0
