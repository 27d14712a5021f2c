"""Find what a decoder layer adds to the residual stream, and by which modules, by watching it run once.

1. Run the layer under `Lineage`, which keeps the expression graph of the pass.
2. Walk down from the layer's output through its sums: the stream that came in must be one of the terms,
   once, itself or times constants or through a norm of the sum, which is linear at a run's statistics
   (else the layer is not additive: refused).
3. Every other term is one write. Going through factors and norms, find the module that made it: a linear
   map (its rows are the parts), experts, a parameter by itself, or none of these (opaque).
4. The linear map that reads what an attention function returned is the attention's, also where something
   that is linear at a run's statistics lies between; one whose input is computed token by token is an
   MLP's; one that mixes tokens some other way is a mixer's.
5. A write opens a new stage if something reads the sum of everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import AttentionCall, recording
from lmtt.structure.experts import is_experts, why_whole
from lmtt.structure.lineage import PACKED, Lineage, Node
from lmtt.structure.modules import is_linear, is_norm
from lmtt.structure.scatter import COLLECTS
from lmtt.structure.spec import LayerStructure, Multiply, Norm, Source, Step, Write

_MIXES_TOKENS = {
    "conv1d", "conv2d", "cumsum", "cumprod", "logcumsumexp", "einsum", "roll", "fft", "rfft", "scatter_add",
    "scaled_dot_product_attention",
}  # fmt: skip
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm"}
# What only puts numbers elsewhere.
REARRANGES = {"cat", "concat", "concatenate", "chunk", "split", "__getitem__", "stack", "unbind", "narrow"}
_TIMES = {"scale", "rows", "gain"}


def discover_layer(
    layer: nn.Module,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    index: int = 0,
    opaque: bool = False,
) -> LayerStructure:
    """The structure of `layer`, from one run over `hidden` [1, T, D] with the arguments of the dry run.

    Needs `watching(model)` around it. `index` only names the layer in errors.
    opaque: let in a sublayer that is not understood, as one part.
    Raises StructureError if the layer's output is not the incoming stream plus other terms, or one of
    these is not understood and `opaque` does not let it in.
    """
    if hidden.dim() != 3:
        raise _refuse(
            layer,
            index,
            f"it is given several streams at once, {tuple(hidden.shape)}",
            "models that keep several streams and mix them have no single one to attribute",
        )
    lineage = Lineage(layer, hidden)
    calls: list[AttentionCall] = []

    def sink(call: AttentionCall) -> None:
        calls.append(call)
        lineage.mark_attention(call.output, "registry")

    with torch.no_grad(), recording(sink), lineage:
        output = layer(hidden, *args, **(kwargs or {}))
    returned = output[0] if isinstance(output, (tuple, list)) else output
    sums = _Descent(layer, lineage, hidden.shape[-1]).sums(lineage.node(returned), index)

    source, attention_module = _attention(layer, lineage, calls)
    finder = _Finder(layer, lineage, hidden.shape[-1], source)
    writes = [write for stage, one in enumerate(sums) for write in finder.writes(one, stage)]
    structure = LayerStructure(
        writes=tuple(_one_attention(writes)),
        stages=len(sums),
        attention_module=attention_module,
        attention_source=source,
        returns_tuple=isinstance(output, (tuple, list)),
        sums=tuple(_reader_module(lineage, one.below) for one in sums[1:]),
        carries=tuple(one.carry for one in sums),
        opaque=opaque,
    )
    if not opaque:
        refuse_opaque(layer, index, structure)
    return structure


def refuse_opaque(layer: nn.Module, index: int, structure: LayerStructure) -> None:
    """Raise StructureError for the first write that is not understood."""
    for write in structure.writes:
        if write.kind == "opaque":
            raise not_understood(layer, index, write.module, write.note)


def not_understood(layer: nn.Module, index: int, sublayer: str | None, why: str) -> StructureError:
    """The refusal of one sublayer."""
    return StructureError(
        f"layer {index} ({type(layer).__name__}), {sublayer or 'a sublayer'} cannot be taken apart: {why}",
        remedy="opaque=True (--opaque) lets it in as one part",
    )


def _refuse(layer: nn.Module, index: int, why: str, remedy: str | None = None) -> StructureError:
    return StructureError(
        f"layer {index} ({type(layer).__name__}) is not a sum onto the residual stream: {why}", remedy=remedy
    )


@dataclass(frozen=True)
class _Sum:
    """One stage: below, taken through the steps of `carry`, + terms."""

    below: Node
    terms: tuple[tuple[Node, tuple[Step, ...]], ...]  # each with the steps from it to the sum
    carry: tuple[Step, ...]


class _Descent:
    """From a layer's output down to the stream that came in."""

    def __init__(self, layer: nn.Module, lineage: Lineage, width: int) -> None:
        self._layer, self._lineage, self._width = layer, lineage, width
        self._carriers: dict[int, int] = {}

    def sums(self, out: Node, index: int) -> list[_Sum]:
        """The sums on the way, the first one first."""
        stream, times = self._lineage.stream, self._carried(out)
        if times != 1:
            made = out.modules[-1] if out.modules else out.made_by
            raise _refuse(
                self._layer,
                index,
                f"its output is made by {made!r}"
                if times == 0
                else f"the incoming stream is added {times} times",
            )
        sums: list[_Sum] = []
        node, terms, path = out, list[tuple[Node, tuple[Step, ...]]](), tuple[Step, ...]()
        here: str | None = None  # the norm that only takes `node` along; its readings are no readings
        rescaled = 0  # readings of `node` that only rescale it
        while True:
            read = [reader for reader in node.read_by if here is None or reader != here]
            if node is stream or (node is not out and len(read) > rescaled):
                sums.append(_Sum(node, tuple(terms[::-1]), path))
                terms, path = [], ()
            if node is stream:
                return _without_empty(sums[::-1])
            norm, here, rescaled = self._norm(node), None, 0
            if norm is not None:
                here, path = norm, (Norm(norm), *path)
                node = self._lineage.module_input[norm]
            elif node.op == "add":
                below = next(part for part in node.inputs if self._carried(part))
                terms += [(part, path) for part in node.inputs if part is not below]
                node = below
            else:
                rescaled, path = 1, (_step(node), *path)
                node = node.inputs[0]

    def _carried(self, node: Node) -> int:
        """How many times the incoming stream is a term of this sum."""
        if node is self._lineage.stream:
            return 1
        if id(node) not in self._carriers:
            self._carriers[id(node)] = 0
            norm = self._norm(node)
            if norm is not None:
                self._carriers[id(node)] = self._carried(self._lineage.module_input[norm])
            elif node.op == "add":
                self._carriers[id(node)] = sum(self._carried(part) for part in node.inputs)
            elif node.op in ("scale", "gain") and _is_constant(self._lineage, node):
                self._carriers[id(node)] = self._carried(node.inputs[0])
        return self._carriers[id(node)]

    def _norm(self, node: Node) -> str | None:
        """The norm that returned this, if it was given a sum that the stream is a term of."""
        for name in node.modules:
            module = self._layer.get_submodule(name)
            if self._lineage.calls[name] != 1 or not is_norm(module, self._width) or _is_inert(module):
                continue
            given = self._lineage.module_input.get(name)
            if given is not None and given is not node and self._carried(given):
                return name
        return None


def _without_empty(sums: list[_Sum]) -> list[_Sum]:
    """A sum that nothing is added in is a part of the next one's carry, as with a norm at the start."""
    kept: list[_Sum] = []
    empty: _Sum | None = None
    for one in sums:
        whole = one if empty is None else _Sum(empty.below, one.terms, (*empty.carry, *one.carry))
        empty = None if one.terms else whole
        if one.terms:
            kept.append(whole)
    return kept if empty is None else [*kept, empty]


def _is_constant(lineage: Lineage, node: Node) -> bool:
    """The factor of this product does not depend on the stream."""
    return all(a is not lineage.stream for factor in node.inputs[1:] for a in factor.ancestors())


def _step(node: Node) -> Multiply:
    return Multiply(node.site, node.operand, node.inverse, node.factor)


def _reader_module(lineage: Lineage, version: Node) -> str | None:
    """A module called once whose input is exactly this version of the stream."""
    names = [n for n in version.read_in if lineage.calls[n] == 1 and lineage.module_input.get(n) is version]
    return names[0] if names else None


@dataclass(frozen=True)
class _Term:
    """A tensor that a module returned, and the steps from it to the stream."""

    node: Node
    path: tuple[Step, ...]
    maker: str | None = None
    kind: str = "unknown"  # linear, experts, packed, scattered, constant or unknown
    note: str = ""


class _Finder:
    """Name what is behind each term of one layer's sums."""

    def __init__(self, layer: nn.Module, lineage: Lineage, width: int, source: Source | None) -> None:
        self._layer, self._lineage, self._width, self._source = layer, lineage, width, source
        self._parameters = {
            p.untyped_storage().data_ptr(): (name, p) for name, p in layer.named_parameters() if p.numel()
        }

    def writes(self, one: _Sum, stage: int) -> list[Write]:
        return [self._write(term, stage) for node, path in one.terms for term in self._terms(node, path)]

    def _terms(self, node: Node, path: tuple[Step, ...]) -> list[_Term]:
        """The terms of a sum, down to tensors that a linear map or experts returned."""
        norm: str | None = None
        for name in node.modules:
            module = self._layer.get_submodule(name)
            if is_linear(module):
                return [_Term(node, path, name, "linear")]
            if is_experts(module) and node.op != "fold":
                known = why_whole(module, 1) is None or not self._scatters(node)
                return [_Term(node, path, name, "experts" if known else "scattered")]
            if norm is None and is_norm(module, self._width) and not _is_inert(module):
                norm = name
        if norm is not None:
            given = self._lineage.module_input[norm]
            inner = self._terms(given, (Norm(norm), *path))
            if any(term.kind == "unknown" for term in inner):
                where = next(t for t in inner if t.kind == "unknown")
                made = where.maker or where.node.made_by
                return [_Term(node, path, norm, "unknown", f"a norm of what {made!r} returned")]
            return inner
        if node.op == "add":
            terms = [t for part in node.inputs for t in self._terms(part, path)]
            # A sum with a term that is not understood stays whole if the sum itself has a module's name.
            unknown = next((t for t in terms if t.kind == "unknown" and t.maker is None), None)
            if unknown is not None and node.modules:
                return [_Term(node, path, node.modules[-1], "unknown", unknown.note)]
            return terms
        if node.op in _TIMES and (node.site is not None or node.factor is not None):
            return self._terms(node.inputs[0], (_step(node), *path))
        if node.op == "fold":
            product = node.inputs[0]
            packed = self._packed(product)
            if packed is not None:
                return [_Term(product, path, packed, "packed")]
        if self._scatters(node):
            return [_Term(node, path, node.within, "scattered")]
        constant = self._parameters.get(node.storage)
        if constant is not None and node.op == "leaf":
            return [_Term(node, path, constant[0], "constant")]
        return [_Term(node, path, node.modules[-1] if node.modules else None, "unknown", self._unknown(node))]

    def _unknown(self, node: Node) -> str:
        if node.made_by in COLLECTS and any(ancestor.attention is not None for ancestor in node.ancestors()):
            return "experts that mix tokens, such as an attention with several output projections"
        return f"made by {node.made_by!r}, not by a linear map"

    def _scatters(self, node: Node) -> bool:
        """A module's own code adds up rows here that were computed token by token."""
        if node.made_by not in COLLECTS or not node.within:
            return False
        inside, complete = _sublayer(self._lineage, node)
        return complete and not any(a.attention is not None or _mixes(self._lineage, a) for a in inside)

    def _packed(self, node: Node) -> str | None:
        """The parameter [E, F, D] that this batched product [E, T, D] was taken with, if it was."""
        if node.made_by not in PACKED or len(node.inputs) != 2 or node.site is None:
            return None
        name, parameter = self._parameters.get(node.inputs[1].storage, (None, None))
        return name if parameter is not None and parameter.dim() == 3 else None

    def _write(self, term: _Term, stage: int) -> Write:
        """Say what kind of sublayer a term closes."""
        name, lineage = term.maker, self._lineage
        write = Write("opaque", name, stage, term.path, term.note)
        if term.kind == "unknown" or name is None:
            return write
        if term.kind == "constant":
            return replace(write, kind="constant")
        if term.kind == "packed":
            return replace(write, kind="experts", product=term.node.site)
        if lineage.calls[name] != 1:
            return replace(write, note=f"it is called {lineage.calls[name]} times")
        if term.kind == "scattered":
            return replace(write, kind="experts", scattered=True)
        if term.kind == "experts":
            why = why_whole(self._layer.get_submodule(name), lineage.module_input[name].width // self._width)
            return replace(write, kind="experts") if why is None else replace(write, note=why)
        return self._linear(write, lineage.module_input[name])

    def _linear(self, write: Write, node: Node) -> Write:
        """The kind of a linear map by its input."""
        if node.attention is not None:
            if node.attention != self._source:
                return replace(write, note=f"a second way of attending ({node.attention})")
            return replace(write, kind="attention", calls=(node.call,))
        reached = _between(self._layer, self._lineage, node)
        if reached:
            if any(found.attention != self._source for found in reached):
                return replace(write, note="attention seen in several ways")
            return replace(
                write,
                kind="attention",
                calls=tuple(sorted({found.call for found in reached})),
                through=True,
                note="what lies between the attention and the linear map is held at its values",
            )
        inside, complete = _sublayer(self._lineage, node)
        if not complete:
            return replace(write, note="its input was computed out of sight")
        if any(ancestor.attention is not None for ancestor in inside):
            return replace(write, note="something that is not linear lies behind its attention")
        mixing = next((ancestor.made_by for ancestor in inside if _mixes(self._lineage, ancestor)), None)
        if mixing is None:
            return replace(write, kind="mlp")
        return replace(write, kind="mixer", note=f"tokens are mixed by {mixing!r}")


def _is_inert(module: nn.Module) -> bool:
    return isinstance(module, (nn.Identity, nn.Dropout))


def _between(layer: nn.Module, lineage: Lineage, node: Node) -> list[Node]:
    """The attention calls that `node` is a linear function of (all else held), [] if it is not one."""
    if node.attention is not None:
        return [node]
    for name in node.modules:
        module = layer.get_submodule(name)
        if next(module.children(), None) is None and not is_linear(module) and not _is_inert(module):
            given = lineage.module_input.get(name)
            if given is None or given is node or any(p.dim() > 1 for p in module.parameters(recurse=False)):
                continue
            return _between(layer, lineage, given)
    if node.op == "add" or (node.op == "leaf" and node.made_by in REARRANGES):
        found = [_between(layer, lineage, part) for part in node.inputs]
        return [] if not all(found) else [call for calls in found for call in calls]
    if node.op in _TIMES or node.op == "gate":
        attending = [part for part in node.inputs if _attends(part)]
        return _between(layer, lineage, attending[0]) if len(attending) == 1 else []
    return []


def _attends(node: Node) -> bool:
    return any(ancestor.attention is not None for ancestor in node.ancestors())


def _sublayer(lineage: Lineage, node: Node) -> tuple[list[Node], bool]:
    """What `node` was made from, back to the stream, and whether the stream was reached."""
    stack, seen, inside, reached = [node], set(), [], False
    while stack:
        here = stack.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if _carries(lineage, here):
            reached = True
            continue
        inside.append(here)
        stack.extend(here.inputs)
    return inside, reached


def _carries(lineage: Lineage, node: Node) -> bool:
    """The stream that came in is a term of this sum, or it itself."""
    if node is lineage.stream:
        return True
    if node.op == "add":
        return any(_carries(lineage, part) for part in node.inputs)
    return node.op in ("scale", "gain") and _is_constant(lineage, node) and _carries(lineage, node.inputs[0])


def _mixes(lineage: Lineage, node: Node) -> bool:
    if node.op != "leaf":
        return False
    if node.made_by in _MIXES_TOKENS:
        return True
    # A parameter's part that routing has picked is a parameter still.
    moving = [part for part in node.inputs if part.storage not in lineage.stored]
    live = [part for part in moving if any(a is lineage.stream for a in part.ancestors())]
    return node.made_by in _PRODUCTS and len(live) > 1


def _one_attention(writes: list[Write]) -> list[Write]:
    """The block that the graph draws holds one attention; a second one's write stays whole."""
    first = next((i for i, write in enumerate(writes) if write.kind == "attention"), None)
    return [
        replace(write, kind="opaque", note="a second attention in the same layer")
        if write.kind == "attention" and i != first
        else write
        for i, write in enumerate(writes)
    ]


def _attention(
    layer: nn.Module, lineage: Lineage, calls: list[AttentionCall]
) -> tuple[Source | None, str | None]:
    names = {module: name for name, module in layer.named_modules()}
    if calls and calls[0].module in names:
        return "registry", names[calls[0].module]
    if lineage.attention_inside:
        source, inside = lineage.attention_inside[0]
        return source, inside or None
    return None, None
