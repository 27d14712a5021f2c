"""Run a model one layer at a time, with everything that is not a layer left to the model itself.

1. `dry_run`: each decoder layer's forward is replaced by a shell that passes its input through and notes
   the exact arguments it was given. The model's own forward makes embeddings, rotary tables and masks.
2. The caller runs the layers, one after another, with those arguments.
3. `finish`: the model's forward once more, the last shell returning the finished hidden state; the final
   norm, the head, its scale and softcap are the model's own.

Bit-identical to model(input_ids). Every patch is undone on exit, on errors too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lmtt.errors import StructureError
from lmtt.structure.handed_on import link


@dataclass(frozen=True)
class LayerCall:
    """What a layer is given besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LayerCalls:
    """One prompt's way through the decoder stack, without the layers' work."""

    hidden: Tensor  # [B, T, D], what the first layer is given
    calls: tuple[LayerCall, ...]
    returns_tuple: bool  # what the model expects its layers to return


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder stack and its path, by transformers' own markings, else by its length.

    Raises StructureError if there is none, or more than one that fits.
    """
    depth = _depth(model)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    unsplit = set(getattr(model, "_no_split_modules", None) or ())
    rules: tuple[Callable[[nn.ModuleList], bool], ...] = (
        lambda stack: all(type(layer).__name__ in unsplit for layer in stack),
        lambda stack: all(isinstance(layer, GradientCheckpointingLayer) for layer in stack),
        lambda stack: len(stack) == depth,
    )
    for rule in rules:
        found = [(name, stack) for name, stack in lists if rule(stack)]
        if len(found) > 1:
            found = [(name, stack) for name, stack in found if len(stack) == depth]
        if len(found) > 1:  # beside a tower for images or sound
            found = _within_decoder(model, found)
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise StructureError(
                f"{type(model).__name__} has {len(found)} decoder stacks",
                expected="one",
                got=", ".join(name for name, _ in found),
            )
    raise StructureError(
        f"no decoder stack found in {type(model).__name__}", expected="a ModuleList of layers"
    )


def _within_decoder(
    model: nn.Module, found: list[tuple[str, nn.ModuleList]]
) -> list[tuple[str, nn.ModuleList]]:
    """Those of several stacks that lie in what the model itself calls its decoder, if it does."""
    ask: Any = getattr(model, "get_decoder", None)
    decoder = ask() if ask is not None else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        return found
    inside = [(name, stack) for name, stack in found if any(m is stack for m in decoder.modules())]
    return inside or found


def _depth(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth: int | None = getattr(text, "num_hidden_layers", None)
    return depth


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward whose rest is not needed
    """Carries a value out of a forward."""

    def __init__(self, value: Any = None) -> None:
        super().__init__("forward ended early on purpose")
        self.value = value


class _Beside:
    """Stands for what a layer returns beside the stream; a model that hands it on is not a chain."""

    def __repr__(self) -> str:
        return "what the layer before returned beside the stream"


class _NotAChainError(StructureError):
    """A layer was not given what the one before returned."""


@torch.no_grad()
def dry_run(model: nn.Module, input_ids: Tensor, **inputs: Any) -> LayerCalls:
    """Record the arguments of every decoder layer for input_ids [B, T]; no layer and no head is run.

    `inputs` goes to the model's forward as it is. Raises StructureError for models whose layers are not
    a chain (something is done to the hidden state between them).
    """
    _, layers = find_layers(model)
    # A model that takes output[0] of its layers slices a bare tensor, which the next layer shows; after
    # an only layer nothing shows it, but a tuple that the model does not unpack breaks its final norm.
    first = len(layers) == 1
    try:
        calls = _dry_run(model, layers, input_ids, inputs, returns_tuple=first)
    except _NotAChainError as error:
        try:
            calls = _dry_run(model, layers, input_ids, inputs, returns_tuple=not first)
        except _NotAChainError:
            raise error from None
    _check_one_stream(model, calls.hidden, input_ids.shape[1])
    return calls


def _check_one_stream(model: nn.Module, hidden: Tensor, tokens: int) -> None:
    """Raise StructureError if the layers are given several streams side by side, which look like one."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    for what, got, one in (
        ("positions for each token", hidden.shape[-2], tokens),
        ("streams side by side", hidden.shape[-1], width),
    ):
        if hidden.dim() == 3 and one and got > one and got % one == 0:
            raise StructureError(
                f"the layers of {type(model).__name__} are given {got // one} {what}",
                expected="one",
                remedy="models that keep several streams and mix them have no single one to attribute",
            )


def _dry_run(
    model: nn.Module, layers: nn.ModuleList, input_ids: Tensor, inputs: dict[str, Any], returns_tuple: bool
) -> LayerCalls:
    calls: list[LayerCall] = []
    first: list[Tensor] = []
    last = len(layers) - 1

    def record(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if i == 0:
            first.append(hidden)
        calls.append(LayerCall(args, kwargs))
        if i == last and last > 0:
            raise _Stop
        return hidden

    def stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise _Stop

    with ExitStack() as stack:
        stack.enter_context(_shells(layers, record, returns_tuple))
        if last == 0:
            stack.callback(_head(model).register_forward_pre_hook(stop).remove)
        try:
            model(input_ids, use_cache=False, **inputs)
        except _Stop:
            pass
        except (TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if not calls:
                raise
            raise _NotAChainError(
                f"the layers of {type(model).__name__} hand on more than the residual stream",
                expected="layers that are given what the one before returned",
                got=" ".join(str(error).split()),
            ) from error
    if len(calls) != len(layers):
        raise StructureError(
            f"{type(model).__name__} ran {len(calls)} of its {len(layers)} layers",
            expected="each once, in order",
        )
    linked = link(list(layers), first[0], [(call.args, call.kwargs) for call in calls])
    return LayerCalls(first[0], tuple(LayerCall(*given) for given in linked), returns_tuple)


Shell = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


@contextmanager
def _shells(layers: nn.ModuleList, shell: Shell, returns_tuple: bool) -> Iterator[None]:
    """Replace every layer's forward by `shell(i, hidden, args, kwargs) -> hidden`, checking the chain."""
    previous: list[Tensor] = []
    count = 0

    def make(i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        name = next(iter(inspect.signature(original).parameters))

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop(name, None)
            if not isinstance(hidden, Tensor):
                raise _NotAChainError(
                    f"layer {i} is not given a hidden state first", got=type(hidden).__name__
                )
            if i != count:
                raise StructureError(f"layer {i} ran as number {count}", expected="each layer once, in order")
            if previous and not _same_tensor(hidden, previous[0]):
                raise _NotAChainError(
                    f"layer {i} is not given what layer {i - 1} returned", expected="layers in a chain"
                )
            if any(isinstance(value, _Beside) for value in (*args, *kwargs.values())):
                raise StructureError(
                    f"layer {i} is given more by layer {i - 1} than the residual stream",
                    expected="layers in a chain",
                )
            count += 1
            returned = shell(i, hidden, args[1:], kwargs)
            # A fresh view: the chain is told by storage, and nothing is copied.
            previous[:] = [returned.view_as(returned)]
            return (previous[0], _Beside()) if returns_tuple else previous[0]

        return forward

    saved = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, layer in enumerate(layers):
            layer.forward = make(i, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


@torch.no_grad()
def finish(
    model: nn.Module,
    input_ids: Tensor,
    hidden: Tensor,
    calls: LayerCalls,
    *,
    rows: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Logits [B, T, V] of the finished hidden state [B, T, D], by the model's own final norm and head.

    rows: positions whose logits are wanted, [n] int64; the head then sees only these, and the result is
    [B, n, V]. This is how a long prompt's logits are had in chunks.
    """
    with _finished(model, hidden, calls):
        if rows is None:
            return _logits(model(input_ids, use_cache=False, **inputs))
        keep = rows

        def narrow(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, keep], *args[1:])

        hook = _head(model).register_forward_pre_hook(narrow)
        try:
            return _logits(model(input_ids, use_cache=False, **inputs))
        finally:
            hook.remove()


@torch.no_grad()
def final(model: nn.Module, input_ids: Tensor, hidden: Tensor, calls: LayerCalls, **inputs: Any) -> Tensor:
    """What the output embedding is given, [B, T, D']: the finished hidden state after the final norm."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Stop(args[0])

    hook = _head(model).register_forward_pre_hook(stop)
    try:
        with _finished(model, hidden, calls):
            model(input_ids, use_cache=False, **inputs)
    except _Stop as stopped:
        value: Tensor = stopped.value
        return value
    finally:
        hook.remove()
    raise StructureError(f"{type(model).__name__} did not call its output embedding")


@contextmanager
def _finished(model: nn.Module, hidden: Tensor, calls: LayerCalls) -> Iterator[None]:
    _, layers = find_layers(model)
    last = len(layers) - 1

    def shell(i: int, given: Tensor, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Tensor:
        if i < last:
            return given
        if hidden.shape != given.shape:
            raise StructureError(
                "the finished hidden state has another shape",
                expected=tuple(given.shape),
                got=tuple(hidden.shape),
            )
        return hidden

    with _shells(layers, shell, calls.returns_tuple):
        yield


def _head(model: nn.Module) -> nn.Module:
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
        raise StructureError(
            f"{type(model).__name__} has no output embedding", expected="a causal language model"
        )
    return head


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits
