"""Profiled and plain traces take turns, each on a text of its own; the first pair is apart."""

from __future__ import annotations

import math

import torch

import lmtt
from lmtt.profile.ceilings import Ceilings
from lmtt.testing_models import tiny_model

MACHINE = Ceilings(
    name="a machine", source="measured", device="cpu", flops={"float32": 1e11}, lanes=5e10, memory=2e10,
    disk=1e9, store=5e8, bus=None, launch=1e-6, capacity=2**34,
)  # fmt: skip


def test_every_pair_but_the_first_has_a_ratio() -> None:
    from overhead import ratios

    engine, seen = lmtt.load(tiny_model("llama")), []
    traced = engine.trace
    engine.trace = lambda **given: seen.append(tuple(given["input_ids"].tolist())) or traced(**given)  # type: ignore[method-assign]
    found = ratios(engine, MACHINE, torch.arange(32)[None], tokens=6, pairs=3)
    assert len(found) == 3
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in found)
    assert len(seen) == len(set(seen)) == 8
