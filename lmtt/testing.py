"""Comparisons that tests need: none passes for NaN, and each failure names the worst element."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within(got: Tensor, want: Tensor, allowed: Tensor | float, what: str = "values") -> None:
    """|got - want| <= allowed in every element, computed in float64; `allowed` broadcasts.

    NaN or infinity in either, or a different shape, fails.
    """
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    if got.numel() == 0:
        return
    g, w = got.detach().double().cpu(), want.detach().double().cpu()
    limit = torch.as_tensor(allowed, dtype=torch.float64).cpu().expand_as(w)
    error = (g - w).abs()
    bad = ~(error <= limit) | ~g.isfinite() | ~w.isfinite()
    if not bool(bad.any()):
        return
    excess = torch.where(
        bad, (error / limit.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num(torch.inf), 0
    )
    worst = int(excess.argmax())
    at = [int(n) for n in torch.unravel_index(torch.tensor(worst), w.shape)]
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} elements off; worst at {at}: "
        f"got {g.flatten()[worst]:.9g}, expected {w.flatten()[worst]:.9g}, "
        f"error {error.flatten()[worst]:.3g} > {limit.flatten()[worst]:.3g}"
    )


def assert_topk(
    index: Tensor, value: Tensor, scores: Tensor, tolerance: Tensor | float, what: str = "top k"
) -> None:
    """(index, value) [N, k] are the k largest of `scores` [N, M], up to swaps of elements that nearly tie.

    Every value is its index's score, the values are those of a full sort, indices do not repeat, values fall;
    all within `tolerance`, which broadcasts to [N, k].
    """
    k = index.shape[1]
    best = torch.sort(scores, dim=-1, descending=True, stable=True).values[:, :k]
    assert_within(value, scores.gather(-1, index), tolerance, f"{what}: value of the index")
    assert_within(value, best, tolerance, f"{what}: value of the rank")
    assert all(len(set(row)) == k for row in index.tolist()), f"{what}: an index is repeated"
    assert bool((value[:, 1:] <= value[:, :-1]).all()), f"{what}: values do not fall"
