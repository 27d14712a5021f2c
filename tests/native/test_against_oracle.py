"""Every feature of both ops, on every instruction set of this machine, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.numerics import checksum_tolerance, share_tolerance
from lmtt.kernels.types import AttentionTask, NeuronTask

pytestmark = pytest.mark.native

try:
    from lmtt import _C

    ISAS = _C.info()["available"]
except ImportError:
    ISAS = []

FEATURES = [
    "plain", "softcap", "window", "sinks", "bool mask", "float mask", "alibi", "row_scale", "gate", "lse",
    "bias", "row bias", "others", "softcap+window+sinks+float mask+row_scale+bias+others",
    "gate+row_scale+window",
]  # fmt: skip


def kappa(task: AttentionTask) -> float:
    a = task.attention
    q, k = a.q.float().norm(dim=-1), a.k.float().norm(dim=-1)
    return abs(a.scale) * float(q.max() * k.max())


def assert_close(got: Tensor, want: Tensor, allowed: Tensor | float, what: str) -> None:
    error = (got.double() - want).abs()
    assert got.shape == want.shape, what
    assert bool((error <= allowed).all()), f"{what}: off by {error.max():.2e}, allowed {allowed}"


def check_rows(got: Any, want: Any, allowed: Tensor, dtype: torch.dtype) -> None:
    """The fields that both ops share; `allowed` [T] bounds any share of the row."""
    for name in ("residual", "bias"):
        assert_close(getattr(got, name), getattr(want, name), allowed, name)
    assert_close(got.others, want.others, allowed[:, None], "others")
    assert_close(got.checksum, torch.zeros_like(allowed), checksum_tolerance(dtype), "checksum")
    # skipped parts are over-reported, by at most the certificate
    assert bool((got.normaliser >= want.normaliser * (1 - 1e-5)).all())
    assert bool((got.normaliser * (1 - allowed) <= want.normaliser * (1 + 1e-5)).all())
    assert bool((got.certificate >= 0).all())
    assert bool((got.certificate <= 1).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("screen", [0.0, 1e-3, 3e-2])
@pytest.mark.parametrize("features", FEATURES)
def test_attention(
    features: str,
    screen: float,
    isa: str,
    make_attention_task: Callable[..., AttentionTask],
    exact: Callable[..., Any],
) -> None:
    _C.set_isa(isa)
    task = replace(make_attention_task(features), screen=screen, keep=0.02)
    got, want = cpp_backend.attention_contributions(task), exact(task)
    allowed = got.certificate.double() + share_tolerance(torch.float32, kappa(task))
    assert_close(got.edges, want.parts.sum(1), allowed[:, None], "edges")
    assert_close(got.per_head, want.parts.sum(2), allowed[:, None], "per_head")
    check_rows(got, want, allowed, torch.float32)
    assert bool((got.edges.triu(1) == 0).all())
    if screen == 0:
        assert bool((got.certificate == 0).all())
        assert got.evaluated == got.positive
    else:
        assert 0 < got.evaluated < got.positive

    # kept: exactly the pairs above the threshold, but for those within the error of it
    kept = got.kept
    assert kept is not None
    listed = torch.zeros_like(want.parts)
    listed[kept.destination, kept.head, kept.source] = kept.value.double()
    key = (kept.destination * 1000 + kept.source) * 100 + kept.head
    assert bool((key.diff() > 0).all()), "kept pairs are not sorted"
    error = (listed - want.parts).abs()
    assert bool((error <= allowed[:, None, None])[listed > 0].all())
    assert bool((listed > 0)[want.parts > 0.02 + allowed[:, None, None]].all()), (
        "a pair above keep is missing"
    )
    assert bool((kept.value > 0.02).all())
    assert bool((got.edges[kept.destination, kept.source] > 0.02).all())


@pytest.mark.parametrize("screen", [1e-3, 10.0])
def test_kept_pairs_that_were_screened_out_are_listed_too(
    screen: float, make_attention_task: Callable[..., AttentionTask]
) -> None:
    """With keep=0 the list is everything, first-order values included, and adds up to what was reported."""
    task = replace(make_attention_task("sinks+bias"), screen=screen)
    want = cpp_backend.attention_contributions(task)
    got = cpp_backend.attention_contributions(replace(task, keep=0.0))
    assert torch.equal(got.edges, want.edges)
    assert torch.equal(got.certificate, want.certificate)
    assert got.evaluated == want.evaluated
    kept = got.kept
    assert kept is not None
    edges, per_head = torch.zeros_like(got.edges), torch.zeros_like(got.per_head)
    edges.index_put_((kept.destination, kept.source), kept.value, accumulate=True)
    per_head.index_put_((kept.destination, kept.head), kept.value, accumulate=True)
    assert_close(edges, got.edges.double(), 1e-6, "kept pairs by edge")
    assert_close(per_head, got.per_head.double(), 1e-6, "kept pairs by head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_16_bits_is_float32_arithmetic(
    dtype: torch.dtype, make_attention_task: Callable[..., AttentionTask], exact: Callable[..., Any]
) -> None:
    task = make_attention_task("sinks+float mask+row_scale+gate+bias+others", dtype=dtype)
    got, want = cpp_backend.attention_contributions(task), exact(task)
    assert got.edges.dtype == torch.float32
    tolerance = share_tolerance(torch.float32, kappa(task))
    assert_close(got.edges, want.parts.sum(1), tolerance, "edges")
    assert_close(got.residual, want.residual, tolerance, "residual")


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 130])
def test_any_number_of_tokens(
    tokens: int, make_attention_task: Callable[..., AttentionTask], exact: Callable[..., Any]
) -> None:
    task = make_attention_task("sinks+bias", tokens=tokens)
    got, want = cpp_backend.attention_contributions(task), exact(task)
    assert_close(got.edges, want.parts.sum(1), share_tolerance(torch.float32, kappa(task)), "edges")


@pytest.mark.parametrize("d_model", [1, 15, 16, 33, 272, 530])
def test_any_width(
    d_model: int, make_attention_task: Callable[..., AttentionTask], exact: Callable[..., Any]
) -> None:
    task = make_attention_task("bias", tokens=19, d_model=d_model)
    got, want = cpp_backend.attention_contributions(task), exact(task)
    assert_close(got.edges, want.parts.sum(1), share_tolerance(torch.float32, kappa(task)), "edges")


def test_small_parts_are_not_lost(
    make_attention_task: Callable[..., AttentionTask], exact: Callable[..., Any]
) -> None:
    """A residual a million times larger than the pairs: a difference of norms would lose them."""
    task = make_attention_task()
    whole = task.whole + 1e6 * task.resid_pre
    task = replace(task, resid_pre=1e6 * task.resid_pre + task.resid_pre, whole=whole)
    got, want = cpp_backend.attention_contributions(task), exact(task)
    want_edges = want.parts.sum(1)
    assert bool((want_edges.tril().sum(-1) > 0).all())
    # relative to the edge: the error of a pair is of the pair's own size
    error = (got.edges.double() - want_edges).abs()
    assert bool((error <= 1e-3 * want_edges + 1e-12).all())


def test_a_row_that_may_attend_to_nothing_has_no_pairs(
    make_attention_task: Callable[..., AttentionTask],
) -> None:
    task = make_attention_task()
    allowed = torch.ones(1, *task.attention.q.shape[1:2] * 2, dtype=torch.bool)
    allowed[0, 5] = False
    task = replace(task, attention=replace(task.attention, mask=allowed))
    got = cpp_backend.attention_contributions(task)
    assert bool((got.edges[5] == 0).all())
    assert bool(got.edges[6, :7].sum() > 0)
    assert bool(got.edges.isfinite().all())


def test_a_row_without_proximities_is_zero(make_attention_task: Callable[..., AttentionTask]) -> None:
    task = make_attention_task()
    got = cpp_backend.attention_contributions(replace(task, whole=torch.zeros_like(task.whole)))
    for result in (got.edges, got.per_head, got.residual, got.normaliser, got.certificate):
        assert bool((result == 0).all())


def test_nan_reaches_exactly_what_depends_on_it(make_attention_task: Callable[..., AttentionTask]) -> None:
    task = make_attention_task("bias")
    clean = cpp_backend.attention_contributions(task)
    k = task.attention.k.clone()
    k[1, 20, 3] = torch.nan  # source 20: rows from 20 on
    got = cpp_backend.attention_contributions(replace(task, attention=replace(task.attention, k=k)))
    assert bool(got.normaliser[20:].isnan().all())
    assert bool(got.residual[20:].isnan().all())
    assert torch.equal(got.edges[:20], clean.edges[:20])
    assert torch.equal(got.per_head[:20], clean.per_head[:20])
    whole = task.whole.clone()
    whole[7, 11] = torch.nan
    got = cpp_backend.attention_contributions(replace(task, whole=whole))
    others = torch.arange(whole.shape[0]) != 7
    assert bool(got.normaliser[7].isnan())
    assert torch.equal(got.edges[others], clean.edges[others])


def top_k(shares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, index = shares.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], index[:, :k]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("screen", [0.0, 1e-3, 3e-2, 10.0])
@pytest.mark.parametrize("features", ["", "row_scale+bias+others"])
@pytest.mark.parametrize(("neurons", "k"), [(203, 7), (64, 1), (5, 5), (130, 130)])
def test_neurons(
    neurons: int,
    k: int,
    features: str,
    screen: float,
    isa: str,
    make_neuron_task: Callable[..., NeuronTask],
    exact: Callable[..., Any],
) -> None:
    _C.set_isa(isa)
    task = replace(make_neuron_task(neurons=neurons, k=k, features=features), screen=screen)
    got, want = cpp_backend.neuron_contributions(task), exact(task)
    allowed = got.certificate.double() + share_tolerance(torch.float32)
    check_rows(got, want, allowed, torch.float32)

    # numerators are exact whatever the screen, so the order is the true one but for ties within rounding
    numerators = want.parts * want.normaliser[:, None]
    values, _ = top_k(numerators, k)
    assert_close(
        got.value * got.normaliser[:, None], values, share_tolerance(torch.float32) * 100, "numerators"
    )
    chosen = numerators.gather(1, got.index)
    assert_close(chosen, values, share_tolerance(torch.float32) * 100, "chosen neurons")
    assert all(len(set(row.tolist())) == k for row in got.index)
    assert bool((got.value.diff(dim=-1) <= 0).all())
    ties = (got.value.diff(dim=-1) == 0) & (got.index.diff(dim=-1) < 0)
    assert not bool(ties.any()), "ties go to the lower index"
    if screen == 0:
        assert bool((got.certificate == 0).all())
        assert got.evaluated == got.positive
    if screen == 10.0 and k < neurons:
        assert got.evaluated < got.positive, "the top k alone should not need every neuron"


def test_neurons_with_few_positive_proximities(make_neuron_task: Callable[..., NeuronTask]) -> None:
    """Fewer than k: zeros follow, by lower index, and nothing is evaluated for them."""
    task = make_neuron_task(k=20)
    act = torch.zeros_like(task.act)
    act[:, 50] = 1.0
    base = task.w_down[50].expand_as(task.base)
    task = replace(task, act=act, base=base, whole=2 * base)
    got = cpp_backend.neuron_contributions(task)
    assert bool((got.index[:, 0] == 50).all())
    assert got.evaluated == got.index.shape[0]
    assert got.index[0, 1:].tolist() == list(range(19))
    assert bool((got.value[:, 1:] == 0).all())
