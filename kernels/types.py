"""What goes into a kernel and what comes out: plain frozen records, one sequence at a time.

The alphabet is the project's: `T` tokens, `H` heads, `H_kv` key/value heads, `E` d_head, `E_v` the width
of a value, `D` d_model, `F` d_mlp, `V` vocabulary; `i` destination, `j` source, `h` head, `n` neuron.
Arguments here have been validated (by `lmtt.ops` or by the engine's capture); backends may assume it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

Measure = Literal["l1", "l2"]


@dataclass(frozen=True)
class Attention:
    """Everything that a pair (head h, source j) adds to the stream at destination i is made of.

    part[i, h, j] = row_scale[i] * A[h, i, j] * (v[h // (H / H_kv), j] * gate[i, h]) @ w_o[h]

    | field     | shape                      | meaning                                                     |
    |-----------|----------------------------|-------------------------------------------------------------|
    | q         | [H, T, E]                  | after rotary embedding, QK norm and bias                    |
    | k         | [H_kv, T, E]               | likewise                                                    |
    | v         | [H_kv, T, E_v]             | with its bias                                               |
    | w_o       | [H, E_v, D]                | output projection by head (a post-norm's weight folded in)  |
    | scale     | float                      | logits = softcap(scale * q.k) + mask + alibi                |
    | softcap   | float or None              | c * tanh(x / c)                                             |
    | window    | int or None                | keeps i - window < j <= i                                   |
    | sinks     | [H] or None                | an extra logit in each row's softmax, contributing nothing  |
    | mask      | [1 or H, T, T] or None     | bool (True = may attend) or float, added after the softcap  |
    | alibi     | [H] or None                | slope; adds -slope * (i - j)                                |
    | lse       | [H, T] or None             | each row's log-sum-exp (sink included); computed if None    |
    | row_scale | [T] or None                | a linearised post-norm's 1 / rms, and any scalar multiplier |
    | gate      | [T, H, E_v] or None        | elementwise gate on the attention output                    |

    Attention is always causal. All tensors share one floating dtype and one device (mask may be bool).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    w_o: Tensor
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    alibi: Tensor | None = None
    lse: Tensor | None = None
    row_scale: Tensor | None = None
    gate: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.q.shape[0] // self.k.shape[0]


@dataclass(frozen=True)
class AttentionTask:
    """Contributions of every (head, source) pair, and of the other parts, to each row of `whole`.

    whole[i] = resid_pre[i] + sum of pairs + bias[i] + sum of others[i]
    """

    attention: Attention
    resid_pre: Tensor  # [T, D]
    whole: Tensor  # [T, D]; resid_mid, or resid_post of a parallel block
    bias: Tensor | None = None  # [D] or [T, D]
    others: tuple[Tensor, ...] = ()  # each [T, D]: further parts, such as the MLP of a parallel block
    screen: float = 0.0  # pairs whose bound is <= screen * |whole|_1 keep their first-order value
    max_certificate: float = 1.0  # rows less certain than this are evaluated again, with less or no screening
    keep: float | None = None  # also list pairs with share > keep on edges with share > keep
    measure: Measure = "l1"
    workspace: int = 64 << 20  # bytes that a backend may hold beyond inputs and results


class Pairs(NamedTuple):
    """(head, source) pairs at destinations, as parallel arrays sorted by (destination, source, head)."""

    destination: Tensor  # int64 [N]
    source: Tensor  # int64 [N]
    head: Tensor  # int64 [N]
    value: Tensor  # [N]


class KeptEdges(NamedTuple):
    """Edges with share > keep, sorted by (destination, source); edge n has the pairs from head_ptr[n] on."""

    destination: Tensor  # int64 [N]
    source: Tensor  # int64 [N]
    weight: Tensor  # [N], shares
    head_ptr: Tensor  # int64 [N + 1], into Pairs


@dataclass(frozen=True)
class AttentionResult:
    """Shares of each row of `whole`: edges.sum(-1) + residual + bias + others.sum(-1) is 1.

    Or 0, where the normaliser is 0.

    Shares and sums are float32 (float64 for float64 inputs).
    """

    edges: Tensor  # [T, T], [i, j], summed over heads; 0 above the diagonal
    per_head: Tensor  # [T, H], summed over sources
    residual: Tensor  # [T]
    bias: Tensor  # [T]; 0 without a bias
    others: Tensor  # [T, n]
    normaliser: Tensor  # [T], sum of the reported proximities, in units of |whole|
    certificate: Tensor  # [T], bound on the error of any share, or sum of shares, of the row; 0 = all exact
    checksum: (
        Tensor  # [T], |sum over parts <part, sign(whole)> - |whole|_1| / sum over parts |<part, sign(whole)>|
    )
    kept: Pairs | None  # value = share; None unless asked for
    evaluated: int  # exact evaluations made
    positive: int  # pairs whose bound was positive
    reevaluated: int  # rows evaluated again because of max_certificate
    kept_edges: KeptEdges | None = None  # where the backend listed them on the way; see `list_edges`


@dataclass(frozen=True)
class NeuronTask:
    """Contributions of every neuron, and of the other parts, to each row of `whole`.

    part[i, n] = row_scale[i] * act[i, n] * w_down[n]
    whole[i] = base[i] + sum of parts + bias[i] + sum of others[i]
    """

    act: Tensor  # [T, F]
    w_down: Tensor  # [F, D] (a post-norm's weight folded in)
    base: Tensor  # [T, D]; resid_mid (parallel block: resid_pre + attention output)
    whole: Tensor  # [T, D]; resid_post
    bias: Tensor | None = None  # [D] or [T, D]
    others: tuple[Tensor, ...] = ()
    row_scale: Tensor | None = None  # [T]
    k: int = 20
    screen: float = 0.0
    measure: Measure = "l1"
    workspace: int = 64 << 20


@dataclass(frozen=True)
class NeuronResult:
    """The k largest contributions of each row, exact numerators by falling bound; ties by lower index."""

    index: Tensor  # int64 [T, k], falling value
    value: Tensor  # [T, k], shares
    residual: Tensor  # [T], share of base
    bias: Tensor  # [T]
    others: Tensor  # [T, n]
    normaliser: Tensor  # [T]
    certificate: Tensor  # [T]
    checksum: Tensor  # [T], as in AttentionResult
    evaluated: int
    positive: int


@dataclass(frozen=True)
class TopK:
    """The k largest logits of each row, falling, ties by lower index."""

    values: Tensor  # [N, k]
    indices: Tensor  # int64 [N, k]
    logsumexp: Tensor  # [N]


@dataclass(frozen=True)
class Choice:
    """Which backend does an op here, and why."""

    op: str
    backend: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)  # the others, with the reason for each
    notes: tuple[str, ...] = ()  # what it had to say when it ran, such as less memory than it was given
