"""Other ways to the same numbers, frozen: what ours is timed against.

Each is written from the definition

    part[i, h, j] = A[h, i, j] * v[h, j] @ W_O[h]                proximity = max(0, |y_i|_1 - |y_i - part|_1)

and returns `Contributions`, equal to `lmtt.ops.attention_contributions(floor=0)` up to float32 rounding
(tests/benchmarks). All take an `AttentionTask` of a plain causal attention: no softcap, window, mask, sinks,
ALiBi, gate, row scale, bias or further parts, as in Llama-like models.

A peer is changed only to make it faster, never to make it slower; README.md has what was tried.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor, nn
from torch.nn import functional

from lmtt.kernels.types import AttentionTask

# Destinations x sources of the buffer of `plain_torch`: fewer: its calls cost more than their work;
# more: it leaves the cache.
TILE = (4, 256)
COMPILED_TILE = 64  # rows and columns of the square that `compiled_torch` hands to its kernel
FLASHTRACE_CHUNKS = (
    (128, 32),
    (64, 4),
    (256, 1),
)  # (sources, destinations) at a time; the first is its default


class Contributions(NamedTuple):
    """Shares of each row of `whole`."""

    edges: Tensor  # [T, T], summed over heads
    per_head: Tensor  # [T, H], summed over sources
    residual: Tensor  # [T]


@torch.no_grad()
def plain_torch(task: AttentionTask) -> Contributions:
    """The best exact version in plain (eager) torch that holds no decomposition: one small buffer is reused.

    For each head u[j] = v[j] @ W_O; then, for a tile of 4 destinations and 256 sources at a time,
    buffer[i, j] = A[i, j] * u[j] - y[i] by one fused call, |buffer| in place, and its sums. Tiles above the
    diagonal are not visited. Beyond A [H, T, T] it holds u [T, D] of one head and the buffer.
    """
    pattern, y = _pattern(task), task.whole
    H, T, D = pattern.shape[0], *y.shape
    size, minus_y = y.abs().sum(-1), -y
    rows, columns = TILE
    buffer = torch.empty(rows * columns * D, dtype=y.dtype)
    per_head = torch.zeros(T, H)
    edges = torch.zeros(T, T)
    proximity = torch.empty(T, T)
    for h in range(H):
        u = task.attention.v[h // task.attention.group] @ task.attention.w_o[h]
        proximity.copy_(size[:, None].expand(T, T))  # above the diagonal: no distance, clipped below
        for i in range(0, T, rows):
            i1 = min(T, i + rows)
            for j in range(0, i1, columns):
                j1 = min(i1, j + columns)
                part = buffer[: (i1 - i) * (j1 - j) * D].view(i1 - i, j1 - j, D)
                torch.addcmul(minus_y[i:i1, None], pattern[h, i:i1, j:j1, None], u[j:j1], out=part)
                proximity[i:i1, j:j1] -= part.abs_().sum(-1)
        proximity.clamp_(min=0).tril_()
        edges += proximity
        per_head[:, h] = proximity.sum(-1)
    return _shares(task, edges, per_head)


@torch.no_grad()
def materialised(task: AttentionTask) -> Contributions:
    """The published tool's way: the decomposed attention [i, j, h, D] as one tensor, then pairwise distances.

    Nothing is left out above the diagonal, where A is 0. Holds several times T * T * H * D numbers.
    """
    values = task.attention.v.repeat_interleave(task.attention.group, 0)
    weighted = torch.einsum("hij,hje->ijhe", _pattern(task), values)
    parts = torch.einsum("ijhe,hed->ijhd", weighted, task.attention.w_o)
    distance = functional.pairwise_distance(parts, task.whole[:, None, None], p=1, eps=0.0)
    proximity = (task.whole.abs().sum(-1)[:, None, None] - distance).clamp(min=0)
    return _shares(task, proximity.sum(2), proximity.sum(1))


@cache
def _compiled_kernel() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def proximity(a: Tensor, u: Tensor, y: Tensor, size: Tensor) -> Tensor:
        return (size[:, None] - (a[:, :, None] * u[None] - y[:, None]).abs().sum(-1)).clamp(min=0)

    compiled: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = torch.compile(proximity, dynamic=False)
    return compiled


@torch.no_grad()
def compiled_torch(task: AttentionTask) -> Contributions:
    """The same sum handed to torch.compile, which writes one fused C++ loop without any buffer.

    Not plain torch any more, hence not what the gates compare with: it says how much of the difference is
    fusion and how much is screening. Tiles of 64 destinations and 64 sources, those above the diagonal left
    out; T is padded to whole tiles. Compilation is not part of its time.
    """
    T, n = task.whole.shape[0], COMPILED_TILE
    padded = -(-T // n) * n
    pattern = functional.pad(_pattern(task), (0, padded - T, 0, padded - T))
    y = functional.pad(task.whole, (0, 0, 0, padded - T))
    H, size, kernel = pattern.shape[0], y.abs().sum(-1), _compiled_kernel()
    per_head, edges = torch.zeros(padded, H), torch.zeros(padded, padded)
    for h in range(H):
        v = functional.pad(task.attention.v[h // task.attention.group], (0, 0, 0, padded - T))
        u = v @ task.attention.w_o[h]
        proximity = torch.zeros(padded, padded)
        for i in range(0, padded, n):
            for j in range(0, i + n, n):
                a = pattern[h, i : i + n, j : j + n].contiguous()
                proximity[i : i + n, j : j + n] = kernel(a, u[j : j + n], y[i : i + n], size[i : i + n])
        edges += proximity
        per_head[:, h] = proximity.sum(-1)
    return _shares(task, edges[:T, :T], per_head[:T])


@torch.no_grad()
def flashtrace(case: Case, chunks: tuple[int, int]) -> Callable[[], Contributions]:
    """FlashTrace 0.1.1's own all-positions function on one layer; returned ready, so that only it is timed.

    It is handed the attention pattern (its other way recomputes it) and the recorded states; `chunks` are its
    (chunk_tokens, sink_chunk_tokens).
    """
    assert case.flashtrace is not None
    core, task, weights = _flashtrace_core(), case.attention, case.flashtrace
    H, T, E = task.attention.q.shape
    norm = nn.RMSNorm(len(weights.norm), eps=weights.norm_eps)
    norm.weight = nn.Parameter(weights.norm, requires_grad=False)
    cache_ = {
        "pre_attn_resid": [task.resid_pre[None]],
        "mid_resid": [task.whole[None]],
        "post_resid": [case.neurons.whole[None]],
        "mlp_out": [(case.neurons.whole - case.neurons.base)[None]],
    }
    parameters = core.IFRParameters(
        n_layers=1,
        n_heads_q=H,
        n_kv_heads=H // task.attention.group,
        head_dim=E,
        group_size=task.attention.group,
        d_model=task.whole.shape[1],
        sequence_length=T,
        model_dtype=torch.float32,
        chunk_tokens=chunks[0],
        sink_chunk_tokens=chunks[1],
    )
    pack = [{"v_w": weights.v, "o_w": weights.o, "in_ln": norm}]
    attentions = [_pattern(task)[None]]

    def run() -> Contributions:
        result = core.compute_ifr_for_all_positions(cache_, attentions, pack, parameters)
        return Contributions(
            result.token_importance_matrix, result.head_importance_matrix, result.resid_attn_fraction_total
        )

    return run


def flashtrace_missing() -> str | None:
    """Why FlashTrace cannot be measured here, or None."""
    try:
        version = metadata.version("flashtrace")
    except metadata.PackageNotFoundError:
        return "flashtrace is not installed (pip install --no-deps flashtrace==0.1.1)"
    return None if version == "0.1.1" else f"flashtrace {version} is installed, not 0.1.1"


@cache
def _flashtrace_core() -> ModuleType:
    """Its module `core` alone: the package imports plotting and language packages that this does not use."""
    package = importlib.util.find_spec("flashtrace")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "core.py"
    spec = importlib.util.spec_from_file_location("flashtrace_core", path)
    assert spec is not None
    assert spec.loader is not None
    core: Any = importlib.util.module_from_spec(spec)
    sys.modules["flashtrace_core"] = core  # its dataclasses look themselves up
    spec.loader.exec_module(core)
    core.tqdm = lambda items, **_: items  # no progress bar inside what is timed
    module: ModuleType = core
    return module


def plain_forward(model: Any, ids: Tensor, *, all_logits: bool) -> Tensor:
    """The model's own forward, logits at all positions [1, T, V] or at the last one [1, 1, V]."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=0 if all_logits else 1).logits
    return logits


def patched_forward(model: Any, layer: Any, ids: Tensor, head: int, d_head: int, position: int) -> Tensor:
    """Activation patching: one head's output at one position set to zero, the whole model run again.

    `layer` is the decoder layer; its `self_attn.o_proj` is given the heads side by side. Returns the last
    position's logits [V].
    """

    def ablate(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = given[0].clone()
        heads[:, position, head * d_head : (head + 1) * d_head] = 0
        return (heads, *given[1:])

    hook = layer.self_attn.o_proj.register_forward_pre_hook(ablate)
    try:
        return plain_forward(model, ids, all_logits=False)[0, -1]
    finally:
        hook.remove()


def _pattern(task: AttentionTask) -> Tensor:
    """A [H, T, T] of a plain causal attention."""
    a = task.attention
    extras = (a.softcap, a.window, a.sinks, a.mask, a.alibi, a.gate, a.row_scale, task.bias)
    if task.others or any(extra is not None for extra in extras):
        raise ValueError("peers know plain causal attention without bias only")
    T = a.q.shape[1]
    logits = (a.q @ a.k.repeat_interleave(a.group, 0).mT).mul_(a.scale)
    return logits.masked_fill_(torch.ones(T, T, dtype=torch.bool).triu_(1), -torch.inf).softmax(-1)


def sources_above(task: AttentionTask) -> int:
    """Sources of all heads that have a destination to be evaluated: each needs its part of W_O once."""
    a = task.attention
    towards = torch.einsum("id,hed->hie", task.whole.sign(), a.w_o)
    first_order = _pattern(task).mul_(towards @ a.v.repeat_interleave(a.group, 0).mT)
    return int((first_order > task.screen * task.whole.abs().sum(-1)[:, None]).any(1).sum())


def _shares(task: AttentionTask, edges: Tensor, per_head: Tensor) -> Contributions:
    """Divide by each row's sum of proximities, the residual's among them."""
    y = task.whole
    residual = (y.abs().sum(-1) - (y - task.resid_pre).abs().sum(-1)).clamp(min=0)
    total = edges.sum(-1) + residual
    return Contributions(edges / total[:, None], per_head / total[:, None], residual / total)
