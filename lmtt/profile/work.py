"""How many operations and bytes each phase is: formulas of the sizes, and of what screening left to do.

Names as everywhere: T tokens, L layers, H heads, E d_head, D d_model, F d_mlp, V vocabulary. A multiply-add
is two flops or one lane; a lane of any other vector instruction counts like that of a multiply-add.
benchmarks/README.md derives the kernels' part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lmtt.profile.ceilings import Ceilings
from lmtt.profile.dims import Dims
from lmtt.streaming.plan import PREDICTION_WORKSPACE
from lmtt.structure.verify import PROOF_ROWS

# Lanes for each coordinate of an exact evaluation: sign, multiply-subtract, maximum, addition; the whole's
# sign and size once for four parts; and a multiplication and a comparison for each block of sixteen.
EVALUATION = 4 + 2 / 4 + 2 / 16
SOFTMAX = 40  # lanes for each pair: softmax, coefficient, bound, comparison, sums
SIGNS = 4  # coordinates that one look-up of a table of sums stands for
PAIRS, PAIRS_POWER = 4.4, -0.75  # of all (head, source) pairs PAIRS * T ** PAIRS_POWER are evaluated exactly
NEURONS = 0.03  # of all (position, neuron)
DECODING = 40  # small operations for each token of a prompt: its text, and where it lies in the whole
LAUNCHES = {  # small operations for each layer, as counted in the engine's loop
    "dry run": 2, "decode": 12, "forward": 60, "closure": 40, "screening": 4,
    "exact evaluation": 2, "reduction": 60, "transfer": 4, "store": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a phase does at least."""

    flops: Mapping[str, float] = field(default_factory=dict)  # of products, by dtype
    lanes: float = 0.0
    memory: float = 0.0  # bytes to and from the device's memory
    disk: float = 0.0  # bytes read from storage
    store: float = 0.0  # bytes written to it
    bus: float = 0.0  # bytes from host to device or back
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        names = ("lanes", "memory", "disk", "store", "bus", "launches")
        flops = {k: self.flops.get(k, 0.0) + other.flops.get(k, 0.0) for k in {*self.flops, *other.flops}}
        return Work(flops, **{name: getattr(self, name) + getattr(other, name) for name in names})

    def __mul__(self, factor: float) -> Work:
        names = ("lanes", "memory", "disk", "store", "bus", "launches")
        flops = {k: v * factor for k, v in self.flops.items()}
        return Work(flops, **{name: getattr(self, name) * factor for name in names})

    @property
    def operations(self) -> float:
        """Flops of all kinds, a lane counting as one multiply-add."""
        return sum(self.flops.values()) + 2 * self.lanes

    def at(self, ceilings: Ceilings) -> dict[str, float]:
        """Seconds that each resource is busy at least."""
        compute = sum(amount / ceilings.product(kind) for kind, amount in self.flops.items())
        return {
            "compute": compute + self.lanes / ceilings.lanes,
            "memory": self.memory / ceilings.memory,
            "disk": self.disk / ceilings.disk + self.store / ceilings.store,
            "bus": self.bus / ceilings.bus if ceilings.bus else 0.0,
            "launch": self.launches * ceilings.launch,
        }


@dataclass(frozen=True)
class Survivors:
    """What screening left to evaluate in one layer, all heads and positions together."""

    pairs: float
    neurons: float

    @staticmethod
    def expected(dims: Dims, tokens: int) -> Survivors:
        """At the default floor, where nothing was measured."""
        s = dims.shapes
        pairs = tokens * (tokens + 1) / 2 * s.heads
        return Survivors(expected_pairs(tokens) * pairs, NEURONS * tokens * s.d_mlp)


def expected_pairs(tokens: int) -> float:
    """The share of pairs that screening leaves at the default floor: prose through the demo model."""
    return float(min(1.0, PAIRS * tokens**PAIRS_POWER))


@dataclass(frozen=True)
class Streaming:
    """Bytes of a layer that is read when its turn comes; none for a model that stays."""

    raw: float = 0.0
    decoded: float = 0.0


RESIDENT = Streaming()


def layer_work(
    dims: Dims,
    tokens: int,
    survivors: Survivors,
    *,
    streaming: Streaming = RESIDENT,
    first: bool = True,
    stored: bool = False,
    device: str = "cpu",
) -> dict[str, Work]:
    """One layer of one prompt by phase. `first`: of a model's prompts, so that every sublayer is proved.

    `stored`: its results are written to storage.
    """
    s, T, size = dims.shapes, tokens, dims.itemsize
    D, H, F = s.d_model, s.heads, s.d_mlp
    heads_in, heads_out = H * s.d_head, H * dims.d_value
    state = T * D * size
    seen = T * T * (1.0 if device == "cpu" else 0.5)  # a CPU's attention multiplies what the mask hides too
    attention = 2 * seen * (heads_in + heads_out)
    wide, wide_size = ("float64", 8) if dims.dtype == "float64" else ("float32", 4)  # of sums that are proved
    causal = T * (T + 1) / 2
    # Results: edges in [T, T] float32, and what is kept of them.
    edges = 4.0 * T * T
    work = {
        "read": Work(disk=streaming.raw),
        "decode": Work(memory=streaming.raw + 2 * streaming.decoded, bus=streaming.raw),
        "forward": Work(
            {dims.dtype: 2.0 * T * dims.active + attention},
            memory=dims.active * size + 12 * state + 4 * T * F * size,
        ),
        "closure": Work(memory=2 * 12 * T * D * wide_size),  # of two sums: added, compared, largest entries
        "screening": Work(
            lanes=T * D * (heads_out + F) / SIGNS + causal * (heads_in + heads_out)
            + SOFTMAX * causal * H + 6 * T * F,
            memory=(heads_out + F) * D * 4 * 3 + T * (D + F) * 4 * 2 + edges,
        ),
        "exact evaluation": Work(
            lanes=EVALUATION * D * (survivors.pairs + survivors.neurons)
            + min(survivors.pairs, T * H) * dims.d_value * D,
            memory=T * D * 4 * 2,
        ),
        "reduction": Work(memory=4 * edges + 30 * T * D * 8),
        "transfer": Work(memory=2 * state, bus=state),
    }  # fmt: skip
    if first:
        rows = min(T, PROOF_ROWS)
        proof = Work(
            {wide: 2.0 * rows * D * (heads_out + F) + 2 * rows * T * (heads_in + heads_out)},
            memory=((heads_out + F) * D * 2 + 2 * rows * F + 8.0 * H * rows * T) * wide_size,
        )
        work["closure"] += proof
    if stored:
        work["store"] = Work(store=state + kept_bytes(tokens))
    return {name: replace(one, launches=float(LAUNCHES.get(name, 0))) for name, one in work.items()}


def kept_bytes(tokens: int, neurons: int = 20) -> float:
    """Bytes that a layer leaves besides its states: some edges of each row with their heads, top neurons."""
    return tokens * (neurons * 12 + 40 + 24 * min(tokens / 2, 64))


def once_work(dims: Dims, tokens: int, *, device: str = "cpu") -> dict[str, Work]:
    """What a prompt has once, by phase."""
    s, T = dims.shapes, tokens
    # All positions at once, by tiles of the vocabulary (kernels/unembed_topk): its matrix is read once.
    tile = max(1, min(s.d_vocab, PREDICTION_WORKSPACE // (16 * T + 4 * s.d_model)))
    tiles = -(-s.d_vocab // tile)
    return {
        "prompt": Work(launches=DECODING * T),
        "dry run": Work(memory=4 * T * s.d_model * dims.itemsize, launches=200 + 4 * s.layers),
        "lens": Work(
            {dims.dtype if device != "cpu" else "float32": 2.0 * T * s.d_model * s.d_vocab},
            memory=s.d_vocab * s.d_model * dims.itemsize + 6 * 4.0 * T * s.d_vocab,
            launches=300 + 20 * tiles,
        ),
        "graph": Work(memory=8 * 24 * kept_bytes(T) * s.layers / 24, launches=20 * s.layers),
    }


def discovery_work(dims: Dims, tokens: int, *, device: str = "cpu") -> Work:
    """Of each kind of layer: it is run once under watch, operation by operation."""
    alone = layer_work(dims, tokens, Survivors(0, 0), first=False, device=device)["forward"]
    return replace(alone, launches=3000.0) * dims.kinds
