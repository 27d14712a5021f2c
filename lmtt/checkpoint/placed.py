"""Models whose modules a `device_map` has put on several devices, or on none until they run.

transformers lets accelerate hook every module's forward: before it, inputs are moved to the module's device
and weights that lie on disk or in the host's memory are brought there; after it they are gone again, and the
parameters are on the meta device. Whoever needs weights beyond a forward asks the same hooks for them here.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.checkpoint.load import parse_device
from lmtt.errors import CheckpointError, InputError, StructureError

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")  # maps that transformers makes by itself
DeviceMap = str | Mapping[str, str | int | torch.device]


def parse_device_map(given: DeviceMap) -> str | dict[str, str]:
    """One of `WORDS`, or {module: device} with "disk" among the devices; as JSON text, too.

    InputError for anything else, for a device that is not there, and where accelerate is not installed.
    """
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise InputError("the device map is not JSON", got=error) from None
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("device_map needs accelerate, which is missing", remedy="pip install accelerate")
    if isinstance(given, str):
        if given not in WORDS:
            expected = f"{', '.join(WORDS)} or {{module: device}}"
            raise InputError("unknown device map", expected=expected, got=repr(given))
        return given
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise InputError("the device map maps no modules", expected="{module: device}", got=repr(given)[:80])
    return {name: _device_name(device) for name, device in given.items()}


def _device_name(device: Any) -> str:
    if isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    if str(device) == "disk":
        return "disk"
    if str(device) == "auto":
        raise InputError("unknown device in the device map", expected="cpu, cuda:N or disk", got="'auto'")
    return str(parse_device(str(device)))


def main_device(device_map: str | dict[str, str]) -> torch.device:
    """Where what is offloaded will run: the first GPU of the map, else the CPU."""
    if isinstance(device_map, str):
        return parse_device("auto")
    return torch.device(next((d for d in device_map.values() if d.startswith("cuda")), "cpu"))


def is_placed(model: nn.Module) -> bool:
    """Whether accelerate's hooks move inputs and weights of this model."""
    return any(_hook(module) is not None for module in model.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module, or of those inside it, are not in memory until it runs."""
    return any(parameter.is_meta for parameter in module.parameters())


def run_device(module: nn.Module) -> torch.device:
    """Where a module computes, which is not where its weights are while they are off."""
    for inner in module.modules():
        for hook in _each(_hook(inner)):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@contextmanager
def at_hand(root: nn.Module) -> Iterator[int]:
    """Within, `root` and all inside it have their weights where they run, and no hook takes them away.

    Gives the bytes that were brought. Inputs are then the caller's to move. CheckpointError if a weight
    cannot be brought.
    """
    off = [parameter for parameter in root.parameters() if parameter.is_meta]
    with ExitStack() as stack:
        for path, module in root.named_modules():
            hook = _hook(module)
            if hook is not None:
                stack.enter_context(_stands_aside(path, module, hook))
        for name, parameter in root.named_parameters():
            if parameter.is_meta:
                raise _lost(name)
        yield sum(parameter.nbytes for parameter in off)


@contextmanager
def _stands_aside(path: str, module: nn.Module, hook: Any) -> Iterator[None]:
    for each in _each(hook):
        if not hasattr(each, "weights_map"):
            raise StructureError(
                f"{type(each).__name__} of accelerate is not understood", expected="a device_map's hooks"
            )
    try:
        hook.pre_forward(module)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"weights of {path or type(module).__name__} cannot be brought from where they are offloaded",
            got=error,
        ) from error
    hooked: Any = module.forward
    bare: Any = module._old_forward  # what the module does by itself
    module.forward = bare
    try:
        yield
    finally:
        module.forward = hooked
        hook.post_forward(module, None)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What `named_parameters` gives of the same model in memory: tied ones once, those offloaded read."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    met: dict[int, nn.Parameter] = {}  # held on to, so that no two have one id
    given: set[str] = set()
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in met:
                continue
            met[id(parameter)] = parameter
            name = f"{path}.{own}" if path else own
            twins = {tied.get(name)} | {a for a, b in tied.items() if b == name}
            if parameter.is_meta and twins & given:
                continue
            given.add(name)
            yield name, _value(module, own, name)


def _value(module: nn.Module, own: str, name: str) -> Tensor:
    parameter = module._parameters[own]
    assert parameter is not None
    if not parameter.is_meta:
        return parameter.detach()
    for hook in _each(_hook(module)):
        stored = getattr(hook, "weights_map", None)
        if stored is not None and getattr(hook, "offload", False):
            try:
                value: Tensor = stored[own]
            except (OSError, KeyError) as error:
                raise _lost(name) from error
            return value.detach().to(parameter.dtype)
    raise _lost(name)


def _lost(name: str) -> CheckpointError:
    return CheckpointError(
        f"weight {name} is on the meta device and nothing brings it when it is needed",
        expected="a model in memory, or one that transformers placed by a device_map",
    )


def moved(value: Any, device: torch.device, keep: tuple[str, ...] = ()) -> Any:
    """`value` with its tensors on `device`, those in tuples, lists and dicts too but for the keys in `keep`.

    Any other object stays what it is: models hand some to all their layers, who change them.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(one, device, keep) for one in value)
    if type(value) is dict:
        return {name: one if name in keep else moved(one, device, keep) for name, one in value.items()}
    return value


def _hook(module: nn.Module) -> Any:
    return module.__dict__.get("_hf_hook")


def _each(hook: Any) -> tuple[Any, ...]:
    """A chain of hooks, one by one."""
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
