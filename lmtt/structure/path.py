"""The way from a module's output to the stream: factors and norms, read at each run and folded into parts.

A linear map's parts are act[i, n] * weight[n]. A factor that is one number or one per token goes into
`row`, one per channel into the weight; a norm held at the run's statistics does both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.lineage import PACKED, SiteCounter
from lmtt.structure.modules import LinearisedNorm, linearise_norm
from lmtt.structure.spec import Carry, Multiply, Norm, Site, Step
from lmtt.structure.watch import Watch


class WatchSites(Watch):
    """Keep the arguments of the calls at some sites of a layer's forward; a context manager around it."""

    def __init__(self, layer: nn.Module, size: int, wanted: Iterable[Site]) -> None:
        super().__init__()
        self._layer, self._wanted = layer, set(wanted)
        self._functions = {site.function for site in self._wanted}
        self._counter = SiteCounter(size)
        self._inside: list[str] = []
        self.arguments: dict[Site, tuple[Any, ...]] = {}
        self.products: dict[Site, Tensor] = {}  # results of batched products

    def hook_modules(self) -> None:
        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._inside.append(name)

        def leave(*_: Any) -> None:
            self._inside.pop()

        for name, module in self._layer.named_modules():
            if name:
                self.hooks.append(module.register_forward_pre_hook(enter(name)))
                self.hooks.append(module.register_forward_hook(leave, always_call=True))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in self._functions and isinstance(output, Tensor):
            site = self._counter.at(self._inside[-1] if self._inside else "", name, output)
            if site is not None and site in self._wanted:
                self.arguments[site] = args
                if name in PACKED:
                    self.products[site] = output
        return output


@dataclass(frozen=True)
class LinearParts:
    """written[i] = row[i] * act[i] @ weight + bias[i], act [T, n] being left alone."""

    weight: Tensor | None  # [n, D]; None where only the sum is of interest
    bias: Tensor | None  # [D] or [T, D]
    row: Tensor | None  # [T]
    written: Tensor  # [T, D]


class Passage:
    """The steps of one layer's run."""

    def __init__(
        self,
        layer: nn.Module,
        where: str,
        arguments: dict[Site, tuple[Any, ...]],
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        terms: dict[str, int],
    ) -> None:
        """inputs, outputs: of the norms. terms: how many terms each norm is of."""
        self._layer, self._where, self._arguments = layer, where, arguments
        self._inputs, self._outputs, self._left = inputs, outputs, dict(terms)
        self._norms: dict[str, LinearisedNorm] = {}
        self._shifted: set[str] = set()
        self._rest: dict[str, Tensor] = {}  # what a norm of a sum returned, less the terms done

    def apply(self, parts: LinearParts, path: Iterable[Step]) -> LinearParts:
        """What the parts are after each of the steps."""
        for step in path:
            parts = self._norm(parts, step) if isinstance(step, Norm) else self._times(parts, step)
        return parts

    def factor(self, step: Multiply, shape: torch.Size) -> Tensor | float:
        """A factor as it was this time: a number, [T, 1] or [D]."""
        if step.site is None:
            assert step.value is not None
            return 1.0 / step.value if step.inverse else step.value
        if step.site not in self._arguments:
            raise StructureError(
                f"{self._where}: its output was not multiplied by {step.site.function!r} this time",
                remedy="discover this layer's structure again",
            )
        value = self._arguments[step.site][step.operand]
        if not isinstance(value, Tensor):
            return 1.0 / float(value) if step.inverse else float(value)
        value = value.detach()
        value = value.reciprocal() if step.inverse else value
        if value.numel() == 1:
            return value.reshape(())
        if value.shape[-1] == 1 and value.numel() == shape[0]:
            return value.reshape(-1, 1)
        if value.numel() == value.shape[-1] == shape[1]:
            return value.reshape(-1)
        raise StructureError(
            f"{self._where}: a factor of an unknown form",
            expected="one number, one per token or one per channel",
            got=tuple(value.shape),
        )

    def carry(self, base: Tensor, path: Iterable[Step]) -> Carry | None:
        """What the stream `base` [T, D] itself goes through on a path; None where there is nothing.

        A norm's shift is left to the terms that go through it together with the stream.
        """
        steps: list[Tensor | LinearisedNorm] = []
        for step in path:
            if isinstance(step, Multiply):
                factor = self.factor(step, base.shape)
                # A number is as exact as the model's own and takes on the dtype of what it meets.
                exact = not isinstance(factor, Tensor)
                steps.append(torch.tensor(factor, dtype=torch.float64) if exact else torch.as_tensor(factor))
                base = base * factor
                continue
            norm, returned = self._held(step.module, base.shape)
            if self._left.get(step.module, 0) == 0 and norm.shift is not None:
                raise StructureError(
                    f"{self._where}: {step.module} shifts the stream, and nothing is added to it there"
                )
            base = norm.row[:, None] * norm.fold(base)
            self._rest[step.module] = returned - base
            steps.append(norm)
        return Carry(tuple(steps)) if steps else None

    def _times(self, parts: LinearParts, step: Multiply) -> LinearParts:
        factor = self.factor(step, parts.written.shape)
        dtype = parts.written.dtype
        if isinstance(factor, Tensor):
            factor = factor.to(dtype)
        written = parts.written * factor
        bias = None if parts.bias is None else parts.bias * factor
        if isinstance(factor, Tensor) and factor.dim() == 1:
            weight = None if parts.weight is None else parts.weight * factor
            return LinearParts(weight, bias, parts.row, written)
        T = written.shape[0]
        row = (
            factor[:, 0] if isinstance(factor, Tensor) and factor.dim() == 2 else written.new_ones(T) * factor
        )
        return LinearParts(parts.weight, bias, row if parts.row is None else parts.row * row, written)

    def _norm(self, parts: LinearParts, step: Norm) -> LinearParts:
        name = step.module
        norm, returned = self._held(name, parts.written.shape)
        bias = None if parts.bias is None else norm.row[:, None] * norm.fold(parts.bias)
        if norm.shift is not None and name not in self._shifted:
            self._shifted.add(name)  # the shift is one: it goes to the first of the terms
            shift = norm.shift
            bias = shift if bias is None else bias + shift
        else:
            shift = None
        written = self._rest.get(name, returned)
        self._left[name] -= 1
        if self._left[name] > 0:  # the last term gets what is left, so that the sum is the model's own
            rest = written
            written = norm.row[:, None] * norm.fold(parts.written)
            written = written if shift is None else written + shift
            self._rest[name] = rest - written
        return LinearParts(
            weight=None if parts.weight is None else norm.fold(parts.weight),
            bias=bias,
            row=norm.row if parts.row is None else parts.row * norm.row,
            written=written,
        )

    def _held(self, name: str, shape: torch.Size) -> tuple[LinearisedNorm, Tensor]:
        """A norm as it was on this run, and what it returned."""
        if name not in self._outputs:
            raise StructureError(
                f"{self._where}: {name} did not run", remedy="discover this layer's structure again"
            )
        given, returned = self._inputs[name].reshape(shape), self._outputs[name].reshape(shape)
        if name not in self._norms:
            self._norms[name] = linearise_norm(self._layer.get_submodule(name), given, returned, self._where)
        return self._norms[name], returned


def sites_of(path: Iterable[Step]) -> set[Site]:
    """The calls whose arguments a path needs."""
    return {step.site for step in path if isinstance(step, Multiply) and step.site is not None}


def norms_of(path: Iterable[Step]) -> set[str]:
    """The norms on a path."""
    return {step.module for step in path if isinstance(step, Norm)}
