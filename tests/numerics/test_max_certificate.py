"""Rows that screening leaves too uncertain are evaluated again until they are not; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

SCREEN, KEEP = 0.02, 0.01
SHARE_ROUNDING = 1e-6  # a share's float32 rounding


def kept_rows(result: Any, rows: torch.Tensor) -> list[tuple[Any, ...]]:
    inside = torch.isin(result.kept.destination, rows)
    return list(zip(*(x[inside].tolist() for x in result.kept), strict=True))


def test_doubtful_rows_become_certain_enough(
    backend: str, case: SimpleNamespace, run: Callable[..., Any]
) -> None:
    task = case.attention(5, T=23, screen=SCREEN, keep=KEEP)
    screened = run("attention_contributions", task, backend=backend)
    exact = run("attention_contributions", replace(task, screen=0.0), backend=backend)
    limit = float(screened.certificate.median())
    mixed = run("attention_contributions", replace(task, max_certificate=limit), backend=backend)
    doubtful = torch.nonzero(screened.certificate > limit).flatten()
    others = torch.nonzero(screened.certificate <= limit).flatten()
    assert 0 < len(doubtful) < 23, "nothing to tell apart"
    assert mixed.reevaluated == len(doubtful)
    assert mixed.evaluated > screened.evaluated
    assert mixed.positive == screened.positive
    assert (mixed.certificate <= limit).all()
    for name in ("edges", "per_head", "residual", "bias", "normaliser", "certificate", "checksum"):
        assert torch.equal(getattr(mixed, name)[others], getattr(screened, name)[others]), name
    for name in ("edges", "per_head", "residual", "bias"):
        error = (getattr(mixed, name) - getattr(exact, name)).abs()
        error = error.amax(-1) if error.dim() == 2 else error
        assert torch.isfinite(error).all(), name
        assert (error <= mixed.certificate + SHARE_ROUNDING).all(), name
    assert torch.allclose(mixed.checksum, exact.checksum, atol=SHARE_ROUNDING)
    assert not torch.equal(screened.edges, exact.edges)
    for destination, source, head, value in kept_rows(mixed, doubtful):
        assert value > KEEP
        assert mixed.edges[destination, source] > KEEP
        assert value <= mixed.per_head[destination, head] + SHARE_ROUNDING
    assert kept_rows(mixed, others) == kept_rows(screened, others)
    order = (mixed.kept.destination * 23 + mixed.kept.source) * 4 + mixed.kept.head
    assert (order.diff() > 0).all()


@pytest.mark.native
def test_native_kernel_lowers_the_threshold_before_it_gives_up_screening(
    case: SimpleNamespace, run: Callable[..., Any]
) -> None:
    task = case.attention(5, T=23, screen=SCREEN)
    screened = run("attention_contributions", task, backend="cpp")
    exact = run("attention_contributions", replace(task, screen=0.0), backend="cpp")
    limit = float(screened.certificate.max()) * 0.9
    mixed = run("attention_contributions", replace(task, max_certificate=limit), backend="cpp")
    (row, *others) = torch.nonzero(screened.certificate > limit).flatten().tolist()
    assert not others, "one row is enough to count evaluations"
    whole_row = run("attention_contributions", replace(task, max_certificate=0.0), backend="cpp")
    assert whole_row.certificate.max() == 0
    assert screened.evaluated < mixed.evaluated < exact.evaluated
    assert 0 < mixed.certificate[row] <= limit, "evaluated with a lower threshold, not without"


def test_nothing_is_evaluated_again_by_default(
    backend: str, case: SimpleNamespace, run: Callable[..., Any]
) -> None:
    result = run("attention_contributions", case.attention(5, T=23, screen=SCREEN), backend=backend)
    assert result.reevaluated == 0
    assert result.certificate.max() > 0
