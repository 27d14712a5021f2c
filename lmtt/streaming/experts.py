"""Experts that are read when a prompt is routed to them, and not otherwise.

Which experts a layer needs is known in the middle of it, when its router has run. So their tensors stay out
of what is read ahead: the module that owns them is lent parameters, and right before it runs, a hook reads
the experts that its indices name. The others are zeros that were never touched, and take no memory.

Only for transformers' common form of experts (`use_experts_implementation`), whose every implementation
multiplies by the experts named and by no other; anything else is read whole. Stored packed, [experts, ...],
an expert is a range of rows, read into its place. Stored one by one, transformers packs them: it is given
zeros for those not read, so that fewer bytes are read, but all of the packed matrix is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmtt.checkpoint.load import quiet_transformers
from lmtt.checkpoint.source import WeightSource
from lmtt.kernels.host_memory import anonymous
from lmtt.streaming.assign import Unit, convert

_FORM = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")  # what the common form sets


@dataclass(frozen=True)
class Experts:
    """One module's expert matrices and where they come from."""

    module: str
    count: int
    packed: Mapping[str, str]  # tensor [count, ...] -> parameter
    single: Mapping[str, tuple[str, int]]  # tensor -> (parameter, which expert)

    @property
    def tensors(self) -> list[str]:
        return [*self.packed, *self.single]


def split(model: nn.Module, unit: Unit, source: WeightSource) -> tuple[Unit, tuple[Experts, ...]]:
    """A layer's tensors without its experts', and its experts; the unit as it is where there are none."""
    owners: dict[str, dict[str, str]] = {}
    for tensor, parameter in {**unit.direct, **unit.converted}.items():
        module, _, own = parameter.rpartition(".")
        if _is_expert_matrix(model.get_submodule(module), own):
            owners.setdefault(module, {})[tensor] = parameter
    found = []
    for module, tensors in owners.items():
        count = int(model.get_submodule(module).num_experts)  # type: ignore[arg-type] # the form's attribute
        experts = _sorted_out(module, count, tensors, unit, source)
        if experts is not None:
            found.append(experts)
    lazy = {tensor for experts in found for tensor in experts.tensors}
    rest = Unit(
        {t: p for t, p in unit.direct.items() if t not in lazy},
        {t: p for t, p in unit.converted.items() if t not in lazy},
    )
    return rest, tuple(found)


def _is_expert_matrix(module: nn.Module, own: str) -> bool:
    if not all(hasattr(module, name) for name in _FORM):
        return False
    parameter = module._parameters.get(own)
    return parameter is not None and parameter.dim() == 3 and parameter.shape[0] == module.num_experts


def _sorted_out(
    module: str, count: int, tensors: Mapping[str, str], unit: Unit, source: WeightSource
) -> Experts | None:
    """None where an expert's bytes cannot be told from the others'."""
    packed = {t: p for t, p in tensors.items() if t in unit.direct}
    single = {}
    for tensor, parameter in tensors.items():
        if tensor in unit.converted:
            numbers = re.findall(r"\.(\d+)\.", tensor)
            single[tensor] = (parameter, int(numbers[-1]) if numbers else -1)
    if not all(source.tensors[t].rows and source.tensors[t].shape[0] == count for t in packed):
        return None
    for parameter in {p for p, _ in single.values()}:
        numbered = [n for p, n in single.values() if p == parameter]
        if set(numbered) != set(range(count)) or len(numbered) % count:
            return None
    return Experts(module, count, packed, single)


class Lender:
    """Lends expert modules their parameters for one layer's turn. `set_parameter(name, value)` gives a
    parameter its value; `dtypes` says what each is held as; `bytes_read` counts what was read so far."""

    def __init__(
        self,
        source: WeightSource,
        model: nn.Module,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        set_parameter: Callable[[str, Tensor], None],
    ) -> None:
        self._source, self._model, self._dtype, self._dtypes = source, model, dtype, dtypes
        self._device, self._set = device, set_parameter
        self.bytes_read = 0

    @contextmanager
    def lent(self, layer: Iterable[Experts]) -> Iterator[None]:
        """Within, the modules read what they are routed to. Whoever evicts the layer takes it back."""
        with ExitStack() as stack:
            for experts in layer:
                loan = _Loan(self, experts)
                module = self._model.get_submodule(experts.module)
                hook = module.register_forward_pre_hook(loan.before, with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _room(self, nbytes: int) -> Tensor:
        if self._device.type == "cpu":
            return anonymous(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def _raw(self, tensor: str, start: int, nbytes: int) -> Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        self._source.read_into(tensor, raw.numpy().data, start)
        self.bytes_read += nbytes
        return raw.to(self._device)


class _Loan:
    """One module's experts during one layer's turn: those read so far."""

    def __init__(self, lender: Lender, experts: Experts) -> None:
        self._lender, self._experts = lender, experts
        self._read: set[int] = set()
        self._matrices: dict[str, Tensor] = {}  # packed: what the module was lent, by tensor
        self._values: dict[str, Tensor] = {}  # stored one by one
        for tensor, parameter in experts.packed.items():
            shape, dtype = lender._source.tensors[tensor].shape, lender._dtypes[parameter]
            room = lender._room(torch.Size(shape).numel() * dtype.itemsize)
            self._matrices[tensor] = room.view(dtype).view(shape)
            lender._set(parameter, self._matrices[tensor])

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: read what these indices name and was not read for an earlier prompt."""
        wanted = _named(args, kwargs, self._experts.count) - self._read
        if wanted or not self._read:
            self._take(sorted(wanted))
            self._read |= wanted

    def _take(self, wanted: list[int]) -> None:
        lender, source = self._lender, self._lender._source
        for tensor, matrix in self._matrices.items():
            size = source.tensors[tensor].nbytes // self._experts.count
            for expert in wanted:
                raw = lender._raw(tensor, expert * size, size)
                source.decode(tensor, raw, matrix[expert : expert + 1], range(expert, expert + 1))
        if not self._experts.single:
            return
        for tensor, (_, expert) in self._experts.single.items():
            info = source.tensors[tensor]
            dtype = lender._dtype if info.dtype.is_floating_point else info.dtype
            if expert in wanted:
                value = torch.empty(info.shape, dtype=dtype, device=lender._device)
                source.decode(tensor, lender._raw(tensor, 0, info.nbytes), value)
                self._values[tensor] = value
            elif tensor not in self._values:
                self._values[tensor] = torch.zeros((), dtype=dtype, device=lender._device).expand(info.shape)
        with quiet_transformers():
            convert(lender._model, self._values, lender._dtype, lender._device)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> set[int]:
    """The experts that a call is routed to; all of them if it does not look like (hidden, index, weights)."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if len(given) != 3 or given[1].is_floating_point() or given[1].shape != given[2].shape:
        return set(range(count))
    return {n for n in torch.unique(given[1]).tolist() if 0 <= n < count}
