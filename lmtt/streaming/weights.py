"""Where a model's weights are while its layers run: in memory all along, or there for one layer at a time.

The engine asks `reading(layers)` for a pass and, within it, for each layer in turn; it needs to know no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmtt.checkpoint.load import quiet_transformers, refuse_nonfinite
from lmtt.checkpoint.source import WeightSource
from lmtt.errors import CheckpointError, InputError, StructureError
from lmtt.kernels.host_memory import anonymous, reusing
from lmtt.streaming import products
from lmtt.streaming.assign import Unit, assign, convert
from lmtt.streaming.experts import Lender, split
from lmtt.streaming.generating import forwards
from lmtt.streaming.meter import Meter
from lmtt.streaming.plan import (
    NO_TOKENIZER,
    PACKING,
    WORKSPACE,
    Plan,
    Shapes,
    TokenizerBytes,
    Weights,
    in_words,
    make_plan,
    stays,
)
from lmtt.streaming.ring import Ring, place
from lmtt.streaming.vocabulary import StoredRows, TiledUnembedding, compact_embedding

ALIGNMENT = 64
FLOAT32 = 4  # bytes
Turn = Callable[[int], AbstractContextManager[None]]


@dataclass
class Traffic:
    """What reading weights has taken so far."""

    bytes_taken: int = 0  # of layers, as stored
    seconds_waiting: float = 0.0  # of the pass, for a layer's bytes
    seconds_reading: float = 0.0  # of the thread that reads ahead; of finished passes


class LayerWeights(Protocol):
    """Where the weights are."""

    resident: bool  # all are in memory all along
    traffic: Traffic
    meter: Meter

    @property
    def held(self) -> int:
        """Bytes of weights that are in memory between two passes, as far as they are known."""

    def reading(
        self, layers: Sequence[int], tokens: Sequence[int], *, full: bool = True
    ) -> AbstractContextManager[Turn]:
        """A pass over `layers`, rising, with prompts of so many tokens; `full` keeps the residual stream.

        The context gives `turn`: within `turn(i)` layer i has its weights. InputError, before anything is
        read, if the pass does not fit the memory limit.
        """

    def workspace(self, tokens: Sequence[int], *, full: bool = True) -> int:
        """Bytes that the kernels may use in such a pass. InputError if the pass does not fit."""

    def brought(self, layer: int, value: Any) -> Any:
        """What a layer is given, where it runs: tensors, also in tuples, lists and dicts."""
        return value

    def at_hand(self, module: nn.Module) -> AbstractContextManager[object]:
        """Within, a module that lies outside the layers has its weights, or `rows` that give them."""
        return nullcontext()

    def generating(self, tokens: int) -> AbstractContextManager[None]:
        """Within, the model's own forward runs, on up to so many tokens in all, and may keep a cache of them.

        InputError, before anything is read, if that does not fit the memory limit.
        """
        return nullcontext()


class ResidentWeights(LayerWeights):
    """All layers have their weights all the time. A limit, if any, is for what comes on top of them."""

    resident = True

    def __init__(
        self,
        meter: Meter,
        shapes: Shapes | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.meter = meter
        self._known = None
        self.weights = weights  # None where nobody looked at the checkpoint first
        if shapes is not None and weights is not None and meter.limit is not None:
            self._known = (shapes, weights, meter.limit)

    @property
    def held(self) -> int:
        return 0 if self._known is None else self._known[1].all

    @contextmanager
    def reading(self, layers: Sequence[int], tokens: Sequence[int], *, full: bool = True) -> Iterator[Turn]:
        self.workspace(tokens, full=full)
        with self.meter.running(self.held):
            yield self._turn
            self.meter.mark("layers")

    @contextmanager
    def _turn(self, _layer: int) -> Iterator[None]:
        yield
        if self.meter.limit is not None:
            self.meter.mark("layers")

    def workspace(self, tokens: Sequence[int], *, full: bool = True) -> int:
        if self._known is None:
            return WORKSPACE
        return make_plan(*self._known, tokens, full=full, must_stay=True).workspace

    def leaves_room(self, tokens: Sequence[int], *, full: bool = True) -> bool:
        """Whether such a pass fits beside all weights. InputError if it would not fit without them either."""
        try:
            self.workspace(tokens, full=full)
        except InputError:
            assert self._known is not None
            make_plan(*self._known, tokens, full=full, may_stay=False)
            return False
        return True


class StreamedWeights(LayerWeights):
    """Layers get their weights from a checkpoint when their turn comes, and lose them after it.

    The model is on the meta device but for what lies outside the layers. One pass at a time.
    """

    resident = False

    def __init__(
        self,
        source: WeightSource,
        model: Any,
        stack: str,
        dtype: torch.dtype,
        device: torch.device,
        limit: int,
        meter: Meter | None = None,
        tokenizer: TokenizerBytes = NO_TOKENIZER,
    ) -> None:
        self.meter = Meter(device, limit) if meter is None else meter
        self._source, self._model, self._dtype, self._device = source, model, dtype, device
        self._stack = stack
        self._limit = limit
        self._assignment = assign(model, stack, source.tensors, dtype)
        layers = [split(model, unit, source) for unit in self._assignment.layers]
        self._ahead = [unit for unit, _ in layers]  # what is read ahead of each layer
        self._experts = [experts for _, experts in layers]  # what is read once it is known that it is needed
        self._placements = [place(source, unit.tensors) for unit in self._ahead]
        self._meta: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self._lender = Lender(source, model, dtype, self._assignment.dtypes, device, self._set)
        self._embedding, self._unembedding = self._vocabulary_tensors()
        self.shapes = Shapes.of(model, len(self._placements), dtype, device.type)
        self.weights = replace(self._sizes(), tokenizer=tokenizer)
        self.bytes_read = 0
        self.traffic = Traffic()
        self._check = True  # damaged weights are looked for
        self._same_by_parts: dict[products.Kind, bool] = {}  # of products with large weights
        self._head: StoredRows | None = None

    # --- what there is ---

    def _vocabulary_tensors(self) -> tuple[str, str]:
        """The tensors of embedding and unembedding, one and the same where they are tied."""
        parameters = {id(p): n for n, p in self._model.named_parameters(remove_duplicate=False)}
        embedding = parameters[id(self._model.get_input_embeddings().weight)]
        unembedding = parameters[id(self._model.get_output_embeddings().weight)]
        made = {parameter: tensor for tensor, parameter in self._assignment.rest.direct.items()}
        tied: Mapping[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        found = []
        for parameter in (embedding, unembedding):
            same = [parameter, *(b for a, b in tied.items() if a == parameter)]
            same += [a for a, b in tied.items() if b == parameter]
            tensor = next((made[name] for name in same if name in made), None)
            if tensor is None:
                raise CheckpointError(
                    f"{self._source.name}: {parameter} is not stored as one matrix", expected="one tensor"
                )
            found.append(tensor)
        return found[0], found[1]

    def _rest(self) -> Unit:
        """What stays in memory: all outside the layers but the vocabulary's matrices."""
        vocabulary = (self._embedding, self._unembedding)
        rest = self._assignment.rest
        return replace(rest, direct={t: p for t, p in rest.direct.items() if t not in vocabulary})

    def _as_stored(self, tensor: str, parameter: str) -> bool:
        """Whether the raw bytes serve as the parameter."""
        info = self._source.tensors[tensor]
        aligned = info.position[1] % info.dtype.itemsize == 0
        return (
            info.plain
            and aligned
            and info.dtype == self._assignment.dtypes[parameter]
            and self._device.type == "cpu"
        )

    def _decoded_bytes(self, unit: Unit) -> int:
        """Room for the parameters of a unit whose raw bytes do not serve."""
        return sum(
            _aligned(self._elements(tensor) * self._assignment.dtypes[parameter].itemsize)
            for tensor, parameter in unit.direct.items()
            if not self._as_stored(tensor, parameter)
        )

    def _elements(self, tensor: str) -> int:
        return torch.Size(self._source.tensors[tensor].shape).numel()

    def _sizes(self) -> Weights:
        itemsize = self._dtype.itemsize
        units = self._assignment.layers
        rest = self._rest()
        vocabulary = {self._embedding, self._unembedding}
        whole = [t for unit in (*units, rest) for t in unit.tensors]
        return Weights(
            all=sum(self._elements(t) for t in [*whole, *vocabulary]) * itemsize,
            rest=sum(self._elements(t) for t in rest.tensors) * itemsize,
            raw_layer=max(p.nbytes for p in self._placements),
            decoded_layer=max(
                self._decoded_bytes(unit)
                + int((1 + PACKING) * sum(self._elements(t) for t in unit.converted) * itemsize)
                for unit in units
            ),
            raw_total=sum(p.nbytes for p in self._placements),
            head=self._source.tensors[self._unembedding].nbytes,
        )

    def plan(self, tokens: Sequence[int], *, full: bool = True) -> Plan:
        """How a pass over such prompts would run. InputError if it does not fit."""
        return make_plan(self.shapes, self.weights, self._limit, tokens, full=full, may_stay=False)

    @property
    def held(self) -> int:
        head = 0 if self._head is None or not self._head.kept else self._head.nbytes
        return self.weights.rest + head

    def would_stay(self, tokens: int) -> bool:
        """Whether the limit holds the whole model with a prompt of so many tokens."""
        return stays(self.shapes, self.weights, self._limit, [tokens])

    # --- what stays ---

    def open(self, *, check: bool = True) -> None:
        """Read what lies outside the layers; from now on the model's forward runs but for its layers.

        check : refuse weights that are not finite, here and when a layer fails for them.
        """
        self._check = check
        rest = self._rest()
        raw = {}
        for tensor in rest.tensors:
            raw[tensor] = anonymous(self._source.tensors[tensor].nbytes)
            self._source.read_into(tensor, raw[tensor].numpy().data)
        self._fill(rest, raw, torch.empty(self._decoded_bytes(rest), dtype=torch.uint8, device=self._device))
        if check:
            refuse_nonfinite(self._model)
        dtypes = self._assignment.dtypes
        embedding = self._model.get_input_embeddings()
        unembedding = self._model.get_output_embeddings()
        names = {id(p): n for n, p in self._meta.items()}
        dtype = dtypes[names.get(id(embedding.weight), next(iter(dtypes)))]
        compact_embedding(embedding, StoredRows(self._source, self._embedding, dtype, self._device))
        self._head = StoredRows(self._source, self._unembedding, dtype, self._device)
        tiled = TiledUnembedding(self._head, getattr(unembedding, "bias", None))
        self._model.set_output_embeddings(tiled)

    def close(self) -> None:
        """Give the files back."""
        self._source.close()

    def at_hand(self, module: nn.Module) -> AbstractContextManager[object]:
        return module.rows.in_turn() if isinstance(module, TiledUnembedding) else nullcontext()

    @contextmanager
    def generating(self, tokens: int) -> Iterator[None]:
        plan, s = self.plan([tokens]), self.shapes
        cache = 2 * s.layers * tokens * s.kv_heads * s.d_head * s.itemsize  # keys and values
        # It is there in the place of the results.
        needed = plan.bytes.total + max(0, cache - plan.bytes.results)
        if needed > self._limit:
            raise InputError(
                f"memory={in_words(self._limit)} is too little to generate up to {tokens} tokens",
                expected=f"at least {in_words(needed)}",
                remedy="generate fewer, or from a shorter prompt",
            )
        layers = self._model.get_submodule(self._stack)
        with (
            self.meter.running(self.held),
            forwards(layers, lambda: self.reading(range(len(layers)), [tokens])),
        ):
            yield

    # --- what comes and goes ---

    def workspace(self, tokens: Sequence[int], *, full: bool = True) -> int:
        return self.plan(tokens, full=full).workspace

    @contextmanager
    def reading(self, layers: Sequence[int], tokens: Sequence[int], *, full: bool = True) -> Iterator[Turn]:
        with self.meter.running(self.held), self._reading(layers, tokens, full) as turn:
            yield turn

    @contextmanager
    def _reading(self, layers: Sequence[int], tokens: Sequence[int], full: bool) -> Iterator[Turn]:
        plan = self.plan(tokens, full=full)
        assert self._head is not None
        if plan.bytes.total + self._head.nbytes > self._limit:
            self._head.drop()
        arena = anonymous(plan.arena)
        most = max(self._decoded_bytes(unit) for unit in self._ahead)
        decoded = [self._room(most)]
        try:
            with reusing(), Ring(self._source, self._placements, layers, arena) as ring:
                del arena
                yield lambda layer: self._turn(layer, ring, decoded[0])
        finally:
            self.bytes_read += ring.bytes_read
            self.traffic.seconds_reading += ring.seconds_reading
            decoded.clear()  # whoever holds on to the turn does not hold on to its memory
        self.meter.mark("layers")
        if plan.keeps_head:
            self._head.keep()

    @contextmanager
    def _turn(self, layer: int, ring: Ring, decoded: Tensor) -> Iterator[None]:
        """A layer's weights, from taking its bytes from the ring to giving their room back."""
        unit = self._ahead[layer]
        begun = time.perf_counter()
        raw = ring.take(layer)
        self.traffic.seconds_waiting += time.perf_counter() - begun
        self.traffic.bytes_taken += sum(part.nbytes for part in raw.values())
        in_use = self._fill(unit, raw, decoded)
        if not in_use:
            ring.release(layer)  # the reader goes on while this layer computes
        routed = self._lender.bytes_read
        try:
            with self._lender.lent(self._experts[layer]), self._products(unit):
                yield
        except StructureError:
            if self._check:  # parts that do not add up may be due to damaged weights, which then have a name
                refuse_nonfinite(self._model)
            raise
        finally:
            routed = self._lender.bytes_read - routed
            self.bytes_read += routed
            self.traffic.bytes_taken += routed
            self._evict(layer)
            if in_use:
                ring.release(layer)
        if self.meter.limit is not None:
            self.meter.mark("layers", again=True)

    def _products(self, unit: Unit) -> AbstractContextManager[object]:
        """Products by parts, where a unit has a weight large enough: each call in Python goes through it."""
        sizes = (self._elements(tensor) * FLOAT32 for tensor in unit.direct)
        if unit.converted or max(sizes, default=0) >= products.LEAST_BYTES:
            return products.ByParts(self._same_by_parts)
        return nullcontext()

    def _fill(self, unit: Unit, raw: Mapping[str, Tensor], room: Tensor) -> bool:
        """Give a unit's parameters their values; whether some of them are the raw bytes themselves."""
        used, aliased = 0, False
        for tensor, parameter in unit.direct.items():
            info, dtype = self._source.tensors[tensor], self._assignment.dtypes[parameter]
            if self._as_stored(tensor, parameter):
                value = raw[tensor].view(info.dtype).view(info.shape)
                aliased = True
            else:
                nbytes = self._elements(tensor) * dtype.itemsize
                value = room[used : used + nbytes].view(dtype).view(info.shape)
                self._source.decode(tensor, raw[tensor].to(self._device), value)
                used += _aligned(nbytes)
            self._set(parameter, value)
        if unit.converted:
            values = {}
            for tensor in unit.converted:
                info = self._source.tensors[tensor]
                floating = info.dtype.is_floating_point
                value = torch.empty(
                    info.shape, dtype=self._dtype if floating else info.dtype, device=self._device
                )
                self._source.decode(tensor, raw[tensor].to(self._device), value)
                values[tensor] = value
            with quiet_transformers():
                convert(self._model, values, self._dtype, self._device)
        return aliased

    def _room(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the model's device."""
        if self._device.type == "cpu":
            return anonymous(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, own = name.rpartition(".")
        module = self._model.get_submodule(path)
        if own in module._buffers:
            module._buffers[own] = value.clone()  # small, and stays
        else:
            module._parameters[own] = nn.Parameter(value, requires_grad=False)

    def _evict(self, layer: int) -> None:
        path = f"{self._stack}.{layer}"
        for name, module in self._model.get_submodule(path).named_modules(prefix=path):
            for own in module._parameters:
                if f"{name}.{own}" in self._meta:
                    module._parameters[own] = self._meta[f"{name}.{own}"]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
