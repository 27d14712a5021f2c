"""Every epsilon, tolerance and dtype rule of the kernels, each with its reason.

A number that decides whether something is skipped, equal or acceptable has a name here and nowhere else.
`u` below is the unit roundoff: half the distance from 1 to the next number of a dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}

# |got - want| <= tolerance * (1 + kappa) * min(|x|, |y|) for a proximity, see `proximity_tolerance`.
# float32 with 16 or more partial sums stays well inside; a difference of two norms does not for small x,
# which the minimum makes visible.
PROXIMITY_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}

# A share is a proximity over a sum of proximities, both held to PROXIMITY_TOLERANCE. The certificate bounds
# what first-order values cost in exact arithmetic; this is what rounding may add to it.
SHARE_TOLERANCE = {torch.float32: 4e-6, torch.float64: 2e-12}

# Share of a row's checksum that may not cancel. 16-bit streams are rounded after every addition, so the
# recorded whole is not the sum of its parts; float16 rounds eight times finer than bfloat16.
# A float64 model is allowed 1e-6 because most norms compute in float32 even there.
CHECKSUM_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}

# Below this share of |y|^2 the radicand |y|^2 - 2 <x, y> + |x|^2 = |y - x|^2 has cancelled (in float32 the
# proximity is off by 1.8e-6 |y| at |y - x| = 0.1 |y|, and NaN from 1e-4 |y|): y - x is formed instead.
L2_NEARLY_EQUAL = 1e-2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed with and returned: float64 for float64, float32 for everything else.

    16-bit inputs are widened when they are loaded and no intermediate is ever 16 bits wide, so that they meet
    the tolerances of float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def sign(x: Tensor) -> Tensor:
    """-1 or +1 by the sign bit. The screening identity needs |sign(0)| = 1, hence not torch.sign."""
    return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), x)


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error bound of a sum of `terms` products in any order: n u / (1 - n u) (Higham 2002, §3.1)."""
    error = terms * UNIT_ROUNDOFF[dtype]
    if error >= 0.5:
        raise ValueError(f"a sum of {terms} terms has no useful error bound in {dtype}")
    return error / (1 - error)


def screening_margin(terms: int, dtype: torch.dtype) -> float:
    """Factor m such that the true g = <v, W_O r> is at most computed g + m * b, with r = ±1 in every entry.

    b = sum_e |v[e]| * |W_O[e, :]|_1 bounds the sum of the absolute values of all products in g. Two products
    of lengths D and E leave g within gamma(D + E) * b of the truth whatever their order; b itself is a
    computed sum of positive terms, which may be low by the same factor, hence the division. Later
    multiplications (by A, by a row's scale) only add relative errors of a few u, covered by the 8 extra
    terms. Underflow is not covered.
    """
    g = gamma(terms + 8, dtype)
    return g / (1 - g)


def tensor_core_margin(terms: int, split: bool) -> float:
    """`screening_margin` for products on a GPU, in float32.

    Tensor cores truncate where they add, which costs up to twice the unit roundoff; `split` adds what is left
    out when W_O r is held as two float16 terms of 11 bits each and v as one.
    """
    g = gamma(2 * (terms + 8), torch.float32) + (2.0**-21 if split else 0.0)
    return g / (1 - g)


# Two float16 terms lose what lies 39 binary digits below the largest number that they share a scale with:
# half of the smallest subnormal number, 2^-25, where the largest is at least 2^13; here with some room.
SPLIT_LOSS = 2.0**-37


def proximity_tolerance(
    dtype: torch.dtype, part_norm: Tensor, whole_norm: Tensor, kappa: Tensor | float = 0.0
) -> Tensor:
    """Allowed |got - want| of a clamped proximity against a float64 oracle on the same (widened) inputs.

    tolerance * (1 + kappa) * min(|x|, |y|). kappa = |scale| * |q_i| * |k_j| is what rounded logits cost
    through the exponential; 0 where nothing is exponentiated.
    """
    return PROXIMITY_TOLERANCE[compute_dtype(dtype)] * (1 + kappa) * torch.minimum(part_norm, whole_norm)


def share_tolerance(dtype: torch.dtype, kappa: float = 0.0) -> float:
    """Allowed |got - want| of a share, or of any sum of shares of a row, beyond the row's certificate."""
    return SHARE_TOLERANCE[compute_dtype(dtype)] * (1 + kappa)


def checksum_tolerance(dtype: torch.dtype) -> float:
    """Largest acceptable `checksum` for inputs of this dtype."""
    return CHECKSUM_TOLERANCE[dtype]


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0; NaN stays NaN."""
    none = denominator == 0
    return (numerator / denominator.masked_fill(none, 1)).masked_fill(none & ~numerator.isnan(), 0)


def certificate(skipped: Tensor, normaliser: Tensor) -> Tensor:
    """skipped / normaliser in [0, 1]; 0 where nothing was skipped.

    A row with something skipped and normaliser 0 reports no share at all, of which any may be wrong: 1.
    """
    bound = (skipped / normaliser).clamp(max=1)
    return bound.masked_fill(skipped == 0, 0)


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Float32 products in float32: TF32 and bfloat16 shortcuts would put the pattern far off."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
