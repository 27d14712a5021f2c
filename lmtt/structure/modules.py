"""What can be asked of a single module without knowing its class: its matrix, its kind, its linear form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmtt.errors import StructureError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_linear(module: nn.Module) -> bool:
    """A matrix and perhaps a bias: nn.Linear and its (quantised) subclasses, or GPT-2's Conv1D.

    Or an adapter of low rank around one of these (`base_layer`), which is linear as long as no dropout runs.
    """
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and is_linear(base)


def is_norm(module: nn.Module, width: int) -> bool:
    """A leaf whose parameters, if any, are vectors of the stream's width."""
    leaf = next(module.children(), None) is None
    return leaf and all(p.dim() == 1 and p.numel() == width for p in module.parameters(recurse=False))


def linear_weight(module: nn.Module, dtype: torch.dtype, device: torch.device, width_in: int) -> Tensor:
    """The matrix W of y = x @ W + bias, [in, out]: a view where the weight is stored as numbers.

    Quantised weights and adapters have no such view, so the module itself is asked: W = module(I) - bias.
    """
    if isinstance(module, Conv1D):
        stored: Tensor = module.weight
        return stored
    if isinstance(module, nn.Linear):
        weight = module.weight
        if weight.dtype in FLOATS and weight.dim() == 2 and weight.shape[1] == width_in:
            return weight.T
    with torch.no_grad():
        adapted = _low_rank(module, dtype, device, width_in)
        if adapted is not None:
            return adapted
        product: Tensor = module(torch.eye(width_in, dtype=dtype, device=device))
        bias = linear_bias(module) if isinstance(module, nn.Linear) else _at_zero(module, product, width_in)
    return product if bias is None else product - bias


def linear_bias(module: nn.Module) -> Tensor | None:
    """[out] or None."""
    adapter: Any = module
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        zero = _at_zero(module, next(module.parameters()), int(adapter.in_features))
        return zero if bool((zero != 0).any()) else None
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _low_rank(module: Any, dtype: torch.dtype, device: torch.device, width_in: int) -> Tensor | None:
    """The matrix of a plain LoRA adapter from its own factors: asking it with I would cost [in, in, out]."""
    if not hasattr(module, "get_delta_weight") or getattr(module, "lora_variant", None):
        return None
    weight = linear_weight(module.base_layer, dtype, device, width_in)
    if module.disable_adapters or module.merged:
        return weight
    turned = isinstance(module.base_layer, Conv1D)
    for name in module.active_adapters:
        if name in module.lora_A:
            delta = module.get_delta_weight(name)
            weight = weight + (delta if turned else delta.T)
    return weight


def _at_zero(module: nn.Module, like: Tensor, width_in: int) -> Tensor:
    with torch.no_grad():
        value: Tensor = module(like.new_zeros(1, width_in))[0]
    return value


@dataclass(frozen=True)
class LinearisedNorm:
    """A norm held at the statistics of one run: y = row[i] * gain * (x - mean(x) if centred) + shift."""

    gain: Tensor  # [D]
    shift: Tensor | None  # [D]
    row: Tensor  # [T], 1 / rms or 1 / std, epsilon included as the model did
    centred: bool

    def fold(self, rows: Tensor) -> Tensor:
        """The norm's fixed linear part applied to `rows` [..., D]; multiply by `row` to complete it."""
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return rows * self.gain


PROBE = 1000.0  # size of a probe's entries: their mean square leaves any norm's epsilon (<= 1e-5) below 1e-11


def linearise_norm(norm: nn.Module, x: Tensor, y: Tensor, name: str) -> LinearisedNorm:
    """Find the linear map that `norm` was on x [T, D] -> y [T, D], by calls alone.

    Whether it multiplies by `weight` or by `1 + weight`, and which epsilon it uses, need not be known:
    probes give the gain and the shift, the recorded run gives each row's factor by projection.
    Raises StructureError if y is not of that form (bound: rounding of the model's dtype).
    """
    D = x.shape[-1]
    probe = torch.full((1, D), PROBE, dtype=x.dtype, device=x.device)
    wave = probe.clone()
    wave[:, 1::2] *= -1
    with torch.no_grad():
        shift = norm(torch.zeros_like(probe))[0]
        flat = norm(probe)[0] - shift
        waved = norm(wave)[0] - shift
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = wave[0].to(wide)
    # A centring norm maps a constant row to its shift; others map it to their gain.
    centred = bool(flat.abs().max() <= 1e-2 * waved.abs().max())
    w = w - w.mean() if centred else w
    gain = waved.to(wide) * w.square().mean().sqrt() / w
    frozen = LinearisedNorm(gain, None, torch.ones((), device=x.device, dtype=wide), centred)
    image = frozen.fold(x.to(wide))
    target = y.to(wide) - shift.to(wide)
    energy = image.square().sum(-1)
    row = torch.where(energy > 0, (image * target).sum(-1) / energy, torch.zeros_like(energy))
    error = (target - row[:, None] * image).abs().max()
    # The module computes in float32 at best even where its input is float64.
    bound = 64 * max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps) * target.abs().max()
    if not bool(error <= bound):
        raise StructureError(
            f"{name} is not a norm that can be held at a run's statistics",
            expected=f"a residue of at most {float(bound):.1e}",
            got=f"{float(error):.1e}",
        )
    has_shift = bool((shift != 0).any())
    dtype = x.dtype
    return LinearisedNorm(gain.to(dtype), shift if has_shift else None, row.to(dtype), centred)
