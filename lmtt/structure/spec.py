"""What is known of a decoder layer, and what was captured of one run through it.

A layer is a chain of *stages*. Each stage is one sum: whole = base + everything written in that stage,
where base is the whole of the stage before (the first one's base is resid_pre, the last one's whole is
resid_post). A sequential block has two stages (resid_mid, resid_post), a parallel block one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from lmtt.kernels.types import Attention
from lmtt.structure.modules import LinearisedNorm

Kind = Literal["attention", "mlp", "experts", "mixer", "constant", "opaque"]
Source = Literal["registry", "sdpa", "product"]


class Site(NamedTuple):
    """One call in a layer's forward: the `number`-th one of `function` that `module`'s own code makes."""

    module: str
    function: str
    number: int


@dataclass(frozen=True)
class Multiply:
    """A factor on the way to the stream: a number, one per token or one per channel, read at each run."""

    site: Site | None  # None: the fixed factor `value`
    operand: int  # which argument of the call is the factor
    inverse: bool = False  # divided by it
    value: float | None = None  # what it was when discovered, where it is one number


@dataclass(frozen=True)
class Norm:
    """A norm on the way to the stream; held at each run's statistics it is linear."""

    module: str


Step = Multiply | Norm


def _product(path: tuple[Step, ...]) -> float:
    product = 1.0
    for step in path:
        if isinstance(step, Multiply) and step.value is not None:
            product = product / step.value if step.inverse else product * step.value
    return product


@dataclass(frozen=True)
class Write:
    """One addition to the residual stream, as discovered (paths are relative to the layer).

    | kind      | what it is                                                                             |
    |-----------|----------------------------------------------------------------------------------------|
    | attention | sums of values weighted by a softmax, through a linear map: (head, source) pairs       |
    | mlp       | a linear map of something computed token by token: neurons                             |
    | experts   | many such maps, side by side: neurons of experts                                       |
    | constant  | a parameter added by itself: part of the bias of the sublayer it accompanies           |
    | mixer     | a linear map of something that mixes tokens without a softmax: one part                |
    | opaque    | not understood, `note` says why: refused, or one part where the caller asks for that   |
    """

    kind: Kind
    module: str | None  # whose weight rows are the parts: o_proj, down_proj, experts; or a parameter
    stage: int  # which sum of the layer it belongs to
    path: tuple[Step, ...] = ()  # from the module's output to the stream, in this order
    note: str = ""  # why it is opaque, or anything a reader of `lmtt doctor` should know
    calls: tuple[int, ...] = ()  # attention: which of the layer's attention calls it reads
    through: bool = False  # attention: something lies between those calls and the linear map
    product: Site | None = None  # experts: the batched product with the parameter `module`
    scattered: bool = False  # experts: `module`'s own code runs them one by one and adds up by row

    @property
    def post_norm(self) -> str | None:
        """The first norm on the way."""
        return next((step.module for step in self.path if isinstance(step, Norm)), None)

    @property
    def scale(self) -> float:
        """The product of the factors that are one number (as discovered); a norm undoes those before it."""
        norms = [at for at, step in enumerate(self.path) if isinstance(step, Norm)]
        return _product(self.path[norms[-1] + 1 :] if norms else self.path)

    @property
    def inner_scale(self) -> float:
        """The same of those before the first norm; 1 where there is none."""
        norms = [at for at, step in enumerate(self.path) if isinstance(step, Norm)]
        return _product(self.path[: norms[0]]) if norms else 1.0

    @property
    def factor(self) -> bool:
        """A factor per token or channel is on the way, such as a shared expert's gate."""
        return any(isinstance(step, Multiply) and step.value is None for step in self.path)


@dataclass(frozen=True)
class LayerStructure:
    """What a layer adds to the stream and by which modules; equal for all layers of one kind."""

    writes: tuple[Write, ...]
    stages: int
    attention_module: str | None  # the module that hands q, k, v over
    attention_source: Source | None
    returns_tuple: bool
    sums: tuple[str | None, ...] = ()  # for every stage but the last, a module that is given its whole
    carries: tuple[tuple[Step, ...], ...] = ()  # for every stage, what the stream itself goes through
    opaque: bool = False  # the caller lets in what is not understood, as one part

    @property
    def parallel(self) -> bool:
        """Attention and MLP are added in one sum: there is no resid_mid."""
        return self.stages == 1 and len(self.writes) > 1

    def closed(self, module: str | None, note: str) -> LayerStructure:
        """The same with the write of one module as one opaque part, and why."""
        writes = tuple(
            replace(write, kind="opaque", note=note) if write.module == module else write
            for write in self.writes
        )
        return replace(self, writes=writes)


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
    """A sublayer that enters the graph as one part: a mixer, or one that the caller let in unopened."""

    written: Tensor  # [T, D]
    kind: Kind
    reason: str
    module: str = ""  # "" for what no module returned


CapturedWrite = AttentionWrite | MlpWrite | OpaqueWrite


@dataclass(frozen=True)
class Carry:
    """What a layer does to the stream itself, one step after the other: a linear map of each row.

    A step is a factor, [] or [D], or a norm held at this run's statistics.
    """

    steps: tuple[Tensor | LinearisedNorm, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The map of x [T, D]."""
        for step in self.steps:
            x = x * step if isinstance(step, Tensor) else step.row[:, None] * step.fold(x)
        return x

    def fold(self, weight: Tensor) -> Tensor:
        """What of the map is the same for all rows, applied to weight [..., D]; `row` completes it."""
        for step in self.steps:
            weight = weight * step if isinstance(step, Tensor) else step.fold(weight)
        return weight

    @property
    def row(self) -> Tensor | None:
        """[T], or None where all rows are alike."""
        row: Tensor | None = None
        for step in self.steps:
            if isinstance(step, LinearisedNorm):
                row = step.row if row is None else row * step.row
        return row

    @property
    def number(self) -> float | None:
        """The whole map, where it is a product with one number."""
        product = 1.0
        for step in self.steps:
            if not isinstance(step, Tensor) or step.numel() != 1:
                return None
            product *= float(step)
        return product


@dataclass(frozen=True)
class Stage:
    """whole = base + sum of what was written; base = the whole before, taken through `carry`."""

    base: Tensor  # [T, D]
    whole: Tensor  # [T, D]
    writes: tuple[CapturedWrite, ...]
    carry: Carry | None = None  # layers that rescale or normalise the stream itself; None: they do not


@dataclass(frozen=True)
class CapturedLayer:
    """One sequence's run through one layer."""

    index: int
    stages: tuple[Stage, ...]

    @property
    def resid_pre(self) -> Tensor:
        """[T, D]; as the first sum takes it, hence multiplied by its carry where there is one"""
        return self.stages[0].base

    @property
    def resid_post(self) -> Tensor:
        """[T, D]"""
        return self.stages[-1].whole
