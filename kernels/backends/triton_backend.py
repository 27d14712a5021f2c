"""The GPU engine in Triton: every op as fused kernels (kernels/<op>/fused.py, kernels/triton_bricks.py).

With TRITON_INTERPRET=1 in the environment the same kernels are interpreted on tensors of the CPU, which is
slow and for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lmtt.kernels.triton_host import interpreted, on_device
from lmtt.kernels.types import Attention, AttentionResult, AttentionTask, NeuronResult, NeuronTask, TopK

if TYPE_CHECKING:
    from torch import Tensor

NAME = "triton"

OPS = ("directional_attention", "attention_contributions", "neuron_contributions", "unembed_topk")
WIDENED = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability that the kernels are compiled and checked for


def available() -> str | None:
    """None where Triton is installed and has a device, or why not."""
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        import triton  # noqa: F401  # what matters is whether it can be imported
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the extra: pip install 'lmtt[gpu]'"
    if interpreted():
        from lmtt.kernels.triton_interpreter import mend

        mend()
    return None


def refuses(op: str, task: object) -> str | None:
    """None, or why this op is not done here for this task."""
    if op not in OPS:
        return f"does not implement {op}"
    tensor = _tensor_of(task)
    if interpreted():
        if tensor.device.type != "cpu":
            return "is interpreted (TRITON_INTERPRET=1), on CPU tensors only"
    elif tensor.device.type != "cuda":
        return f"runs on CUDA devices only, not on {tensor.device.type}"
    elif torch.cuda.get_device_capability(tensor.device) < OLDEST:
        return "needs compute capability 8.0 or newer"
    if tensor.dtype not in WIDENED:
        return f"computes in float32, which {str(tensor.dtype).removeprefix('torch.')} is not widened to"
    if tensor.numel() == 0:
        return "has no rows to work on"
    if isinstance(task, NeuronTask) and task.measure != "l1":
        return "measures neurons in L1 only"
    attention = task.attention if isinstance(task, AttentionTask) else task
    if isinstance(task, AttentionTask) and task.measure == "l2" and task.attention.gate is not None:
        return "takes |u| from one Gram matrix per head, which a gate on the attention output does not allow"
    if isinstance(attention, Attention) and max(attention.q.shape[2], attention.v.shape[2]) > 256:
        return "has tiles for heads of at most 256 numbers"
    return None


def _tensor_of(task: object) -> Tensor:
    if isinstance(task, AttentionTask | NeuronTask):
        return task.whole
    if isinstance(task, Attention):
        return task.q
    assert isinstance(task, torch.Tensor)
    return task


def directional_attention(attention: Attention, direction: Tensor, *args: Any, **options: Any) -> Tensor:
    """See kernels/directional_attention/fused.py."""
    from lmtt.kernels.directional_attention.fused import directional_attention as fused

    with on_device(direction):
        return fused(attention, direction, *args, **options)


def attention_contributions(task: AttentionTask) -> AttentionResult:
    """See kernels/proximity/fused.py."""
    from lmtt.kernels.proximity.fused import attention_contributions as fused

    with on_device(task.whole):
        return fused(task)


def neuron_contributions(task: NeuronTask) -> NeuronResult:
    """See kernels/neurons/fused.py."""
    from lmtt.kernels.neurons.fused import neuron_contributions as fused

    with on_device(task.whole):
        return fused(task)


def unembed_topk(
    x: Tensor, w_u: Tensor, k: int, norm: Callable[[Tensor], Tensor] | None = None, *args: Any, **options: Any
) -> TopK:
    """See kernels/unembed_topk/fused.py."""
    from lmtt.kernels.unembed_topk.fused import unembed_topk as fused

    with on_device(x):
        return fused(x, w_u, k, norm, *args, **options)
