"""Products of a few rows with a large weight, by which a layer's parts are added up for its proof."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmtt.kernels.backends import cpp_backend

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_backend, "LARGE_MATRIX", 0)


@pytest.mark.parametrize("rows", [1, 15, 16])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (255, 97), (256, 96), (700, 300)])
def test_is_the_product(rows: int, depth: int, columns: int) -> None:
    torch.manual_seed(0)
    x, stored = torch.randn(rows, depth), torch.randn(columns, depth)
    stored[0, 0] = 1e4  # one large term: what is left out or taken twice shows
    got = cpp_backend.multiply_few_rows(x, stored.t())
    if depth == 1 or columns == 1:
        assert got is None, "a single row or column is stored both ways round"
        return
    assert got is not None
    want = x.double() @ stored.double().t()
    size = x.double().abs() @ stored.double().abs().t()
    assert ((got - want).abs() <= 2**-24 * 260 * size).all()
    torch.set_num_threads(3)
    assert torch.equal(cpp_backend.multiply_few_rows(x, stored.t()), got), "no bit depends on the threads"


def test_what_is_not_its_task_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, stored = torch.randn(4, 32), torch.randn(48, 32)
    assert cpp_backend.multiply_few_rows(x, stored.t()) is not None
    assert cpp_backend.multiply_few_rows(x, stored.t().contiguous()) is None
    assert cpp_backend.multiply_few_rows(x.double(), stored.double().t()) is None
    assert cpp_backend.multiply_few_rows(x.bfloat16(), stored.bfloat16().t()) is None
    assert cpp_backend.multiply_few_rows(torch.randn(17, 32), stored.t()) is None
    monkeypatch.setattr(cpp_backend, "LARGE_MATRIX", stored.nbytes + 1)
    assert cpp_backend.multiply_few_rows(x, stored.t()) is None


def test_the_extension_checks_again() -> None:
    from lmtt import _C

    def arrays(rows: int, depth: int, columns: int) -> dict[str, Any]:
        shapes = {"rows": (rows, depth), "stored": (columns, depth), "out": (rows, columns)}
        return {**{name: torch.zeros(shape).numpy() for name, shape in shapes.items()}, "threads": 1}

    _C.multiply_few_rows(**arrays(16, 3, 5))
    for sizes in ((17, 3, 5), (0, 3, 5), (2, 0, 5), (2, 3, 0)):
        with pytest.raises(ValueError, match=r"expected|empty"):
            _C.multiply_few_rows(**arrays(*sizes))
    for name, wrong in (
        ("stored", torch.zeros(5, 4)),
        ("out", torch.zeros(2, 6)),
        ("rows", torch.zeros(2, 3, 1)),
    ):
        with pytest.raises(ValueError, match=name):
            _C.multiply_few_rows(**(arrays(2, 3, 5) | {name: wrong.numpy()}))


def test_nan_stays() -> None:
    x, stored = torch.zeros(2, 32), torch.randn(48, 32)
    stored[5, 7] = torch.nan
    got = cpp_backend.multiply_few_rows(x, stored.t())
    assert got is not None
    assert got[:, 5].isnan().all()
    assert got.isnan().sum() == 2
