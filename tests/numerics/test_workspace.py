"""What the reference holds beyond inputs and results stays within the task's workspace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lmtt.kernels.neurons.reference import neuron_contributions
from lmtt.kernels.proximity.reference import attention_contributions
from lmtt.kernels.unembed_topk.reference import unembed_topk
from lmtt.testing import PeakBytes


def bytes_of(*results):
    return sum(t.numel() * t.element_size() for t in tree_leaves(results) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("measure", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("screen", [0.0, 1e-3])
def test_attention(case, measure, dtype, screen):
    T, H, D = 96, 8, 64
    workspace = 1 << 18
    task = case.attention(0, T=T, kv_heads=4, group=2, E=16, E_v=16, D=D, dtype=dtype, measure=measure)
    task = replace(task, screen=screen, keep=1e-2, workspace=workspace)
    with PeakBytes() as memory:
        result = attention_contributions(task)
    beyond = memory.peak - bytes_of(vars(result).values())
    assert workspace < T * T * H * 4, "the workspace must be too small for one [H, T, T]"
    assert beyond <= workspace
    assert memory.largest < T * T * H * 4
    assert beyond > workspace / 8, "this test measures something"


def test_vectors_of_all_sources_are_not_held_at_once(case):
    task = case.attention(0, T=64, kv_heads=1, group=2, E=4, E_v=4, D=1500, workspace=300_000)
    with PeakBytes() as memory:
        result = attention_contributions(task)
    assert task.workspace < 64 * 1500 * 4, "the workspace must be too small for one head's v @ W_O"
    assert memory.peak - bytes_of(vars(result).values()) <= task.workspace


def test_neurons(case):
    task = case.neurons(0, T=100, F=600, D=64, screen=1e-3, workspace=1 << 17)
    with PeakBytes() as memory:
        result = neuron_contributions(task)
    beyond = memory.peak - bytes_of(vars(result).values())
    assert task.workspace < 100 * 600 * 4, "the workspace must be too small for one [T, F]"
    assert beyond <= task.workspace
    assert beyond > task.workspace / 8, "this test measures something"


def test_unembedding():
    x, w_u = torch.randn(64, 16), torch.randn(20_000, 16)
    with PeakBytes() as memory:
        unembed_topk(x, w_u, 10, workspace=1 << 20)
    assert memory.peak <= 1 << 20, f"all logits are {64 * 20_000 * 4} bytes"
