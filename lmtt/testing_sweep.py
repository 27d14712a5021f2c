"""How every causal-LM type of the installed transformers fares, on a tiny random model of each, wrappers too.

`python -m lmtt.testing_sweep` sweeps them all, writes docs/models.md and the list that tests hold it to. A
type's state is one of

    full     every addition to the stream is taken apart into heads, neurons and biases
    opaque   all additions are found and sum up, but some enter as one part each, with a reason
    refused  an error that names what is not understood
    unbuilt  no tiny model of it runs here: nothing is known

A model counts as full or opaque only if its parts add up to 1e-5 in float32 and 1e-10 in float64, its
contributions sum to 1, and its logits are bit for bit those of a model that nobody looks at, with torch's own
attention and with the one that transformers spells out; as full, only if every head and neuron is what
`lmtt.testing_oracle` finds by taking it away.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmtt.contributions import as_block
from lmtt.engine import load
from lmtt.errors import LmttError
from lmtt.structure.attention_hook import attention_modules, watching
from lmtt.structure.capture import capture_layer
from lmtt.structure.discover import discover_layer
from lmtt.structure.opaque import admit
from lmtt.structure.replay import dry_run, find_layers, finish
from lmtt.structure.spec import CapturedLayer, LayerStructure, Multiply, Norm, OpaqueWrite, Write
from lmtt.structure.verify import check_closure
from lmtt.testing_oracle import Layout, assert_complete, assert_trace, plain_run, take_away
from lmtt.testing_types import WRAPPERS, prompt, swept_types, tiny_of_type

State = Literal["unbuilt", "refused", "opaque", "full"]
ORDER: tuple[State, ...] = ("unbuilt", "refused", "opaque", "full")  # a type may only move to the right
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Verdict:
    """What became of one type."""

    state: State
    why: str = ""  # of anything but full
    layers: str = ""  # its kinds of layers, as sums
    seen: str = ""  # how its attention is seen
    closure: tuple[float, float] | None = None  # largest relative error, float32 and float64
    seconds: float = 0.0  # discovery of all its layers, of its thread
    unchecked: str = ""  # full only: why the oracle has no say


class SilentlyWrongError(AssertionError):
    """A model that was accepted and should not have been: the worst defect there is."""


def sweep_type(model_type: str) -> Verdict:
    """Build, trace and judge one type.

    Raises SilentlyWrongError if it is accepted but does not add up, or is not left alone.
    """
    ids = prompt()
    try:
        model = tiny_of_type(model_type)
        with torch.no_grad():
            own = model(ids, use_cache=False).logits
    except Exception as error:  # whatever a class of transformers raises when its sizes do not suit it
        return Verdict("unbuilt", _one_line(error))
    try:
        return _judge(model_type, model, own, opaque=False)
    except LmttError as error:
        why = str(error)
    if "--opaque" in why:  # an offer that is to be taken at its word
        try:
            return _judge(model_type, model, own, opaque=True)
        except LmttError as error:
            why = f"{why}; with it: {error}"
    return Verdict("refused", why)


def _judge(model_type: str, model: Any, own: Tensor, opaque: bool) -> Verdict:
    ids = prompt()
    narrow = _pass(model, ids, opaque)
    trace = load(model, opaque=opaque).trace(input_ids=ids[0].numpy(), floor=1e-2)
    with computing_in_float64():
        wide_model = tiny_of_type(model_type, dtype=torch.float64).double()
        wide = _pass(wide_model, ids, opaque)
    _check_logits(model_type, narrow, own)
    for run, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        if not run.closure <= BOUND[dtype]:
            raise SilentlyWrongError(f"{model_type}: parts add up to {run.closure:.1e} only in {dtype}")
    _check_sums(model_type, trace)
    _check_eager(model_type, model, ids, opaque)
    reasons = (["with --opaque"] if opaque else []) + _reasons(narrow.captured)
    with computing_in_float64():
        unchecked = "" if reasons else _take_away(model_type, wide_model, wide.structures, ids)
    return Verdict(
        "opaque" if reasons else "full",
        "; ".join(reasons),
        "; ".join(dict.fromkeys(_describe(s) for s in narrow.structures)),
        ", ".join(dict.fromkeys(s.attention_source for s in narrow.structures if s.attention_source)),
        (narrow.closure, wide.closure),
        narrow.seconds,
        unchecked,
    )


@dataclass(frozen=True)
class _Pass:
    structures: list[LayerStructure]
    captured: list[CapturedLayer]
    closure: float
    logits: Tensor
    seconds: float  # of discovery


def _pass(model: Any, ids: Tensor, opaque: bool) -> _Pass:
    """Every layer discovered by itself, captured and checked in full."""
    calls = dry_run(model, ids)
    _, layers = find_layers(model)
    hidden, seconds, worst = calls.hidden, 0.0, 0.0
    structures, captured = [], []
    with watching(model):
        for i, (layer, call) in enumerate(zip(layers, calls.calls, strict=True)):
            start = time.thread_time()
            given = (hidden, call.args, call.kwargs)
            found = discover_layer(layer, *given, index=i, opaque=opaque)
            seconds += time.thread_time() - start
            structures.append(admit(layer, found, i, *given) if opaque else found)
            hidden, seen = capture_layer(layer, structures[-1], i, *given)
            captured.append(seen)
            worst = max([worst, *(c.error for c in check_closure(seen, full=True))])
    return _Pass(structures, captured, worst, finish(model, ids, hidden, calls), seconds)


def _check_logits(model_type: str, run: _Pass, own: Tensor) -> None:
    if not torch.equal(run.logits, own):
        raise SilentlyWrongError(f"{model_type}: the logits of a traced run are others")


def _check_eager(model_type: str, model: Any, ids: Tensor, opaque: bool) -> None:
    """Where attention ran as torch's own, the same holds for the one that transformers spells out."""
    if "sdpa" not in {getattr(m.config, "_attn_implementation", None) for m in attention_modules(model)}:
        return
    model.set_attn_implementation("eager")
    with torch.no_grad():
        own = model(ids, use_cache=False).logits
    run = _pass(model, ids, opaque)
    _check_logits(f"{model_type} (eager)", run, own)
    if not run.closure <= BOUND[torch.float32]:
        raise SilentlyWrongError(f"{model_type} (eager): parts add up to {run.closure:.1e} only")


def _check_sums(model_type: str, trace: Any) -> None:
    data = trace.data
    for layer in range(trace.n_layers):
        row = trace.attention(layer).sum(-1) + trace.rest[layer] + trace.residual[layer] + trace.bias[layer]
        row = row + trace.opaque[layer] + (trace.mlp[layer] if data.parallel[layer] else 0)
        # 0 where no part is any closer to the sum than nothing is.
        if not np.minimum(np.abs(row - 1), np.abs(row)).max() <= 1e-5:
            raise SilentlyWrongError(f"{model_type}, layer {layer}: contributions sum to {row}")


def _take_away(model_type: str, model: Any, structures: list[LayerStructure], ids: Tensor) -> str:
    """Hold a float64 trace to the oracle, which is told the modules' names and nothing else.

    Returns why it has no say: where what it can take away is not all that a layer adds, it proves nothing.
    Raises SilentlyWrongError where it has, and says otherwise.
    """
    engine = load(model)
    _, layers = find_layers(model)
    try:
        run = plain_run(model, layers, ids)
        parts = [
            take_away(layer, _layout(layer, structure), given, engine.info.n_heads)
            for layer, structure, given in zip(layers, structures, run.given, strict=True)
        ]
        for layer_parts in parts:
            assert_complete(layer_parts)
    except (AssertionError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        return _one_line(error)
    trace = engine.trace(input_ids=ids[0].numpy(), floor=0.0, neurons=10_000)
    try:
        for i, layer_parts in enumerate(parts):
            assert_trace(trace, i, layer_parts, f"{model_type}, layer {i}")
    except AssertionError as error:
        raise SilentlyWrongError(str(error)) from error
    return ""


def hold_to_oracle(name: str, model: Any, ids: Tensor) -> str:
    """`_take_away` for a float64 model (see `computing_in_float64`) on one prompt [1, T]."""
    with computing_in_float64():
        return _take_away(name, model, _pass(model, ids, opaque=False).structures, ids)


def _layout(layer: Any, structure: LayerStructure) -> Layout:
    """Where a layer keeps its parts, from the names of its modules and parameters."""
    (attention,) = [w for w in structure.writes if w.kind == "attention"]
    mlps = [w for w in structure.writes if w.kind in ("experts", "mlp")]
    first = sorted((w for w in mlps if w.stage == mlps[0].stage), key=lambda w: w.kind != "experts")
    later = [w for w in mlps if w.stage != mlps[0].stage]
    multiplied = [s for carry in structure.carries for s in carry if isinstance(s, Multiply)]
    numbers = [name for name, buffer in layer.named_buffers() if buffer.numel() == 1]
    return Layout(
        out=str(attention.module),
        down=tuple(_down(layer, w) for w in first),
        attention_norm=attention.post_norm,
        mlp_norm=first[0].post_norm,
        second=(_down(layer, later[0]), str(later[0].post_norm)) if len(later) == 1 else None,
        scale=numbers[0] if multiplied and numbers else None,
        around=any(isinstance(step, Norm) for carry in structure.carries for step in carry),
    )


def _down(layer: Any, write: Write) -> str:
    """The weight whose columns are a write's neurons."""
    if write.kind == "mlp" or write.product is not None:
        return str(write.module) + (".weight" if write.kind == "mlp" else "")
    ending = ("down_proj", "w2", "output_linear.weight")
    names: list[str] = [
        n for n, _ in layer.named_parameters() if n.startswith(f"{write.module}.") and n.endswith(ending)
    ]
    return names[0]


def _reasons(captured: Sequence[CapturedLayer]) -> list[str]:
    """Why parts stayed whole, each reason once."""
    writes = [w for layer in captured for stage in layer.stages for w in stage.writes]
    reasons = [f"{w.kind}: {w.reason}" for w in writes if isinstance(w, OpaqueWrite)]
    reasons += [
        f"mlp: {len(found)} MLPs in one sum"
        for found in (as_block(c).mlps for c in captured)
        if len(found) > 1
    ]
    return list(dict.fromkeys(reasons))


def _describe(structure: LayerStructure) -> str:
    """A layer as the sums that it is: "attention | mlp" has a resid_mid, "attention + mlp" has none."""
    sums = []
    for stage in range(structure.stages):
        here = [w for w in structure.writes if w.stage == stage]
        around = {s.module for s in structure.carries[stage] if isinstance(s, Norm)}
        own = [w.post_norm is not None and w.post_norm not in around for w in here]
        text = " + ".join(w.kind + (" then norm" if n else "") for w, n in zip(here, own, strict=True))
        sums.append(f"norm of (stream + {text})" if around else text)
    return " | ".join(sums)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


class _Wide(TorchFunctionMode):
    """Casts of float64 tensors to float32 are left out."""

    _CASTS = frozenset({"float", "to", "type", "softmax", "log_softmax", "cumsum", "sum", "mean"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in self._CASTS and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if name == "float":
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def computing_in_float64() -> Iterator[None]:
    """Models compute norms and softmax in float32 whatever their dtype; here they may not.

    Only so can a sum be seen to close to 1e-10.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(default)


# --- the page and the list ---


INTRODUCTION = """# Models

<!-- written by `make models`, do not edit -->

Structure is discovered, never looked up: nothing below is a table that the code reads. Every causal-LM type
of transformers {version}, and {wrappers} models of images and text given text only, are built as tiny random
models with perturbed weights and traced; this page is what came of it. A type counts as decomposed if its
parts add up to 1e-5 in float32 and to 1e-10 in float64, contributions sum to 1, and logits are bit for bit
those of the model by itself, with sdpa and with eager attention where it has both. Types that are encoders
by default (BERT and its kin) are built with `is_decoder=True`; without it they look ahead, and are refused.

Of {all} types {closing} decompose: {full} fully, {opaque} with parts that stay whole. {refused} are refused
with a reason; of {unbuilt} no tiny model runs, so nothing is known. Of those that decompose fully, {checked}
are also held to an oracle: every head and every neuron is what taking it away from the running model changes.
The others are marked `*`: the oracle cannot take all of their parts away, so only their sums are proved.

In the column *layer*, `|` stands for a sum that something reads (`resid_mid`), `+` for additions to one sum,
and `;` separates kinds of layers. `norm of (stream + ...)` is a norm after the addition: the stream goes
through it too, held at the run's statistics, and logits cannot be attributed past it.
"""
SECTIONS: dict[State, tuple[str, str]] = {
    "full": ("Decomposed fully", "layer"),
    "opaque": ("Decomposed, with parts that stay whole", "layer | whole, and why"),
    "refused": ("Refused", "why"),
    "unbuilt": ("Not known", "why"),
}


def render(verdicts: dict[str, Verdict]) -> str:
    """docs/models.md"""
    counts: dict[str, int] = {state: sum(v.state == state for v in verdicts.values()) for state in ORDER}
    closing = counts["full"] + counts["opaque"]
    checked = sum(v.state == "full" and not v.unchecked for v in verdicts.values())
    text = INTRODUCTION.format(
        checked=checked,
        version=transformers.__version__,
        wrappers=sum(t in WRAPPERS for t in verdicts),
        all=len(verdicts),
        closing=closing,
        **counts,
    )
    for state, (title, columns) in SECTIONS.items():
        names = ["type", *columns.split(" | ")]
        text += f"\n## {title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        for model_type, verdict in verdicts.items():
            if verdict.state == state:
                name = model_type + (" *" if verdict.unchecked else "")
                cells = [name, verdict.layers, verdict.why]
                text += f"| {' | '.join(_cell(c) for c in cells if c)} |\n"
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def fallen(before: dict[str, str], verdicts: dict[str, Verdict]) -> dict[str, str]:
    """Types that are worse off than the list says, or gone: the list may only grow."""
    rank = {state: n for n, state in enumerate(ORDER)}
    return {
        t: f"{state} before, {verdicts[t].state if t in verdicts else 'gone'} now"
        for t, state in before.items()
        if t not in verdicts or rank[verdicts[t].state] < rank[state]  # type: ignore[index] # our own file
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep, print, and unless types were named write page and list."""
    parser = argparse.ArgumentParser(prog="python -m lmtt.testing_sweep", description="sweep model types")
    parser.add_argument("types", nargs="*", help="some types only: printed, nothing is written")
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--list", type=Path, default=Path("tests/models/supported.json"))
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts: dict[str, Verdict] = {}
    broken = 0
    for model_type in options.types or swept_types():
        try:
            verdicts[model_type] = found = sweep_type(model_type)
        except Exception as error:  # one broken type does not hide the others
            broken += 1
            print(model_type, "BROKEN", type(error).__name__, error, flush=True)
        else:
            print(model_type, json.dumps(asdict(found)), flush=True)
    if options.types or broken:
        return int(broken > 0)
    before = json.loads(options.list.read_text()) if options.list.exists() else {}
    worse = fallen(before, verdicts)
    if worse:
        print("not written, the list may only grow:", worse)
        return 1
    options.page.write_text(render(verdicts))
    listed = {t: v.state for t, v in verdicts.items()}
    options.list.write_text(json.dumps(listed, indent=0, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
