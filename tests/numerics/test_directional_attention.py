"""Directional contributions and attention patterns against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtt.kernels.directional_attention.reference import attention_pattern, directional_attention
from lmtt.kernels.numerics import PROXIMITY_TOLERANCE, compute_dtype
from lmtt.testing import assert_within

VARIANTS = (
    "softcap", "window", "sinks", "bool_mask", "float_mask", "head_mask", "alibi", "lse", "row_scale", "gate",
)  # fmt: skip
variants = st.frozensets(st.sampled_from(VARIANTS), max_size=4)


@given(
    seed=st.integers(0, 2**31),
    T=st.integers(1, 19),
    group=st.integers(1, 3),
    variants=variants,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_directional_attention(backend, case, run, seed, T, group, variants, dtype):
    task = case.attention(seed, T=T, group=group, variants=variants, dtype=dtype)
    direction = torch.randn(T, 17, generator=torch.Generator().manual_seed(seed)).to(dtype)
    oracle = case.attention_oracle(task)
    parts = oracle.parts[:, : -oracle.extras].view(T, 2 * group, T, 17)
    want = torch.einsum("ihjd,id->hij", parts, direction.double())
    kappa = case.pattern(task.attention)[1]
    largest = direction.double().abs().amax(-1)
    allowed = 4 * PROXIMITY_TOLERANCE[compute_dtype(dtype)] * (1 + kappa.amax()) * largest[:, None]
    # In the widths used here |v|_1 |W_O|_1 is at most a few times the parts' own size.
    allowed = allowed * (1 + oracle.parts.abs().sum(-1).amax(-1, keepdim=True))
    for reduce, expected, limit in (
        (None, want, allowed),
        ("heads", want.sum(0), allowed * 2 * group),
        ("sources", want.sum(2), allowed[:, 0] * T),
    ):
        got = run("directional_attention", task.attention, direction, reduce, backend=backend)
        assert_within(got, expected, limit, f"reduce={reduce}")
    assert bool(
        (run("directional_attention", task.attention, direction, None, backend=backend).triu(1) == 0).all()
    )


@given(seed=st.integers(0, 2**31), variants=variants)
def test_patterns(case, seed, variants):
    attention = case.attention(seed, T=13, variants=variants, dtype=torch.float64).attention
    want = case.pattern(attention)[0]
    assert_within(attention_pattern(attention), want, 1e-12)
    assert_within(attention_pattern(attention, head=3), want[3], 1e-12)
    assert_within(attention_pattern(attention, destinations=[12, 0, 5]), want[:, [12, 0, 5]], 1e-12)
    assert_within(attention_pattern(attention, head=1, destinations=[4]), want[1, [4]], 1e-12)


@pytest.mark.parametrize("workspace", [1, 3_000, 50_000])
def test_any_workspace(case, workspace):
    attention = case.attention(1, T=33, kv_heads=2, group=3, variants=frozenset({"window", "gate"})).attention
    direction = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    for reduce in (None, "heads", "sources"):
        want = directional_attention(attention, direction, reduce)
        assert_within(directional_attention(attention, direction, reduce, workspace), want, 1e-4)


def test_given_the_log_sum_exp_nothing_else_changes(case):
    attention = case.attention(
        1, T=9, variants=frozenset({"sinks", "softcap", "window"}), dtype=torch.float64
    ).attention
    pattern = attention_pattern(attention)
    logits = 1.5 * torch.tanh(attention.scale * attention.q @ attention.k.repeat_interleave(2, 0).mT / 1.5)
    lse = (logits[:, :, 0] - pattern[:, :, 0].log()).nan_to_num()
    seen = pattern[:, :, 0] > 0
    assert bool(seen.any())
    again = attention_pattern(replace(attention, lse=lse, sinks=None))
    assert_within(again[seen], pattern[seen], 1e-12)
