"""Which tensors of a checkpoint are which parameters of a model, by transformers' own conversion mapping.

transformers' per-layer loader is not public: everything of it that is used is used here, so that a release
that changes it is met in one file. Tests run it on the oldest transformers allowed and on the newest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from lmtt.checkpoint.source import TensorInfo
from lmtt.errors import CheckpointError


@dataclass(frozen=True)
class Unit:
    """Tensors that come and go together: a layer's, or everything outside the layers."""

    direct: dict[str, str]  # tensor -> parameter that it is, at most cast
    converted: dict[str, str]  # tensor -> parameter that transformers makes of it and others

    @property
    def tensors(self) -> list[str]:
        return [*self.direct, *self.converted]


@dataclass(frozen=True)
class Assignment:
    """A checkpoint's tensors as units of a model."""

    layers: tuple[Unit, ...]
    rest: Unit
    unused: tuple[str, ...]  # tensors of the checkpoint that the model has no place for
    dtypes: dict[str, torch.dtype]  # parameter -> what it is held as


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers (rotary tables) are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment] # put back below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a config, its parameters on the meta device."""
    import transformers

    try:
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"no model can be built from this config: {' '.join(str(error).split())[:200]}"
        ) from error
    return model.eval().requires_grad_(False)


def assign(model: Any, stack: str, tensors: Mapping[str, TensorInfo], dtype: torch.dtype) -> Assignment:
    """Find the place of every tensor. `stack` is the path of the decoder layers, `L` of them.

    Raises
    ------
    CheckpointError
        A parameter has no tensor, or a tensor of another shape; every one of them is counted.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    units: dict[int, Unit] = {}
    rest = Unit({}, {})
    unused, wrong = [], []
    made: set[str] = set()
    for tensor, info in tensors.items():
        target, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if target not in state and tensor in state:
            target, pattern = rename_source_key(tensor, [], [], prefix, state)
        if target not in state:
            unused.append(tensor)
            continue
        index = re.match(re.escape(stack) + r"\.(\d+)\.", target)
        unit = units.setdefault(int(index[1]), Unit({}, {})) if index else rest
        made.add(target)
        if pattern is not None:
            unit.converted[tensor] = target
            converter = next(c for c in converters if pattern in c.source_patterns)
            first = converter.target_patterns[0]
            made.update(target.replace(first, other) for other in converter.target_patterns)
            continue
        unit.direct[tensor] = target
        if info.shape != tuple(state[target].shape):
            wrong.append((tensor, tuple(state[target].shape), info.shape))
    if wrong:
        tensor, expected, got = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} weights contradict the config in shape, {tensor} for one",
            expected=list(expected), got=list(got),
        )  # fmt: skip
    missing = sorted(n for n, _ in model.named_parameters() if not made & {n, *_twins(model, n)})
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} weights, {missing[0]} for one",
            expected="every parameter in the checkpoint",
        )
    count = len(model.get_submodule(stack))
    return Assignment(
        tuple(units.get(i, Unit({}, {})) for i in range(count)),
        rest,
        tuple(unused),
        _dtypes(model, state, dtype),
    )


def _twins(model: Any, parameter: str) -> set[str]:
    """What a parameter is tied to; any one of them may be the one that is stored."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(parameter, parameter)
    return {source, *(name for name, other in tied.items() if other == source)} - {parameter}


def _dtypes(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each parameter is held as: the model's dtype, but for those it insists on keeping wider."""
    plan = model._get_dtype_plan(dtype)
    found = {name: tensor.dtype for name, tensor in state.items()}
    if plan:
        pattern, groups, _ = build_glob_alternation(list(plan))
        for name in found:
            match = pattern.search(name)
            if match is not None:
                found[name] = plan[groups[match.lastgroup]]
    return found


class _Ready:
    """A tensor as transformers' loader takes it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, _index: Any) -> Tensor:
        return self._tensor

    def get_dtype(self) -> str:
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
        return names.get(self._tensor.dtype, str(self._tensor.dtype))

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)


def convert(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
    """Set the parameters that transformers makes of `tensors`, which are all it needs for them.

    Raises
    ------
    CheckpointError
        They do not fit together, or make another shape than the config says.
    """
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": device},
    )
    info, _ = convert_and_load_state_dict_in_model(
        model, {name: _Ready(tensor) for name, tensor in tensors.items()}, config, None
    )
    for problem in (info.mismatched_keys, info.conversion_errors, info.unexpected_keys):
        if problem:
            example = sorted(problem, key=str)[0]
            raise CheckpointError(f"{len(problem)} weights contradict the config, {example} for one")
