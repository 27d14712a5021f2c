"""What a head does on this prompt, as measured; where a head and a neuron act most, and what they say there.

A behaviour is a set of source positions for each destination i (token ids t):

| name | sources | destinations |
|---|---|---|
| previous token | i - 1 | i >= 2 |
| first token | 0 | i >= 2 |
| current token | i | i >= 1 |
| duplicate token | j < i with t[j] = t[i] | those that have such a j |
| induction | 1 <= j < i with t[j - 1] = t[i], after an earlier occurrence | those that have such a j |

A head's score is the mass it puts on the sources, averaged over the destinations: of its attention pattern,
or of its contributions (each row divided by its sum; rows that contribute nothing do not count). `chance` is
the same for a head that spreads evenly over j <= i. A behaviour that no destination of this prompt has gets
no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pairs = NDArray[np.bool_]  # [T, T]: destination i, source j
Of = Literal["attention", "contribution"]
NAMED_FROM = 0.4  # a head whose best score is below this has no name


@dataclass(frozen=True)
class HeadBehaviour:
    """One head's scores on one prompt."""

    layer: int
    head: int
    name: str | None  # of the best score, None if that is below NAMED_FROM
    score: float  # the best one; 0 where the prompt is too short for any
    scores: Mapping[str, float]  # of every behaviour that the prompt has destinations for
    chance: Mapping[str, float]

    def __str__(self) -> str:
        where = f"head {self.head} of layer {self.layer}"
        best = max(self.scores, key=lambda name: self.scores[name], default=None)
        if best is None:
            return f"{where}: the prompt is too short to tell"
        what = self.name or f"no name, most like {best}"
        return f"{where}: {what} ({self.score:.2f}, chance {self.chance[best]:.2f})"


class HeadPair(NamedTuple):
    """What one head moved from one token to another, and what that promotes there."""

    source: int
    destination: int
    contribution: float  # share of resid_mid at the destination (parallel blocks: of resid_post)
    promoted: list[Any]  # TokenScore, strongest first


class NeuronPosition(NamedTuple):
    """A neuron at one position."""

    position: int
    activation: float
    contribution: float  # exact share of resid_post there


def source_positions(ids: NDArray[np.int64]) -> dict[str, Pairs]:
    """[T, T] by behaviour: the (destination, source) pairs of this module's table. ids [T]."""
    T = len(ids)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    same = ids[:, None] == ids[None]  # [i, j]: t[i] = t[j]
    followed = np.zeros((T, T), bool)
    followed[:, 1:] = same[:, :-1]
    return {
        "previous token": (j == i - 1) & (i >= 2),
        "first token": (j == 0) & (i >= 2),
        "current token": (j == i) & (i >= 1),
        "duplicate token": same & (j < i),
        "induction": followed & (j < i),
    }


def head_behaviours(
    ids: NDArray[np.int64], layer: int, heads: int, weights: Callable[[int], Array], of: Of
) -> list[HeadBehaviour]:
    """Every head's scores. weights: a head's attention pattern or contribution map, [T, T]."""
    T, pairs = len(ids), source_positions(ids)
    even = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    chance = {name: found for name, at in pairs.items() if (found := _mass(even, at)) is not None}
    result = []
    for head in range(heads):
        rows = weights(head).astype(np.float64)
        if of == "contribution":
            sums = rows.sum(-1, keepdims=True)
            rows = np.divide(rows, sums, out=np.full_like(rows, np.nan), where=sums > 0)
        scores = {name: found for name, at in pairs.items() if (found := _mass(rows, at)) is not None}
        best = max(scores, key=lambda name: scores[name], default=None)
        score = 0.0 if best is None else scores[best]
        name = best if score >= NAMED_FROM else None
        result.append(HeadBehaviour(layer, head, name, score, scores, chance))
    return result


def _mass(rows: NDArray[np.float64], pairs: Pairs) -> float | None:
    """Mean over destinations with a source, rows of NaN left out; None if there are none."""
    defined = pairs.any(1) & ~np.isnan(rows).any(1)
    if not defined.any():
        return None
    return float(np.where(pairs, rows, 0)[defined].sum(1).mean())


def strongest_pairs(contributions: Array, k: int) -> list[tuple[int, int, float]]:
    """(source, destination, contribution) of a head's [T, T] map, falling, the first k above 0.

    Destination 0 is left out: it has one source only.
    """
    values = contributions.copy()
    values[0] = 0
    order = np.argsort(-values, axis=None, kind="stable")[:k]
    T = len(values)
    return [(int(at) % T, int(at) // T, float(values.flat[at])) for at in order if values.flat[at] > 0]
