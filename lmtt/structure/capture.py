"""Run one layer once and keep what its writes are made of.

1. Hooks go on just the modules that discovery named; the attention function is recorded as it is called,
   and factors at the very calls that multiply by them.
2. The layer runs with the arguments of the dry run: the same call, the same bits.
3. Each write becomes a record of parts: q, k, v and W_O by head; activations and W_down; or one opaque
   tensor. Factors and norms on the way to the stream go into `row_scale`, the folded weights and the bias,
   so that the parts still add up to what was written.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.kernels.types import Attention
from lmtt.structure.attention_hook import AttentionCall, WatchAttention, recording
from lmtt.structure.discover import not_understood
from lmtt.structure.experts import ExpertParts, expert_parts, packed_parts
from lmtt.structure.heads import WatchBetween, assemble_heads
from lmtt.structure.modules import linear_bias, linear_weight
from lmtt.structure.path import LinearParts, Passage, WatchSites, norms_of, sites_of
from lmtt.structure.scatter import WatchScatter, scattered_parts
from lmtt.structure.spec import (
    AttentionWrite,
    CapturedLayer,
    CapturedWrite,
    Carry,
    LayerStructure,
    MlpWrite,
    OpaqueWrite,
    Site,
    Stage,
    Step,
    Write,
)


def capture_layer(
    layer: nn.Module,
    structure: LayerStructure,
    index: int,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, CapturedLayer]:
    """Run `layer` over hidden [1, T, D]; return its output [1, T, D] and what it wrote.

    Needs `watching(model)` around it. Tensors keep the model's dtype and device. Weights are views, or
    copies that live as long as the result does (post-norm folding, quantised weights).
    Raises StructureError if the layer does not run as `structure` says.
    """
    if hidden.shape[0] != 1:
        raise StructureError(
            f"layer {index} was given a batch of {hidden.shape[0]}",
            expected="one sequence",
            remedy="pass prompts one by one",
        )
    seen = _Seen()
    before = hidden._version if not hidden.is_inference() else None
    with torch.no_grad(), ExitStack() as stack:
        _hook(layer, structure, seen, hidden.numel(), stack)
        output = layer(hidden, *args, **(kwargs or {}))
    if before is not None and hidden._version != before:
        raise StructureError(
            f"layer {index} overwrote the residual stream it was given", expected="a new tensor"
        )
    if isinstance(output, (tuple, list)) != structure.returns_tuple:
        raise StructureError(
            f"layer {index} returned a {type(output).__name__}",
            expected="a tuple" if structure.returns_tuple else "a tensor",
            remedy="discover this layer's structure again",
        )
    returned: Tensor = output[0] if structure.returns_tuple else output
    with torch.no_grad():
        captured = _assemble(layer, structure, index, hidden[0], returned[0], seen)
    return returned, captured


@dataclass
class _Seen:
    """What the hooks saw during one run."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)
    sites: dict[Site, tuple[Any, ...]] = field(default_factory=dict)  # arguments of the calls there
    products: dict[Site, Tensor] = field(default_factory=dict)  # what batched products returned
    between: WatchBetween | None = None  # what lies between the attention and its linear map
    scatters: dict[str, WatchScatter] = field(default_factory=dict)  # experts that run one by one


def _hook(layer: nn.Module, structure: LayerStructure, seen: _Seen, size: int, stack: ExitStack) -> None:
    paths = [*(write.path for write in structure.writes), *structure.carries]
    norms = {norm for path in paths for norm in norms_of(path)}
    returning = norms | {write.module for write in structure.writes}
    modules = dict(layer.named_modules())

    def before(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if given:
                seen.inputs[name] = given[0]
                seen.arguments[name] = given

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            # A copy: some models add the next sublayer onto this very tensor.
            seen.outputs[name] = tensor.clone()

        return hook

    for name in sorted(n for n in returning | set(structure.sums) if n is not None):
        if name not in modules:
            continue  # a parameter
        stack.callback(modules[name].register_forward_pre_hook(before(name), with_kwargs=True).remove)
        if name in returning:
            stack.callback(modules[name].register_forward_hook(after(name)).remove)
    sites = {site for path in paths for site in sites_of(path)}
    sites |= {write.product for write in structure.writes if write.product is not None}
    if sites:
        watch = stack.enter_context(WatchSites(layer, size, sites))
        seen.sites, seen.products = watch.arguments, watch.products
    for write in structure.writes:
        if write.through and write.module is not None:
            seen.between = stack.enter_context(WatchBetween(layer, write.module))
        if write.scattered and write.module is not None:
            seen.scatters[write.module] = stack.enter_context(WatchScatter(layer, write.module))

    def sink(call: AttentionCall) -> None:
        seen.calls.append(call)
        if seen.between is not None:
            seen.between.mark(call.output)

    if structure.attention_source == "registry":
        stack.enter_context(recording(sink))
    elif structure.attention_source is not None:
        stack.enter_context(WatchAttention(sink))


def _assemble(
    layer: nn.Module, structure: LayerStructure, index: int, before: Tensor, after: Tensor, seen: _Seen
) -> CapturedLayer:
    reader = _Reader(layer, structure, index, before.shape, seen)
    stages = []
    base = before
    for number in range(structure.stages):
        carry = reader.carry(base, structure.carries[number]) if structure.carries else None
        base = base if carry is None else carry.apply(base)
        here = [write for write in structure.writes if write.stage == number]
        named = [write for write in here if write.module is not None]
        writes = reader.writes(named)
        probe = None if number == structure.stages - 1 else structure.sums[number]
        if number == structure.stages - 1:
            whole = after
        elif probe is not None:
            whole = seen.inputs[probe].reshape(base.shape)
        elif len(named) == len(here):
            # Nothing is given this sum as it is: form it as the layer did, write by write.
            whole = base
            for write in writes:
                whole = whole + write.written
        else:
            raise not_understood(layer, index, None, here[-1].note)
        if len(named) < len(here):  # what no module returned is the rest of the sum
            rest = whole - base
            for write in writes:
                rest = rest - write.written
            note = next(write.note for write in here if write.module is None)
            writes.append(OpaqueWrite(rest, "opaque", note))
        stages.append(Stage(base, whole, tuple(writes), carry))
        base = whole
    return CapturedLayer(index, tuple(stages))


def side_by_side(mlps: list[MlpWrite]) -> MlpWrite:
    """Several MLPs as one, their neurons one after the other's."""
    if len(mlps) == 1:
        return mlps[0]
    act = [w.act if w.row_scale is None else w.act * w.row_scale[:, None] for w in mlps]
    biases = [w.bias for w in mlps if w.bias is not None]
    return MlpWrite(
        act=torch.cat(act, 1),
        w_down=torch.cat([w.w_down for w in mlps]),
        bias=torch.stack([b.broadcast_to(mlps[0].written.shape) for b in biases]).sum(0) if biases else None,
        row_scale=None,
        written=torch.stack([w.written for w in mlps]).sum(0),
    )


class _Reader:
    """One run's tensors become records of parts."""

    def __init__(
        self, layer: nn.Module, structure: LayerStructure, index: int, shape: torch.Size, seen: _Seen
    ) -> None:
        self._layer, self._structure, self._index = layer, structure, index
        self._shape, self._seen = shape, seen
        paths = [norms_of(write.path) for write in structure.writes]
        terms = Counter(norm for path in paths for norm in path)
        self._passage = Passage(layer, f"layer {index}", seen.sites, seen.inputs, seen.outputs, terms)

    def carry(self, base: Tensor, path: tuple[Step, ...]) -> Carry | None:
        """What the stream itself goes through in one stage."""
        return self._passage.carry(base, path)

    def writes(self, here: list[Write]) -> list[CapturedWrite]:
        """The writes of one stage; constants go to the bias of its attention, else of its MLP."""
        named = [write for write in here if write.kind != "constant"]
        captured = [self._write(write) for write in named]
        if any(write.kind == "experts" for write in named):
            # One MLP of the routed experts and the shared ones beside them, whose neurons come last.
            pairs = sorted(zip(named, captured, strict=True), key=lambda pair: pair[0].kind != "experts")
            mlps = [write for _, write in pairs if isinstance(write, MlpWrite)]
            captured = [write for write in captured if not isinstance(write, MlpWrite)]
            captured += [side_by_side(mlps)] if mlps else []
        for write in here:
            if write.kind == "constant":
                constant = self._constant(write)
                at = _home_of_constants(captured)
                if at is None:
                    captured.append(OpaqueWrite(constant.expand(self._shape), "constant", "a parameter"))
                else:
                    home = captured[at]
                    assert not isinstance(home, OpaqueWrite)
                    bias = constant if home.bias is None else home.bias + constant
                    captured[at] = replace(home, bias=bias, written=home.written + constant)
        return captured

    def _write(self, write: Write) -> CapturedWrite:
        assert write.module is not None
        where = f"layer {self._index}, {write.module}"
        try:
            return self._taken_apart(write, where)
        except StructureError as error:
            if not self._structure.opaque:
                raise
            # The caller lets it in: its output is still known.
            why = str(error).removeprefix(f"{where}: ")
            return OpaqueWrite(self._passed(write, where).written, "opaque", why, write.module)

    def _passed(self, write: Write, where: str) -> LinearParts:
        """What a write added, with nothing said of its parts."""
        return self._passage.apply(LinearParts(None, None, None, self._returned(write, where)), write.path)

    def _returned(self, write: Write, where: str) -> Tensor:
        """What the write's module returned, [T, D]."""
        if write.product is not None and write.product in self._seen.sites:
            return self._seen.products[write.product].sum(0).reshape(self._shape)
        scatter = self._seen.scatters.get(write.module or "")
        if scatter is not None and scatter.returned is not None:
            return scatter.returned.reshape(self._shape)
        if write.module not in self._seen.outputs:
            raise StructureError(
                f"{where} did not run",
                expected="the modules that discovery saw",
                remedy="discover this layer's structure again",
            )
        return self._seen.outputs[write.module].reshape(self._shape)

    def _taken_apart(self, write: Write, where: str) -> CapturedWrite:
        if write.kind in ("mixer", "opaque"):
            return OpaqueWrite(self._passed(write, where).written, write.kind, write.note, write.module or "")
        returned = self._returned(write, where)
        if write.kind == "experts":
            experts = self._experts(write, returned)
            if isinstance(experts, str) and self._structure.opaque:
                return OpaqueWrite(self._passed(write, where).written, "opaque", experts, write.module or "")
            if isinstance(experts, str):
                raise not_understood(self._layer, self._index, write.module, experts)
            act, weight, bias = experts.act, experts.w_down, experts.bias
        else:
            assert write.module is not None
            module = self._layer.get_submodule(write.module)
            act = self._seen.inputs[write.module].reshape(self._shape[0], -1)
            weight = linear_weight(module, act.dtype, act.device, act.shape[1])
            bias = linear_bias(module)
        if write.kind == "attention":
            attention = self._attention(write, where, weight)
            H, E = attention.w_o.shape[:2]
            parts = LinearParts(attention.w_o.flatten(0, 1), bias, None, returned)
            parts = self._passage.apply(parts, write.path)
            assert parts.weight is not None
            w_o = torch.unflatten(parts.weight, 0, (H, E))
            return AttentionWrite(replace(attention, w_o=w_o, row_scale=parts.row), parts.bias, parts.written)
        parts = self._passage.apply(LinearParts(weight, bias, None, returned), write.path)
        assert parts.weight is not None
        return MlpWrite(act, parts.weight, parts.bias, parts.row, parts.written)

    def _experts(self, write: Write, returned: Tensor) -> ExpertParts | str:
        assert write.module is not None
        if write.product is not None:
            return packed_parts(*self._seen.sites[write.product])
        if write.scattered:
            return scattered_parts(self._layer, self._seen.scatters[write.module], self._shape)
        return expert_parts(
            self._layer.get_submodule(write.module), self._seen.arguments[write.module], returned
        )

    def _attention(self, write: Write, where: str, weight: Tensor) -> Attention:
        """The attention calls whose output reached the linear map, with W_O split by head."""
        calls = self._seen.calls
        if len(calls) <= max(write.calls):
            raise StructureError(
                f"{where}: the attention function ran {len(calls)} times",
                expected=f"at least {max(write.calls) + 1}",
                remedy="discover this layer's structure again",
            )
        chosen = [calls[number] for number in write.calls]
        between = self._seen.between if write.through else None
        return assemble_heads(chosen, weight, self._shape[0], where, between)

    def _constant(self, write: Write) -> Tensor:
        """A parameter added by itself, after the steps on its way, [D] or [T, D]."""
        assert write.module is not None
        parameter = self._layer.get_parameter(write.module)
        parts = LinearParts(None, None, None, parameter.detach().expand(self._shape))
        return self._passage.apply(parts, write.path).written


def _home_of_constants(captured: list[CapturedWrite]) -> int | None:
    """The attention, else the first MLP."""
    for kind in (AttentionWrite, MlpWrite):
        for number, write in enumerate(captured):
            if isinstance(write, kind):
                return number
    return None
