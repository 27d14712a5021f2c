"""The memory limit is kept: planned before anything is read, measured while it runs, an error when crossed.

Figures are of processes of their own. The planner's constants were fitted to other shapes and lengths than
those asserted here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmtt
from lmtt.errors import InputError
from lmtt.kernels.host_memory import anonymous
from lmtt.profile.memory import process_peak
from lmtt.streaming.meter import INTERVAL, Gauge, HighWater, Meter, Sampled, gauge
from lmtt.streaming.plan import parse_bytes
from lmtt.testing_memory import AMPLE, Case, Outcome, least_memory, measure, write_llama

MIB = 1 << 20
CPU = torch.device("cpu")
SHAPES = {
    "grouped": {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4,
                "intermediate_size": 4608, "num_hidden_layers": 5, "vocab_size": 12000},
    "wide": {"hidden_size": 1152, "num_attention_heads": 16, "num_key_value_heads": 16,
             "intermediate_size": 3072, "num_hidden_layers": 3, "vocab_size": 6000},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are measured: a plan counts what each thread of a product lays out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], str]:
    """The folder of a random Llama of one of the shapes."""
    made: dict[tuple[str, torch.dtype], str] = {}

    def make(shape: str, dtype: torch.dtype) -> str:
        if (shape, dtype) not in made:
            folder = tmp_path_factory.mktemp(shape)
            made[shape, dtype] = str(write_llama(folder, dtype, **SHAPES[shape]))
        return made[shape, dtype]

    return make


def check_within(case: Case, outcome: Outcome) -> None:
    """The limit is kept, by the run's own account and by an independent one, and the plan foretold it."""
    assert outcome.error is None, (case, outcome.error)
    assert outcome.planned is not None
    assert outcome.measured is not None
    assert case.memory is not None
    limit, measured = parse_bytes(case.memory), outcome.measured["total"]
    assert 0 < measured <= limit, (case, outcome)
    assert outcome.seen <= limit, (case, outcome)
    # A thread may miss a peak that the system's mark has; it never sees more.
    assert -4 * MIB <= measured - outcome.seen <= 8 * MIB or outcome.measured["load"] >= measured, outcome
    assert outcome.planned["total"] <= limit
    assert outcome.as_planned, (f"{outcome.off:+.1%}", case, outcome)
    assert outcome.loaded_as_planned, (case, outcome)


# Of the smallest limit by the config: on disk, tensors begin where they begin, and take up to a page more.
LEAST = 1.04
# Model as stored, dtype, tokens, and limits over the smallest that works; None: one that holds everything.
GRID = [
    ("grouped", torch.bfloat16, "float32", 64, (LEAST, 1.5)),  # every layer is widened
    ("grouped", torch.bfloat16, "bfloat16", 256, (LEAST, 1.5, None)),
    ("grouped", torch.bfloat16, "float32", 1024, (LEAST, None)),
    ("wide", torch.float32, "float32", 256, (LEAST, 1.5, None)),
    ("wide", torch.float32, "bfloat16", 1024, (LEAST,)),
]


def test_peaks_are_within_the_limit_and_as_planned(llama: Callable[[str, torch.dtype], str]) -> None:
    cases = [
        Case(folder, T, AMPLE if times is None else str(int(times * least_memory(folder, T, dtype))), dtype)
        for shape, stored, dtype, T, limits in GRID
        for folder in [llama(shape, stored)]
        for times in limits
    ]
    two = llama("grouped", torch.bfloat16)
    cases.append(Case(two, 192, str(int(LEAST * least_memory(two, 192, "float32", prompts=2))), prompts=2))
    outcomes = measure(cases)
    for case, outcome in zip(cases, outcomes, strict=True):
        check_within(case, outcome)
        assert outcome.resident is (case.memory == AMPLE)


@pytest.mark.model
def test_the_demo_model_takes_what_is_planned() -> None:
    """Its tokenizer and its quantised file included."""
    cases = []
    for T, dtype, times in ((64, "float32", LEAST), (256, "float32", None), (64, "bfloat16", None)):
        memory = AMPLE if times is None else str(int(times * least_memory(None, T, dtype)))
        cases.append(Case(None, T, memory, dtype, floor=1e-3))
    for case, outcome in zip(cases, measure(cases), strict=True):
        check_within(case, outcome)
        assert outcome.resident is (case.memory == AMPLE)


def test_the_smallest_limit_works_and_less_does_not(llama: Callable[[str, torch.dtype], str]) -> None:
    folder, tokens = llama("grouped", torch.bfloat16), 64

    def named(error: InputError) -> str:
        return str(error).split("at least ")[1].split(";")[0]

    with pytest.raises(InputError, match="at least") as at_load:
        lmtt.load(folder, memory="1MiB", device="cpu")
    smallest = named(at_load.value)
    engine = lmtt.load(folder, memory=smallest, device="cpu")
    with pytest.raises(InputError, match=f"too little for {tokens} tokens") as at_trace:
        engine.trace(input_ids=range(tokens))
    enough = named(at_trace.value)
    tenth = MIB // 10 + 1  # what the error rounds up
    with pytest.raises(InputError, match="too little for 1 tokens"):
        lmtt.load(folder, memory=parse_bytes(smallest) - tenth, device="cpu")
    case = Case(folder, tokens, enough)
    works, fails = measure([case, Case(folder, tokens, str(parse_bytes(enough) - tenth))])
    check_within(case, works)
    assert fails.error is not None
    assert f"at least {enough}" in fails.error


@pytest.mark.parametrize("way", [HighWater, Sampled])
def test_a_peak_is_seen_after_it_is_over(way: type) -> None:
    try:
        gauge: Gauge = way(resetting=True) if way is HighWater else way()
    except OSError as error:
        pytest.skip(f"this system's high-water mark cannot be set back: {error}")
    before, whole_life = gauge.now(), process_peak()
    taken = anonymous(48 * MIB)
    taken.fill_(1)
    if way is Sampled:
        time.sleep(40 * INTERVAL)
    del taken
    assert 44 * MIB <= gauge.peak() - before <= 56 * MIB
    gauge.restart()
    assert gauge.peak() - before <= 8 * MIB
    gauge.stop()
    assert process_peak() >= whole_life  # setting the mark back hides nothing from others


def test_crossing_the_limit_is_an_error() -> None:
    blocks = [bytes(100_000) for _ in range(2000)]
    del blocks[::2]  # holes that the allocator keeps until it is told to give them back
    meter = Meter(CPU, 32 * MIB)
    with meter.loading():
        kept = anonymous(8 * MIB)
        kept.fill_(1)
        meter.loaded(8 * MIB)
    callers = anonymous(64 * MIB).fill_(1)  # between two passes: the caller's, not ours
    with meter.running(8 * MIB):
        meter.mark("layers")
        assert 7 * MIB <= meter.to_json()["bytes"]["total"] <= 16 * MIB
    with meter.running(8 * MIB):
        anonymous(40 * MIB).fill_(1)
        with pytest.raises(InputError, match=r"memory=32MiB was exceeded: layers took .*allow more"):
            meter.mark("layers")
    assert callers[-1] == 1
    assert blocks


@pytest.mark.parametrize(
    ("again", "used", "trimmed"), [(True, 80, False), (True, 81, True), (False, 1, True)]
)
def test_freed_memory_is_kept_for_the_next_layer_while_the_limit_has_room(
    again: bool, used: int, trimmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trims = []
    meter = Meter(CPU, 100 * MIB)
    with meter.running(0):
        monkeypatch.setattr("lmtt.streaming.meter.trim", lambda: trims.append(1))
        assert meter._gauge is not None
        monkeypatch.setattr(meter._gauge, "peak", lambda: meter._base + used * MIB)
        meter.mark("layers", again=again)
        assert bool(trims) is trimmed


@pytest.mark.parametrize("span", ["loading", "running"])
def test_what_goes_as_measuring_begins_is_not_taken_later(span: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when garbage is collected between two looks: a dead model was once found to have been loaded."""
    callers = [anonymous(64 * MIB).fill_(1)]

    def then_freed(*given: Any, **named: Any) -> Gauge | None:
        measuring = gauge(*given, **named)
        callers.clear()
        return measuring

    monkeypatch.setattr("lmtt.streaming.meter.gauge", then_freed)
    meter = Meter(CPU, 32 * MIB)
    with meter.loading() if span == "loading" else meter.running(0):
        meter.mark("part")
    assert not callers
    assert 0 <= meter.to_json()["bytes"]["part"] <= 8 * MIB


def test_crossing_in_the_middle_of_a_run_is_an_error(
    checkpoint: Callable[[str], Path], always_streamed: None, tmp_path: Path
) -> None:
    engine = lmtt.load(str(checkpoint("llama")), memory="101MiB")

    def taking(done: int, _layers: int) -> None:
        if done == 2:
            anonymous(128 * MIB).fill_(1)

    with pytest.raises(InputError, match="memory=101MiB was exceeded: layers took"):
        engine.trace(
            input_ids=[3, 4, 5], out=tmp_path / "run",
            progress=taking,
        )  # fmt: skip
    whole = engine.trace(input_ids=[3, 4, 5], out=tmp_path / "run", resume=True)
    cost: dict[str, Any] = whole.cost
    assert cost["measured"]["limit"] == 101 * MIB
    assert set(cost["measured"]["bytes"]) == {"load", "layers", "predictions", "total"}
    assert cost["plan"]["bytes"]["total"] <= 101 * MIB
