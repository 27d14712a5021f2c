"""A mixture of experts as one wide MLP, whose neurons are (expert, n) at index expert * F_e + n.

    act[i, (e, n)] = g[i, e] * act_e[i, n]
    written[i] = sum over (e, n) of act[i, (e, n)] * w_down[(e, n)] + sum over e of g[i, e] * b_e

where g is the router's weight, 0 for experts that the token is not routed to. Read from transformers'
common form of packed experts (`use_experts_implementation`); the attributes that it sets describe the
variants. The sum is formed again on the spot and compared with what the module returned, so a module
that means something else by these names is taken whole, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtt.structure.modules import FLOATS
from lmtt.structure.tolerance import SUBLAYER_BOUND

# Activations of all experts and a copy of w_down, beyond which a layer's experts are taken whole.
MAX_EXPERT_BYTES = 4 << 30
_ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True)
class ExpertParts:
    """All experts side by side; E experts of F_e neurons."""

    act: Tensor  # [T, E * F_e], the router's weight included
    w_down: Tensor  # [E * F_e, D]; a view where the module stores [E, F_e, D]
    bias: Tensor | None  # [T, D], the experts' biases weighted by the router


def why_whole(module: Any, tokens: int) -> str | None:
    """Why an experts module cannot be taken apart into neurons, or None if it can be tried."""
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing:
        return f"experts of an unknown form (no {missing[0]!r})"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after each expert"
    up, down = _matrices(module)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return "experts whose matrices are not packed as gate_up_proj and down_proj"
    if down.dtype not in FLOATS:
        return f"expert weights stored as {down.dtype}"
    neurons = module.num_experts * _width(module, down)
    copied = 0 if module.is_transposed else _model_width(module, down)
    size = neurons * (tokens + copied) * down.element_size()
    if size > MAX_EXPERT_BYTES:
        return f"{neurons} neurons would take {size / 2**30:.1f} GiB"
    return None


def expert_parts(module: Any, arguments: list[Tensor], written: Tensor) -> ExpertParts | str:
    """The parts of one run of `module`, or why it is taken whole.

    arguments: hidden [T, D], expert indices [T, k] (int64) and router weights [T, k], as the module was
    given them. written: [T, D], what it returned.
    """
    if len(arguments) != 3 or arguments[1].is_floating_point() or arguments[1].shape != arguments[2].shape:
        return "experts that are not given indices and weights"
    hidden, index, weights = arguments
    reason = why_whole(module, hidden.shape[0])
    if reason is not None:
        return reason
    up, down = _matrices(module)
    assert up is not None
    assert down is not None
    E, width, D = module.num_experts, _width(module, down), _model_width(module, down)
    T = hidden.shape[0]
    act = hidden.new_zeros(T, E * width)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros(T, D, dtype=wide, device=hidden.device)
    bias = torch.zeros_like(total) if module.has_bias else None
    for expert in torch.unique(index).tolist():
        if expert >= E:
            continue  # a token that is routed nowhere
        rows, slot = torch.where(index == expert)
        weight = weights[rows, slot, None]
        x = _product(hidden[rows], up[expert], module.is_transposed)
        if module.has_bias:
            x = x + _up_bias(module)[expert]
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        act[:, expert * width : (expert + 1) * width].index_add_(0, rows, (x * weight).to(act.dtype))
        total.index_add_(0, rows, _product(x, down[expert], module.is_transposed).to(wide) * weight)
        if bias is not None:
            bias.index_add_(0, rows, (module.down_proj_bias[expert] * weight).to(wide))
    summed = total if bias is None else total + bias
    error, size = float((summed - written.to(wide)).abs().max()), float(written.abs().max())
    if not error <= SUBLAYER_BOUND[written.dtype] * size:
        return f"experts whose neurons do not add up (to {error:.1e} of {size:.1e})"
    w_down = down if module.is_transposed else down.transpose(1, 2)
    return ExpertParts(act, w_down.reshape(E * width, D), None if bias is None else bias.to(written.dtype))


def packed_parts(act: Tensor, weight: Tensor) -> ExpertParts | str:
    """Experts as one batched product: act [E, T, F_e], router's weight included, times weight [E, F_e, D]."""
    E, T, width = act.shape
    size = E * width * (T + (0 if weight.is_contiguous() else weight.shape[2])) * act.element_size()
    if size > MAX_EXPERT_BYTES:
        return f"{E * width} neurons would take {size / 2**30:.1f} GiB"
    return ExpertParts(act.transpose(0, 1).reshape(T, E * width), weight.reshape(E * width, -1), None)


def _matrices(module: Any) -> tuple[Tensor | None, Tensor | None]:
    up = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    return (
        up if isinstance(up, Tensor) else None,
        down if isinstance(down, Tensor) else None,
    )


def _up_bias(module: Any) -> Tensor:
    bias: Tensor = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    return bias


def _width(module: Any, down: Tensor) -> int:
    return down.shape[1] if module.is_transposed else down.shape[2]


def _model_width(module: Any, down: Tensor) -> int:
    return down.shape[2] if module.is_transposed else down.shape[1]


def _product(x: Tensor, matrix: Tensor, is_transposed: bool) -> Tensor:
    return x @ matrix if is_transposed else F.linear(x, matrix)


def is_experts(module: nn.Module) -> bool:
    """A module that owns its experts' matrices packed in three dimensions."""
    return any(p.dim() == 3 for p in module.parameters(recurse=False))
