"""Products by parts of a large weight have the bits of the whole, or are not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lmtt
from lmtt.streaming import products
from lmtt.streaming.products import ByParts, Kind, by_parts

N, M = 96, 1300  # of the weight: two whole parts and a shorter one
Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST_BYTES", 1)


def some(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(1, tokens, N), torch.randn(M, N), torch.randn(M)


@pytest.mark.parametrize("tokens", [products.LEAST_TOKENS, 64, products.MOST_TOKENS])
def test_the_bits_are_those_of_the_whole(tokens: int) -> None:
    x, weight, bias = some(tokens)
    want = [nn.functional.linear(x, weight), nn.functional.linear(x, weight, bias)]
    same: dict[Kind, bool] = {}
    for _ in range(2):  # judged, then used if it may be
        with ByParts(same):
            got = [nn.functional.linear(x, weight), nn.functional.linear(x, weight, bias)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(same) == 2
    torch.testing.assert_close(by_parts(x, weight, bias), want[1])


def test_parts_are_used_where_they_are_equal_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = some(64)
    want = nn.functional.linear(x, weight)
    for error, expected in ((0.0, 3), (1e-5, 1)):
        calls = []

        def parts(*given: Tensor | None, calls: list[Any] = calls, error: float = error) -> Tensor:
            calls.append(given)
            return want + error

        monkeypatch.setattr(products, "by_parts", parts)
        with ByParts({}):
            for _ in range(3):
                assert torch.equal(nn.functional.linear(x, weight), want)
        assert len(calls) == expected


def test_what_does_not_suit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(products, "by_parts", never)
    x, weight, _ = some(64)
    with ByParts({}):
        nn.functional.linear(x[:, : products.LEAST_TOKENS - 1], weight)
        nn.functional.linear(x.double(), weight.double())
        nn.functional.linear(x.bfloat16(), weight.bfloat16())
        nn.functional.linear(x, weight[:, ::2].repeat_interleave(2, 1).t().contiguous().t())
        _ = x @ weight.T.contiguous()
        _ = x[0] @ x[0].T[:, 0]
    monkeypatch.setattr(products, "LEAST_BYTES", weight.nbytes + 1)
    with ByParts({}):
        nn.functional.linear(x, weight)


@pytest.mark.usefixtures("always_streamed")
def test_a_streamed_run_by_parts_is_the_resident_one(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ROWS", 16)
    ids = list(range(2, 14))
    want = lmtt.load(str(checkpoint("llama"))).trace(input_ids=ids)
    engine = lmtt.load(str(checkpoint("llama")), memory="110MiB")
    got = engine.trace(input_ids=ids)
    np.testing.assert_array_equal(got.data.resid_pre, want.data.resid_pre)
    np.testing.assert_array_equal(got.data.edges.weight, want.data.edges.weight)
    judged = engine._weights._same_by_parts  # type: ignore[attr-defined] # a streamed engine has it
    assert judged  # it went through the products, and each kind was compared
