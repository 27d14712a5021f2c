"""The loop: a prompt goes through the model layer by layer, and each layer leaves its contributions behind.

1. A dry run of the model's own forward records what every layer is given besides the hidden state.
2. Each layer runs once more by itself and is captured; its parts are proved to add up; kernels turn them
   into shares; what is kept goes to the host, the rest is freed.
3. The model's own norm and head turn the final state into predictions.
4. Everything kept is a `Trace`; details are computed from it when asked, one layer at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from lmtt import __version__
from lmtt.checkpoint.load import Loaded, fingerprint_weights, parse_device, parse_dtype, resolve
from lmtt.checkpoint.load import load as load_all
from lmtt.checkpoint.placed import (
    DeviceMap,
    is_placed,
    main_device,
    named_weights,
    parse_device_map,
    run_device,
)
from lmtt.contributions import Block, Settings, as_block, attention_task, layer_shares, neuron_task
from lmtt.errors import BackendError, CheckpointError, InputError, StructureError
from lmtt.kernels import registry, stages
from lmtt.kernels.directional_attention.reference import attention_pattern
from lmtt.kernels.host_memory import Spare
from lmtt.kernels.numerics import checksum_tolerance
from lmtt.kernels.proximity.reference import pair_shares
from lmtt.kernels.types import Choice
from lmtt.lens.behaviour import NeuronPosition
from lmtt.lens.head import Head, find_head, raw_scores
from lmtt.lens.logit_attribution import LogitAttribution, LogitContributions
from lmtt.lens.table import LensTable, lens_row, ranks
from lmtt.loop import EVERY_RUN, Log, Prompt, Running, cost_of, from_host, stream_room, to_host
from lmtt.profile.clock import Clock
from lmtt.profile.planning import planned_cost
from lmtt.run.data import Predictions, TraceData
from lmtt.run.layout import Tail, assemble
from lmtt.run.preflight import expected_bytes
from lmtt.run.reader import read_run
from lmtt.run.writer import RunWriter
from lmtt.spans import PromptText, Turn, chat_turns, from_decoding, from_offsets
from lmtt.streaming.load import read_within
from lmtt.streaming.meter import Meter
from lmtt.streaming.placed import PlacedWeights
from lmtt.streaming.plan import PREDICTION_WORKSPACE, parse_bytes
from lmtt.streaming.weights import LayerWeights, ResidentWeights
from lmtt.streaming.weights import Turn as LayerTurn
from lmtt.structure.attention_hook import watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.opaque import admit, whole_sublayers
from lmtt.structure.replay import LayerCall, LayerCalls, dry_run, final, find_layers, finish
from lmtt.structure.spec import AttentionWrite, CapturedLayer, LayerStructure, MlpWrite
from lmtt.structure.verify import Closure, check_closure, proof_rows
from lmtt.trace import ExactRows, Neuron, Part, Site, Token, TokenList, TokenLogit, TokenScore, Trace

if TYPE_CHECKING:
    from lmtt.generate import Generation

KEPT_PREDICTIONS = 32
PROOF_TOKENS = 7
REMEMBERED_LAYERS = 2  # captured layers held for further questions about them
REMEMBERED_PROMPTS = 4  # dry runs held likewise: arguments of the layers, no activations
Progress = Callable[[int, int], None]
Out = str | PathLike[str]


@dataclass(frozen=True)
class Info:
    """Dimensions of a model, in the names of the field."""

    name: str
    model_type: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    max_positions: int | None
    dtype: str
    device: str


@dataclass(frozen=True)
class ProvedLayer:
    """A layer's structure with the closure errors of a run through it."""

    structure: LayerStructure
    closures: tuple[Closure, ...]

    def error(self, sublayer: str) -> float:
        """The largest relative error of a sublayer or sum by that name; 0 where there is none."""
        return max((c.error for c in self.closures if c.sublayer == sublayer), default=0.0)


@dataclass(frozen=True)
class Job:
    """What is asked of one pass over the layers, for every prompt alike."""

    settings: Settings
    full: bool  # the residual stream is kept
    targets: tuple[int, ...]  # tokens whose logits are attributed on the way
    progress: Progress | None


class Engine:
    """A model, ready to be traced. The model itself is left exactly as it was found."""

    def __init__(
        self,
        loaded: Loaded,
        backend: str = "auto",
        opaque: bool = False,
        weights: LayerWeights | None = None,
        read: Callable[..., tuple[Loaded, LayerWeights]] | None = None,
    ) -> None:
        """read: reads the model anew, with `may_stay=False` layer by layer, where memory is limited."""
        check_backend(backend)
        self._backend = backend
        self._opaque = opaque  # let in what is not understood, as one part
        self.tokenizer = loaded.tokenizer
        self._facts = loaded.facts
        self._structures: dict[Any, LayerStructure] = {}
        self._captured: OrderedDict[tuple[bytes, int], CapturedLayer] = OrderedDict()
        self._calls: OrderedDict[bytes, LayerCalls] = OrderedDict()
        self._hold(loaded, weights)
        self._read = read if isinstance(weights, ResidentWeights) else None
        self._spare = Spare() if self._weights.meter.limit is None else None

    def _hold(self, loaded: Loaded, weights: LayerWeights | None) -> None:
        """The model, of which nothing is known yet."""
        self.model = loaded.model
        _, self._layers = find_layers(self.model)
        self._proved = False  # the full closure check runs on the first prompt
        self._head: Head | None = None
        self.info = _info(loaded, self._layers)
        if weights is None:
            meter = Meter(torch.device(self.info.device))
            weights = PlacedWeights(meter, self.model) if is_placed(self.model) else ResidentWeights(meter)
        self._weights: LayerWeights = weights

    def __repr__(self) -> str:
        i = self.info
        size = f"{i.n_layers} layers, {i.n_heads} heads, d_model {i.d_model}"
        return f"Engine({i.name}: {size}, {i.dtype} on {i.device})"

    @property
    def resident(self) -> bool:
        """All weights are in memory all along; otherwise each layer's are read when its turn comes."""
        return self._weights.resident

    @property
    def proved(self) -> bool:
        """A first prompt has gone through, with every sublayer's parts added up."""
        return self._proved

    # --- tracing ---

    @overload
    def trace(self, prompt: str | None = None, **options: Any) -> Trace: ...
    @overload
    def trace(self, prompt: list[str] | tuple[str, ...], **options: Any) -> list[Trace]: ...

    def trace(  # type: ignore[misc] # the overloads say what comes back; the options are spelt out once, here
        self,
        prompt: str | list[str] | tuple[str, ...] | None = None,
        *,
        input_ids: Sequence[int] | Tensor | NDArray[Any] | None = None,
        attention_mask: Sequence[int] | Tensor | NDArray[Any] | None = None,
        chat: Sequence[dict[str, str]] | None = None,
        add_special_tokens: bool | None = None,
        floor: float = 1e-3,
        screen: float | None = None,
        measure: Literal["l1", "l2"] = "l1",
        keep: Literal["full", "light"] = "full",
        neurons: int = 20,
        targets: TokenList = (),
        out: Out | Sequence[Out] | None = None,
        resume: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Trace | list[Trace]:
        """Attribute a prompt; a list of prompts gives a list of traces, each as if it were alone.

        Prompts of a list go through the layers together, so that weights that are streamed are read once.

        Parameters
        ----------
        prompt : text. In its place, `input_ids` (taken verbatim) or `chat` (a list of {role, content}).
        attention_mask : with input_ids, 0 where they are padding, which is stripped before anything runs;
            both may be [B, T], which gives a list of traces.
        add_special_tokens : None leaves it to the tokenizer.
        floor : edges and heads with contribution <= floor are not kept, in [0, 1).
        screen : (head, source) pairs whose bound is <= screen * |whole| keep their first-order value, within
            `Trace.certificate`. None: floor / 10 for attention (0 if floor is 0), floor for neurons.
        measure : "l1" or "l2", the norm of proximities.
        keep : "light" leaves the residual stream out of the trace, and with it every detail on demand.
        neurons : how many top neurons to keep of each row.
        targets : tokens whose logits at the last position are attributed in the same pass, so that
            `Trace.logit_contributions` has them at once; any other token costs it a second pass, and so do
            all of a run that is resumed after its first layer.
        out : a directory for the run (a list of them for a list of prompts), committed layer by layer, so
            that what a killed process did is not lost.
        resume : go on with what `out` holds; the result is the same, byte for byte.
        force : replace what `out` holds.
        progress : called with (layers done, layers in all).

        Raises
        ------
        InputError
            An empty or over-long prompt, or an argument out of range.
        ClosureError
            A layer's parts do not add up; the message names layer, sublayer and error.
        """
        if isinstance(targets, str):
            raise InputError("targets is a text", expected="a list of tokens", got=repr(targets))
        if keep not in ("full", "light"):
            raise InputError("unknown keep", expected="'full' or 'light'", got=repr(keep))
        settings = _settings(floor, screen, measure, neurons, self._backend)
        prompts, single = self._prompts(prompt, input_ids, attention_mask, chat, add_special_tokens)
        self._make_room([len(each.tokens) for each in prompts], full=keep == "full")
        outs = _outs(out, len(prompts), single, resume, force)
        wanted = tuple(dict.fromkeys(self.token_id(target) for target in targets))
        job = Job(settings, keep == "full", wanted, progress)
        with ExitStack() as stack:
            writers = [
                None if path is None else stack.enter_context(self._writer(path, each, job, resume, force))
                for path, each in zip(outs, prompts, strict=True)
            ]
            traces = self._trace(prompts, job, writers)
        return traces[0] if single else traces

    def _prompts(
        self, prompt: Any, input_ids: Any, attention_mask: Any, chat: Any, add_special_tokens: bool | None
    ) -> tuple[list[Prompt], bool]:
        """What is to be traced, and whether it is one prompt rather than a list."""
        if isinstance(prompt, (list, tuple)):
            if input_ids is not None or chat is not None:
                raise InputError("a list of prompts excludes input_ids and chat")
            return [self._encode(p, None, None, add_special_tokens) for p in prompt], False
        if input_ids is not None:
            rows = _unpadded(input_ids, attention_mask)
            if len(rows) != 1:
                return [self._encode(None, row, None, None) for row in rows], False
            input_ids = rows[0]
        elif attention_mask is not None:
            raise InputError("attention_mask is given without input_ids")
        assert prompt is None or isinstance(prompt, str)
        return [self._encode(prompt, input_ids, chat, add_special_tokens)], True

    def generate(
        self,
        prompt: str | None = None,
        *,
        input_ids: Sequence[int] | Tensor | NDArray[Any] | None = None,
        chat: Sequence[Turn] | None = None,
        add_special_tokens: bool | None = None,
        max_new_tokens: int = 32,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        trace: bool = True,
        floor: float = 1e-3,
        screen: float | None = None,
        measure: Literal["l1", "l2"] = "l1",
        keep: Literal["full", "light"] = "full",
        neurons: int = 20,
        progress: Progress | None = None,
    ) -> Generation:
        """Let the model go on, and attribute every token it generates to prompt and earlier output.

        Where the model is streamed, each token it generates reads all of the layers once more.

        Parameters
        ----------
        prompt, input_ids, chat, add_special_tokens : as for `trace`, one prompt.
        max_new_tokens : at most so many; an end-of-sequence token ends the output earlier.
        do_sample, temperature, top_k, top_p, seed : greedy unless do_sample; equal seeds give equal output.
        trace : False generates only.
        floor, screen, measure, keep, neurons, progress : of the one trace of prompt and output.

        Raises InputError for an argument out of range, or more tokens than the model has positions.
        """
        from lmtt.generate import Generation, Sampling, generate_ids

        settings = _settings(floor, screen, measure, neurons, self._backend)
        if keep not in ("full", "light"):
            raise InputError("unknown keep", expected="'full' or 'light'", got=repr(keep))
        how = Sampling(max_new_tokens, do_sample, temperature, top_k, top_p, seed)
        how.check()
        asked = self._encode(prompt, input_ids, chat, add_special_tokens)
        P, limit = len(asked.tokens), self.info.max_positions
        if limit is not None and P + max_new_tokens > limit:
            raise InputError(
                "prompt and output are too long for the model",
                expected=f"at most {limit} tokens",
                got=f"{P} + {max_new_tokens}",
            )
        self._make_room([P + max_new_tokens], full=keep == "full")
        with self._weights.generating(P + max_new_tokens):
            new = generate_ids(self.model, asked.input_ids, how)
        whole = self._prompt(torch.cat([asked.input_ids[0].cpu(), torch.tensor(new)]), None)
        if asked.text is not None and whole.text is not None:
            whole = replace(whole, text=replace(whole.text, turns=asked.text.turns))
        traced = None
        if trace:
            traced = self._trace([whole], Job(settings, keep == "full", (), progress), [None])[0]
        text = "".join(whole.tokens[P:]) if self.tokenizer is None else self._decode(new)
        return Generation(P, np.array(new), whole.tokens[P:], text, traced)

    def _trace(self, prompts: Sequence[Prompt], job: Job, writers: Sequence[RunWriter | None]) -> list[Trace]:
        """All prompts together, layer by layer; one whose run is stored already is read."""
        finished = {
            n: Trace(read_run(writer.path), self)
            for n, writer in enumerate(writers)
            if writer is not None and writer.complete
        }
        left = [n for n in range(len(prompts)) if n not in finished]
        if left:
            fresh = self._pass([prompts[n] for n in left], job, [writers[n] for n in left])
            finished |= dict(zip(left, fresh, strict=True))
        return [finished[n] for n in range(len(prompts))]

    def _make_room(self, tokens: Sequence[int], *, full: bool) -> None:
        """Where the limit holds such prompts only without the weights, read those by layers from now on."""
        if self._read is None:
            return
        assert isinstance(self._weights, ResidentWeights)
        if self._weights.leaves_room(tokens, full=full):
            return
        del self.model, self._layers, self._head  # what is read takes their place
        self._structures.clear()
        self._captured.clear()
        self._calls.clear()
        meter = self._weights.meter
        with meter.loading():
            loaded, weights = self._read(may_stay=False)
            meter.loaded(weights.held)
        self._hold(loaded, weights)
        self._read = None

    def _pass(self, prompts: Sequence[Prompt], job: Job, writers: Sequence[RunWriter | None]) -> list[Trace]:
        lengths = [len(prompt.tokens) for prompt in prompts]
        settings = replace(job.settings, workspace=self._weights.workspace(lengths, full=job.full))
        self._captured.clear()  # room for what comes
        with (
            self._weights.meter.running(self._weights.held),
            Clock(self.info.device, self._weights.traffic) as clock,
            watching(self.model),
            torch.no_grad(),
        ):
            runs = [self._start(prompt, job, writer) for prompt, writer in zip(prompts, writers, strict=True)]
            first = _resume(runs)
            if job.targets and first == 0:  # layers that are stored already are not run again
                for run in runs:
                    last = len(run.prompt.tokens) - 1
                    run.logits = self._logits(job.targets, last, run.hidden[0])
            planned = planned_cost(
                self.model, self._weights, lengths, full=job.full, first=not self._proved,
                stored=any(writer is not None for writer in writers),
            )  # fmt: skip
            clock.begin("read")
            count = len(self._layers)
            with self._weights.reading(range(first, count), lengths, full=job.full) as turn:
                for index in range(first, count):
                    clock.begin("decode", index)
                    with turn(index):
                        clock.arrived()
                        for number, run in enumerate(runs):
                            self._layer(run, index, settings, clock, number)
                        clock.begin("decode", index)
                    if job.progress is not None:
                        job.progress(index + 1, count)
            clock.arrived()
            self._proved = True
            return [self._finish(run, job, settings, clock, len(runs), planned) for run in runs]

    def _start(self, prompt: Prompt, job: Job, writer: RunWriter | None) -> Running:
        calls = self._dry_run(prompt.input_ids)
        hidden = calls.hidden
        stream = stream_room(len(self._layers), hidden[0], self._spare) if job.full else None
        return Running(prompt, calls, hidden, stream, writer=writer)

    def _layer(self, run: Running, index: int, settings: Settings, clock: Clock, number: int) -> None:
        """One prompt, `number` of those that go together, through one layer, which has its weights."""
        layer, given, log = self._layers[index], run.hidden, Log()
        clock.begin("discovery", index, number)
        given, call = self._given(index, given, run.calls)
        structure = self._structure(index, layer, given, call)
        clock.begin("forward", index, number)
        run.hidden, captured = capture_layer(layer, structure, index, given, call.args, call.kwargs)
        log.whole += whole_sublayers(captured)
        clock.begin("closure", index, number)
        rows = proof_rows(given.shape[1])
        for closure in check_closure(captured, full=not self._proved, rows=rows):
            log.closed(closure.sublayer, closure.error)
        # What a stream does is not over when a kernel returns: its steps are told apart on the CPU only.
        clock.begin("contributions" if clock.cuda else "reduction", index, number)
        with stages.listening() as steps:
            shares = layer_shares(captured, settings)
        clock.inner(steps)
        log.add(index, shares, checksum_tolerance(given.dtype))
        clock.count(tokens=given.shape[1], edges=len(shares.arrays["edge_weight"]), **log.sums())
        if run.logits is not None:
            clock.begin("lens", index, number)
            run.logits.add(captured)
        run.done(index, shares.arrays, as_block(captured).post is None, log, given, clock)

    def _finish(
        self,
        run: Running,
        job: Job,
        settings: Settings,
        clock: Clock,
        together: int,
        planned: dict[str, Any],
    ) -> Trace:
        """Predictions, and everything that a trace has once."""
        prompt = run.prompt
        clock.begin("transfer")
        if run.stream is not None:
            run.stream[-1] = to_host(run.hidden[0])
        clock.begin("lens")
        predictions, choice = self._predict(prompt.input_ids, run.hidden, run.calls)
        run.log.choices[choice.op] = choice
        run.log.notices += [f"{choice.op}: {note}" for note in choice.notes]
        self._weights.meter.mark("predictions")
        tail = Tail(
            tokens=prompt.tokens,
            input_ids=prompt.input_ids[0].cpu().numpy(),
            parallel=np.array(run.parallel),
            predictions=predictions,
            resid_final=None,  # it is the last of the stream
        )
        meta = self._meta(settings, job.full, predictions, run.log)
        if prompt.text is not None:
            meta["prompt"] = prompt.text.to_meta()
        measured = self._weights.meter.to_json()
        cost = {**cost_of(clock, run.log, together), "plan": planned, "measured": measured}
        if run.writer is not None:
            clock.begin("store")
            run.writer.finish(tail, meta, cost)
            meta = {**meta, "manifest": run.writer.manifest}
        logits = None
        if run.logits is not None:
            clock.begin("lens")
            names = [self.token(target) for target in job.targets]
            logits = run.logits.finish(run.hidden[0, -1], prompt.tokens, names)
        clock.begin("transfer")
        return Trace(assemble(run.layers, tail, meta, cost, resid_pre=run.stream), self, logits)

    def _writer(self, path: Out, prompt: Prompt, job: Job, resume: bool, force: bool) -> RunWriter:
        """The run's directory, locked, before anything is computed."""
        T, L = len(prompt.tokens), len(self._layers)
        settings = replace(job.settings, workspace=self._weights.workspace([T], full=job.full))
        itemsize = parse_dtype(self.info.dtype, self._device()).itemsize  # type: ignore[union-attr] # no "auto"
        return RunWriter(
            path,
            {
                "layers": L,
                "keep": "full" if job.full else "light",
                "resid_dtype": self.info.dtype,
                "model": self._facts,
                "device": self.info.device.split(":")[0],
                "input_ids": prompt.input_ids[0].tolist(),
                "settings": {
                    "floor": settings.floor,
                    "screen": settings.attention_screen,
                    "neuron_screen": settings.neuron_screen,
                    "measure": settings.measure,
                    "neurons": settings.neurons,
                    "backend": settings.backend,
                    "workspace": settings.workspace,
                    "opaque": self._opaque,
                },
                "versions": _versions(),
            },
            resume=resume,
            force=force,
            expected_bytes=expected_bytes(
                L, T, self.info.d_model, itemsize, full=job.full, neurons=settings.neurons
            ),
        )

    def _predict(self, ids: Tensor, hidden: Tensor, calls: LayerCalls) -> tuple[Predictions, Choice]:
        head = self._find_head()
        states = final(self.model, ids, hidden, calls)[0]
        k = min(KEPT_PREDICTIONS, head.weight.shape[0])
        with self._weights.at_hand(head.unembed):
            options: dict[str, Any] = {"softcap": head.softcap, "bias": head.bias, "scale": head.logit_scale}
            states = states.to(head.rows.device)
            top, choice = registry.run(
                "unembed_topk", states, head.rows, k, workspace=PREDICTION_WORKSPACE, **options
            )
        return Predictions(
            top.indices.cpu().numpy().astype(np.int32),
            top.values.cpu().numpy().astype(np.float32),
            top.logsumexp.cpu().numpy().astype(np.float32),
        ), choice

    def _meta(self, settings: Settings, full: bool, predictions: Predictions, log: Log) -> dict[str, Any]:
        """Everything that decides the numbers, and nothing that was measured by a clock."""
        ids = np.unique(predictions.token_id)
        return {
            "model": {**self._facts, **{k: v for k, v in asdict(self.info).items() if k != "device"}},
            "device": self.info.device.split(":")[0],
            "floor": settings.floor,
            "screen": settings.attention_screen,
            "neuron_screen": settings.neuron_screen,
            "measure": settings.measure,
            "dtype": self.info.dtype,
            "resid_dtype": self.info.dtype,
            "keep": "full" if full else "light",
            "backends": {
                op: {"name": c.backend, "reason": c.reason} for op, c in sorted(log.choices.items())
            },
            **({"whole_sublayers": log.whole} if log.whole else {}),
            "closure": {**{sum_: log.closure.get(sum_, 0.0) for sum_ in EVERY_RUN}, "checksum": log.checksum},
            "versions": _versions(),
            "prediction_tokens": {str(int(i)): self.token(int(i)) for i in ids},
        }

    # --- prompts ---

    def token(self, index: int) -> str:
        """A token id as text."""
        if self.tokenizer is None:
            return f"<{index}>"
        return self._decode([index])

    def token_id(self, target: Token) -> int:
        """The id of a token given as id, or as a text that the tokenizer makes exactly one token of."""
        if isinstance(target, str):
            if self.tokenizer is None:
                raise InputError(f"{self.info.name} has no tokenizer", remedy="name tokens by their ids")
            ids = list(self.tokenizer(target, add_special_tokens=False).input_ids)
            if len(ids) != 1:
                raise InputError(
                    f"{target!r} is not one token",
                    expected="a text that is exactly one",
                    got=[self.token(i) for i in ids],
                )
            return int(ids[0])
        rows = self._find_head().weight.shape[0]
        if isinstance(target, bool) or not isinstance(target, (int, np.integer)) or not 0 <= target < rows:
            raise InputError(
                "unknown token", expected=f"a text or an id from 0 to {rows - 1}", got=repr(target)
            )
        return int(target)

    def _encode(
        self,
        prompt: str | None,
        input_ids: Sequence[int] | Tensor | NDArray[Any] | None,
        chat: Sequence[dict[str, str]] | None,
        add_special_tokens: bool | None,
    ) -> Prompt:
        if sum(given is not None for given in (prompt, input_ids, chat)) != 1:
            raise InputError("no prompt, or more than one", expected="one of prompt, input_ids and chat")
        text: PromptText | None = None
        if input_ids is not None:
            ids = torch.as_tensor(np.asarray(input_ids)).flatten()
            if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool):
                raise InputError("input_ids are not integers", got=ids.dtype)
        else:
            tokenised, text = self._tokenise(prompt, chat, add_special_tokens)
            ids = torch.tensor(tokenised)
        ids = ids.long()
        if not len(ids):
            raise InputError("the prompt is empty", expected="at least one token")
        limit = self.info.max_positions
        if limit is not None and len(ids) > limit:
            raise InputError(
                "the prompt is too long for the model", expected=f"at most {limit} tokens", got=len(ids)
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.info.d_vocab:
            raise InputError(
                "a token id is outside the vocabulary", expected=f"0 to {self.info.d_vocab - 1}",
                got=int(ids.min() if int(ids.min()) < 0 else ids.max()),
            )  # fmt: skip
        return self._prompt(ids, text)

    def _prompt(self, ids: Tensor, text: PromptText | None) -> Prompt:
        """ids [T]; where they lie in the text is found by decoding if it is not known."""
        listed = ids.tolist()
        if text is None and self.tokenizer is not None:
            text = from_decoding(listed, self._decode)
        return Prompt(ids[None].to(self._device()), tuple(self.token(i) for i in listed), text)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _tokenise(
        self, prompt: str | None, chat: Sequence[Turn] | None, add_special_tokens: bool | None
    ) -> tuple[list[int], PromptText | None]:
        if self.tokenizer is None:
            raise InputError(
                f"{self.info.name} has no tokenizer", remedy="pass input_ids, or tokenizer= to lmtt.load"
            )
        options: dict[str, Any] = {}
        turns: tuple[tuple[str, int], ...] = ()
        if chat is not None:
            text = self._render(chat)
            turns = chat_turns(text, chat, self._rendered)
            options["add_special_tokens"] = False
        else:
            assert prompt is not None
            text = prompt
            if add_special_tokens is not None:
                options["add_special_tokens"] = add_special_tokens
        if self.tokenizer.is_fast:
            options["return_offsets_mapping"] = True
        try:
            encoded = self.tokenizer(text, **options)
        except UnicodeError:
            raise InputError(
                "the prompt is not valid Unicode", expected="text without lone surrogates"
            ) from None
        ids = [int(i) for i in encoded.input_ids]
        if self.tokenizer.is_fast:
            return ids, from_offsets(text, encoded["offset_mapping"], turns)
        decoded = from_decoding(ids, self._decode)
        return ids, decoded.with_turns(turns) if decoded.text == text else decoded

    def _render(self, chat: Sequence[Turn]) -> str:
        """The chat as the model's template writes it: ready for the answer, or in the middle of it."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"{self.info.name} has no chat template", remedy="pass the prompt as text")
        if not chat:
            raise InputError("the chat is empty", expected="at least one turn")
        last = chat[-1]["role"] == "assistant"
        return str(
            self.tokenizer.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=not last, continue_final_message=last
            )
        )

    def _rendered(self, chat: list[Turn]) -> str | None:
        """Some turns of a chat by themselves, None where the template refuses them."""
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, TypeError, ValueError):
            return None

    # --- what every part of the loop needs of the model ---

    def _device(self) -> torch.device:
        return run_device(self.model.get_input_embeddings())

    def _dry_run(self, ids: Tensor) -> LayerCalls:
        key = ids.cpu().numpy().tobytes()
        if key not in self._calls:
            with self._weights.at_hand(self.model.get_input_embeddings()):
                self._calls[key] = dry_run(self.model, ids)
            while len(self._calls) > REMEMBERED_PROMPTS:
                self._calls.popitem(last=False)
        return self._calls[key]

    def _given(self, index: int, hidden: Tensor, calls: LayerCalls) -> tuple[Tensor, LayerCall]:
        """What a layer is given in its turn, where it runs."""
        call = calls.calls[index]
        hidden, args, kwargs = self._weights.brought(index, (hidden, call.args, call.kwargs))
        return hidden, LayerCall(args, kwargs)

    def _structure(self, index: int, layer: nn.Module, hidden: Tensor, call: LayerCall) -> LayerStructure:
        """Layers made of the same modules are discovered once; closure is checked for every one."""
        key = tuple(
            (name, type(module), tuple(tuple(p.shape) for p in module.parameters(recurse=False)))
            for name, module in layer.named_modules()
        )
        if key not in self._structures:
            given = (hidden, call.args, call.kwargs)
            found = discover_layer(layer, *given, index=index, opaque=self._opaque)
            self._structures[key] = admit(layer, found, index, *given) if self._opaque else found
        return self._structures[key]

    def structures(
        self, look: Callable[[LayerStructure, CapturedLayer], None] | None = None
    ) -> list[ProvedLayer]:
        """What each layer adds to the stream and by which modules, proved on a run over a few tokens.

        look: is shown every captured layer before it is checked, one that does not close included.
        """
        ids = torch.arange(PROOF_TOKENS, device=self._device())[None] % self.info.d_vocab
        result = []
        with watching(self.model), torch.no_grad(), ExitStack() as stack:
            calls = self._dry_run(ids)
            hidden = calls.hidden
            reading = self._weights.reading(range(len(self._layers)), [ids.shape[1]], full=False)
            turn = stack.enter_context(reading)
            for index, layer in enumerate(self._layers):
                with turn(index):
                    hidden, call = self._given(index, hidden, calls)
                    structure = self._structure(index, layer, hidden, call)
                    hidden, captured = capture_layer(layer, structure, index, hidden, call.args, call.kwargs)
                    if look is not None:
                        look(structure, captured)
                    result.append(ProvedLayer(structure, check_closure(captured, full=True)))
        return result

    def _logits(self, targets: Sequence[int], position: int, embedded: Tensor) -> LogitAttribution:
        head = self._find_head()
        with self._weights.at_hand(head.unembed):
            return LogitAttribution(head, targets, position, embedded)

    def _find_head(self) -> Head:
        if self._head is None:

            def replay(ids: Tensor, states: Tensor) -> Tensor:
                return finish(self.model, ids, states, dry_run(self.model, ids))

            self._head = find_head(self.model, replay)
        return self._head

    # --- details on demand (the `Details` that a Trace asks) ---

    def check_same_model(self, data: TraceData) -> None:
        """Raise `CheckpointError` if a trace was made with another model than this one."""
        theirs = data.meta.get("model", {})
        ours = {**self._facts, **asdict(self.info)}
        for key in ("checkpoint", "model_type", "n_layers", "n_heads", "d_model", "d_vocab", "dtype"):
            if theirs.get(key) != ours.get(key):
                raise CheckpointError(
                    f"the trace was made with another model: {key} differs",
                    expected=theirs.get(key),
                    got=ours.get(key),
                )

    def _captured_layer(self, data: TraceData, layer: int) -> CapturedLayer:
        """Run one layer again on the kept residual stream."""
        key = (data.input_ids.tobytes(), layer)
        if key not in self._captured:
            self._captured[key] = self._run_again(data, layer)
            while len(self._captured) > REMEMBERED_LAYERS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _run_again(self, data: TraceData, layer: int, turn: LayerTurn | None = None) -> CapturedLayer:
        """turn: of a pass that is under way; without it the layer's weights are read for this alone."""
        if turn is None:
            # What is captured shares memory with the weights, which live as long as it does.
            self._captured.clear()
            with self._weights.reading([layer], [len(data.tokens)], full=False) as alone:
                return self._run_again(data, layer, alone)
        ids = torch.as_tensor(data.input_ids)[None].to(self._device())
        with watching(self.model), torch.no_grad(), turn(layer):
            calls = self._dry_run(ids)
            hidden, call = self._given(layer, self._state(data, layer)[None], calls)
            structure = self._structure(layer, self._layers[layer], hidden, call)
            _, captured = capture_layer(self._layers[layer], structure, layer, hidden, call.args, call.kwargs)
        return captured

    def _state(self, data: TraceData, layer: int) -> Tensor:
        """resid_pre of a layer [T, D] (layer L: the final state) in the model's dtype, bit for bit."""
        assert data.resid_pre is not None
        dtype = getattr(torch, data.meta["resid_dtype"])
        return from_host(data.resid_pre[layer], dtype).to(self._device())

    def _block(self, data: TraceData, layer: int) -> Block:
        return as_block(self._captured_layer(data, layer))

    def _attention(self, data: TraceData, layer: int) -> tuple[Block, AttentionWrite]:
        block = self._block(data, layer)
        if block.attention is None:
            raise StructureError(f"layer {layer} has no attention that was taken apart")
        return block, block.attention

    def exact_rows(self, data: TraceData, layer: int, rows: Sequence[int]) -> ExactRows:
        """See `Trace.exact`."""
        block, _ = self._attention(data, layer)
        task = attention_task(block, _settings_of(data), screen=0.0, keep=None)
        exact = pair_shares(task, list(rows))
        return ExactRows(
            *(_values(t) for t in (exact.shares, exact.residual, exact.bias, exact.others.sum(-1)))
        )

    def head_shares(self, data: TraceData, layer: int, head: int) -> NDArray[np.float32]:
        """See `Trace.contribution_map`."""
        block, _ = self._attention(data, layer)
        task = attention_task(block, _settings_of(data), screen=0.0, keep=None)
        T = len(data.tokens)
        step = max(1, task.workspace // (4 * T * task.attention.heads))
        result = np.zeros((T, T), np.float32)
        for start in range(0, T, step):
            rows = list(range(start, min(T, start + step)))
            result[rows] = _values(pair_shares(task, rows).shares[:, head])
        return result

    def attention_pattern(self, data: TraceData, layer: int, head: int) -> NDArray[np.float32]:
        """See `Trace.attention_map`."""
        _, write = self._attention(data, layer)
        return _values(attention_pattern(write.attention, head=head)).reshape((len(data.tokens),) * 2)

    def _mlp(self, data: TraceData, layer: int) -> tuple[Block, MlpWrite]:
        block = self._block(data, layer)
        if len(block.mlps) != 1:
            raise StructureError(f"layer {layer} has no MLP that was taken apart into neurons")
        return block, block.mlps[0]

    def neurons(self, data: TraceData, layer: int, position: int, k: int) -> list[Neuron]:
        """See `Trace.neurons`."""
        block, mlp = self._mlp(data, layer)
        F = mlp.w_down.shape[0]
        if not 1 <= k <= F:
            raise InputError("k is out of range", expected=f"1 to {F} neurons", got=k)
        row = slice(position, position + 1)
        task = neuron_task(block, mlp, _settings_of(data), rows=row, screen=0.0, k=k)
        result, _ = registry.run("neuron_contributions", task, backend=self._backend)
        act = mlp.act[position]
        return [
            Neuron(int(n), float(c), float(act[n]))
            for n, c in zip(result.index[0], result.value[0], strict=True)
        ]

    def neuron_positions(self, data: TraceData, layer: int, neuron: int, k: int) -> list[NeuronPosition]:
        """See `Trace.neuron_positions`."""
        _, mlp = self._mlp(data, layer)
        F = mlp.w_down.shape[0]
        if isinstance(neuron, bool) or not isinstance(neuron, (int, np.integer)) or not 0 <= neuron < F:
            raise InputError("neuron is out of range", expected=f"0 to {F - 1}", got=neuron)
        activation = _values(mlp.act[:, neuron])
        found = []
        for position in np.argsort(-np.abs(activation), kind="stable")[:k].tolist():
            row = self.neurons(data, layer, position, F)
            share = next(n.contribution for n in row if n.neuron == neuron)
            found.append(NeuronPosition(position, float(activation[position]), share))
        return found

    def lens(self, data: TraceData, layer: int, position: int, site: Site, k: int) -> list[TokenLogit]:
        """See `Trace.lens`."""
        logits = self._lens_logits(data, layer, position, site)
        if not 1 <= k <= len(logits):
            raise InputError("k is out of range", expected=f"1 to {len(logits)} tokens", got=k)
        value, index = torch.sort(logits, descending=True, stable=True)
        probability = torch.exp(value[:k] - torch.logsumexp(logits, 0))
        return [
            TokenLogit(self.token(int(i)), int(i), float(v), float(p))
            for i, v, p in zip(index[:k], value[:k], probability, strict=True)
        ]

    def _lens_logits(self, data: TraceData, layer: int, position: int, site: Site) -> Tensor:
        """[V]: the state at `site` through the model's own final norm, head and softcap."""
        if site == "mid":
            state = self._block(data, layer).mid.whole[position]
        else:
            state = self._state(data, layer + (site == "post"))[position]
        return self._find_head().logits(state[None])[0]

    def lens_ranks(
        self, data: TraceData, layer: int, position: int, site: Site, tokens: Sequence[int]
    ) -> list[int]:
        """See `Trace.lens_ranks`."""
        found: list[int] = ranks(self._lens_logits(data, layer, position, site)[None], list(tokens))[
            0
        ].tolist()
        return found

    def lens_table(
        self, data: TraceData, layers: Sequence[int], positions: Sequence[int], target: int | None
    ) -> LensTable:
        """See `Trace.lens_table`."""
        head, at = self._find_head(), list(positions)
        rows = [lens_row(head, self._state(data, layer + 1)[at], target) for layer in layers]
        ids = [row.token_id.tolist() for row in rows]

        def stacked(name: str) -> Any:
            return torch.stack([getattr(row, name) for row in rows]).cpu().numpy()

        return LensTable(
            tuple(layers), tuple(at), np.array(ids, np.int64),
            tuple(tuple(self.token(i) for i in row) for row in ids),
            stacked("probability"), stacked("entropy"),
            None if target is None else stacked("target_probability"),
            None if target is None else stacked("target_rank"),
        )  # fmt: skip

    def promoted(
        self, data: TraceData, layer: int, position: int, part: Part, k: int, frozen: bool
    ) -> tuple[list[TokenScore], list[TokenScore]]:
        """See `Trace.promoted`."""
        update = self._update(data, layer, position, part)[None]
        head = self._find_head()
        with self._weights.at_hand(head.unembed):
            if frozen:
                scores = head.frozen(self._state(data, len(self._layers))[position]).scores(update)[0]
            else:
                scores = raw_scores(head, update)[0]
        if not 1 <= k <= len(scores):
            raise InputError("k is out of range", expected=f"1 to {len(scores)} tokens", got=k)

        def listed(values: Tensor, sign: int) -> list[TokenScore]:
            value, index = torch.sort(sign * values, descending=True, stable=True)
            return [
                TokenScore(self.token(int(i)), int(i), sign * float(v))
                for i, v in zip(index[:k], value[:k], strict=True)
            ]

        return listed(scores, 1), listed(scores, -1)

    def logit_contributions(
        self, data: TraceData, targets: Sequence[int], position: int
    ) -> dict[int, LogitContributions]:
        """See `Trace.logit_contributions`: by target, from one more pass over the layers."""
        logits = self._logits(targets, position, self._state(data, 0))
        count = len(self._layers)
        with self._weights.reading(range(count), [len(data.tokens)], full=False) as turn:
            for layer in range(count):
                logits.add(self._run_again(data, layer, turn))  # not remembered: each is needed once
        state = self._state(data, len(self._layers))[position]
        return logits.finish(state, data.tokens, [self.token(target) for target in targets])

    def _update(self, data: TraceData, layer: int, position: int, part: Part) -> Tensor:
        """[D]: what a part added to the stream at one position."""
        match part:
            case "attention":
                return self._attention(data, layer)[1].written[position]
            case "mlp":
                block = self._block(data, layer)
                stage = block.post or block.mid
                writes = [w.written[position] for w in stage.writes if not isinstance(w, AttentionWrite)]
                if not writes:
                    raise StructureError(f"layer {layer} has no MLP")
                return torch.stack(writes).sum(0)
            case ("neuron", neuron):
                _, mlp = self._mlp(data, layer)
                if neuron >= mlp.w_down.shape[0]:
                    raise InputError(
                        "neuron is out of range", expected=f"below {mlp.w_down.shape[0]}", got=neuron
                    )
                scale = 1.0 if mlp.row_scale is None else mlp.row_scale[position]
                return mlp.act[position, neuron] * scale * mlp.w_down[neuron]
        _, head, *source = part
        attention = self._attention(data, layer)[1].attention
        pattern = attention_pattern(attention, head=head, destinations=[position]).flatten()
        if source:
            pattern = torch.zeros_like(pattern).index_copy(
                0, torch.tensor(source, device=pattern.device), pattern[source]
            )
        z = pattern.to(attention.v.dtype) @ attention.v[head // (attention.heads // attention.v.shape[0])]
        if attention.gate is not None:
            z = z * attention.gate[position, head]
        update = z @ attention.w_o[head]
        return update if attention.row_scale is None else update * attention.row_scale[position]


# --- the public functions ---


def check_backend(name: str) -> None:
    """Raise `BackendError` if a backend does not exist or cannot run here; "auto" always can."""
    if name == "auto":
        return
    if name not in registry.BACKENDS:
        expected = " or ".join(("auto", *registry.BACKENDS))
        raise BackendError("unknown backend", expected=expected, got=repr(name))
    reason = registry.availability()[name]
    if reason is not None:
        raise BackendError(f"backend {name} cannot run here: {reason}", remedy="use --backend auto")


def load(
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    allow_nonfinite: bool = False,
    opaque: bool = False,
    memory: str | int | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: Out | None = None,
) -> Engine:
    """Load a model to be traced.

    Parameters
    ----------
    model : a hub id, a local directory, a `.gguf` file, a loaded PreTrainedModel, or None (the demo model).
    tokenizer : for a loaded model whose prompts are text.
    device : "auto" (the first CUDA device, else the CPU), "cpu", "cuda", "cuda:N"; a loaded model stays put.
    dtype : "auto" (float32 on the CPU, the checkpoint's own on CUDA) or a floating dtype.
    backend : "auto" or a name that `lmtt doctor` lists; an explicit one works or raises.
    opaque : let a sublayer that cannot be taken apart in as one part, named in `Trace.whole_sublayers`;
        without it such a model is refused.
    memory : a limit on what loading and tracing take, as "8GiB": on the CPU resident memory beyond what the
        process has now, on CUDA what torch allocates. A model that does not fit is streamed from its
        checkpoint, a layer at a time, with the same results; from the first prompt on that is too long for
        the limit to hold with all weights, if a shorter one was not. None: what the machine has.
    device_map : instead of `device` and `memory`, where transformers is to put each module: "auto",
        "balanced", "sequential" or {module: device}, "disk" among the devices. Layers run where they are. A
        loaded model that was placed so is traced as it is.
    offload_folder : for weights on "disk" that transformers cannot use as the checkpoint has them.

    Raises
    ------
    CheckpointError, StructureError, InputError, BackendError
        Each in one line: what, expected, got, remedy.
    """
    check_backend(backend)
    limit = None if memory is None else parse_bytes(memory)
    if device_map is not None:
        for name, given in (("memory", limit), ("device", None if device == "auto" else device)):
            if given is not None:
                raise InputError(f"device_map excludes {name}", expected="one of them", got="both")
        placing = parse_device_map(device_map)
    elif offload_folder is not None:
        raise InputError("offload_folder is of no use without device_map")
    if isinstance(model, nn.Module):
        if device_map is not None:
            raise InputError("a loaded model stays where it is", remedy="name its checkpoint instead")
        if limit is not None:
            raise InputError("a loaded model is in memory already", remedy="name its checkpoint instead")
        loaded_already: Any = model
        facts = {
            "name": _name_of(model),
            "kind": "object",
            "type": loaded_already.config.model_type,
            "checkpoint": fingerprint_weights(named_weights(model)),
        }
        return Engine(Loaded(model, tokenizer, facts["name"], facts), backend, opaque)
    where = parse_device(device) if device_map is None else main_device(placing)
    kind = parse_dtype(dtype, where)
    meter = Meter(where, limit)
    weights: LayerWeights
    read: Callable[..., tuple[Loaded, LayerWeights]] | None = None
    with meter.loading():
        source = resolve(model)
        if device_map is None:
            read = partial(
                read_within, meter, source, device=where, dtype=kind, allow_nonfinite=allow_nonfinite
            )
            loaded, weights = read()
        else:
            loaded = load_all(
                source, device=where, dtype=kind, allow_nonfinite=allow_nonfinite,
                device_map=placing, offload_folder=None if offload_folder is None else str(offload_folder),
            )  # fmt: skip
            weights = PlacedWeights(meter, loaded.model, check=not allow_nonfinite)
        meter.loaded(weights.held)
    if tokenizer is not None:
        loaded = Loaded(loaded.model, tokenizer, loaded.name, loaded.facts)
    return Engine(loaded, backend, opaque, weights, None if limit is None else read)


def open(path: str | PathLike[str], *, engine: Engine | None = None) -> Trace:
    """Open a stored trace; with an engine, details are computed on demand (another checkpoint raises)."""
    trace = Trace(read_run(Path(path)))
    return trace if engine is None else trace.attach(engine)


# --- small things ---


def _unpadded(input_ids: Any, attention_mask: Any) -> list[NDArray[Any]]:
    """Rows of token ids [T] or [B, T] without what the mask of the same shape marks as padding."""
    try:
        ids = np.asarray(input_ids)
    except ValueError:
        raise InputError(
            "input_ids are of several lengths", expected="[T] or [B, T]",
            remedy="pad them, and give attention_mask",
        ) from None  # fmt: skip
    if ids.ndim not in (1, 2):
        raise InputError("input_ids have the wrong rank", expected="[T] or [B, T]", got=f"{ids.ndim} axes")
    ids = np.atleast_2d(ids)
    if attention_mask is None:
        return list(ids)
    mask = np.atleast_2d(np.asarray(attention_mask))
    if mask.shape != ids.shape:
        raise InputError("attention_mask does not fit input_ids", expected=ids.shape, got=mask.shape)
    return [row[keep != 0] for row, keep in zip(ids, mask, strict=True)]


def _settings(floor: float, screen: float | None, measure: str, neurons: int, backend: str) -> Settings:
    for name, value in (("floor", floor), ("screen", screen)):
        if value is not None and not 0 <= value < 1:
            raise InputError(f"{name} is out of range", expected="0 <= value < 1", got=value)
    if measure not in ("l1", "l2"):
        raise InputError("unknown measure", expected="l1 or l2", got=repr(measure))
    if neurons < 1:
        raise InputError("neurons is out of range", expected="at least 1", got=neurons)
    return Settings(floor, screen, measure, neurons, backend)  # type: ignore[arg-type] # checked above


def _outs(out: Any, prompts: int, single: bool, resume: bool, force: bool) -> list[Out | None]:
    """A directory for each prompt, None where nothing is stored."""
    if out is None:
        if resume or force:
            raise InputError("nothing to resume or replace", expected="out=, the run's directory")
        return [None] * prompts
    given = [out] if isinstance(out, (str, PathLike)) else list(out)
    if len(given) != prompts or isinstance(out, (str, PathLike)) != single:
        expected = "one directory" if single else f"a list of {prompts} directories"
        raise InputError("out does not fit the prompts", expected=expected, got=len(given))
    return given


def _resume(runs: Sequence[Running]) -> int:
    """The first layer that is left to compute; runs whose prompts share each layer's read go on together."""
    stored = [run.writer.resume_state().layer if run.writer is not None else 0 for run in runs]
    first = min(stored)
    for run in runs:
        if run.writer is not None:
            run.restore(run.writer.resume_state(first))
    return first


def _versions() -> dict[str, str]:
    return {
        "lmtt": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def _settings_of(data: TraceData) -> Settings:
    return Settings(floor=data.meta["floor"], measure=data.meta["measure"])


def _name_of(model: nn.Module) -> str:
    name = str(getattr(model, "name_or_path", "") or "")
    return Path(name).name or type(model).__name__


class _PlainConfig:
    """A configuration whose values that differ from layer to layer read as the first layer's."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._config, name)
        except RuntimeError:
            return getattr(self._config.per_layer_config[0], name)


def _info(loaded: Loaded, layers: nn.ModuleList) -> Info:
    config = _PlainConfig(loaded.model.config.get_text_config())
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    width = int(config.hidden_size)
    module = loaded.model.get_input_embeddings()
    embedding = getattr(module, "weight", None)
    if not isinstance(embedding, Tensor):
        raise StructureError(f"{loaded.name} has no single input embedding", got=type(module).__name__)
    return Info(
        name=loaded.name,
        model_type=config.model_type,
        n_layers=len(layers),
        n_heads=heads,
        n_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        d_model=width,
        d_head=int(getattr(config, "head_dim", None) or (width // heads if heads else 0)),
        d_mlp=getattr(config, "intermediate_size", None),
        d_vocab=int(getattr(module, "num_embeddings", None) or embedding.shape[0]),
        max_positions=getattr(config, "max_position_embeddings", None),
        dtype=str(embedding.dtype).removeprefix("torch."),
        device=str(run_device(module)),
    )


def _values(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to("cpu", torch.float32).numpy()
