"""Token shares by rollout: a unit from the target arrives at tokens, or is accounted for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lmtt.graph.rollout import rollout
from lmtt.graph.testing import make_trace, random_trace


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("parallel", [(False, False), (True, True), (False, True, False)])
def test_the_unit_is_kept(seed, parallel):
    data = random_trace(seed, parallel=parallel, tokens=6, floor=1 / 16)
    for position in range(6):
        shares = rollout(data, position)
        assert shares.tokens.sum() + shares.bias + shares.unattributed == pytest.approx(1, abs=1e-12)
        assert (shares.tokens >= 0).all()
        assert (shares.tokens[position + 1 :] == 0).all()


def test_shares_are_the_product_of_the_layers_matrices():
    data = random_trace(2, parallel=(False, True, False), tokens=6, opaque=False)
    T, kept = 6, data.edges
    flow = np.eye(T)
    for layer in (2, 1, 0):
        step = np.zeros((T, T))
        span = slice(*kept.layer_ptr[layer : layer + 2])
        step[kept.destination[span], kept.source[span]] = kept.weight[span]
        step += np.diag(data.residual[layer] + (data.mlp[layer] if data.parallel[layer] else 0))
        if not data.parallel[layer]:
            step = np.diag(data.mlp[layer] + data.passthrough[layer]) @ step
        flow = flow @ step
    for position in range(T):
        assert rollout(data, position).tokens == pytest.approx(flow[position], abs=1e-12)


def test_the_mlp_changes_no_token_share():
    data = random_trace(5, parallel=(False, False))
    some = data.mlp > 0
    other = np.where(some, np.float32(0.25), 0)
    twin = dataclasses.replace(data, mlp=other, passthrough=np.where(some, 1 - other, 0).astype(np.float32))
    assert np.array_equal(rollout(data, 4).tokens, rollout(twin, 4).tokens)


def test_what_is_not_a_token_is_named():
    one, none = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    pairs = np.full((1, 1, 1, 1), 0.125, np.float32)
    data = make_trace(pairs, residual=0.25 * one, bias=0.5 * one, opaque=0.125 * one, mlp=one)
    shares = rollout(data, 0)
    assert (shares.tokens[0], shares.bias, shares.unattributed) == (0.375, 0.5, 0.125)
    lost = rollout(make_trace(pairs * 0, residual=none, mlp=one), 0)
    assert (lost.tokens[0], lost.bias, lost.unattributed) == (0, 0, 1)
    below = rollout(make_trace(pairs, residual=0.875 * one, mlp=one, floor=0.2), 0)
    assert (below.tokens[0], below.unattributed) == (0.875, 0.125)
