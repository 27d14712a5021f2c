"""A process that is killed leaves a run that goes on to the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lmtt

KILLS = 6  # of the 64 of the long suite
IDS = list(range(3, 12))
SCRIPT = """
import sys, time
import torch
import lmtt
from lmtt.streaming.weights import StreamedWeights
StreamedWeights.would_stay = lambda self, tokens: False
folder, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # the model's own products depend on it in the last bits
engine = lmtt.load(folder, memory="101MiB")
print("loaded", flush=True)
def slowly(done, total):
    time.sleep(0.02)
engine.trace(input_ids=list(range(3, 12)), out=out, resume=True, progress=slowly)
"""


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but what was measured."""
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != "cost.json"}


@pytest.mark.usefixtures("always_streamed")
@pytest.mark.parametrize("keep", ["full", "light"])
def test_stopped_after_each_layer(checkpoint: Callable[[str], Path], tmp_path: Path, keep: str) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="101MiB")
    whole = engine.trace(input_ids=IDS, out=tmp_path / "whole", keep=keep)
    want = contents(tmp_path / "whole")
    for last in range(1, 4):
        run = tmp_path / f"stopped-{last}"

        def stop(done: int, _total: int, last: int = last) -> None:
            if done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.trace(input_ids=IDS, out=run, keep=keep, progress=stop)
        read = engine._weights.bytes_read
        trace = engine.trace(input_ids=IDS, out=run, keep=keep, resume=True)
        assert contents(run) == want
        assert trace.data.meta == whole.data.meta
        layer = engine._weights._placements[0]
        assert engine._weights.bytes_read - read <= (3 - last) * layer.nbytes
    again = engine.trace(input_ids=IDS, out=run, keep=keep, resume=True)  # nothing is left to do
    assert contents(run) == want
    assert again.data.meta == lmtt.open(tmp_path / "whole").data.meta


@pytest.mark.usefixtures("always_streamed")
def test_killed_anywhere(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    engine = lmtt.load(str(folder), memory="101MiB")
    engine.trace(input_ids=IDS, out=tmp_path / "whole")
    want = contents(tmp_path / "whole")
    chance = random.Random(0)
    run = tmp_path / "run"
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder), str(run), str(torch.get_num_threads())],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        ) as child:  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == b"loaded\n"
            time.sleep(chance.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
    engine.trace(input_ids=IDS, out=run, resume=True)
    got, wanted = (json.loads(run_json)["meta"] for run_json in (contents(run)["run.json"], want["run.json"]))
    for name in wanted:
        assert got[name] == wanted[name], name
    assert contents(run) == want


@pytest.mark.usefixtures("always_streamed")
def test_details_of_a_stored_run_read_one_layer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="101MiB")
    want = engine.trace(input_ids=IDS, out=tmp_path / "run")
    opened = lmtt.open(tmp_path / "run", engine=engine)
    read = engine._weights.bytes_read
    assert (opened.contribution_map(1, 2) == want.contribution_map(1, 2)).all()
    assert opened.neurons(1, 3, k=3) == want.neurons(1, 3, k=3)
    assert 0 < engine._weights.bytes_read - read <= 2 * engine._weights._placements[1].nbytes
