"""Seconds of a pass before it runs: the work of each phase, at a machine's ceilings and its efficiency.

On a machine whose ceilings come from a data sheet the efficiencies are an assumption, named here, and so are
the survivors of screening wherever no run was measured; both are said with every prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmtt.profile import efficiency
from lmtt.profile.ceilings import Ceilings
from lmtt.profile.dims import Dims
from lmtt.profile.work import Streaming, Survivors, Work, discovery_work, layer_work, once_work
from lmtt.streaming.plan import Plan, Weights

ASSUMED_SHARE = 0.4  # of a data sheet's figures, for every phase
BUSY = 0.2  # of its time that a resource must be busy to be called what bounds a phase
RESOURCES = ("compute", "memory", "disk", "bus", "launch")


@dataclass(frozen=True)
class Estimate:
    """One phase of a whole pass."""

    seconds: float
    work: Work
    bound: str


@dataclass(frozen=True)
class Prediction:
    """A pass by phase; `reading` is how long storage is busy, most of it beside other phases."""

    phases: dict[str, Estimate]
    reading: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.phases.values())

    def to_json(self) -> dict[str, float]:
        return {**{name: one.seconds for name, one in self.phases.items()}, "total": self.seconds}


def predict(
    dims: Dims,
    ceilings: Ceilings,
    tokens: Sequence[int],
    plan: Plan,
    weights: Weights,
    *,
    survivors: Survivors | None = None,
    first: bool = True,
    stored: bool = False,
) -> Prediction:
    """A pass over prompts of these lengths.

    survivors : of one layer of one prompt; None: what `work` expects for each length.
    first : it is the model's first, so that structure is discovered and every sublayer proved.
    """
    layers = dims.shapes.layers
    total: dict[str, Work] = {}
    calls: dict[str, int] = {}

    def add(phase: str, work: Work, times: int) -> None:
        total[phase] = total[phase] + work if phase in total else work
        calls[phase] = calls.get(phase, 0) + times

    streaming = Streaming()
    if not plan.resident:
        streaming = Streaming(
            weights.raw_total / layers + routed_bytes(dims, weights, tokens), weights.decoded_layer
        )
    for number, length in enumerate(tokens):
        left = Survivors.expected(dims, length) if survivors is None else survivors
        # Weights are read and decoded once for all prompts; sublayers are proved for each of a first pass.
        once = streaming if number == 0 else Streaming()
        one = layer_work(
            dims, length, left, streaming=once, first=first, stored=stored, device=ceilings.device
        )
        for phase, work in one.items():
            add(phase, work * layers, layers)
        for phase, work in once_work(dims, length, device=ceilings.device).items():
            add(phase, work, 1)
    if first:
        add("discovery", discovery_work(dims, tokens[0], device=ceilings.device), dims.kinds)
    phases = {name: estimate(name, work, calls[name], ceilings) for name, work in total.items()}
    reading = total["read"].at(ceilings)["disk"] if not plan.resident else 0.0
    if reading:
        # Read ahead while layers compute: what is left to wait for, and the first layer.
        computing = sum(phases[name].seconds for name in total if name not in ("read", "dry run", "lens"))
        waiting = max(reading / layers, reading - computing * (layers - 1) / layers)
        phases["read"] = Estimate(waiting, total["read"], "disk")
    needed = {name: one for name, one in phases.items() if plan.resident is False or name not in STREAMED}

    return Prediction(needed, reading)


STREAMED = ("read", "decode")


def routed_bytes(dims: Dims, weights: Weights, tokens: Sequence[int]) -> float:
    """Bytes of a layer's experts that some token is routed to, if every expert is as likely as any other."""
    rest = dims.layer_parameters - dims.packed
    if dims.packed == 0 or rest == 0:
        return 0.0
    stored = weights.raw_total / dims.shapes.layers / rest  # of a parameter
    return float(dims.packed * stored * (1 - (1 - dims.used) ** sum(tokens)))


def estimate(phase: str, work: Work, calls: int, ceilings: Ceilings) -> Estimate:
    """Seconds of a phase that is called so often, and what bounds it."""
    fitted = ceilings.source == "measured" and ceilings.device == "cpu"
    share = efficiency.SHARE.get(phase, 1.0) if fitted else ASSUMED_SHARE
    extra = efficiency.EXTRA.get(phase, 0.0) if fitted else 0.0
    busy = work.at(ceilings)
    launch = busy.pop("launch")
    seconds = calls * extra + launch + max(busy.values()) / share
    return Estimate(seconds, work, bound_of(work, seconds, ceilings))


def bound_of(work: Work, seconds: float, ceilings: Ceilings) -> str:
    """The resource that is busiest; `launch` where none is busy for a fifth of the time."""
    if seconds <= 0:
        return "launch"
    busy = work.at(ceilings)
    busy.pop("launch")
    largest = max(busy, key=lambda name: busy[name])
    return largest if busy[largest] >= BUSY * seconds else "launch"
