"""What layers leave for later ones beside the stream, such as keys and values that several layers share.

A model hands all its layers one mapping, empty at first, which they fill and read in turn. A layer that is
run by itself finds there only what was run before it. So the mapping of a dry run knows the way: where
something is missing, the layers are run from the first one until it is there, unseen by whoever watches.
"""

from __future__ import annotations

from collections import Counter, UserDict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import StructureError
from lmtt.structure.attention_hook import unseen

Given = tuple[tuple[Any, ...], dict[str, Any]]


class HandedOn(UserDict[Any, Any]):
    """Fills itself: a missing key is what one of `layers`, run on `given` from `hidden` on, leaves there."""

    def __init__(self, layers: Sequence[nn.Module], hidden: Tensor) -> None:
        super().__init__()
        self._layers, self._hidden = layers, hidden
        self._filling = False
        self.given: list[Given] = []

    def __missing__(self, key: Any) -> Any:
        if self._filling or not self.given:
            raise KeyError(key)
        self._filling = True
        try:
            with torch.no_grad(), unseen():
                self._fill(key)
        finally:
            self._filling = False
        if key not in self.data:
            raise KeyError(key)
        return self.data[key]

    def _fill(self, key: Any) -> None:
        hidden = self._hidden
        for index, (layer, (args, kwargs)) in enumerate(zip(self._layers, self.given, strict=True)):
            if any(parameter.device.type == "meta" for parameter in layer.parameters()):
                raise StructureError(
                    f"{key!r} of layer {index} is needed by a later one, and its weights are not in memory",
                    remedy="trace the prompt again, from the first layer on",
                )
            output = layer(hidden, *args, **kwargs)
            if key in self.data:
                return
            hidden = output[0] if isinstance(output, (tuple, list)) else output


def link(layers: Sequence[nn.Module], hidden: Tensor, given: Sequence[Given]) -> list[Given]:
    """The layers' arguments; an empty mapping that several of them share becomes one that fills itself."""
    found = [v for _, kwargs in given for v in kwargs.values() if isinstance(v, MutableMapping) and not v]
    times = Counter(id(value) for value in found)
    linked = {id(v): HandedOn(layers, hidden) for v in found if times[id(v)] > 1}
    result = [(args, {n: linked.get(id(v), v) for n, v in kwargs.items()}) for args, kwargs in given]
    for mapping in linked.values():
        mapping.given = result
    return result
