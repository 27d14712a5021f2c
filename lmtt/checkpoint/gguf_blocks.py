"""Stored blocks of weights to floats: the native decoders, or the `gguf` package's for what they do not know.

Both give the same float32 values to the last bit (tests/native/test_dequant.py). The package's are slower and
make several copies in float32, so what only it knows (Q2_K, Q3_K, the IQ family) is decoded in pieces.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.errors import CheckpointError

PIECE_VALUES = 1 << 20  # decoded at once by the package
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@functools.cache
def _native() -> tuple[Any, dict[str, tuple[int, int]]]:
    """The extension and the formats it decodes; (None, {}) where it was not built."""
    try:
        native = import_module("lmtt._C")
        return native, native.block_formats()
    except (ImportError, AttributeError):
        return None, {}


def decoder(kind: str) -> str:
    """Which code decodes blocks of this type here: "native" or "gguf-py"."""
    return "native" if kind in _native()[1] else "gguf-py"


def decode_blocks(
    kind: str, blocks: NDArray[np.uint8], dtype: torch.dtype, *, out: Tensor | None = None
) -> Tensor:
    """The values of whole blocks, [n] in `dtype` (any floating one); rounded to nearest from float32.

    Parameters
    ----------
    kind : str
        The format's name in ggml, such as "Q4_K".
    blocks : NDArray[np.uint8]
        The stored bytes, dense.
    out : Tensor or None
        Where the values go, dense, on the CPU, of exactly their number and dtype.

    Raises
    ------
    CheckpointError
        No decoder knows the type.
    """
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = blocks.reshape(-1)
    n = len(blocks) // size * values
    if out is None:
        out = torch.empty(n, dtype=dtype)
    flat = out.view(-1)
    assert (flat.numel(), flat.dtype) == (n, dtype)
    native, formats = _native()
    if kind in formats and dtype in _NAMES:
        target = flat if dtype == torch.float32 else flat.view(torch.uint16)
        native.dequantize(kind, blocks, target.numpy(), _NAMES[dtype], torch.get_num_threads())
        return out
    rows = PIECE_VALUES // values
    for first in range(0, len(blocks) // size, rows):
        piece = blocks[first * size : (first + rows) * size]
        if kind in formats:
            floats = decode_blocks(kind, piece, torch.float32)
        else:
            try:
                array = gguf.dequantize(piece.reshape(1, -1), gguf.GGMLQuantizationType[kind])
            except NotImplementedError:
                raise CheckpointError(
                    f"weights are stored as {kind}, which nothing here decodes",
                    expected=f"one of {', '.join(sorted(formats)) or 'the types of the gguf package'}",
                ) from None
            floats = torch.from_numpy(array.reshape(-1))
        flat[first * values : first * values + len(floats)].copy_(floats)
    return out
