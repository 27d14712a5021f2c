"""A float64 oracle that writes the whole decomposition out, random tasks, and the backends to hold to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from lmtt.kernels import registry
from lmtt.kernels.numerics import PROXIMITY_TOLERANCE, compute_dtype
from lmtt.kernels.types import Attention, AttentionTask, NeuronTask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile(
    "numerics",
    deadline=None,
    derandomize=True,
    # Interpreted kernels are slow: fewer examples, and none is made smaller.
    max_examples=6 if INTERPRETED else 40,
    phases=(Phase.explicit, Phase.generate) if INTERPRETED else tuple(Phase),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("numerics")

USABLE = [
    pytest.param(name, marks=[pytest.mark.native] if name == "cpp" else [])
    for name, reason in registry.availability().items()
    if reason is None
]


@pytest.fixture(params=USABLE, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """These tensors are tiny: waking a second thread costs more than the work, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN (integers: their largest), so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


# --------------------------------------------------------------------------------------------- the oracle


def _wide(x: Tensor) -> Tensor:
    return x.double()


def _proximity(part: Tensor, whole: Tensor, measure: str) -> Tensor:
    """max(0, |y| - |y - x|) as printed, in extended precision, which is where its cancellation goes."""
    x, y = part.numpy().astype(np.longdouble), whole.numpy().astype(np.longdouble)
    if measure == "l1":
        raw = np.abs(y).sum(-1) - np.abs(y - x).sum(-1)
    else:
        raw = np.sqrt((y * y).sum(-1)) - np.sqrt(((y - x) * (y - x)).sum(-1))
    return torch.from_numpy(np.maximum(raw, 0).astype(np.float64))


def _norm(x: Tensor, measure: str) -> Tensor:
    return x.abs().sum(-1) if measure == "l1" else torch.linalg.vector_norm(x, dim=-1)


def _pattern(a: Attention) -> tuple[Tensor, Tensor]:
    """A [H, T, T] and kappa [H, T, T], from the definition."""
    H, T, _ = a.q.shape
    q, k = _wide(a.q), _wide(a.k).repeat_interleave(a.group, 0)
    logits = a.scale * q @ k.mT
    kappa = abs(a.scale) * q.norm(dim=-1)[:, :, None] * k.norm(dim=-1)[:, None, :]
    if a.softcap is not None:
        logits = a.softcap * torch.tanh(logits / a.softcap)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    allowed = (distance >= 0).expand(H, T, T).clone()
    if a.window is not None:
        allowed &= distance < a.window
    if a.mask is not None:
        if a.mask.dtype == torch.bool:
            allowed &= a.mask
        else:
            logits = logits + _wide(a.mask)
            kappa = kappa + _wide(a.mask).abs().nan_to_num(posinf=0)
    if a.alibi is not None:
        logits = logits - _wide(a.alibi)[:, None, None] * distance
        kappa = kappa + _wide(a.alibi).abs()[:, None, None] * distance.abs()
    logits = logits.masked_fill(~allowed, -torch.inf)
    if a.lse is not None:
        total = _wide(a.lse)[:, :, None]
    else:
        sink = torch.full((H, T, 1), -torch.inf, dtype=torch.float64)
        if a.sinks is not None:
            sink = _wide(a.sinks)[:, None, None].expand(H, T, 1)
        total = torch.cat([logits, sink], -1).logsumexp(-1, keepdim=True)
    return torch.exp(logits - total.masked_fill(total == -torch.inf, torch.inf)), kappa


@dataclass
class Oracle:
    """Every part and its true proximity; `allowed` is what the project's float32 or float64 rule permits."""

    parts: Tensor  # [T, P, D]
    proximity: Tensor  # [T, P]
    allowed: Tensor  # [T, P]
    extras: int  # the last ones are residual, bias, others

    @property
    def normaliser(self) -> Tensor:
        return self.proximity.sum(-1)

    @property
    def share_error(self) -> Tensor:
        """[T]: what those tolerances may amount to in a share, or a sum of shares, of a row."""
        total = self.normaliser
        return 2 * self.allowed.sum(-1) / total.masked_fill(total == 0, torch.inf)

    @property
    def shares(self) -> Tensor:
        total = self.normaliser
        return self.proximity / total.masked_fill(total == 0, 1)[:, None]


def _extras(parts: list[Tensor | None], whole: Tensor) -> Tensor:
    """[T, n, D] of parts given as [T, D], [D] or None."""
    return torch.stack(
        [torch.zeros_like(whole) if p is None else _wide(p).expand_as(whole) for p in parts], dim=1
    )


def _oracle(
    parts: Tensor,
    absolute: Tensor,
    kappa: Tensor,
    extras: Tensor,
    whole: Tensor,
    measure: str,
    dtype: torch.dtype,
) -> Oracle:
    everything = torch.cat([parts, extras], 1)
    tolerance = PROXIMITY_TOLERANCE[compute_dtype(dtype)]
    # In few dimensions a part may cancel to much less than its terms, where no float32 product is exact.
    size = torch.cat([torch.maximum(_norm(parts, measure), absolute / 4), _norm(extras, measure)], 1)
    kappas = torch.cat([kappa, torch.zeros(extras.shape[:2], dtype=torch.float64)], 1)
    proximity = _proximity(everything, whole[:, None], measure)
    return Oracle(
        parts=everything,
        proximity=proximity,
        allowed=tolerance * (1 + kappas) * torch.minimum(size, _norm(whole, measure)[:, None]),
        extras=extras.shape[1],
    )


def attention_oracle(task: AttentionTask) -> Oracle:
    """Pairs in the order (head, source), then residual, bias, others."""
    a, whole = task.attention, _wide(task.whole)
    T, D = whole.shape
    weight, kappa = _pattern(a)
    v = _wide(a.v).repeat_interleave(a.group, 0)
    value = v[None].expand(T, *v.shape)  # [i, h, j, e]
    if a.gate is not None:
        value = value * _wide(a.gate)[:, :, None, :]
    scale = weight.permute(1, 0, 2)  # [i, h, j]
    if a.row_scale is not None:
        scale = scale * _wide(a.row_scale)[:, None, None]
    parts = scale[..., None] * torch.einsum("ihje,hed->ihjd", value, _wide(a.w_o))
    rows = _norm(_wide(a.w_o), task.measure)  # [h, e]
    absolute = scale.abs() * torch.einsum("ihje,he->ihj", value.abs(), rows)
    extras = _extras([task.resid_pre, task.bias, *task.others], whole)
    return _oracle(
        parts.reshape(T, -1, D),
        absolute.reshape(T, -1),
        kappa.permute(1, 0, 2).reshape(T, -1),
        extras,
        whole,
        task.measure,
        task.whole.dtype,
    )


def neuron_oracle(task: NeuronTask) -> Oracle:
    """Neurons by index, then base, bias, others."""
    whole = _wide(task.whole)
    act = _wide(task.act)
    if task.row_scale is not None:
        act = act * _wide(task.row_scale)[:, None]
    parts = act[:, :, None] * _wide(task.w_down)
    extras = _extras([task.base, task.bias, *task.others], whole)
    nothing = torch.zeros(act.shape, dtype=torch.float64)
    return _oracle(parts, nothing, nothing, extras, whole, task.measure, task.whole.dtype)


# ------------------------------------------------------------------------------------------- random tasks

VARIANTS = (
    "softcap", "window", "sinks", "bool_mask", "float_mask", "head_mask", "alibi", "lse", "row_scale", "gate",
    "bias", "row_bias", "others",
)  # fmt: skip


def attention_task(
    seed: int,
    *,
    T: int = 7,
    kv_heads: int = 2,
    group: int = 2,
    E: int = 5,
    E_v: int = 6,
    D: int = 17,
    variants: frozenset[str] = frozenset(),
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    sharpness: float = 1.0,
    special_rows: bool = False,
    **options: object,
) -> AttentionTask:
    """A random task whose whole is the sum of its parts, rounded to `dtype`.

    `special_rows` then replaces rows of the whole: zeros, multiples of resid_pre (x = y, x = 2y), some 0.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    H = kv_heads * group
    mask = None
    if "bool_mask" in variants:
        mask = torch.rand(1, T, T, generator=random) < 0.7
        mask[:, T // 2] = False  # a row with nothing to attend to
    elif "head_mask" in variants:
        mask = draw(H, T, T).masked_fill(torch.rand(H, T, T, generator=random) < 0.3, -torch.inf)
    elif "float_mask" in variants:
        mask = draw(1, T, T)
        mask[0, T // 2] = -torch.inf
    attention = Attention(
        q=draw(H, T, E) * sharpness,
        k=draw(kv_heads, T, E),
        v=draw(kv_heads, T, E_v) * magnitude,
        w_o=draw(H, E_v, D),
        scale=E**-0.5,
        softcap=1.5 if "softcap" in variants else None,
        window=max(1, T // 2) if "window" in variants else None,
        sinks=draw(H) if "sinks" in variants else None,
        mask=mask,
        alibi=draw(H).abs() if "alibi" in variants else None,
        row_scale=draw(T) if "row_scale" in variants else None,
        gate=draw(T, H, E_v) if "gate" in variants else None,
    )
    if "lse" in variants:
        # Any number will do: the rows of A then add up to something else than 1, as with a sink.
        attention = replace(attention, lse=draw(H, T).abs() + 1)
    bias = (
        draw(D) * magnitude
        if "bias" in variants
        else draw(T, D) * magnitude
        if "row_bias" in variants
        else None
    )
    others = tuple(draw(T, D) * magnitude for _ in range(2)) if "others" in variants else ()
    resid_pre = draw(T, D) * magnitude
    task = AttentionTask(attention, resid_pre, torch.zeros_like(resid_pre), bias, others, **options)  # type: ignore[arg-type]
    whole = attention_oracle(replace(task, measure="l1")).parts.sum(1).to(dtype)
    return replace(task, whole=_special(whole, resid_pre, random) if special_rows else whole)


def neuron_task(
    seed: int,
    *,
    T: int = 5,
    F: int = 23,
    D: int = 17,
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    variants: frozenset[str] = frozenset(),
    special_rows: bool = False,
    **options: object,
) -> NeuronTask:
    """Likewise."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    bias = (
        draw(D) * magnitude
        if "bias" in variants
        else draw(T, D) * magnitude
        if "row_bias" in variants
        else None
    )
    base = draw(T, D) * magnitude
    task = NeuronTask(
        act=draw(T, F) * magnitude,
        w_down=draw(F, D),
        base=base,
        whole=torch.zeros_like(base),
        bias=bias,
        others=tuple(draw(T, D) * magnitude for _ in range(2)) if "others" in variants else (),
        row_scale=draw(T) if "row_scale" in variants else None,
        **{"k": min(F, 6), **options},  # type: ignore[arg-type]
    )
    whole = neuron_oracle(task).parts.sum(1).to(dtype)
    return replace(task, whole=_special(whole, base, random) if special_rows else whole)


def _special(whole: Tensor, residual: Tensor, random: torch.Generator) -> Tensor:
    whole = whole.clone()
    kinds = (
        lambda y, x: torch.zeros_like(y),
        lambda y, x: x,
        lambda y, x: 2 * x,
        lambda y, x: x / 2,
        lambda y, x: -x,
        lambda y, x: y.masked_fill(torch.rand(y.shape, generator=random) < 0.4, 0),
    )
    for i in range(len(whole)):
        whole[i] = kinds[i % len(kinds)](whole[i], residual[i])
    return whole


@pytest.fixture(scope="session")
def case() -> SimpleNamespace:
    """Tasks and their oracles."""
    return SimpleNamespace(
        attention=attention_task,
        neurons=neuron_task,
        attention_oracle=attention_oracle,
        neuron_oracle=neuron_oracle,
        pattern=_pattern,
        proximity=_proximity,
        variants=VARIANTS,
    )


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Runs a task on one backend, or, where that backend refuses it, on what "auto" takes instead."""

    def run(op: str, task: object, *args: object, backend: str) -> Any:
        module = registry.load(backend)
        assert not isinstance(module, registry.Unusable)
        refusal = module.refuses(op, task)
        result, choice = registry.run(op, task, *args, backend="auto" if refusal else backend)
        if refusal:
            assert choice.backend != backend
            assert choice.refused.get(backend, refusal) == refusal  # absent: one before it took the task
        else:
            assert choice.backend == backend
        return result

    return run
