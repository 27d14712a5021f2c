"""One prompt on its way through the layers, and what its layers report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.errors import ClosureError
from lmtt.kernels import host_memory
from lmtt.kernels.types import Choice
from lmtt.lens.logit_attribution import LogitAttribution
from lmtt.profile.clock import Clock
from lmtt.profile.memory import process_peak
from lmtt.run.layout import Arrays
from lmtt.run.writer import Resumed, RunWriter
from lmtt.spans import PromptText
from lmtt.structure.replay import LayerCalls

EVERY_RUN = ("resid_mid", "resid_post")  # sums checked on every run; sublayers, on a model's first prompt
SUMS = ("pairs_evaluated", "pairs_positive", "neurons_evaluated", "rows_reevaluated")


@dataclass(frozen=True)
class Prompt:
    """Token ids and what each is called."""

    input_ids: Tensor  # int64 [1, T]
    tokens: tuple[str, ...]
    text: PromptText | None = None  # where they lie in the text; None without a tokenizer


class Log:
    """What layers report, gathered."""

    def __init__(self) -> None:
        self.closure: dict[str, float] = {}
        self.checksum = 0.0
        self.choices: dict[str, Choice] = {}
        self.whole: list[dict[str, Any]] = []  # sublayers that are one part
        self.notices: list[str] = []  # what kernels had to say, such as less memory than they were given
        self.pairs_evaluated = self.pairs_positive = self.neurons_evaluated = self.rows_reevaluated = 0

    def closed(self, sublayer: str, error: float) -> None:
        """A sum was compared with its parts."""
        self.closure[sublayer] = max(self.closure.get(sublayer, 0.0), error)

    def add(self, index: int, shares: Any, tolerance: float) -> None:
        """A layer's shares; ClosureError if they are not shares of the whole."""
        if not shares.checksum <= tolerance:
            raise ClosureError(
                f"layer {index}: its parts do not add up to the residual stream",
                expected=f"a relative defect of at most {tolerance:.1e}",
                got=f"{shares.checksum:.1e}",
                remedy="this model's layers hold something that is not understood here",
            )
        self.checksum = max(self.checksum, shares.checksum)
        self.choices |= {choice.op: choice for choice in shares.choices}
        self.notices += [f"layer {index}: {c.op}: {note}" for c in shares.choices for note in c.notes]
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(shares, name))

    def sums(self) -> dict[str, int]:
        """What is counted."""
        return {name: getattr(self, name) for name in SUMS}

    def merge(self, layer: Log) -> None:
        """What one more layer reports."""
        for sublayer, error in layer.closure.items():
            self.closed(sublayer, error)
        self.checksum = max(self.checksum, layer.checksum)
        self.choices |= layer.choices
        self.whole += layer.whole
        self.notices += layer.notices
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(layer, name))

    def to_notes(self) -> dict[str, Any]:
        """As JSON, to be stored with the layer it is of; all but `notices`, which need not repeat."""
        return {
            # Others are checked on a model's first prompt only, which another process has at another layer.
            "closure": {name: self.closure[name] for name in EVERY_RUN if name in self.closure},
            "checksum": self.checksum,
            "choices": [[c.op, c.backend, c.reason] for c in self.choices.values()],
            "whole": self.whole,
            **self.sums(),
        }

    @staticmethod
    def of_notes(notes: Mapping[str, Any]) -> Log:
        """The inverse of `to_notes`."""
        log = Log()
        log.closure, log.checksum = dict(notes["closure"]), float(notes["checksum"])
        log.choices = {op: Choice(op, backend, reason) for op, backend, reason in notes["choices"]}
        log.whole = list(notes["whole"])
        for name in SUMS:
            setattr(log, name, int(notes[name]))
        return log


def cost_of(clock: Clock, log: Log, prompts: int) -> dict[str, Any]:
    """What the run's `cost` holds: measured, hence never part of what must repeat.

    prompts : how many went through the layers together; the seconds are those of all.
    """
    return {
        "seconds": clock.seconds(),
        "prompts": prompts,
        "peak_bytes": {
            "process": process_peak(),
            **({"cuda": torch.cuda.max_memory_allocated()} if clock.cuda else {}),
        },
        "overlap": clock.overlap(),
        "backend": {op: c.backend for op, c in log.choices.items()},
        "pairs": {"evaluated": log.pairs_evaluated, "positive": log.pairs_positive},
        "neurons": {"evaluated": log.neurons_evaluated},
        "rows_reevaluated": log.rows_reevaluated,
        "notices": log.notices,
        "closure": log.closure,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


@dataclass
class Running:
    """A prompt between two layers: the state that leaves one, and what was kept of those before."""

    prompt: Prompt
    calls: LayerCalls
    hidden: Tensor  # [1, T, D]
    stream: NDArray[Any] | None  # [L + 1, T, D], filled up to here; None if it is not kept
    logits: LogitAttribution | None = None
    writer: RunWriter | None = None
    layers: list[Arrays] = field(default_factory=list)
    parallel: list[bool] = field(default_factory=list)
    log: Log = field(default_factory=Log)

    def done(
        self,
        index: int,
        arrays: dict[str, NDArray[Any]],
        parallel: bool,
        log: Log,
        given: Tensor,
        clock: Clock,
    ) -> None:
        """Take in a layer's results, and commit them where the run is stored. given [1, T, D] entered it."""
        clock.begin("transfer", index)
        if self.stream is not None:
            self.stream[index] = to_host(given[0])
        self.layers.append(arrays)
        self.parallel.append(parallel)
        self.log.merge(log)
        if self.writer is not None:
            clock.begin("store", index)
            entering = {"resid_pre": to_host(given[0])} if index == 0 and self.stream is not None else {}
            notes = {**log.to_notes(), "parallel": parallel}
            self.writer.commit_layer(
                index, {**arrays, **entering}, to_host(self.hidden[0]), notes, log.notices
            )

    def restore(self, state: Resumed) -> None:
        """Go on where a stored run stands: its layers' results, and the state that leaves the last."""
        for layer in range(state.layer):
            notes = dict(state.notes(layer))
            self.parallel.append(bool(notes.pop("parallel")))
            self.log.merge(Log.of_notes(notes))
            self.log.notices += state.notices(layer)
            self.layers.append(state.load(layer))
            if self.stream is not None:
                self.stream[layer] = state.stream(layer)
        if state.resid is not None:
            self.hidden = from_host(state.resid, self.hidden.dtype).to(self.hidden.device)[None]


def stream_room(layers: int, hidden: Tensor, spare: host_memory.Spare | None) -> NDArray[Any]:
    """Room for resid_pre of every layer and the final state, [L + 1, T, D], to be filled in place."""
    shape = (layers + 1, *hidden.shape)
    if spare is None:
        return to_host(host_memory.empty(shape, hidden.dtype))
    room, memory = spare.empty(shape, hidden.dtype)
    array = to_host(room)
    if memory is not None:
        spare.back_after(array, memory)
    return array


def to_host(tensor: Tensor) -> NDArray[Any]:
    """The very bits on the host, no copy if they are there already; bfloat16 as words (run/README.md)."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array


def from_host(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """The inverse of `to_host`."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
