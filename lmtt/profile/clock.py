"""Where a pass's time goes: the main thread is in one phase at a time, and every phase has a name.

Every run has a `Clock`, which sums seconds by phase and nothing else. Within `recording()` the same clock
also notes each interval with its layer, for `lmtt profile`. Where a listener is there, each interval is also
a range of NVTX (CUDA) and of torch.profiler.

On CUDA phases are intervals of the stream, told by events, so that nothing waits for the device because of
them; on the CPU they are intervals of the main thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from lmtt.streaming.weights import Traffic

PHASES: dict[str, str] = {
    "prompt": "text to token ids, checks, the run's directory",
    "dry run": "the model's own forward without its layers: embeddings, positions, masks",
    "read": "waiting for a layer's weights to arrive",
    "decode": "stored weights to parameters on the device",
    "discovery": "what a layer adds and by which modules; once for each kind of layer",
    "forward": "the model's own layer, captured",
    "closure": "proof that parts add up; of every sublayer on a model's first prompt",
    "screening": "a bound for every pair and neuron",
    "exact evaluation": "pairs and neurons whose bound is above the screen",
    "contributions": "both, by a backend that does not tell them apart",
    "reduction": "shares, kept edges and their heads",
    "lens": "logits: next tokens at all positions, targets that were asked for",
    "transfer": "what is kept, to the host",
    "store": "committing the run",
    "graph": "the route",
}
ATTRIBUTION = ("screening", "exact evaluation", "contributions", "reduction", "transfer", "store")
PENDING = 256  # marks on a stream that are not yet turned into seconds


@dataclass(frozen=True)
class Span:
    """The main thread was in `phase`, for layer `layer` of prompt `prompt` where there is one."""

    phase: str
    layer: int | None
    prompt: int | None
    begin: float  # seconds from the recorder's start
    seconds: float
    inner: bool = False  # one of several that alternate: its length is measured, its place is not


@dataclass
class Recorder:
    """What a profile notes besides the sums: every interval, and what each layer counted."""

    started: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    counts: dict[int, dict[str, int]] = field(default_factory=dict)  # by layer, summed over prompts
    marks: int = 0  # how often the clock was read

    def count(self, layer: int, values: Mapping[str, int]) -> None:
        """Add what one layer of one prompt counted."""
        of_layer = self.counts.setdefault(layer, {})
        for name, value in values.items():
            of_layer[name] = of_layer.get(name, 0) + value


_ACTIVE: ContextVar[Recorder | None] = ContextVar("lmtt_recorder", default=None)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Clocks made within note every interval in the recorder that is given."""
    recorder = Recorder()
    token = _ACTIVE.set(recorder)
    try:
        yield recorder
    finally:
        _ACTIVE.reset(token)


class _Marks(Protocol):
    """A way to say "now" and, later, how far apart two such moments are."""

    def mark(self) -> Any: ...
    def seconds(self, first: Any, second: Any) -> float: ...


class _Host:
    mark = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(first: float, second: float) -> float:
        return second - first


class _Stream:
    """Events of the current CUDA stream."""

    @staticmethod
    def mark() -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @staticmethod
    def seconds(first: Any, second: Any) -> float:
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


class Clock:
    """Seconds of each phase. It is in a phase from `begin` to the next `begin`; the first is the dry run.

    Left as a context manager, it is in none any more.
    """

    def __init__(self, device: str, traffic: Traffic | None = None) -> None:
        self.cuda = device.startswith("cuda")
        self._marks: _Marks = _Stream() if self.cuda else _Host()
        self._recorder = _ACTIVE.get()
        self._sums: dict[str, float] = {}
        self._pending: list[tuple[str, int | None, int | None, Any, Mapping[str, float]]] = []
        self._ranges: list[Any] = []
        self._inner: dict[str, float] = {}
        self._phase = "dry run"
        self._layer: int | None = None
        self._prompt: int | None = None
        self._traffic = traffic
        self._before = None if traffic is None else replace(traffic)
        self._waited = 0.0 if traffic is None else traffic.seconds_waiting
        self._taken = 0 if traffic is None else traffic.bytes_taken
        self._first = self._settled = self._marks.mark()
        self._offset = 0.0
        if self._recorder is not None:
            self._offset = time.perf_counter() - self._recorder.started
            self._recorder.spans.append(Span("prompt", None, None, 0.0, self._offset))
        self._enter()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._settle()

    def begin(self, phase: str, layer: int | None = None, prompt: int | None = None) -> None:
        """From now on it is `phase`."""
        self._close()
        self._phase, self._layer, self._prompt = phase, layer, prompt
        self._enter()

    def inner(self, seconds: Mapping[str, float]) -> None:
        """Of the interval under way, so many seconds were other phases' (a kernel that timed its steps)."""
        for phase, spent in seconds.items():
            self._inner[phase] = self._inner.get(phase, 0.0) + spent

    def arrived(self) -> None:
        """A layer's weights came, or are not needed any more: what it took to wait for them was `read`."""
        if self._traffic is not None:
            self.inner({"read": self._traffic.seconds_waiting - self._waited})
            self.count(bytes_read=self._traffic.bytes_taken - self._taken)
            self._waited, self._taken = self._traffic.seconds_waiting, self._traffic.bytes_taken

    def count(self, **values: int) -> None:
        """What the layer under way counted; noted only where somebody records."""
        if self._recorder is not None and self._layer is not None:
            self._recorder.count(self._layer, values)

    def seconds(self) -> dict[str, float]:
        """By phase, and `total`: from the clock's making to now."""
        self.begin(self._phase, self._layer, self._prompt)
        self._settle()
        return {**self._sums, "total": self._marks.seconds(self._first, self._settled)}

    def overlap(self) -> dict[str, float]:
        """What went on beside the phases: seconds of the reading thread, and layers' bytes that it read."""
        if self._traffic is None or self._before is None:
            return {}
        read = self._traffic.bytes_taken - self._before.bytes_taken
        busy = self._traffic.seconds_reading - self._before.seconds_reading
        return {"reading_seconds": busy, "bytes_read": read} if read else {}

    # --- intervals ---

    def _enter(self) -> None:
        name = self._phase if self._layer is None else f"layer {self._layer}: {self._phase}"
        if self.cuda:
            torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
        if torch.autograd.profiler._is_profiler_enabled:
            within: Any = torch.profiler.record_function(name)
            within.__enter__()
            self._ranges.append(within)

    def _close(self) -> None:
        self._pending.append((self._phase, self._layer, self._prompt, self._marks.mark(), self._inner))
        self._inner = {}
        if self.cuda:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        while self._ranges:
            self._ranges.pop().__exit__(None, None, None)
        if not self.cuda or len(self._pending) >= PENDING:
            self._settle()

    def _settle(self) -> None:
        """Turn marks into seconds; on a stream this waits until it has come as far."""
        for phase, layer, prompt, mark, inner in self._pending:
            spent = self._marks.seconds(self._settled, mark)
            begin = self._offset + self._marks.seconds(self._first, self._settled)
            self._settled = mark
            # What was timed within cannot exceed the whole; rounding of two clocks may say so.
            within = sum(inner.values())
            shrink = min(1.0, spent / within) if within > 0 else 0.0
            parts = {name: part * shrink for name, part in inner.items()}
            parts[phase] = parts.get(phase, 0.0) + spent - sum(parts.values())
            for name, part in parts.items():
                self._sums[name] = self._sums.get(name, 0.0) + part
                if self._recorder is not None:
                    self._recorder.spans.append(Span(name, layer, prompt, begin, part, bool(inner)))
                begin += part
        if self._recorder is not None:
            self._recorder.marks += len(self._pending)
        self._pending.clear()
