"""What each head and neuron added, found by taking it away from the running model: the tests' oracle.

It shares nothing with `lmtt.structure`: a layer is run again and again as the model itself runs it, each time
with one thing missing, and what changes in float64 is that thing's part. Shares follow from the parts by the
definition, max(0, |y|_1 - |y - x|_1) over its sum.

    head h, source j   row j of v is zeroed where the model multiplies its attention matrix by v (or hands v
                       to torch's attention), which says what of the output projection's input came from j;
                       of that, head h's columns go
    neuron n           the column n of the down projection's weight is zeroed
    bias               the bias is zeroed
    resid_mid          what the layer returns with a silent MLP

Where a norm follows the sublayer, differences are taken before it and it is applied by its formula, held at
the statistics of the undisturbed run. `Layout` says where a layer keeps these, read off the model's source by
a person; that is the only knowledge here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmtt.testing import assert_within


@dataclass(frozen=True)
class Layout:
    """Where one layer keeps what is taken away (paths relative to the layer)."""

    out: str  # the attention's output projection
    down: tuple[str, ...]  # weights whose columns are neurons, routed experts before shared ones;
    # "a+b" where one neuron has a column in two weights
    attention_norm: str | None = None  # a norm between the output projection and the stream
    mlp_norm: str | None = None  # likewise of the MLP
    second: tuple[str, str] | None = None  # the down projection of a second MLP, and the norm that follows it
    scale: str | None = None  # what the layer multiplies the stream with when all is added
    attends: bool = True  # False: something else in the attention's place
    around: bool = False  # the norms are of the whole sums, the stream included


@dataclass(frozen=True)
class Parts:
    """What one layer added, float64; `H` heads, `F` neurons, the last two axes [T, D] are destinations."""

    base: Tensor  # [T, D], the stream that came in as it is part of mid: through the norm of that sum
    mid: Tensor  # [T, D]
    carried: Tensor  # [T, D], mid as it is part of post: scaled where the layer scales the stream
    post: Tensor  # [T, D]
    pairs: Tensor  # [H, T, T, D], the second axis is the source; H = 0 without attention
    attention_bias: Tensor  # [T, D]
    neurons: Tensor  # [F, T, D]
    mlp_bias: Tensor  # [T, D]


@dataclass(frozen=True)
class PlainRun:
    """An ordinary forward, with what each layer was given and returned."""

    given: list[tuple[tuple[Any, ...], dict[str, Any]]]
    returned: list[Tensor]  # [1, T, D] each
    logits: Tensor  # [1, T, V]


@torch.no_grad()
def plain_run(model: Any, stack: nn.ModuleList, input_ids: Tensor) -> PlainRun:
    """model(input_ids), watched by plain hooks on its decoder layers `stack`."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returned: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, dict(kwargs)))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        returned.append(_first(output).clone())

    with ExitStack() as hooks:
        for layer in stack:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        logits = model(input_ids, use_cache=False).logits
    return PlainRun(given, returned, logits)


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


def shares(parts: Tensor, whole: Tensor) -> Tensor:
    """[n, T]: max(0, |y|_1 - |y - x|_1) of parts x [n, T, D] of y [T, D], over its sum; 0 where that is 0."""
    proximity = (whole.abs().sum(-1) - (whole - parts).abs().sum(-1)).clamp(min=0)
    total = proximity.sum(0)
    return torch.where(total > 0, proximity / total.where(total > 0, torch.ones_like(total)), 0.0)


@torch.no_grad()
def take_away(
    layer: nn.Module, layout: Layout, call: tuple[tuple[Any, ...], dict[str, Any]], heads: int
) -> Parts:
    """Every part of one layer's writes, by running it without each; `call` as in PlainRun.given."""
    bench = _Bench(layer, layout, call)
    post = bench.run()
    pairs = post.new_zeros(0, bench.tokens, *post.shape)
    bias = torch.zeros_like(post)
    scale = bench.scale()
    if layout.around:
        return _taken_from_norms(bench, post, heads)
    with bench.silent_mlp():
        carried = bench.run()
        mid = carried / scale
        if layout.attends:
            assert layout.scale is None or layout.attention_norm is not None, (
                "differences of mid would be scaled"
            )
            pairs, bias = _attention_parts(bench, mid, heads)
    neurons, mlp_bias = _mlp_parts(bench, post)
    return Parts(bench.base, mid, carried, post, pairs, bias, neurons * scale, mlp_bias * scale)


def _taken_from_norms(bench: _Bench, post: Tensor, heads: int) -> Parts:
    """Norms that are given the stream and what is added to it: models with norms after the additions."""
    attention_norm, mlp_norm = bench.layout.attention_norm, bench.layout.mlp_norm
    assert attention_norm is not None
    assert mlp_norm is not None
    mid = bench.watch(attention_norm, "output")
    pairs, bias = _attention_parts(bench, mid, heads)
    neurons, mlp_bias = _mlp_parts(bench, post)
    bias, mlp_bias = bias + bench.shift(attention_norm), mlp_bias + bench.shift(mlp_norm)
    base, carried = bench.held(attention_norm)(bench.base), bench.held(mlp_norm)(mid)
    return Parts(base, mid, carried, post, pairs, bias, neurons, mlp_bias)


class _SilentSource(TorchFunctionMode):
    """Zero one row of v in the product of the attention matrix with v."""

    def __init__(self, source: int, tokens: int) -> None:
        super().__init__()
        self.source, self.tokens, self.seen = source, tokens, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, at = getattr(func, "__name__", ""), None
        if name == "scaled_dot_product_attention":
            at = 2
        elif name in {"matmul", "__matmul__", "bmm"} and self._attends(args[0]):
            at = 1
        if at is not None:
            self.seen += 1
            values = args[at].clone()
            values[..., self.source, :] = 0
            args = (*args[:at], values, *args[at + 1 :])
        return func(*args, **(kwargs or {}))

    def _attends(self, matrix: Tensor) -> bool:
        """[.., T, T], causal, each row a distribution (or what a sink leaves of it)."""
        if matrix.dim() < 3 or matrix.shape[-2:] != (self.tokens, self.tokens):
            return False
        whole = bool((matrix.sum(-1) <= 1 + 1e-5).all())
        return whole and bool((matrix >= 0).all()) and bool((matrix.triu(1) == 0).all())


class _Bench:
    """One layer on its input, to be run again with something missing."""

    def __init__(
        self, layer: nn.Module, layout: Layout, call: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> None:
        self.layer, self.layout = layer, layout
        self._args, self._kwargs = call
        hidden = self._args[0] if self._args else self._kwargs["hidden_states"]
        self.base: Tensor = hidden[0].clone()
        self.tokens = int(hidden.shape[1])

    def run(self) -> Tensor:
        return _first(self.layer(*self._args, **self._kwargs))[0].clone()

    def watch(self, module: str, of: str) -> Tensor:
        """The input or output of a module while the layer runs, [T, ...]."""
        seen: list[Tensor] = []
        target = self.layer.get_submodule(module)
        if of == "input":
            hook = target.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
        else:
            hook = target.register_forward_hook(lambda _m, _a, out: seen.append(_first(out).clone()))
        self.run()
        hook.remove()
        assert len(seen) == 1, f"{module} ran {len(seen)} times"
        return seen[0].reshape(self.tokens, -1)

    @contextmanager
    def zeroed(self, *where: tuple[Tensor, Any]) -> Iterator[None]:
        """Entries of parameters are zero for a while."""
        kept = [parameter[at].clone() for parameter, at in where]
        try:
            for parameter, at in where:
                parameter[at] = 0
            yield
        finally:
            for (parameter, at), value in zip(where, kept, strict=True):
                parameter[at] = value

    @contextmanager
    def silent_mlp(self) -> Iterator[None]:
        """Every weight and bias of the down projections is zero: the MLP adds nothing."""
        names = self.layout.down + (self.layout.second or ())[:1]
        weights = [self.layer.get_parameter(n) for name in names for n in name.split("+")]
        with self.zeroed(*((parameter, ...) for parameter in weights + self.mlp_biases())):
            yield

    def scale(self) -> Tensor:
        """What the layer multiplies the stream with at its end."""
        if self.layout.scale is None:
            return torch.ones((), dtype=self.base.dtype)
        return self.layer.get_buffer(self.layout.scale)

    def shift(self, norm: str) -> Tensor:
        """What a norm adds to every row, [T, D]."""
        bias = getattr(self.layer.get_submodule(norm), "bias", None)
        return torch.zeros_like(self.base) if bias is None else bias.expand_as(self.base)

    def mlp_biases(self) -> list[Tensor]:
        known = dict(self.layer.named_parameters())
        names = {n.removesuffix("weight") + "bias" for n in self.layout.down if n.endswith("weight")}
        names |= {n + "_bias" for n in self.layout.down}
        return [known[name] for name in sorted(names) if name in known]

    def held(self, norm: str | None) -> Callable[[Tensor], Tensor]:
        """The linear map that a norm was in an undisturbed run; without one, nothing is done.

        RMS norms differ in whether they multiply by the weight or by 1 + weight: what the module returned
        decides, and neither is an error. A layer norm's bias is its `shift`.
        """
        if norm is None:
            return lambda x: x
        module: Any = self.layer.get_submodule(norm)
        given, returned = self.watch(norm, "input"), self.watch(norm, "output")
        if isinstance(module, nn.LayerNorm):
            std = (given.var(-1, keepdim=True, correction=0) + module.eps).sqrt()
            return lambda x: (x - x.mean(-1, keepdim=True)) / std * module.weight
        epsilon = float(getattr(module, "variance_epsilon", None) or module.eps)
        row = (given.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        for gain in (module.weight, 1 + module.weight):
            if torch.allclose(given * row * gain, returned, rtol=1e-5, atol=1e-5):
                return lambda x: x * row * gain
        raise AssertionError(f"{norm} is not a root-mean-square norm")


def _attention_parts(bench: _Bench, mid: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    layout = bench.layout
    projection = bench.layer.get_submodule(layout.out)
    z = bench.watch(layout.out, "input")
    norm = bench.held(layout.attention_norm)
    width = z.shape[1] // heads
    pairs = mid.new_zeros(heads, bench.tokens, *mid.shape)
    for source in range(bench.tokens):
        with _SilentSource(source, bench.tokens) as mode:
            missing = z - bench.watch(layout.out, "input")
        assert mode.seen == 1, f"{mode.seen} products of an attention matrix and values"
        for head in range(heads):
            one = torch.zeros_like(z)
            one[:, head * width : (head + 1) * width] = missing[:, head * width : (head + 1) * width]
            if layout.attention_norm is not None:
                pairs[head, source] = norm(projection(one) - projection(torch.zeros_like(one)))
                continue
            hook = projection.register_forward_pre_hook(
                lambda _m, args, one=one: (args[0] - one.reshape(args[0].shape),)
            )
            pairs[head, source] = mid - bench.run()
            hook.remove()
    bias = getattr(projection, "bias", None)
    if bias is None:
        return pairs, torch.zeros_like(mid)
    if layout.attention_norm is not None:
        return pairs, norm(bias.expand_as(mid))
    with bench.zeroed((bias, ...)):
        return pairs, mid - bench.run()


def _mlp_parts(bench: _Bench, post: Tensor) -> tuple[Tensor, Tensor]:
    layout = bench.layout
    groups = [_neuron_parts(bench, layout.down, layout.mlp_norm, post.shape[1])]
    if layout.second is not None:
        groups.append(_neuron_parts(bench, layout.second[:1], layout.second[1], post.shape[1]))
    return torch.cat([neurons for neurons, _ in groups]), sum(
        (bias for _, bias in groups), torch.zeros_like(post)
    )


def _neuron_parts(
    bench: _Bench, down: tuple[str, ...], norm_name: str | None, width: int
) -> tuple[Tensor, Tensor]:
    def raw() -> Tensor:
        return bench.run() if norm_name is None else bench.watch(norm_name, "input")

    whole = raw()
    norm = bench.held(norm_name)
    neurons = []
    for name in down:
        weights = [bench.layer.get_parameter(n) for n in name.split("+")]
        for column in _columns(weights[0], width):
            with bench.zeroed(*((weight, column) for weight in weights)):
                neurons.append(norm(whole - raw()))
    biases = torch.zeros_like(bench.base)
    for bias in bench.mlp_biases() if down == bench.layout.down else ():
        with bench.zeroed((bias, ...)):
            biases += norm(whole - raw())
    return torch.stack(neurons), biases


def _columns(weight: Tensor, width: int) -> Iterator[tuple[Any, ...]]:
    """Indices of what one neuron owns: along the axis that is not the stream's, expert by expert."""
    axes = [axis for axis in (-2, -1) if weight.shape[axis] != width]
    assert len(axes) == 1, f"a down projection of {tuple(weight.shape)} beside a stream of {width}"
    experts = range(weight.shape[0]) if weight.dim() == 3 else [None]
    for expert in experts:
        for n in range(weight.shape[axes[0]]):
            at = (slice(None), n) if axes[0] == -1 else (n, slice(None))
            yield at if expert is None else (expert, *at)


# --- what a test asserts ---

# Shares are stored in float32, and most models compute softmax and norms in float32 even in float64.
TOLERANCE = 5e-6


def assert_complete(parts: Parts) -> None:
    """What was taken away piece by piece is all that there was."""
    steps = [(parts.carried, parts.post, parts.neurons.sum(0) + parts.mlp_bias)]
    if len(parts.pairs):
        steps.append((parts.base, parts.mid, parts.pairs.sum((0, 1)) + parts.attention_bias))
    for before, after, added in steps:
        error = float((after - before - added).abs().max() / (after - before).abs().max())
        assert error <= 5e-6, f"what was taken away adds up to {error:.1e}"


def assert_trace(trace: Any, layer: int, parts: Parts, where: str) -> None:
    """Everything that a trace (floor=0, more neurons than there are) says of a layer equals the oracle's.

    Stored heads and neurons, heads and neurons on demand, residual, bias and blocks.
    """

    def same(got: Any, want: Tensor, what: str) -> None:
        assert_within(torch.as_tensor(got), want, TOLERANCE, f"{where}: {what}")

    parallel = bool(trace.data.parallel[layer])
    whole, block = parts.post if parallel else parts.mid, parts.post - parts.carried
    H, T = parts.pairs.shape[:2]
    if H:
        rivals = [block] if parallel else []
        every = torch.stack([*parts.pairs.flatten(0, 1), parts.base, parts.attention_bias, *rivals])
        expected = shares(every, whole)
        pairs, others = torch.unflatten(expected[: H * T], 0, (H, T)), expected[H * T :]
        same(_stored_pairs(trace.data, layer, H, T), pairs, "stored heads")
        maps = np.stack([trace.contribution_map(layer, head) for head in range(H)])
        same(maps.transpose(0, 2, 1), pairs, "heads on demand")
        same(trace.residual[layer], others[0], "residual")
        same(trace.bias[layer], others[1], "bias")
        if parallel:
            same(trace.mlp[layer], others[2], "mlp")
    else:
        mixer = shares(torch.stack([parts.base, parts.mid - parts.base]), parts.mid)
        same(trace.opaque[layer], mixer[1], "what stands in the attention's place")
    if not parallel:
        same(trace.mlp[layer], shares(torch.stack([parts.carried, block]), parts.post)[1], "mlp")
    expected = shares(torch.stack([*parts.neurons, parts.carried, parts.mlp_bias]), parts.post)[:-2]
    F = len(expected)
    kept = trace.data.neurons
    assert bool((kept.index[layer, :, F:] == -1).all()), f"{where}: more neurons than there are"
    stored = np.zeros((T, F))
    np.put_along_axis(stored, kept.index[layer, :, :F].astype(int), kept.contribution[layer, :, :F], axis=1)
    same(stored.T, expected, "stored neurons")
    for position in (0, T - 1):
        row = {n.neuron: n.contribution for n in trace.neurons(layer, position, k=F)}
        same([row[n] for n in range(F)], expected[:, position], "neurons on demand")


def _stored_pairs(data: Any, layer: int, heads: int, tokens: int) -> NDArray[np.float64]:
    """[H, T source, T destination]"""
    result = np.zeros((heads, tokens, tokens))
    edges = data.edges
    for edge in range(*edges.layer_ptr[layer : layer + 2]):
        for at in range(*edges.head_ptr[edge : edge + 2]):
            result[edges.head[at], edges.source[edge], edges.destination[edge]] = edges.head_weight[at]
    return result
