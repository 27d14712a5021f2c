"""Sublayers that are one part: named for what they are, and let in only where the caller asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmtt.errors import ClosureError
from lmtt.structure.capture import capture_layer
from lmtt.structure.spec import (
    AttentionWrite,
    CapturedLayer,
    CapturedWrite,
    LayerStructure,
    MlpWrite,
    OpaqueWrite,
    Stage,
)
from lmtt.structure.verify import check_closure


@torch.no_grad()
def admit(
    layer: nn.Module,
    structure: LayerStructure,
    index: int,
    hidden: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> LayerStructure:
    """`structure` with every write opaque whose parts do not add up on this run, and why.

    Needs `watching(model)` around it. The layer runs once more over hidden [1, T, D].
    """
    _, captured = capture_layer(layer, structure, index, hidden, args, kwargs)
    for number, stage in enumerate(captured.stages):
        for write in stage.writes:
            why = _why_closed(index, write)
            if why is None:
                continue
            for known in structure.writes:
                if known.stage == number and _is_of(known.kind, write):
                    structure = structure.closed(known.module, why)
    return structure


def _why_closed(index: int, write: CapturedWrite) -> str | None:
    if isinstance(write, OpaqueWrite):
        return write.reason if write.kind == "opaque" else None
    alone = Stage(torch.zeros_like(write.written), write.written, (write,))
    try:
        check_closure(CapturedLayer(index, (alone,)), full=True)
    except ClosureError as error:
        return str(error).partition(": ")[2]  # less the layer's number: it stands for all of its kind
    return None


def _is_of(kind: str, write: CapturedWrite) -> bool:
    if isinstance(write, AttentionWrite):
        return kind == "attention"
    return isinstance(write, MlpWrite) and kind in ("mlp", "experts")


def whole_sublayers(captured: CapturedLayer) -> list[dict[str, Any]]:
    """What of a layer was not taken apart: layer, sublayer (its module), kind and reason of each."""
    return [
        {"layer": captured.index, "sublayer": write.module, "kind": write.kind, "reason": write.reason}
        for stage in captured.stages
        for write in stage.writes
        if isinstance(write, OpaqueWrite)
    ]
