"""csrc/cuda through ctypes: the shared library beside the package, its functions on tensors, no torch ABI.

The library is there where setup.py found nvcc and a torch built for CUDA (see setup.py for the rule).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "_lmtt_cuda.so"
ABI = 1
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def library_path() -> Path:
    """Where setup.py puts the library: beside lmtt/_C."""
    import lmtt

    return Path(lmtt.__file__).parent / FILE


def missing() -> str | None:
    """None where the library can be loaded, or why not."""
    path = library_path()
    if not path.exists():
        return (
            "the CUDA kernels were not built (setup.py builds them where it finds nvcc and a torch "
            "for CUDA; LMTT_CUDA=1 insists)"
        )
    try:
        library()
    except OSError as error:
        return f"the CUDA kernels cannot be loaded ({error})"
    return None


@cache
def library() -> Any:
    """The loaded library. OSError where it cannot be loaded or is of another version."""
    loaded = ctypes.CDLL(str(library_path()))
    if loaded.lmtt_cuda_abi() != ABI:
        raise OSError(f"{FILE} has interface {loaded.lmtt_cuda_abi()}, this Python needs {ABI}: build again")
    loaded.lmtt_cuda_error.restype = ctypes.c_char_p
    loaded.lmtt_cuda_most_width.restype = ctypes.c_int64
    pointer, whole, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.lmtt_cuda_count.argtypes = [pointer, whole, whole, pointer, pointer]
    loaded.lmtt_cuda_list.argtypes = [pointer, whole, whole, *[pointer] * 4]
    loaded.lmtt_cuda_block_smallest.argtypes = [pointer, small, whole, whole, whole, pointer, pointer]
    loaded.lmtt_cuda_evaluate.argtypes = [
        *(pointer, small, whole, whole, pointer, pointer, pointer, pointer),
        *(pointer, small, whole, pointer, whole, pointer, pointer),
    ]
    return loaded


def _launch(function: str, tensor: Tensor, *arguments: Any) -> None:
    """On the device of `tensor` and the stream that torch uses there, whichever device is current."""
    with torch.cuda.device(tensor.device):
        stream = int(torch.cuda.current_stream(tensor.device).cuda_stream)
        code = getattr(library(), function)(*arguments, stream)
    if code:
        raise RuntimeError(f"CUDA: {library().lmtt_cuda_error(code).decode()}")


def compact(words: Tensor) -> tuple[Tensor, Tensor]:
    """Set bits of int32 [groups, words] as (group, row), int32 [N] each, sorted; row = 32 * word + bit."""
    groups, per_group = words.shape
    counts = torch.empty(groups, dtype=torch.int32, device=words.device)
    _launch("lmtt_cuda_count", words, words.data_ptr(), groups, per_group, counts.data_ptr())
    ends = counts.cumsum(0, dtype=torch.int64)
    offsets = ends - counts
    total = int(ends[-1]) if groups else 0
    group, row = torch.empty(2, total, dtype=torch.int32, device=words.device)
    _launch(
        "lmtt_cuda_list", words, words.data_ptr(), groups, per_group, offsets.data_ptr(), group.data_ptr(),
        row.data_ptr(),
    )  # fmt: skip
    return group, row


def block_smallest(y: Tensor) -> Tensor:
    """Smallest |y| of each 32 coordinates of y [R, D] (rows contiguous): float32 [R, ceil(D / 32)]."""
    rows, width = y.shape
    out = torch.empty(rows, -(-width // 32), dtype=torch.float32, device=y.device)
    _launch(
        "lmtt_cuda_block_smallest", y, y.data_ptr(), KINDS[y.dtype], rows, width, y.stride(0), out.data_ptr()
    )
    return out


def evaluate(
    u: Tensor, y: Tensor, smallest: Tensor, u_row: Tensor, row: Tensor, coefficient: Tensor, g: Tensor
) -> Tensor:
    """Exact L1 proximities [N] of c * u[u_row] to y[row]; pairs sorted by u_row, int32 indices."""
    out = torch.empty(len(u_row), dtype=torch.float32, device=u.device)
    counts = torch.bincount(u_row, minlength=len(u))
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row, coefficient, g = row.contiguous(), coefficient.contiguous(), g.contiguous()
    _launch(
        "lmtt_cuda_evaluate", u, u.data_ptr(), KINDS[u.dtype], u.stride(0), len(u), first.data_ptr(),
        row.data_ptr(), coefficient.data_ptr(), g.data_ptr(), y.data_ptr(), KINDS[y.dtype], y.stride(0),
        smallest.data_ptr(), y.shape[1], out.data_ptr(),
    )  # fmt: skip
    return out
