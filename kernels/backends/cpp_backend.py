"""The CPU engine: csrc/ through `lmtt._C`, float32 arithmetic, L1 measure.

This file turns tasks into dense float32 arrays, allocates the results, and wraps them; the mathematics is in
csrc/core. Results are bit-identical for any number of threads and any workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmtt.errors import InputError
from lmtt.kernels import host_memory, stages
from lmtt.kernels.types import AttentionResult, AttentionTask, KeptEdges, NeuronResult, NeuronTask, Pairs

NAME = "cpp"

OPS = ("attention_contributions", "neuron_contributions")
FEW_ROWS = 16  # as many as go through a matrix together
LARGE_MATRIX = 64 << 20  # bytes; a smaller one is packed in no time
WIDENED = (torch.float32, torch.bfloat16, torch.float16)


def available() -> str | None:
    """None where the native extension was built and can be loaded, or why not."""
    try:
        _native()
    except ImportError as error:
        return (
            f"the native extension is missing or cannot be loaded ({error}); reinstall with a C++17 compiler"
        )
    except ValueError as error:  # LMTT_ISA names none that runs here
        return str(error)
    return None


def refuses(op: str, task: object) -> str | None:
    """None, or why this op is not done here for this task."""
    if op not in OPS:
        return f"does not implement {op}"
    assert isinstance(task, AttentionTask | NeuronTask)
    if task.measure != "l1":
        return f"measures in L1 only, not {task.measure}"
    if task.whole.device.type != "cpu":
        return f"runs on the CPU only, not on {task.whole.device.type}"
    if task.whole.dtype not in WIDENED:
        return f"computes in float32, which {_name(task.whole.dtype)} is not widened to"
    if task.whole.numel() == 0:
        return "has no rows to work on"
    return None


@torch.no_grad()
def attention_contributions(task: AttentionTask) -> AttentionResult:
    """All shares of all rows; see AttentionTask and AttentionResult.

    Holds the results, float32 copies of inputs of other dtypes or strides, and about `task.workspace` bytes:
    at least what a few rows need. Raises InputError for shapes that do not fit together.
    """
    attention, (T, D) = task.attention, task.whole.shape
    H, E = attention.q.shape[0], attention.q.shape[-1]
    H_kv, E_v = attention.v.shape[0], attention.v.shape[-1]
    if H_kv == 0 or H % H_kv:
        raise InputError("heads of k and v", expected=f"a divisor of the {H} heads of q", got=H_kv)
    edges, per_head = torch.empty(T, T), torch.empty(T, H)
    common = _Common(T, len(task.others))
    counts = _native().attention(
        q=_by_head("q", attention.q, (H, T, E)),
        k=_by_head("k", attention.k, (H_kv, T, E)),
        v=_by_head("v", attention.v, (H_kv, T, E_v)),
        w_o=_output_weight(attention.w_o, (H, E_v, D)),
        scale=attention.scale,
        softcap=attention.softcap,
        window=attention.window,
        sinks=_optional("sinks", attention.sinks, (H,)),
        **_mask(attention.mask, H, T),
        alibi=_optional("alibi", attention.alibi, (H,)),
        lse=_optional("lse", attention.lse, (H, T)),
        row_scale=_optional("row_scale", attention.row_scale, (T,)),
        gate=_optional("gate", attention.gate, (T, H, E_v)),
        resid_pre=_dense("resid_pre", task.resid_pre, (T, D)),
        **_shared_arguments(task, T, D),
        max_certificate=task.max_certificate,
        keep=task.keep,
        edges=edges.numpy(),
        per_head=per_head.numpy(),
        **common.arrays(),
    )
    stages.spent(counts["seconds"])
    kept = None if task.keep is None else _pairs(counts["kept"])
    return AttentionResult(
        edges=edges,
        per_head=per_head,
        kept=kept,
        kept_edges=None if kept is None else _edges(counts["kept_edges"], len(kept.head)),
        evaluated=counts["evaluated"],
        positive=counts["positive"],
        reevaluated=counts["reevaluated"],
        **common.results(),
    )


@torch.no_grad()
def neuron_contributions(task: NeuronTask) -> NeuronResult:
    """The k largest shares of each row; see NeuronTask, NeuronResult and `attention_contributions`."""
    (T, F), D = task.act.shape, task.whole.shape[1]
    if not 1 <= task.k <= F:
        raise InputError("k", expected=f"1 to {F}, the number of neurons", got=task.k)
    index, value = torch.empty(T, task.k, dtype=torch.int64), torch.empty(T, task.k)
    common = _Common(T, len(task.others))
    counts = _native().neurons(
        act=_dense("act", task.act, (T, F)),
        **_down_weight(task.w_down, (F, D)),
        row_scale=_optional("row_scale", task.row_scale, (T,)),
        k=task.k,
        base=_dense("base", task.base, (T, D)),
        **_shared_arguments(task, T, D),
        index=index.numpy(),
        value=value.numpy(),
        **common.arrays(),
    )
    stages.spent(counts["seconds"])
    return NeuronResult(
        index=index,
        value=value,
        evaluated=counts["evaluated"],
        positive=counts["positive"],
        **common.results(),
    )


@torch.no_grad()
def proximities(parts: Sequence[Tensor], whole: Tensor) -> Tensor | None:
    """L1 proximity of each part [T, D] to `whole` [T, D]: float64 [T, n]; None for what is not done here."""
    if whole.dtype not in WIDENED or whole.device.type != "cpu":
        return None
    values = torch.empty(len(whole), len(parts), dtype=torch.float64)
    _native().proximities(
        whole=_dense("whole", whole, whole.shape),
        parts=[_dense("parts", part, whole.shape) for part in parts],
        values=values.numpy(),
        threads=torch.get_num_threads(),
    )
    return values


def multiply_few_rows(rows: Tensor, matrix: Tensor) -> Tensor | None:
    """rows [n, K] @ matrix [K, M], float32; None where the library's product serves as well.

    That is for any `matrix` but a large one that is stored the other way round, as linear layers have it,
    and for more than a few rows: a library packs a matrix anew for every product with it, which takes several
    times as long as the product of a few rows.
    """
    few = rows.dim() == 2 and rows.dtype == torch.float32 and 0 < len(rows) <= FEW_ROWS
    if not few or matrix.nbytes < LARGE_MATRIX or not _turned(matrix) or available() is not None:
        return None
    out = torch.empty(len(rows), matrix.shape[1])
    _native().multiply_few_rows(
        rows=_dense("rows", rows, (len(rows), matrix.shape[0])),
        stored=matrix.detach().t().numpy(),
        out=out.numpy(),
        threads=torch.get_num_threads(),
    )
    return out


class _Common:
    """The results that both ops have: [T] each, `others` [T, n]."""

    FIELDS = ("residual", "bias", "normaliser", "certificate", "checksum")

    def __init__(self, T: int, n_others: int) -> None:
        self.tensors = {name: torch.empty(T) for name in self.FIELDS}
        self.tensors["others"] = torch.empty(T, n_others)

    def arrays(self) -> dict[str, Any]:
        """Keyword arguments of `_C`; those that have an input of the same name are told apart by a prefix."""
        inputs = ("residual", "bias", "others")
        return {("out_" if name in inputs else "") + name: t.numpy() for name, t in self.tensors.items()}

    def results(self) -> dict[str, Any]:
        return self.tensors


def _shared_arguments(task: AttentionTask | NeuronTask, T: int, D: int) -> dict[str, Any]:
    bias = task.bias
    return {
        "whole": _dense("whole", task.whole, (T, D)),
        "bias": _optional("bias", bias, (D,) if bias is not None and bias.dim() == 1 else (T, D)),
        "others": [_dense("others", other, (T, D)) for other in task.others],
        "screen": task.screen,
        "workspace": task.workspace,
        "threads": torch.get_num_threads(),
    }


def _mask(mask: Tensor | None, H: int, T: int) -> dict[str, Any]:
    """`allowed` for a bool mask, `mask` for one to be added; one that repeats for all heads is given once."""
    if mask is None:
        return {"mask": None, "allowed": None}
    if mask.dim() == 3 and mask.shape[0] > 1 and mask.stride(0) == 0:
        mask = mask[:1]
    shape = (1 if mask.shape[0] == 1 else H, T, T)
    if mask.dtype == torch.bool:
        _check_shape("mask", mask, shape)
        return {"mask": None, "allowed": mask.contiguous().view(torch.uint8).numpy()}
    return {"mask": _dense("mask", mask, shape), "allowed": None}


def _pairs(columns: tuple[bytearray, ...]) -> Pairs:
    """From int64 destinations, sources and heads, and float32 shares."""
    destination, source, head, share = columns
    return Pairs(_column(destination), _column(source), _column(head), _column(share, torch.float32))


def _edges(columns: tuple[bytearray, ...], pairs: int) -> KeptEdges:
    """From int64 destinations and sources, float32 shares, and where each edge's first of all `pairs` is."""
    destination, source, share, first = columns
    head_ptr = torch.cat([_column(first), torch.tensor([pairs])])
    return KeptEdges(_column(destination), _column(source), _column(share, torch.float32), head_ptr)


def _column(array: bytearray, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.frombuffer(array, dtype=dtype) if array else torch.empty(0, dtype=dtype)  # it refuses none


def _optional(name: str, tensor: Tensor | None, shape: Sequence[int]) -> Any:
    return None if tensor is None else _dense(name, tensor, shape)


def _by_head(name: str, tensor: Tensor, shape: Sequence[int]) -> Any:
    """As `_dense`, but its vectors may lie apart, as those of a view by heads do."""
    wide = _float32(name, tensor, shape)
    return (wide if wide.stride(-1) == 1 else wide.contiguous()).numpy()


def _dense(name: str, tensor: Tensor, shape: Sequence[int]) -> Any:
    """The tensor's float32 values as a dense array: its own memory where it is one already."""
    return _float32(name, tensor, shape).contiguous().numpy()


def _float32(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    _check_shape(name, tensor, shape)
    if tensor.device.type != "cpu":
        raise InputError(name, expected="a tensor on the CPU", got=tensor.device)
    if tensor.dtype not in WIDENED:
        raise InputError(name, expected="float32, bfloat16 or float16", got=_name(tensor.dtype))
    return tensor.detach().to(torch.float32)


def _output_weight(tensor: Tensor, shape: tuple[int, int, int]) -> Any:
    """W_O [H, E_v, D] as linear layers store it, [D, H, E_v]."""
    _check_shape("w_o", tensor, shape)
    heads, width, d_model = shape
    stored = _dense_matrix("w_o", tensor.reshape(heads * width, d_model).t(), (d_model, heads * width))
    return stored.reshape(shape[2], *shape[:2])


def _down_weight(matrix: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
    """W_down [F, D]; where it is stored [D, F], as by linear layers, that too: the kernel writes the rows."""
    _check_shape("w_down", matrix, shape)
    if not _turned(matrix):
        return {"w_down": _dense("w_down", matrix, shape), "stored": None}
    return {"w_down": host_memory.scratch(shape).numpy(), "stored": matrix.detach().t().numpy()}


def _dense_matrix(name: str, matrix: Tensor, shape: tuple[int, int]) -> Any:
    """As `_dense`; quicker for the transpose of a dense matrix, which the weights of linear layers are."""
    _check_shape(name, matrix, shape)
    if not _turned(matrix):
        return _dense(name, matrix, shape)
    out = host_memory.scratch(shape)  # one task has one such weight
    source = matrix.detach().t().numpy()
    _native().transpose(source=source, out=out.numpy(), threads=torch.get_num_threads())
    return out.numpy()


def _turned(matrix: Tensor) -> bool:
    """Whether it is the transpose of a dense float32 matrix on the CPU, and not dense itself."""
    usable = matrix.dtype == torch.float32 and matrix.device.type == "cpu"
    return usable and not matrix.is_contiguous() and matrix.t().is_contiguous()


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise InputError(f"shape of {name}", expected=list(shape), got=list(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _native() -> ModuleType:
    module = import_module("lmtt._C")
    module.info()  # chooses the instruction set
    return module
