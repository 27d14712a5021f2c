"""How many bytes a run takes, known before anything is read, and what to do within a limit.

The limited quantity is memory beyond what the process had when the model was loaded: weights, activations,
workspace, results. On the CPU that is resident memory that no file backs; what the page cache holds is not
counted, for the system takes it back when it likes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from lmtt.errors import InputError

FIXED = 14 << 20  # the model's modules, what is imported on first use, what the allocator wastes
GEMM_DEPTH = 192  # rows of a matrix that each thread of a float32 product lays out anew; the room is kept
TOKENIZER = 860  # bytes of each entry of a vocabulary that a tokenizer holds
READING = {"json": 1300, "gguf": 1760}  # the same while it is read from such a file, weights being there
HEADER = {"json": 0, "gguf": 1950}  # while such a file's config is read, vocabulary and all, before weights
EDGES = 24  # kept of each row in the mean; prose leaves 16
KEPT_OF_A_ROW = 20 * 12 + 9 * 4  # bytes: top neurons, shares
WORKSPACE = 64 << 20  # what the kernels are given, unless less fits
SMALLEST_WORKSPACE = 1 << 20
RECORD = 24  # bytes of a pair that is evaluated exactly, and of finding it again
POSITIVE = 2 / 3  # of all pairs have a positive bound; without screening all these are evaluated
PREDICTION_WORKSPACE = 16 << 20  # of logits, which gain nothing by more
PACKING = 4 / 3  # of a layer's experts, what transformers' packing holds besides
KEEPING = 1.05  # what is kept only to save time leaves room for what no plan foresees
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
    device: str = "cpu"  # whose memory is limited; results and tokenizer are the host's

    @staticmethod
    def of(model: Any, layers: int, dtype: torch.dtype, device: str = "cpu") -> Shapes:
        """From the config; of a list, with an entry for each layer, the largest: that makes the peak."""
        config = model.config.get_text_config()

        def size(name: str) -> int:
            value = getattr(config, name, None) or 0
            return (
                max((int(one or 0) for one in value), default=0)
                if isinstance(value, (list, tuple))
                else int(value)
            )

        heads, width = size("num_attention_heads"), size("hidden_size")
        dense = size("intermediate_size") or size("n_inner") or 4 * width
        routed, experts = size("num_experts_per_tok"), size("num_experts") or size("num_local_experts")
        experts = experts or size("n_routed_experts")
        expert = size("moe_intermediate_size") or dense
        shared = size("shared_expert_intermediate_size") or size("n_shared_experts") * expert
        return Shapes(
            layers=layers,
            heads=heads,
            kv_heads=size("num_key_value_heads") or heads,
            d_model=width,
            d_head=size("head_dim") or (width // heads if heads else 0),
            d_mlp=max(dense, experts * expert + shared) if experts and routed else dense,
            d_vocab=size("vocab_size"),
            itemsize=dtype.itemsize,
            eager=getattr(config, "_attn_implementation", None) == "eager",
            device=device,
        )


class TokenizerBytes(NamedTuple):
    """What a model's tokenizer takes, all 0 without one."""

    kept: int = 0
    reading: int = 0  # while it is made, when the weights are there
    header: int = 0  # while the config is read that lies in one file with it, when they are not


NO_TOKENIZER = TokenizerBytes()


@dataclass(frozen=True)
class Weights:
    """Bytes of a checkpoint, from its headers."""

    all: int  # every parameter, in the dtype computed with
    rest: int  # outside layers and vocabulary, likewise
    raw_layer: int  # the largest layer as stored
    decoded_layer: int  # the most that a layer takes besides its raw bytes: casts, dequantised and packed
    raw_total: int  # all layers as stored
    head: int = 0  # the unembedding as stored
    tokenizer: TokenizerBytes = NO_TOKENIZER


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
        return sum(int(getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """How a pass runs, and what it is expected to take."""

    resident: bool
    workspace: int
    bytes: Bytes
    keeps_head: bool = False  # the unembedding, once it was read
    loading: int = 0  # bytes at the most while the model is loaded; 0: it was given as a loaded one

    @property
    def arena(self) -> int:
        return self.bytes.ring


def activations(shapes: Shapes, tokens: int) -> int:
    """What a layer's forward takes at the most, when gate, up and their product are there at once.

    By then the attention is over. What it freed is in blocks that are used again, not given back.
    """
    s, T = shapes, tokens
    attention = (s.heads + 2 * s.kv_heads + 2 * (s.heads + s.kv_heads) + 2 * s.heads) * s.d_head
    scores = 3 * s.heads * T * 4 if s.eager else 0
    return T * ((attention + 3 * s.d_mlp + 7 * s.d_model) * s.itemsize + scores)


def discovery(shapes: Shapes, tokens: int) -> int:
    """What a layer's forward takes while its structure is found: all that it makes is held to its end."""
    s, T = shapes, tokens
    attention = (2 * s.heads + 2 * s.kv_heads) * s.d_head + 9 * (s.heads + s.kv_heads) * s.d_head // 2
    norms = 4 * s.d_model * 4 if s.itemsize < 4 else 0  # in float32
    scores = 3 * s.heads * T * 4 if s.eager else 0
    return T * ((attention + 4 * s.d_mlp + 10 * s.d_model) * s.itemsize + norms + scores)


def captured(shapes: Shapes, tokens: int) -> int:
    """What of a forward is not given back when the kernels run; its proof sums a few rows only."""
    s = shapes
    return activations(s, tokens) - tokens * (2 * s.d_mlp - 2 * s.d_model) * s.itemsize


def attribution(shapes: Shapes, tokens: int, workspace: int) -> int:
    """What the kernels of one layer take at once: what they widen to float32, workspace, and shares.

    csrc/core divides the workspace: half for the pairs or rows being evaluated, a quarter for weights and
    values in panels, a quarter for directions, each no more than there is.
    """
    s, T = shapes, tokens
    heads, kv = s.heads * s.d_head, s.kv_heads * s.d_head
    widened = s.itemsize < 4  # float32 queries, keys, values, activations and W_O are read where they lie
    # W_down is widened, then laid out in rows: for a moment it is there twice.
    twice = 2 if widened else 1
    states = 3 * T * s.d_model * 4 if widened else 0
    panels = (2 * kv * T + heads * s.d_model) * 4
    pairs = min(workspace // 2, int(POSITIVE * RECORD * s.heads * T * T / 2)) + min(
        workspace // 4, T * heads * 4
    )
    pairs += panels if panels <= workspace // 4 else 0
    w_down = s.d_mlp * s.d_model * 4
    copies = (heads * s.d_model + (heads + 2 * kv) * T) * 4 if widened else 0
    attention = copies + 4 * T * T + states + pairs
    act = T * s.d_mlp * 4 if widened else 0
    rows = w_down // 16 + min(workspace // 2, 4 * T * s.d_mlp)
    return max(attention, act + max(twice * w_down, w_down + states + rows))


def predictions(
    shapes: Shapes, tokens: int, *, resident: bool, kept: bool = False, stored: float = 4.0
) -> int:
    """What logits over the vocabulary take at once, a tile of it at a time.

    A tile that is read is held as stored and as computed with; one that is `kept` as stored is decoded; a
    resident one is used where it lies. 16-bit tiles are widened. `stored`: bytes of an entry in the file.
    """
    s = shapes
    tile = min(s.d_vocab, PREDICTION_WORKSPACE // (16 * tokens + 4 * s.d_model))
    # Logits, a copy and their order; states before and after the last norm.
    logits = 16 * tokens * tile + 5 * tokens * s.d_model * 4
    widened = 4 if s.itemsize < 4 else 0
    copies = widened if resident else s.itemsize + widened + (0 if kept else stored)
    return logits + int(copies * tile * s.d_model)


def fixed(shapes: Shapes, weights: Weights, threads: int) -> int:
    """What is there whatever the prompt: modules, tokenizer, room in which products lay matrices out."""
    s = shapes
    if s.device != "cpu":
        return FIXED
    widest = max(s.d_mlp, s.heads * s.d_head, s.d_model)
    return FIXED + weights.tokenizer.kept + threads * GEMM_DEPTH * 4 * widest


def estimate(
    shapes: Shapes, weights: Weights, tokens: Sequence[int], *, resident: bool, ring: int, workspace: int,
    full: bool = True, head: bool = False,
) -> Bytes:  # fmt: skip
    """Bytes of a first pass over prompts of these lengths.

    ring : bytes for raw layers read ahead; workspace : what the kernels are given.
    full : the residual stream of every layer is kept; head : so is the unembedding, once it was read.
    """
    longest, every = max(tokens), sum(tokens)
    state = shapes.d_model * shapes.itemsize
    loaded = 0 if resident else ring + weights.decoded_layer
    results = every * (shapes.layers + 1) * (state if full else 0)
    kept = [T * (KEPT_OF_A_ROW + min(T // 2, EDGES) * 24) for T in tokens]
    results = results + sum(kept) * shapes.layers if shapes.device == "cpu" else 0
    # A structure is discovered in the first layers, when there are no results; all layers are run and leave
    # what the kernels work on; predictions come when no layer's weights are there any more.
    forward = max(activations(shapes, longest), discovery(shapes, longest) - results)
    kernels = captured(shapes, longest) + attribution(shapes, longest, workspace)
    stored = weights.head / max(1, shapes.d_vocab * shapes.d_model)
    tail = predictions(shapes, longest, resident=resident, kept=head, stored=stored)
    tail += weights.head if head else 0
    return Bytes(
        fixed=fixed(shapes, weights, torch.get_num_threads()),
        resident=weights.all if resident else weights.rest + every * state,
        ring=0 if resident else ring,
        decoded=0 if resident else weights.decoded_layer,
        hidden=2 * every * state,
        activations=forward,
        attribution=max(0, kernels - forward, tail - loaded - forward),
        results=results,
    )


def loading(shapes: Shapes, weights: Weights, *, resident: bool) -> int:
    """Bytes while a model is loaded, at the most: its tokenizer is read when its weights are there.

    Weights are read, decoded and checked in pieces that are small beside them.
    """
    held = weights.all if resident else weights.rest
    if shapes.device != "cpu":
        return FIXED + held
    return FIXED + max(weights.tokenizer.header, weights.tokenizer.reading + held)


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
    if may_stay and not must_stay and stays(shapes, weights, limit, tokens, full=full):
        whole = estimate(shapes, weights, tokens, resident=True, ring=0, workspace=WORKSPACE, full=full)
        return Plan(True, WORKSPACE, whole, loading=loading(shapes, weights, resident=True))
    ring = 0 if must_stay else weights.raw_layer
    for workspace in _workspaces():
        one = estimate(shapes, weights, tokens, resident=must_stay, ring=ring, workspace=workspace, full=full)
        if one.total <= limit:
            break
    if one.total > limit:
        raise _too_little(limit, one, tokens)
    if must_stay:
        return Plan(True, workspace, one, loading=loading(shapes, weights, resident=True))
    load = loading(shapes, weights, resident=False)
    if load > limit:
        raise InputError(
            f"memory={in_words(limit)} is too little to load the model",
            expected=f"at least {in_words(load)}",
            remedy=f"reading its tokenizer takes {in_words(max(weights.tokenizer))} of it",
        )
    # A layer lies in one piece: room for part of one would never be used.
    ahead = min(LAYERS_AHEAD, (limit - one.total) // max(1, weights.raw_layer)) * weights.raw_layer
    ring = min(weights.raw_layer + ahead, weights.raw_total)

    def streamed(head: bool) -> Bytes:
        return estimate(
            shapes, weights, tokens, resident=False, ring=ring, workspace=workspace, full=full, head=head
        )

    keeps = KEEPING * streamed(True).total <= limit
    return Plan(False, workspace, streamed(keeps), keeps, load)


def stays(shapes: Shapes, weights: Weights, limit: int, tokens: Sequence[int], *, full: bool = True) -> bool:
    """Whether the limit holds all weights with prompts of these lengths."""
    whole = estimate(shapes, weights, tokens, resident=True, ring=0, workspace=WORKSPACE, full=full)
    return max(whole.total, loading(shapes, weights, resident=True)) <= limit


def smallest_limit(shapes: Shapes, weights: Weights, tokens: Sequence[int], *, full: bool = True) -> int:
    """Bytes that a pass over such prompts needs at least, its weights read layer by layer."""
    ring, workspace = weights.raw_layer, SMALLEST_WORKSPACE
    one = estimate(shapes, weights, tokens, resident=False, ring=ring, workspace=workspace, full=full)
    return max(one.total, loading(shapes, weights, resident=False))


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
