"""Plain torch on any device: the definition of every op, and the fallback where no other backend can."""

from __future__ import annotations

from lmtt.kernels.directional_attention.reference import directional_attention
from lmtt.kernels.neurons.reference import neuron_contributions
from lmtt.kernels.proximity.reference import attention_contributions
from lmtt.kernels.unembed_topk.reference import unembed_topk

__all__ = [
    "NAME",
    "attention_contributions",
    "available",
    "directional_attention",
    "neuron_contributions",
    "refuses",
    "unembed_topk",
]

NAME = "reference"


def available() -> str | None:
    """Always."""
    return None


def refuses(op: str, task: object) -> str | None:
    """Nothing."""
    return None
