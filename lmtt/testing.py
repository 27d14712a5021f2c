"""What tests need: comparisons, none of which a NaN passes, and a count of memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmtt.run.layout import pack


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


def assert_same_trace(got: Any, want: Any) -> None:
    """Two traces hold the same bits: shares, predictions, the residual stream, and what is said of them."""
    ours, theirs = pack(got.data), pack(want.data)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert np.isfinite(got.data.resid_pre).all()
    np.testing.assert_array_equal(got.data.resid_pre, want.data.resid_pre)
    assert got.data.meta == want.data.meta


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


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch says no types here
    """Bytes of the storages made while this is active: all that were there at once, and the largest one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self.at = ""  # the operation that ended at the peak, and the shapes it gave
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._watch(tensor, given)
        if self.now > self.peak:
            self.peak, self.at = self.now, f"{func} {[tuple(t.shape) for t in made]}"
        return out

    def _watch(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key == 0 or (key in given and key not in self._users):
            return  # empty, or a view of something older than this mode
        if key not in self._users:
            self._users[key] = 0
            self.now += size
            self.largest = max(self.largest, size)
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self.now -= size
