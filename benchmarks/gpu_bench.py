"""Times the GPU engine against its peers on layers of real shapes, and writes JSON and a table.

    python benchmarks/gpu_bench.py [--shapes NAME ...] [--tokens T ...] [--seconds S] [--json FILE]
    TRITON_INTERPRET=1 python benchmarks/gpu_bench.py --dry-run

For each shape and length: SDPA's flash forward, which no other of torch's attentions may stand in for, and
the layer's own forward (the price to be at), the tile pass given W_O r and the log-sum-exp, these two alone,
the kernel of whole tiles, attention and neurons of one layer as traced and at screen 0, a materialised torch
decomposition where it fits, and FlashTrace's inner loop at its chunk sizes. Patterns have a sink, a local
band and a few far heads, never noise alone; real activations are measured too where gpu_capture.py has left
some. Each figure is the median of repetitions timed with device events; what time does not allow is listed as
such. Memory is what an op holds beside its results with the workspace that it has by default; times are with
1 GiB. `gates` in the JSON hold what was measured against what was promised.
The JSON is written anew after each layer, so that a later failure loses nothing; a layer that fails is listed
with its error, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import cases
import gpu_aot
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils._pytree import tree_leaves

from lmtt.kernels import registry
from lmtt.kernels.budget import WORKSPACE as DEFAULT_WORKSPACE
from lmtt.kernels.directional_attention.fused import launch_tiles, row_logsumexp
from lmtt.kernels.proximity.fused import DENSE_SOURCES, launch_dense
from lmtt.kernels.triton_host import Operands, chip, operands, product
from lmtt.kernels.types import Attention, AttentionTask, NeuronTask

WORKSPACE = 1 << 30
TOKENS = [512, 2048, 4096, 8192]
ACTIVATIONS = Path(__file__).resolve().parent.parent / "build/gpu-activations"
AS_TRACED: dict[str, Any] = {"screen": 1e-4, "max_certificate": 0.05, "keep": 1e-3}
FLOOR = (
    1e-3  # at which a layer is held to its forward; a trace at this floor screens attention at a tenth of it
)
FLASH = SDPBackend.FLASH_ATTENTION
DESTINATIONS, SOURCES = 32, 128  # FlashTrace's chunks
MOST_DENSE = 3e13  # coordinates of pairs that Triton's exact evaluation gets: a few seconds
MOST_FLASHTRACE = 3e12  # and that FlashTrace's loop gets
FLASH_LIMIT = 1.6  # of the flash forward's time, for the tile pass at T >= 2048
DENSE_LIMIT = 0.7  # of what the chip can issue, for the kernel of whole tiles
MEMORY_LIMIT = 0.05  # of the layer forward's own peak, beside results
COUNTED = Path(__file__).resolve().parent / "results/gpu-aot.json"  # instructions by gpu_aot.py


@dataclass(frozen=True)
class Shape:
    """One layer."""

    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int


SHAPES = {
    "smollm2-135m": Shape(9, 3, 64, 576, 1536),
    "llama-3-8b": Shape(32, 8, 128, 4096, 14336),
    "llama-3-70b": Shape(64, 8, 128, 8192, 28672),
}
TINY = {"tiny": Shape(2, 1, 16, 48, 64)}  # of a dry run


class Machine:
    """The device that is measured, or the CPU, on which only the logic of this script can be tried."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"

    def milliseconds(self, work: Callable[[], Any], seconds: float) -> float:
        """Median time of one call, by device events, after a warm-up."""
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return (time.perf_counter() - begin) * 1e3
        work()
        torch.cuda.synchronize()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 3 or (time.monotonic() < end and len(times) < 50):
            begin_event, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin_event.record()
            work()
            stop.record()
            stop.synchronize()
            times.append(begin_event.elapsed_time(stop))
        return statistics.median(times)

    def peak(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What a call returns, and the bytes that it held at most beyond what there was before."""
        if not self.cuda:
            return work(), 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - before

    def free(self) -> int:
        return int(torch.cuda.mem_get_info()[0]) if self.cuda else 1 << 30

    def name(self) -> str:
        return torch.cuda.get_device_properties(0).name if self.cuda else "cpu, interpreted: no measurement"


@dataclass(frozen=True)
class Layer:
    """Tasks of one bf16 layer whose parts add up to its wholes, and the layer's own forward."""

    name: str
    attention: AttentionTask
    neurons: NeuronTask
    forward: Callable[[], Tensor] | None  # None where only activations are known


def synthetic(name: str, tokens: int, device: str) -> Layer:
    """A layer of one of SHAPES with random weights and planted attention."""
    torch.manual_seed(0)
    s, dtype = (SHAPES | TINY)[name], torch.bfloat16

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(scale)

    x = draw(tokens, s.d_model)
    w_q, w_k, w_v = (
        draw(s.d_model, n * s.d_head, scale=s.d_model**-0.5) for n in (s.heads, s.kv_heads, s.kv_heads)
    )
    q, k, v = ((x @ w).view(tokens, -1, s.d_head).transpose(0, 1).contiguous() for w in (w_q, w_k, w_v))
    # A sink at the first token; positions make near tokens alike (a local band) but for every eighth head.
    steps = torch.arange(tokens, device=device, dtype=torch.float32)
    angle = steps[:, None] / torch.logspace(0.3, 2.5, s.d_head // 4, device=device)
    local = torch.cat([angle.cos(), angle.sin()], 1).to(dtype) * 1.6
    near = torch.arange(s.heads, device=device) % 8 != 0
    q[near, :, : s.d_head // 2] += local
    k[:, :, : s.d_head // 2] += local
    q[..., -1], k[..., -1] = 4.0, 0.0
    k[:, 0, -1] = 0.6 * s.d_head**0.5
    w_o = draw(s.heads, s.d_head, s.d_model, scale=(s.heads * s.d_head) ** -0.5)
    attention = Attention(q, k, v, w_o, scale=s.d_head**-0.5)
    w_gate, w_up = (draw(s.d_model, s.d_mlp, scale=s.d_model**-0.5) for _ in range(2))
    w_down = draw(s.d_mlp, s.d_model, scale=s.d_mlp**-0.5)

    def attend() -> Tensor:
        out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        return out.transpose(0, 1).reshape(tokens, -1) @ w_o.view(-1, s.d_model)

    def forward() -> Tensor:
        for w in (w_q, w_k, w_v):
            x @ w
        mid = x + attend()
        return mid + (silu(mid @ w_gate) * (mid @ w_up)) @ w_down

    mid = x + attend()
    act = silu(mid @ w_gate) * (mid @ w_up)
    post = mid + act @ w_down
    return Layer(
        name,
        AttentionTask(attention, x, mid, workspace=WORKSPACE, **AS_TRACED),
        NeuronTask(act, w_down, mid, post, k=20, screen=1e-3, workspace=WORKSPACE),
        forward,
    )


def captured(path: Path, tokens: int, device: str) -> Layer:
    """The first tokens of a real layer's activations, as gpu_capture.py wrote them."""
    case = cases.load(path, tokens)

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device)
        if isinstance(x, tuple):
            return tuple(moved(y) for y in x)
        if hasattr(x, "__dataclass_fields__"):
            return replace(x, **{f.name: moved(getattr(x, f.name)) for f in fields(x)})
        return x

    attention = replace(moved(case.attention), workspace=WORKSPACE, **AS_TRACED)
    neurons = replace(moved(case.neurons), screen=1e-3, workspace=WORKSPACE)
    return Layer(f"captured {path.stem}", attention, neurons, None)


def materialised(task: AttentionTask) -> Tensor:
    """Every part written out and measured, as published tools do; proximities [T, H, T]."""
    a = task.attention
    v = a.v.repeat_interleave(a.group, 0)
    logits = (a.q @ a.k.repeat_interleave(a.group, 0).mT).float() * a.scale
    logits.masked_fill_(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)
    parts = torch.einsum("hij,hjd->ihjd", logits.softmax(-1).to(v.dtype), v @ a.w_o)
    y = task.whole[:, None, None, :]
    return (y.float().abs().sum(-1) - (y - parts).float().abs().sum(-1)).clamp(min=0)


def flashtrace_chunks(task: AttentionTask, every: int = 1) -> Tensor:
    """FlashTrace's inner loop, written anew: 32 destinations by 128 sources, all heads at once; edges [T, T].

    It is given the pattern's log-sum-exp for nothing. With `every` only each such block of destinations.
    """
    a, tokens, device = task.attention, task.whole.shape[0], task.whole.device
    edges = torch.zeros(tokens, tokens, device=device)
    k, v = (x.repeat_interleave(a.group, 0) for x in (a.k, a.v))
    for i0 in range((every - 1) // 2 * DESTINATIONS, tokens, DESTINATIONS * every):
        i1 = min(tokens, i0 + DESTINATIONS)
        i = torch.arange(i0, i1, device=device)
        logits = (a.q[:, i0:i1] @ k[:, :i1].mT).float() * a.scale
        logits.masked_fill_(torch.arange(i1, device=device) > i[:, None], -torch.inf)
        pattern = logits.softmax(-1)
        y = task.whole[i0:i1].float()
        mass = y.abs().sum(-1)[:, None, None]
        for j0 in range(0, i1, SOURCES):
            j1 = min(i1, j0 + SOURCES)
            u = torch.einsum("hje,hed->jhd", v[:, j0:j1], a.w_o)
            parts = pattern[:, :, j0:j1].permute(1, 2, 0)[..., None] * u.float()
            parts -= y[:, None, None]
            edges[i0:i1, j0:j1] = (mass - parts.abs().sum(-1)).clamp_(min=0).sum(-1)
    return edges


def held_results(outcome: Any) -> int:
    """Bytes of what an op's result keeps."""
    tensors = [x for x in tree_leaves(list(vars(outcome).values())) if isinstance(x, Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def dense_share(layer: Layer, of: Operands, lse: Tensor, machine: Machine, seconds: float) -> dict[str, Any]:
    """The kernel of whole tiles alone: its time, and the share of what the chip can issue meanwhile.

    By the instructions that gpu_aot.py counted for 16-bit heads of 128, at an H100's clock.
    """
    tokens, d_model = layer.attention.whole.shape
    rows = torch.arange(tokens, device=machine.device)
    head, block = torch.arange(of.attention.heads), torch.arange(min(64, -(-tokens // DENSE_SOURCES)))
    last = torch.tensor([(tokens - 1) // 32])  # destinations that see all of these sources
    tiles = torch.cartesian_prod(head, block, last).int().to(machine.device)
    time = machine.milliseconds(lambda: launch_dense(layer.attention, of, rows, lse, tiles, 0), seconds)
    result: dict[str, Any] = {"dense_tiles": time}
    counted = {(r["name"], r["chip"]): r["per_element"] for r in json.loads(COUNTED.read_text())}
    each = counted.get(("dense bf16 128", chip(lse)))
    if each is None or of.v.shape[2] != 128:
        result["dense_issue_share"] = "not known: instructions were counted for sm_80 and sm_90, heads of 128"
    else:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        coordinates = len(tiles) * 32 * DENSE_SOURCES * d_model
        result["dense_issue_share"] = coordinates * each / (processors * 128 * gpu_aot.CLOCK * time / 1e3)
    return result


def measure_kernels(layer: Layer, machine: Machine, seconds: float) -> dict[str, Any]:
    """The regular kernels and their peers; nothing outlives this function."""
    a, tokens = layer.attention.attention, layer.attention.whole.shape[0]
    heads, d_model = a.heads, a.w_o.shape[2]
    of = operands(a)
    rows = torch.arange(tokens, device=machine.device)
    signs = torch.where(layer.attention.whole < 0, -1.0, 1.0).to(a.w_o.dtype)
    towards, lse = of.directions(signs, rows), row_logsumexp(of)
    edges = torch.zeros(tokens, tokens, device=machine.device)
    sums = torch.zeros(heads, tokens, device=machine.device)
    flat = a.w_o.reshape(-1, d_model)
    run: dict[str, Callable[[], Any]] = {
        "tile_pass": lambda: launch_tiles(of, lse, rows, towards, edges, "heads"),
        "row_sums": lambda: launch_tiles(of, lse, rows, towards, sums, "sources"),
        "log_sum_exp": lambda: row_logsumexp(of),
        "projection": lambda: product(signs, flat),
    }
    peers: dict[str, Callable[[], Any]] = {
        "flash_forward": lambda: scaled_dot_product_attention(
            a.q[None], a.k[None], a.v[None], is_causal=True, enable_gqa=True
        )
    }
    if layer.forward is not None:
        peers["layer_forward"] = layer.forward
    # No other of torch's attentions may stand in for it: where it cannot run, this raises.
    result: dict[str, Any] = {"sdpa_backend": FLASH.name}
    with sdpa_kernel(FLASH):
        result |= {label: machine.milliseconds(work, seconds) for label, work in peers.items()}
    result |= {label: machine.milliseconds(work, seconds) for label, work in run.items()}
    result["tile_pass_over_flash"] = result["tile_pass"] / result["flash_forward"]
    result |= dense_share(layer, of, lse, machine, seconds)
    side = 8192 if machine.cuda else 64
    square = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    dense = 2.0 * side**3 / machine.milliseconds(lambda: square @ square, seconds)
    result["projection_rate_over_gemm"] = 2.0 * tokens * flat.numel() / result["projection"] / dense
    return result


def measure_backend(backend: str, layer: Layer, machine: Machine, seconds: float) -> dict[str, Any]:
    """Attention and neurons by one backend, as traced and at screen 0, by its name; or why it cannot run."""
    reason = registry.availability()[backend]
    if reason is not None:
        return {backend: f"not run: {reason}"}
    result: dict[str, Any] = {}
    exact = replace(layer.attention, screen=0.0)
    dims = layer.attention.whole.shape[0] ** 2 * layer.attention.attention.w_o.numel()
    at_floor = replace(layer.attention, screen=FLOOR, max_certificate=1.0)
    tasks: list[tuple[str, AttentionTask | NeuronTask]] = [
        ("attention", layer.attention),
        ("attention_at_floor", at_floor),
        ("neurons", layer.neurons),
        ("neurons_exact", replace(layer.neurons, screen=0.0)),
    ]
    if backend == "cuda" or dims < MOST_DENSE:
        tasks.append(("attention_exact", exact))
    else:
        result[f"{backend}_attention_exact"] = "not run: more than the time given"
    for label, task in tasks:
        op = "neuron_contributions" if isinstance(task, NeuronTask) else "attention_contributions"
        small = replace(task, workspace=DEFAULT_WORKSPACE)
        outcome, held = machine.peak(lambda op=op, task=small: registry.run(op, task, backend=backend)[0])
        result[f"{backend}_{label}_bytes"] = max(0, held - held_results(outcome))
        result[f"{backend}_{label}_evaluated"] = outcome.evaluated
        result[f"{backend}_{label}_positive"] = outcome.positive
        result[f"{backend}_{label}"] = machine.milliseconds(
            lambda op=op, task=task: registry.run(op, task, backend=backend), seconds
        )
    return result


def measure(layer: Layer, machine: Machine, seconds: float) -> dict[str, Any]:
    """All figures of one layer, in milliseconds unless named otherwise."""
    attention, tokens = layer.attention, layer.attention.whole.shape[0]
    heads, _, d_model = attention.attention.w_o.shape
    shape = {"shape": layer.name, "tokens": tokens, "width": d_model}
    result = {**shape, **measure_kernels(layer, machine, seconds)}
    if layer.forward is not None:
        with sdpa_kernel(FLASH):
            _, result["layer_forward_bytes"] = machine.peak(layer.forward)
    for backend in ("cuda", "triton"):
        result |= measure_backend(backend, layer, machine, seconds)
        both = [result.get(f"{backend}_{op}") for op in ("attention_at_floor", "neurons")]
        if layer.forward is not None and all(isinstance(x, float) for x in both):
            result[f"{backend}_over_layer"] = sum(both) / result["layer_forward"]
            most = max(result[f"{backend}_{op}_bytes"] for op in ("attention_at_floor", "neurons"))
            own = result["layer_forward_bytes"]
            result[f"{backend}_bytes_over_layer"] = most / own if own else "not measured: no device"
    needed = 14.0 * heads * tokens**2 * d_model
    if needed > 0.6 * machine.free():
        result["materialised"] = f"not run: needs {needed / 2**30:.0f} GiB"
    else:
        result["materialised"] = machine.milliseconds(lambda: materialised(attention), 0.0)
    # Of long prompts a sample of its blocks of destinations, evenly spaced, scaled up.
    every = max(1, round(heads * d_model * tokens**2 / MOST_FLASHTRACE))
    every = min(every, -(-tokens // DESTINATIONS))
    work = machine.milliseconds(lambda: flashtrace_chunks(attention, every), 0.0)
    result["flashtrace_chunks"], result["flashtrace_blocks_measured"] = work * every, 1 / every
    return result


def gates(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was promised, beside what was measured; `met` is None where nothing was."""

    def gate(what: str, value: Any, limit: float, *, least: bool = False) -> dict[str, Any]:
        number = value if isinstance(value, float) else None
        met = None if number is None else bool(number >= limit if least else number <= limit)
        return {"gate": what, "got": number, "limit": limit, "met": met}

    for r in results:
        at = f"{r['shape']}, T = {r['tokens']}"
        big = r["shape"] in ("llama-3-8b", "llama-3-70b")
        if big and r["tokens"] >= 2048:
            yield gate(f"{at}: tile pass / flash forward", r.get("tile_pass_over_flash"), FLASH_LIMIT)
        if big and r["tokens"] >= 4096:
            yield gate(f"{at}: W_O r / GEMM rate", r.get("projection_rate_over_gemm"), 0.8, least=True)
        if big and r["tokens"] == 4096:
            ratios = [x for b in ("cuda", "triton") if isinstance(x := r.get(f"{b}_over_layer"), float)]
            yield gate(f"{at}: everything / layer forward", min(ratios, default=None), 1.0)
            yield gate(
                f"{at}: whole tiles / issue ceiling", r.get("dense_issue_share"), DENSE_LIMIT, least=True
            )
            for b in ("cuda", "triton"):
                share = r.get(f"{b}_bytes_over_layer")
                yield gate(f"{at}: {b}, workspace of 64 MiB / layer forward's peak", share, MEMORY_LIMIT)
        if r["shape"] == "llama-3-8b" and r["tokens"] == 5010:
            for label, ops, limit in (
                ("all exact", ("attention_exact", "neurons_exact"), 6.0),
                ("screened", ("attention", "neurons"), 0.6),
            ):
                both = [[r.get(f"{b}_{op}") for op in ops] for b in ("cuda", "triton")]
                times = [sum(x) for x in both if all(isinstance(y, float) for y in x)]
                seconds = min(times) * 36 / 1e3 if times else None
                yield gate(f"{at}: 36 layers, attention and neurons, {label}, s", seconds, limit)
        if r["shape"] == "llama-3-8b" and r["tokens"] == 10_000:
            completes = 0.0 if "failed" in r else None if "not run" in r else 1.0
            yield gate(f"{at}: completes", completes, 1.0, least=True)


def crossover(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `auto` chooses by (kernels/crossover.py): both engines' milliseconds for an op, where both ran."""
    for r in results:
        for op in ("attention", "neurons"):
            both = {engine: r.get(f"{engine}_{op}") for engine in ("cuda", "triton")}
            if all(isinstance(x, float) for x in both.values()):
                name = "neuron_contributions" if op == "neurons" else "attention_contributions"
                yield {"op": name, "tokens": r["tokens"], "width": r["width"], **both}


def plan(options: argparse.Namespace) -> Iterator[tuple[str, int, Callable[[], Layer]]]:
    """What is measured, the most wanted first: name, tokens, and how to make it."""
    device = options.device
    wanted = [("llama-3-8b", 4096), ("llama-3-70b", 4096), ("llama-3-8b", 5010), ("llama-3-8b", 10_000)]
    rest = [(name, tokens) for tokens in options.tokens for name in options.shapes]
    if options.shapes != list(SHAPES) or options.tokens != TOKENS:
        wanted = []
    for name, tokens in dict.fromkeys(wanted + rest):
        yield name, tokens, lambda name=name, tokens=tokens: synthetic(name, tokens, device)
    for path in sorted(options.activations.glob("*.safetensors")):
        for tokens in (512, 2048):
            yield (
                f"captured {path.stem}",
                tokens,
                lambda path=path, tokens=tokens: captured(path, tokens, device),
            )


def attempt(make: Callable[[], Layer], machine: Machine, seconds: float) -> dict[str, Any]:
    """Figures of one layer, or why there are none: `not run` without the memory, `failed` at a fault."""
    try:
        if machine.cuda:
            torch.cuda.empty_cache()
        return measure(make(), machine, seconds)
    except torch.OutOfMemoryError as error:
        return {"not run": f"out of memory: {error}"[:200]}
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return {"failed": f"{type(error).__name__}: {first}"[:300]}


def write(path: Path, device: str, results: list[dict[str, Any]]) -> None:
    """Everything measured so far as JSON, in the place of what was written before, at once."""
    record = {
        "device": device,
        "torch": torch.__version__,
        "shapes": {name: asdict(shape) for name, shape in (SHAPES | TINY).items()},
        "results": results,
        "gates": list(gates(results)),
        "crossover": list(crossover(results)),
    }
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=(*SHAPES, *TINY))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=0.15, help="per figure")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds for everything")
    parser.add_argument("--activations", type=Path, default=ACTIVATIONS, help="folder of gpu_capture.py")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny and interpreted: no timings")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--dry-run needs TRITON_INTERPRET=1 in the environment")
        options.shapes, options.tokens = ["tiny"], [70]
    if reason := registry.availability()["triton"]:
        parser.error(f"Triton's kernels cannot run here: {reason}")
    machine, begin = Machine(options.device), time.monotonic()
    device = machine.name()  # now: a device that has failed may not say
    results: list[dict[str, Any]] = []
    for name, tokens, make in plan(options):
        shape = {"shape": name, "tokens": tokens}
        if time.monotonic() - begin > options.limit:
            results.append({**shape, "not run": "the time given was spent"})
        else:
            results.append({**shape, **attempt(make, machine, options.seconds)})
        if options.json:
            write(options.json, device, results)
        shown = {
            k: round(v, 3) if isinstance(v, float) else v
            for k, v in results[-1].items()
            if not k.endswith("_bytes")
        }
        print(json.dumps(shown), flush=True)
    columns = ("tile_pass_over_flash", "layer_forward", "cuda_over_layer", "triton_over_layer")
    print(
        f"\n{'shape':22} {'T':>6} {'tile/flash':>10} {'layer ms':>10} {'cuda/layer':>10} {'triton/layer':>12}"
    )
    for r in results:
        cells = [r.get(k) for k in columns]
        shown_cells = " ".join(f"{c:10.2f}" if isinstance(c, float) else f"{'-':>10}" for c in cells)
        print(f"{r['shape']:22} {r['tokens']:6} {shown_cells}")
    for g in gates(results):
        word = {None: "not measured", True: "met", False: "MISSED"}[g["met"]]
        got = "" if g["got"] is None else f"{g['got']:.3g} "
        print(f"{g['gate']}: {got}(limit {g['limit']:g}) {word}")
    failed = [r for r in results if "failed" in r]
    for r in failed:
        print(f"{r['shape']}, T = {r['tokens']}: {r['failed']}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
