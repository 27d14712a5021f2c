"""Rows that screening leaves too uncertain are evaluated again, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

SCREEN, KEEP = 0.02, 0.01


def kept_rows(result: Any, rows: torch.Tensor) -> list[tuple[Any, ...]]:
    inside = torch.isin(result.kept.destination, rows)
    return list(zip(*(x[inside].tolist() for x in result.kept), strict=True))


def test_doubtful_rows_become_exact(backend: str, case: SimpleNamespace, run: Callable[..., Any]) -> None:
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
    for name in ("edges", "per_head", "residual", "bias", "normaliser", "certificate", "checksum"):
        assert torch.equal(getattr(mixed, name)[doubtful], getattr(exact, name)[doubtful]), name
        assert torch.equal(getattr(mixed, name)[others], getattr(screened, name)[others]), name
    assert not torch.equal(screened.edges, exact.edges)
    assert kept_rows(mixed, doubtful) == kept_rows(exact, doubtful)
    assert kept_rows(mixed, others) == kept_rows(screened, others)
    order = (mixed.kept.destination * 23 + mixed.kept.source) * 4 + mixed.kept.head
    assert (order.diff() > 0).all()


def test_nothing_is_evaluated_again_by_default(
    backend: str, case: SimpleNamespace, run: Callable[..., Any]
) -> None:
    result = run("attention_contributions", case.attention(5, T=23, screen=SCREEN), backend=backend)
    assert result.reevaluated == 0
    assert result.certificate.max() > 0
