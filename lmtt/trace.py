"""A trace: what one prompt's run was made of.

What is kept is host arrays (`lmtt.run.data.TraceData`); what is not is computed when asked, from the kept
residual stream and the weights of the layer in question, and equals what a pass without screening gives.
A trace opened from a file answers from what is kept, and says so when it needs the model.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lmtt.errors import InputError, ModelNeededError
from lmtt.graph.text import visible

if TYPE_CHECKING:
    from lmtt.graph.routes import Route
    from lmtt.run.data import TraceData

Array = NDArray[np.float32]
Site = Literal["pre", "mid", "post"]
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
    def lens(self, data: TraceData, layer: int, position: int, site: Site, k: int) -> list[TokenLogit]: ...
    def promoted(
        self, data: TraceData, layer: int, position: int, part: Part, k: int, frozen: bool
    ) -> tuple[list[TokenScore], list[TokenScore]]: ...
    def token(self, index: int) -> str: ...
    def check_same_model(self, data: TraceData) -> None: ...


class Trace:
    """One prompt's attribution. Immutable; arrays are float32 on the host.

    `L` layers, `T` tokens, `H` heads. Negative positions count from the end.
    """

    def __init__(self, data: TraceData, details: Details | None = None) -> None:
        self._data = data
        self._details = details

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

    def lens(self, layer: int, position: int, site: Site = "post", k: int = 10) -> list[TokenLogit]:
        """Logit lens: the model's own final norm, head and softcap applied to the state at `site`."""
        if site not in ("pre", "mid", "post"):
            raise InputError("unknown site", expected="pre, mid or post", got=repr(site))
        layer, position = self._layer(layer), self._position(position)
        if site == "mid" and self._data.parallel[layer]:
            raise InputError(f"layer {layer} is a parallel block", expected="site pre or post", got="mid")
        return self._model("the logit lens").lens(self._data, layer, position, site, k)

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

    def attach(self, engine: Details) -> Trace:
        """The same trace with a model to compute details from; a different checkpoint raises."""
        engine.check_same_model(self._data)
        return Trace(self._data, engine)

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
