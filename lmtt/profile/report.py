"""A profile: every phase with its seconds, its work, and how near it came to what the machine can do.

`measure` runs a prompt under a recorder and gives a `Profile`; its `to_json` is `lmtt profile --json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmtt.profile.ceilings import Ceilings
from lmtt.profile.clock import PHASES, Recorder, Span, recording
from lmtt.profile.dims import Dims, dims_of
from lmtt.profile.memory import Sampler
from lmtt.profile.predict import RESOURCES, bound_of
from lmtt.profile.work import Streaming, Survivors, Work, discovery_work, layer_work, once_work

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.trace import Trace

NAMED = 0.97  # of the wall time that named phases cover at least
MARK_SECONDS = 1.5e-6  # what reading the clock and noting an interval takes


@dataclass(frozen=True)
class PhaseCost:
    """One phase of the whole pass."""

    name: str
    seconds: float
    calls: int
    work: Work
    busy: dict[str, float]  # share of the seconds that each resource was busy at least
    bound: str
    peak_bytes: int  # largest sample of memory that no file backs; 0: too short for any

    def to_json(self) -> dict[str, Any]:
        rates = {
            "flops_per_second": self.work.operations / self.seconds if self.seconds > 0 else 0.0,
            "bytes_per_second": self.work.memory / self.seconds if self.seconds > 0 else 0.0,
        }
        return {
            "seconds": self.seconds,
            "calls": self.calls,
            "flops": self.work.operations,
            "bytes_moved": self.work.memory,
            "bytes_read": self.work.disk,
            "bytes_stored": self.work.store,
            "bytes_to_device": self.work.bus,
            **rates,
            "busy": self.busy,
            "bound": self.bound,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Profile:
    """Where one pass went. Sums of `phases` are `named`, at least `NAMED` of `wall`."""

    model: str
    device: str
    dtype: str
    threads: int
    tokens: int
    wall: float  # seconds from the prompt to the route
    phases: tuple[PhaseCost, ...]  # by falling seconds
    layers: tuple[dict[str, Any], ...]
    memory: dict[str, int]  # bytes by category
    overlap: dict[str, float]
    backend: dict[str, str]
    screening: dict[str, float]
    overhead: float  # seconds that profiling itself took, estimated from its parts
    ceilings: Ceilings
    spans: tuple[Span, ...]
    samples: tuple[tuple[float, int], ...]
    trace: Trace

    @property
    def named(self) -> float:
        """Seconds in phases."""
        return sum(phase.seconds for phase in self.phases)

    def seconds(self) -> dict[str, float]:
        """By phase, and in all: as runs store it."""
        return {**{phase.name: phase.seconds for phase in self.phases}, "total": self.wall}

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "lmtt.profile/1",
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "tokens": self.tokens,
            "seconds": {"wall": self.wall, "named": self.named, "profiling": self.overhead},
            "phases": {phase.name: phase.to_json() for phase in self.phases},
            "layers": list(self.layers),
            "memory": self.memory,
            "overlap": self.overlap,
            "backend": self.backend,
            "screening": self.screening,
            "plan": self.trace.cost.get("plan"),
            "ceilings": self.ceilings.to_json(),
        }


def measure(
    engine: Engine, ceilings: Ceilings, run: Callable[[], Trace], position: int = -1, threshold: float = 0.04
) -> Profile:
    """Profile `run`, which traces one prompt with `engine`, and the route from `position`."""
    proved = engine.proved
    with ExitStack() as stack:
        recorder = stack.enter_context(recording())
        sampler = stack.enter_context(Sampler(recorder.started, engine.info.device))
        trace = run()
        traced = time.perf_counter() - recorder.started
        trace.route(position, threshold)
        wall = time.perf_counter() - recorder.started
    spans = [*recorder.spans, Span("graph", None, None, traced, wall - traced)]
    dims = dims_of(engine.model, engine.model.dtype)
    tokens = len(trace.tokens)
    work = _work(dims, tokens, recorder, not proved, ceilings.device, engine.resident)
    peaks = sampler.peaks(spans)
    phases = []
    for name in dict.fromkeys(span.phase for span in spans):
        own = [span for span in spans if span.phase == name]
        seconds = sum(span.seconds for span in own)
        phases.append(_phase(name, seconds, len(own), work.get(name, Work()), peaks[name], ceilings))
    cost = trace.cost
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters() if not p.is_meta)
    results = _result_bytes(trace)
    peak = sampler.peak - sampler.before
    pairs, neurons = cost["pairs"]["evaluated"], cost["neurons"]["evaluated"]
    visible = tokens * (tokens + 1) / 2 * dims.shapes.heads * dims.shapes.layers
    return Profile(
        model=engine.info.name,
        device=engine.info.device,
        dtype=engine.info.dtype,
        threads=int(cost["machine"]["threads"]),
        tokens=tokens,
        wall=wall,
        phases=tuple(sorted(phases, key=lambda phase: -phase.seconds)),
        layers=tuple(_layers(spans, recorder, dims)),
        memory={
            "weights": weights,
            "results": results,
            "of the pass at its peak": max(0, peak),
            "process before": sampler.before,
            "process at its peak": sampler.peak,
        },
        overlap=cost.get("overlap", {}),
        backend=cost["backend"],
        screening={
            "pairs": visible,
            "pairs_evaluated": pairs,
            "pairs_evaluated_share": pairs / visible if visible else 0.0,
            "pairs_with_positive_bound": cost["pairs"]["positive"],
            "neurons_evaluated": neurons,
            "neurons_evaluated_share": neurons / (tokens * dims.shapes.d_mlp * dims.shapes.layers),
            "rows_reevaluated": cost["rows_reevaluated"],
        },
        overhead=sampler.own_seconds + recorder.marks * MARK_SECONDS,
        ceilings=ceilings,
        spans=tuple(spans),
        samples=tuple(sampler.samples),
        trace=trace,
    )


def _phase(name: str, seconds: float, calls: int, work: Work, peak: int, ceilings: Ceilings) -> PhaseCost:
    at = work.at(ceilings)
    busy = {resource: at[resource] / seconds if seconds > 0 else 0.0 for resource in RESOURCES}
    bound = (
        "disk" if name in ("read", "store") and work.disk + work.store else bound_of(work, seconds, ceilings)
    )
    return PhaseCost(name, seconds, calls, work, busy, bound, peak)


def _work(
    dims: Dims, tokens: int, recorder: Recorder, first: bool, device: str, resident: bool
) -> dict[str, Work]:
    """Of all layers by phase, with the survivors that were counted."""
    total: dict[str, Work] = dict(once_work(dims, tokens, device=device))
    stored = any(span.phase == "store" and span.layer is not None for span in recorder.spans)
    for counts in recorder.counts.values():
        read = float(counts.get("bytes_read", 0))
        if "tokens" not in counts:
            continue
        survivors = Survivors(counts["pairs_evaluated"], counts["neurons_evaluated"])
        decoded = 0.0 if resident else float(dims.layer_parameters * dims.itemsize)
        layer = layer_work(
            dims, tokens, survivors, streaming=Streaming(read, decoded), first=first, stored=stored,
            device=device,
        )  # fmt: skip
        for name, one in layer.items():
            total[name] = total[name] + one if name in total else one
    if first:
        total["discovery"] = discovery_work(dims, tokens, device=device)
    both = total["screening"] + total["exact evaluation"]
    return {**total, "contributions": both}


def _layers(spans: list[Span], recorder: Recorder, dims: Dims) -> list[dict[str, Any]]:
    """Each layer's seconds by phase, and what it counted."""
    found: dict[int, dict[str, float]] = {}
    for span in spans:
        if span.layer is not None:
            of_layer = found.setdefault(span.layer, {})
            of_layer[span.phase] = of_layer.get(span.phase, 0.0) + span.seconds
    rows = []
    for layer, seconds in sorted(found.items()):
        counts = dict(recorder.counts.get(layer, {}))
        tokens = counts.get("tokens", 0)
        visible = tokens * (tokens + 1) / 2 * dims.shapes.heads
        share = counts.get("pairs_evaluated", 0) / visible if visible else 0.0
        rows.append({"layer": layer, "seconds": seconds, **counts, "pairs_evaluated_share": share})
    return rows


def _result_bytes(trace: Trace) -> int:
    data = trace.data
    groups = (data, data.edges, data.neurons, data.predictions)
    return sum(int(getattr(x, "nbytes", 0)) for group in groups for x in vars(group).values())


def explain(phase: str) -> str:
    """What a phase is."""
    return PHASES.get(phase, "")
