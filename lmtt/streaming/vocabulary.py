"""The two matrices as long as the vocabulary, of which only rows are ever needed at once.

An embedding holds the rows of the tokens that it was last asked for. An unembedding is read a range of rows
at a time, by whoever wants logits; where the memory limit leaves room it is read once and kept as stored.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.checkpoint.source import WeightSource
from lmtt.errors import CheckpointError
from lmtt.kernels.host_memory import anonymous

TILE_BYTES = 16 << 20  # of decoded rows, for logits over the whole vocabulary
SAMPLED_ROWS = 4096  # that show how logits are made, where their values are not wanted


class StoredRows:
    """A matrix [V, D] of a checkpoint, indexed like a tensor by a range of rows or by row numbers.

    What comes back is a tensor in `dtype` on `device`; `shape` is the matrix's.
    """

    def __init__(self, source: WeightSource, tensor: str, dtype: torch.dtype, device: torch.device) -> None:
        info = source.tensors[tensor]
        if not info.rows or len(info.shape) != 2:
            raise CheckpointError(f"{source.name}: {tensor} cannot be read by rows")
        self._source, self._tensor, self._info = source, tensor, info
        self._row = info.nbytes // info.shape[0]
        self._kept: Tensor | None = None  # raw bytes of all rows
        self._turns = threading.local()  # .rooms: this thread's memory for ranges within `in_turn`
        self.dtype, self.device = dtype, device
        self.shape = torch.Size(info.shape)

    @property
    def nbytes(self) -> int:
        """What keeping it takes."""
        return self._info.nbytes

    @property
    def kept(self) -> bool:
        """All rows are in memory."""
        return self._kept is not None

    def keep(self) -> None:
        """Hold all rows as stored from now on; it is read once."""
        if self._kept is None:
            kept = anonymous(self._info.nbytes)
            self._source.read_into(self._tensor, kept.numpy().data)
            self._kept = kept

    def drop(self) -> None:
        """The opposite of `keep`."""
        self._kept = None

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within, this thread's ranges are good until it asks for the next one: they lie in the same memory.

        Fresh pages for each of hundreds of them would take as long as the logits made of them.
        """
        outer = getattr(self._turns, "rooms", None)
        self._turns.rooms = {} if outer is None else outer
        try:
            yield
        finally:
            self._turns.rooms = outer

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            first, last, _ = index.indices(self.shape[0])
            return self._range(first, max(first, last), getattr(self._turns, "rooms", None))
        return torch.stack([self._range(i, i + 1, None)[0] for i in index.tolist()])

    def _range(self, first: int, last: int, rooms: dict[str, Tensor] | None) -> Tensor:
        if self._kept is not None:
            raw = self._kept[first * self._row : last * self._row]
        else:
            raw = _room(rooms, "raw", (last - first) * self._row)
            self._source.read_into(self._tensor, raw.numpy().data, first * self._row)
        shape = (last - first, *self.shape[1:])
        if self.device.type == "cpu":
            size = math.prod(shape) * self.dtype.itemsize
            out = _room(rooms, "rows", size).view(self.dtype).view(shape)
        else:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._source.decode(self._tensor, raw, out, range(first, last))
        return out


def _room(rooms: dict[str, Tensor] | None, name: str, nbytes: int) -> Tensor:
    """uint8 [nbytes] on the host, where `rooms` keeps them the same memory for the same name."""
    if rooms is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    if name not in rooms or len(rooms[name]) < nbytes:
        rooms.pop(name, None)  # before its successor is there
        rooms[name] = anonymous(nbytes)
    return rooms[name][:nbytes]


def compact_embedding(module: Any, rows: StoredRows) -> None:
    """Let an embedding hold just the rows it is asked for: its weight becomes [distinct tokens, D]."""
    module.padding_idx = None  # it says which row is not trained, and nothing here trains
    module.weight = nn.Parameter(rows[slice(0, 1)], requires_grad=False)
    held: list[Tensor] = [torch.zeros(1, dtype=torch.int64)]

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        distinct, compact = torch.unique(args[0], return_inverse=True)
        if not torch.equal(distinct.cpu(), held[0]):
            held[0] = distinct.cpu()
            module.weight = nn.Parameter(rows[held[0]], requires_grad=False)
        return (compact, *args[1:])

    module.register_forward_pre_hook(before)


class TiledUnembedding(nn.Module):
    """In the place of a model's `lm_head`: the same logits, its weight on disk.

    `weight` is on the meta device and only says shape and dtype; `rows` has the values.
    """

    def __init__(self, rows: StoredRows, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(
            torch.empty(rows.shape, dtype=rows.dtype, device="meta"), requires_grad=False
        )
        self.bias = bias
        self._wanted = rows.shape[0]

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Within, only the first `SAMPLED_ROWS` logits are computed and the others are 0.

        For whoever looks at what a model does around its unembedding: reading all of it tells no more.
        """
        self._wanted = min(SAMPLED_ROWS, self.rows.shape[0])
        try:
            yield
        finally:
            self._wanted = self.rows.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return self._tiled(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, V] without the bias."""
        return self._tiled(x, None)

    def _tiled(self, x: Tensor, bias: Tensor | None) -> Tensor:
        V, D = self.rows.shape
        logits = x.new_empty(*x.shape[:-1], V)
        logits[..., self._wanted :] = 0
        step = max(1, TILE_BYTES // (D * self.rows.dtype.itemsize))
        with self.rows.in_turn():
            for first in range(0, self._wanted, step):
                last = min(self._wanted, first + step)
                tile = self.rows[first:last].to(x.dtype)
                logits[..., first:last] = nn.functional.linear(
                    x, tile, None if bias is None else bias[first:last]
                )
                del tile  # before the next one is there
        return logits
