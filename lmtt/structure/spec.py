"""What is known of a decoder layer, and what was captured of one run through it.

A layer is a chain of *stages*. Each stage is one sum: whole = base + everything written in that stage,
where base is the whole of the stage before (the first one's base is resid_pre, the last one's whole is
resid_post). A sequential block has two stages (resid_mid, resid_post), a parallel block one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lmtt.kernels.types import Attention

Kind = Literal["attention", "mlp", "experts", "mixer", "opaque"]


@dataclass(frozen=True)
class Write:
    """One addition to the residual stream, as discovered (paths are relative to the layer)."""

    kind: Kind
    module: str | None  # the module whose weight rows are the parts: o_proj, down_proj, an experts module
    post_norm: str | None  # the norm applied to the module's output before it is added
    scale: float  # product of the scalar multipliers between the module and the stream
    stage: int  # which sum of the layer it belongs to
    note: str = ""  # why it is opaque, or anything a reader of `lmtt doctor` should know
    inner_scale: float = 1.0  # scalar multiplier between the module and its post_norm
    factor: bool = False  # a factor per token multiplies the module's output (a shared expert's gate)
    gated: bool = False  # an elementwise gate multiplies the attention's output before the module


@dataclass(frozen=True)
class LayerStructure:
    """What a layer adds to the stream and by which modules; equal for all layers of one kind."""

    writes: tuple[Write, ...]
    stages: int
    attention_module: str | None  # the module that hands q, k, v over
    attention_source: Literal["registry", "sdpa", "product"] | None
    returns_tuple: bool
    sums: tuple[str | None, ...] = ()  # for every stage but the last, a module that is given its whole

    @property
    def parallel(self) -> bool:
        """Attention and MLP are added in one sum: there is no resid_mid."""
        return self.stages == 1 and len(self.writes) > 1


@dataclass(frozen=True)
class AttentionWrite:
    """part[i, h, j] as in `Attention`; written = sum of the parts + bias, as the model recorded it."""

    attention: Attention
    bias: Tensor | None  # [D] or [T, D]
    written: Tensor  # [T, D]


@dataclass(frozen=True)
class MlpWrite:
    """part[i, n] = row_scale[i] * act[i, n] * w_down[n]; written = sum of the parts + bias."""

    act: Tensor  # [T, F]
    w_down: Tensor  # [F, D]
    bias: Tensor | None  # [D] or [T, D]
    row_scale: Tensor | None  # [T]
    written: Tensor  # [T, D]


@dataclass(frozen=True)
class OpaqueWrite:
    """A sublayer that enters the graph as one part, because it is not taken apart."""

    written: Tensor  # [T, D]
    kind: Kind
    reason: str


CapturedWrite = AttentionWrite | MlpWrite | OpaqueWrite


@dataclass(frozen=True)
class Stage:
    """whole = base + sum of what was written."""

    base: Tensor  # [T, D]
    whole: Tensor  # [T, D]
    writes: tuple[CapturedWrite, ...]


@dataclass(frozen=True)
class CapturedLayer:
    """One sequence's run through one layer."""

    index: int
    stages: tuple[Stage, ...]

    @property
    def resid_pre(self) -> Tensor:
        """[T, D]"""
        return self.stages[0].base

    @property
    def resid_post(self) -> Tensor:
        """[T, D]"""
        return self.stages[-1].whole
