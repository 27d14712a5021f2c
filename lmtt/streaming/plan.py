"""How many bytes a run takes, known before anything is read, and what to do within a limit.

The limited quantity is memory beyond what the process had when the model was loaded: weights, activations,
workspace, results. On the CPU that is resident memory that no file backs; what the page cache holds is not
counted, for the system takes it back when it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from lmtt.errors import InputError

FIXED = 24 << 20  # threads, allocator, what is imported on first use: fitted to what runs took
WORKSPACE = 64 << 20  # what the kernels are given, unless less fits
SMALLEST_WORKSPACE = 1 << 20
RECORD = 24  # bytes of a pair that is evaluated exactly, and of finding it again
PREDICTION_WORKSPACE = (
    16 << 20
)  # of logits; of all phases this one would hold the most, and gains nothing by it
PACKING = 4 / 3  # of a layer's experts, what transformers' packing holds besides
LAYERS_AHEAD = 2  # read at most while one computes
NOMINAL_TOKENS = 512  # a model that fits for a prompt of so many stays resident
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30,
          "TI": 2**40}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """8 GiB of "8GiB", "8 GiB" or 8589934592; "8GB" is 8e9. InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(text), re.IGNORECASE)
    if isinstance(text, bool) or not match or float(match[1]) <= 0:
        raise InputError("not an amount of memory", expected="as in 8GiB, 512MiB or 6GB", got=repr(text))
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def in_words(nbytes: int) -> str:
    """Rounded up to a tenth of a MiB or GiB: what is said to suffice must suffice."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size or unit == "MiB":
            tenths = -(-nbytes * 10 // size)
            return f"{tenths // 10}.{tenths % 10}{unit}" if tenths % 10 else f"{tenths // 10}{unit}"
    raise AssertionError


@dataclass(frozen=True)
class Shapes:
    """What the formulas need of a model; `itemsize` bytes for each element computed with."""

    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    itemsize: int
    eager: bool  # attention materialises T x T scores in float32

    @staticmethod
    def of(model: Any, layers: int, dtype: torch.dtype) -> Shapes:
        config = model.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        width = int(config.hidden_size)
        routed = int(getattr(config, "num_experts_per_tok", 0) or 0)
        dense = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        experts = int(getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0) or 0)
        expert = int(getattr(config, "moe_intermediate_size", 0) or dense)
        shared = int(getattr(config, "shared_expert_intermediate_size", 0) or 0)
        return Shapes(
            layers=layers,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            d_model=width,
            d_head=int(getattr(config, "head_dim", None) or (width // heads if heads else 0)),
            d_mlp=experts * expert + shared if experts and routed else int(dense),
            d_vocab=int(config.vocab_size),
            itemsize=dtype.itemsize,
            eager=getattr(config, "_attn_implementation", None) == "eager",
        )


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint, from its headers."""

    all: int  # every parameter, in the dtype computed with
    rest: int  # outside layers and vocabulary, likewise
    raw_layer: int  # the largest layer as stored
    decoded_layer: int  # the most that a layer takes besides its raw bytes: casts, dequantised and packed
    raw_total: int  # all layers as stored


@dataclass(frozen=True)
class Bytes:
    """Where the memory goes at the peak."""

    fixed: int
    resident: int  # weights that stay
    ring: int  # raw bytes read ahead
    decoded: int
    hidden: int
    activations: int
    attribution: int
    results: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """How a pass runs, and what it is expected to take."""

    resident: bool
    workspace: int
    bytes: Bytes

    @property
    def arena(self) -> int:
        return self.bytes.ring


def activations(shapes: Shapes, tokens: int) -> int:
    """What a layer's forward takes at once, with copies that the capture keeps.

    Queries to outputs, MLP, norms, scores.
    """
    s, T = shapes, tokens
    attention = (s.heads + 2 * s.kv_heads) * s.d_head + 2 * (s.heads - s.kv_heads) * s.d_head
    attention += 4 * s.heads * s.d_head
    scores = 3 * s.heads * T * 4 if s.eager else T * s.itemsize
    return T * ((attention + 4 * s.d_mlp + 6 * s.d_model) * s.itemsize + 3 * s.d_model * 4 + scores)


def captured(shapes: Shapes, tokens: int) -> int:
    """What of it is still there when the kernels run."""
    s = shapes
    return tokens * ((s.heads + 2 * s.kv_heads) * s.d_head + s.d_mlp + 6 * s.d_model) * s.itemsize


def attribution(shapes: Shapes, tokens: int, workspace: int) -> int:
    """What the kernels of one layer take at once: what they widen to float32, workspace, and shares.

    csrc/core divides the workspace: half for the pairs or rows being evaluated, a quarter for weights and
    values in panels, a quarter for directions, each no more than there is.
    """
    s, T = shapes, tokens
    copies = 1 if s.itemsize >= 4 else 2  # a weight is widened, then laid out in rows
    states = 3 * T * s.d_model * 4 if s.itemsize < 4 else 0
    heads = s.heads * s.d_head
    panels = (2 * s.kv_heads * s.d_head * T + heads * s.d_model) * 4
    attention = copies * heads * s.d_model * 4 + (heads + 2 * s.kv_heads * s.d_head) * T * 4
    attention += min(workspace // 2, RECORD * s.heads * T * T // 2) + min(workspace // 4, T * heads * 4)
    attention += (panels if panels <= workspace // 4 else 0) + 4 * T * T
    neurons = (copies * s.d_model + s.d_model // 16) * s.d_mlp * 4
    neurons += min(workspace // 2, 4 * T * s.d_mlp) + (T * s.d_mlp * 4 if s.itemsize < 4 else 0)
    return max(attention, neurons) + states


def predictions(shapes: Shapes, tokens: int, *, resident: bool) -> int:
    """What logits over the vocabulary take at once, a tile of it at a time.

    A tile that is read is held as stored and as computed with; a resident one is used where it lies.
    """
    tiles = 0 if resident and shapes.itemsize >= 4 else 1 if resident else 2
    held = min(tiles * PREDICTION_WORKSPACE, 4 * tiles * shapes.d_vocab * shapes.d_model)
    return PREDICTION_WORKSPACE + held + 3 * tokens * shapes.d_model * 4


def estimate(
    shapes: Shapes, weights: Weights, tokens: Sequence[int], *, resident: bool, ring: int, workspace: int,
    full: bool = True,
) -> Bytes:  # fmt: skip
    """Bytes of a pass over prompts of these lengths.

    ring : bytes for raw layers read ahead; workspace : what the kernels are given.
    full : the residual stream of every layer is kept.
    """
    longest, every = max(tokens), sum(tokens)
    forward, loaded = activations(shapes, longest), (0 if resident else ring + weights.decoded_layer)
    # Kernels run when a layer's forward is over; predictions come when its weights are gone, too.
    kernels = captured(shapes, longest) + attribution(shapes, longest, workspace) - forward
    working = max(0, kernels, predictions(shapes, longest, resident=resident) - loaded - forward)
    state = shapes.d_model * shapes.itemsize
    kept = every * (shapes.layers + 1) * (state if full else 0)
    edges = sum(min(T * T // 2, 64 * T) for T in tokens) * shapes.layers * 24
    return Bytes(
        fixed=FIXED,
        resident=weights.all if resident else weights.rest + every * state,
        ring=0 if resident else ring,
        decoded=0 if resident else weights.decoded_layer,
        hidden=2 * every * state,
        activations=forward,
        attribution=working,
        results=kept + edges,
    )


def make_plan(
    shapes: Shapes,
    weights: Weights,
    limit: int,
    tokens: Sequence[int],
    *,
    full: bool = True,
    may_stay: bool = True,
    must_stay: bool = False,
) -> Plan:
    """The fastest way that fits: everything resident, else layers read ahead as far as the limit allows.

    may_stay, must_stay : whether the weights may, or have to, be in memory all along.

    Raises InputError with the smallest limit that works if this one does not.
    """
    if may_stay and not must_stay:
        whole = estimate(shapes, weights, tokens, resident=True, ring=0, workspace=WORKSPACE, full=full)
        if whole.total <= limit:
            return Plan(True, WORKSPACE, whole)
    ring = 0 if must_stay else weights.raw_layer
    for workspace in _workspaces():
        one = estimate(shapes, weights, tokens, resident=must_stay, ring=ring, workspace=workspace, full=full)
        if one.total <= limit:
            break
    if one.total > limit:
        raise _too_little(limit, one, tokens)
    if must_stay:
        return Plan(True, workspace, one)
    # A layer lies in one piece: room for part of one would never be used.
    ahead = min(LAYERS_AHEAD, (limit - one.total) // max(1, weights.raw_layer)) * weights.raw_layer
    ring = min(weights.raw_layer + ahead, weights.raw_total)
    return Plan(
        False,
        workspace,
        estimate(shapes, weights, tokens, resident=False, ring=ring, workspace=workspace, full=full),
    )


def smallest_limit(shapes: Shapes, weights: Weights, tokens: Sequence[int], *, full: bool = True) -> int:
    """Bytes that a pass over such prompts needs at least, its weights read layer by layer."""
    ring, workspace = weights.raw_layer, SMALLEST_WORKSPACE
    return estimate(shapes, weights, tokens, resident=False, ring=ring, workspace=workspace, full=full).total


def _workspaces() -> Iterator[int]:
    """What the kernels may be given, falling."""
    workspace = WORKSPACE
    while workspace >= SMALLEST_WORKSPACE:
        yield workspace
        workspace //= 4


def _too_little(limit: int, needed: Bytes, tokens: Sequence[int]) -> InputError:
    largest = max(_NAMES, key=lambda name: int(getattr(needed, name)))
    return InputError(
        f"memory={in_words(limit)} is too little for {sum(tokens)} tokens",
        expected=f"at least {in_words(needed.total)}",
        remedy=f"{in_words(getattr(needed, largest))} of it are {_NAMES[largest]}",
    )


_NAMES = {
    "resident": "weights outside the layers",
    "ring": "one layer as stored",
    "decoded": "one layer as computed with",
    "hidden": "the residual stream",
    "activations": "a layer's activations",
    "attribution": "the attribution's workspace",
    "results": "results",
}
