"""Which backend does an op: strings only, so that listing imports nothing; every choice comes with a reason.

A backend is a module with
    NAME                          its name here
    available() -> str | None     None, or why it cannot run on this machine
    refuses(op, task) -> ...      None, or why it will not do this op on this task (the op's first argument)
    one function per op that it implements, named and called like the reference's
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from lmtt.errors import BackendError, InputError
from lmtt.kernels import crossover, notices, stages
from lmtt.kernels.types import Choice, NeuronTask


@dataclass(frozen=True)
class Op:
    """One line of the table in README.md."""

    formula: str
    reference: str  # module
    tolerance: str  # float32; float64


OPS: dict[str, Op] = {
    "directional_attention": Op(
        "d[h,i,j] = A[h,i,j] <v[j,h], W_O[h] r[i]>",
        "lmtt.kernels.directional_attention.reference",
        "2e-6 (1+κ) |x|₁ |r|∞; 1e-12",
    ),
    "attention_contributions": Op(
        "max(0, |y| - |y - x|) over its sum, x = A[h,i,j] v[j,h] W_O[h]",
        "lmtt.kernels.proximity.reference",
        "2e-6 (1+κ) min(|x|, |y|); 1e-12",
    ),
    "neuron_contributions": Op(
        "max(0, |y| - |y - x|) over its sum, x = act[i,n] W_down[n]",
        "lmtt.kernels.neurons.reference",
        "2e-6 min(|x|, |y|); 1e-12",
    ),
    "unembed_topk": Op(
        "k largest of softcap(scale (norm(x) W_Uᵀ + b))",
        "lmtt.kernels.unembed_topk.reference",
        "2e-6 |x|₂ |w|₂; 1e-12",
    ),
}

# In the order in which "auto" tries them, but for GPUs (crossover.py); the last one takes everything.
BACKENDS: dict[str, str] = {
    "cpp": "lmtt.kernels.backends.cpp_backend",
    "cuda": "lmtt.kernels.backends.cuda_backend",
    "triton": "lmtt.kernels.backends.triton_backend",
    "reference": "lmtt.kernels.backends.reference_backend",
}


class Unusable(NamedTuple):
    """A backend that cannot be used, and why."""

    reason: str


def load(name: str) -> ModuleType | Unusable:
    """The backend's module, or why it cannot run on this machine."""
    path = BACKENDS[name]
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise  # the module exists and is broken: not to be passed over in silence
        return Unusable("not part of this installation")
    reason = module.available()
    return module if reason is None else Unusable(reason)


def availability() -> dict[str, str | None]:
    """Every backend with None where it can run on this machine, or the reason why not."""
    return {name: b.reason if isinstance(b := load(name), Unusable) else None for name in BACKENDS}


def _why_not(name: str, op: str, task: object) -> str | None:
    module = load(name)
    if isinstance(module, Unusable):
        return module.reason
    if not hasattr(module, op):
        return f"does not implement {op}"
    refusal: str | None = module.refuses(op, task)
    return refusal


def choose(op: str, requested: str, task: object) -> Choice:
    """Which backend does `op` on `task`, its first argument.

    A backend requested by name does it or BackendError says why not; "auto" takes the first that can, and the
    choice lists why each one before it could not.
    """
    if op not in OPS:
        raise BackendError("no such op", expected=" | ".join(OPS), got=repr(op))
    if requested != "auto":
        if requested not in BACKENDS:
            raise BackendError(
                "no such backend", expected=" | ".join(("auto", *BACKENDS)), got=repr(requested)
            )
        reason = _why_not(requested, op, task)
        if reason is not None:
            usable = [name for name in BACKENDS if _why_not(name, op, task) is None]
            raise BackendError(
                f"backend {requested!r} cannot do {op} here: {reason}",
                remedy=f"use one of: {', '.join(('auto', *usable))}",
            )
        return Choice(op, requested, "requested")
    refused: dict[str, str] = {}
    preferred = crossover.preference(op, task)
    for name in _order(preferred):
        reason = _why_not(name, op, task)
        if reason is None:
            why = "; ".join(f"{other}: {text}" for other, text in refused.items())
            reason = f"preferred backends cannot ({why})" if why else "preferred"
            if preferred is not None and name == preferred.order[0]:
                reason += f"; {preferred.why}"
            return Choice(op, name, reason, refused)
        refused[name] = reason
    raise BackendError(f"no backend can do {op} here: {refused}")


def _order(preferred: crossover.Preference | None) -> list[str]:
    """Names of BACKENDS as "auto" tries them; those of the preference in its own order."""
    names = list(BACKENDS)
    if preferred is not None:
        first = min(names.index(name) for name in preferred.order)
        names = [name for name in names if name not in preferred.order]
        names[first:first] = preferred.order
    return names


def run(op: str, task: object, *args: Any, backend: str = "auto", **options: Any) -> tuple[Any, Choice]:
    """Do `op` on `task` (and further arguments) with the backend of choice; its result and the choice."""
    if isinstance(task, NeuronTask) and not 1 <= task.k <= task.act.shape[1]:
        raise InputError("k", expected=f"1 to {task.act.shape[1]}, the number of neurons", got=task.k)
    choice = choose(op, backend, task)
    module = load(choice.backend)
    assert not isinstance(module, Unusable)
    with stages.whole(), notices.gathered() as said:
        result = getattr(module, op)(task, *args, **options)
    return result, replace(choice, notes=tuple(said))
