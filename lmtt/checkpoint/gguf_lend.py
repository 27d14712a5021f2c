"""Our GGUF reading, lent to transformers' own loader for the duration of a load.

transformers decides everything (config, names, what is missing, ties); only how bytes become values changes:

- headers come from `read_header`, in place of readers that walk the vocabulary through NumPy views;
- what metadata say is parsed once for a file, in place of four times;
- weights are `GgufWeights`: read and decoded one at a time when the loader takes them, in place of all at
  once in float32, beside a copy of all in the wanted dtype.

The values are the same; tests compare them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Container, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch

from lmtt.checkpoint.gguf import Field, Header, read_header
from lmtt.checkpoint.gguf_weights import GgufWeights

_STRING, _ARRAY = 8, 9


@contextlib.contextmanager
def fast_reader() -> Iterator[None]:
    """While open, transformers reads GGUF files through `read_header` and `GgufWeights`."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as legacy

    with contextlib.ExitStack() as lent:
        lend = functools.partial(_lend, lent)
        lend(gguf, "GGUFReader", read_header)
        lend(gguf, "get_tensor_name_map", functools.lru_cache(maxsize=4)(gguf.get_tensor_name_map))
        lend(legacy, "load_gguf_checkpoint", _loader(legacy.load_gguf_checkpoint))
        # The newer loader's metadata, under the three names it is imported by; older transformers lack them.
        for module in ("integrations.gguf.reader", "integrations.gguf", "quantizers.quantizer_gguf"):
            with contextlib.suppress(ImportError):
                lend(import_module(f"transformers.{module}"), "read_gguf_metadata", read_metadata)
        yield


def _lend(lent: contextlib.ExitStack, module: Any, name: str, ours: Any) -> None:
    if hasattr(module, name):
        lent.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, ours)


def _loader(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """transformers' `load_gguf_checkpoint`, with its metadata parsed once and its tensors read when taken."""

    @functools.lru_cache(maxsize=2)
    def metadata(path: str, _changed: int) -> dict[str, Any]:
        return original(path, return_tensors=False)

    def load_gguf_checkpoint(
        gguf_checkpoint_path: str | os.PathLike[str],
        return_tensors: bool = False,
        model_to_load: torch.nn.Module | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        path = os.fspath(gguf_checkpoint_path)
        parsed = {
            # vocabularies are large and nobody changes them
            key: dict(part) if key.startswith("tokenizer") else copy.deepcopy(part)
            for key, part in metadata(path, os.stat(path).st_mtime_ns).items()
        }
        if return_tensors:
            assert model_to_load is not None, "transformers always gives the model that it loads"
            weights = GgufWeights(read_header(path), model_to_load, parsed["config"])
            parsed["tensors"] = weights.lazy_state_dict(torch_dtype or torch.float32)
        return parsed

    return load_gguf_checkpoint


def read_metadata(
    path: str | os.PathLike[str], string_arrays: Container[str] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metadata as plain values, and the tensors' names.

    An array of strings that is not named in `string_arrays` is given as its length, as transformers expects.
    """
    header = read_header(path)
    return {key: _plain(field, key in string_arrays) for key, field in header.fields.items()}, _names(header)


def _names(header: Header) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in header.tensors)


def _plain(field: Field, keep_strings: bool) -> Any:
    if field.types == [_ARRAY, _STRING]:
        return [part.decode() for part in field.parts] if keep_strings else len(field.parts)
    if field.types[0] == _ARRAY:
        return np.concatenate(field.parts).tolist() if field.parts else []
    return field.parts[0].decode() if field.types == [_STRING] else field.parts[0][0]
