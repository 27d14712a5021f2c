"""One captured layer becomes the shares that a trace keeps of it.

1. The stage that holds the attention: every (head, source) pair, the residual, the bias and whatever else
   was added in the same sum (a parallel block's MLP) compete for that stage's whole.
2. The stage that holds the MLP: the block is one part beside the stream it is added to.
3. Neurons: each is a part of the same whole, beside the stream and the bias.
4. Edges and heads above the floor are kept, the rest of a row is one number.

Nothing here knows a model; the definitions are in kernels/proximity/README.md and kernels/neurons/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.errors import StructureError
from lmtt.kernels import measures, registry
from lmtt.kernels.backends import cpp_backend
from lmtt.kernels.types import (
    AttentionResult,
    AttentionTask,
    Choice,
    KeptEdges,
    Measure,
    NeuronResult,
    NeuronTask,
)
from lmtt.structure.capture import side_by_side
from lmtt.structure.spec import (
    AttentionWrite,
    CapturedLayer,
    CapturedWrite,
    Carry,
    MlpWrite,
    OpaqueWrite,
    Stage,
)

MAX_CERTIFICATE = 0.05  # rows that screening leaves less certain than this are evaluated again without it


ROW_SHARES = ("residual", "mlp", "passthrough", "bias", "opaque", "rest", "certificate")


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a trace, and hence belongs to its manifest."""

    floor: float = 1e-3  # edges and heads with share <= floor are not kept
    screen: float | None = None  # pairs with bound <= screen * |whole| stay first-order; None: floor / 10
    measure: Measure = "l1"
    neurons: int = 20
    backend: str = "auto"
    workspace: int = 64 << 20

    @property
    def attention_screen(self) -> float:
        return self.floor / 10 if self.screen is None else self.screen

    @property
    def neuron_screen(self) -> float:
        return self.floor if self.screen is None else self.screen


@dataclass(frozen=True)
class Block:
    """A captured layer seen as a block: where attention and MLP meet the stream.

    Sequential: `mid` is the stage of the attention, `post` everything after it, summed into one stage.
    Parallel: both are the same stage. A layer without attention has an opaque write in its place.
    """

    mid: Stage
    post: Stage | None  # None: the layer has no second sum (a parallel block, or a lone mixer)

    @property
    def attention(self) -> AttentionWrite | None:
        found = [w for w in self.mid.writes if isinstance(w, AttentionWrite)]
        return found[0] if found else None

    @property
    def mlps(self) -> list[MlpWrite]:
        stage = self.post or self.mid
        return [w for w in stage.writes if isinstance(w, MlpWrite)]


def as_block(layer: CapturedLayer) -> Block:
    """Group a layer's stages into the block that the graph draws.

    Raises
    ------
    StructureError
        More than one attention in a layer, or sums before the attention's: forms that no block drawing fits.
    """
    holders = [
        n for n, stage in enumerate(layer.stages) if any(isinstance(w, AttentionWrite) for w in stage.writes)
    ]
    count = sum(isinstance(w, AttentionWrite) for stage in layer.stages for w in stage.writes)
    if count > 1 or (holders and holders[0] > 0):
        raise StructureError(
            f"layer {layer.index} has {count} attentions in {len(layer.stages)} sums",
            expected="one attention, in the first sum",
        )
    mid, later = _one_mlp(layer.stages[0]), layer.stages[1:]
    if not later:
        return Block(mid, None)
    base, writes = mid.whole, list[CapturedWrite]()
    for stage in later:
        if stage.carry is not None:  # what lies before this sum is rescaled with the stream
            base = stage.carry.apply(base)
            writes = [_rescaled(write, stage.carry) for write in writes]
        writes += stage.writes
    return Block(mid, _one_mlp(Stage(base=base, whole=layer.stages[-1].whole, writes=tuple(writes))))


def _one_mlp(stage: Stage) -> Stage:
    """Several MLPs of one block are one, their neurons one after the other's."""
    mlps = [write for write in stage.writes if isinstance(write, MlpWrite)]
    if len(mlps) < 2:
        return stage
    others = [write for write in stage.writes if not isinstance(write, MlpWrite)]
    return replace(stage, writes=(*others, side_by_side(mlps)))


def _rescaled(write: CapturedWrite, carry: Carry) -> CapturedWrite:
    """A write taken along with the stream."""
    written = carry.apply(write.written)
    if isinstance(write, OpaqueWrite):
        return replace(write, written=written)
    bias = None if write.bias is None else carry.apply(write.bias)
    if isinstance(write, MlpWrite):
        row = _product(write.row_scale, carry.row)
        return replace(write, w_down=carry.fold(write.w_down), row_scale=row, bias=bias, written=written)
    one = write.attention
    one = replace(one, w_o=carry.fold(one.w_o), row_scale=_product(one.row_scale, carry.row))
    return replace(write, attention=one, bias=bias, written=written)


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def attention_task(block: Block, settings: Settings, *, screen: float, keep: float | None) -> AttentionTask:
    """The kernel's task for a block's attention; raises KeyError-free only where there is one."""
    attention = block.attention
    assert attention is not None
    others = tuple(w.written for w in block.mid.writes if w is not attention)
    return AttentionTask(
        attention=attention.attention,
        resid_pre=block.mid.base,
        whole=block.mid.whole,
        bias=attention.bias,
        others=others,
        screen=screen,
        max_certificate=MAX_CERTIFICATE,
        keep=keep,
        measure=settings.measure,
        workspace=settings.workspace,
    )


def neuron_task(
    block: Block, mlp: MlpWrite, settings: Settings, *, rows: slice, screen: float, k: int
) -> NeuronTask:
    """The kernel's task for one MLP on some rows. In a parallel block resid_pre + attention is one part."""
    stage = block.post or block.mid
    base = stage.base
    others = []
    for write in stage.writes:
        if isinstance(write, AttentionWrite):
            base = base + write.written
        elif write is not mlp:
            others.append(write.written[rows])
    bias = mlp.bias if mlp.bias is None or mlp.bias.dim() == 1 else mlp.bias[rows]
    return NeuronTask(
        act=mlp.act[rows],
        w_down=mlp.w_down,
        base=base[rows],
        whole=stage.whole[rows],
        bias=bias,
        others=tuple(others),
        row_scale=None if mlp.row_scale is None else mlp.row_scale[rows],
        k=min(k, mlp.w_down.shape[0]),
        screen=screen,
        measure=settings.measure,
        workspace=settings.workspace,
    )


def shares(parts: list[Tensor], whole: Tensor, measure: Measure, backend: str = "reference") -> Tensor:
    """[T, n] shares of a handful of parts [T, D] of `whole` [T, D]; rows of 0 where nothing is close.

    backend : "cpp" for the native loop, where the layer's other shares come from there too.
    """
    native = cpp_backend.proximities(parts, whole) if backend == "cpp" and measure == "l1" else None
    if native is not None:
        values = native
    else:
        rule = measures.measure(measure)
        prepared = rule.prepare(whole)
        values = torch.stack([rule.proximity(part, *prepared) for part in parts], dim=-1).double()
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total.where(total > 0, torch.ones_like(total)), 0.0)


@dataclass(frozen=True)
class LayerShares:
    """What a trace keeps of one layer (host arrays, names as in run/README.md), and how it was made."""

    arrays: dict[str, NDArray[Any]]
    choices: tuple[Choice, ...]
    checksum: float  # largest relative defect of sum <part, sign(whole)> = |whole|_1 over rows and ops
    pairs_evaluated: int
    pairs_positive: int
    neurons_evaluated: int
    rows_reevaluated: int


def layer_shares(layer: CapturedLayer, settings: Settings) -> LayerShares:
    """All shares of one layer."""
    block = as_block(layer)
    T = layer.resid_pre.shape[0]
    arrays: dict[str, NDArray[Any]] = {name: np.zeros(T, np.float32) for name in ROW_SHARES}
    choices: list[Choice] = []
    checksums = [0.0]
    evaluated = positive = neurons_evaluated = reevaluated = 0

    if block.attention is not None:
        task = attention_task(block, settings, screen=settings.attention_screen, keep=settings.floor)
        result, choice = registry.run("attention_contributions", task, backend=settings.backend)
        choices.append(choice)
        checksums.append(float(result.checksum.max()))
        evaluated, positive = result.evaluated, result.positive
        reevaluated = result.reevaluated
        arrays |= _attention_arrays(block, result, settings.floor)
    else:
        arrays |= _opaque_arrays(block, settings.measure)
    if block.post is not None:
        backend = choices[0].backend if choices else "reference"
        arrays |= _mlp_arrays(block.post, settings.measure, backend)

    if len(block.mlps) == 1:
        task_n = neuron_task(
            block,
            block.mlps[0],
            settings,
            rows=slice(None),
            screen=settings.neuron_screen,
            k=settings.neurons,
        )
        neurons, choice = registry.run("neuron_contributions", task_n, backend=settings.backend)
        choices.append(choice)
        checksums.append(float(neurons.checksum.max()))
        neurons_evaluated = neurons.evaluated
        arrays |= _neuron_arrays(neurons, task_n.act, settings.neurons)
    else:
        arrays |= _no_neurons(T, settings.neurons)
    return LayerShares(
        arrays, tuple(choices), max(checksums), evaluated, positive, neurons_evaluated, reevaluated
    )


def _host(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).numpy()


def _attention_arrays(block: Block, result: AttentionResult, floor: float) -> dict[str, NDArray[Any]]:
    """Shares of the attention's stage, its kept edges and their heads."""
    T = result.edges.shape[0]
    edges, kept = result.kept_edges or list_edges(result, floor), result.kept
    assert kept is not None
    kept_mass = torch.zeros(T, dtype=torch.float64, device=edges.weight.device).index_add_(
        0, edges.destination, edges.weight.double()
    )
    others = result.others.double().sum(-1)
    given = result.residual.double() + result.bias.double() + others
    rest = torch.where(result.normaliser > 0, (1 - given - kept_mass).clamp(min=0), 0.0)
    arrays: dict[str, NDArray[Any]] = {
        "residual": _host(result.residual),
        "bias": _host(result.bias),
        "rest": _host(rest),
        "certificate": _host(result.certificate),
        "edge_destination": edges.destination.cpu().numpy().astype(np.int32),
        "edge_source": edges.source.cpu().numpy().astype(np.int32),
        "edge_weight": _host(edges.weight),
        "head_ptr": edges.head_ptr.cpu().numpy(),
        "head": kept.head.cpu().numpy().astype(np.int32),
        "head_weight": _host(kept.value),
    }
    rivals = [w for w in block.mid.writes if not isinstance(w, AttentionWrite)]
    for number, write in enumerate(rivals):
        name = "opaque" if block.post is not None or _is_mixer(write) else "mlp"
        arrays[name] = arrays.get(name, np.zeros(T, np.float32)) + _host(result.others[:, number])
    return arrays


def list_edges(result: AttentionResult, floor: float) -> KeptEdges:
    """The edges above the floor, for backends that do not list them on the way."""
    kept = result.kept
    assert kept is not None
    T = result.edges.shape[0]
    destination, source = torch.nonzero(result.edges > floor, as_tuple=True)
    head_ptr = torch.searchsorted(kept.destination * T + kept.source, destination * T + source)
    end = head_ptr.new_full((1,), len(kept.head))
    return KeptEdges(destination, source, result.edges[destination, source], torch.cat([head_ptr, end]))


def _is_mixer(write: object) -> bool:
    return isinstance(write, OpaqueWrite) and write.kind in ("mixer", "opaque")


def _opaque_arrays(block: Block, measure: Measure) -> dict[str, NDArray[Any]]:
    """A first sum without attention: the stream and one opaque part (or, alone, the MLP)."""
    stage = block.mid
    values = shares([stage.base, *(w.written for w in stage.writes)], stage.whole, measure)
    none = np.zeros(0, np.int32)
    arrays: dict[str, NDArray[Any]] = {
        "residual": _host(values[:, 0]),
        "edge_destination": none,
        "edge_source": none,
        "edge_weight": np.zeros(0, np.float32),
        "head_ptr": np.zeros(1, np.int64),
        "head": none,
        "head_weight": np.zeros(0, np.float32),
    }
    for number, write in enumerate(stage.writes, start=1):
        name = "mlp" if block.post is None and not _is_mixer(write) else "opaque"
        arrays[name] = arrays.get(name, np.zeros(len(stage.base), np.float32)) + _host(values[:, number])
    return arrays


def _mlp_arrays(stage: Stage, measure: Measure, backend: str) -> dict[str, NDArray[Any]]:
    """The MLP block, its bias included, is one part of resid_post beside resid_mid."""
    values = shares([stage.base, *(w.written for w in stage.writes)], stage.whole, measure, backend)
    return {"passthrough": _host(values[:, 0]), "mlp": _host(values[:, 1:].sum(-1))}


def _neuron_arrays(result: NeuronResult, act: Tensor, k: int) -> dict[str, NDArray[Any]]:
    T, found = result.index.shape
    arrays = _no_neurons(T, k)
    arrays["neuron_index"][:, :found] = result.index.cpu().numpy()
    arrays["neuron_contribution"][:, :found] = _host(result.value)
    arrays["neuron_activation"][:, :found] = _host(torch.gather(act, 1, result.index))
    arrays["neuron_certificate"] = _host(result.certificate)
    return arrays


def _no_neurons(T: int, k: int) -> dict[str, NDArray[Any]]:
    return {
        "neuron_index": np.full((T, k), -1, np.int32),
        "neuron_contribution": np.zeros((T, k), np.float32),
        "neuron_activation": np.zeros((T, k), np.float32),
        "neuron_certificate": np.zeros(T, np.float32),
    }
