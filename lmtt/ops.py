"""Kernels on batched torch tensors, any device, validated at the door.

`B` batch, `T` tokens, `H` heads, `H_kv` key/value heads, `E` d_head, `E_v` width of a value, `D` d_model,
`F` d_mlp, `V` vocabulary; `i` destination, `j` source. A wrong shape, dtype, device or value raises
`InputError` (a ValueError) naming the argument, what was expected and what came. All tensors of a call share
one floating dtype; 16-bit inputs are widened; results are float32, float64 for float64 inputs; indices are
int64. Nothing here is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lmtt.errors import InputError
from lmtt.kernels import registry
from lmtt.kernels.numerics import FLOATING, divide
from lmtt.kernels.proximity.reference import evaluated_pairs
from lmtt.kernels.types import (
    Attention,
    AttentionResult,
    AttentionTask,
    Choice,
    Measure,
    NeuronResult,
    NeuronTask,
    TopK,
)

__all__ = [
    "AttentionContributions",
    "NeuronContributions",
    "Survivors",
    "attention_contributions",
    "directional_attention",
    "neuron_contributions",
    "unembed_topk",
]


class Survivors(NamedTuple):
    """The pairs evaluated exactly, parallel arrays sorted by (batch, destination, source, head)."""

    batch: Tensor  # int64 [N]
    destination: Tensor  # int64 [N]
    source: Tensor  # int64 [N]
    head: Tensor  # int64 [N]
    value: Tensor  # [N], shares


@dataclass(frozen=True)
class AttentionContributions:
    """Shares of each destination's whole: edges.sum(-1) + residual + bias + others.sum(-1) is 1, or 0 where
    `normaliser` is 0.

    | field       | shape     | meaning |
    |-------------|-----------|---------|
    | edges       | [B, T, T] | [b, i, j], summed over heads; 0 above the diagonal |
    | per_head    | [B, T, H] | summed over sources |
    | residual    | [B, T]    | of resid_pre |
    | bias        | [B, T]    | of b_o; 0 without |
    | others      | [B, T, n] | of the further parts |
    | normaliser  | [B, T]    | sum of the reported proximities |
    | certificate | [B, T]    | bounds the error of any share, or sum of shares, of the row |
    | checksum    | [B, T]    | by how much the parts fail to add up to the whole, 0 to 1 |

    `survivors` and `head_map` are computed when asked, from the inputs, which this object keeps alive.
    """

    edges: Tensor
    per_head: Tensor
    residual: Tensor
    bias: Tensor
    others: Tensor
    normaliser: Tensor
    certificate: Tensor
    checksum: Tensor
    choice: Choice  # which backend, and why
    tasks: tuple[AttentionTask, ...]  # the inputs, one per sequence

    @cached_property
    def survivors(self) -> Survivors:
        """The pairs whose bound exceeded `floor`, with their exact shares; none for measure "l2"."""
        columns: list[list[Tensor]] = []
        for b, (task, normaliser) in enumerate(zip(self.tasks, self.normaliser, strict=True)):
            pairs = evaluated_pairs(task, normaliser)
            columns.append([torch.full_like(pairs.destination, b), *pairs])
        return Survivors(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def head_map(self, head: int) -> Tensor:
        """[B, T, T] shares of one head as reported: summed over heads these are `edges`."""
        heads = self.per_head.shape[-1]
        if not 0 <= head < heads:
            raise InputError("head", expected=f"0 to {heads - 1}", got=head)
        maps = []
        for task, normaliser in zip(self.tasks, self.normaliser, strict=True):
            alone = replace(task, attention=_one_head(task.attention, head), keep=None)
            result, _ = registry.run("attention_contributions", alone, backend=self.choice.backend)
            # One head's edges are shares of a smaller sum: undo that division, then do this one.
            proximity = result.edges.double() * result.normaliser.double()[:, None]
            maps.append(divide(proximity, normaliser.double()[:, None]).to(self.edges.dtype))
        return torch.stack(maps)


@dataclass(frozen=True)
class NeuronContributions:
    """The k largest contributions of each row: index and value [B, T, k], falling, ties by lower index.

    residual, bias, normaliser, certificate, checksum [B, T] and others [B, T, n]: see AttentionContributions.
    """

    index: Tensor
    value: Tensor
    residual: Tensor
    bias: Tensor
    others: Tensor
    normaliser: Tensor
    certificate: Tensor
    checksum: Tensor
    choice: Choice


def attention_contributions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor,
    resid_pre: Tensor,
    whole: Tensor,
    *,
    others: Sequence[Tensor] = (),
    b_o: Tensor | None = None,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    floor: float = 0.0,
    measure: Measure = "l1",
    backend: str = "auto",
    check: bool = True,
) -> AttentionContributions:
    """Share of every source, head and other part in `whole` = resid_pre + attention + b_o + others.

    | argument       | shape                  | meaning |
    |----------------|------------------------|---------|
    | q              | [B, H, T, E]           | after rotary embedding |
    | k              | [B, H_kv, T, E]        | H a multiple of H_kv |
    | v              | [B, H_kv, T, E_v]      | with its bias |
    | w_o            | [H, E_v, D]            | output projection by head |
    | resid_pre      | [B, T, D]              | the stream before attention |
    | whole          | [B, T, D]              | resid_mid, or resid_post of a parallel block |
    | others         | n × [B, T, D]          | further parts, such as a parallel block's MLP |
    | b_o            | [D] or [B, T, D]       | the output projection's bias |
    | row_scale      | [B, T]                 | multiplies a destination's pairs (linearised post-norm) |
    | gate           | [B, T, H, E_v]         | on the attention output; u is then formed per destination |
    | scale          | float                  | default E ** -0.5; logits = softcap(scale * q.k) + mask |
    | window         | int                    | keeps i - window < j <= i |
    | alibi, sinks   | [H]                    | adds -alibi * (i - j) to a logit; an extra logit per row |
    | mask           | [B or 1, H or 1, T, T] | bool, True = may attend, or floating, added; -inf is allowed |
    | lse            | [B, H, T]              | log-sum-exp of each row of logits, sink included |

    Always causal. `floor` is the screen, relative to |whole|_1: pairs whose bound does not exceed it keep
    their first-order value, and `certificate` says what that may cost; at 0 every pair with a positive bound
    is exact.
    `check=False` skips the tests for non-finite values (they wait for the device).
    """
    given = _Arguments(q=q, k=k, v=v, w_o=w_o, resid_pre=resid_pre, whole=whole)
    attentions = _attentions(
        given, q, k, v, w_o, scale, softcap, window, sinks, mask, alibi, lse, row_scale, gate
    )
    B, _, T, _ = q.shape
    D = w_o.shape[2]
    given.shape("resid_pre", resid_pre, (B, T, D))
    given.shape("whole", whole, (B, T, D))
    biases = _biases(given, "b_o", b_o, (B, T, D))
    rest = _others(given, others, (B, T, D))
    _check_floor(floor)
    _check_choice("measure", measure, ("l1", "l2"))
    if check:
        given.check_finite()
    tasks = tuple(
        AttentionTask(
            attention=attentions[b],
            resid_pre=resid_pre[b],
            whole=whole[b],
            bias=biases[b],
            others=rest[b],
            screen=float(floor),
            measure=measure,
        )
        for b in range(B)
    )
    results: list[AttentionResult] = []
    for task in tasks:
        result, choice = registry.run("attention_contributions", task, backend=backend)
        results.append(result)
    fields = ("edges", "per_head", "residual", "bias", "others", "normaliser", "certificate", "checksum")
    return AttentionContributions(**_stack(results, fields), choice=choice, tasks=tasks)


def neuron_contributions(
    act: Tensor,
    w_down: Tensor,
    resid_mid: Tensor,
    resid_post: Tensor,
    *,
    b_down: Tensor | None = None,
    others: Sequence[Tensor] = (),
    row_scale: Tensor | None = None,
    k: int = 20,
    floor: float = 0.0,
    measure: Measure = "l1",
    backend: str = "auto",
    check: bool = True,
) -> NeuronContributions:
    """The k most important neurons of each row of resid_post = resid_mid + act @ w_down + b_down + others.

    act [B, T, F], w_down [F, D], resid_mid and resid_post [B, T, D] (parallel block: resid_mid is resid_pre
    + the attention output), b_down [D] or [B, T, D], others n × [B, T, D], row_scale [B, T]. The k are exact
    whatever the floor; the normaliser counts neurons below it at first order. Experts are not told apart
    here (`expert_index` is not accepted): lay their activations and weights side by side along F.
    """
    given = _Arguments(act=act, w_down=w_down, resid_mid=resid_mid, resid_post=resid_post)
    given.dimensions("act", act, "[B, T, F]")
    given.dimensions("w_down", w_down, "[F, D]")
    B, T, F = act.shape
    D = w_down.shape[1]
    given.shape("w_down", w_down, (F, D))
    given.shape("resid_mid", resid_mid, (B, T, D))
    given.shape("resid_post", resid_post, (B, T, D))
    biases = _biases(given, "b_down", b_down, (B, T, D))
    rest = _others(given, others, (B, T, D))
    given.optional("row_scale", row_scale, (B, T))
    _check_count("k", k, F, "the number of neurons")
    _check_floor(floor)
    _check_choice("measure", measure, ("l1", "l2"))
    if check:
        given.check_finite()
    results: list[NeuronResult] = []
    for b in range(B):
        task = NeuronTask(
            act=act[b],
            w_down=w_down,
            base=resid_mid[b],
            whole=resid_post[b],
            bias=biases[b],
            others=rest[b],
            row_scale=None if row_scale is None else row_scale[b],
            k=k,
            screen=float(floor),
            measure=measure,
        )
        result, choice = registry.run("neuron_contributions", task, backend=backend)
        results.append(result)
    fields = ("index", "value", "residual", "bias", "others", "normaliser", "certificate", "checksum")
    return NeuronContributions(**_stack(results, fields), choice=choice)


def directional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor,
    direction: Tensor,
    *,
    reduce: Literal["heads", "sources"] | None = None,
    row_scale: Tensor | None = None,
    gate: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    check: bool = True,
) -> Tensor:
    """What every (head, source) pair wrote along direction [B, T, D] of its destination.

    [B, H, T, T] indexed [b, h, i, j]; reduce="heads" sums over heads to [B, T, T], reduce="sources" over
    sources to [B, H, T]. The attention arguments are those of `attention_contributions`.
    """
    given = _Arguments(q=q, k=k, v=v, w_o=w_o, direction=direction)
    attentions = _attentions(
        given, q, k, v, w_o, scale, softcap, window, sinks, mask, alibi, lse, row_scale, gate
    )
    B, _, T, _ = q.shape
    given.shape("direction", direction, (B, T, w_o.shape[2]))
    _check_choice("reduce", reduce, (None, "heads", "sources"))
    if check:
        given.check_finite()
    out: list[Tensor] = []
    for b in range(B):
        result, _ = registry.run(
            "directional_attention", attentions[b], direction[b], reduce, backend=backend
        )
        out.append(result)
    return torch.stack(out)


def unembed_topk(
    x: Tensor,
    w_u: Tensor,
    k: int,
    *,
    norm: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    check: bool = True,
) -> TopK:
    """The k largest of softcap(scale * (norm(x) @ w_u.T + bias)) of each state, falling, ties by lower index.

    x [N, D]; w_u [V, D], the layout of an lm_head; bias [V]; `norm` maps [N, D] to [N, D] (a model's final
    norm). Returns values and indices [N, k] and logsumexp [N] over the whole vocabulary. No [N, V] is held.
    """
    given = _Arguments(x=x, w_u=w_u)
    given.dimensions("x", x, "[N, D]")
    given.dimensions("w_u", w_u, "[V, D]")
    given.shape("w_u", w_u, (w_u.shape[0], x.shape[1]))
    given.optional("bias", bias, (w_u.shape[0],))
    _check_count("k", k, w_u.shape[0], "the size of the vocabulary")
    _check_positive("softcap", softcap)
    if not math.isfinite(scale):
        raise InputError("scale", expected="a finite number", got=scale)
    if check:
        given.check_finite()
    result: TopK
    result, _ = registry.run("unembed_topk", x, w_u, k, norm, softcap, bias, scale, backend=backend)
    return result


class _Arguments:
    """The tensors of a call by name, held to one floating dtype and one device."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.first = next(iter(tensors))
        for name, tensor in tensors.items():
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor, *, or_bool: bool = False) -> None:
        if not isinstance(tensor, Tensor):
            raise InputError(name, expected="a torch tensor", got=type(tensor).__name__)
        if not (or_bool and tensor.dtype == torch.bool):
            dtype = self.tensors[self.first].dtype if self.tensors else tensor.dtype
            if tensor.dtype not in FLOATING:
                raise InputError(
                    f"dtype of {name}", expected=" | ".join(map(str, FLOATING)), got=tensor.dtype
                )
            if tensor.dtype != dtype:
                raise InputError(f"dtype of {name}", expected=f"{dtype} like {self.first}", got=tensor.dtype)
        device = self.tensors[self.first].device if self.tensors else tensor.device
        if tensor.device != device:
            raise InputError(f"device of {name}", expected=f"{device} like {self.first}", got=tensor.device)
        self.tensors[name] = tensor

    def dimensions(self, name: str, tensor: Tensor, axes: str) -> None:
        if tensor.dim() != axes.count(",") + 1 or 0 in tensor.shape:
            raise InputError(f"shape of {name}", expected=f"{axes}, none of them 0", got=list(tensor.shape))

    def shape(self, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
        if tuple(tensor.shape) != tuple(expected):
            raise InputError(f"shape of {name}", expected=list(expected), got=list(tensor.shape))

    def optional(self, name: str, tensor: Tensor | None, expected: Sequence[int]) -> None:
        if tensor is not None:
            self.add(name, tensor)
            self.shape(name, tensor, expected)

    def check_finite(self) -> None:
        for name, tensor in self.tensors.items():
            if name == "mask":
                wrong = tensor.isnan() | (tensor == torch.inf)
                allowed = "finite values or -inf"
            else:
                wrong, allowed = ~tensor.isfinite(), "finite values"
            if bool(wrong.any()):
                at = wrong.nonzero()[0].tolist()
                raise InputError(name, expected=allowed, got=f"{tensor[tuple(at)].item()} at {at}")


def _attentions(
    given: _Arguments,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_o: Tensor,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    alibi: Tensor | None,
    lse: Tensor | None,
    row_scale: Tensor | None,
    gate: Tensor | None,
) -> list[Attention]:
    """Validate what makes an attention, and cut it by sequence."""
    given.dimensions("q", q, "[B, H, T, E]")
    given.dimensions("k", k, "[B, H_kv, T, E]")
    given.dimensions("v", v, "[B, H_kv, T, E_v]")
    given.dimensions("w_o", w_o, "[H, E_v, D]")
    B, H, T, E = q.shape
    E_v = v.shape[3]
    given.shape("k", k, (B, k.shape[1], T, E))
    if H % k.shape[1]:
        raise InputError("heads of k", expected=f"a divisor of q's {H}", got=k.shape[1])
    given.shape("v", v, (B, k.shape[1], T, E_v))
    given.shape("w_o", w_o, (H, E_v, w_o.shape[2]))
    given.optional("sinks", sinks, (H,))
    given.optional("alibi", alibi, (H,))
    given.optional("lse", lse, (B, H, T))
    given.optional("row_scale", row_scale, (B, T))
    given.optional("gate", gate, (B, T, H, E_v))
    if mask is not None:
        given.add("mask", mask, or_bool=True)
        if mask.dim() != 4 or mask.shape[0] not in (1, B) or mask.shape[1] not in (1, H):
            raise InputError(
                "shape of mask", expected=f"[{B} or 1, {H} or 1, {T}, {T}]", got=list(mask.shape)
            )
        given.shape("mask", mask, (*mask.shape[:2], T, T))
    if window is not None and (not isinstance(window, int) or window < 1):
        raise InputError("window", expected="a positive integer or None", got=window)
    _check_positive("softcap", softcap)
    if scale is not None and not math.isfinite(scale):
        raise InputError("scale", expected="a finite number or None", got=scale)

    def of(tensor: Tensor | None, b: int) -> Tensor | None:
        return None if tensor is None else tensor[b if tensor.shape[0] > 1 else 0]

    return [
        Attention(
            q=q[b],
            k=k[b],
            v=v[b],
            w_o=w_o,
            scale=E**-0.5 if scale is None else float(scale),
            softcap=softcap,
            window=window,
            sinks=sinks,
            mask=of(mask, b),
            alibi=alibi,
            lse=of(lse, b),
            row_scale=of(row_scale, b),
            gate=of(gate, b),
        )
        for b in range(B)
    ]


def _one_head(attention: Attention, head: int) -> Attention:
    a, one = attention, slice(head, head + 1)
    kv = slice(head // a.group, head // a.group + 1)
    return replace(
        a,
        q=a.q[one],
        k=a.k[kv],
        v=a.v[kv],
        w_o=a.w_o[one],
        sinks=None if a.sinks is None else a.sinks[one],
        mask=a.mask if a.mask is None or a.mask.shape[0] == 1 else a.mask[one],
        alibi=None if a.alibi is None else a.alibi[one],
        lse=None if a.lse is None else a.lse[one],
        gate=None if a.gate is None else a.gate[:, one],
    )


def _biases(
    given: _Arguments, name: str, bias: Tensor | None, rows: tuple[int, int, int]
) -> list[Tensor | None]:
    """A bias for each sequence, [D] or [T, D]."""
    if bias is None:
        return [None] * rows[0]
    given.add(name, bias)
    if bias.dim() == 1:
        given.shape(name, bias, rows[2:])
        return [bias] * rows[0]
    given.shape(name, bias, rows)
    return list(bias)


def _others(
    given: _Arguments, others: Sequence[Tensor], rows: tuple[int, int, int]
) -> list[tuple[Tensor, ...]]:
    """The further parts of each sequence."""
    for n, other in enumerate(others):
        given.optional(f"others[{n}]", other, rows)
    return [tuple(other[b] for other in others) for b in range(rows[0])]


def _stack(results: Sequence[object], fields: Sequence[str]) -> Mapping[str, Any]:
    return {name: torch.stack([getattr(result, name) for result in results]) for name in fields}


def _check_floor(floor: float) -> None:
    if not (isinstance(floor, int | float) and 0 <= floor < math.inf):
        raise InputError("floor", expected="a finite number >= 0", got=floor)


def _check_count(name: str, count: int, most: int, what: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise InputError(name, expected=f"1 to {most}, {what}", got=count)


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
        raise InputError(name, expected="a positive number or None", got=value)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise InputError(name, expected=" | ".join(map(str, choices)), got=value)
