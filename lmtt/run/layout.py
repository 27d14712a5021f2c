"""What a run's arrays are called, what they must look like, and how they become a `TraceData`.

`LAYER`, `TAIL` and `PACKED` are the format's tables: name, type, and axes, where an axis is a letter that
must have one length throughout (`T` tokens, `L` layers, `N` edges, `M` heads of edges, `K` neurons,
`P` predictions), or that letter plus one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtt.run.data import I64, Edges, Neurons, Predictions, TraceData

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Table = Mapping[str, tuple[str, tuple[str, ...]]]

SCHEMA = "lmtt.run/1"
RUN_JSON = "run.json"
COST_JSON = "cost.json"
TAIL_FILE = "tail.safetensors"
OWN_FILES = re.compile(r"(layer|resid)-\d{3,6}\.safetensors|tail\.safetensors|run\.json|cost\.json")
MAX_LAYERS = 100_000
MAX_TOKENS = 2**31 - 1  # positions are int32

ROWS = ("residual", "mlp", "passthrough", "bias", "opaque", "rest", "certificate")

LAYER: Table = {
    **dict.fromkeys(ROWS, ("float32", ("T",))),
    "edge_destination": ("int32", ("N",)),
    "edge_source": ("int32", ("N",)),
    "edge_weight": ("float32", ("N",)),
    "head_ptr": ("int64", ("N+1",)),  # from 0: heads of this layer's edge e are head_ptr[e]:head_ptr[e+1]
    "head": ("int32", ("M",)),
    "head_weight": ("float32", ("M",)),
    "neuron_index": ("int32", ("T", "K")),
    "neuron_contribution": ("float32", ("T", "K")),
    "neuron_activation": ("float32", ("T", "K")),
    "neuron_certificate": ("float32", ("T",)),
}

TAIL: Table = {
    "input_ids": ("int64", ("T",)),
    "parallel": ("bool", ("L",)),
    "token_id": ("int32", ("T", "P")),
    "logit": ("float32", ("T", "P")),
    "logsumexp": ("float32", ("T",)),
}

PACKED: Table = {
    **TAIL,
    **dict.fromkeys(ROWS, ("float32", ("L", "T"))),
    "layer_ptr": ("int64", ("L+1",)),
    "edge_destination": ("int32", ("N",)),
    "edge_source": ("int32", ("N",)),
    "edge_weight": ("float32", ("N",)),
    "head_ptr": ("int64", ("N+1",)),
    "head": ("int32", ("M",)),
    "head_weight": ("float32", ("M",)),
    "neuron_index": ("int32", ("L", "T", "K")),
    "neuron_contribution": ("float32", ("L", "T", "K")),
    "neuron_activation": ("float32", ("L", "T", "K")),
    "neuron_certificate": ("float32", ("L", "T")),
}

# Name of the residual stream's type (`meta["resid_dtype"]`) -> how numpy holds it. bfloat16 is held as its
# words, so that every bit comes back; `widen` gives its values.
RESID_TYPES: Mapping[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("uint16"),
    "float16": np.dtype("float16"),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}


@dataclass(frozen=True)
class Tail:
    """What a trace has once, besides its layers."""

    tokens: tuple[str, ...]  # T
    input_ids: I64  # [T]
    parallel: NDArray[np.bool_]  # [L]
    predictions: Predictions
    resid_final: Array | None  # [T, D], the state after the last layer; None if the trace is kept light

    def arrays(self) -> dict[str, Array]:
        """As `TAIL` names them."""
        return {
            "input_ids": self.input_ids,
            "parallel": self.parallel,
            "token_id": self.predictions.token_id,
            "logit": self.predictions.logit,
            "logsumexp": self.predictions.logsumexp,
        }

    @staticmethod
    def of(arrays: Arrays, tokens: Sequence[str], resid_final: Array | None) -> Tail:
        return Tail(
            tokens=tuple(tokens),
            input_ids=arrays["input_ids"],
            parallel=arrays["parallel"],
            predictions=Predictions(arrays["token_id"], arrays["logit"], arrays["logsumexp"]),
            resid_final=resid_final,
        )


def layer_file(layer: int) -> str:
    return f"layer-{layer:03d}.safetensors"


def resid_file(layer: int) -> str:
    """The residual stream that enters a layer; of layer L: the final state."""
    return f"resid-{layer:03d}.safetensors"


def content_files(layers: int, *, full: bool) -> list[str]:
    """The files that a finished run lists with their hashes, in the order in which they are made."""
    names = [layer_file(layer) for layer in range(layers)]
    if full:
        names += [resid_file(layer) for layer in range(layers + 1)]
    return [*names, TAIL_FILE]


def widen(resid: Array, resid_dtype: str) -> Array:
    """Values of a stored residual stream: bfloat16 words become float32, other types stay as they are."""
    if resid_dtype != "bfloat16":
        return resid
    return (resid.astype(np.uint32) << np.uint32(16)).view(np.float32)


def assemble(
    layers: Sequence[Arrays],
    tail: Tail,
    meta: dict[str, Any],
    cost: dict[str, Any],
    *,
    resid_pre: Array | None = None,
) -> TraceData:
    """One trace from its layers' arrays, each as `LAYER` names them and perhaps with `resid_pre` [T, D].

    The residual stream is `resid_pre` [L + 1, T, D] if given; else it is stacked from the layers' own and
    `tail.resid_final`, or None if the latter is None.
    """
    if resid_pre is None and tail.resid_final is not None:
        resid_pre = np.stack([*(layer["resid_pre"] for layer in layers), tail.resid_final])
    edges = [len(layer["edge_source"]) for layer in layers]
    heads = np.cumsum([0, *(len(layer["head"]) for layer in layers)])
    joined = {
        name: np.concatenate([layer[name] for layer in layers])
        for name in ("edge_destination", "edge_source", "edge_weight", "head", "head_weight")
    }
    stacked = {
        name: np.stack([layer[name] for layer in layers])
        for name in (*ROWS, "neuron_index", "neuron_contribution", "neuron_activation", "neuron_certificate")
    }
    return TraceData(
        tokens=tail.tokens,
        input_ids=tail.input_ids,
        parallel=tail.parallel,
        **{name: stacked[name] for name in ROWS},
        edges=Edges(
            layer_ptr=np.cumsum([0, *edges], dtype=np.int64),
            destination=joined["edge_destination"],
            source=joined["edge_source"],
            weight=joined["edge_weight"],
            head_ptr=np.concatenate(
                [
                    np.zeros(1, np.int64),
                    *(layer["head_ptr"][1:] + first for layer, first in zip(layers, heads[:-1], strict=True)),
                ]
            ),
            head=joined["head"],
            head_weight=joined["head_weight"],
        ),
        neurons=Neurons(
            index=stacked["neuron_index"],
            contribution=stacked["neuron_contribution"],
            activation=stacked["neuron_activation"],
            certificate=stacked["neuron_certificate"],
        ),
        predictions=tail.predictions,
        resid_pre=resid_pre,
        meta=meta,
        cost=cost,
    )


def split(data: TraceData, layer: int) -> dict[str, Array]:
    """The arrays of one layer, as `LAYER` names them, with `resid_pre` if the trace keeps it."""
    edges = data.edges
    first, last = int(edges.layer_ptr[layer]), int(edges.layer_ptr[layer + 1])
    heads = edges.head_ptr[first : last + 1]
    arrays: dict[str, Array] = {name: getattr(data, name)[layer] for name in ROWS}
    arrays |= {
        "edge_destination": edges.destination[first:last],
        "edge_source": edges.source[first:last],
        "edge_weight": edges.weight[first:last],
        "head_ptr": heads - heads[0],
        "head": edges.head[heads[0] : heads[-1]],
        "head_weight": edges.head_weight[heads[0] : heads[-1]],
        "neuron_index": data.neurons.index[layer],
        "neuron_contribution": data.neurons.contribution[layer],
        "neuron_activation": data.neurons.activation[layer],
        "neuron_certificate": data.neurons.certificate[layer],
    }
    if data.resid_pre is not None:
        arrays["resid_pre"] = data.resid_pre[layer]
    return arrays


def tail_of(data: TraceData) -> Tail:
    """What `assemble` needs besides the layers."""
    final = None if data.resid_pre is None else data.resid_pre[-1]
    return Tail(data.tokens, data.input_ids, data.parallel, data.predictions, final)


def pack(data: TraceData) -> dict[str, Array]:
    """All arrays of a trace but the residual stream, as `PACKED` names them."""
    edges = data.edges
    return {
        **tail_of(data).arrays(),
        **{name: getattr(data, name) for name in ROWS},
        "layer_ptr": edges.layer_ptr,
        "edge_destination": edges.destination,
        "edge_source": edges.source,
        "edge_weight": edges.weight,
        "head_ptr": edges.head_ptr,
        "head": edges.head,
        "head_weight": edges.head_weight,
        "neuron_index": data.neurons.index,
        "neuron_contribution": data.neurons.contribution,
        "neuron_activation": data.neurons.activation,
        "neuron_certificate": data.neurons.certificate,
    }


def unpack(
    arrays: Arrays, tokens: Sequence[str], resid_pre: Array | None, meta: dict[str, Any], cost: dict[str, Any]
) -> TraceData:
    """The inverse of `pack`; the arrays must have passed `shape_problem` and `pointer_problem`."""
    tail = Tail.of(arrays, tokens, None)
    return TraceData(
        tokens=tail.tokens,
        input_ids=tail.input_ids,
        parallel=tail.parallel,
        **{name: arrays[name] for name in ROWS},
        edges=Edges(
            layer_ptr=arrays["layer_ptr"],
            destination=arrays["edge_destination"],
            source=arrays["edge_source"],
            weight=arrays["edge_weight"],
            head_ptr=arrays["head_ptr"],
            head=arrays["head"],
            head_weight=arrays["head_weight"],
        ),
        neurons=Neurons(
            index=arrays["neuron_index"],
            contribution=arrays["neuron_contribution"],
            activation=arrays["neuron_activation"],
            certificate=arrays["neuron_certificate"],
        ),
        predictions=tail.predictions,
        resid_pre=resid_pre,
        meta=meta,
        cost=cost,
    )


def shape_problem(table: Table, arrays: Arrays, axes: dict[str, int]) -> str | None:
    """What contradicts the table: a name, a type, a length; None if nothing does.

    `axes` holds the lengths that are known, and gains those that are met for the first time.
    """
    if missing := table.keys() - arrays.keys():
        return f"array {min(missing)} is missing"
    if unknown := arrays.keys() - table.keys():
        return f"array {min(unknown)[:80]!r} is unknown"
    for name, (dtype, letters) in table.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype):
            return f"array {name} is {array.dtype}, expected {dtype}"
        expected: list[int | str] = []
        for axis, letter in enumerate(letters):
            extra = letter.endswith("+1")
            if axis < array.ndim:
                axes.setdefault(letter.removesuffix("+1"), array.shape[axis] - extra)
            expected.append(axes.get(letter.removesuffix("+1"), letter) if not extra else axes[letter[0]] + 1)
        if array.shape != tuple(expected):
            return f"array {name} has shape {list(array.shape)}, expected {expected}"
    return None


def pointer_problem(name: str, pointer: Array, end: int) -> str | None:
    """Whether a CSR pointer starts at 0, never falls and ends where it must."""
    if int(pointer[0]) != 0 or int(pointer[-1]) != end or bool(np.any(pointer[1:] < pointer[:-1])):
        return f"array {name} is not a rising pointer from 0 to {end}"
    return None


def layer_problem(arrays: Arrays, axes: dict[str, int]) -> str | None:
    """What is wrong with one layer's arrays (without `resid_pre`), in shape or content; None if nothing is.

    `axes` carries T and K from layer to layer.
    """
    lengths: dict[str, int] = {letter: axes[letter] for letter in ("T", "K") if letter in axes}
    if problem := shape_problem(LAYER, arrays, lengths):
        return problem
    axes.update({letter: lengths[letter] for letter in ("T", "K")})
    if problem := pointer_problem("head_ptr", arrays["head_ptr"], lengths["M"]):
        return problem
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"array {name} has a value that is not finite"
    destination = arrays["edge_destination"].astype(np.int64)
    source = arrays["edge_source"].astype(np.int64)
    if bool(np.any((source < 0) | (source > destination) | (destination >= lengths["T"]))):
        return "array edge_source or edge_destination leaves 0 <= source <= destination < T"
    if bool(np.any(np.diff(destination * lengths["T"] + source) <= 0)):
        return "the edges are not sorted by destination and source, or one occurs twice"
    head, starts = arrays["head"], arrays["head_ptr"][1:-1]
    if bool(np.any(head < 0)):
        return "array head has a negative value"
    rises = np.diff(head) > 0
    rises[starts[(starts > 0) & (starts < len(head))] - 1] = True  # a new edge may start at any head
    if not rises.all():
        return "the heads of an edge are not sorted, or one occurs twice"
    if bool(np.any(arrays["neuron_index"] < -1)):
        return "array neuron_index has a value below -1"
    return None


def tail_problem(tail: Tail, axes: dict[str, int]) -> str | None:
    """What is wrong with the tail; `axes` knows T and L."""
    arrays = tail.arrays()
    if problem := shape_problem(TAIL, arrays, axes):
        return problem
    if len(tail.tokens) != axes["T"] or not all(isinstance(token, str) for token in tail.tokens):
        return f"the tokens are not {axes['T']} strings"
    for name in ("logit", "logsumexp"):
        if not np.isfinite(arrays[name]).all():
            return f"array {name} has a value that is not finite"
    for name in ("input_ids", "token_id"):
        if bool(np.any(arrays[name] < 0)):
            return f"array {name} has a negative value"
    return None


def trace_problem(data: TraceData) -> str | None:
    """What is wrong with a whole trace; None if nothing is."""
    axes: dict[str, int] = {"T": len(data.tokens), "L": len(data.parallel)}
    if axes["T"] < 1 or axes["L"] < 1:
        return "there are no tokens or no layers"
    arrays = pack(data)
    if problem := shape_problem(PACKED, arrays, axes):
        return problem
    for name, letter in (("layer_ptr", "N"), ("head_ptr", "M")):
        if problem := pointer_problem(name, arrays[name], axes[letter]):
            return problem
    if problem := tail_problem(tail_of(data), axes):
        return problem
    for layer in range(axes["L"]):
        parts = split(data, layer)
        parts.pop("resid_pre", None)
        if problem := layer_problem(parts, {"T": axes["T"], "K": axes["K"]}):
            return f"layer {layer}: {problem}"
    return resid_problem(data.resid_pre, data.meta.get("resid_dtype"), (axes["L"] + 1, axes["T"]))


def resid_problem(resid: Array | None, resid_dtype: object, leading: tuple[int, ...]) -> str | None:
    """What contradicts that type or the shape [*leading, D]; None if nothing does, or there is no stream."""
    if resid is None:
        return None
    if resid_dtype is None:
        resid_dtype = resid.dtype.name
    if not isinstance(resid_dtype, str) or resid_dtype not in RESID_TYPES:
        known = ", ".join(RESID_TYPES)
        return f"the residual stream's type is {str(resid_dtype)[:40]!r}, expected one of {known}"
    if resid.dtype != RESID_TYPES[resid_dtype]:
        return f"the residual stream is {resid.dtype}, expected {RESID_TYPES[resid_dtype]} for {resid_dtype}"
    if resid.ndim != len(leading) + 1 or resid.shape[:-1] != leading or resid.shape[-1] < 1:
        return f"the residual stream has shape {list(resid.shape)}, expected {[*leading, 'd_model']}"
    return None
