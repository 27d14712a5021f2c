"""One figure in a fresh process: `python benchmarks/measure.py JSON`, the result as JSON on the last line.

1. Read what is needed: a saved case for kernels, the saved model for whole passes.
2. Warm up on a few tokens, so that code, threads and weights are there.
3. The first call at full size gives the peak of memory above what the process held before it; where it took
   long, it is the only one. Otherwise it is the warm-up and further calls give the times.

A call that takes longer than the limit ends the process by an alarm, one that needs more memory than there is
fails by the limit on the data segment: the parent reads which from how this process ended.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

ENOUGH_CALLS = 7
WARM_UP_TOKENS = 16
PAIRED_TOKENS = (256, 512, 1024)  # lengths at which traces and plain forwards take turns
PAIRS = 9
SHARES = 9  # calls that take turns with the ceiling
BURST = 20_000_000  # rounds of multiply-adds: long enough for threads to be on processors of their own
ROUNDS, OURS_IN_A_ROUND = 3, 3  # of methods that take turns
PATCHES = 6  # forward passes sampled for the price of activation patching
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Figure:
    """What to measure. `folder` holds what `prepare` wrote."""

    what: str  # attention | turns | share | neurons | forward | everything | patching
    method: str  # who does it: ours, a peer, or a variant ("all" or "last" logits of a forward)
    tokens: int
    folder: str
    layers: tuple[int, ...]
    threads: int
    screen: float | None = None
    chunks: tuple[int, int] | None = None
    budget: float = 4.0  # seconds of repeated calls per layer, beyond the first
    call_limit: int = 0  # seconds that one call may take; 0: any
    memory_limit: int = 0  # bytes of data that the process may hold; 0: any


# --- instruments ------------------------------------------------------------------------------------------


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def settle() -> int:
    """Give freed memory back, start the peak anew, and say what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    return status_bytes("VmRSS")


@dataclass(frozen=True)
class Timing:
    """Repeated calls of one thing."""

    seconds: tuple[float, ...]  # without the first, unless that is all there is
    workspace: int  # bytes: peak of the first call above what was resident before it
    peak: int  # bytes resident at most
    results: tuple[Any, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)


def timed(call: Callable[[], Any], budget: float, limit: int = 0, least: int = 0) -> Timing:
    """Call once for memory, then for time: `ENOUGH_CALLS`, fewer if the budget is spent, `least` whatever."""
    before = settle()
    seconds: list[float] = []
    results: list[Any] = []
    while True:
        if limit:
            signal.alarm(limit)
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        if limit:
            signal.alarm(0)
        if len(seconds) == 1:
            peak = status_bytes("VmHWM")
        results.append(summary(result))
        del result
        spent = sum(seconds[1:]) + seconds[-1]  # the next one included
        if len(seconds) > ENOUGH_CALLS or (len(seconds) > least and spent > budget):
            break
    return Timing(tuple(seconds[1:] or seconds), peak - before, peak, tuple(results))


def summary(result: Any) -> Any:
    """What is kept of a result: numbers, not tensors."""
    if hasattr(result, "evaluated"):
        return {"evaluated": result.evaluated, "positive": result.positive}
    return result if isinstance(result, dict) else None


# --- figures ----------------------------------------------------------------------------------------------


def measure_attention(figure: Figure) -> dict[str, Any]:
    """Attention contributions of all heads, layer by layer."""
    return _by_layer(figure, lambda case: _attention(case, figure.method, figure.screen, figure.chunks))


def _attention(
    case: Any, method: str, screen: float | None, chunks: tuple[int, int] | None
) -> Callable[[], Any]:
    """What is timed: one layer's attention contributions by one method."""
    import cases
    import peers

    from lmtt.kernels import registry

    match method:
        case "ours":
            assert screen is not None
            screened = replace(cases.as_stored(case).attention, screen=screen)
            return lambda: registry.run("attention_contributions", screened)[0]
        case "flashtrace":
            assert chunks is not None
            return peers.flashtrace(case, chunks)
        case peer:
            function = {
                "plain_torch": peers.plain_torch,
                "materialised": peers.materialised,
                "compiled_torch": peers.compiled_torch,
            }[peer]
            return lambda: function(case.attention)


def measure_turns(figure: Figure) -> dict[str, Any]:
    """Ours, plain torch and FlashTrace at its best chunks take turns on the same layers.

    A shared machine is faster now and slower then, and what is measured minutes apart has that in its ratio.
    """
    import cases

    layers = []
    for layer in figure.layers:
        path = Path(figure.folder) / f"layer-{layer}.safetensors"
        case = cases.load(path, figure.tokens)
        calls = {
            "ours 0.001": _attention(case, "ours", 1e-3, None),
            "ours 0": _attention(case, "ours", 0.0, None),
            "plain_torch": _attention(case, "plain_torch", None, None),
        }
        if figure.chunks is not None:
            calls["flashtrace"] = _attention(case, "flashtrace", None, figure.chunks)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(ROUNDS + 1):  # the first is not counted
            for name, call in calls.items():
                for _ in range(OURS_IN_A_ROUND if name.startswith("ours") else 1):
                    start = time.perf_counter()
                    call()
                    if number:
                        seconds[name].append(time.perf_counter() - start)
        layers.append({"layer": layer, "turns": seconds})
    return {"by_layer": layers}


def measure_share(figure: Figure) -> dict[str, Any]:
    """Exact evaluation of attention where every coordinate is read, in turns with the ceiling it is held to.

    `seconds` is of that step by the kernels' own clock, `ceiling` the multiply-adds in registers
    per second (float32 lanes) right before and after: a shared machine is faster now and slower then.
    """
    import cases
    import peers

    from lmtt import _C
    from lmtt.kernels import registry, stages

    assert figure.screen is not None

    def ceiling() -> float:
        start = time.perf_counter()
        done = float(_C.multiply_adds(BURST, figure.threads)[0])
        return done / (time.perf_counter() - start)

    layers = []
    for layer in figure.layers:
        case = cases.load(Path(figure.folder) / f"layer-{layer}.safetensors", figure.tokens)
        task = replace(cases.nothing_to_skip(cases.as_stored(case).attention), screen=figure.screen)
        evaluation, rates = [], [ceiling()]
        for number in range(SHARES + 1):  # the first is not counted
            with stages.listening() as seconds:
                result = registry.run("attention_contributions", task)[0]
            rates.append(ceiling())
            if number:
                evaluation.append(seconds["exact evaluation"])
        around = [(before + after) / 2 for before, after in itertools.pairwise(rates)][1:]
        layers.append(
            {
                "layer": layer,
                "evaluated": result.evaluated,
                "sources": peers.sources_above(task),
                "seconds": evaluation,
                "ceiling": around,
            }
        )
    return {"by_layer": layers}


def measure_neurons(figure: Figure) -> dict[str, Any]:
    """Contributions of all neurons at every position, layer by layer."""
    import cases

    from lmtt.kernels import registry

    def prepared(case: cases.Case) -> Callable[[], Any]:
        assert figure.screen is not None
        task = replace(cases.as_stored(case).neurons, screen=figure.screen)
        return lambda: registry.run("neuron_contributions", task)[0]

    return _by_layer(figure, prepared)


def _by_layer(figure: Figure, prepared: Callable[[Any], Callable[[], Any]]) -> dict[str, Any]:
    """As many of the layers as three budgets allow, at least one."""
    import cases

    layers: list[dict[str, Any]] = []
    spent = 0.0
    for layer in figure.layers:
        path = Path(figure.folder) / f"layer-{layer}.safetensors"
        prepared(cases.load(path, WARM_UP_TOKENS))()
        case = cases.load(path, figure.tokens)
        start = time.perf_counter()
        timing = timed(prepared(case), figure.budget, figure.call_limit)
        spent += time.perf_counter() - start
        layers.append(
            {
                "layer": layer,
                "seconds": timing.seconds,
                "workspace": timing.workspace,
                "peak": timing.peak,
                **(timing.results[-1] or {}),
            }
        )
        if spent > 3 * figure.budget:
            break
    return {"by_layer": layers}


def measure_forward(figure: Figure) -> dict[str, Any]:
    """The model's plain forward, with logits at all positions or at the last one."""
    import peers

    engine, ids = _model(figure)

    def call() -> None:
        with torch.no_grad():
            peers.plain_forward(engine.model, ids[:, : figure.tokens], all_logits=figure.method == "all")

    with torch.no_grad():
        peers.plain_forward(engine.model, ids[:, :WARM_UP_TOKENS], all_logits=True)
    timing = timed(call, figure.budget, figure.call_limit)
    return {"seconds": timing.seconds, "workspace": timing.workspace, "peak": timing.peak}


def measure_everything(figure: Figure) -> dict[str, Any]:
    """engine.trace and one route: attention, neurons at every position, predictions and the graph.

    `attribution` is what the kernels and the route took, without running the model, proving closure, or
    predicting; `total` is all of it. Each call reads the text from one token further on, so that nothing is
    remembered from the one before. `paired` has [attribution, total, plain forward with all logits] of calls
    that took turns: a shared machine is faster now and slower then, and their ratio does not see it.
    """
    import peers

    from lmtt.profile.clock import ATTRIBUTION

    engine, ids = _model(figure)
    options: dict[str, Any] = {} if figure.screen is None else {"screen": figure.screen}
    engine.trace(input_ids=ids[0, :WARM_UP_TOKENS], **options).route()  # closure is proved here
    number = 0

    def call() -> dict[str, Any]:
        nonlocal number
        start = time.perf_counter()
        trace = engine.trace(input_ids=ids[0, number : number + figure.tokens], **options)
        traced = time.perf_counter()
        trace.route()
        end = time.perf_counter()
        number += 1
        phases = dict(trace.cost["seconds"])
        return {
            "phases": {**phases, "routes": end - traced},
            "attribution": sum(phases.get(phase, 0.0) for phase in ATTRIBUTION) + end - traced,
            "total": end - start,
            "result_bytes": result_bytes(trace.data),
            "edges": len(trace.data.edges.source),
            "rows_reevaluated": trace.cost["rows_reevaluated"],
            "pairs": trace.cost["pairs"],
            "neurons": trace.cost["neurons"],
        }

    timing = timed(call, figure.budget, figure.call_limit)
    runs = timing.results[1:] or timing.results

    def pair() -> list[float]:
        start = time.perf_counter()
        with torch.no_grad():
            peers.plain_forward(engine.model, ids[:, number : number + figure.tokens], all_logits=True)
        forward = time.perf_counter() - start
        run = call()
        return [run["attribution"], run["total"], forward]

    paired = figure.tokens in PAIRED_TOKENS and figure.screen is not None
    return {
        "seconds": timing.seconds,
        "attribution": [run["attribution"] for run in runs],
        "paired": [pair() for _ in range(PAIRS)] if paired else [],
        "phases": {name: median(run["phases"][name] for run in runs) for name in runs[0]["phases"]},
        "workspace": timing.workspace,
        "peak": timing.peak,
        "rss_anon": status_bytes("RssAnon"),
        **{k: runs[-1][k] for k in ("result_bytes", "edges", "rows_reevaluated", "pairs", "neurons")},
    }


def result_bytes(data: Any) -> int:
    """Bytes of the arrays that a trace keeps."""
    groups = (data, data.edges, data.neurons, data.predictions)
    return sum(int(getattr(x, "nbytes", 0)) for group in groups for x in vars(group).values())


def measure_patching(figure: Figure) -> dict[str, Any]:
    """Zero one head at one position and run the model again, for a few (layer, head, position)."""
    import peers

    from lmtt.structure.replay import find_layers

    engine, ids = _model(figure)
    _, stack = find_layers(engine.model)
    info = engine.info
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def call() -> None:
        with torch.no_grad():
            layer = stack[draw(len(stack))]
            head, position = draw(info.n_heads), draw(figure.tokens)
            peers.patched_forward(engine.model, layer, ids[:, : figure.tokens], head, info.d_head, position)

    timing = timed(call, figure.budget, figure.call_limit, least=min(PATCHES, 2))
    return {
        "seconds": timing.seconds,
        "workspace": timing.workspace,
        "peak": timing.peak,
        "importances": info.n_layers * info.n_heads * figure.tokens,
    }


def _model(figure: Figure) -> tuple[Any, torch.Tensor]:
    from safetensors.torch import load_file

    import lmtt

    engine = lmtt.load(Path(figure.folder) / "model")
    return engine, load_file(Path(figure.folder) / "ids.safetensors")["ids"]


# --- what the other processes read ------------------------------------------------------------------------


def prepare(folder: Path, tokens: int, model: str | None) -> dict[str, Any]:
    """Write the model in float32, the text's token ids and the sampled layers' cases to `folder`.

    `model` is what `lmtt.load` takes, or `tiny` for a random model of the tests.
    """
    import cases
    from safetensors.torch import save_file

    import lmtt
    from lmtt.kernels import registry

    if model == "tiny":
        from lmtt.testing_models import tiny_model

        size: dict[str, Any] = {
            "max_position_embeddings": 2 * tokens,
            "attention_bias": False,
            "mlp_bias": False,
        }
        engine = lmtt.load(tiny_model("llama", layers=2, **size))
    else:
        engine = lmtt.load(model, device="cpu", dtype="float32")
    ids = cases.token_ids(engine, tokens + ENOUGH_CALLS + 1)
    save_file({"ids": ids}, folder / "ids.safetensors")
    save_model(engine.model, folder / "model")
    if engine.tokenizer is not None:
        engine.tokenizer.save_pretrained(folder / "model")
    layers = cases.sampled_layers(engine.info.n_layers)
    for case in cases.capture(engine, ids[:, :tokens], layers):
        cases.save(case, folder / f"layer-{case.layer}.safetensors")
    sizes = asdict(engine.info)
    return {"model": sizes, "layers": layers, "backends": registry.availability()}


def save_model(model: Any, folder: Path) -> None:
    """Weights and config as they are in memory: loading them again takes a second, not a dequantisation."""
    import copy

    from safetensors.torch import save_model as save_weights

    folder.mkdir()
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    config.save_pretrained(folder)
    save_weights(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


FIGURES: dict[str, Callable[[Figure], dict[str, Any]]] = {
    "attention": measure_attention,
    "turns": measure_turns,
    "share": measure_share,
    "neurons": measure_neurons,
    "forward": measure_forward,
    "everything": measure_everything,
    "patching": measure_patching,
}


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["what"] == "prepare":
        torch.set_num_threads(request["threads"])
        print(json.dumps(prepare(Path(request["folder"]), request["tokens"], request["model"])))
        return
    request = {k: tuple(v) if isinstance(v, list) else v for k, v in request.items()}
    figure = Figure(**request)
    torch.set_num_threads(figure.threads)
    if figure.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (figure.memory_limit, figure.memory_limit))
    try:
        print(json.dumps({"status": "ok", **FIGURES[figure.what](figure)}))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(json.dumps({"status": OUT_OF_MEMORY}))


if __name__ == "__main__":
    main()
