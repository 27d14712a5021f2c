"""Which of the two GPU engines `auto` takes, and why: by what was measured on this chip, else by a model.

They share everything but the irregular steps: compaction, and the exact evaluation of listed pairs.

*The model* is the instruction counts of benchmarks/GPU.md. A coordinate of a listed pair takes 9.6
instructions in Triton's kernel; in CUDA's 9.8 where its block of 32 may exceed the whole and none where it
cannot, which one test for each block finds out (12 instructions of a lane). So CUDA's is the cheaper as soon
as a twentieth of the blocks is skipped; on real activations nine in ten are.

*Measured* figures are `crossover` in what benchmarks/gpu_bench.py writes: for an op, tokens and width the
milliseconds of both. A file of the chip's name in kernels/crossovers/, or the file that LMTT_CROSSOVER names,
is taken in the place of the model: the entry nearest in tokens times width decides.
"""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lmtt.errors import InputError
from lmtt.kernels.types import AttentionTask, NeuronTask

ENGINES = ("cuda", "triton")
FOLDER = Path(__file__).parent / "crossovers"


class Preference(NamedTuple):
    """Engines in the order in which to try them."""

    order: tuple[str, ...]
    why: str


def file_for(chip: str) -> Path | None:
    """The measurements for a chip of that name, or None."""
    named = os.environ.get("LMTT_CROSSOVER")
    if named:
        return Path(named)
    path = FOLDER / f"{chip.lower().replace(' ', '-')}.json"
    return path if path.exists() else None


@cache
def _measured(path: Path) -> tuple[dict[str, Any], ...]:
    try:
        entries = json.loads(path.read_text())["crossover"]
        for entry in entries:
            _ = (
                entry["op"],
                float(entry["tokens"]),
                float(entry["width"]),
                *(float(entry[e]) for e in ENGINES),
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"crossover measurements in {path}",
            expected="JSON as benchmarks/gpu_bench.py writes it",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return tuple(entries)


def preference(op: str, task: object, chip: str | None = None) -> Preference | None:
    """Which GPU engine to try first for a task on a GPU; None for tasks that both do not compete for.

    chip : the device's name, found out where it is not given.
    """
    if not isinstance(task, AttentionTask | NeuronTask) or (chip is None and not task.whole.is_cuda):
        return None
    tokens, width = task.whole.shape
    path = file_for(chip or torch.cuda.get_device_name(task.whole.device))
    entries = [e for e in _measured(path) if e["op"] == op] if path is not None else []
    if not entries:
        return Preference(ENGINES, "by instruction counts: skips blocks of coordinates in exact evaluation")
    nearest = min(entries, key=lambda e: abs(math.log(e["tokens"] * e["width"] / (tokens * width))))
    first, second = sorted(ENGINES, key=lambda engine: float(nearest[engine]))
    return Preference(
        (first, second),
        f"measured at {nearest['tokens']} tokens of width {nearest['width']}: "
        f"{nearest[first]:.3g} ms, {second} {nearest[second]:.3g} ms",
    )
