"""Neuron contributions of every backend against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtt.errors import InputError
from lmtt.kernels import registry
from lmtt.testing import assert_topk, assert_within

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
shapes = st.fixed_dictionaries(
    {"T": st.integers(1, 7), "F": st.integers(1, 70), "D": st.sampled_from([1, 2, 7, 16, 33, 64])}
)
variants = st.frozensets(st.sampled_from(["bias", "row_bias", "others", "row_scale"]))


def check(result, oracle, F):
    usable = oracle.normaliser > oracle.allowed.sum(-1)
    allowed = (oracle.share_error + result.certificate.double())[:, None]
    extras = torch.cat([result.residual[:, None], result.bias[:, None], result.others], 1)
    assert_within(extras[usable], oracle.shares[:, F:][usable], allowed[usable], "base, bias, others")
    assert_topk(result.index[usable], result.value[usable], oracle.shares[:, :F][usable], allowed[usable])
    assert bool(((result.index >= 0) & (result.index < F)).all())
    # Screening changes the normaliser, not the ranking: undo the division and the k largest are exact.
    proximity = result.value.double() * result.normaliser.double()[:, None]
    assert_topk(result.index, proximity, oracle.proximity[:, :F], 2 * oracle.allowed.amax(-1, keepdim=True))
    assert_within(
        result.normaliser,
        oracle.normaliser,
        2 * oracle.allowed.sum(-1) + result.certificate.double() * result.normaliser.double(),
        "normaliser",
    )


@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    variants=variants,
    dtype=st.sampled_from(sorted(DTYPES)),
    special=st.booleans(),
    measure=st.sampled_from(["l1", "l1", "l2"]),
    floor=st.sampled_from([0.0, 0.0, 1e-3, 0.1, 10.0]),
    k=st.integers(1, 70),
)
def test_shares_and_top_k(backend, case, run, seed, shape, variants, dtype, special, measure, floor, k):
    task = case.neurons(
        seed,
        **shape,
        variants=variants,
        dtype=DTYPES[dtype],
        special_rows=special,
        measure=measure,
        screen=floor,
        k=min(k, shape["F"]),
    )
    result = run("neuron_contributions", task, backend=backend)
    check(result, case.neuron_oracle(task), shape["F"])
    if floor == 0:
        assert_within(result.certificate, torch.zeros(shape["T"]), 0.0, "certificate")


@given(seed=st.integers(0, 2**31), exponent=st.integers(-25, 15), measure=st.sampled_from(["l1", "l2"]))
def test_huge_and_tiny_magnitudes(backend, case, run, seed, exponent, measure):
    task = case.neurons(seed, magnitude=10.0**exponent, measure=measure, special_rows=True)
    check(run("neuron_contributions", task, backend=backend), case.neuron_oracle(task), 23)


def test_ties_go_to_the_lower_index(backend, case, run):
    task = case.neurons(1, F=40, T=3, k=12)
    twins = replace(task, act=task.act[:, :20].repeat(1, 2), w_down=task.w_down[:20].repeat(2, 1))
    twins = replace(twins, whole=twins.base + twins.act @ twins.w_down)
    result = run("neuron_contributions", twins, backend=backend)
    for row, values in zip(result.index.tolist(), result.value.tolist(), strict=True):
        ranked = [(-v, n) for v, n in zip(values, row, strict=True)]
        assert ranked == sorted(ranked)
        assert any(n + 20 in row for n in row), "no tie in this test"
    silent = replace(task, act=torch.zeros_like(task.act), whole=task.base)
    result = run("neuron_contributions", silent, backend=backend)
    assert result.index.tolist() == [list(range(12))] * 3
    assert_within(result.value, torch.zeros(3, 12), 0.0)


def test_the_top_k_needs_few_evaluations(backend, case, run):
    task = case.neurons(4, T=8, F=2000, D=64, k=5, screen=10.0)
    result = run("neuron_contributions", task, backend=backend)
    assert 8 * 5 <= result.evaluated < 0.2 * 8 * 2000
    assert result.evaluated < result.positive


def test_blocks_of_any_size_give_the_same(backend, case, run):
    task = case.neurons(4, T=30, F=100, D=33, screen=1e-2)
    whole = run("neuron_contributions", task, backend=backend)
    result = run("neuron_contributions", replace(task, workspace=1), backend=backend)
    assert torch.equal(result.index, whole.index)
    assert_within(result.value, whole.value, 1e-6)
    assert_within(result.certificate, whole.certificate, 1e-6)


def test_checksum_is_rounding_unless_a_part_is_wrong(backend, case, run):
    task = case.neurons(4, T=9, F=100, D=64, variants=frozenset({"bias"}))
    assert_within(run("neuron_contributions", task, backend=backend).checksum, torch.zeros(9), 1e-6)
    wrong = run("neuron_contributions", replace(task, bias=None), backend=backend).checksum
    assert wrong.median() > 1e-3


def test_more_neurons_than_there_are(backend, case):
    task = case.neurons(4, F=10)
    with pytest.raises(InputError, match="k, expected 1 to 10"):
        registry.run("neuron_contributions", replace(task, k=11), backend=backend)
