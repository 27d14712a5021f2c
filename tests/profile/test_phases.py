"""Phases are disjoint, all of the time has a name, and the name is the right one."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lmtt
from lmtt.kernels import registry, stages
from lmtt.kernels.host_memory import anonymous
from lmtt.profile import clock as clocks
from lmtt.profile.clock import PHASES, Clock, Recorder, recording
from lmtt.profile.memory import Sampler, anonymous_bytes
from lmtt.profile.report import NAMED, Profile, measure
from lmtt.testing_models import tiny_model

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.profile.ceilings import Ceilings

IDS = list(range(5, 14))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return lmtt.load(tiny_model("llama"))


def profiled(engine: Engine, machine: Ceilings, **options: Any) -> Profile:
    return measure(engine, machine, lambda: engine.trace(input_ids=IDS, **options))


def test_named_phases_are_the_whole_and_disjoint(engine: Engine, machine: Ceilings) -> None:
    profile = profiled(engine, machine)
    assert NAMED * profile.wall <= profile.named <= 1.0001 * profile.wall
    assert {phase.name for phase in profile.phases} <= set(PHASES)
    assert "other" not in PHASES
    order = sorted(profile.spans, key=lambda span: span.begin)
    for before, after in itertools.pairwise(order):
        assert before.begin + before.seconds <= after.begin + 1e-6
    assert all(math.isfinite(span.seconds) and span.seconds >= 0 for span in profile.spans)


@pytest.mark.model
def test_named_phases_are_the_whole_of_a_real_model(demo_engine: Engine, machine: Ceilings) -> None:
    """And profiling costs at most three percent, by the time that its own parts took."""
    ids = list(range(1000, 1096))
    profile = measure(demo_engine, machine, lambda: demo_engine.trace(input_ids=ids))
    assert NAMED * profile.wall <= profile.named <= 1.0001 * profile.wall
    assert 0 < profile.overhead <= 0.03 * profile.wall
    assert [row["layer"] for row in profile.layers] == list(range(demo_engine.info.n_layers))
    cost = profile.trace.cost
    assert sum(row["pairs_evaluated"] for row in profile.layers) == cost["pairs"]["evaluated"]
    assert sum(row["neurons_evaluated"] for row in profile.layers) == cost["neurons"]["evaluated"]
    # A phase cannot have done more than the machine can: the work would be counted wrong.
    real = {phase.name: phase for phase in profile.phases}
    assert real["forward"].work.operations == pytest.approx(2 * 96 * 106.2e6, rel=0.05)


def test_a_slow_layer_shows_in_its_own_forward(engine: Engine, machine: Ceilings) -> None:
    layer = engine.model.model.layers[1]
    hook = layer.mlp.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    try:
        profiled(engine, machine)  # discovery runs the layer too
        profile = profiled(engine, machine)
    finally:
        hook.remove()
    forward = [row["seconds"]["forward"] for row in profile.layers]
    assert forward[1] >= 0.2
    assert max(forward[0], forward[2]) < 0.2
    assert profile.phases[0].name == "forward"


@pytest.mark.native
def test_native_kernels_tell_their_steps_apart(engine: Engine, machine: Ceilings) -> None:
    assert registry.availability()["cpp"] is None
    names = {phase.name for phase in profiled(engine, machine).phases}
    assert {"screening", "exact evaluation", "reduction"} <= names
    assert "contributions" not in names
    other = lmtt.load(tiny_model("llama"), backend="reference")
    names = {phase.name for phase in profiled(other, machine).phases}
    assert "contributions" in names
    assert "screening" not in names


@pytest.mark.native
def test_work_shows_in_its_step() -> None:
    """At screen 0 everything is evaluated; at one that nothing passes, screening is all there is."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 192, 32) for _ in range(3))
    w_o, pre = torch.randn(4, 32, 256), torch.randn(1, 192, 256)

    def steps(floor: float) -> dict[str, float]:
        """The least of five: what else runs only adds."""
        runs = []
        for _ in range(5):
            with stages.listening() as seconds:
                lmtt.ops.attention_contributions(
                    q, k, v, w_o, pre, whole(pre, q, k, v, w_o), floor=floor, backend="cpp"
                )
            runs.append(dict(seconds))
        return {name: min(run[name] for run in runs) for name in runs[0]}

    everything, nothing = steps(0.0), steps(0.9)
    assert everything["exact evaluation"] > everything["screening"]
    assert nothing["exact evaluation"] < 0.2 * everything["exact evaluation"]


def whole(pre: Any, q: Any, k: Any, v: Any, w_o: Any) -> Any:
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return pre + torch.einsum("bhte,hed->btd", z, w_o)


def test_nothing_is_noted_unless_somebody_records(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "Span", None)  # making one would raise
    trace = engine.trace(input_ids=IDS)
    assert trace.cost["seconds"]["total"] > 0
    seconds = dict(trace.cost["seconds"])
    total = seconds.pop("total")
    assert NAMED * total <= sum(seconds.values()) <= 1.0001 * total


def test_streaming_says_what_was_read(
    checkpoint: Callable[..., Path], always_streamed: None, machine: Ceilings
) -> None:
    engine = lmtt.load(checkpoint("llama"), memory="200MiB")
    profile = profiled(engine, machine)
    stored = sum(p.numel() * 4 for p in engine.model.model.layers.parameters())
    assert profile.overlap["bytes_read"] == stored
    assert profile.overlap["reading_seconds"] > 0
    assert sum(row["bytes_read"] for row in profile.layers) == stored
    phases = {phase.name: phase for phase in profile.phases}
    assert phases["read"].work.disk == stored
    assert phases["read"].bound == "disk"
    assert phases["decode"].seconds > 0
    again = profiled(engine, machine)  # the second pass is not charged with the first one's bytes
    assert again.overlap["bytes_read"] == stored


def test_prompts_that_go_together_share_a_clock(engine: Engine) -> None:
    with recording() as recorder:
        traces = engine.trace(input_ids=torch.tensor([IDS, IDS[::-1]]))
    assert len(traces) == 2
    forward = [(s.layer, s.prompt) for s in recorder.spans if s.phase == "forward"]
    assert forward == [(layer, prompt) for layer in range(3) for prompt in range(2)]
    assert recorder.counts[0]["tokens"] == 2 * len(IDS)


def test_ranges_of_torch_profiler(engine: Engine) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        engine.trace(input_ids=IDS)
    names = {event.key for event in found.key_averages()}
    assert {"layer 0: forward", "layer 2: reduction", "dry run"} <= names


class _FakeEvent:
    """A CUDA event on a stream that is a list of moments."""

    now = 0.0
    open = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        _FakeEvent.now += 0.5
        self.at = _FakeEvent.now

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, later: _FakeEvent) -> float:
        return 1000 * (later.at - self.at)


def test_a_stream_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second from each event to the next, however little the host took; ranges are balanced."""
    depth: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", depth.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", depth.pop)
    with Clock("cuda:0") as clock:
        for layer in range(300):  # more marks than are kept pending
            clock.begin("forward", layer)
            assert depth == [f"layer {layer}: forward"]
        seconds = clock.seconds()
    assert depth == []
    assert seconds["dry run"] == pytest.approx(0.5)
    assert seconds["forward"] == pytest.approx(150.0)
    assert seconds["total"] == pytest.approx(150.5)


def test_an_error_closes_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    depth: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", _FakeEvent)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", depth.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", depth.pop)

    def failing() -> None:
        with Clock("cuda") as clock:
            clock.begin("forward", 0)
            raise ValueError

    with pytest.raises(ValueError):
        failing()
    assert depth == []


def test_what_kernels_say_never_exceeds_the_interval() -> None:
    with recording() as recorder, Clock("cpu") as clock:
        clock.begin("reduction", 0)
        clock.inner({"screening": 1e6, "exact evaluation": 1e6})
    assert sum(span.seconds for span in recorder.spans) < 10
    assert all(span.seconds >= 0 for span in recorder.spans)


@pytest.mark.skipif(anonymous_bytes() is None, reason="the system does not say how much a process holds")
def test_memory_is_seen_in_the_phase_that_holds_it() -> None:
    recorder = Recorder()
    spans = []
    with Sampler(recorder.started) as sampler:
        for phase, size in (("forward", 0), ("lens", 64 << 20), ("graph", 0)):
            begin = time.perf_counter() - recorder.started
            held = anonymous(size)  # mapped anew: torch may be given memory that the process has already
            held.fill_(1)
            time.sleep(0.08)
            del held
            spans.append(clocks.Span(phase, None, None, begin, 0.08))
    peaks = sampler.peaks(spans)
    assert peaks["lens"] - peaks["forward"] >= 60 << 20
    assert sampler.peak == peaks["lens"]


def test_memory_of_a_gpu_is_what_torch_allocated_there(monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([100, 100, 300, *[200] * 1000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    with Sampler(time.perf_counter(), "cuda:0") as sampler:
        deadline = time.perf_counter() + 30
        while len(sampler.samples) < 3 and time.perf_counter() < deadline:
            time.sleep(0.01)
    assert (sampler.before, sampler.peak) == (100, 300)
