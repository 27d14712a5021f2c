"""The small pieces that everything else rests on: measures, margin, certificate, top-k, comparisons."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmtt.kernels import numerics
from lmtt.kernels.measures import MEASURES, measure
from lmtt.kernels.topk import stable_topk
from lmtt.kernels.types import Attention, AttentionTask
from lmtt.testing import assert_topk, assert_within

small = st.integers(-6, 6).map(float)  # many zeros, many ties
vectors = st.integers(1, 9).flatmap(
    lambda n: st.tuples(*(arrays(np.float64, n, elements=small) for _ in "xy"))
)


@given(vectors)
def test_screening_identity(pair):
    """|y| - |y - x| = g - slack with slack >= 0, in integers, where nothing rounds."""
    x, y = (torch.from_numpy(v) for v in pair)
    signs, twice = measure("l1").prepare(y)
    raw = y.abs().sum() - (y - x).abs().sum()
    t = x * signs
    assert torch.minimum(t, twice - t).sum() == raw
    g = t.sum()
    assert g - 2 * (t - y.abs()).clamp(min=0).sum() == raw
    assert raw <= g
    assert measure("l1").proximity(x, signs, twice) == max(0, raw)


def test_sign_of_zero_is_a_sign():
    x = torch.tensor([0.0, -0.0, 3.0, -2.0, torch.nan])
    assert_within(numerics.sign(x)[:4], torch.tensor([1.0, -1, 1, -1]), 0.0)  # by the sign bit
    assert numerics.sign(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(MEASURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e-12, 1e-6, 1e-4, 1e-2, 0.3, 1, 1.9, 30])
def test_no_measure_cancels(case, name, dtype, ratio):
    """Held to the smaller of part and whole: a difference of two norms misses this by orders of magnitude."""
    random = torch.Generator().manual_seed(7)
    of = measure(name)
    for d_model in (3, 576, 4096):
        y = torch.randn(60, d_model, generator=random, dtype=torch.float64)
        aligned = torch.randn(60, 1, generator=random, dtype=torch.float64).abs() * y
        noise = torch.randn(60, d_model, generator=random, dtype=torch.float64)
        x = ratio * torch.where(torch.arange(60)[:, None] % 2 == 0, aligned, noise)
        x, y = x.to(dtype), y.to(dtype)
        want = case.proximity(x.double(), y.double(), name)
        allowed = numerics.proximity_tolerance(dtype, of.norm(x).double(), of.norm(y).double())
        if ratio <= 1e-6:  # the definition itself has cancelled, even in extended precision
            allowed = allowed + 1e-17 * of.norm(y).double()
        assert_within(of.proximity(x, *of.prepare(y)), want, allowed, f"{name} at D = {d_model}")


@pytest.mark.parametrize("name", sorted(MEASURES))
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_multiples_of_the_whole(name, scale):
    """x = c y has proximity (1 - |1 - c|) |y|."""
    of = measure(name)
    y = torch.tensor([[3.0, -4.0, 0.0]], dtype=torch.float64) * scale
    for c, share in ((0, 0), (0.25, 0.25), (1, 1), (1.5, 0.5), (2, 0), (3, 0), (-1, 0)):
        got = of.proximity(c * y, *of.prepare(y))
        assert_within(got / of.norm(y), torch.tensor([float(share)]), 1e-15, f"{c} y")
    zero = torch.zeros(1, 3, dtype=torch.float64)
    for part in (zero, y):
        assert_within(of.proximity(part, *of.prepare(zero)), torch.zeros(1), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_margin_covers_every_rounding(dtype):
    """True <v, W_O r> <= computed + margin * b, on inputs built to cancel, in exact arithmetic."""
    random = torch.Generator().manual_seed(0)
    missed = 0
    for E, D in ((1, 7), (2, 200), (16, 33)):
        for _ in range(40):
            w = torch.randn(E, D, generator=random, dtype=dtype)
            v = torch.randn(E, generator=random, dtype=dtype)
            if E > 1:  # the last row undoes the others
                w[-1] = -(v[:-1] @ w[:-1])
                v[-1] = 1
            r = numerics.sign(torch.randn(D, generator=random, dtype=dtype))
            computed = float(v @ (w @ r))
            b = float(v.abs() @ w.abs().sum(-1))
            exact = sum(
                Fraction(float(v[e])) * Fraction(float(w[e, d])) * int(r[d])
                for e in range(E)
                for d in range(D)
            )
            margin = Fraction(numerics.screening_margin(E + D, dtype)) * Fraction(b)
            assert abs(exact - Fraction(computed)) <= margin
            missed += exact > 0 >= computed
    assert missed > 0, "inputs too tame to need a margin"


def test_screened_pairs_that_cancel_stay_inside_the_certificate(backend, run):
    """First-order values of parts whose float32 g has the wrong sign: only the margin accounts for them."""
    random = torch.Generator().manual_seed(1)
    D, wrong = 96, 0
    for _ in range(60):
        row = torch.randn(D, generator=random)
        noise = torch.randn(D, generator=random) * 1e-7
        w_o = torch.stack([row, -row * (1 + noise)])[None]
        v = 1e3 * torch.ones(1, 1, 2)
        resid_pre = torch.randn(1, D, generator=random)
        part = (v[0].double() @ w_o[0].double())[0]
        whole = (resid_pre.double() + part).float()
        attention = Attention(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), v, w_o, 1.0)
        task = AttentionTask(attention, resid_pre, whole, screen=1e6)
        result = run("attention_contributions", task, backend=backend)
        parts = torch.stack([part, resid_pre[0].double()])
        of = measure("l1")
        true = of.proximity(parts, *of.prepare(whole.double()))
        share = true / true.sum()
        assert result.evaluated == 0
        assert_within(result.edges[0, :1], share[:1], result.certificate + 2e-6, "the pair")
        assert_within(result.residual, share[1:], result.certificate + 2e-6, "the residual")
        wrong += bool((share[0] > 1e-5) & (result.edges[0, 0] == 0))
    assert wrong > 0, "inputs too tame to need a margin"


def test_certificate_of_rows_without_a_normaliser():
    skipped = torch.tensor([0.0, 1.0, 1.0, 3.0])
    normaliser = torch.tensor([0.0, 0.0, 4.0, 2.0])
    assert_within(numerics.certificate(skipped, normaliser), torch.tensor([0, 1, 0.25, 1]), 0.0)


def test_division_keeps_nan():
    got = numerics.divide(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([0.0, 0.0, 2.0]))
    assert got[0] == 0
    assert got[1].isnan()
    assert got[2] == 1.5


def test_full_precision_products_are_asked_for_and_given_back():
    torch.set_float32_matmul_precision("medium")
    try:
        with numerics.ieee_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=small), st.data())
def test_topk_breaks_ties_by_index(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    values, indices = stable_topk(torch.from_numpy(scores), k)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert indices.tolist() == order.tolist()
    assert values.tolist() == np.take_along_axis(scores, order, 1).tolist()


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([torch.nan, 1.0], [0.0, 1.0]),
        ([torch.nan, 1.0], [torch.nan, 1.0]),
        ([torch.inf, 1.0], [torch.inf, 1.0]),
        ([0.0, 1.1], [0.0, 1.0]),
        ([0.0], [0.0, 1.0]),
    ],
)
def test_comparison_fails_where_it_should(got, want):
    with pytest.raises(AssertionError):
        assert_within(torch.tensor(got), torch.tensor(want), 0.05)


def test_comparison_names_the_worst():
    with pytest.raises(AssertionError, match=r"2 of 4 elements off; worst at \[1, 0\]: got 7, expected 3"):
        assert_within(torch.tensor([[1.0, 2.5], [7, 4]]), torch.tensor([[1.0, 2], [3, 4]]), 0.1)


@pytest.mark.parametrize(
    ("index", "value"),
    [([0, 1], [3.0, 1.0]), ([0, 2], [3.0, 1.0]), ([2, 0], [2.0, 3.0]), ([0, 0], [3.0, 3.0])],
)
def test_topk_comparison_fails_where_it_should(index, value):
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    assert_topk(torch.tensor([[0, 2]]), torch.tensor([[3.0, 2.0]]), scores, 1e-6)
    with pytest.raises(AssertionError):
        assert_topk(torch.tensor([index]), torch.tensor([value]), scores, 1e-6)
