"""Do the heads that an attribution ranks first matter when they are taken away? As measured, good or bad.

    PYTHONSAFEPATH=1 .venv/bin/python benchmarks/faithfulness.py

1. Indirect-object prompts are generated until enough are solved ("When Mary and John went to the store, John
   gave a drink to": the model must give " Mary" a higher logit than " John").
2. Each is traced. A head's *direct logit attribution* is what it wrote towards logit(Mary) - logit(John) at
   the last position, summed over sources. Its *route importance* is the sum of its weights on the edges of
   the route to the last position.
3. On some of the prompts every head is zero-ablated in turn: its output is set to zero at all positions and
   the model run again. The *effect* is how far logit(Mary) - logit(John) falls.
4. Rankings are compared, prompt by prompt and averaged over prompts: Spearman over all heads, and how many of
   the ten strongest heads the two have in common.

Results: benchmarks/results/faithfulness.json, and on stdout the tables of docs/faithfulness.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import lmtt
from lmtt.engine import Engine
from lmtt.trace import Trace

F64 = NDArray[np.float64]

TEMPLATES = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "After {a} and {b} spent some time at the {place}, {giver} handed a {thing} to",
    "Then, {a} and {b} had a long talk at the {place}. {giver} decided to give a {thing} to",
    "While {a} and {b} were working at the {place}, {giver} offered a {thing} to",
    "Yesterday {a} and {b} met at the {place}, and {giver} brought a {thing} to",
)
PLACES = ("store", "school", "office", "station", "park", "hospital", "restaurant", "garden", "library")
THINGS = ("drink", "book", "ring", "letter", "bag", "key", "map", "present", "coat", "newspaper")
# fmt: off
NAMES = (
    "James", "John", "Robert", "Michael", "David", "William", "Richard", "Joseph", "Thomas", "Charles",
    "Mary", "Patricia", "Linda", "Elizabeth", "Barbara", "Susan", "Sarah", "Karen", "Nancy", "Margaret",
    "Emily", "Carol", "Amanda", "Daniel", "Matthew", "Anthony", "Mark", "Donald", "Steven", "Paul",
    "Andrew", "Kevin", "Brian", "George", "Edward", "Jason", "Ryan", "Gary", "Eric", "Stephen", "Frank",
    "Anna", "Alice", "Peter", "Laura", "Helen", "Ruth", "Kate", "Jane", "Emma", "Grace", "Claire",
    "Martin", "Simon", "Adam", "Henry", "Jack", "Tom", "Luke",
)
# fmt: on
THRESHOLDS = (0.001, 0.01, 0.02, 0.04)
TOP = 10


@dataclass(frozen=True)
class Prompt:
    """An indirect-object prompt; `target` receives what `foil` gives."""

    text: str
    target: str
    foil: str


def prompts(engine: Engine, seed: int) -> Iterator[Prompt]:
    """Random prompts without end; names are single tokens, in either order."""
    chance = random.Random(seed)
    names = [n for n in NAMES if len(engine.tokenizer(" " + n, add_special_tokens=False).input_ids) == 1]
    while True:
        giver, receiver = chance.sample(names, 2)
        a, b = chance.sample((giver, receiver), 2)
        text = chance.choice(TEMPLATES).format(
            a=a, b=b, giver=giver, place=chance.choice(PLACES), thing=chance.choice(THINGS)
        )
        yield Prompt(text, " " + receiver, " " + giver)


@torch.no_grad()
def margin(engine: Engine, prompt: Prompt) -> tuple[float, bool]:
    """(logit(target) - logit(foil), whether the target is the very first choice) of the plain model."""
    ids = engine.tokenizer(prompt.text, return_tensors="pt").input_ids
    logits = engine.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    target = engine.token_id(prompt.target)
    return float(logits[target] - logits[engine.token_id(prompt.foil)]), int(logits.argmax()) == target


@torch.no_grad()
def ablation_effects(engine: Engine, prompt: Prompt) -> F64:
    """[L, H]: how far the margin falls when one head's output is zero at all positions.

    All ablations share one forward. The batch starts with the plain prompt and grows: before layer l, H
    copies of the plain row join, and in the copy for head h that head's slice of what o_proj is given is
    zero. Layers below l, which the ablation does not touch, are thus run once for all.
    """
    ids = engine.tokenizer(prompt.text, return_tensors="pt").input_ids
    layers, H = engine.model.model.layers, engine.info.n_heads

    def grow(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0]
        return (torch.cat([hidden, hidden[:1].expand(H, -1, -1)]), *args[1:]), kwargs

    def silence(_module: Any, args: tuple[Any, ...]) -> Any:
        z = args[0].clone()
        z[-H:].unflatten(-1, (H, -1)).mul_(1 - torch.eye(H)[:, None, :, None])
        return (z,)

    hooks = [layer.register_forward_pre_hook(grow, with_kwargs=True) for layer in layers]
    hooks += [layer.self_attn.o_proj.register_forward_pre_hook(silence) for layer in layers]
    try:
        logits = engine.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].double()
    finally:
        for hook in hooks:
            hook.remove()
    margins = logits[:, engine.token_id(prompt.target)] - logits[:, engine.token_id(prompt.foil)]
    effects: F64 = (margins[0] - margins[1:]).reshape(len(layers), H).numpy()
    return effects


@torch.no_grad()
def check_ablation(engine: Engine, prompt: Prompt, effects: F64) -> float:
    """Largest disagreement with a plain rerun of the model for some heads, one at a time."""
    worst = 0.0
    H = engine.info.n_heads
    for layer, head in ((0, 0), (3, 8), (17, 4), (23, 3), (29, 1)):
        width = engine.info.d_head

        def silence(_module: Any, args: tuple[Any, ...], head: int = head, width: int = width) -> Any:
            z = args[0].clone()
            z[..., head * width : (head + 1) * width] = 0
            return (z,)

        assert H * width == engine.model.model.layers[layer].self_attn.o_proj.in_features
        plain = margin(engine, prompt)[0]
        hook = engine.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
        try:
            silenced = margin(engine, prompt)[0]
        finally:
            hook.remove()
        worst = max(worst, abs(plain - silenced - float(effects[layer, head])))
    return worst


def route_importance(trace: Trace, threshold: float, heads: int) -> F64:
    """[L, H]: each head's weights on the attention edges of the route to the last position, summed."""
    route = trace.route(position=-1, threshold=threshold)
    result = np.zeros((trace.n_layers, heads))
    for edge in route.edges[route.edges["kind"] == "attention"]:
        of_edge = route.heads[edge["head_start"] : edge["head_end"]]
        np.add.at(result[edge["layer"]], of_edge["head"], of_edge["weight"])
    return result


def ranks(values: F64) -> F64:
    """Ranks from 0, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    result: F64 = mean_rank[inverse.ravel()]
    return result


def spearman(a: F64, b: F64) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    x, y = ranks(a.ravel()), ranks(b.ravel())
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def overlap(a: F64, b: F64, k: int = TOP) -> float:
    """Share of the k largest of `a` among the k largest of `b`; zeros are never among the largest."""

    def top(values: F64) -> set[int]:
        order = np.argsort(-values.ravel(), kind="stable")[:k]
        return {int(i) for i in order if values.ravel()[i] > 0}

    return len(top(a) & top(b)) / k


def comparisons(direct: F64, routes: dict[float, F64], effects: F64) -> dict[str, dict[str, float]]:
    """Every ranking against the effects, by name. A route has no sign, so it is held against magnitudes."""
    half = len(effects) // 2
    size = np.abs(effects)
    pairs = {
        "direct, signed": (direct, effects),
        "direct, signed, upper half of layers": (direct[half:], effects[half:]),
        "direct, magnitude": (np.abs(direct), size),
        **{f"route {t:g}, magnitude": (r, size) for t, r in routes.items()},
        "route 0.01, signed": (routes[0.01], effects),
    }
    return {
        name: {"spearman": spearman(ranking, truth), "overlap": overlap(ranking, truth)}
        for name, (ranking, truth) in pairs.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation and extremes."""
    a = np.array(values)
    return {
        "mean": float(a.mean()),
        "std": float(a.std(ddof=1)) if len(a) > 1 else 0.0,
        "min": float(a.min()),
        "max": float(a.max()),
    }


def strongest(values: F64, k: int = TOP) -> list[list[float]]:
    """The k heads of largest magnitude as [layer, head, value]."""
    order = np.argsort(-np.abs(values).ravel(), kind="stable")[:k]
    H = values.shape[1]
    return [[int(i) // H, int(i) % H, round(float(values.ravel()[i]), 4)] for i in order]


def study(wanted: int, ablated: int, seed: int) -> dict[str, Any]:
    """Everything that the JSON holds."""
    started = time.perf_counter()
    engine = lmtt.load(device="cpu")
    H = engine.info.n_heads
    drawn = first_choice = 0
    closure: list[float] = []
    margins: list[float] = []
    direct_share: list[float] = []
    sums = {"direct": np.zeros((engine.info.n_layers, H))}
    records: list[dict[str, Any]] = []
    stacks: dict[str, list[F64]] = {"direct": [], "effects": [], **{f"route {t:g}": [] for t in THRESHOLDS}}
    disagreement = 0.0
    for prompt in prompts(engine, seed):
        drawn += 1
        own, first = margin(engine, prompt)
        if own <= 0:
            continue
        first_choice += first
        trace = engine.trace(prompt.text, floor=min(THRESHOLDS), targets=[prompt.target, prompt.foil])
        parts = trace.logit_contributions(prompt.target, foil=prompt.foil)
        direct = parts.per_head.astype(np.float64)
        sums["direct"] += direct
        margins.append(own)
        closure.append(abs(parts.total - own))
        direct_share.append(float(direct.sum()) / own)
        if len(records) < ablated:
            effects = ablation_effects(engine, prompt)
            if len(records) < 3:
                disagreement = max(disagreement, check_ablation(engine, prompt, effects))
            routes = {t: route_importance(trace, t, H) for t in THRESHOLDS}
            stacks["direct"].append(direct)
            stacks["effects"].append(effects)
            for t, importance in routes.items():
                stacks[f"route {t:g}"].append(importance)
            records.append(
                {
                    **asdict(prompt),
                    "tokens": len(trace.tokens),
                    "margin": own,
                    "comparisons": comparisons(direct, routes, effects),
                    "direct": np.round(direct, 4).tolist(),
                    "effects": np.round(effects, 4).tolist(),
                    "route 0.01": np.round(routes[0.01], 4).tolist(),
                }
            )
        if len(margins) == wanted:
            break
    names = list(records[0]["comparisons"])
    mean = {name: np.mean(stack, axis=0) for name, stack in stacks.items()}
    mean_routes = {t: mean[f"route {t:g}"] for t in THRESHOLDS}
    return {
        "model": engine.info.name,
        "seed": seed,
        "prompts": {
            "drawn": drawn,
            "solved": len(margins),
            "first_choice": first_choice,
            "ablated": len(records),
        },
        "margin": spread(margins),
        "closure": {"largest": max(closure), **spread(closure)},
        "heads_share_of_margin": spread(direct_share),
        "ablation_check": disagreement,
        "by_prompt": {
            name: {
                figure: spread([r["comparisons"][name][figure] for r in records])
                for figure in ("spearman", "overlap")
            }
            for name in names
        },
        "averaged_over_prompts": comparisons(mean["direct"], mean_routes, mean["effects"]),
        "between_prompts": _agreement(stacks["effects"]),
        "by_depth": by_depth(records),
        "depth_alone": depth_alone(records),
        "heads": named_heads(records, strongest(mean["effects"]) + strongest(mean["direct"])),
        "strongest": {
            "direct (all solved prompts)": strongest(sums["direct"] / len(margins)),
            "effects (ablated prompts)": strongest(mean["effects"]),
            "route 0.01 (ablated prompts)": strongest(mean["route 0.01"]),
        },
        "settings": {"thresholds": THRESHOLDS, "top": TOP, "floor": min(THRESHOLDS)},
        "versions": {
            "lmtt": lmtt.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": time.perf_counter() - started,
        "records": records,
    }


def _agreement(effects: list[F64]) -> dict[str, dict[str, float]]:
    """How far the effects themselves agree between neighbouring prompts: what any ranking is up against."""
    pairs = list(pairwise(effects))
    return {
        "spearman": spread([spearman(a, b) for a, b in pairs]),
        "overlap": spread([overlap(np.abs(a), np.abs(b)) for a, b in pairs]),
    }


def _stack(records: list[dict[str, Any]], name: str) -> F64:
    """[prompts, L, H]"""
    return np.array([record[name] for record in records])


def by_depth(records: list[dict[str, Any]], layers: int = 5) -> list[dict[str, float]]:
    """Layer by layer groups: mean Spearman over prompts within a group, and mean sizes."""
    direct, effects, route = (_stack(records, name) for name in ("direct", "effects", "route 0.01"))
    groups = []
    for first in [*range(0, direct.shape[1], layers), direct.shape[1] - 1]:
        last = min(first + layers, direct.shape[1])
        d, e, r = (x[:, first:last] for x in (direct, effects, route))
        signed = [spearman(a, b) for a, b in zip(d, e, strict=True)]
        sized = [spearman(a, np.abs(b)) for a, b in zip(r, e, strict=True)]
        groups.append(
            {
                "first": first,
                "last": last - 1,
                "direct, signed": float(np.nanmean(signed)),
                "route 0.01, magnitude": float(np.nanmean(sized)),
                "mean |direct|": float(np.abs(d).mean()),
                "mean |effect|": float(np.abs(e).mean()),
                "pearson of direct and effect": float(np.corrcoef(d.ravel(), e.ravel())[0, 1]),
            }
        )
    return groups


def depth_alone(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What "earlier layers first" achieves against magnitudes: a ranking that knows nothing of a head."""
    effects = np.abs(_stack(records, "effects"))
    L, H = effects.shape[1:]
    depth = np.repeat(np.arange(L, 0, -1.0), H).reshape(L, H)
    return {
        "spearman": spread([spearman(depth, e) for e in effects]),
        "overlap": spread([overlap(depth, e) for e in effects]),
    }


def named_heads(records: list[dict[str, Any]], heads: list[list[float]]) -> list[dict[str, float]]:
    """Means over the ablated prompts of some heads, by falling size of the effect."""
    direct, effects, route = (_stack(records, name) for name in ("direct", "effects", "route 0.01"))
    rows = [
        {
            "layer": layer,
            "head": head,
            "direct": float(direct[:, layer, head].mean()),
            "effect": float(effects[:, layer, head].mean()),
            "effect std": float(effects[:, layer, head].std(ddof=1)) if len(records) > 1 else 0.0,
            "route 0.01": float(route[:, layer, head].mean()),
        }
        for layer, head in sorted({(int(layer), int(head)) for layer, head, _ in heads})
    ]
    return sorted(rows, key=lambda row: -abs(row["effect"]))


def tables(result: dict[str, Any]) -> str:
    """The tables of docs/faithfulness.md."""
    lines = [
        "| ranking against zero-ablation | Spearman, per prompt | top-10 in common, per prompt "
        "| Spearman, averaged | top-10, averaged |",
        "|---|---|---|---|---|",
    ]
    for name, figures in result["by_prompt"].items():
        rho, top = figures["spearman"], figures["overlap"]
        whole = result["averaged_over_prompts"][name]
        lines.append(
            f"| {name} | {rho['mean']:.2f} ± {rho['std']:.2f} ({rho['min']:.2f} to {rho['max']:.2f}) "
            f"| {TOP * top['mean']:.1f} ± {TOP * top['std']:.1f} "
            f"| {whole['spearman']:.2f} | {TOP * whole['overlap']:.0f} |"
        )
    alone = result["depth_alone"]
    rho, top = alone["spearman"], alone["overlap"]
    lines += [
        f"| earlier layers first, magnitude | {rho['mean']:.2f} ± {rho['std']:.2f} "
        f"({rho['min']:.2f} to {rho['max']:.2f}) | {TOP * top['mean']:.1f} ± {TOP * top['std']:.1f} | | |",
        "",
        "| layers | direct, signed | route 0.01, magnitude | mean abs. direct | mean abs. effect |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {g['first']} to {g['last']} | {g['direct, signed']:.2f} | {g['route 0.01, magnitude']:.2f} "
        f"| {g['mean |direct|']:.3f} | {g['mean |effect|']:.3f} |"
        for g in result["by_depth"]
    ]
    lines += [
        "",
        "| head | effect when silenced | direct attribution | route weight, 0.01 |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| L{h['layer']}.{h['head']} | {h['effect']:+.2f} ± {h['effect std']:.2f} "
        f"| {h['direct']:+.2f} | {h['route 0.01']:.3f} |"
        for h in result["heads"]
    ]
    short = ("prompts", "margin", "closure", "heads_share_of_margin", "between_prompts", "ablation_check")
    return "\n".join(lines) + "\n\n" + json.dumps({k: result[k] for k in short}, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="attribution rankings against zero-ablation")
    parser.add_argument("--prompts", type=int, default=200, help="solved prompts to attribute")
    parser.add_argument("--ablated", type=int, default=200, help="of these, prompts to ablate every head on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faithfulness.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = study(options.prompts, min(options.ablated, options.prompts), options.seed)
    result["settings"]["threads"] = options.threads
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(tables(result))


if __name__ == "__main__":
    main()
