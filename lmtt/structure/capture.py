"""Run one layer once and keep what its writes are made of.

1. Hooks go on just the modules that discovery named; the attention function is recorded as it is called.
2. The layer runs with the arguments of the dry run: the same call, the same bits.
3. Each write becomes a record of parts: q, k, v and W_O by head; activations and W_down; or one opaque
   tensor. Scalar multipliers, per-token factors and post-norms held at this run's statistics go into
   `row_scale`, the folded weights and the bias, so that the parts still add up to what was written.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmtt.errors import StructureError
from lmtt.kernels.types import Attention
from lmtt.structure.attention_hook import (
    AttentionCall,
    WatchAttention,
    default_scale,
    plain_mask,
    recording,
)
from lmtt.structure.experts import expert_parts
from lmtt.structure.lineage import Key, key_of
from lmtt.structure.modules import LinearisedNorm, linear_bias, linear_weight, linearise_norm
from lmtt.structure.spec import (
    AttentionWrite,
    CapturedLayer,
    CapturedWrite,
    LayerStructure,
    MlpWrite,
    OpaqueWrite,
    Stage,
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
        _hook(layer, structure, seen, stack)
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
    originals: dict[str, Tensor] = field(default_factory=dict)  # outputs as returned, for their identity
    factors: dict[Key, Tensor] = field(default_factory=dict)  # by the identity of what they multiply


class _WatchFactors(TorchFunctionMode):
    """Note what the captured outputs are multiplied by, through views, copies and casts of them."""

    _SAME = frozenset({"reshape", "view", "contiguous", "to", "float", "type_as", "transpose", "flatten"})

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen
        self._copies: dict[Key, tuple[Key, Tensor]] = {}  # tensors are held so that no address is reused

    def _source(self, tensor: Any) -> Key | None:
        """Identity of the captured output that this tensor shows, or None."""
        if not isinstance(tensor, Tensor):
            return None
        key = key_of(tensor)
        held = [*self._seen.originals.values(), *(call.output for call in self._seen.calls)]
        if any(key == key_of(other) for other in held):
            return key
        return self._copies[key][0] if key in self._copies else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"mul", "__mul__", "__rmul__"} and len(args) == 2 and isinstance(args[1], Tensor):
            for one, other in (args, args[::-1]):
                source = self._source(one)
                if source is not None and isinstance(other, Tensor):
                    self._seen.factors.setdefault(source, torch.broadcast_to(other, one.shape))
        output = func(*args, **(kwargs or {}))
        if name in self._SAME and isinstance(output, Tensor):
            source = self._source(args[0])
            if source is not None:
                self._copies[key_of(output)] = (source, output)
        return output


def _factor(seen: _Seen, output: Tensor, where: str) -> Tensor:
    factor = seen.factors.get(key_of(output))
    if factor is None:
        raise StructureError(
            f"{where}: its output was not multiplied by a gate this time",
            remedy="discover this layer's structure again",
        )
    return factor


def _hook(layer: nn.Module, structure: LayerStructure, seen: _Seen, stack: ExitStack) -> None:
    names = (
        {w.module for w in structure.writes} | {w.post_norm for w in structure.writes} | set(structure.sums)
    )
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
            seen.originals[name] = tensor
            # A copy: some models add the next sublayer onto this very tensor.
            seen.outputs[name] = tensor.clone()

        return hook

    for name in sorted(n for n in names if n is not None):
        if name not in modules:
            continue  # a parameter added by itself
        stack.callback(modules[name].register_forward_pre_hook(before(name), with_kwargs=True).remove)
        if any(name in (w.module, w.post_norm) for w in structure.writes):
            stack.callback(modules[name].register_forward_hook(after(name)).remove)
    if structure.attention_source == "registry":
        stack.enter_context(recording(seen.calls.append))
    elif structure.attention_source is not None:
        stack.enter_context(WatchAttention(seen.calls.append))
    if any(w.factor or w.gated for w in structure.writes):
        stack.enter_context(_WatchFactors(seen))


def _assemble(
    layer: nn.Module, structure: LayerStructure, index: int, before: Tensor, after: Tensor, seen: _Seen
) -> CapturedLayer:
    stages = []
    base = before
    for number in range(structure.stages):
        here = [write for write in structure.writes if write.stage == number]
        writes = [_captured(layer, write, index, before.shape, seen) for write in here]
        if number == structure.stages - 1:
            whole = after
        else:
            probe = structure.sums[number]
            if probe is not None:
                whole = seen.inputs[probe].reshape(base.shape)
            else:  # nothing is given this sum as it is: form it as the layer did, write by write
                whole = base
                for write in writes:
                    whole = whole + write.written
        if any(write.kind == "experts" for write in here):
            writes = _side_by_side(here, writes)
        stages.append(Stage(base, whole, tuple(writes)))
        base = whole
    return CapturedLayer(index, tuple(stages))


def _side_by_side(here: list[Write], writes: list[CapturedWrite]) -> list[CapturedWrite]:
    """One MLP of the routed experts and the shared ones beside them: the shared neurons come last."""
    routed = [w for what, w in zip(here, writes, strict=True) if what.kind == "experts"]
    shared = [w for what, w in zip(here, writes, strict=True) if what.kind != "experts"]
    mlps = [w for w in routed + shared if isinstance(w, MlpWrite)]
    if len(mlps) < 2 or not isinstance(routed[0], MlpWrite):
        return writes
    act = [w.act if w.row_scale is None else w.act * w.row_scale[:, None] for w in mlps]
    biases = [w.bias for w in mlps if w.bias is not None]
    together = MlpWrite(
        act=torch.cat(act, 1),
        w_down=torch.cat([w.w_down for w in mlps]),
        bias=torch.stack([b.broadcast_to(mlps[0].written.shape) for b in biases]).sum(0) if biases else None,
        row_scale=None,
        written=torch.stack([w.written for w in mlps]).sum(0),
    )
    return [w for w in writes if not isinstance(w, MlpWrite)] + [together]


def _captured(layer: nn.Module, write: Write, index: int, shape: torch.Size, seen: _Seen) -> CapturedWrite:
    if write.module is None:
        raise StructureError(
            f"layer {index} adds a tensor that no module returned",
            expected="a sublayer's output",
            got=write.note,
        )
    where = f"layer {index}, {write.module}"
    if write.module in dict(layer.named_parameters()):
        written = layer.get_parameter(write.module).expand(shape) * write.scale
        return OpaqueWrite(written, write.kind, write.note)
    returned = write.post_norm or write.module
    if returned not in seen.outputs:
        raise StructureError(
            f"{where} did not run",
            expected="the modules that discovery saw",
            remedy="discover this layer's structure again",
        )
    written = seen.outputs[returned].reshape(shape)
    row: Tensor | None = None
    if write.scale != 1.0:
        written = written * write.scale
        row = written.new_full(shape[:1], write.scale)
    if write.factor:
        factor = _factor(seen, seen.originals[returned], where).reshape(shape)[:, :1].to(written.dtype)
        written = written * factor
        row = factor[:, 0] if row is None else row * factor[:, 0]
    if write.kind not in ("attention", "mlp", "experts"):
        return OpaqueWrite(written, write.kind, write.note)

    module = layer.get_submodule(write.module)
    if write.kind == "experts":
        parts = expert_parts(module, seen.arguments[write.module], seen.outputs[write.module].reshape(shape))
        if isinstance(parts, str):
            return OpaqueWrite(written, "experts", parts)
        act, weight, bias = parts.act, parts.w_down, parts.bias
    else:
        act = seen.inputs[write.module].reshape(shape[0], -1)
        weight = linear_weight(module, act.dtype, act.device, act.shape[1])
        bias = linear_bias(module)
    if write.post_norm is not None:
        given = seen.inputs[write.post_norm].reshape(shape)
        norm = linearise_norm(
            layer.get_submodule(write.post_norm), given, seen.outputs[write.post_norm].reshape(shape), where
        )
        weight, bias, row = _through_norm(norm, weight, bias, row, write)
    elif bias is not None and row is not None:
        bias = row[:, None] * bias if write.factor else bias * write.scale
    if write.kind in ("mlp", "experts"):
        return MlpWrite(act=act, w_down=weight, bias=bias, row_scale=row, written=written)
    attention = _attention(write, where, act, weight, seen)
    return AttentionWrite(replace(attention, row_scale=row), bias, written)


def _through_norm(
    norm: LinearisedNorm, weight: Tensor, bias: Tensor | None, outer: Tensor | None, write: Write
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(weight, bias, row_scale) of outer * norm(inner_scale * (act @ weight + bias))."""
    row = norm.row * write.inner_scale
    row = row if outer is None else row * outer
    folded = norm.fold(weight)
    parts: Tensor | None = None
    if bias is not None:
        parts = row[:, None] * norm.fold(bias)
    if norm.shift is not None:
        shift = norm.shift if outer is None else outer[:, None] * norm.shift
        parts = shift if parts is None else parts + shift
    return folded, parts, row


def _attention(write: Write, where: str, act: Tensor, weight: Tensor, seen: _Seen) -> Attention:
    """The attention call whose output reached the linear map, with w_o split by head."""
    if len(seen.calls) != 1:
        raise StructureError(f"{where}: the attention function ran {len(seen.calls)} times", expected="once")
    call = seen.calls[0]
    T = act.shape[0]
    if call.probabilities is not None:
        return _from_probabilities(call, weight, T, where)
    assert call.query is not None
    assert call.key is not None
    q, k, v = call.query[0], call.key[0, :, :T], call.value[0, :, :T]
    H, E_v = q.shape[0], v.shape[-1]
    w_o = _by_head(weight, H, E_v, where)
    gate = None
    if write.gated:
        gate = _factor(seen, call.output, where)
        if call.source != "registry" and gate.dim() == 4:
            gate = gate.transpose(1, 2)  # the registry's functions return [B, T, H, E], others [B, H, T, E]
        gate = gate.reshape(T, H, E_v).to(q.dtype)
    mask, window = plain_mask(call.mask, call.causal, T, act.device)
    if call.position_bias is not None:
        mask = _biased(call.position_bias[0, ..., :T, :T], mask)
    return Attention(
        q=q,
        k=k,
        v=v,
        w_o=w_o,
        scale=default_scale(q.shape[-1]) if call.scale is None else float(call.scale),
        softcap=None if call.softcap is None else float(call.softcap),
        window=window,
        sinks=None if call.sinks is None else call.sinks.reshape(-1),
        mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype),
        gate=gate,
    )


def _by_head(weight: Tensor, heads: int, width: int, where: str) -> Tensor:
    if weight.shape[0] != heads * width:
        raise StructureError(
            f"{where} does not read the attention's heads side by side",
            expected=f"{heads} x {width} inputs",
            got=weight.shape[0],
        )
    return torch.unflatten(weight, 0, (heads, width))


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """position_bias [1 or H, T, T] plus what `mask` says."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, -torch.inf)
    return bias + mask


def _from_probabilities(call: AttentionCall, weight: Tensor, T: int, where: str) -> Attention:
    """A model that multiplies its own softmax by v: logits are log A, exactly, with empty q and k.

    q . k is 0 for the one zero that stands for d_head; softmax(log A) = A since A's rows sum to 1.
    """
    assert call.probabilities is not None
    A = call.probabilities.reshape(-1, T, T)
    v = call.value.reshape(-1, T, call.value.shape[-1])
    H = A.shape[0]
    if bool(A.triu(1).any()):
        raise StructureError(f"{where}: attention is not causal", expected="a decoder's causal mask")
    zero = A.new_zeros(H, T, 1).to(v.dtype)
    wide = torch.float64 if A.dtype == torch.float64 else torch.float32
    return Attention(
        q=zero,
        k=zero[: v.shape[0]],
        v=v,
        w_o=_by_head(weight, H, v.shape[-1], where),
        scale=1.0,
        mask=A.to(wide).log(),  # never narrower than float32: 16-bit logarithms would move A by per cents
    )
