"""Find what a decoder layer adds to the residual stream, and by which modules, by watching it run once.

1. Run the layer under `Lineage`, which keeps the expression graph of the pass.
2. Walk down from the layer's output through its sums: the stream that came in must be one of the terms,
   once and unscaled (else the layer is not additive, as with norms after the addition: refused).
3. Every other term is one write. Going through scalar factors, per-token factors and a norm, find the
   module that made it: a linear map (its rows are the parts), an experts module, or neither (opaque).
4. The linear map that reads what the attention function returned is the attention's; one whose input is
   computed token by token is an MLP's; one that mixes tokens some other way is a mixer's.
5. A write opens a new stage if something reads the sum of everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import AttentionCall, recording
from lmtt.structure.experts import is_experts, why_whole
from lmtt.structure.lineage import Lineage, Node
from lmtt.structure.modules import is_linear, is_norm
from lmtt.structure.spec import Kind, LayerStructure, Write

_MIXES_TOKENS = {
    "conv1d", "conv2d", "cumsum", "cumprod", "logcumsumexp", "einsum", "roll", "fft", "rfft", "scatter_add",
    "scaled_dot_product_attention",
}  # fmt: skip
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm"}


def discover_layer(
    layer: nn.Module,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    index: int = 0,
) -> LayerStructure:
    """The structure of `layer`, from one run over `hidden` [1, T, D] with the arguments of the dry run.

    Needs `watching(model)` around it. `index` only names the layer in errors.
    Raises StructureError if the layer's output is not the incoming stream plus other terms.
    """
    width = hidden.shape[-1]
    lineage = Lineage(layer, hidden)
    calls: list[AttentionCall] = []

    def sink(call: AttentionCall) -> None:
        calls.append(call)
        lineage.mark_attention(call.output, "registry")

    with torch.no_grad(), recording(sink), lineage:
        output = layer(hidden, *args, **(kwargs or {}))
    returned = output[0] if isinstance(output, (tuple, list)) else output
    versions = _versions(layer, lineage, lineage.node(returned), index)

    writes: list[Write] = []
    probes: list[str | None] = []
    stage = 0
    for below, above in pairwise(versions):
        if below is not lineage.stream and _is_read(below):
            stage += 1
            probes.append(_reader_module(layer, lineage, below))
        other = next(node for node in above.inputs if node is not below)
        writes.extend(_write(layer, lineage, term, stage, width) for term in _terms(layer, other, width))
    writes = _one_attention(writes)
    source, attention_module = _attention(layer, lineage, calls)
    return LayerStructure(
        writes=tuple(writes),
        stages=stage + 1,
        attention_module=attention_module,
        attention_source=source,
        returns_tuple=isinstance(output, (tuple, list)),
        sums=tuple(probes),
    )


def _refuse(layer: nn.Module, index: int, why: str) -> StructureError:
    return StructureError(
        f"layer {index} ({type(layer).__name__}) is not a sum onto the residual stream: {why}",
        remedy="models that normalise or rescale the stream itself cannot be taken apart",
    )


def _versions(layer: nn.Module, lineage: Lineage, out: Node, index: int) -> list[Node]:
    """The stream's versions, from the one that came in to the layer's output."""
    carriers: dict[int, int] = {}

    def carried(node: Node) -> int:
        """How many times the incoming stream is a term of this sum."""
        if node is lineage.stream:
            return 1
        if node.op != "add":
            return 0
        if id(node) not in carriers:
            carriers[id(node)] = sum(carried(part) for part in node.inputs)
        return carriers[id(node)]

    times = carried(out)
    if times != 1:
        made = out.modules[-1] if out.modules else out.made_by
        raise _refuse(
            layer,
            index,
            f"its output is made by {made!r}"
            if times == 0
            else f"the incoming stream is added {times} times",
        )
    chain = [out]
    while chain[-1] is not lineage.stream:
        chain.append(next(part for part in chain[-1].inputs if carried(part)))
    return chain[::-1]


def _is_read(version: Node) -> bool:
    return bool(version.read_by)


def _reader_module(layer: nn.Module, lineage: Lineage, version: Node) -> str | None:
    """A module called once whose input is exactly this version of the stream."""
    names = [n for n in version.read_in if lineage.calls[n] == 1 and lineage.module_input.get(n) is version]
    return names[0] if names else None


@dataclass(frozen=True)
class _Term:
    node: Node
    scale: float = 1.0
    factor: bool = False  # a per-token factor was passed on the way


def _terms(layer: nn.Module, node: Node, width: int, scale: float = 1.0, factor: bool = False) -> list[_Term]:
    """The terms of a sum, down to tensors that a linear map, an experts module or a norm returned."""
    for name in node.modules:
        module = layer.get_submodule(name)
        if is_linear(module) or is_experts(module) or (is_norm(module, width) and _computes(module)):
            return [_Term(node, scale, factor)]
    if node.op == "add":
        terms = [t for part in node.inputs for t in _terms(layer, part, width, scale, factor)]
        nameless = any(not t.node.modules and _parameter(layer, t.node) is None for t in terms)
        # A sum with a term that no module returned stays whole if the sum itself has a module's name.
        return [_Term(node, scale, factor)] if nameless and node.modules else terms
    if node.op == "scale":
        return _terms(layer, node.inputs[0], width, scale * node.factor, factor)
    if node.op == "rows" and not factor:
        return _terms(layer, node.inputs[0], width, scale, True)
    return [_Term(node, scale, factor)]


def _computes(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Identity, nn.Dropout))


def _write(layer: nn.Module, lineage: Lineage, term: _Term, stage: int, width: int) -> Write:
    """Name the module behind one term and say what kind of sublayer it closes."""
    write = Write("opaque", None, None, term.scale, stage, factor=term.factor)
    linear, experts, norm = _makers(layer, term.node, width)
    if norm is not None:
        inner = _terms(layer, lineage.module_input[norm], width)
        if len(inner) != 1 or inner[0].factor:
            return replace(write, module=norm, note="a norm of a sum of several sublayers")
        linear, experts, deeper = _makers(layer, inner[0].node, width)
        if linear is None and experts is None:
            where = deeper or inner[0].node.made_by
            return replace(write, module=norm, note=f"a norm of what {where!r} returned")
        # A norm undoes the size of what it is given, so the inner scale is part of its row factor.
        write = replace(write, post_norm=norm, inner_scale=inner[0].scale)
    name = linear or experts
    if name is None:
        parameter = _parameter(layer, term.node)
        if parameter is not None:
            return replace(write, module=parameter, note="a parameter added by itself")
        made = term.node.modules[-1] if term.node.modules else None
        return replace(write, module=made, note=f"made by {term.node.made_by!r}, not by a linear map")
    if lineage.calls[name] != 1:
        return replace(write, module=name, note=f"called {lineage.calls[name]} times")
    if experts is not None:
        tokens = lineage.module_input[name].width // width
        why = why_whole(layer.get_submodule(name), tokens)
        return replace(write, kind="experts", module=name, note="" if why is None else f"taken whole: {why}")
    kind, gated, note = _kind(lineage, lineage.module_input[name])
    return replace(write, kind=kind, module=name, gated=gated, note=note)


def _makers(layer: nn.Module, node: Node, width: int) -> tuple[str | None, str | None, str | None]:
    """Which linear map, experts module or norm returned this tensor (the first that applies)."""
    linear = experts = norm = None
    for name in node.modules:
        module = layer.get_submodule(name)
        if is_linear(module):
            linear = linear or name
        elif is_experts(module):
            experts = experts or name
        elif is_norm(module, width) and _computes(module):
            norm = norm or name
    if linear is not None:
        return linear, None, None
    return (None, experts, None) if experts is not None else (None, None, norm)


def _kind(lineage: Lineage, node: Node) -> tuple[Kind, bool, str]:
    """(kind, gated, note) of a linear map by its input."""
    if node.attention is not None:
        return "attention", False, ""
    if node.op == "gate" and any(part.attention is not None for part in node.inputs):
        return "attention", True, "a gate multiplies the attention's output"
    inside, reached = _sublayer(lineage, node)
    if not reached:
        return "mixer", False, "its input was computed out of sight"
    for ancestor in inside:
        if ancestor.attention is not None:
            return "mixer", False, "something lies between the attention and its linear map"
        if _mixes(lineage, ancestor):
            return "mixer", False, f"tokens are mixed by {ancestor.made_by!r}"
    return "mlp", False, ""


def _sublayer(lineage: Lineage, node: Node) -> tuple[list[Node], bool]:
    """What `node` was made from, back to the stream, and whether the stream was reached."""
    stack, seen, inside, reached = [node], set(), [], False
    while stack:
        here = stack.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if here is lineage.stream or _carries(lineage, here):
            reached = True
            continue
        inside.append(here)
        stack.extend(here.inputs)
    return inside, reached


def _carries(lineage: Lineage, node: Node) -> bool:
    return node.op == "add" and any(p is lineage.stream or _carries(lineage, p) for p in node.inputs)


def _mixes(lineage: Lineage, node: Node) -> bool:
    if node.op != "leaf":
        return False
    if node.made_by in _MIXES_TOKENS:
        return True
    live = [part for part in node.inputs if any(a is lineage.stream for a in part.ancestors())]
    return node.made_by in _PRODUCTS and len(live) > 1


def _parameter(layer: nn.Module, node: Node) -> str | None:
    for name, parameter in layer.named_parameters():
        if parameter.untyped_storage().data_ptr() == node.storage:
            return name
    return None


def _one_attention(writes: list[Write]) -> list[Write]:
    """A captured layer holds one attention call; a second one's write stays whole."""
    first = next((i for i, write in enumerate(writes) if write.kind == "attention"), None)
    return [
        replace(write, kind="mixer", note="a second attention in the same layer")
        if write.kind == "attention" and i != first
        else write
        for i, write in enumerate(writes)
    ]


def _attention(layer: nn.Module, lineage: Lineage, calls: list[AttentionCall]) -> tuple[Any, str | None]:
    names = {module: name for name, module in layer.named_modules()}
    if calls and calls[0].module in names:
        return "registry", names[calls[0].module]
    if lineage.attention_inside:
        source, inside = lineage.attention_inside[0]
        return source, inside or None
    return None, None
