"""`lmtt plan`: what a run would take and how it would go, from a model's config; no weight is read.

Bytes and chunks come from `lmtt.streaming.plan.make_plan`, which the engine itself asks, so that what is said
here is what happens. Seconds come from `predict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from lmtt.checkpoint.gguf_lend import fast_reader
from lmtt.checkpoint.load import Source, parse_dtype, quiet_transformers, read_config, resolve
from lmtt.errors import InputError, StructureError
from lmtt.profile.ceilings import DATA_SHEETS, Ceilings, data_sheet, known, of_this_machine
from lmtt.profile.dims import Dims, check_tokens, dims_of, weights_of
from lmtt.profile.efficiency import FITTED_ON
from lmtt.profile.predict import ASSUMED_SHARE, Prediction, predict
from lmtt.profile.work import NEURONS, expected_pairs, kept_bytes
from lmtt.streaming.assign import build
from lmtt.streaming.load import LEFT_FREE, available, tokenizer_bytes
from lmtt.streaming.plan import Plan, Weights, estimate, in_words, loading, make_plan, parse_bytes
from lmtt.streaming.weights import LayerWeights, ResidentWeights, StreamedWeights

EDGE_BYTES = 5  # of an edge in the browser (viz/store.py)
PAGE_BYTES = 2 << 20  # of a page without edges
NOT_OF_THE_PASS = ("prompt", "graph")  # what a run's own clock does not see
EDGES_OF_A_ROW = 64  # kept at most in the mean, as the planner counts them
BYTES_OF = {
    "fixed": "threads, allocator, imports",
    "resident": "weights that stay",
    "ring": "weights read ahead, as stored",
    "decoded": "one layer as computed with",
    "hidden": "the residual stream",
    "activations": "a layer's activations",
    "attribution": "the attribution's workspace",
    "results": "results",
}


@dataclass(frozen=True)
class Planned:
    """A run that has not happened."""

    model: str
    tokens: int
    limit: int
    why: str  # where the limit comes from
    dims: Dims
    weights: Weights
    plan: Plan
    ceilings: Ceilings
    prediction: Prediction

    @property
    def run_bytes(self) -> int:
        """Of the stored run, residual stream included."""
        s = self.dims.shapes
        states = (s.layers + 1) * self.tokens * s.d_model * s.itemsize
        return states + int(s.layers * kept_bytes(self.tokens))

    @property
    def browser_bytes(self) -> int:
        """What the dashboard sends for the whole graph."""
        edges = min(self.tokens**2 // 2, EDGES_OF_A_ROW * self.tokens) * self.dims.shapes.layers
        return PAGE_BYTES + EDGE_BYTES * edges

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "lmtt.plan/1",
            "model": self.model,
            "tokens": self.tokens,
            "dtype": self.dims.dtype,
            "parameters": self.dims.parameters,
            "limit_bytes": self.limit,
            "limit": self.why,
            **plan_json(self.plan),
            "seconds": self.prediction.to_json(),
            "bounds": {name: one.bound for name, one in self.prediction.phases.items()},
            "reading_seconds": self.prediction.reading,
            "run_bytes": self.run_bytes,
            "browser_bytes": self.browser_bytes,
            "ceilings": self.ceilings.to_json(),
            "assumed": {
                "pairs": expected_pairs(self.tokens),
                "neurons": NEURONS,
                "efficiency": FITTED_ON if self.ceilings.source == "measured" else ASSUMED_SHARE,
            },
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        d, plan = self.dims, self.plan
        name = "weights stay in memory" if plan.resident else "weights are read layer by layer"
        yield f"{self.model}, {d.parameters / 1e9:.3g} G parameters, {self.tokens} tokens in {d.dtype}"
        yield f"fits: {name}; {in_words(plan.bytes.total)} of {in_words(self.limit)} ({self.why})"
        yield ""
        for part in fields(plan.bytes):
            size = int(getattr(plan.bytes, part.name))
            if size:
                yield f"  {in_words(size):>10}  {BYTES_OF[part.name]}"
        yield f"  {in_words(plan.workspace):>10}  at most for kernels to work in, counted above where used"
        yield f"  {in_words(plan.loading):>10}  at most while the model is loaded"
        yield f"  {in_words(self.run_bytes):>10}  on disk, if the run is stored"
        yield f"  {in_words(self.browser_bytes):>10}  to a browser, for the whole graph"
        yield ""
        yield f"predicted for {self.ceilings.name}, {self.ceilings.source} ceilings:"
        phases = sorted(self.prediction.phases.items(), key=lambda item: -item[1].seconds)
        for phase, one in phases:
            if one.seconds >= 0.001 * self.prediction.seconds:
                yield f"  {seconds_in_words(one.seconds):>10}  {phase}, bound by {one.bound}"
        yield f"  {seconds_in_words(self.prediction.seconds):>10}  in all, loading the model not included"
        yield ""
        pairs = expected_pairs(self.tokens)
        reached = FITTED_ON if self.ceilings.source == "measured" else f"{ASSUMED_SHARE:.0%}"
        yield f"assumed: {pairs:.1%} of pairs and {NEURONS:.0%} of neurons survive screening"
        yield f"what phases reach of the ceilings: {reached}"


def plan_run(
    model: str | None,
    tokens: int,
    *,
    memory: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    remeasure: bool = False,
) -> Planned:
    """Plan a first prompt of so many tokens; `device` may name a GPU that is not here.

    Raises
    ------
    InputError
        Unknown device or dtype, too many tokens, or a limit below the smallest that works, which is named.
    CheckpointError
        No such model, or a config that no model can be made of.
    """
    limit = None if memory is None else parse_bytes(memory)
    source = resolve(model)
    ceilings = _ceilings(device, remeasure)
    with quiet_transformers(), fast_reader():
        config = read_config(source)
    check_tokens(config, tokens)
    dims, weights = sizes(source, config, dtype, ceilings.device)
    limit, why = _limit(limit, ceilings)
    plan = make_plan(dims.shapes, weights, limit, [tokens])
    return Planned(
        source.name, tokens, limit, why, dims, weights, plan, ceilings,
        predict(dims, ceilings, [tokens], plan, weights),
    )  # fmt: skip


def sizes(source: Source, config: Any, dtype: str, device: str) -> tuple[Dims, Weights]:
    """Of a model in a dtype on a kind of device; no weight is read. InputError for an unknown dtype."""
    kind = parse_dtype(dtype, torch.device(device))
    as_stored = _stored_dtype(config)  # building writes the other dtype into the config
    if kind == "auto":
        kind = as_stored
    with quiet_transformers():
        empty = build(config, kind)
    dims = dims_of(empty, kind, device)
    stored = _stored_bytes(source, config, as_stored, dims.parameters)
    return dims, weights_of(empty, kind, stored, tokenizer=tokenizer_bytes(source, dims.shapes.d_vocab))


def planned_cost(
    model: Any, where: LayerWeights, tokens: Sequence[int], *, full: bool, first: bool, stored: bool
) -> dict[str, Any]:
    """What a loaded model's pass is planned to take, as its run stores it beside what was measured.

    Seconds are there once this machine's ceilings were measured; no run stops to measure them. A model that
    no plan fits is traced all the same, with `unplanned` saying why.
    """
    dtype = model.dtype
    try:
        dims = dims_of(model, dtype, model.get_input_embeddings().weight.device.type)
    except StructureError as error:
        return {"unplanned": str(error)}
    if isinstance(where, StreamedWeights):
        weights, plan = where.weights, where.plan(tokens, full=full)
    else:
        known_weights = where.weights if isinstance(where, ResidentWeights) else None
        weights = known_weights or weights_of(model, dtype, dtype.itemsize)
        workspace = where.workspace(tokens, full=full)
        room = estimate(dims.shapes, weights, tokens, resident=True, ring=0, workspace=workspace, full=full)
        load = 0 if known_weights is None else loading(dims.shapes, known_weights, resident=True)
        plan = Plan(True, workspace, room, loading=load)
    ceilings = known(str(model.get_input_embeddings().weight.device))
    result = plan_json(plan)
    if ceilings is not None:
        prediction = predict(dims, ceilings, tokens, plan, weights, first=first, stored=stored)
        seconds = {n: one.seconds for n, one in prediction.phases.items() if n not in NOT_OF_THE_PASS}
        result["seconds"] = {**seconds, "total": sum(seconds.values())}
    return result


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as runs store it beside what was measured."""
    return {
        "resident": plan.resident,
        "workspace": plan.workspace,
        "loading": plan.loading,
        "bytes": {**asdict(plan.bytes), "total": plan.bytes.total},
    }


def seconds_in_words(seconds: float) -> str:
    """Three digits and a unit."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _ceilings(device: str, remeasure: bool) -> Ceilings:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return of_this_machine("cpu", remeasure=remeasure)
    if re.fullmatch(r"cuda(:\d+)?", device):
        if not torch.cuda.is_available():
            names = ", ".join(c.name for c in DATA_SHEETS.values())
            raise InputError(
                f"device {device} is not there", remedy=f"to plan for one that is not, name it: {names}"
            )
        return of_this_machine(device, remeasure=remeasure)
    return data_sheet(device)


def _limit(named: int | None, ceilings: Ceilings) -> tuple[int, str]:
    """Bytes that may be used, and where that number comes from; the engine's own rule where none is named."""
    if named is not None:
        if ceilings.source == "data sheet" and named > (ceilings.capacity or named):
            raise InputError(
                f"memory={in_words(named)} is more than there is",
                expected=f"at most the {in_words(ceilings.capacity or 0)} of {ceilings.name}",
            )
        return named, "as asked"
    if ceilings.source == "data sheet":
        assert ceilings.capacity is not None
        return int((1 - LEFT_FREE) * ceilings.capacity), f"{1 - LEFT_FREE:.0%} of {ceilings.name}"
    free = available(torch.device(ceilings.device))
    if free is None:
        raise InputError("nobody says how much memory is free here", remedy="name a limit with --memory")
    return int((1 - LEFT_FREE) * free), f"{1 - LEFT_FREE:.0%} of what is free now"


def _stored_bytes(source: Source, config: Any, dtype: torch.dtype, parameters: int) -> float:
    """Of each parameter in the checkpoint: a .gguf file's own size, else what the config says."""
    if source.gguf is not None:
        return (Path(source.folder) / source.gguf).stat().st_size / parameters
    how: Any = getattr(config, "quantization_config", None)
    if how is None:
        return float(dtype.itemsize)
    said = how if isinstance(how, dict) else how.to_dict()
    method = str(said.get("quant_method", ""))
    bits = said.get("bits") or (4 if said.get("load_in_4bit") or "mxfp4" in method or "awq" in method else 8)
    return float(bits) / 8


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
