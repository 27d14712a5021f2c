"""Let a model whose layers are streamed run by itself, one reading of them for each of its forwards.

That is what generating text takes: every new token is one more forward, hence one more reading of the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

Turn = Callable[[int], AbstractContextManager[None]]


@contextmanager
def forwards(layers: nn.ModuleList, reading: Callable[[], AbstractContextManager[Turn]]) -> Iterator[None]:
    """Within, a pass of the model's own forward over `layers` is one `reading`, a layer's run its turn."""
    last = len(layers) - 1
    with ExitStack() as whole:
        one = whole.enter_context(ExitStack())
        turns: list[Turn] = []

        def wrapped(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def run(*args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    one.close()  # of a forward that was broken off
                    turns[:] = [one.enter_context(reading())]
                with turns[0](index):
                    output = forward(*args, **kwargs)
                if index == last:
                    turns.clear()
                    one.close()
                return output

            return run

        for index, layer in enumerate(layers):
            own = layer.__dict__.get("forward")
            layer.forward = wrapped(index, layer.forward)
            whole.callback(_put_back, layer, own)
        yield


def _put_back(layer: nn.Module, own: Any) -> None:
    if own is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.forward = own
