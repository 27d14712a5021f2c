"""Follow tensors through one forward pass: a small expression graph, built while the layer runs.

Every tensor of the pass has a *node*. Views, copies, casts and inert dropout share the node of what they
show; sums and products keep their operands; everything else is a leaf that remembers what it was made
from. Nodes are found by storage, offset and size, so all tensors are kept alive until the trace is
dropped (else a freed address could name two tensors). In-place operations give their storage a new node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lmtt.structure.spec import Site, Source
from lmtt.structure.watch import Watch

Op = Literal["leaf", "add", "scale", "rows", "gain", "gate", "fold"]

ADD = {"add", "__add__", "__radd__", "__iadd__", "add_"}
MUL = {"mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply"}
DIV = {"div", "__truediv__", "__itruediv__", "div_", "true_divide"}
SUB = {"sub", "__sub__", "__isub__", "sub_", "subtract"}
SAME = {  # the same numbers, possibly in another place, shape or precision
    "view", "reshape", "contiguous", "to", "type_as", "type", "float", "half", "bfloat16", "double", "clone",
    "squeeze", "unsqueeze", "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "detach",
    "alias", "view_as", "reshape_as",
}  # fmt: skip
_DROPOUT = {"dropout", "dropout_", "feature_dropout", "alpha_dropout"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"}
_PRODUCT = {"matmul", "__matmul__", "__rmatmul__", "bmm"}
PACKED = {"bmm", "matmul", "__matmul__"}  # products that may be with a parameter of three dimensions
_MASKS = {"masked_fill"}

Key = tuple[int, int, int]


def key_of(tensor: Tensor) -> Key:
    """Identity of the numbers that a tensor shows."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


@dataclass(eq=False)
class Node:
    """One set of numbers in the pass.

    add: inputs summed. scale: inputs[0] times one number. rows: inputs[0] times one number per token.
    gain: inputs[0] times one number per channel. gate: inputs[0] * inputs[1], the second broadcast.
    fold: inputs[0] summed over its first axis. leaf: anything else, `made_by` the function named.
    """

    op: Op
    made_by: str
    inputs: tuple[Node, ...] = ()
    factor: float | None = None  # of a scale
    operand: int = 1  # which argument of the call at `site` is the factor
    inverse: bool = False  # divided by it
    site: Site | None = None
    width: int = 0  # numel
    within: str = ""  # the module whose own code made it
    modules: list[str] = field(default_factory=list)  # modules that returned it
    read_by: list[str] = field(default_factory=list)  # modules whose own code computed something new from it
    read_in: list[str] = field(default_factory=list)  # modules that were given it
    storage: int = 0
    attention: Source | None = None
    call: int = 0  # which of that source's calls in the layer returned it

    def ancestors(self) -> Iterator[Node]:
        """Itself and everything it was made from, each once."""
        seen: set[int] = set()
        stack = [self]
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            stack.extend(node.inputs)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)


class Lineage(Watch):
    """Record the pass of `layer` over a stream of `hidden`'s size; use as a context manager around it."""

    def __init__(self, layer: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self._layer = layer
        self._size = hidden.numel()
        self._tokens = hidden.numel() // hidden.shape[-1]
        self._nodes: dict[Key, Node] = {}
        self._alive: list[Tensor] = []
        self._softmax: set[int] = set()
        self.stored = {p.untyped_storage().data_ptr() for p in layer.parameters() if p.numel()}
        self.module_input: dict[str, Node] = {}
        self.calls: dict[str, int] = {}
        self.inside: list[str] = []  # modules running now, innermost last
        self.attention_inside: list[tuple[Source, str]] = []  # (source, innermost module)
        self._sites = SiteCounter(self._size)
        self.stream = self.node(hidden)

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one not seen before (a weight, an argument) becomes a leaf."""
        key = key_of(tensor)
        found = self._nodes.get(key)
        if found is None:
            found = self._new(tensor, Node("leaf", "given"))
        return found

    def mark_attention(self, tensor: Tensor, source: Source) -> None:
        """`tensor` is what an attention function returned."""
        node = self.node(tensor)
        number = sum(known == source for known, _ in self.attention_inside)
        self.attention_inside.append((source, self.inside[-1] if self.inside else ""))
        if node.attention is None or source == "registry":
            node.attention, node.call = source, number

    def hook_modules(self) -> None:
        for name, module in self._layer.named_modules():
            if name:
                self.hooks.append(
                    module.register_forward_pre_hook(self._enter_module(name), with_kwargs=True)
                )
                self.hooks.append(module.register_forward_hook(self._leave_module(name)))

    def _enter_module(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inside.append(name)
            self.calls[name] = self.calls.get(name, 0) + 1
            first = next(tensors_in([args, kwargs]), None)
            if first is not None:
                node = self.node(first)
                self.module_input[name] = node
                node.read_in.append(name)

        return hook

    def _leave_module(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.inside.pop()
            first = next(tensors_in(output), None)
            if first is not None:
                self.node(first).modules.append(name)

        return hook

    def _new(self, tensor: Tensor, node: Node) -> Node:
        node.width = tensor.numel()
        node.storage = tensor.untyped_storage().data_ptr()
        self._alive.append(tensor)
        self._nodes[key_of(tensor)] = node
        return node

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [(tensor, self.node(tensor)) for tensor in tensors_in([args, kwargs])]
        output = func(*args, **kwargs)
        produced = list(tensors_in(output))
        if name == "__setitem__" and given:
            produced = [given[0][0]]
        if not produced or name in {"__get__", "__set__"}:
            return output
        inside = self.inside[-1] if self.inside else ""
        site = self._sites.at(inside, name, produced[0])
        in_place = _is_in_place(name, kwargs)
        if name in _SHAPE_ONLY:
            given = []
        if not in_place and self._same_numbers(name, args, kwargs, produced, given):
            return output
        inputs = tuple(node for _, node in given)
        for tensor in produced:
            known = {key_of(t) for t, _ in given}
            if not in_place and key_of(tensor) in known:
                continue  # a view of something given
            node = self._combine(name, args, kwargs, tensor, given) or Node("leaf", name, inputs)
            node.site, node.within = site, inside
            if node.op != "add":
                for source in node.inputs:
                    source.read_by.append(inside)
            self._new(tensor, node)
        if name == "scaled_dot_product_attention":
            self.mark_attention(produced[0], "sdpa")
        elif name == "softmax" or (name in _MASKS and any(id(node) in self._softmax for _, node in given)):
            self._softmax.add(id(self.node(produced[0])))
        elif name in _PRODUCT and given and id(given[0][1]) in self._softmax:
            self.mark_attention(produced[0], "product")
        return output

    def _same_numbers(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        produced: list[Tensor],
        given: list[tuple[Tensor, Node]],
    ) -> bool:
        """Give a view, copy, cast or inert dropout the node of what it shows."""
        if len(produced) != 1 or not given:
            return False
        out, (source, node) = produced[0], given[0]
        inert = name in _DROPOUT and _dropout_is_off(args, kwargs)
        if not (name in SAME or inert) or out.numel() != source.numel() or not out.is_floating_point():
            return False
        if key_of(out) != key_of(source):
            self._alive.append(out)
            self._nodes[key_of(out)] = node
        return True

    def _combine(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        given: list[tuple[Tensor, Node]],
    ) -> Node | None:
        """The node of a sum or product of whole streams, or None."""
        if name == "sum" and given and given[0][0].dim() >= 3 and _first_axis(args[1:], kwargs):
            return Node("fold", name, (given[0][1],))
        if kwargs or len(args) != 2:
            return None
        if name in MUL | DIV and len(given) == 1 and isinstance(args[1], (int, float)):
            return Node("scale", name, (given[0][1],), factor=float(args[1]), inverse=name in DIV)
        if len(given) != 2:
            return None
        (a, node_a), (b, node_b) = given
        if name in ADD | SUB and out.numel() == max(a.numel(), b.numel()):
            if name in SUB:
                node_b = Node("scale", name, (node_b,), factor=-1.0, width=node_b.width)
            return Node("add", name, (node_a, node_b))
        if name in MUL or (name in DIV and a.numel() >= b.numel()):
            flipped = b.numel() > a.numel()
            if flipped:
                a, b, node_a, node_b = b, a, node_b, node_a
            if a.numel() != out.numel():
                return None
            node = Node("gate", name, (node_a, node_b), operand=0 if flipped else 1, inverse=name in DIV)
            if b.numel() == 1:
                node.op, node.factor = "scale", float(b)
            elif a.numel() == self._size and b.shape[-1:] == (1,) and b.numel() == self._tokens:
                node.op = "rows"
            elif (
                a.numel() == self._size
                and b.shape[-1] * self._tokens == self._size == b.numel() * self._tokens
            ):
                node.op = "gain"
            return node
        return None


class SiteCounter:
    """Number the calls that each module's own code makes, the same way at discovery and at every run.

    Of sums and products of tensors only those are counted whose result has the stream's size, and all
    batched products: how often others happen may depend on the prompt, as in a loop over experts.
    """

    _NAMES = ADD | SUB | MUL | DIV

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: dict[tuple[str, str], int] = {}

    def at(self, module: str, function: str, result: Tensor) -> Site | None:
        """The site of a call that just returned `result`; None for calls that are not counted."""
        if function not in PACKED and (function not in self._NAMES or result.numel() != self._size):
            return None
        number = self._counts.get((module, function), 0)
        self._counts[module, function] = number + 1
        return Site(module, function, number)


def _first_axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[0] if args else None)
    return dim in (0, (0,), [0])


def _is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("inplace") or kwargs.get("out") is not None or name == "__setitem__":
        return True
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
    return name.endswith("_")


def _dropout_is_off(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return not training or p == 0.0
