"""Seconds of a pass before it runs: each phase's work at a machine's ceilings, and what is reached of those.

On a machine whose ceilings come from a data sheet the efficiencies are an assumption, named here, and so are
the survivors of screening wherever no run was measured; both are said with every prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lmtt.profile import efficiency
from lmtt.profile.ceilings import Ceilings
from lmtt.profile.dims import Dims
from lmtt.profile.work import Streaming, Survivors, Work, discovery_work, layer_work, once_work
from lmtt.streaming.plan import Plan, Weights

STREAMING = "streamed"
ASSUMED_SHARE = 0.4  # of a data sheet's figures, for every phase
BUSY = 0.2  # of its time that a resource must be busy to be called what bounds a phase
RESOURCES = ("compute", "memory", "disk", "bus", "launch")


@dataclass(frozen=True)
class Efficiency:
    """What phases reach of the ceilings.

    seconds = calls * extra + launches + reading + compute / share + memory / memory_share, all at the
    ceilings: the steps of a phase that compute and those that move bytes come one after the other. A phase
    without a `memory_share` is as long as its slowest resource / share.

    Keys are phases, or "phase, dtype" for what another dtype reaches, or "phase, streamed" where weights are
    read as it goes: pages are found anew then, and caches hold other weights. `otherwise`: the share of all
    others.
    """

    share: Mapping[str, float]
    memory_share: Mapping[str, float]
    extra: Mapping[str, float]
    otherwise: float = 1.0

    def seconds(
        self, phase: str, dtype: str, busy: Mapping[str, float], calls: int, *, streamed: bool = False
    ) -> float:
        """Of a phase whose resources are busy for so long at least."""
        names = [f"{phase}, {dtype}", *([f"{phase}, {STREAMING}"] if streamed else [])]
        name = next((name for name in names if name in self.share), phase)
        share, memory = self.share.get(name, self.otherwise), self.memory_share.get(name)
        longest, moving, as_it_is = parts(busy)
        ideal = max(longest, moving) / share if memory is None else longest / share + moving / memory
        return calls * self.extra.get(name, 0.0) + as_it_is + ideal


def parts(busy: Mapping[str, float]) -> tuple[float, float, float]:
    """Of a phase whose resources are busy for so long: the longest but memory, memory, and what no share is
    fitted to: launches, and the reading that a phase does before it computes."""
    rest = {resource: spent for resource, spent in busy.items() if resource not in ("launch", "memory")}
    as_it_is = busy["launch"]
    if rest["compute"]:
        as_it_is += rest.pop("disk")
    return max(rest.values()), busy["memory"], as_it_is


FITTED = Efficiency(efficiency.SHARE, efficiency.MEMORY_SHARE, efficiency.EXTRA)
ASSUMED = Efficiency({}, {}, {}, ASSUMED_SHARE)


def reached(ceilings: Ceilings) -> Efficiency:
    """What is fitted, where the ceilings are of the kind that it was fitted to; else what is assumed."""
    return FITTED if ceilings.source == "measured" and ceilings.device == "cpu" else ASSUMED


@dataclass(frozen=True)
class Estimate:
    """One phase of a whole pass."""

    seconds: float
    work: Work
    bound: str
    calls: int


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
    efficiency: Efficiency | None = None,
) -> Prediction:
    """A pass over prompts of these lengths.

    survivors : of one layer of one prompt; None: what `work` expects for each length.
    first : it is the model's first, so that structure is discovered and every sublayer proved.
    efficiency : None: what `reached` says.
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
        if not plan.resident and not plan.keeps_head:  # tile by tile, in between
            add("lens", Work(disk=weights.head), 0)
    if first:
        add("discovery", discovery_work(dims, tokens[0], device=ceilings.device), dims.kinds)
    by = reached(ceilings) if efficiency is None else efficiency
    phases = {
        name: estimate(name, work, calls[name], ceilings, by, dims.dtype, streamed=not plan.resident)
        for name, work in total.items()
        if not (plan.resident and name in STREAMED)
    }
    reading = phases["read"].seconds if "read" in phases else 0.0
    if reading:
        computing = sum(one.seconds for name, one in phases.items() if name not in OUTSIDE)
        waiting = waits(plan, weights, reading, computing, layers)
        phases["read"] = replace(phases["read"], seconds=waiting, bound="disk")
    return Prediction(phases, reading)


STREAMED = ("read", "decode")
OUTSIDE = ("prompt", "dry run", "read", "lens", "graph")  # what no reading ahead goes on beside


def waits(plan: Plan, weights: Weights, reading: float, computing: float, layers: int) -> float:
    """Seconds that a pass waits for its layers, which take `reading` to read and `computing` to run."""
    used_in_place = weights.decoded_layer == 0  # a layer's raw bytes are its weights until it is over
    if used_in_place and plan.bytes.ring < 2 * weights.raw_layer:
        return reading  # there is room for one only
    return max(reading / layers, reading - computing * (layers - 1) / layers)


def routed_bytes(dims: Dims, weights: Weights, tokens: Sequence[int]) -> float:
    """Bytes of a layer's experts that some token is routed to, if every expert is as likely as any other."""
    rest = dims.layer_parameters - dims.packed
    if dims.packed == 0 or rest == 0:
        return 0.0
    stored = weights.raw_total / dims.shapes.layers / rest  # of a parameter
    return float(dims.packed * stored * (1 - (1 - dims.used) ** sum(tokens)))


def estimate(
    phase: str,
    work: Work,
    calls: int,
    ceilings: Ceilings,
    efficiency: Efficiency,
    dtype: str,
    *,
    streamed: bool = False,
) -> Estimate:
    """Seconds of a phase that is called so often, and what bounds it."""
    seconds = efficiency.seconds(phase, dtype, work.at(ceilings), calls, streamed=streamed)
    return Estimate(seconds, work, bound_of(work, seconds, ceilings), calls)


def bound_of(work: Work, seconds: float, ceilings: Ceilings) -> str:
    """The resource that is busiest; `launch` where none is busy for a fifth of the time."""
    if seconds <= 0:
        return "launch"
    busy = work.at(ceilings)
    busy.pop("launch")
    largest = max(busy, key=lambda name: busy[name])
    return largest if busy[largest] >= BUSY * seconds else "launch"
