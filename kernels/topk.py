"""The k largest of each row with a fixed rule for ties, which torch.topk does not have."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices [N, k] of the k largest of each row of `scores` [N, M], falling, lower index first.

    NaN counts as the largest, as in torch.topk. Needs k <= M.
    """
    values, indices = torch.topk(scores, k)
    last = values[:, -1:]
    # torch.topk keeps any of several equal values; only rows with more of the last one than were kept care.
    cut = (scores == last).sum(-1) > (values == last).sum(-1)
    if bool(cut.any()):
        rows = cut.nonzero()[:, 0]
        ordered = torch.sort(scores[rows], dim=-1, descending=True, stable=True)
        values[rows], indices[rows] = ordered.values[:, :k], ordered.indices[:, :k]
    indices, by_index = indices.sort(-1)
    values, by_value = torch.sort(values.gather(-1, by_index), dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, by_value)
