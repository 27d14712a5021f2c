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

    shape : of what `decode` gives, outermost axis first.
    dtype : of its elements, before any cast to the model's.
    nbytes : raw bytes, which are all that decoding needs: blocks, or a packed weight followed by its scales.
    position : (number of the file, offset of the first raw byte). Orders reads as they lie on disk, and
        `offset % 4096` is the address, modulo a page, at which a buffer can take the bytes directly.
    plain : the raw bytes are the elements themselves, row-major; whoever has them needs no `decode`.
    rows : raw bytes are equally many for every index of the first axis, one index after another, so that
        a range of indices can be read and decoded alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    position: tuple[int, int]
    plain: bool = False
    rows: bool = False


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
        """Every weight; companions of a quantised one (scales, zeros) are part of its raw bytes."""

    def read_into(self, tensor: str, raw: memoryview, start: int = 0) -> None:
        """Fill `raw` (uint8, writable) with the raw bytes from `start` on: exactly len(raw) of them.

        CheckpointError, naming file and tensor, where the file ends early or cannot be read.
        """

    def decode(self, tensor: str, raw: Tensor, out: Tensor, rows: range | None = None) -> None:
        """Turn raw bytes (uint8 [n]) into elements, rounded once to out's dtype, on out's device.

        out : [*shape], contiguous; with `rows`, a contiguous range of the first axis whose raw bytes alone
            `raw` holds, [len(rows), *shape[1:]].
        """

    def close(self) -> None:
        """Close the files; reading afterwards is an error. May be called twice."""
