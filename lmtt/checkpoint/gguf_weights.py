"""The weights of a GGUF file under the names that transformers gives them, each read and decoded on demand.

1. transformers' own table says which stored tensor is which parameter, and its own "tensor processor" of the
   architecture undoes what the file's writer did to the values (rotary rows permuted, experts split, norms
   shifted). Both are called here and never imitated, so there is nothing per model in this file.
2. `GgufWeights.read` takes one weight's stored bytes from the file with `pread`; `decode` turns them into a
   tensor. Either may run in any thread. A weight is held in float32 beside its result only where the
   processor changes it; the others are decoded straight into the result.
3. `lazy_state_dict` hands all of them to transformers' loader, which takes them one by one.

Architectures that transformers reads by its newer conversions (`transformers.integrations.gguf`) do not come
here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.checkpoint.gguf import Header, TensorInfo
from lmtt.checkpoint.gguf_blocks import decode_blocks
from lmtt.errors import CheckpointError

_SPELLING = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Weight:
    """One parameter and the stored tensors it is made of, in the file's order."""

    name: str
    stored: tuple[TensorInfo, ...]
    as_is: bool  # one stored tensor, whose values are the parameter's

    @property
    def n_bytes(self) -> int:
        return sum(info.n_bytes for info in self.stored)


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

    def __init__(self, header: Header, model: torch.nn.Module, config: Mapping[str, Any]) -> None:
        from transformers import modeling_gguf_pytorch_utils as legacy

        self.path = header.path
        architecture = _text(header, "general.architecture")
        make = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
        self._processor = make(config=dict(config))
        self._table: dict[str, str] = legacy.get_gguf_hf_weights_map(model, self._processor)
        parts: dict[str, list[TensorInfo]] = {}
        as_is: dict[str, bool] = {}
        unused = []
        for info in header.tensors:
            name, unchanged = self._destination(info)
            if name is None:
                unused.append(info.name)
                continue
            parts.setdefault(name, []).append(info)
            as_is[name] = unchanged
        self._weights = {
            name: Weight(name, tuple(infos), as_is[name] and len(infos) == 1) for name, infos in parts.items()
        }
        self.unused = tuple(unused)  # stored, and no parameter of the model
        self._file = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the file back; reading raises from then on."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def _destination(self, info: TensorInfo) -> tuple[str | None, bool]:
        """The parameter that a stored tensor is (a part of), and whether its values are taken as they are.

        The processor is run on an array of the right shape that occupies four bytes.
        """
        shape = tuple(reversed(info.shape))
        stand_in = np.broadcast_to(np.float32(0), shape)
        known = self._table.get(info.name)
        if known is not None and len(shape) == 1:  # small: may as well be processed
            return known, False
        try:
            with np.errstate(all="ignore"):  # zeros are not what its logarithms were written for
                result = self._process(info.name, stand_in, {}, _Asked(self._table))
        except _Found as found:
            return found.name, False
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{info.path.name}: tensor {info.name} of shape {shape} does not fit its architecture",
                remedy="the metadata and the tensors of this file contradict each other",
            ) from error
        return known, result.weights is stand_in and result.name == info.name

    def _process(
        self, name: str, values: NDArray[Any], tensors: dict[str, Tensor], table: Mapping[str, str]
    ) -> Any:
        return self._processor.process(
            weights=values, name=name, tensor_key_mapping=table, parsed_parameters={"tensors": tensors}
        )

    def read(self, name: str) -> list[NDArray[np.uint8]]:
        """The stored bytes of a weight, one array for each of its stored tensors.

        Raises
        ------
        CheckpointError
            The file ended, or could not be read.
        """
        return [self._pread(info) for info in self._weights[name].stored]

    def _pread(self, info: TensorInfo) -> NDArray[np.uint8]:
        raw = np.empty(info.n_bytes, np.uint8)
        view, at = memoryview(raw), info.offset
        try:
            while view:
                got = os.preadv(self._file, [view[: 1 << 30]], at)
                if not got:
                    raise CheckpointError(
                        f"{self.path.name} ended while {info.name} was being read, at byte {at}",
                        remedy="was the file replaced?",
                    )
                view, at = view[got:], at + got
        except OSError as error:
            raise CheckpointError(
                f"{self.path.name} cannot be read at byte {at} ({info.name}): {error.strerror}"
            ) from error
        return raw

    def decode(self, name: str, raw: list[NDArray[np.uint8]], dtype: torch.dtype) -> Tensor:
        """The parameter from what `read` returned: dense, on the CPU, rounded once from float32."""
        weight = self._weights[name]
        if weight.as_is:
            (info,), (blocks,) = weight.stored, raw
            return decode_blocks(info.tensor_type.name, blocks, dtype).view(tuple(reversed(info.shape)))
        tensors: dict[str, Tensor] = {}
        for info, blocks in zip(weight.stored, raw, strict=True):
            values = decode_blocks(info.tensor_type.name, blocks, torch.float32).numpy()
            result = self._process(
                info.name, values.reshape(tuple(reversed(info.shape))), tensors, self._table
            )
            if result.name is not None:
                tensors[name] = torch.from_numpy(np.ascontiguousarray(result.weights))
        return tensors[name].to(dtype).contiguous()

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """`read` and `decode`."""
        return self.decode(name, self.read(name), dtype)

    def lazy_state_dict(self, dtype: torch.dtype) -> dict[str, LazyWeight]:
        """All weights as what transformers' loader takes: read and decoded when it indexes them."""
        return {name: LazyWeight(self, name, dtype) for name in self}


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


def _text(header: Header, key: str) -> str:
    field = header.fields.get(key)
    if field is None or field.types != [8]:
        raise CheckpointError(f"{header.path.name} names no architecture", expected=key)
    return str(bytes(field.parts[0]), "utf-8")
