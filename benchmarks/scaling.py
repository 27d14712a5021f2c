"""What attribution of large models would cost: predictions, written to docs/scaling.md.

    python benchmarks/scaling.py [--out FILE]

No model is loaded: dimensions come from public configurations, bytes from the engine's own planner, seconds
from `lmtt.profile.predict`, machines from their data sheets. `results/predict.json`, if it is there, says how
far the same predictions were from measured runs, at sizes that fit the machine that it was measured on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmtt.errors import InputError
from lmtt.profile.ceilings import NVME, Ceilings, data_sheet
from lmtt.profile.dims import Dims, dims_of, weights_of
from lmtt.profile.planning import seconds_in_words
from lmtt.profile.predict import ASSUMED_SHARE, Prediction, predict
from lmtt.profile.work import NEURONS, PAIRS, PAIRS_POWER, kept_bytes
from lmtt.streaming.assign import build
from lmtt.streaming.load import LEFT_FREE
from lmtt.streaming.plan import Plan, Weights, make_plan

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scaling.md"
TOKENS = (512, 4096, 32768, 131072)
MANY = 1_000_000
MOST_TOGETHER = 4096  # prompts that share one read of the weights
# Dollars for an hour of one device: stated, not looked up; scale the column by what you pay.
PRICES = {"H100": 2.5, "A100": 1.5, "RTX 4090": 0.5}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """A public configuration."""

    name: str
    kind: str
    options: dict[str, Any]


def _llama(layers: int, width: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "vocab_size": 128256,
        "num_key_value_heads": 8, "intermediate_size": mlp, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip


MODELS = (
    Model("8B", "LlamaConfig", _llama(32, 4096, 32, 14336)),
    Model("70B", "LlamaConfig", _llama(80, 8192, 64, 28672)),
    Model("405B", "LlamaConfig", _llama(126, 16384, 128, 53248)),
    Model("671B, 37B of it active", "DeepseekV3Config", {"max_position_embeddings": 163840}),
)


@dataclass(frozen=True)
class Case:
    """One prompt, and what many cost for each."""

    model: str
    device: str
    tokens: int
    plan: Plan | None
    why_not: str
    one: Prediction | None
    together: int  # prompts that share a read
    each: float  # seconds of one prompt among many
    bound: str  # what binds the many
    stored: float  # bytes of one stored run, residual stream included
    light: float  # without it


def cases(models: Sequence[Model] = MODELS, lengths: Sequence[int] = TOKENS) -> Iterator[Case]:
    """Every model on every device at every length."""
    for model in models:
        dims, weights = sizes(model)
        for device in PRICES:
            ceilings = data_sheet(device)
            for T in lengths:
                yield case(model.name, dims, weights, ceilings, T)


def sizes(model: Model) -> tuple[Dims, Weights]:
    """From its configuration, built without memory."""
    import transformers

    config = getattr(transformers, model.kind)(**model.options)
    empty = build(config, DTYPE)
    return dims_of(empty, DTYPE), weights_of(empty, DTYPE, DTYPE.itemsize)


def case(name: str, dims: Dims, weights: Weights, ceilings: Ceilings, tokens: int) -> Case:
    """One line of the table."""
    assert ceilings.capacity is not None
    limit = int((1 - LEFT_FREE) * ceilings.capacity)
    s = dims.shapes
    light = s.layers * kept_bytes(tokens)
    stored = light + (s.layers + 1) * tokens * s.d_model * s.itemsize
    try:
        plan = make_plan(s, weights, limit, [tokens], full=False)  # the residual stream goes to the host
    except InputError as error:
        needed = re.search(r"at least (\S+); (.*)", str(error))
        why = f"needs {needed[1]}, {needed[2]}" if needed else str(error)
        return Case(name, ceilings.name, tokens, None, why, None, 0, 0.0, "", stored, light)
    one = predict(dims, ceilings, [tokens], plan, weights, stored=True)
    together = fitting(s, weights, limit, tokens)
    alone = predict(dims, ceilings, [tokens], plan, weights, first=False, stored=True)
    computing = sum(e.seconds for phase, e in alone.phases.items() if phase not in ("read", "decode"))
    # One pass over the layers for `together` prompts: storage and computing go on beside each other.
    decode = alone.phases["decode"].seconds if "decode" in alone.phases else 0.0
    of_group = max(together * computing + decode, alone.reading)
    bound = "storage" if alone.reading >= together * computing + decode else bound_of_most(alone)
    return Case(
        name, ceilings.name, tokens, plan, "", one, together, of_group / together, bound, stored, light
    )


def fitting(shapes: Any, weights: Weights, limit: int, tokens: int) -> int:
    """The most prompts of a length that fit one pass; their residual streams lie on disk, not in memory."""
    low, high = 1, MOST_TOGETHER
    while low < high:
        middle = (low + high + 1) // 2
        try:
            make_plan(shapes, weights, limit, [tokens] * middle, full=False)
            low = middle
        except InputError:
            high = middle - 1
    return low


def bound_of_most(prediction: Prediction) -> str:
    """What binds the phases that take most of the time."""
    by: dict[str, float] = {}
    for phase, one in prediction.phases.items():
        if phase != "read":
            by[one.bound] = by.get(one.bound, 0.0) + one.seconds
    largest = max(by, key=lambda name: by[name])
    return "storage" if largest == "disk" else largest


# --- the page -----------------------------------------------------------------------------------------------

INTRODUCTION = f"""# What large models would cost

Written by `python benchmarks/scaling.py`; do not edit. **Predictions, none of them measured**: no model of
these sizes was run, and no GPU was there. What they rest on:

- bytes, and whether a model stays in memory or is read layer by layer: the planner that the engine uses, on
  one device; the residual stream of every layer goes to the host;
- seconds: operations and bytes of each phase at {ASSUMED_SHARE:.0%} of the device's data sheet;
- storage: a drive that reads {NVME / 1e9:g} GB/s and writes half of that; weights in bfloat16, read once for
  all prompts that fit a pass;
- screening leaves min(1, {PAIRS:g} T^{PAIRS_POWER:g}) of pairs and {NEURONS:.0%} of neurons, as it does on
  prose in SmolLM2-135M;
- the first prompt of a process: structure is discovered and every sublayer proved; not so for each of many;
- prices, stated for the arithmetic: {", ".join(f"{name} {price:g} $/h" for name, price in PRICES.items())}.
"""
COLUMNS = ("device", "tokens", "weights", "first prompt", "bound by", "prompts at a time",
           "each of a million", "a million", "dollars", "bound by", "a stored run")  # fmt: skip


def page(found: Sequence[Case], checked: dict[str, Any] | None) -> str:
    """The whole of docs/scaling.md."""
    lines = [INTRODUCTION]
    for model in dict.fromkeys(case.model for case in found):
        lines += [f"## {model}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += [_row(case) for case in found if case.model == model]
        lines += [""]
    lines += _reading(found)
    lines += ["## Checked against runs", ""]
    lines += _checked(checked)
    return "\n".join(lines) + "\n"


def _row(case: Case) -> str:
    head = f"| {case.device} | {case.tokens:,} |"
    if case.plan is None or case.one is None:
        return f"{head} {case.why_not} |" + " – |" * 8
    total = case.each * MANY
    dollars = total / 3600 * PRICES[case.device]
    first = "storage" if case.one.reading > 0.5 * case.one.seconds else bound_of_most(case.one)
    return (
        f"{head} {'stay' if case.plan.resident else 'read by layer'} | {seconds_in_words(case.one.seconds)} |"
        f" {first} | {case.together:,} | {seconds_in_words(case.each)} | {seconds_in_words(total)} |"
        f" {dollars:,.0f} | {case.bound} |"
        f" {_bytes(case.stored)}, light {_bytes(case.light)} |"
    )


def _bytes(count: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"


def _reading(found: Sequence[Case]) -> list[str]:
    """What the tables say, counted."""
    fit = [case for case in found if case.one is not None]
    first = [c for c in fit if c.one is not None and c.one.reading > 0.5 * c.one.seconds]
    many = [c for c in fit if c.bound == "storage"]
    lines = [
        "## What binds",
        "",
        f"Storage binds the first prompt in {len(first)} of {len(fit)} cases, and a million prompts in",
        f"{len(many)} (it is the runs that are written, or too few prompts that share a read).",
    ]
    for T in dict.fromkeys(case.tokens for case in fit):
        bounds = sorted({c.bound for c in fit if c.tokens == T})
        largest = max((c for c in fit if c.tokens == T), key=lambda c: c.stored)
        lines.append(
            f"At T = {T:,} many prompts are bound by {', '.join(bounds)}; a stored run takes up to"
            f" {_bytes(largest.stored)}."
        )
    refused = [c for c in found if c.one is None]
    if refused:
        lines.append(
            f"{len(refused)} cases do not fit one device: what they need is in the tables. Activations of one"
            " layer are all held at once,"
        )
        lines.append("and so are the residual streams of prompts that go together.")
    return [*lines, ""]


def _checked(checked: dict[str, Any] | None) -> list[str]:
    if checked is None:
        return ["Not measured yet: `python benchmarks/predict.py` on a quiet machine writes"
                " `results/predict.json`."]  # fmt: skip
    about = checked["machine"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {checked['created'][:10]}: phases of"
        f" {len(checked['points'])} runs, efficiencies fitted on",
        "half of them. The other half:",
        "",
        "| run | predicted | measured | off by |",
        "|---|---|---|---|",
    ]
    for point in checked["points"]:
        if not point["fitted"]:
            p, m = point["predicted_total"], point["measured_total"]
            words = f"{seconds_in_words(p)} | {seconds_in_words(m)} | {p / m - 1:+.0%}"
            lines.append(f"| {point['name']} | {words} |")
    if about.get("busy_with_others", 0) > 0.1:
        used = about["busy_with_others"]
        lines += ["", f"**Others used {used:.2g} processors meanwhile: these figures are not to be quoted.**"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    stored = HERE / "results" / "predict.json"
    checked = json.loads(stored.read_text()) if stored.is_file() else None
    options.out.write_text(page(list(cases()), checked))
    print(options.out)


if __name__ == "__main__":
    main()
