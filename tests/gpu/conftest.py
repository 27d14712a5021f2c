"""Random tasks on the device that GPU kernels run on here: a GPU, or the CPU where Triton interprets them."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.kernels import registry
from lmtt.kernels.backends import triton_backend
from lmtt.kernels.triton_host import interpreted
from lmtt.kernels.types import Attention, AttentionTask, NeuronTask


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run; a test that needs it is skipped where they cannot."""
    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1 (test_layers.py runs these again with it)")
    return "cuda"


@pytest.fixture(params=["triton", "cuda"], scope="session")
def backend(request: pytest.FixtureRequest, device: str) -> str:
    """Each GPU backend that can run here."""
    name = str(request.param)
    reason = registry.availability()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def triton(device: str) -> None:
    """For tests that look inside the Triton backend: skipped where it cannot run."""
    if (reason := triton_backend.available()) is not None:
        pytest.skip(f"triton: {reason}")


def moved(x: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A record, tuple or tensor on a device; floating tensors as `dtype` where one is given."""
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    if isinstance(x, tuple):
        return tuple(moved(y, device, dtype) for y in x)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{f.name: moved(getattr(x, f.name), device, dtype) for f in fields(x)})
    return x


def attention(
    T: int, E: int, D: int, *, heads: int = 4, kv: int = 2, dtype: torch.dtype = torch.float32, **options: Any
) -> AttentionTask:
    """A task with a sink, a local band and a few far heads: what attention patterns look like."""
    random = torch.Generator().manual_seed(T * 1000 + E)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    q, k = draw(heads, T, E), draw(kv, T, E)
    k[:, 0] *= 3
    a = Attention(
        q, k, draw(kv, T, E), draw(heads, E, D) * E**-0.5, scale=E**-0.5, row_scale=draw(T).abs() + 0.5
    )
    resid, bias = draw(T, D), draw(D)
    return summing(AttentionTask(a, resid, resid, bias, **options))


def summing(task: AttentionTask) -> AttentionTask:
    """The task with its parts' sum as the whole, rounded to its dtype."""
    a, tokens = task.attention, len(task.whole)
    k, v = (x.double().repeat_interleave(a.group, 0) for x in (a.k, a.v))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    unseen = (distance < 0) | (distance >= (a.window or tokens))
    logits = (a.q.double() @ k.mT * a.scale).masked_fill(unseen, -torch.inf)
    written = (logits.softmax(-1) @ v @ a.w_o.double()).sum(0)
    if a.row_scale is not None:
        written = written * a.row_scale.double()[:, None]
    bias = 0 if task.bias is None else task.bias.double()
    return replace(task, whole=(task.resid_pre.double() + written + bias).to(task.whole.dtype))


def direction(T: int, D: int, dtype: torch.dtype) -> Tensor:
    """A random direction of each destination, [T, D]."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def exact(task: AttentionTask | NeuronTask) -> Any:
    """The task in float64, every part of it to be evaluated: what the reference is asked for."""
    return replace(moved(task, "cpu", torch.float64), screen=0.0)


def neurons(T: int, F: int, D: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> NeuronTask:
    """A task with activations most of which are small."""
    random = torch.Generator().manual_seed(T + F)
    act = torch.randn(T, F, generator=random).pow(3).to(dtype)
    w_down = (torch.randn(F, D, generator=random) * F**-0.5).to(dtype)
    base = torch.randn(T, D, generator=random).to(dtype)
    whole = (base.double() + act.double() @ w_down.double()).to(dtype)
    return NeuronTask(act, w_down, base, whole, **options)


@pytest.fixture(scope="session")
def case() -> SimpleNamespace:
    return SimpleNamespace(
        attention=attention, neurons=neurons, direction=direction, moved=moved, exact=exact, summing=summing
    )
