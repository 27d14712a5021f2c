"""Direct logit attribution: one token's logit, split over everything that was written to the stream.

    logit before the softcap = row * <x, r> + <shift, w> + head bias,   x = resid_pre[0] + sum of all writes

1. The final norm is held at the statistics of the final state x (`row` is its 1 / rms or 1 / std), which
   makes the logit linear in x. `r` is the token's unembedding row, pulled back through the norm's gain,
   its centring and any linear map in between (`lens.head.Directions`).
2. Layer by layer each part gives its inner product with r: every (head, source) pair as
   A[h, i, j] * <v[j], W_O[h] r>, every neuron as act * <w_down, r>, biases, and whatever was not taken apart.
3. After the last layer everything is multiplied by `row`, which is known only then. So tokens named before
   a pass are attributed in that very pass.

Parts add up to the logit because the layers' parts add up to x; nothing is clamped or normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.errors import InputError, StructureError
from lmtt.graph.text import visible
from lmtt.kernels.directional_attention.reference import Block, against, attention_pattern, project
from lmtt.kernels.numerics import compute_dtype, ieee_matmul
from lmtt.kernels.types import Attention
from lmtt.lens.head import Directions, Head
from lmtt.structure.spec import AttentionWrite, CapturedLayer, Carry, MlpWrite

Values = NDArray[np.floating[Any]]


class NamedPart(NamedTuple):
    """A part in words, and what it adds to the logit (difference)."""

    what: str
    logit: float


@dataclass(frozen=True)
class BiasContributions:
    """What constants add to a logit, whatever the prompt (but for frozen norms inside the layers)."""

    attention: Values  # [L], output biases, and the shift of a norm after the attention
    mlp: Values  # [L], likewise
    final_norm: float  # the final norm's shift (a LayerNorm's beta)
    head: float  # the unembedding's bias


@dataclass(frozen=True, repr=False)
class LogitContributions:
    """Parts that add up to the logit of `target`, or to logit(target) - logit(foil), before any softcap.

    The final norm is frozen at the position's final state. `L` layers, `H` heads, `T` tokens, `F` neurons;
    arrays are float32 (float64 for a float64 model), sums are taken in float64. Layers with fewer heads or
    neurons than the widest are padded with zeros; an MLP that was not taken apart has no neurons and its
    write is in `opaque`. MLPs side by side have their neurons one after the other.
    """

    target: int
    foil: int | None
    position: int
    tokens: tuple[str, ...]  # the prompt's
    name: str  # the target as text, "target - foil" for a difference
    embed: float  # resid_pre[0]: token and position embedding
    heads: Values  # [L, H, T], by source
    neurons: Values  # [L, F]
    bias: BiasContributions
    opaque: Values  # [L], sublayers that were not taken apart
    total: float  # sum of all parts
    logit: float  # the model's own, after the softcap (a difference of two such)
    pre_softcap: float  # the model's own before the softcap: what `total` is to be compared with

    @property
    def per_head(self) -> Values:
        """[L, H], float64: each head's contribution, summed over sources."""
        values: Values = self.heads.sum(-1, dtype=np.float64)
        return values

    @property
    def defect(self) -> float:
        """total - pre_softcap: rounding of the model's forward and of this attribution."""
        return self.total - self.pre_softcap

    def top(self, k: int = 10) -> list[NamedPart]:
        """The k parts of largest magnitude in words: (head, source) pairs, neurons, embedding, biases.

        Raises InputError unless k >= 1; fewer are returned where there are fewer parts that are not 0.
        """
        if k < 1:
            raise InputError("k is out of range", expected="at least 1", got=k)
        scalars = [
            ("embedding", self.embed),
            ("final norm's shift", self.bias.final_norm),
            ("head's bias", self.bias.head),
        ]
        for layer in range(len(self.heads)):
            scalars += [
                (f"attention bias of layer {layer}", float(self.bias.attention[layer])),
                (f"MLP bias of layer {layer}", float(self.bias.mlp[layer])),
                (f"opaque sublayers of layer {layer}", float(self.opaque[layer])),
            ]
        named = [NamedPart(what, value) for what, value in scalars]
        for at in _largest(self.heads, k):
            of, head, source = np.unravel_index(at, self.heads.shape)
            token = visible(self.tokens[source])
            what = f"head {head} of layer {of} reading {token!r} at {source}"
            named.append(NamedPart(what, float(self.heads.flat[at])))
        for at in _largest(self.neurons, k):
            of, neuron = np.unravel_index(at, self.neurons.shape)
            named.append(NamedPart(f"neuron {neuron} of layer {of}", float(self.neurons.flat[at])))
        named = [part for part in named if part.logit != 0]
        return sorted(named, key=lambda part: -abs(part.logit))[:k]

    def minus(self, foil: LogitContributions) -> LogitContributions:
        """The contributions to logit(self.target) - logit(foil.target): every part is a difference."""
        attention = self.bias.attention - foil.bias.attention
        bias = BiasContributions(
            attention,
            self.bias.mlp - foil.bias.mlp,
            self.bias.final_norm - foil.bias.final_norm,
            self.bias.head - foil.bias.head,
        )
        difference = replace(
            self,
            foil=foil.target,
            name=f"{self.name} - {foil.name}",
            embed=self.embed - foil.embed,
            heads=self.heads - foil.heads,
            neurons=self.neurons - foil.neurons,
            bias=bias,
            opaque=self.opaque - foil.opaque,
            logit=self.logit - foil.logit,
            pre_softcap=self.pre_softcap - foil.pre_softcap,
        )
        return replace(difference, total=_total(difference))

    def __repr__(self) -> str:
        b = self.bias
        biases = float(np.sum(b.attention) + np.sum(b.mlp)) + b.final_norm + b.head
        parts = {
            "embed": self.embed,
            "heads": float(self.heads.sum(dtype=np.float64)),
            "neurons": float(self.neurons.sum(dtype=np.float64)),
            "bias": biases,
            "opaque": float(self.opaque.sum(dtype=np.float64)),
        }
        words = " ".join(f"{value:+.3f} {name}" for name, value in parts.items() if value)
        where = f"{visible(self.name)!r} after token {self.position}"
        return f"LogitContributions({where}: {self.total:.4f} = {words})"


def _largest(values: Values, k: int) -> list[int]:
    """Flat indices of the k entries of largest magnitude, in no particular order."""
    size = np.abs(values).ravel()
    k = min(k, len(size))
    return [int(i) for i in np.argpartition(-size, k - 1)[:k]] if k else []


def _total(parts: LogitContributions) -> float:
    arrays = (parts.heads, parts.neurons, parts.opaque, parts.bias.attention, parts.bias.mlp)
    return float(
        sum(a.sum(dtype=np.float64) for a in arrays) + parts.embed + parts.bias.final_norm + parts.bias.head
    )


class LogitAttribution:
    """Gathers the contributions to some tokens' logits at one position while a pass runs over the layers."""

    @torch.no_grad()
    def __init__(self, head: Head, targets: Sequence[int], position: int, embedded: Tensor) -> None:
        """targets: n token ids. embedded: resid_pre [T, D] of layer 0."""
        self._head = head
        self._targets = tuple(targets)
        self._position = position
        state = embedded[position]
        # Gain, shift and centring of the norm do not depend on the state; its row does, and is asked later.
        tokens = torch.tensor(self._targets, device=head.rows.device)
        self._directions: Directions = head.frozen(state).directions(tokens, embedded.shape[-1])
        self._dtype = compute_dtype(embedded.dtype)
        self._r = self._directions.r.to(self._dtype)
        self._embed = self._along(state)
        self._layers: list[_Layer] = []

    @torch.no_grad()
    def add(self, layer: CapturedLayer) -> None:
        """Attribute the writes of the next layer; nothing of it is held on to."""
        n, tokens = len(self._targets), layer.resid_pre.shape[0]
        none = np.zeros((n, 0), np.float64)
        heads: Tensor | None = None
        neurons: list[Tensor] = []
        sums = {"attention": np.zeros(n), "mlp": np.zeros(n), "opaque": np.zeros(n)}
        for stage in layer.stages:
            if stage.carry is not None:
                factor = self._rescale(stage.carry)
                heads = None if heads is None else heads * factor
                neurons = [values * factor for values in neurons]
                sums = {name: values * factor for name, values in sums.items()}
            for write in stage.writes:
                if isinstance(write, AttentionWrite):
                    pairs = self._pairs(write.attention)
                    heads = pairs if heads is None else torch.cat([heads, pairs], 1)
                    sums["attention"] += self._constant(write.bias)
                elif isinstance(write, MlpWrite):
                    neurons.append(self._neurons(write))
                    sums["mlp"] += self._constant(write.bias)
                else:
                    sums["opaque"] += self._along(write.written[self._position])
        self._layers.append(
            _Layer(
                np.zeros((n, 0, tokens)) if heads is None else _host(heads),
                np.concatenate([_host(x) for x in neurons], 1) if neurons else none,
                sums["attention"],
                sums["mlp"],
                sums["opaque"],
            )
        )

    @torch.no_grad()
    def finish(
        self, state: Tensor, tokens: Sequence[str], names: Sequence[str]
    ) -> dict[int, LogitContributions]:
        """Results by target id. state: the final one [D]; tokens: the prompt's; names: the targets' texts."""
        row = float(self._head.frozen(state).row)
        before = self._head.logits_before_softcap(state[None])[0]
        after = self._head.logits(state[None])[0]
        d = self._directions
        host = np.float64 if self._dtype == torch.float64 else np.float32

        def scaled(values: list[Values]) -> Values:
            return (row * np.stack(values)).astype(host)

        results = {}
        for n, (target, name) in enumerate(zip(self._targets, names, strict=True)):
            parts = LogitContributions(
                target=target,
                foil=None,
                position=self._position,
                tokens=tuple(tokens),
                name=name,
                embed=row * float(self._embed[n]),
                heads=scaled(_padded([layer.heads[n] for layer in self._layers])),
                neurons=scaled(_padded([layer.neurons[n] for layer in self._layers])),
                bias=BiasContributions(
                    scaled([layer.attention[n] for layer in self._layers]),
                    scaled([layer.mlp[n] for layer in self._layers]),
                    float(d.final_norm[n]),
                    float(d.head[n]),
                ),
                opaque=scaled([layer.opaque[n] for layer in self._layers]),
                total=0.0,
                logit=float(after[target]),
                pre_softcap=float(before[target]),
            )
            results[target] = replace(parts, total=_total(parts))
        return results

    def _rescale(self, carry: Carry) -> float:
        """A layer that multiplies the stream multiplies all that was added to it before; by how much.

        Raises StructureError for a factor per channel or a norm: it turns the direction that was asked along.
        """
        factor = carry.number
        if factor is None:
            raise StructureError(
                "logits cannot be attributed: a layer normalises the stream or scales its channels",
                expected="layers that add to it, or multiply it by one number",
            )
        self._embed = self._embed * factor
        self._layers = [_Layer(*(values * factor for values in layer)) for layer in self._layers]
        return factor

    def _along(self, update: Tensor) -> Values:
        """<update, r> of an update [D] at the position, [n]."""
        values: Values = (self._directions.r @ update.to(self._r.device).double()).cpu().numpy()
        return values

    def _constant(self, bias: Tensor | None) -> Values:
        """<bias, r> of a bias [D] or [T, D], [n]."""
        if bias is None:
            return np.zeros(len(self._targets))
        return self._along(bias if bias.dim() == 1 else bias[self._position])

    def _pairs(self, attention: Attention) -> Tensor:
        """[n, H, T]: A[h, i, j] * <v[j] * gate[i, h], row_scale[i] * W_O[h] r> at the one destination i."""
        i, n = self._position, len(self._targets)
        r = self._r.to(attention.v.device)
        rows = torch.full((n,), i, device=r.device)
        block = Block(rows, 0, attention.q.shape[1], ((0, attention.heads),))
        with ieee_matmul():
            vectors = project(attention, r, block, 0, attention.heads)
            values = against(vectors, attention.v, 0, attention.group)  # [H, n, T]
            values *= attention_pattern(attention, destinations=[i])
        return values.transpose(0, 1)

    def _neurons(self, mlp: MlpWrite) -> Tensor:
        """[n, F]: row_scale[i] * act[i] * <w_down, r>."""
        i = self._position
        with ieee_matmul():
            along = (mlp.w_down.to(self._dtype) @ self._r.to(mlp.w_down.device).T).T
        values = mlp.act[i].to(self._dtype) * along
        return values if mlp.row_scale is None else values * mlp.row_scale[i]


class _Layer(NamedTuple):
    """One layer's inner products with r, before the final norm's row; n targets lead."""

    heads: Values  # [n, H, T]
    neurons: Values  # [n, F]
    attention: Values  # [n]
    mlp: Values  # [n]
    opaque: Values  # [n]


def _host(values: Tensor) -> Values:
    array: Values = values.cpu().numpy()
    return array


def _padded(rows: list[Values]) -> list[Values]:
    """Zeros appended along the first axis up to the longest."""
    longest = max(len(row) for row in rows)
    return [np.pad(row, [(0, longest - len(row)), *[(0, 0)] * (row.ndim - 1)]) for row in rows]
