"""A quantised checkpoint as if it were not: weights under their plain names, dequantised when decoded.

1. `open_quantised` asks the config for the format, and finds each weight's stored tensors by their names.
2. The raw bytes of such a weight are those tensors, one after another; experts that are stored together come
   one expert after another, so that single ones can be read.
3. `decode` gives views of the raw bytes to the format's function (`quant_formats`). Tensors that are not
   quantised are the inner source's own.

The model that these weights are for is the plain one: its config has no `quantization_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtt.checkpoint import quant_formats as formats
from lmtt.checkpoint.source import TensorInfo, WeightSource
from lmtt.errors import CheckpointError

# Of compressed-tensors. Others (sparse, four bits floating) have names that look alike and mean otherwise.
LAYOUTS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "dense",
    "mixed-precision",
)
# Scales of activations and of the cache: the dequantised model has neither.
ACTIVATIONS = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".activation_scale", ".output_scale"),
    *(".output_zero_point", ".k_scale", ".v_scale", ".q_scale"),
)


@dataclass(frozen=True)
class Format:
    """How the stored tensors of one weight are named, and what they are.

    suffixes : role -> what follows the weight's stem; the first is the one that marks such a weight.
    optional : roles that may be absent.
    result : what follows the stem in the weight's plain name.
    shape : of the weight, from the stored tensors' infos.
    """

    name: str
    suffixes: Mapping[str, str]
    decode: formats.Decode
    shape: Callable[[Mapping[str, TensorInfo], formats.Facts], tuple[int, ...]]
    optional: frozenset[str] = frozenset()
    result: str = ".weight"


def _as_stored(role: str) -> Callable[[Mapping[str, TensorInfo], formats.Facts], tuple[int, ...]]:
    return lambda parts, facts: parts[role].shape


GPTQ = Format(
    "GPTQ",
    {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales", "g_idx": ".g_idx"},
    formats.gptq,
    lambda p, facts: (p["qweight"].shape[1], p["qweight"].shape[0] * 32 // formats.bits_of(facts)),
    frozenset({"g_idx"}),
)
AWQ = Format(
    "AWQ",
    {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"},
    formats.awq,
    lambda p, facts: (p["qweight"].shape[1] * 8, p["qweight"].shape[0]),
)
INT8 = Format(
    "bitsandbytes int8",
    {"SCB": ".SCB", "weight": ".weight", "weight_format": ".weight_format"},
    formats.int8_rows,
    _as_stored("weight"),
    frozenset({"weight_format"}),
)
PACKED = Format(
    "compressed-tensors, packed",
    {
        "weight_packed": ".weight_packed",
        "weight_scale": ".weight_scale",
        "weight_zero_point": ".weight_zero_point",
        "weight_g_idx": ".weight_g_idx",
        "weight_shape": ".weight_shape",
    },
    formats.packed_int,
    lambda p, facts: (
        p["weight_packed"].shape[0],
        p["weight_packed"].shape[1] * 32 // formats.bits_of(facts),
    ),
    frozenset({"weight_zero_point", "weight_g_idx", "weight_shape"}),
)
SCALED = Format(
    "one scale for a row or a group",
    {
        "weight_scale": ".weight_scale",
        "weight": ".weight",
        "weight_zero_point": ".weight_zero_point",
        "weight_g_idx": ".weight_g_idx",
    },
    formats.scaled,
    _as_stored("weight"),
    frozenset({"weight_zero_point", "weight_g_idx"}),
)
FP8 = Format(
    "FP8 in blocks",
    {"weight_scale_inv": ".weight_scale_inv", "weight": ".weight"},
    formats.fp8_blocks,
    _as_stored("weight"),
)
MXFP4 = Format(
    "MXFP4",
    {"blocks": "_blocks", "scales": "_scales"},
    formats.mxfp4,
    lambda p, facts: (p["blocks"].shape[0], p["blocks"].shape[2] * 32, p["blocks"].shape[1]),
    result="",
)


def _four_bit(kind: str) -> Format:
    return Format(
        f"bitsandbytes {kind}",
        {
            "state": f".weight.quant_state.bitsandbytes__{kind}",
            "weight": ".weight",
            "absmax": ".weight.absmax",
            "quant_map": ".weight.quant_map",
            "nested_absmax": ".weight.nested_absmax",
            "nested_quant_map": ".weight.nested_quant_map",
        },
        formats.nf4,
        lambda p, facts: (),  # the state says it
        frozenset({"nested_absmax", "nested_quant_map"}),
    )


METHODS: dict[str, tuple[Format, ...]] = {
    "bitsandbytes": (_four_bit("nf4"), _four_bit("fp4"), INT8),
    "gptq": (GPTQ,),
    "awq": (AWQ,),
    "compressed-tensors": (PACKED, SCALED),
    "fp8": (FP8, SCALED),
    "fbgemm_fp8": (SCALED,),
    "mxfp4": (MXFP4,),
}


@dataclass(frozen=True)
class Quantised:
    """One weight: its format, its stored tensors (role, name), and its shape."""

    format: Format
    stored: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]


class QuantisedSource:
    """See the module; made by `open_quantised`."""

    def __init__(self, inner: WeightSource, facts: formats.Facts, kinds: tuple[Format, ...]) -> None:
        self.name = inner.name
        self._inner, self._facts = inner, facts
        self.quantised: dict[str, Quantised] = {}
        used: set[str] = set()
        for kind in kinds:
            for name, weight in _find(kind, inner, facts, used):
                self.quantised[name] = weight
                used.update(stored for _, stored in weight.stored)
        plain = {
            name: info
            for name, info in inner.tensors.items()
            if name not in used and not name.endswith(ACTIVATIONS)
        }
        self._tensors = plain | {name: self._info(weight) for name, weight in self.quantised.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def close(self) -> None:
        self._inner.close()

    def _info(self, weight: Quantised) -> TensorInfo:
        infos = [self._inner.tensors[name] for _, name in weight.stored]
        return TensorInfo(
            shape=weight.shape,
            dtype=torch.float32,
            nbytes=sum(info.nbytes for info in infos),
            position=infos[0].position,
            rows=len(weight.shape) == 3,
        )

    def _segments(self, weight: Quantised) -> Iterator[tuple[str, int, int]]:
        """(stored tensor, first byte, bytes), in the order of the raw bytes."""
        sizes = [(name, self._inner.tensors[name].nbytes) for _, name in weight.stored]
        experts = weight.shape[0] if len(weight.shape) == 3 else 1
        for n in range(experts):
            yield from ((name, n * (size // experts), size // experts) for name, size in sizes)

    def read_into(self, tensor: str, raw: memoryview, start: int = 0) -> None:
        weight = self.quantised.get(tensor)
        if weight is None:
            self._inner.read_into(tensor, raw, start)
            return
        raw = raw.cast("B")
        at, end = 0, start + len(raw)
        for name, offset, size in self._segments(weight):
            first, last = max(start, at), min(end, at + size)
            if first < last:
                self._inner.read_into(name, raw[first - start : last - start], offset + first - at)
            at += size
        if end > at:
            raise ValueError(f"{tensor} has {at} raw bytes, {end} were asked for")

    def decode(self, tensor: str, raw: Tensor, out: Tensor, rows: range | None = None) -> None:
        weight = self.quantised.get(tensor)
        if weight is None:
            self._inner.decode(tensor, raw, out, rows)
            return
        facts = self._facts
        if out.device.type != "cpu":
            there, out = out, torch.empty(out.shape, dtype=out.dtype)
            self.decode(tensor, raw, out, rows)
            there.copy_(out)
            return
        try:
            weight.format.decode(self._views(weight, raw, len(out)), out, facts)
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: the tensors stored for {tensor} contradict each other: {_first_line(error)}",
                expected=f"{weight.format.name} of shape {list(weight.shape)}",
            ) from error

    def _views(self, weight: Quantised, raw: Tensor, n: int) -> dict[str, Tensor]:
        """Each stored tensor, from raw bytes; of `n` experts where they are stored together."""
        together = len(weight.shape) == 3
        table = raw.view(n, -1) if together else raw.view(1, -1)
        views, at = {}, 0
        for role, name in weight.stored:
            info = self._inner.tensors[name]
            size = info.nbytes // (weight.shape[0] if together else 1)
            part = table[:, at : at + size].contiguous()
            if part.data_ptr() % info.dtype.itemsize or part.storage_offset() % info.dtype.itemsize:
                part = part.clone()
            views[role] = (
                part.view(-1).view(info.dtype).view(n, *info.shape[1:])
                if together
                else (part.view(-1).view(info.dtype).view(info.shape))
            )
            at += size
        return views


def _find(
    kind: Format, inner: WeightSource, facts: formats.Facts, used: set[str]
) -> Iterator[tuple[str, Quantised]]:
    """Every weight stored in this format, by its plain name."""
    tensors = inner.tensors
    mark = next(iter(kind.suffixes.values()))
    for marked in tensors:
        if not marked.endswith(mark) or marked in used:
            continue
        stem = marked.removesuffix(mark)
        present = {role: stem + end for role, end in kind.suffixes.items() if stem + end in tensors}
        missing = [
            stem + kind.suffixes[role]
            for role in kind.suffixes
            if role not in present and role not in kind.optional
        ]
        if missing:
            raise CheckpointError(
                f"{inner.name}: {marked} is there and {missing[0]} is not",
                expected=f"all tensors of a weight in {kind.name}",
            )
        shape = kind.shape({role: tensors[name] for role, name in present.items()}, facts)
        if kind.decode is formats.nf4:
            shape = _stated_shape(inner, present["state"])
        if "weight_shape" in present:
            shape = _stored_shape(inner, present["weight_shape"])
        # large ones first, so that what follows is a small tail
        stored = sorted(present.items(), key=lambda item: -tensors[item[1]].nbytes)
        yield stem + kind.result, Quantised(kind, tuple(stored), shape)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _small(inner: WeightSource, name: str) -> bytes:
    raw = bytearray(inner.tensors[name].nbytes)
    inner.read_into(name, memoryview(raw))
    return bytes(raw)


def _stated_shape(inner: WeightSource, state: str) -> tuple[int, ...]:
    import json

    try:
        return tuple(int(n) for n in json.loads(_small(inner, state))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{inner.name}: {state} is not a quantisation state in JSON") from error


def _stored_shape(inner: WeightSource, name: str) -> tuple[int, ...]:
    info = inner.tensors[name]
    raw = torch.frombuffer(bytearray(_small(inner, name)), dtype=info.dtype)
    return tuple(int(n) for n in raw)


def quantisation(config: Any) -> dict[str, Any]:
    """What a config says of its weights' quantisation, `quant_method` as text; empty if they are plain."""
    facts = getattr(config, "quantization_config", None) or {}
    facts = dict(facts) if isinstance(facts, Mapping) else facts.to_dict()
    if facts:
        method = facts.get("quant_method")
        if method is None and (facts.get("load_in_4bit") or facts.get("load_in_8bit")):
            method = "bitsandbytes"  # as it was written before methods had names
        facts["quant_method"] = str(getattr(method, "value", method))
    return facts


def open_quantised(inner: WeightSource, config: Any) -> QuantisedSource:
    """The weights of a checkpoint whose config says that it is quantised.

    inner : its stored tensors, companions included, each plain.
    config : transformers' config of the model, with its `quantization_config`.

    Raises
    ------
    CheckpointError
        A method that is not read, or a weight whose companions are missing.
    """
    facts = quantisation(config)
    method = facts.get("quant_method")
    if method not in METHODS:
        raise CheckpointError(
            f"{inner.name} is quantised by a method whose weights are not read one at a time",
            expected=", ".join(METHODS),
            got=method,
            remedy="load it without a memory limit",
        )
    if method == "compressed-tensors":
        facts |= _weights_scheme(inner.name, facts)
    return QuantisedSource(inner, facts, METHODS[method])


def _weights_scheme(name: str, facts: formats.Facts) -> formats.Facts:
    """What compressed-tensors' config groups say of the weights, if they all say the same."""
    groups = list((facts.get("config_groups") or {}).values())
    for stored in {facts.get("format"), *(group.get("format") for group in groups)} - {None}:
        if stored not in LAYOUTS:
            raise CheckpointError(
                f"{name} holds weights in a layout of compressed-tensors that is not read",
                expected=", ".join(LAYOUTS),
                got=stored,
            )
    schemes = [group.get("weights") or {} for group in groups]
    widths = {scheme.get("num_bits") for scheme in schemes}
    if len(widths) > 1:
        raise CheckpointError(
            f"{name} mixes weights of several widths", expected="one", got=sorted(map(str, widths))
        )
    return {"num_bits": widths.pop() if widths else None}
