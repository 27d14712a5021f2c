"""L1 proximity: max(0, |y|_1 - |y - x|_1) (Ferrando et al. 2022, eq. 6; Ferrando & Voita 2024, eq. 3).

With t = x * sign(y), each coordinate of |y| - |y - x| is min(t, 2|y| - t). No term of that sum subtracts
nearly equal numbers, whereas the definition as printed loses every part much smaller than y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtt.kernels.numerics import sign

NAME = "l1"


def prepare(whole: Tensor) -> tuple[Tensor, Tensor]:
    """sign(y) and 2|y|, [..., D] each."""
    return sign(whole), whole.abs().mul_(2)


def proximity(part: Tensor, signs: Tensor, twice: Tensor) -> Tensor:
    """max(0, sum_d min(t_d, 2|y_d| - t_d)) of parts [..., D]; [...]."""
    t = part * signs
    rest = twice - t
    return torch.minimum(t, rest, out=rest).sum(-1).clamp_(min=0)


def norm(x: Tensor) -> Tensor:
    """|x|_1 over the last axis."""
    return x.abs().sum(-1)
