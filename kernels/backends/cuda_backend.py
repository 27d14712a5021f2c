"""The GPU engine with its irregular steps in CUDA C++ (csrc/cuda): compaction, and evaluation of lists.

Everything regular is the Triton backend's; directional_attention and unembed_topk have no irregular step and
are not implemented here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmtt.kernels import cuda_library
from lmtt.kernels.backends import triton_backend
from lmtt.kernels.triton_host import on_device
from lmtt.kernels.types import AttentionResult, AttentionTask, NeuronResult, NeuronTask

if TYPE_CHECKING:
    from torch import Tensor

    from lmtt.kernels.proximity.fused import Chunk, Listed

NAME = "cuda"

OPS = ("attention_contributions", "neuron_contributions")


def available() -> str | None:
    """None where the library was built and there is a device, or why not."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return triton_backend.available() or cuda_library.missing()


def refuses(op: str, task: object) -> str | None:
    """None, or why this op is not done here for this task."""
    if op not in OPS:
        return f"does not implement {op}"
    assert isinstance(task, AttentionTask | NeuronTask)
    if task.measure != "l1":
        return "has kernels for L1 only"
    if task.whole.shape[1] > cuda_library.library().lmtt_cuda_most_width():
        return f"holds one u in shared memory: at most {cuda_library.library().lmtt_cuda_most_width()} wide"
    return triton_backend.refuses(op, task)


def _lister(bits: Tensor) -> Listed:
    """As `list_pairs` of kernels/proximity/fused.py."""
    from lmtt.kernels.proximity.fused import Listed

    groups, members, words = bits.shape
    group, row = cuda_library.compact(bits.contiguous().view(groups * members, words))
    return Listed(group // members, group % members, row)


def attention_contributions(task: AttentionTask) -> AttentionResult:
    """See kernels/proximity/fused.py."""
    from lmtt.kernels.proximity import fused

    with on_device(task.whole):
        smallest = cuda_library.block_smallest(task.whole.contiguous())

    def evaluate(chunk: Chunk, listed: Listed, coefficient: Tensor, g: Tensor) -> Tensor:
        whole, destination = chunk.task.whole.contiguous(), chunk.rows.int()[listed.row.long()]

        def by_u(u: Tensor, u_row: Tensor, pairs: slice) -> Tensor:
            return cuda_library.evaluate(
                u, whole, smallest, u_row, destination[pairs], coefficient[pairs], g[pairs]
            )

        return fused.by_source(chunk, listed, by_u)

    with on_device(task.whole):
        return fused.attention_contributions(task, evaluate=evaluate, lister=_lister, dense=False)


def neuron_contributions(task: NeuronTask) -> NeuronResult:
    """See kernels/neurons/fused.py."""
    from lmtt.kernels.neurons import fused

    def evaluate(
        w_down: Tensor, whole: Tensor, neuron: Tensor, row: Tensor, coefficient: Tensor, g: Tensor
    ) -> Tensor:
        smallest = cuda_library.block_smallest(whole)
        return cuda_library.evaluate(w_down, whole, smallest, neuron, row, coefficient, g)

    with on_device(task.whole):
        return fused.neuron_contributions(task, evaluate=evaluate, lister=_lister)
