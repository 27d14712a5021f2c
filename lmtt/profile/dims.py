"""A model's sizes as the cost of its layers needs them, from its config alone: its modules hold no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmtt.errors import InputError, StructureError
from lmtt.streaming.plan import NO_TOKENIZER, PACKING, Shapes, TokenizerBytes, Weights
from lmtt.structure.replay import find_layers

PACKED = 3  # axes of a matrix that holds one for each expert


@dataclass(frozen=True)
class Dims:
    """Sizes of a model. `active`: parameters of a layer that one token is multiplied with."""

    shapes: Shapes
    parameters: int  # of the whole model, tied ones once
    layer_parameters: int  # of the mean layer
    active: int  # of the mean layer; a mixture of experts uses some of its own
    packed: int  # of the mean layer, in experts that are read only where a token is routed to them
    used: float  # share of the experts that one token is routed to; 1 without any
    d_value: int  # width of a head's value
    kinds: int  # distinct layers, each discovered once
    dtype: str

    @property
    def itemsize(self) -> int:
        return self.shapes.itemsize


def dims_of(model: Any, dtype: torch.dtype, device: str = "cpu") -> Dims:
    """Of a transformers model, on the meta device or not.

    StructureError if its config does not say one size for all layers.
    """
    _, layers = find_layers(model)
    try:
        shapes = Shapes.of(model, len(layers), dtype, device)
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise StructureError(
            f"{type(model).__name__} cannot be planned for: its config does not say one size for all layers",
            got=error,
        ) from error
    config = model.config.get_text_config()
    return Dims(
        shapes=shapes,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=sum(p.numel() for p in layers.parameters()) // len(layers),
        active=sum(_active(layer, config) for layer in layers) // len(layers),
        packed=sum(_packed(layer) for layer in layers) // len(layers),
        used=_used(layers, config),
        d_value=int(getattr(config, "v_head_dim", None) or shapes.d_head),
        kinds=len({_kind(layer) for layer in layers}),
        dtype=str(dtype).removeprefix("torch."),
    )


def weights_of(
    model: Any, dtype: torch.dtype, stored: float, *, tokenizer: TokenizerBytes = NO_TOKENIZER
) -> Weights:
    """Bytes of the weights; `stored`: of each parameter in the checkpoint."""
    _, layers = find_layers(model)
    size = dtype.itemsize
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    packed = [_packed(layer) for layer in layers]
    ahead = [count - pack for count, pack in zip(counts, packed, strict=True)]  # experts come when routed to
    vocabulary = {id(m.weight): m.weight.numel() for m in _vocabulary(model)}
    everything = sum(p.numel() for p in model.parameters())
    # Raw bytes serve as they are where they need no cast and no packing.
    cast = [0 if stored == size else count - pack for count, pack in zip(counts, packed, strict=True)]
    return Weights(
        all=everything * size,
        rest=(everything - sum(counts) - sum(vocabulary.values())) * size,
        raw_layer=int(max(ahead) * stored),
        decoded_layer=max(
            c * size + int((1 + PACKING) * p * size) for c, p in zip(cast, packed, strict=True)
        ),
        raw_total=int(sum(ahead) * stored),
        head=int(model.get_output_embeddings().weight.numel() * stored),
        tokenizer=tokenizer,
    )


def _vocabulary(model: Any) -> list[Any]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if end is not None]


def check_tokens(config: Any, tokens: int) -> None:
    """InputError for a prompt that the model has no positions for."""
    if tokens < 1:
        raise InputError("--tokens is out of range", expected="1 or more", got=tokens)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(
            "the prompt is too long for the model", expected=f"at most {limit} tokens", got=tokens
        )


def _packed(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.dim() == PACKED)


def _used(layers: nn.ModuleList, config: Any) -> float:
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 0)
    experts = max((p.shape[0] for p in layers.parameters() if p.dim() == PACKED), default=0)
    return min(1.0, chosen / experts) if chosen and experts else 1.0


def _active(layer: nn.Module, config: Any) -> int:
    """Parameters of a layer that one token is multiplied with."""
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 0)
    total = 0
    for parameter in layer.parameters():
        experts = parameter.shape[0] if parameter.dim() == PACKED else 0
        used = min(chosen, experts) if chosen and experts else experts
        total += parameter.numel() * used // experts if experts else parameter.numel()
    return total


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """What the engine tells layers apart by when it discovers their structure."""
    return tuple(
        (name, type(module), tuple(tuple(p.shape) for p in module.parameters(recurse=False)))
        for name, module in layer.named_modules()
    )
