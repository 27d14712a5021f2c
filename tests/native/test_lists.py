"""What the kernel lists on the way is what its dense result says; parts of a row are measured as defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lmtt.contributions import list_edges, shares
from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.types import AttentionTask

pytestmark = pytest.mark.native


@pytest.mark.parametrize("features", ["plain", "window+sinks+softcap+bias+others", "gate+row_scale"])
@pytest.mark.parametrize(("screen", "certificate"), [(0.0, 1.0), (3e-3, 1.0), (3e-2, 0.02)])
def test_kept_edges_and_their_heads(
    features: str, screen: float, certificate: float, make_attention_task: Callable[..., AttentionTask]
) -> None:
    task = make_attention_task(features, tokens=203)
    result = cpp_backend.attention_contributions(
        replace(task, screen=screen, keep=2e-3, max_certificate=certificate)
    )
    assert result.kept is not None
    assert result.kept_edges is not None
    assert (result.reevaluated > 0) == (certificate < 1), "rows that are screened twice are listed once"
    want = list_edges(result, 2e-3)
    assert 100 < len(want.weight) < 203 * 204 / 2, "some edges are kept, and some are not"
    for name, got, expected in zip(want._fields, result.kept_edges, want, strict=True):
        assert torch.equal(got, expected), name
    kept = result.kept
    key = (kept.destination * 203 + kept.source) * result.per_head.shape[1] + kept.head
    assert bool((key.diff() > 0).all()), "sorted by destination, source, head, none twice"
    assert bool((kept.value > 2e-3).all())


def test_nothing_is_kept_above_one(make_attention_task: Callable[..., AttentionTask]) -> None:
    result = cpp_backend.attention_contributions(replace(make_attention_task("plain", tokens=20), keep=1.0))
    assert result.kept is not None
    assert result.kept_edges is not None
    assert len(result.kept.head) == 0
    assert result.kept_edges.head_ptr.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_whole_parts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(21, 45, generator=generator).to(dtype) for _ in range(3)]
    whole = sum(parts[1:], parts[0])
    parts[2][4] = whole[4] = 0  # a row where nothing is close: no part of nothing
    parts[0][4] = parts[1][4] = 0
    got = shares(parts, whole, "l1", "cpp")
    want = shares([p.double() for p in parts], whole.double(), "l1")
    assert got.dtype == torch.float64
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= 2e-6
    assert (got[4] == 0).all()
    assert abs(float(got[5].sum()) - 1) < 1e-12
