"""Attention contributions of every backend against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lmtt.kernels.proximity.reference import pair_shares
from lmtt.testing import assert_within

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
VARIANTS = (
    "softcap", "window", "sinks", "bool_mask", "float_mask", "head_mask", "alibi", "lse", "row_scale", "gate",
    "bias", "row_bias", "others",
)  # fmt: skip

shapes = st.fixed_dictionaries(
    {
        "T": st.integers(1, 19),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "E": st.integers(1, 9),
        "E_v": st.integers(1, 9),
        "D": st.sampled_from([1, 2, 7, 16, 33, 64]),
    }
)
variants = st.frozensets(st.sampled_from(VARIANTS), max_size=5)


def check_shares(result, oracle, T, H, *, certified=True):
    """Every reported share is within certificate and rounding of the truth; every row sums to 1 or 0."""
    total = oracle.normaliser
    usable = total > oracle.allowed.sum(-1)  # below it, rounding alone decides between a share and 0
    allowed = (oracle.share_error + (result.certificate.double() if certified else 0))[:, None]
    pairs = oracle.shares[:, : H * T].view(T, H, T)
    extras = oracle.shares[:, H * T :]
    got_extras = torch.cat([torch.stack([result.residual, result.bias], 1), result.others], 1)
    for name, got, want in (
        ("edges", result.edges, pairs.sum(1)),
        ("heads", result.per_head, pairs.sum(2)),
        ("residual, bias, others", got_extras, extras),
    ):
        assert_within(got[usable], want[usable], allowed[usable], name)
    assert bool((result.certificate >= 0).all())
    assert bool((result.certificate <= 1).all())
    rows = result.edges.double().sum(-1) + got_extras.double().sum(-1)
    assert_within(rows, (result.normaliser > 0).double(), 1e-5, "sum of a row")
    assert bool((result.edges.triu(1) == 0).all()), "an edge from a later token"


@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    variants=variants,
    dtype=st.sampled_from(sorted(DTYPES)),
    special=st.booleans(),
    measure=st.sampled_from(["l1", "l1", "l2"]),
)
def test_every_pair_is_exact_without_a_screen(
    backend, case, run, seed, shape, variants, dtype, special, measure
):
    task = case.attention(
        seed, **shape, variants=variants, dtype=DTYPES[dtype], special_rows=special, measure=measure, keep=0.0
    )
    result = run("attention_contributions", task, backend=backend)
    oracle = case.attention_oracle(task)
    T, H = shape["T"], shape["kv_heads"] * shape["group"]
    check_shares(result, oracle, T, H)
    assert_within(result.normaliser, oracle.normaliser, 2 * oracle.allowed.sum(-1), "normaliser")
    assert_within(result.certificate, torch.zeros(T), 0.0, "certificate")

    pairs = torch.zeros(T, H, T, dtype=torch.float64)
    kept = result.kept
    pairs[kept.destination, kept.head, kept.source] = kept.value.double()
    proximity = pairs * result.normaliser.double()[:, None, None]
    # A share that rounds to 0 in float32 is not kept.
    tiny = 2 * torch.finfo(kept.value.dtype).smallest_normal * result.normaliser.double()[:, None]
    assert_within(
        proximity.view(T, -1), oracle.proximity[:, : H * T], oracle.allowed[:, : H * T] + tiny, "single pairs"
    )


@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    variants=variants,
    floor=st.sampled_from([1e-4, 1e-3, 1e-2, 0.1, 10.0]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_the_certificate_covers_what_the_screen_costs(
    backend, case, run, seed, shape, variants, floor, dtype
):
    task = case.attention(seed, **shape, variants=variants, dtype=DTYPES[dtype], screen=floor, keep=0.0)
    result = run("attention_contributions", task, backend=backend)
    oracle = case.attention_oracle(task)
    T, H = shape["T"], shape["kv_heads"] * shape["group"]
    check_shares(result, oracle, T, H)
    assert result.evaluated <= result.positive

    # Any set of parts of a row: single pairs, and random subsets.
    got = torch.zeros(T, H, T, dtype=torch.float64)
    got[result.kept.destination, result.kept.head, result.kept.source] = result.kept.value.double()
    got = torch.cat(
        [got.view(T, -1), result.residual[:, None], result.bias[:, None], result.others], 1
    ).double()
    usable = oracle.normaliser > oracle.allowed.sum(-1)
    allowed = (oracle.share_error + result.certificate.double())[:, None]
    assert_within(got[usable], oracle.shares[usable], allowed[usable], "single parts")
    chosen = (torch.rand(64, got.shape[1], generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    assert_within(
        (got @ chosen.T)[usable], (oracle.shares @ chosen.T)[usable], allowed[usable], "subsets of parts"
    )


@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-25, 15),
    dtype=st.sampled_from(["float32", "float64"]),
    measure=st.sampled_from(["l1", "l2"]),
)
def test_huge_and_tiny_magnitudes(backend, case, run, seed, exponent, dtype, measure):
    task = case.attention(
        seed, magnitude=10.0**exponent, dtype=DTYPES[dtype], measure=measure, special_rows=True
    )
    result = run("attention_contributions", task, backend=backend)
    check_shares(result, case.attention_oracle(task), 7, 4)


@given(seed=st.integers(0, 2**31), sharpness=st.floats(1, 300))
def test_large_logits_cost_what_kappa_says(backend, case, run, seed, sharpness):
    task = case.attention(seed, T=12, E=16, D=64, sharpness=sharpness)
    check_shares(run("attention_contributions", task, backend=backend), case.attention_oracle(task), 12, 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_changes_the_answer(backend, case, run, variant):
    """Otherwise a backend could ignore it, and the random tests above might too."""
    task = case.attention(3, T=9, variants=frozenset({variant}), screen=0.0)
    result = run("attention_contributions", task, backend=backend)
    check_shares(result, case.attention_oracle(task), 9, 4)
    field = {"bool_mask": "mask", "float_mask": "mask", "head_mask": "mask", "row_bias": "bias"}.get(
        variant, variant
    )
    if field in ("bias", "others"):
        without = replace(task, **{field: () if field == "others" else None})
    else:
        without = replace(task, attention=replace(task.attention, **{field: None}))
    other = run("attention_contributions", without, backend=backend)
    assert (other.edges - result.edges).abs().max() > 1e-3


def test_a_row_with_nothing_to_attend_to(backend, case, run):
    task = case.attention(5, T=9, variants=frozenset({"bool_mask"}))
    result = run("attention_contributions", task, backend=backend)
    assert_within(result.edges[4], torch.zeros(9), 0.0)
    assert_within(result.residual[4], torch.tensor(1.0), 1e-6)


def test_two_parts_that_explain_nothing(backend, case, run):
    """y = 2y - y: both proximities are 0, and so are all shares."""
    y = torch.tensor([[1.0, -2.0, 3.0]])
    task = case.attention(0, T=1, kv_heads=1, group=1, E=1, E_v=1, D=3)
    attention = replace(task.attention, v=torch.ones(1, 1, 1), w_o=-y[None])
    task = replace(task, attention=attention, resid_pre=3 * y, whole=y, bias=-y[0], keep=0.0)
    result = run("attention_contributions", task, backend=backend)
    for values in (
        result.edges,
        result.per_head,
        result.residual,
        result.bias,
        result.normaliser,
        result.certificate,
    ):
        assert_within(values, torch.zeros_like(values), 0.0)
    assert len(result.kept.value) == 0
    assert_within(result.checksum, torch.zeros(1), 1e-6)


@pytest.mark.parametrize("measure", ["l1", "l2"])
def test_checksum_is_rounding_unless_a_part_is_wrong(backend, case, run, measure):
    task = case.attention(
        11, T=13, D=64, variants=frozenset({"bias", "others", "row_scale", "sinks"}), measure=measure
    )
    good = run("attention_contributions", task, backend=backend).checksum
    assert_within(good, torch.zeros(13), 1e-6)
    attention = task.attention
    dropped_head = replace(attention, w_o=attention.w_o * torch.tensor([1.0, 1, 0, 1])[:, None, None])
    swapped = replace(attention, v=attention.v.flip(0))
    wrong = {
        "bias": replace(task, bias=None),
        "head": replace(task, attention=dropped_head),
        "key/value heads": replace(task, attention=swapped),
        "scale": replace(task, attention=replace(attention, row_scale=None)),
    }
    for name, broken in wrong.items():
        checksum = run("attention_contributions", broken, backend=backend).checksum
        assert checksum.median() > 1e-3, name


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.9])
def test_kept_pairs_are_those_above_the_threshold_on_edges_above_it(backend, case, run, keep):
    task = case.attention(8, T=15, screen=1e-3)
    everything = run("attention_contributions", replace(task, keep=0.0), backend=backend)
    result = run("attention_contributions", replace(task, keep=keep), backend=backend)
    threshold = torch.tensor(keep, dtype=torch.float32)
    e = everything.kept
    expected = (e.value > threshold) & (everything.edges[e.destination, e.source] > threshold)
    for got, want in zip(result.kept, e, strict=True):
        assert torch.equal(got, want[expected])
    order = (result.kept.destination * 15 + result.kept.source) * 4 + result.kept.head
    assert bool((order[1:] > order[:-1]).all())
    assert keep > 0.5 or len(order) > 0
    # An edge's heads, all kept, add up to it.
    dense = torch.zeros(15, 15).index_put((e.destination, e.source), e.value, accumulate=True)
    assert_within(dense, everything.edges, 1e-6)


def test_blocks_of_any_size_give_the_same_shares(backend, case, run):
    task = case.attention(21, T=40, kv_heads=2, group=3, D=33, screen=1e-3, keep=1e-3)
    whole = run("attention_contributions", task, backend=backend)
    for workspace in (1, 20_000, 200_000):
        result = run("attention_contributions", replace(task, workspace=workspace), backend=backend)
        assert_within(result.edges, whole.edges, 1e-6, f"edges in {workspace} bytes")
        assert_within(result.per_head, whole.per_head, 1e-6)
        assert_within(result.certificate, whole.certificate, 1e-6)
        assert torch.equal(result.kept.source, whole.kept.source)
        assert (result.evaluated, result.positive) == (whole.evaluated, whole.positive)


@pytest.mark.parametrize("field", ["q", "v", "whole", "resid_pre"])
def test_nan_in_a_row_is_never_turned_into_a_share(backend, case, run, field):
    task = case.attention(2, T=8, screen=1e-3)
    if field in ("q", "v"):
        poisoned = getattr(task.attention, field).clone()
        poisoned[0, 5] = torch.nan
        task = replace(task, attention=replace(task.attention, **{field: poisoned}))
    else:
        poisoned = getattr(task, field).clone()
        poisoned[5] = torch.nan
        task = replace(task, **{field: poisoned})
    result = run("attention_contributions", task, backend=backend)
    assert result.residual[5].isnan()
    assert result.normaliser[5].isnan()
    assert bool(result.residual[:5].isfinite().all())
    assert bool(result.edges[:5].isfinite().all())


@given(seed=st.integers(0, 2**31), variants=variants, measure=st.sampled_from(["l1", "l2"]))
def test_details_on_demand_are_exact_rows(case, seed, variants, measure):
    task = case.attention(seed, T=11, variants=variants, screen=0.5, measure=measure, dtype=torch.float64)
    oracle = case.attention_oracle(task)
    rows = [7, 0, 10]
    detail = pair_shares(task, rows)
    usable = oracle.normaliser[rows] > oracle.allowed[rows].sum(-1)
    assume(bool(usable.any()))
    got = torch.cat(
        [detail.shares.view(3, -1), detail.residual[:, None], detail.bias[:, None], detail.others], 1
    )
    allowed = oracle.share_error[rows][:, None] + 1e-12
    assert_within(got[usable], oracle.shares[rows][usable], allowed[usable])
    assert_within(got.sum(-1)[usable], torch.ones(3)[usable], 1e-12)
