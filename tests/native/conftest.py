"""Random tasks with every feature of attention, and a float64 oracle that forms each part of each row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtt.kernels.types import Attention, AttentionTask, NeuronTask

# Small, and nothing a multiple of a vector's width or of each other.
T, H, H_KV, E, E_V, D, F = 37, 6, 3, 13, 11, 45, 203


def widened(x: Any) -> Any:
    """float64 copies of all floating tensors in a record, a tuple or alone."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        return tuple(widened(y) for y in x)
    if hasattr(x, "__dataclass_fields__"):
        return replace(x, **{f.name: widened(getattr(x, f.name)) for f in fields(x)})
    return x


def pattern(a: Attention) -> Tensor:
    """A [H, T, T] by its definition."""
    tokens = a.q.shape[1]
    logits = a.q @ a.k.repeat_interleave(a.group, 0).mT * a.scale
    if a.softcap is not None:
        logits = a.softcap * torch.tanh(logits / a.softcap)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    allowed = j <= i
    if a.window is not None:
        allowed = allowed & (j > i - a.window)
    if a.alibi is not None:
        logits = logits - a.alibi[:, None, None] * (i - j)
    if a.mask is not None and a.mask.dtype == torch.bool:
        allowed = allowed & a.mask
    elif a.mask is not None:
        logits = logits + a.mask
    logits = logits.masked_fill(~allowed, -torch.inf)
    if a.sinks is not None:
        logits = torch.cat([logits, a.sinks[:, None, None].expand(-1, tokens, 1)], -1)
    return logits.softmax(-1)[..., :tokens]


def pair_parts(a: Attention) -> Tensor:
    """part[i, h, j, :] of every pair, [T, H, T, D]."""
    v = a.v.repeat_interleave(a.group, 0)
    u = torch.einsum("hje,hed->hjd", v, a.w_o).expand(a.q.shape[1], -1, -1, -1)
    if a.gate is not None:
        u = torch.einsum("hje,ihe,hed->ihjd", v, a.gate, a.w_o)
    parts = pattern(a).transpose(0, 1)[..., None] * u
    return parts if a.row_scale is None else parts * a.row_scale[:, None, None, None]


def proximity(x: Tensor, y: Tensor) -> Tensor:
    return (y.abs().sum(-1) - (y - x).abs().sum(-1)).clamp(min=0)


@dataclass(frozen=True)
class Shares:
    """What the definition gives, float64."""

    parts: Tensor  # attention: [T, H, T], neurons: [T, F]
    residual: Tensor  # [T]
    bias: Tensor  # [T]
    others: Tensor  # [T, n]
    normaliser: Tensor  # [T]


def _shares(parts: Tensor, task: AttentionTask | NeuronTask, residual: Tensor) -> Shares:
    whole = task.whole
    pairs = proximity(parts, whole.reshape(whole.shape[0], *[1] * (parts.dim() - 2), -1))
    fixed = [
        residual,
        torch.zeros_like(whole) if task.bias is None else task.bias.expand_as(whole),
        *task.others,
    ]
    rest = torch.stack([proximity(part, whole) for part in fixed], -1)
    total = pairs.flatten(1).sum(-1) + rest.sum(-1)
    by = torch.where(total == 0, 1, total)
    rest = rest / by[:, None]
    return Shares(
        pairs / by.reshape(-1, *[1] * (pairs.dim() - 1)), rest[:, 0], rest[:, 1], rest[:, 2:], total
    )


def oracle(task: AttentionTask | NeuronTask) -> Shares:
    """Every share by its definition, in float64 on the widened inputs."""
    task = widened(task)
    if isinstance(task, AttentionTask):
        return _shares(pair_parts(task.attention), task, task.resid_pre)
    act = task.act if task.row_scale is None else task.act * task.row_scale[:, None]
    return _shares(act[..., None] * task.w_down, task, task.base)


def attention_task(
    features: str = "plain",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokens: int = T,
    d_model: int = D,
) -> AttentionTask:
    """A task whose whole is the sum of its parts, up to rounding to `dtype`; `features` joined by +."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    a = Attention(
        q=random(H, tokens, E, scale=2.0),
        k=random(H_KV, tokens, E, scale=1.5),
        v=random(H_KV, tokens, E_V),
        w_o=random(H, E_V, d_model, scale=E_V**-0.5),
        scale=E**-0.5,
    )
    bias: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    for feature in features.split("+"):
        match feature:
            case "plain":
                pass
            case "softcap":
                a = replace(a, softcap=3.0)
            case "window":
                a = replace(a, window=5)
            case "sinks":
                a = replace(a, sinks=random(H, scale=2.0))
            case "bool mask":
                allowed = torch.rand(H, tokens, tokens, generator=g) > 0.3
                a = replace(a, mask=allowed | torch.eye(tokens, dtype=torch.bool))
            case "float mask":
                mask = random(1, tokens, tokens)
                mask[0, 3:, 1] = -torch.inf
                a = replace(a, mask=mask)
            case "alibi":
                a = replace(a, alibi=random(H).abs())
            case "row_scale":  # of either sign
                a = replace(a, row_scale=random(tokens))
            case "gate":
                a = replace(a, gate=random(tokens, H, E_V))
            case "lse":
                wide = widened(a)
                logits = (wide.q @ wide.k.repeat_interleave(a.group, 0).mT) * a.scale
                causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
                a = replace(a, lse=logits.masked_fill(~causal, -torch.inf).logsumexp(-1).to(dtype))
            case "bias":
                bias = random(d_model, scale=0.3)
            case "row bias":
                bias = random(tokens, d_model, scale=0.3)
            case "others":
                others = (random(tokens, d_model), random(tokens, d_model, scale=0.2))
            case _:
                raise ValueError(feature)
    residual = random(tokens, d_model, scale=2.0)
    whole = pair_parts(widened(a)).sum((1, 2)) + residual.double() + sum(o.double() for o in others)
    if bias is not None:
        whole = whole + bias.double()
    return AttentionTask(a, residual, whole.to(dtype), bias, others)


def neuron_task(
    *, dtype: torch.dtype = torch.float32, seed: int = 0, k: int = 7, neurons: int = F, features: str = ""
) -> NeuronTask:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    act, w_down, base = (
        random(T, neurons) * random(T, neurons).relu(),
        random(neurons, D),
        random(T, D, scale=4.0),
    )
    row_scale = random(T) if "row_scale" in features else None
    bias = random(D) if "bias" in features else None
    others = (random(T, D),) if "others" in features else ()
    wide = act.double() if row_scale is None else act.double() * row_scale.double()[:, None]
    whole = wide @ w_down.double() + base.double() + sum(o.double() for o in others)
    whole = whole if bias is None else whole + bias.double()
    return NeuronTask(act, w_down, base, whole.to(dtype), bias, others, row_scale, k=k)


@pytest.fixture
def make_attention_task() -> Callable[..., AttentionTask]:
    return attention_task


@pytest.fixture
def make_neuron_task() -> Callable[..., NeuronTask]:
    return neuron_task


@pytest.fixture
def exact() -> Callable[[AttentionTask | NeuronTask], Shares]:
    return oracle


@pytest.fixture(autouse=True)
def _machine_settings() -> Iterator[None]:
    """Threads and instruction set as they were."""
    native = import_module("lmtt._C") if os.environ.get("LMTT_CI") else pytest.importorskip("lmtt._C")
    threads, isa = torch.get_num_threads(), native.info()["isa"]
    yield
    torch.set_num_threads(threads)
    native.set_isa(isa)
