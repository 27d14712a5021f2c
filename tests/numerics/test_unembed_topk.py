"""Top-k logits by tiles of the vocabulary against the dense computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmtt.kernels.unembed_topk.reference import unembed_topk
from lmtt.testing import assert_topk, assert_within

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(
    seed=st.integers(0, 2**31),
    states=st.integers(1, 6),
    vocabulary=st.integers(1, 90),
    k=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    workspace=st.sampled_from([1, 4_000, 64 << 20]),
    softcap=st.sampled_from([None, 3.0]),
    with_bias=st.booleans(),
    with_norm=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, -2.0]),
)
def test_against_dense(seed, states, vocabulary, k, dtype, workspace, softcap, with_bias, with_norm, scale):
    random = torch.Generator().manual_seed(seed)
    x, w_u, bias = (
        torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for shape in ((states, 16), (vocabulary, 16), (vocabulary,))
    )
    k = min(k, vocabulary)
    norm = (lambda t: (t * 1.5).to(dtype)) if with_norm else None
    got = unembed_topk(x, w_u, k, norm, softcap, bias if with_bias else None, scale, workspace)
    logits = (norm(x) if norm else x).double() @ w_u.double().T
    logits = scale * (logits + bias.double() if with_bias else logits)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert got.indices.dtype == torch.int64
    assert_topk(got.indices, got.values, logits, tolerance)
    assert_within(got.logsumexp, logits.logsumexp(-1), tolerance)


@pytest.mark.parametrize("workspace", [1, 2_000, 64 << 20])
def test_ties_go_to_the_lower_index_across_tiles(backend, run, workspace):
    x = torch.ones(2, 4)
    w_u = torch.ones(50, 4)
    w_u[[7, 31]] = 2
    got = unembed_topk(x, w_u, 6, workspace=workspace)
    assert got.indices.tolist() == [[7, 31, 0, 1, 2, 3]] * 2
    assert run("unembed_topk", x, w_u, 6, backend=backend).indices.tolist() == got.indices.tolist()


def test_the_norm_is_the_models_own():
    norm = torch.nn.LayerNorm(16).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x, w_u = torch.randn(3, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    assert_topk(*list_of(unembed_topk(x, w_u, 5, norm)), (norm(x) @ w_u.T).detach(), 1e-12)


def list_of(top):
    return top.indices, top.values
