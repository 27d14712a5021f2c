"""Record what a model hands to its attention function, and nothing else about how it attends.

Nearly every transformers model asks `AttentionInterface.get_interface(name, default)` for the function
that computes attention. While a model is *watched*, whatever that call resolves to (sdpa, the model
file's own eager function, an override) is wrapped: the wrapper notes the arguments and calls it. The
implementation's name, the mask functions and the config stay the model's own, because some models
branch on that name; so the numbers are the same bits. Wrappers are transparent to every other model
and thread: they record only into the `recording` of the running context.

Models that attend without the registry are seen through the calls they cannot avoid:
`scaled_dot_product_attention`, or softmax(...) @ v (`WatchAttention`).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lmtt.errors import StructureError
from lmtt.structure.lineage import key_of

Source = Literal["registry", "sdpa", "product"]

_WATCHABLE = ("sdpa", "eager")


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, batch dimension kept ([B, H, T, E] as the model handed it over).

    For source "product", `probabilities` [B, H, T, T] replaces q, k and everything of the logits.
    """

    source: Source
    module: nn.Module | None
    value: Tensor
    output: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = True  # masked causally when `mask` is None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    position_bias: Tensor | None = None
    softcap_left_out: bool = False  # given to a function that does not know it
    probabilities: Tensor | None = None


Sink = Callable[[AttentionCall], None]
_sink: ContextVar[Sink | None] = ContextVar("lmtt_attention_sink", default=None)
_lock = threading.Lock()
_watchers = 0
_original: Callable[..., Any] | None = None


@contextmanager
def recording(sink: Sink) -> Iterator[None]:
    """Send every attention call of this context to `sink`; needs `watching` around it."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextmanager
def unseen() -> Iterator[None]:
    """Whatever runs in this context is recorded by nobody."""
    token = _sink.set(None)
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        _sink.reset(token)


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Let `recording` see the attention calls of `model`; on exit everything is as it was found.

    Raises StructureError for a model in training mode (dropout would make A another matrix than the
    one recorded) and for attention implementations other than sdpa and eager.
    """
    if model.training:
        raise StructureError(
            "the model is in training mode, so its dropout is random", remedy="call model.eval() first"
        )
    for config in _configs(model):
        name = getattr(config, "_attn_implementation", None)
        if name is not None and name not in _WATCHABLE:
            raise StructureError(
                f"attention implementation {name!r} cannot be watched",
                expected=" or ".join(_WATCHABLE),
                remedy="load the model with attn_implementation='sdpa'",
            )
    _install()
    try:
        yield
    finally:
        _uninstall()


def _configs(model: nn.Module) -> list[Any]:
    """The configs that the attention modules themselves consult, each once."""
    return list({id(m.config): m.config for m in attention_modules(model)}.values())


def attention_modules(model: nn.Module) -> list[Any]:
    """Modules that have a config and call themselves attention."""
    return [m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "config")]


def _install() -> None:
    global _watchers, _original  # noqa: PLW0603 - a process-wide registry is being wrapped
    with _lock:
        _watchers += 1
        if _watchers > 1:
            return
        _original = AttentionInterface.get_interface

        @functools.wraps(_original)
        def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
            assert _original is not None
            return _recorded(_original(self, *args, **kwargs))

        AttentionInterface.get_interface = get_interface


def _uninstall() -> None:
    global _watchers, _original  # noqa: PLW0603 - likewise
    with _lock:
        _watchers -= 1
        if _watchers == 0:
            assert _original is not None
            AttentionInterface.get_interface = _original
            _original = None


def _recorded(attend: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attend)
    def recorded(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = attend(module, query, key, value, attention_mask, *args, **kwargs)
        sink = _sink.get()
        if sink is not None:
            causal = kwargs.get("is_causal")
            sink(
                AttentionCall(
                    source="registry",
                    module=module,
                    query=query,
                    key=key,
                    value=value,
                    output=result[0],
                    mask=attention_mask,
                    causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
                    scale=kwargs.get("scaling"),
                    softcap=kwargs.get("softcap"),
                    softcap_left_out=attend is sdpa_attention_forward,
                    sinks=kwargs.get("s_aux"),
                    position_bias=kwargs.get("position_bias"),
                )
            )
        return result

    return recorded


class WatchAttention(TorchFunctionMode):
    """Send sdpa calls and softmax(...) @ v products made outside the registry to `sink`.

    Products are recognised by lineage: the left operand is a softmax's output, perhaps cast, reshaped or
    masked once more.
    """

    _FOLLOWS = frozenset(
        {"to", "type_as", "float", "half", "bfloat16", "double", "view", "reshape", "dropout", "masked_fill"}
    )

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink
        self._softmax: dict[tuple[int, int, int], Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._sink(_sdpa_call(output, *args, **kwargs))
        elif not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
            return output
        elif name == "softmax" or (name in self._FOLLOWS and key_of(args[0]) in self._softmax):
            self._softmax[key_of(output)] = output
        elif name in {"matmul", "__matmul__", "bmm"} and key_of(args[0]) in self._softmax:
            self._sink(
                AttentionCall(
                    source="product", module=None, value=args[1], output=output, probabilities=args[0]
                )
            )
        return output


def _sdpa_call(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    return AttentionCall(
        source="sdpa",
        module=None,
        query=query,
        key=key,
        value=value,
        output=output,
        mask=attn_mask,
        causal=is_causal,
        scale=scale,
    )


def not_causal(where: str) -> StructureError:
    """The refusal of an attention that looks ahead."""
    return StructureError(
        f"{where}: attention is not causal",
        expected="a decoder's causal mask",
        remedy="a prompt that is read in both directions cannot be attributed; "
        "an encoder that is meant as a decoder needs is_decoder=True in its config",
    )


def plain_mask(
    mask: Tensor | None, causal: bool, tokens: int, device: torch.device, where: str = "this layer"
) -> tuple[Tensor | None, int | None]:
    """Reduce a model's mask to (mask, window): what is left to say beyond "causal".

    mask: [1, 1 or H, T, T'] bool (True = may attend) or additive. Additive masks whose entries are all 0
    or "minus infinity" become bool ones; a plain causal mask becomes (None, None), a causal band of
    width w becomes (None, w). Raises StructureError where a query may attend to a later token.
    """
    if mask is None:
        if not causal and tokens > 1:
            raise not_causal(where)
        return None, None
    mask = mask[0, ..., :tokens, :tokens]
    if mask.dim() == 2:
        mask = mask[None]
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if mask.dtype != torch.bool:
        # Models write "minus infinity" as -inf or as the smallest number of some dtype.
        shut = mask <= torch.finfo(mask.dtype).min / 2
        if bool(((mask == 0) | shut).all()):
            mask = ~shut
        elif bool(shut[:, ~below].all()):
            return mask, None
        else:
            raise not_causal(where)
    if bool((mask & ~below).any()):
        raise not_causal(where)
    if mask.shape[0] == 1:
        width = int(mask[0, -1].sum())
        if torch.equal(mask[0], below & ~below.tril(-width)):
            return None, (None if width >= tokens else width)
    return mask, None


def default_scale(width: int) -> float:
    """Scale of q.k where a model leaves it to the attention function."""
    return 1.0 / math.sqrt(width)
