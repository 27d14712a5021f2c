"""What a checkpoint is to the rest: named tensors whose raw bytes are read apart from being decoded.

Reading is the disk's work and happens ahead, in a thread, into buffers that are used again and again;
decoding (a cast, a dequantisation) is the processor's and happens when the layer's turn comes. One class per
format implements `WeightSource`; nobody else knows about files, shards, blocks or companion tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, known from headers alone.

    `shape` is what `decode` returns, outermost first; `dtype` its element type, before any cast to the
    model's. `nbytes` counts the raw bytes, which are whatever the format needs to decode this tensor (the
    blocks, or a packed weight followed by its scales). `position` is (number of the file, offset of the first
    raw byte) and orders reads as they lie on disk; `offset % 4096` is also the address, modulo a page, at
    which a buffer takes the bytes without a copy by the kernel. `rows` says whether raw bytes are equally many
    for every index of the first axis, one index after another, so that some of them can be read alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    position: tuple[int, int]
    rows: bool = True


class WeightSource(Protocol):
    """An open checkpoint. Opening reads headers only and validates them; nothing holds a whole tensor.

    Names are transformers' own: those of a safetensors checkpoint of the model, to which transformers'
    conversion mapping (renames, packing of experts) is still to be applied, or those of the parameters.
    Every method but `close` may be called from any thread, several at a time.
    """

    @property
    def name(self) -> str:
        """What the checkpoint is called in an error: a directory's or a file's name."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor that has a weight's name; companions of quantised ones are part of their raw bytes."""

    def read_into(self, tensor: str, raw: memoryview, start: int = 0) -> None:
        """Fill `raw` (uint8, writable) with the raw bytes from `start` on; exactly len(raw) of them.

        CheckpointError, naming file and tensor, where the file ends early or cannot be read.
        """

    def decode(self, tensor: str, raw: Tensor, rows: range | None = None) -> Tensor:
        """The tensor of `raw` (uint8 [n], the CPU or a device): [*shape], or [len(rows), *shape[1:]].

        rows : a contiguous range of the first axis whose raw bytes alone `raw` holds (`TensorInfo.rows`).

        The result may share memory with `raw`, and is then valid for as long as that is.
        """

    def close(self) -> None:
        """Close the files; reading afterwards is an error. May be called twice."""
