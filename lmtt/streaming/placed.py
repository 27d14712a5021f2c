"""The weights of a model that a `device_map` has placed: each layer runs where it is put.

For its turn a layer's weights are brought by the hooks that would bring them for its forward, and stay until
what was captured has been attributed; what enters it is moved to its device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lmtt.checkpoint.load import refuse_nonfinite
from lmtt.checkpoint.placed import at_hand, is_offloaded, moved, run_device
from lmtt.streaming.meter import Meter
from lmtt.streaming.weights import ResidentWeights
from lmtt.structure.replay import find_layers


class PlacedWeights(ResidentWeights):
    """Layers have their weights, or get them from where the map put them.

    check : refuse weights that are not finite, here what lies outside the layers, and each layer's when it
        has its first turn; those in memory are whoever loaded them to check.
    """

    def __init__(self, meter: Meter, model: Any, *, check: bool = False) -> None:
        super().__init__(meter)
        self._path, self._layers = find_layers(model)
        self._keep = tuple(getattr(model, "_skip_keys_device_placement", None) or ())
        self._unchecked = set(range(len(self._layers))) if check else set()
        self.resident = not is_offloaded(model)
        if check:
            inside = {id(module) for module in self._layers.modules()}
            for path, module in model.named_modules():
                own = any(p is not None and p.is_meta for p in module._parameters.values())
                if own and id(module) not in inside:
                    with at_hand(module):
                        refuse_nonfinite(module, path)

    def brought(self, layer: int, value: Any) -> Any:
        return moved(value, run_device(self._layers[layer]), self._keep)

    def at_hand(self, module: nn.Module) -> AbstractContextManager[object]:
        return at_hand(module)

    @contextmanager
    def _turn(self, layer: int) -> Iterator[None]:
        module: nn.Module = self._layers[layer]
        device = run_device(module)
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))  # kernels are launched on the current one
            begun = time.perf_counter()
            self.traffic.bytes_taken += stack.enter_context(at_hand(module))
            self.traffic.seconds_waiting += time.perf_counter() - begun
            if layer in self._unchecked:
                refuse_nonfinite(module, f"{self._path}.{layer}")
                self._unchecked.discard(layer)
            stack.enter_context(super()._turn(layer))
            yield
