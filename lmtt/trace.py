"""A trace: what one prompt's run was made of.

What is kept is host arrays (`lmtt.run.data.TraceData`); what is not is computed when asked, from the kept
residual stream and the weights of the layer in question, and equals what a pass without screening gives.
A trace opened from a file answers from what is kept, and says so when it needs the model.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from lmtt.errors import InputError, ModelNeededError
from lmtt.graph.text import visible

if TYPE_CHECKING:
    from lmtt.graph.routes import Route
    from lmtt.lens.behaviour import HeadBehaviour, HeadPair, NeuronPosition, Of
    from lmtt.lens.logit_attribution import LogitContributions
    from lmtt.lens.table import LensTable
    from lmtt.run.data import TraceData
    from lmtt.spans import Span, SpanShares, Unit

Array = NDArray[np.float32]
Site = Literal["pre", "mid", "post"]
Token = int | str  # an id, or a text that is exactly one token
TokenList = Sequence[int] | list[str] | tuple[Token, ...]  # a bare str is no list, though it is a sequence
Part = Literal["attention", "mlp"] | tuple[str, int] | tuple[str, int, int]


class TokenScore(NamedTuple):
    """A token and what a promoted / suppressed list ranks it by."""

    token: str
    id: int
    score: float


class TokenLogit(NamedTuple):
    """A token as a logit lens shows it."""

    token: str
    id: int
    logit: float
    probability: float


class Prediction(NamedTuple):
    """A next token and its probability."""

    token: str
    id: int
    probability: float


class Neuron(NamedTuple):
    """A neuron, its share of resid_post, and the activation that entered the down projection."""

    neuron: int
    contribution: float
    activation: float


class ExactRows(NamedTuple):
    """Rows evaluated without screening; pairs.sum(1) + residual + bias + others == 1."""

    pairs: Array  # [n, H, T]
    residual: Array  # [n]
    bias: Array  # [n]
    others: Array  # [n]


class Details(Protocol):
    """What a trace asks of the engine that made it (or that was attached)."""

    def exact_rows(self, data: TraceData, layer: int, rows: Sequence[int]) -> ExactRows: ...
    def head_shares(self, data: TraceData, layer: int, head: int) -> Array: ...
    def attention_pattern(self, data: TraceData, layer: int, head: int) -> Array: ...
    def neurons(self, data: TraceData, layer: int, position: int, k: int) -> list[Neuron]: ...
    def neuron_positions(self, data: TraceData, layer: int, neuron: int, k: int) -> list[NeuronPosition]: ...
    def lens(self, data: TraceData, layer: int, position: int, site: Site, k: int) -> list[TokenLogit]: ...
    def lens_table(
        self, data: TraceData, layers: Sequence[int], positions: Sequence[int], target: int | None
    ) -> LensTable: ...
    def lens_ranks(
        self, data: TraceData, layer: int, position: int, site: Site, tokens: Sequence[int]
    ) -> list[int]: ...
    def promoted(
        self, data: TraceData, layer: int, position: int, part: Part, k: int, frozen: bool
    ) -> tuple[list[TokenScore], list[TokenScore]]: ...
    def logit_contributions(
        self, data: TraceData, targets: Sequence[int], position: int
    ) -> dict[int, LogitContributions]: ...
    def token_id(self, target: Token) -> int: ...
    def token(self, index: int) -> str: ...
    def check_same_model(self, data: TraceData) -> None: ...


class Trace:
    """One prompt's attribution. Immutable; arrays are float32 on the host.

    `L` layers, `T` tokens, `H` heads. Negative positions count from the end.
    """

    def __init__(
        self,
        data: TraceData,
        details: Details | None = None,
        logits: Mapping[int, LogitContributions] | None = None,
    ) -> None:
        """logits: what `engine.trace(..., targets=)` attributed in passing, at the last position."""
        self._data = data
        self._details = details
        self._logits = dict(logits or {})

    # --- what is kept ------------------------------------------------------------------------------------

    @property
    def data(self) -> TraceData:
        """The host arrays themselves."""
        return self._data

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens as text."""
        return list(self._data.tokens)

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """[T]"""
        return self._data.input_ids

    @property
    def residual(self) -> Array:
        """[L, T]: share of resid_pre in resid_mid (parallel blocks: in resid_post)."""
        return self._data.residual

    @property
    def mlp(self) -> Array:
        """[L, T]: share of the MLP block, its bias included, in resid_post."""
        return self._data.mlp

    @property
    def bias(self) -> Array:
        """[L, T]: share of the attention sublayer's own bias in resid_mid."""
        return self._data.bias

    @property
    def rest(self) -> Array:
        """[L, T]: share of the attention edges that are not kept (contribution <= floor)."""
        return self._data.rest

    @property
    def opaque(self) -> Array:
        """[L, T]: share of sublayers that were not taken apart."""
        return self._data.opaque

    @property
    def certificate(self) -> Array:
        """[L, T]: no share of the attention's row is further than this from its exact value."""
        return self._data.certificate

    @property
    def meta(self) -> dict[str, Any]:
        """Model, settings, versions, closure errors: everything that decides the numbers."""
        return self._data.meta

    @property
    def whole_sublayers(self) -> list[dict[str, Any]]:
        """Sublayers that are one part: layer, sublayer, kind (mixer, opaque) and reason of each."""
        return list(self._data.meta.get("whole_sublayers", []))

    @property
    def cost(self) -> dict[str, Any]:
        """Seconds, bytes and backends of this run, as measured."""
        return self._data.cost

    @property
    def n_layers(self) -> int:
        """L"""
        return int(self._data.residual.shape[0])

    def next_tokens(self, position: int = -1, k: int = 10) -> list[Prediction]:
        """The k most probable next tokens after `position` (softmax of the model's logits), falling."""
        position = self._position(position)
        kept = self._data.predictions
        if not 1 <= k <= kept.token_id.shape[1]:
            raise InputError(
                "k is out of range", expected=f"1 to {kept.token_id.shape[1]} kept predictions", got=k
            )
        probability = np.exp(kept.logit[position, :k] - kept.logsumexp[position])
        names = self._data.meta["prediction_tokens"]
        return [
            Prediction(names[str(int(token))], int(token), float(p))
            for token, p in zip(kept.token_id[position, :k], probability, strict=True)
        ]

    def attention(self, layer: int) -> Array:
        """[T, T]: `[i, j]` is the contribution of source j to resid_mid[i], summed over heads.

        Kept edges only, 0 elsewhere.

        Residual not included: `attention(l).sum(-1) + rest[l] + residual[l] + bias[l] (+ opaque[l]) == 1`
        (0 where every proximity is 0; parallel blocks: `+ mlp[l]`).
        """
        edges, (first, last) = self._data.edges, self._span(layer)
        result = np.zeros((len(self._data.tokens),) * 2, np.float32)
        result[edges.destination[first:last], edges.source[first:last]] = edges.weight[first:last]
        return result

    def neurons(self, layer: int, position: int, k: int = 20) -> list[Neuron]:
        """The k neurons that contribute most to resid_post, exact and falling.

        With the model, the whole row is evaluated exactly, normaliser included; without it, up to the kept
        number is answered, within `neuron_certificate`.
        """
        layer, position = self._layer(layer), self._position(position)
        if self._details is not None and self._data.resid_pre is not None:
            return self._details.neurons(self._data, layer, position, k)
        kept = self._data.neurons
        if not 1 <= k <= kept.index.shape[2]:
            raise self._needs_model(f"neurons beyond the {kept.index.shape[2]} kept")
        rows = zip(
            kept.index[layer, position, :k],
            kept.contribution[layer, position, :k],
            kept.activation[layer, position, :k],
            strict=True,
        )
        return [Neuron(int(n), float(c), float(a)) for n, c, a in rows if n >= 0]

    @property
    def neuron_certificate(self) -> Array:
        """[L, T]: error bound of the kept neurons' shares (their normaliser is partly first order)."""
        return self._data.neurons.certificate

    # --- what needs the model ----------------------------------------------------------------------------

    def exact(self, layer: int, destinations: Sequence[int]) -> ExactRows:
        """Rows of a layer's attention evaluated without screening; every share is exact."""
        rows = [self._position(d) for d in destinations]
        return self._model("exact rows").exact_rows(self._data, self._layer(layer), rows)

    def heads(self, layer: int, *, source: int, destination: int) -> Array:
        """[H]: contribution of each head of the attention edge source -> destination.

        Exact with the model (sums to `exact`'s edge); without it the kept heads of a kept edge, 0 elsewhere.
        """
        layer, source, destination = self._layer(layer), self._position(source), self._position(destination)
        if self._details is not None and self._data.resid_pre is not None:
            return self._details.exact_rows(self._data, layer, [destination]).pairs[0, :, source]
        edges, (first, last) = self._data.edges, self._span(layer)
        at = np.flatnonzero(
            (edges.destination[first:last] == destination) & (edges.source[first:last] == source)
        )
        if not len(at):
            raise self._needs_model(f"heads of the edge {source} -> {destination}, which is not kept")
        span = slice(*edges.head_ptr[first + at[0] : first + at[0] + 2])
        result = np.zeros(int(self._data.meta["model"]["n_heads"]), np.float32)
        result[edges.head[span]] = edges.head_weight[span]
        return result

    def contribution_map(self, layer: int, head: int) -> Array:
        """[T, T]: exact contribution of one head from source j to resid_mid[i]."""
        return self._model("contribution maps").head_shares(self._data, self._layer(layer), self._head(head))

    def attention_map(self, layer: int, head: int) -> Array:
        """[T, T]: the head's attention pattern A."""
        return self._model("attention maps").attention_pattern(
            self._data, self._layer(layer), self._head(head)
        )

    def head_behaviour(self, layer: int, of: Of = "attention") -> list[HeadBehaviour]:
        """What each head of a layer does on this prompt, by the scores of `lmtt.lens.behaviour`.

        of: "attention" scores attention patterns, "contribution" what the heads write.
        """
        from lmtt.lens.behaviour import head_behaviours

        if of not in ("attention", "contribution"):
            raise InputError("unknown measure", expected="attention or contribution", got=repr(of))
        layer, details = self._layer(layer), self._model("head behaviour")
        weights = details.attention_pattern if of == "attention" else details.head_shares
        heads = int(self._data.meta["model"]["n_heads"])
        return head_behaviours(
            self._data.input_ids, layer, heads, lambda head: weights(self._data, layer, head), of
        )

    def head_pairs(self, layer: int, head: int, k: int = 5, tokens: int = 5) -> list[HeadPair]:
        """The k strongest source -> destination pairs of a head, with the `tokens` that each promotes."""
        from lmtt.lens.behaviour import HeadPair, strongest_pairs

        if k < 1:
            raise InputError("k is out of range", expected="at least 1", got=k)
        layer, head = self._layer(layer), self._head(head)
        details = self._model("head pairs")
        return [
            HeadPair(
                source,
                destination,
                share,
                details.promoted(self._data, layer, destination, ("head", head, source), tokens, True)[0],
            )
            for source, destination, share in strongest_pairs(self.contribution_map(layer, head), k)
        ]

    def neuron_positions(self, layer: int, neuron: int, k: int = 5) -> list[NeuronPosition]:
        """The k positions at which a neuron's activation is largest in magnitude, with its exact shares."""
        if k < 1:
            raise InputError("k is out of range", expected="at least 1", got=k)
        details = self._model("a neuron's positions")
        return details.neuron_positions(self._data, self._layer(layer), neuron, k)

    def lens(self, layer: int, position: int, site: Site = "post", k: int = 10) -> list[TokenLogit]:
        """Logit lens: the model's own final norm, head and softcap applied to the state at `site`."""
        if site not in ("pre", "mid", "post"):
            raise InputError("unknown site", expected="pre, mid or post", got=repr(site))
        layer, position = self._layer(layer), self._position(position)
        if site == "mid" and self._data.parallel[layer]:
            raise InputError(f"layer {layer} is a parallel block", expected="site pre or post", got="mid")
        return self._model("the logit lens").lens(self._data, layer, position, site, k)

    def lens_table(
        self,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        target: Token | None = None,
    ) -> LensTable:
        """The lens at the ends of layers: top token, its probability, entropy, and the target's rank.

        layers, positions: all if None. One product with the unembedding for each layer.
        """
        details = self._model("the logit lens")
        rows = range(self.n_layers) if layers is None else [self._layer(layer) for layer in layers]
        at = range(len(self._data.tokens)) if positions is None else [self._position(p) for p in positions]
        token = None if target is None else details.token_id(target)
        return details.lens_table(self._data, list(rows), list(at), token)

    def lens_ranks(self, layer: int, position: int, tokens: TokenList, site: Site = "post") -> list[int]:
        """Where each of `tokens` ranks in the lens at `site`, the most probable being 0."""
        if site not in ("pre", "mid", "post"):
            raise InputError("unknown site", expected="pre, mid or post", got=repr(site))
        details = self._model("the logit lens")
        layer, position = self._layer(layer), self._position(position)
        if site == "mid" and self._data.parallel[layer]:
            raise InputError(f"layer {layer} is a parallel block", expected="site pre or post", got="mid")
        return details.lens_ranks(self._data, layer, position, site, self._token_ids(tokens))

    def promoted(
        self, layer: int, position: int, part: Part, k: int = 10, norm: Literal["frozen"] | None = "frozen"
    ) -> tuple[list[TokenScore], list[TokenScore]]:
        """Tokens that an update promotes and suppresses most: (promoted, suppressed), strongest first.

        part is "attention", "mlp", ("head", h), ("head", h, source) or ("neuron", n). With norm="frozen" the
        final norm is linearised at that position's final state, so that scores are logit contributions;
        norm=None scores the raw update.
        """
        if norm not in ("frozen", None):
            raise InputError("unknown norm", expected="'frozen' or None", got=repr(norm))
        layer, position = self._layer(layer), self._position(position)
        details = self._model("promoted tokens")
        return details.promoted(self._data, layer, position, self._part(part), k, norm == "frozen")

    @overload
    def logit_contributions(
        self, target: Token, foil: Token | None = None, position: int = -1
    ) -> LogitContributions: ...
    @overload
    def logit_contributions(
        self, target: TokenList, foil: Token | TokenList | None = None, position: int = -1
    ) -> list[LogitContributions]: ...

    def logit_contributions(
        self, target: Token | TokenList, foil: Token | TokenList | None = None, position: int = -1
    ) -> LogitContributions | list[LogitContributions]:
        """The logit of `target` as next token after `position`, split over all parts that add up to it.

        With a `foil`, logit(target) - logit(foil). Tokens are ids, or texts that are exactly one token (a
        leading blank counts). A list of targets gives a list, in one pass over the layers; its foil is one
        for all, or a list as long. The final norm is frozen at the position's final state; with a softcap the
        parts add up to the logit before it.

        Raises
        ------
        InputError
            A text that is not one token, an id outside the vocabulary, a position outside the prompt.
        ModelNeededError
            The trace has no model and was not traced with these `targets`.
        """
        many = not isinstance(target, (int, np.integer, str))
        targets = self._token_ids(target)
        foils: list[int] | list[None] = [None] * len(targets) if foil is None else self._token_ids(foil)
        if isinstance(foil, (int, np.integer, str)):
            foils = foils * len(targets)
        if len(foils) != len(targets):
            raise InputError(
                "foils do not match targets",
                expected=f"one foil, or {len(targets)} of them",
                got=len(foils),
            )
        position = self._position(position)
        wanted = dict.fromkeys([*targets, *(f for f in foils if f is not None)])
        parts = self._logits if position == len(self._data.tokens) - 1 else {}
        if any(token not in parts for token in wanted):
            details = self._model("logit contributions of tokens that were not targets of the trace")
            parts = details.logit_contributions(self._data, list(wanted), position)
        results = [
            parts[t] if f is None else parts[t].minus(parts[f]) for t, f in zip(targets, foils, strict=True)
        ]
        return results if many else results[0]

    # --- groups of tokens ---------------------------------------------------------------------------------

    def tokens_by(self, unit: Unit = "word") -> list[Span]:
        """The prompt's tokens, words, sentences or chat turns, with their places in its text."""
        from lmtt.spans import spans_of

        return spans_of(self._data, unit)

    def rollout(
        self,
        position: int = -1,
        by: Unit = "token",
        target: Token | None = None,
        foil: Token | None = None,
    ) -> SpanShares:
        """What each token, word, sentence or turn accounts for of `position`, along all kept edges.

        shares.sum() + bias + unattributed == 1 (see `lmtt.graph.rollout`). With a `target`, `direct` says
        beside it what went from there to the target's logit (minus the foil's) in one step: written by heads
        of all layers, and at `position` itself by the embedding.
        """
        from lmtt.graph.rollout import rollout
        from lmtt.spans import SpanShares, spans_of, summed

        position, spans = self._position(position), spans_of(self._data, by)
        if target is None and foil is not None:
            raise InputError("a foil without a target", remedy="name the target")
        direct = None
        if target is not None:
            written = self.logit_contributions(target, foil, position)
            by_token = written.heads.sum((0, 1), dtype=np.float64)
            by_token[position] += written.embed
            direct = summed(by_token, spans)
        found = rollout(self._data, position)
        return SpanShares(tuple(spans), summed(found.tokens, spans), found.bias, found.unattributed, direct)

    @property
    def has_model(self) -> bool:
        """Whether what is not kept can be computed: a model is attached and the residual stream is kept."""
        return self._details is not None and self._data.resid_pre is not None

    def attach(self, engine: Details) -> Trace:
        """The same trace with a model to compute details from; a different checkpoint raises."""
        engine.check_same_model(self._data)
        return Trace(self._data, engine, self._logits)

    # --- routes and storage ------------------------------------------------------------------------------

    def route(self, position: int = -1, threshold: float = 0.04, renormalize: bool = False) -> Route:
        """The route by which information reached `position`: edges above `threshold`, found top-down."""
        from lmtt.graph.routes import route

        return route(self._data, position=position, threshold=threshold, renormalize=renormalize)

    def save(self, path: str | PathLike[str], force: bool = False) -> None:
        """Store the trace: a directory, or one file if the name ends in `.lmtt`. Never overwrites unasked."""
        from lmtt.run import writer

        if str(path).endswith(".lmtt"):
            writer.write_packed(path, self._data, force=force)
        else:
            writer.write_run(path, self._data, force=force)

    # --- display -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        name = self._data.meta.get("model", {}).get("name", "?")
        text = visible("".join(self._data.tokens))
        text = text if len(text) <= 60 else text[:57] + "..."
        edges = len(self._data.edges.weight)
        return (
            f"Trace({name}, {len(self._data.tokens)} tokens, {self.n_layers} layers, {edges} edges: {text!r})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(visible(p.token))}</td><td>{p.probability:.3f}</td></tr>"
            for p in self.next_tokens(k=min(5, self._data.predictions.token_id.shape[1]))
        )
        head = "<tr><th>next token</th><th>p</th></tr>"
        return f"<p><code>{html.escape(repr(self))}</code></p><table>{head}{rows}</table>"

    # --- arguments ---------------------------------------------------------------------------------------

    def _position(self, position: int) -> int:
        T = len(self._data.tokens)
        if not isinstance(position, (int, np.integer)) or not -T <= position < T:
            raise InputError("position is out of range", expected=f"{-T} to {T - 1}", got=position)
        return int(position) % T

    def _layer(self, layer: int) -> int:
        L = self.n_layers
        if not isinstance(layer, (int, np.integer)) or not -L <= layer < L:
            raise InputError("layer is out of range", expected=f"{-L} to {L - 1}", got=layer)
        return int(layer) % L

    def _head(self, head: int) -> int:
        H = int(self._data.meta["model"]["n_heads"])
        if not isinstance(head, (int, np.integer)) or not 0 <= head < H:
            raise InputError("head is out of range", expected=f"0 to {H - 1}", got=head)
        return int(head)

    def _token_ids(self, tokens: Token | TokenList) -> list[int]:
        if self._details is None:
            raise self._needs_model("logit contributions")
        if isinstance(tokens, (int, np.integer, str)):
            return [self._details.token_id(tokens)]
        if not isinstance(tokens, Iterable):
            raise InputError("unknown token", expected="an id, a text, or a list of them", got=repr(tokens))
        return [self._details.token_id(token) for token in tokens]

    def _span(self, layer: int) -> tuple[int, int]:
        layer = self._layer(layer)
        return int(self._data.edges.layer_ptr[layer]), int(self._data.edges.layer_ptr[layer + 1])

    def _part(self, part: Part) -> Part:
        match part:
            case "attention" | "mlp":
                return part
            case ("head", int(head)):
                return ("head", self._head(head))
            case ("head", int(head), int(source)):
                return ("head", self._head(head), self._position(source))
            case ("neuron", int(neuron)) if neuron >= 0:
                return ("neuron", neuron)
        raise InputError(
            "unknown part",
            expected='"attention", "mlp", ("head", h), ("head", h, source) or ("neuron", n)',
            got=repr(part),
        )

    def _model(self, what: str) -> Details:
        if self._details is None or self._data.resid_pre is None:
            raise self._needs_model(what)
        return self._details

    def _needs_model(self, what: str) -> ModelNeededError:
        name = self._data.meta.get("model", {}).get("name", "the model")
        if self._data.resid_pre is None:
            return ModelNeededError(
                f"{what} cannot be computed: this trace was kept light", remedy="trace again with keep='full'"
            )
        return ModelNeededError(
            f"{what} cannot be computed without the model",
            remedy=f"attach it: trace.attach(lmtt.load(...)) with {name}",
        )
