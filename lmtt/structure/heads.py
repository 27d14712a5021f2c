"""One or several attention calls become heads: q, k, v, mask and the rows of W_O that each value meets.

Usually the linear map reads a call's output as it is, head beside head. Where something lies between,
such as a gate, a norm over heads or a difference of two halves, that something is linear once the run's
other numbers are held. Then every coordinate (h, e) of the calls' output reaches one input m of the
linear map, times a number g[i, h, e] per token: heads keep their form, with W_O's rows taken at m and
`gate` = g. Both are found by calling what lies between again, on probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.kernels.types import Attention
from lmtt.structure.attention_hook import AttentionCall, default_scale, not_causal, plain_mask
from lmtt.structure.discover import REARRANGES
from lmtt.structure.lineage import ADD, DIV, MUL, SAME, SUB, tensors_in
from lmtt.structure.modules import is_linear, linearise_norm
from lmtt.structure.watch import Watch

# What takes only the shape or kind of its second argument.
_LIKE = {"view_as", "reshape_as", "type_as", "expand_as", "zeros_like", "ones_like", "empty_like"}
_Key = tuple[int, int, torch.Size, tuple[int, ...]]


def _key(tensor: Tensor) -> _Key:
    """Identity of a tensor as it is laid out: views of another shape are other tensors."""
    return (
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tensor.shape,
        tuple(tensor.stride()),
    )


@dataclass(frozen=True)
class _Op:
    """One call on the way: a function, or a whole module that is a norm."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    module: nn.Module | None = None


class WatchBetween(Watch):
    """Record what is computed from attention outputs until a linear map reads it."""

    def __init__(self, layer: nn.Module, linear: str) -> None:
        super().__init__()
        self._layer, self._linear = layer, linear
        self._from: set[_Key] = set()
        self._within = 0  # modules entered that are recorded as one call
        self._done = False
        self.ops: list[_Op] = []
        self.reads: Tensor | None = None  # what the linear map is given

    def mark(self, output: Tensor) -> None:
        """`output` is what an attention call returned."""
        self._from.add(_key(output))

    def hook_modules(self) -> None:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._done and args and isinstance(args[0], Tensor) and _key(args[0]) in self._from:
                self._within += 1

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self._done and args and isinstance(args[0], Tensor) and _key(args[0]) in self._from:
                self._within -= 1
                if isinstance(output, Tensor) and output is not args[0]:
                    self._note(_Op("norm", module, args, {}, output, module))

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._done:
                self._done, self.reads = True, next(iter(tensors_in((args, kwargs))))

        for name, module in self._layer.named_modules():
            if name == self._linear:
                self.hooks.append(module.register_forward_pre_hook(stop, with_kwargs=True))
            elif next(module.children(), None) is None and not is_linear(module):
                self.hooks.append(module.register_forward_pre_hook(before))
                self.hooks.append(module.register_forward_hook(after))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        follows = not self._done and not self._within and self._from
        name = getattr(func, "__name__", "")
        given = args[:1] if name in _LIKE else (args, kwargs)
        concerned = follows and any(_key(tensor) in self._from for tensor in tensors_in(given))
        output = func(*args, **kwargs)
        if concerned and next(tensors_in(output), None) is not None:
            self._note(_Op(name, func, args, kwargs, output))
        return output

    def _note(self, op: _Op) -> None:
        self.ops.append(op)
        self._from |= {_key(tensor) for tensor in tensors_in(op.output)}


def assemble_heads(
    calls: list[AttentionCall], weight: Tensor, tokens: int, where: str, between: WatchBetween | None
) -> Attention:
    """The heads of all calls, with `weight` [M, D] split among them.

    between: what was recorded between the calls and the linear map; None where it reads one call's output.
    Raises StructureError if it is not the form described above.
    """
    parts = [_heads(call, tokens, where) for call in calls]
    one = _together(parts, where)
    H, E = one.q.shape[0], one.v.shape[-1]
    if between is None:
        return _with_weight(one, _by_head(weight, H, E, where), None)
    reach, gate = _probe(calls, between, tokens, where)
    if int(reach.max()) >= weight.shape[0]:
        raise StructureError(f"{where} does not read what lies behind its attention")
    w_o = weight[reach.clamp(min=0).flatten()].reshape(H, E, -1)
    if bool((reach < 0).any()):
        w_o = w_o * (reach >= 0)[..., None].to(w_o.dtype)
    gate = gate.to(one.v.dtype)
    if bool((gate == gate[:1]).all()):
        return _with_weight(one, w_o * gate[0][..., None], None)
    return _with_weight(one, w_o, gate)


def _with_weight(one: Attention, w_o: Tensor, gate: Tensor | None) -> Attention:
    return replace(one, w_o=w_o, gate=gate)


def _by_head(weight: Tensor, heads: int, width: int, where: str) -> Tensor:
    if weight.shape[0] != heads * width:
        raise StructureError(
            f"{where} does not read the attention's heads side by side",
            expected=f"{heads} x {width} inputs",
            got=weight.shape[0],
        )
    return torch.unflatten(weight, 0, (heads, width))


def _heads(call: AttentionCall, T: int, where: str) -> Attention:
    """One call; `w_o` is left to be filled in."""
    if call.probabilities is not None:
        return _from_probabilities(call, T, where)
    assert call.query is not None
    assert call.key is not None
    if call.softcap is not None and call.softcap_left_out:
        raise StructureError(
            f"{where}: the model caps its attention's logits, which sdpa leaves out",
            remedy="load the model with attn_implementation='eager', which computes what the model means",
        )
    q, k, v = call.query[0], call.key[0, :, :T], call.value[0, :, :T]
    mask, window = plain_mask(call.mask, call.causal, T, q.device, where)
    if call.position_bias is not None:
        mask = _biased(call.position_bias[0, ..., :T, :T], mask)
    return Attention(
        q=q,
        k=k,
        v=v,
        w_o=v.new_empty(0),
        scale=default_scale(q.shape[-1]) if call.scale is None else float(call.scale),
        softcap=None if call.softcap is None else float(call.softcap),
        window=window,
        sinks=None if call.sinks is None else call.sinks.reshape(-1),
        mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype),
    )


def _together(parts: list[Attention], where: str) -> Attention:
    """Several calls' heads, one call's after the other's."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        same = (other.scale, other.softcap, other.window, other.group, other.sinks is None) == (
            first.scale,
            first.softcap,
            first.window,
            first.group,
            first.sinks is None,
        )
        alike = (other.mask is None) == (first.mask is None)
        if alike and other.mask is not None and first.mask is not None:
            alike = torch.equal(other.mask, first.mask) and first.mask.shape[0] == 1
        if not same or not alike:
            raise StructureError(f"{where} reads attention calls that attend in different ways")
    return replace(
        first,
        q=torch.cat([p.q for p in parts]),
        k=torch.cat([p.k for p in parts]),
        v=torch.cat([p.v for p in parts]),
        sinks=None if first.sinks is None else torch.cat([p.sinks for p in parts if p.sinks is not None]),
    )


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """position_bias [1 or H, T, T] plus what `mask` says."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask


def _from_probabilities(call: AttentionCall, T: int, where: str) -> Attention:
    """A model that multiplies its own softmax by v: logits are log A, exactly, with empty q and k.

    q . k is 0 for the one zero that stands for d_head; softmax(log A) = A since A's rows sum to 1.
    """
    assert call.probabilities is not None
    A = call.probabilities.reshape(-1, T, T)
    v = call.value.reshape(-1, T, call.value.shape[-1])
    if bool(A.triu(1).any()):
        raise not_causal(where)
    zero = A.new_zeros(A.shape[0], T, 1).to(v.dtype)
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    return Attention(
        q=zero,
        k=zero[: v.shape[0]],
        v=v,
        w_o=v.new_empty(0),
        scale=1.0,
        mask=A.to(wide).log(),  # never narrower than float32: 16-bit logarithms would move A by per cents
    )


# --- what lies between ---


def _probe(calls: list[AttentionCall], between: WatchBetween, T: int, where: str) -> tuple[Tensor, Tensor]:
    """(reach [H, E] int64, -1 where unread; gate [T, H, E]) of everything between calls and linear map."""
    if between.reads is None:
        raise StructureError(f"{where} did not run", remedy="discover this layer's structure again")
    sizes = [(call, *_heads_and_width(call)) for call in calls]
    N = sum(H * E for _, H, E in sizes)
    device = between.reads.device

    def seeds(values: Tensor) -> dict[_Key, Tensor]:
        """values [T or 1, N] laid out as the calls' outputs."""
        result, at = {}, 0
        for call, H, E in sizes:
            block = values[:, at : at + H * E].expand(T, -1).reshape(T, H, E)
            at += H * E
            if call.source != "registry":
                block = block.transpose(0, 1)  # the registry's functions return [B, T, H, E]
            probe = torch.empty_like(call.output, dtype=torch.float64)
            result[_key(call.output)] = probe.copy_(block.reshape(call.output.shape))
        return result

    numbers = torch.arange(1, N + 1, dtype=torch.float64, device=device)[None]
    codes = _replay(between, seeds(numbers), N + 1, where).reshape(T, -1)
    if bool((codes != codes[:1]).any()):
        raise StructureError(f"{where}: what lies behind its attention moves numbers between tokens")
    reach = torch.full((N,), -1, dtype=torch.int64, device=device)
    gate = torch.zeros(T, N, dtype=torch.float64, device=device)
    left = codes[0].long()
    while bool((left > 0).any()):
        source = left % (N + 1) - 1
        at = torch.nonzero(source >= 0).flatten()
        source = source[at]
        if len(torch.unique(source)) != len(source) or bool((reach[source] >= 0).any()):
            raise StructureError(f"{where}: what lies behind its attention copies some of it")
        probe = torch.zeros(1, N, dtype=torch.float64, device=device)
        probe[0, source] = 1
        image = _replay(between, seeds(probe), None, where).reshape(T, -1)
        reach[source], gate[:, source] = at, image[:, at]
        left = left // (N + 1)
    E = sizes[0][2]
    return reach.reshape(-1, E), gate.reshape(T, -1, E)


def _heads_and_width(call: AttentionCall) -> tuple[int, int]:
    E = call.value.shape[-1]
    heads = call.query.shape[1] if call.query is not None else call.output.numel() // E
    if call.query is None:
        assert call.probabilities is not None
        T = call.probabilities.shape[-1]
        heads = call.output.numel() // (E * T)
    return heads, E


def _replay(between: WatchBetween, values: dict[_Key, Tensor], base: int | None, where: str) -> Tensor:
    """What the linear map would be given for other attention outputs.

    base: follow codes below it instead of values: factors are left out, and a sum a + b becomes
    a + base * b, so that both can be told from it.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return values.get(_key(value), value)
        if isinstance(value, (tuple, list)):
            return type(value)(swap(item) for item in value)
        return value

    for op in between.ops:
        given = [tensor for tensor in tensors_in(op.args) if _key(tensor) in values]
        if not given:
            continue
        x = values[_key(given[0])]
        if op.module is not None:
            result: Any = x if base is not None else _held(op, x, where)
        elif op.name in SAME:
            # Casts are left out: probes stay exact. The rest is done as it was.
            cast = isinstance(op.output, Tensor) and op.output.shape == given[0].shape and op.name in _CASTS
            # Probes may be laid out otherwise than the run's tensors were: a view is what it shows.
            function = torch.Tensor.reshape if op.name == "view" else op.function
            result = x if cast else function(*swap(op.args), **op.kwargs)
        elif op.name in REARRANGES or op.name in ("expand", "repeat", "dropout"):
            result = op.function(*swap(op.args), **op.kwargs)
        elif op.name in MUL | DIV and len(given) == 1 and (op.name in MUL or op.args[0] is given[0]):
            result = _times(op, x, swap, base)
        elif op.name in ADD | SUB and len(given) == 2:
            a, b = x, values[_key(given[1])]
            sign = -1 if op.name in SUB else 1
            result = a + sign * b if base is None else a + base * b
        else:
            raise StructureError(f"{where}: {op.name!r} lies behind its attention, which is not linear")
        for old, new in zip(tensors_in(op.output), tensors_in(result), strict=True):
            values[_key(old)] = new
    assert between.reads is not None
    if _key(between.reads) not in values:
        raise StructureError(f"{where} does not read what lies behind its attention")
    return values[_key(between.reads)]


_CASTS = {"to", "type_as", "type", "float", "half", "bfloat16", "double", "contiguous", "clone"}


def _times(op: _Op, x: Tensor, swap: Callable[[Any], Any], base: int | None) -> Tensor:
    if base is None:
        function = torch.mul if op.name in MUL else torch.div
        first, second = swap(op.args)
        product: Tensor = function(first, second)
        return product
    return x.expand(op.output.shape)


def _held(op: _Op, x: Tensor, where: str) -> Tensor:
    """The norm at the statistics that it had."""
    given, returned = op.args[0], op.output
    width = given.shape[-1]
    assert op.module is not None
    norm = linearise_norm(op.module, given.reshape(-1, width), returned.reshape(-1, width), where)
    if norm.centred or norm.shift is not None:
        raise StructureError(f"{where}: a norm with a mean or a shift lies behind its attention")
    row = norm.row.reshape(*given.shape[:-1], 1)
    return x * row.double() * norm.gain.double()
