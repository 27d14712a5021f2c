"""L2 proximity: max(0, |y|_2 - |y - x|_2).

Multiplied by its conjugate the difference is <x, 2y - x> / (|y| + |y - x|), which keeps small parts; y - x is
formed by coordinate, which keeps parts nearly equal to y. Everything is scaled by the largest coordinate
first, so that no square overflows and none that matters underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtt.kernels.numerics import divide

NAME = "l2"


def prepare(whole: Tensor) -> tuple[Tensor]:
    """y itself, [..., D]."""
    return (whole,)


def proximity(part: Tensor, whole: Tensor) -> Tensor:
    """max(0, <x, 2y - x> / (|y| + |y - x|)) of parts [..., D]; [...]."""
    scale = torch.maximum(part.abs().amax(-1, keepdim=True), whole.abs().amax(-1, keepdim=True))
    x, y = divide(part, scale), divide(whole, scale)
    denominator = y.square().sum(-1).sqrt() + (y - x).square().sum(-1).sqrt()
    return divide((x * (2 * y - x)).sum(-1), denominator).mul_(scale[..., 0]).clamp_(min=0)


def norm(x: Tensor) -> Tensor:
    """|x|_2 over the last axis, scaled like `proximity`."""
    scale = x.abs().amax(-1, keepdim=True)
    return divide(x, scale).square().sum(-1).sqrt() * scale[..., 0]
