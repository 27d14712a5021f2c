"""Raw bytes, read ahead by one thread into one arena that is used round and round.

The arena is bounded by bytes: as many units (a layer's tensors, say) lie in it as fit. The reader waits for
room, the user for the unit whose turn it is; units come and are released in the order of the schedule.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtt.checkpoint.disk import PAGE
from lmtt.checkpoint.source import WeightSource


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a unit lie relative to its start, so that direct reads can reach them."""

    offsets: dict[str, int]  # in the order of reading
    nbytes: int  # whole pages


def place(source: WeightSource, names: Sequence[str]) -> Placement:
    """Tensors in the order of the disk, each congruent to its file offset modulo a page."""
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: source.tensors[name].position):
        info = source.tensors[name]
        start = end + (info.position[1] - end) % PAGE
        offsets[name] = start
        end = start + info.nbytes
    return Placement(offsets, -(-end // PAGE) * PAGE)


class Ring:
    """One pass over units in a schedule. Use as a context; leaving it ends the reader.

    arena : uint8, page-aligned; holds at least the largest unit.
    """

    def __init__(
        self, source: WeightSource, units: Sequence[Placement], schedule: Sequence[int], arena: Tensor
    ) -> None:
        self._source = source
        self._units = units
        self._schedule = list(schedule)
        self._arena = arena
        self._view = arena.numpy().data
        self._held: deque[tuple[int, int, int]] = deque()  # (unit, start, end) in the arena, oldest first
        self._ready: deque[int] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self._thread = threading.Thread(target=self._read_all, name="lmtt-reader", daemon=True)

    def __enter__(self) -> Ring:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._view.release()
        self._arena = torch.empty(0, dtype=torch.uint8)  # what was taken keeps its memory, and nothing else

    def take(self, unit: int) -> dict[str, Tensor]:
        """Raw bytes by tensor, views of the arena, good until `release`. Raises what the reader met."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            if not self._ready:
                assert self._error is not None
                raise self._error
            if self._ready[0] != unit:
                raise RuntimeError(f"unit {unit} was asked for out of turn, before {self._ready[0]}")
            self._ready.popleft()
            start = next(start for number, start, _ in self._held if number == unit)
        placement, tensors = self._units[unit], self._source.tensors
        return {
            name: self._arena[start + at : start + at + tensors[name].nbytes]
            for name, at in placement.offsets.items()
        }

    def release(self, unit: int) -> None:
        """Give the oldest unit's room back to the reader."""
        with self._changed:
            assert self._held[0][0] == unit
            self._held.popleft()
            self._changed.notify_all()

    def _read_all(self) -> None:
        try:
            for unit in self._schedule:
                start = self._reserve(unit)
                if start is None:
                    return
                begun = time.perf_counter()
                for name, at in self._units[unit].offsets.items():
                    if self._stopped:
                        return
                    size = self._source.tensors[name].nbytes
                    self._source.read_into(name, self._view[start + at : start + at + size])
                    self.bytes_read += size
                self.seconds_reading += time.perf_counter() - begun
                with self._changed:
                    self._ready.append(unit)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the waiting side must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _reserve(self, unit: int) -> int | None:
        """Room for a unit, found as soon as there is some; None when the pass is over."""
        size = self._units[unit].nbytes
        with self._changed:
            while not self._stopped:
                start = self._room(size)
                if start is not None:
                    self._held.append((unit, start, start + size))
                    return start
                self._changed.wait()
        return None

    def _room(self, size: int) -> int | None:
        if not self._held:
            return 0
        first, last = self._held[0][1], self._held[-1][2]
        if last > first:  # in use: [first, last)
            if last + size <= len(self._arena):
                return last
            return 0 if size <= first else None
        return last if last + size <= first else None  # in use: [first, end) and [0, last)
