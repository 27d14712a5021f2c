"""The logit lens over many states at once: what each says first, how surely, and where one token ranks.

Each state goes through the model's own final norm, head and softcap, as in `Trace.lens`; only the answers are
kept, never [states, V].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtt.lens.head import Head


@dataclass(frozen=True, eq=False)
class LensTable:
    """Answers for `n` layers' resid_post at `P` positions. Ranks count from 0, ties by lower id."""

    layers: tuple[int, ...]  # n
    positions: tuple[int, ...]  # P
    token_id: NDArray[np.int64]  # [n, P], the most probable token
    token: tuple[tuple[str, ...], ...]  # [n][P], as text
    probability: NDArray[np.float32]  # [n, P], of that token
    entropy: NDArray[np.float32]  # [n, P], in nats
    target_probability: NDArray[np.float32] | None  # [n, P]
    target_rank: NDArray[np.int64] | None  # [n, P]


@dataclass(frozen=True, eq=False)
class LensRow:
    """One layer's row of a `LensTable`; tensors [P]."""

    token_id: Tensor
    probability: Tensor
    entropy: Tensor
    target_probability: Tensor | None
    target_rank: Tensor | None


@torch.no_grad()
def lens_row(head: Head, states: Tensor, target: int | None) -> LensRow:
    """states [P, D]."""
    logits = head.logits(states).float()
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    top = logits.argmax(-1)
    return LensRow(
        top,
        p.gather(-1, top[:, None])[:, 0],
        # 0 log 0 is 0: a logit of -inf has no part in the entropy.
        -torch.where(p > 0, p * log_p, 0).sum(-1),
        None if target is None else p[:, target],
        None if target is None else ranks(logits, [target])[:, 0],
    )


@torch.no_grad()
def ranks(logits: Tensor, tokens: list[int]) -> Tensor:
    """logits [P, V] -> [P, n]: how many tokens come before each of `tokens`, ties by lower id."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    found = [((logits > logits[:, [t]]) | ((logits == logits[:, [t]]) & (index < t))).sum(-1) for t in tokens]
    return torch.stack(found, -1) if found else logits.new_zeros((len(logits), 0), dtype=torch.int64)
