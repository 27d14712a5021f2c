"""Experts that a model runs one after the other, each on the tokens routed to it, and adds up by row.

    written[t] = sum over experts e and rows r with token[r] = t of g[r] * (act_e[r] @ W_e + b_e)

Where the experts' matrices are not packed in a form that `experts` reads, these products are followed from
the call that makes them, through factors per row, to the `index_add` that collects them. Nothing is assumed
of how the matrices are stored: what they are parts of says how many experts there are and which each one is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.structure.experts import MAX_EXPERT_BYTES, ExpertParts
from lmtt.structure.lineage import ADD, MUL, SAME, Key, key_of
from lmtt.structure.modules import FLOATS
from lmtt.structure.tolerance import SUBLAYER_BOUND
from lmtt.structure.watch import Watch

COLLECTS = {"index_add", "index_add_"}
_JOINS = {"cat", "concat", "concatenate"}
_PRODUCTS = {"matmul", "__matmul__", "mm"}


@dataclass(frozen=True)
class _Rows:
    """Some rows of what experts returned: factor * (act @ weight + bias)."""

    act: Tensor  # [n, F]
    weight: Tensor  # [F, D], a view of a parameter
    bias: Tensor | None  # [D] or [n, D]

    def times(self, factor: Tensor | float) -> _Rows:
        bias = None if self.bias is None else self.bias * factor
        return replace(self, act=self.act * factor, bias=bias)

    def __len__(self) -> int:
        return self.act.shape[0]


class WatchScatter(Watch):
    """Record what the own code of one module of a layer adds up by row; a context manager around a run."""

    def __init__(self, layer: nn.Module, module: str) -> None:
        super().__init__()
        self._layer, self._module = layer, module
        self._storages = {p.untyped_storage().data_ptr() for p in layer.parameters() if p.numel()}
        self._rows: dict[Key, list[_Rows]] = {}
        self._alive: list[Tensor] = []  # an address that is freed could name two tensors
        self._inside = False
        self.collected: list[tuple[Tensor, _Rows]] = []  # token of each row [n], and the rows
        self.returned: Tensor | None = None  # the sum, flat
        self.stray = False  # something was added that is no expert's product

    def hook_modules(self) -> None:
        def turn(on: bool) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._inside = on
                if not on:
                    self._rows.clear()
                    self._alive.clear()

            return hook

        module = self._layer.get_submodule(self._module)
        self.hooks.append(module.register_forward_pre_hook(turn(True)))
        self.hooks.append(module.register_forward_hook(turn(False), always_call=True))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside and isinstance(output, Tensor):
            name = getattr(func, "__name__", "")
            if name in COLLECTS:
                self._collect(output, args, kwargs or {})
            else:
                rows = self._follow(name, args, kwargs or {}, output)
                if rows is not None:
                    self._rows[key_of(output)] = rows
                    self._alive.append(output)
        return output

    def _follow(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> list[_Rows] | None:
        """What rows a call returned, if it is one of those that experts are made of."""
        if name == "linear" and len(args) >= 2 and self._stored(args[1]):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return _product(args[0], args[1].T, bias)
        if name in _PRODUCTS and len(args) == 2 and self._stored(args[1]):
            return _product(args[0], args[1], None)
        if name in _JOINS:
            parts = [self._known(part) for part in args[0]]
            kept = [part for part, given in zip(parts, args[0], strict=True) if given.numel()]
            whole = all(part is not None for part in kept) and output.dim() == 2
            return [rows for part in kept for rows in part or []] if whole else None
        known = self._known(args[0]) if args else None
        if name in MUL and known is None and len(args) == 2:
            args, known = args[::-1], self._known(args[1])
        if known is None:
            return None
        if name in SAME and output.shape[-1] == known[0].weight.shape[1]:
            return known
        if name in MUL:
            return _scaled(known, args[1])
        if name in ADD and len(known) == 1 and isinstance(args[1], Tensor) and known[0].bias is None:
            same = args[1].numel() in (output.shape[-1], output.numel())
            return [replace(known[0], bias=args[1].reshape(-1, output.shape[-1]))] if same else None
        return None

    def _known(self, value: Any) -> list[_Rows] | None:
        return self._rows.get(key_of(value)) if isinstance(value, Tensor) else None

    def _stored(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.dim() == 2
            and value.untyped_storage().data_ptr() in self._storages
        )

    def _collect(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("self", "dim", "index", "source"), args, strict=False)) | kwargs
        index, source = given["index"], given["source"]
        if not output.is_floating_point():
            return
        rows = self._known(source)
        if rows is None or given["dim"] != 0 or given.get("alpha", 1) != 1:
            self.stray |= source.numel() > 0
        else:
            for piece, at in zip(rows, torch.split(index, [len(r) for r in rows]), strict=True):
                self.collected.append((at, piece))
        self.returned = output.detach().clone()


def _product(act: Tensor, weight: Tensor, bias: Tensor | None) -> list[_Rows]:
    return [_Rows(act.reshape(-1, act.shape[-1]), weight, bias)]


def _scaled(rows: list[_Rows], factor: Any) -> list[_Rows] | None:
    """Rows times a number, or one number for each of them."""
    if not isinstance(factor, Tensor):
        return [r.times(float(factor)) for r in rows] if isinstance(factor, (int, float)) else None
    if factor.numel() == 1:
        return [r.times(factor.reshape(())) for r in rows]
    if factor.numel() != sum(len(r) for r in rows) or factor.shape[-1] != 1:
        return None
    pieces = torch.split(factor.reshape(-1, 1), [len(r) for r in rows])
    return [r.times(piece) for r, piece in zip(rows, pieces, strict=True)]


def scattered_parts(layer: nn.Module, seen: WatchScatter, shape: torch.Size) -> ExpertParts | str:
    """The parts of one run, [T, D] = `shape`, or why they are taken whole."""
    if seen.returned is None or not seen.collected:
        return "experts that were not seen at work"
    if seen.stray:
        return "an expert that is not a linear map of its neurons"
    down = _Down.find(layer, seen.collected[0][1].weight)
    if down is None:
        return "experts whose matrices are stored in an unknown form"
    T, D = shape
    E, F = len(down.experts), seen.collected[0][1].weight.shape[0]
    if down.dtype not in FLOATS:
        return f"expert weights stored as {down.dtype}"
    size = E * F * (T + (0 if down.is_view else D)) * down.dtype.itemsize
    if size > MAX_EXPERT_BYTES:
        return f"{E * F} neurons would take {size / 2**30:.1f} GiB"
    returned = seen.returned.reshape(shape)
    wide = torch.float64 if returned.dtype == torch.float64 else torch.float32
    act = returned.new_zeros(T, E, F)
    total = torch.zeros(shape, dtype=wide, device=returned.device)
    bias: Tensor | None = None
    for token, rows in seen.collected:
        expert = down.number(rows.weight)
        if expert is None or rows.weight.shape != (F, D):
            return "experts of different forms"
        act[:, expert].index_add_(0, token, rows.act.to(act.dtype))
        total.index_add_(0, token, (rows.act @ rows.weight).to(wide))
        if rows.bias is not None:
            bias = torch.zeros_like(total) if bias is None else bias
            bias.index_add_(0, token, rows.bias.expand(len(rows), D).to(wide))
    summed = total if bias is None else total + bias
    error, largest = float((summed - returned.to(wide)).abs().max()), float(returned.abs().max())
    if not error <= SUBLAYER_BOUND[returned.dtype] * largest:
        return f"experts whose neurons do not add up (to {error:.1e} of {largest:.1e})"
    w_down = down.weights(F, D)
    return ExpertParts(act.flatten(1), w_down, None if bias is None else bias.to(returned.dtype))


@dataclass(frozen=True)
class _Down:
    """Where the experts' matrices [F, D] lie: in one parameter, or in one parameter for each."""

    experts: list[Tensor]  # [F, D] each
    is_view: bool  # they lie one after the other, row by row
    dtype: torch.dtype

    @staticmethod
    def find(layer: nn.Module, one: Tensor) -> _Down | None:
        """All of them, from one."""
        owner = next(
            (
                (name, p)
                for name, p in layer.named_parameters()
                if p.numel() and p.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
            ),
            None,
        )
        if owner is None:
            return None
        name, parameter = owner
        size = one.numel()
        rows = one.is_contiguous()
        if not rows and not one.T.is_contiguous():
            return None
        form = one.shape if rows else one.T.shape
        if parameter.numel() > size:
            if parameter.numel() % size or not parameter.is_contiguous():
                return None
            blocks = list(parameter.detach().reshape(-1, *form))
        else:
            kind = _kind(name)
            blocks = [p.detach() for n, p in layer.named_parameters() if _kind(n) == kind]
            if any(block.shape != form for block in blocks):
                return None
            rows = False  # apart from each other
            if one.is_contiguous():
                return _Down(blocks, False, parameter.dtype)
        return _Down([block if one.is_contiguous() else block.T for block in blocks], rows, parameter.dtype)

    def number(self, weight: Tensor) -> int | None:
        """Which expert's matrix this is."""
        at = weight.data_ptr()
        return next((n for n, block in enumerate(self.experts) if block.data_ptr() == at), None)

    def weights(self, F: int, D: int) -> Tensor:
        """[E * F, D]; a view where they lie one after the other."""
        if self.is_view:
            first = self.experts[0]
            return first.as_strided((len(self.experts) * F, D), (D, 1))
        return torch.stack(self.experts).reshape(-1, D)


def _kind(name: str) -> str:
    """A parameter's name without the numbers in it: alike for the experts of one list."""
    return re.sub(r"\.\d+\.", ".#.", f".{name}.")
