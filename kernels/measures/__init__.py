"""Measures of how much of a whole a part explains, one file each; names are strings so that listing is free.

A measure is a module with
    NAME
    prepare(whole) -> tensors        what `proximity` needs to know of each whole, shaped [..., D]
    proximity(part, *prepared)       [...]: max(0, |whole| - |whole - part|), without cancellation
    norm(x)                          [...]
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

MEASURES = {
    "l1": "lmtt.kernels.measures.l1",
    "l2": "lmtt.kernels.measures.l2",
}


class MeasureModule(Protocol):
    """The functions of a measure's module."""

    NAME: str

    def prepare(self, whole: Tensor) -> tuple[Tensor, ...]: ...

    def proximity(self, part: Tensor, *prepared: Tensor) -> Tensor: ...

    def norm(self, x: Tensor) -> Tensor: ...


def measure(name: str) -> MeasureModule:
    """The measure of that name; KeyError for an unknown one (callers validate names at the door)."""
    return cast(MeasureModule, import_module(MEASURES[name]))
