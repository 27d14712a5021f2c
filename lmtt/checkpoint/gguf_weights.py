"""The weights of a GGUF file under the names that transformers gives them, each read and decoded on demand.

1. transformers' own table says which stored tensor is which parameter, and its own "tensor processor" of the
   architecture undoes what the file's writer did to the values (rotary rows permuted, experts split, norms
   shifted). Both are called here and never imitated, so there is nothing per model in this file.
2. `GgufWeights` is a `WeightSource`: `read_into` takes stored bytes from the file, `decode` turns them into a
   tensor. A weight is held in float32 beside its result only where the processor changes its values; the
   others are decoded straight into the result, after the rows that the processor moves were moved as stored.
   Experts that are merged into one parameter are read and decoded alone.
3. `lazy_state_dict` hands all of them to transformers' loader, which takes them one by one.

Architectures that transformers reads by its newer conversions (`transformers.integrations.gguf`) do not come
here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.checkpoint import gguf, source
from lmtt.checkpoint.disk import WeightFile
from lmtt.checkpoint.gguf_blocks import decode_blocks
from lmtt.errors import CheckpointError

_SPELLING = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PROBE_WIDTHS = (2, 3)  # of matrices by which a processor shows that it moves rows
MOVED_BYTES = 2 << 20  # of stored rows that are put in order at once: they stay in the cache
_PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter and the stored tensors it is made of, in the file's order.

    Its raw bytes are the stored tensors one after another; with `experts`, those of the first expert one
    after another, then those of the second, and so on.
    """

    name: str
    stored: tuple[gguf.TensorInfo, ...]
    shape: tuple[int, ...]  # of the parameter
    as_is: bool  # one stored tensor, whose values are the parameter's
    order: NDArray[np.int64] | None = None  # likewise, but for its rows: row n is stored as order[n]

    @property
    def n_bytes(self) -> int:
        return sum(info.n_bytes for info in self.stored)

    @property
    def experts(self) -> bool:
        """The first axis of the parameter and of all that it is made of counts experts."""
        return len(self.shape) == 3 and all(_shape(info)[0] == self.shape[0] for info in self.stored)

    def pieces(self) -> Iterator[tuple[gguf.TensorInfo, int, int]]:
        """(stored tensor, offset in the file, bytes), in the order of the raw bytes."""
        if not self.experts:
            yield from ((info, info.offset, info.n_bytes) for info in self.stored)
            return
        for n in range(self.shape[0]):
            for info in self.stored:
                size = info.n_bytes // self.shape[0]
                yield info, info.offset + n * size, size


class _Found(Exception):  # noqa: N818, it is how the question is answered, not an error
    """What a processor looked up, before it did any work."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Asked(dict[str, str]):
    """transformers' table, ending the call at the first look-up of a name it has."""

    def __getitem__(self, key: str) -> str:
        raise _Found(super().__getitem__(key))


class GgufWeights:
    """What `header` stores for `model` (parameters may be on the meta device), by transformers' names.

    `config` is what transformers made of the file's metadata: its processors read head counts from it.
    """

    def __init__(self, header: gguf.Header, model: torch.nn.Module, config: Mapping[str, Any]) -> None:
        from transformers import modeling_gguf_pytorch_utils as legacy

        self.name = header.path.name
        make = legacy.TENSOR_PROCESSORS.get(_architecture(header), legacy.TensorProcessor)
        self._processor = make(config=dict(config))
        self._table: dict[str, str] = legacy.get_gguf_hf_weights_map(model, self._processor)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parts: dict[str, list[gguf.TensorInfo]] = {}
        as_is: dict[str, bool] = {}
        unused = []
        for info in header.tensors:
            name, unchanged = self._destination(info)
            if name is None or name not in shapes:
                unused.append(info.name)
                continue
            parts.setdefault(name, []).append(info)
            as_is[name] = unchanged and _shape(info) == shapes[name]
        self.unused = tuple(unused)  # stored, and no parameter of the model
        self.weights = {
            name: Weight(
                name,
                tuple(infos),
                shapes[name],
                as_is[name] and len(infos) == 1,
                self._order(infos, shapes[name]) if not as_is[name] else None,
            )
            for name, infos in parts.items()
        }
        self._tensors = {name: _described(weight) for name, weight in self.weights.items()}
        self._file = WeightFile(header.path, direct=True)

    @property
    def tensors(self) -> Mapping[str, source.TensorInfo]:
        return self._tensors

    def close(self) -> None:
        self._file.close()

    def _destination(self, info: gguf.TensorInfo) -> tuple[str | None, bool]:
        """The parameter that a stored tensor is (a part of), and whether its values are taken as they are.

        The processor is run on an array of the right shape that occupies four bytes.
        """
        stand_in = np.broadcast_to(np.float32(0), _shape(info))
        known = self._table.get(info.name)
        if known is not None and stand_in.ndim == 1:  # small: may as well be processed
            return known, False
        try:
            with np.errstate(all="ignore"):  # zeros are not what its logarithms were written for
                result = self._process(info.name, stand_in, {}, _Asked(self._table))
        except _Found as found:
            return found.name, False
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{info.path.name}: tensor {info.name} of shape {_shape(info)} does not fit its architecture",
                remedy="the metadata and the tensors of this file contradict each other",
            ) from error
        return known, result.weights is stand_in and result.name == info.name

    def _order(self, infos: list[gguf.TensorInfo], shape: tuple[int, ...]) -> NDArray[np.int64] | None:
        """The rows' order if the processor does nothing to a matrix but move its rows, else None.

        It is shown matrices of that many rows, narrow ones of two widths, whose entries are all different.
        """
        if len(infos) != 1 or len(shape) != 2 or _shape(infos[0]) != shape:
            return None
        found = [self._moved(infos[0].name, shape[0], width) for width in PROBE_WIDTHS]
        same = found[0] is not None and found[1] is not None and np.array_equal(found[0], found[1])
        return found[0] if same else None

    def _moved(self, name: str, rows: int, width: int) -> NDArray[np.int64] | None:
        shown = np.arange(rows * width, dtype=np.float64).reshape(rows, width)
        try:
            with np.errstate(all="ignore"):
                result = self._process(name, shown.copy(), {}, self._table)
        except (ValueError, KeyError, IndexError):
            return None
        if result.name is None:  # what counts was put somewhere else
            return None
        got = np.asarray(result.weights)
        if got.shape != shown.shape or not np.isfinite(got).all():
            return None
        order = (got[:, 0] / width).astype(np.int64)
        in_range = (order >= 0) & (order < rows)
        return order if in_range.all() and np.array_equal(got, shown[order]) else None

    def _process(
        self, name: str, values: NDArray[Any], tensors: dict[str, Tensor], table: Mapping[str, str]
    ) -> Any:
        return self._processor.process(
            weights=values, name=name, tensor_key_mapping=table, parsed_parameters={"tensors": tensors}
        )

    def read_into(self, tensor: str, raw: memoryview, start: int = 0) -> None:
        raw = raw.cast("B")
        end = start + len(raw)
        at = 0  # of the raw bytes
        for info, offset, size in self.weights[tensor].pieces():
            first, last = max(start, at), min(end, at + size)
            if first < last:
                self._file.read_into(raw[first - start : last - start], offset + first - at, info.name)
            at += size
        if end > at:
            raise ValueError(f"{tensor} has {at} raw bytes, {end} were asked for")

    def decode(self, tensor: str, raw: Tensor, out: Tensor, rows: range | None = None) -> None:
        weight = self.weights[tensor]
        blocks = raw.numpy()
        if weight.order is not None:
            assert rows is None, "TensorInfo.rows says that ranges of these rows cannot be decoded alone"
            stored = blocks.reshape(len(weight.order), -1)
            step = max(1, MOVED_BYTES // stored.shape[1])
            moved = np.empty((step, stored.shape[1]), np.uint8)
            for first in range(0, len(stored), step):
                order = weight.order[first : first + step]
                np.take(stored, order, axis=0, out=moved[: len(order)], mode="clip")  # they are in range
                _decode(weight, moved[: len(order)].reshape(-1), out[first : first + step])
            return
        if weight.as_is:
            _decode(weight, blocks, out)
            return
        tensors: dict[str, Tensor] = {}
        for info, part, shape in _parts(weight, blocks, None if rows is None else len(rows)):
            values = decode_blocks(info.tensor_type.name, part, torch.float32).numpy()
            result = self._process(info.name, values.reshape(shape), tensors, self._table)
            if result.name is not None:
                tensors[tensor] = torch.from_numpy(np.ascontiguousarray(result.weights))
        if tensors[tensor].shape != out.shape:
            raise CheckpointError(
                f"{self.name}: {tensor} contradicts the config in shape",
                expected=tuple(out.shape),
                got=tuple(tensors[tensor].shape),
            )
        out.copy_(tensors[tensor])

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """`read_into` and `decode` into new memory."""
        weight = self.weights[name]
        raw, out = torch.empty(weight.n_bytes, dtype=torch.uint8), torch.empty(weight.shape, dtype=dtype)
        self.read_into(name, raw.numpy().data)
        self.decode(name, raw, out)
        return out

    def lazy_state_dict(self, dtype: torch.dtype) -> dict[str, LazyWeight]:
        """All weights as what transformers' loader takes: read and decoded when it indexes them."""
        return {name: LazyWeight(self, name, dtype) for name in self.weights}


def _decode(weight: Weight, blocks: NDArray[np.uint8], out: Tensor) -> None:
    """Blocks of the one stored tensor, as they are, into `out`."""
    kind = weight.stored[0].tensor_type.name
    if out.device.type == "cpu" and out.is_contiguous():
        decode_blocks(kind, blocks, out.dtype, out=out)
    else:
        out.copy_(decode_blocks(kind, blocks, out.dtype).view(out.shape))


def _shape(info: gguf.TensorInfo) -> tuple[int, ...]:
    """Outermost first."""
    return tuple(reversed(info.shape))


def _described(weight: Weight) -> source.TensorInfo:
    kind = weight.stored[0].tensor_type.name
    return source.TensorInfo(
        shape=weight.shape,
        dtype=_PLAIN.get(kind, torch.float32) if weight.as_is else torch.float32,
        nbytes=weight.n_bytes,
        position=(0, weight.stored[0].offset),
        plain=weight.as_is and kind in _PLAIN,
        rows=weight.as_is or weight.experts,
    )


def _parts(
    weight: Weight, raw: NDArray[np.uint8], n: int | None
) -> Iterator[tuple[gguf.TensorInfo, NDArray[np.uint8], tuple[int, ...]]]:
    """Each stored tensor's bytes and shape, of all or, for experts, of `n` of them."""
    if not weight.experts:
        at = 0
        for info in weight.stored:
            yield info, raw[at : at + info.n_bytes], _shape(info)
            at += info.n_bytes
        return
    n = weight.shape[0] if n is None else n
    each, at = raw.reshape(n, -1), 0
    for info in weight.stored:
        size = info.n_bytes // weight.shape[0]
        yield info, np.ascontiguousarray(each[:, at : at + size]), (n, *_shape(info)[1:])
        at += size


@dataclass(frozen=True)
class LazyWeight:
    """Stands for a tensor until it is indexed, as safetensors' slices do."""

    weights: GgufWeights
    name: str
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights.load(self.name, self.dtype)[index]

    def get_dtype(self) -> str:
        """In safetensors' spelling."""
        return _SPELLING[self.dtype]


def _architecture(header: gguf.Header) -> str:
    field = header.fields.get("general.architecture")
    if field is None or field.types != [8]:
        raise CheckpointError(f"{header.path.name} names no architecture", expected="general.architecture")
    return str(field.parts[0], "utf-8")
