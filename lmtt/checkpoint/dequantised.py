"""All of a quantised checkpoint as the plain model that its weights stand for, without its format's library.

What a layer computes is then exactly what is attributed, and exactly what the streamed model computes: the
weights come from the same functions (`quant_formats`), whether one layer is in memory or all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtt.checkpoint.source import WeightSource

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class _Weight:
    """A tensor of a checkpoint as transformers' loader takes it: made when it is asked for, once."""

    def __init__(self, source: WeightSource, name: str, dtype: torch.dtype) -> None:
        self._source, self._name = source, name
        self._info = source.tensors[name]
        self._dtype = dtype if self._info.dtype.is_floating_point else self._info.dtype

    def __getitem__(self, _index: Any) -> Tensor:
        raw = torch.empty(self._info.nbytes, dtype=torch.uint8)
        self._source.read_into(self._name, raw.numpy().data)
        out = torch.empty(self._info.shape, dtype=self._dtype)
        self._source.decode(self._name, raw, out)
        return out

    def get_dtype(self) -> str:
        return _NAMES.get(self._dtype, str(self._dtype))

    def get_shape(self) -> list[int]:
        return list(self._info.shape)


def read_dequantised(source: WeightSource, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model of `config` (without its `quantization_config`) with all weights in `dtype`, on the CPU.

    The second value is transformers' account of what was missing or did not fit. Whatever transformers or
    `source` raise passes through.
    """
    import transformers

    with torch.device("meta"):
        kind = type(transformers.AutoModelForCausalLM.from_config(config))
    weights = {name: _Weight(source, name, dtype) for name in source.tensors}
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return model, info
