"""Products with large weights by some of their rows at a time, where that gives the same bits.

Libraries pack a whole weight before they multiply, which pays for many tokens and not for few: a quarter to a
third of the time of a layer of tens of millions of weights goes into it. What is computed must stay what the
model's own forward computes, to the last bit. So the first product of each kind is computed both ways, and
only where both are equal are the following ones computed by parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmtt.kernels.backends.cpp_backend import LARGE_MATRIX

LEAST_BYTES = LARGE_MATRIX  # of a weight
MOST_TOKENS = 512  # measured up to here; it gains less the more there are
LEAST_TOKENS = 8  # with fewer, nothing is packed
ROWS = 512  # of the weight, at a time: of all sizes from 256 to 2048 the fastest
Kind = tuple[torch.Size, torch.Size, bool, int]  # x, weight, whether there is a bias, threads


class ByParts(TorchFunctionMode):
    """Within, `nn.functional.linear` with a large float32 weight on the CPU goes by parts of it.

    same : what is known of each kind of product so far: whether its parts have the bits of the whole. Shared
        by whoever computes with the same weights one after the other.
    """

    def __init__(self, same: dict[Kind, bool]) -> None:
        super().__init__()
        self._same = same

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not kwargs and func is nn.functional.linear and _suits(*args):
            return self._product(*args)
        return func(*args, **(kwargs or {}))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        kind = (x.shape, weight.shape, bias is not None, torch.get_num_threads())
        same = self._same.get(kind)
        if same:
            return by_parts(x, weight, bias)
        whole = nn.functional.linear(x, weight, bias)
        if same is None:
            self._same[kind] = torch.equal(by_parts(x, weight, bias), whole)
        return whole


def _suits(x: Tensor, weight: Tensor, _bias: Tensor | None = None) -> bool:
    dense = all(
        t.is_contiguous() and t.device.type == "cpu" and t.dtype == torch.float32 for t in (x, weight)
    )
    if not dense or weight.dim() != 2 or weight.nbytes < LEAST_BYTES:
        return False
    return LEAST_TOKENS <= x.numel() // weight.shape[1] <= MOST_TOKENS


def by_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., n] @ weight [m, n]^T + bias [m], `ROWS` of the m at a time."""
    out = x.new_empty(*x.shape[:-1], len(weight))
    for first in range(0, len(weight), ROWS):
        some = slice(first, first + ROWS)
        out[..., some] = nn.functional.linear(x, weight[some], None if bias is None else bias[some])
    return out
