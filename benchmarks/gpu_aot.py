"""Compiles every GPU kernel ahead of time, without a GPU, and says what each needs and does per element.

    python benchmarks/gpu_aot.py [--full] [--only NAME] [--json FILE]

For sm_80 and sm_90: registers, spills, local and shared memory of every Triton kernel at the tile sizes that
are shipped, and of every .cu where nvcc is there; and from the machine code the instructions of the innermost
loop by kind, divided by the elements that it works on. Exits with 1 where anything spills, uses local memory
or exceeds the chip's shared memory. `--full` compiles every head width; otherwise one of each kind. float16
has the kernels of bfloat16 and is tried at one width.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes that one block may have (163 and 227 KiB)
WIDTHS = (64, 80, 96, 112, 128, 192, 256)

Types = dict[str, str]
TENSORS: Types = {
    **dict.fromkeys(("unit", "x", "lse", "out", "out_g", "per_source", "per_row", "threshold"), "*fp32"),
    **dict.fromkeys(
        ("listed", "whole_norm", "edges", "head_part", "stats", "values", "coefficient"), "*fp32"
    ),
    **dict.fromkeys(("norms", "bound", "largest", "exponentials", "u"), "*fp32"),
    **dict.fromkeys(("high", "low"), "*fp16"),
    **dict.fromkeys(
        ("keep_bits", "rows", "bits", "tiles", "pair_head", "pair_source", "pair_row", "u_row", "row"), "*i32"
    ),
    **dict.fromkeys(("by_row", "by_source", "last_order", "last_token"), "*i32"),
    **dict.fromkeys(("quantum", "lost", "proximity", "signed", "mass", "total"), "*fp64"),
}
SCALARS: Types = {
    **dict.fromkeys(
        ("count", "heads", "group", "tokens", "window", "width", "pairs", "neurons", "vocabulary"), "i32"
    ),
    **dict.fromkeys(("first_head", "stride", "part_stride"), "i32"),
    **dict.fromkeys(("out_head", "mask_head"), "i64"),
    **dict.fromkeys(("scale", "softcap", "margin"), "fp32"),
}
INPUTS = (
    *("q", "k", "v", "w_o", "whole", "sinks", "mask", "alibi", "row_scale"),
    *("signs", "w_down", "act", "states", "w_u", "bias", "part"),
)
ALIGNED = {"width", "neurons", "vocabulary", "stride"}  # multiples of 16 in real models


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched."""

    name: str
    function: Any
    dtype: str  # of the inputs
    constants: dict[str, Any]
    warps: int
    stages: int
    elements: int  # that one pass of the innermost loop works on, over all threads


@dataclass(frozen=True)
class Report:
    name: str
    chip: int
    registers: int
    spilled: int  # bytes of stack and local memory, and instructions that touch it
    shared: int
    shared_limit: int
    loop: dict[str, int]  # instructions of the innermost loop by kind, per thread
    per_element: float  # issued instructions (all threads' lanes) per element of the loop

    @property
    def wrong(self) -> str | None:
        if self.spilled:
            return f"{self.name} on sm_{self.chip} spills or uses local memory ({self.spilled})"
        if self.shared > self.shared_limit:
            return f"{self.name} on sm_{self.chip} needs {self.shared} of {self.shared_limit} B shared memory"
        return None


def cases(full: bool, chip: int) -> Iterator[Case]:
    """Every Triton kernel at the sizes that its launcher uses."""
    import torch

    from lmtt.kernels.directional_attention import fused as directional
    from lmtt.kernels.neurons import fused as neurons
    from lmtt.kernels.proximity import fused as proximity
    from lmtt.kernels.proximity import rows, screen
    from lmtt.kernels.triton_host import depth_step, tile
    from lmtt.kernels.triton_split import _split
    from lmtt.kernels.unembed_topk import fused as unembed

    plain = {"SOFTCAP": False, "WINDOW": False, "MASK": 0, "ALIBI": False}
    loaded = {"SOFTCAP": True, "WINDOW": True, "MASK": 2, "ALIBI": True}
    few = {"bf16": (128, 64, 80, 256), "fp16": (128,), "fp32": (64,)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        split = name != "fp32"
        for width in WIDTHS if full and name != "fp16" else few[name]:
            t, step = tile(width, dtype, chip), depth_step(width)
            heads = {"E": width, "BE": step, "E_V": width, "BE_V": step}
            sizes = {**heads, "BM": t.BM, "BN": t.BN, "SPLIT": split}
            some = {"warps": t.warps, "stages": t.stages, "elements": t.BM * t.BN}
            wide = {**some, "warps": t.screen_warps}
            inside = t.inside if split and width in (64, 128) else 0
            if inside:
                of_tile = {"E": width, "BM": t.BM, "BN": inside, "WINDOW": False}
                within = {"warps": t.inside_warps, "stages": t.stages, "elements": t.BM * inside}
                yield Case(f"tiles inside {name} {width}", directional._tiles_inside, name, of_tile, **within)
                for keep in (True, False):
                    label = f"screen inside{' and kept' if keep else ''} {name} {width}"
                    yield Case(
                        label, screen._screen_inside, name,
                        {**of_tile, "PART": t.BN, "KEEP": keep}, **within,
                    )  # fmt: skip
            yield Case(
                f"screen_l1 {name} {width}",
                screen._screen,
                name,
                {**sizes, **plain, "L2": False, "KEEP": True, "INSIDE": inside},
                **wide,
            )
            if width == 128 or (not split and not full) or full:
                yield Case(
                    f"tiles {name} {width}",
                    directional._tiles,
                    name,
                    {**sizes, **plain, "PER_HEAD": False, "INSIDE": inside},
                    **some,
                )
            if width in (64, 128) and split:
                yield Case(
                    f"row_logsumexp {name} {width}", directional._row_logsumexp, name,
                    {"E": width, "BE": step, "BM": t.BM, "BN": t.BN, **plain, "SINKS": True}, **some,
                )  # fmt: skip
            if width != 128:
                continue
            yield Case(
                f"screen_l1 all features {name} {width}",
                screen._screen, name, {**sizes, **loaded, "L2": False, "KEEP": True, "INSIDE": 0}, **wide,
            )  # fmt: skip
            yield Case(
                f"screen_l2 {name} {width}",
                screen._screen,
                name,
                {**sizes, **plain, "L2": True, "KEEP": True, "INSIDE": 0},
                **wide,
            )
            yield Case(
                f"tiles per head {name} {width}",
                directional._tiles,
                name,
                {**sizes, **plain, "PER_HEAD": True, "INSIDE": 0},
                **some,
            )
            yield Case(
                f"row_sums {name} {width}",
                directional._row_sums,
                name,
                {**sizes, **plain, "POSITIVE": True},
                **some,
            )
            yield Case(
                f"dense {name} {width}", proximity._dense, name,
                {**heads, "BJ": proximity.DENSE_SOURCES,
                 "BD": proximity.DENSE_DEPTH, **plain, "ROW_SCALE": False},
                4, 2, 32 * proximity.DENSE_SOURCES * proximity.DENSE_DEPTH,
            )  # fmt: skip
            words = screen.TURNED_WORDS
            if name == "bf16":  # those that read no inputs, or turn each number into float32 at once
                yield Case("turn_bits", screen._turn_bits, name, {"WORDS": words}, 4, 3, words * 1024)
                yield Case("split", _split, name, {"BLOCK": 1024}, 4, 3, 1024)
                yield Case("part", rows._part, name, {"BLOCK": rows.DEPTH}, 4, 3, rows.DEPTH)
                yield Case("deposit", rows._deposit, name, {"BLOCK": rows.DEPOSITED}, 4, 3, 0)
                yield Case("shares", rows._shares, name, {"BLOCK": rows.EDGES}, 4, 3, 0)
            bl = proximity.COEFFICIENT_PAIRS
            yield Case(
                f"coefficients {name} {width}", proximity._coefficients, name,
                {**heads, "BL": bl, "SPLIT": split, **plain, "ROW_SCALE": True}, 4, 3, bl * width,
            )  # fmt: skip
        if name == "bf16":
            sizes = {"BLOCK": neurons.BLOCK, "K": 32}
            yield Case("best neurons", neurons._best, name, sizes, 4, 3, neurons.BLOCK)
        bl, bd = proximity.LIST_PAIRS, proximity.LIST_DEPTH
        yield Case(f"evaluate {name}", proximity._evaluate, name, {"BL": bl, "BD": bd}, 4, 3, bl * bd)
        n = neurons.tile(dtype, chip)
        yield Case(
            f"neurons {name}", neurons._screen, name,
            {"BM": n.BM, "BN": n.BN, "BD": n.BD, "ROW_SCALE": False},
            n.warps, n.stages, n.BM * n.BN * n.BD,
        )  # fmt: skip
        m = unembed._tile(dtype, chip)
        for label, loaded_too in (("", False), (" with bias and softcap", True)):
            yield Case(
                f"best logits{label} {name}", unembed._best_logits, name,
                {"BM": m.BM, "BN": m.BN, "BD": m.BD, "K": unembed.MOST_BEST,
                 "BIAS": loaded_too, "SOFTCAP": loaded_too},
                m.warps, m.stages, m.BM * m.BN,
            )  # fmt: skip


def compile_triton(case: Case, chip: int) -> Report:
    """One case for one chip."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = case.function
    own: Types = dict.fromkeys(INPUTS, f"*{case.dtype}")
    if "SPLIT" in case.constants:
        own |= dict.fromkeys(("v", "w", "w_low") if case.constants["SPLIT"] else (), "*fp16")
        own |= dict.fromkeys(("w", "w_low") if not case.constants["SPLIT"] else (), "*fp32")
    elif function.__name__.endswith("_inside"):
        own |= dict.fromkeys(("v", "w", "w_low"), "*fp16")
    if function.__name__ == "_best_logits":
        own |= {"keys": "*i64", "tiles": "i32"}
    if function.__name__ == "_deposit":
        own |= {"value": "*fp32", "source": "*i32", "head": "*i32", "edges": "*i64", "per_head": "*i64"}
    if function.__name__ == "_shares":
        own |= {"fixed": "*i64", "unit": "*fp64"}
    if function.__name__ == "_best":
        own |= {"keys": "*i64", "sums": "*fp64"}
    types = {**TENSORS, **SCALARS, **own}
    names = function.arg_names
    signature = {n: "constexpr" if n in case.constants else types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ALIGNED
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs=attributes,
    )
    compiled = compile(
        source,
        target=GPUTarget("cuda", chip, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    return inspect(
        case.name, chip, compiled.asm["cubin"], compiled.metadata.shared, case.elements, case.warps * 32
    )


# Of each .cu the kernel whose loop is reported, and how many elements a pass of it works on per thread.
CUDA_LOOPS = {"evaluate.cu": ("evaluateIf13__nv_bfloat16", 8)}


def compile_cuda(chip: int) -> Iterator[Report]:
    """Every .cu, one report for each kernel in it; nothing without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "kernel.cubin"
            subprocess.run(
                [nvcc, "-std=c++17", "-O3", "-Icsrc", f"-arch=sm_{chip}", "-cubin", "-o", target, path],
                cwd=ROOT, check=True, capture_output=True, text=True,
            )  # fmt: skip
            kernel, unrolled = CUDA_LOOPS.get(path.name, ("", 0))
            yield inspect(path.name, chip, target.read_bytes(), 0, unrolled, 1, kernel)


def _tool(name: str) -> str:
    """Triton brings its own copy of the CUDA binary tools."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def inspect(
    name: str, chip: int, cubin: bytes, shared: int, elements: int, threads: int, kernel: str = ""
) -> Report:
    """Resources of all kernels in the machine code; the innermost loop of the one whose name has `kernel`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        run[1] = "--dump-sass"
        sass = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    found = {
        k: [int(n) for n in re.findall(rf"{k}:(\d+)", usage)] for k in ("REG", "STACK", "LOCAL", "SHARED")
    }
    touched = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    functions = [f for f in sass.split("Function : ")[1:] if kernel in f.split(maxsplit=1)[0]]
    loop = innermost_loop(functions[0])
    return Report(
        name=name,
        chip=chip,
        registers=max(found["REG"], default=0),
        spilled=sum(found["STACK"]) + sum(found["LOCAL"]) + touched,
        shared=max(shared, *found["SHARED"], 0),
        shared_limit=SHARED_LIMIT[chip],
        loop=dict(loop),
        per_element=loop.total() * threads / elements if elements else 0.0,
    )


def innermost_loop(sass: str) -> Counter[str]:
    """Instructions by name of the longest loop that holds no other: from a backward branch to its target."""
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)]
    loops = []
    for at, text in lines:
        if match := re.search(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)", text):
            target = int(match[1], 16)
            if target < at:
                loops.append((target, at))
    calls = [(at, int(m[1], 16)) for at, text in lines if (m := re.search(r"CALL\S*\s+(0x[0-9a-f]+)", text))]
    names = {at: re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for at, text in lines}
    found = []
    for a, b in loops:
        within = Counter(name for at, name in names.items() if a <= at <= b and name != "NOP")
        holds_another = any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
        # Jumps back from code set aside for calls are no loops; a call of what follows is how sm_80 exits.
        leaves = sum(a <= at <= b < target <= b + 0x20 for at, target in calls)
        if not holds_another and within["CALL"] == leaves and not within["ENDCOLLECTIVE"]:
            found.append(within)
    return max(found, key=Counter.total, default=Counter())


# An H100 SXM: processors, clock in GHz under load, and its dense bf16 rate as measured for large products
# (multiply-adds count two). 128 instructions of 32-bit arithmetic are issued per processor and clock.
PROCESSORS, CLOCK, TENSOR_RATE = 132, 1.755e9, 790e12
SHAPES = {  # heads, d_head, d_model, d_mlp, and parameters per layer
    "smollm2-135m": (9, 64, 576, 1536, 3.54e6),
    "llama-3-8b": (32, 128, 4096, 14336, 218.1e6),
    "llama-3-70b": (64, 128, 8192, 28672, 855.6e6),
}


# Bytes that L2 hands to all processors in a second, as published measurements have it, and what the kernels
# without masks ask of it for a pair: q and both terms of W_O r for each block of sources, k and v for each
# block of destinations and group of heads that shares them.
L2_RATE = 5.5e12
GROUP = {"smollm2-135m": 3, "llama-3-8b": 4, "llama-3-70b": 8}
TILE_ROWS, TILE_SOURCES = 64, 128


def predict(reports: list[Report]) -> Iterator[str]:
    """Lower bounds of times on an H100 from the sm_90 code: the longest of issue, products and L2's traffic.

    Of the kernels without masks, which all tiles but those on the diagonal have.
    """
    per = {r.name: r.per_element for r in reports if r.chip == 90}
    issue = PROCESSORS * 128 * CLOCK
    yield "milliseconds        T  tile pass  log-sum-exp   screen  neurons   flash   layer"
    for shape, (heads, width, d_model, d_mlp, parameters) in SHAPES.items():
        for tokens in (512, 2048, 4096, 8192, *((10_000,) if shape == "llama-3-8b" else ())):
            pairs = heads * tokens * (tokens + 64) / 2
            traffic = 2 * width * (3 / TILE_SOURCES + 2 / TILE_ROWS / GROUP[shape])
            times = []
            for kernel, products, nbytes in (
                (f"tiles inside bf16 {width}", 3, traffic),
                (f"row_logsumexp bf16 {width}", 1, 0.0),
                (f"screen inside and kept bf16 {width}", 3, traffic),
            ):
                slots = pairs * per[kernel] / issue
                multiplied = 2 * products * pairs * width / TENSOR_RATE
                times.append(max(slots, multiplied, pairs * nbytes / L2_RATE))
            neurons = 2.0 * tokens * d_model * d_mlp / TENSOR_RATE
            flash = 2 * 2 * pairs * width / TENSOR_RATE
            layer = 2 * parameters * tokens / TENSOR_RATE + flash
            a, b, c, d, e, f = (1e3 * t for t in (*times, neurons, flash, layer))
            yield f"{shape:12} {tokens:6} {a:10.3f} {b:12.3f} {c:8.3f} {d:8.3f} {e:7.3f} {f:7.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every head width")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--chips", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--predict", type=Path, metavar="FILE", help="only print predictions from such a file"
    )
    options = parser.parse_args()
    if options.predict:
        print(*predict([Report(**r) for r in json.loads(options.predict.read_text())]), sep="\n")
        return
    reports = []
    for chip in options.chips:
        for case in cases(options.full, chip):
            if options.only in case.name:
                reports.append(compile_triton(case, chip))
                _print(reports[-1])
        for report in compile_cuda(chip):
            if options.only in report.name:
                reports.append(report)
                _print(report)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    wrong = [r.wrong for r in reports if r.wrong]
    print(
        "\n".join(wrong) or f"{len(reports)} kernels: no spills, no local memory, shared memory within limits"
    )
    sys.exit(bool(wrong))


def _print(report: Report) -> None:
    loop = " ".join(f"{k}:{n}" for k, n in Counter(report.loop).most_common(8))
    print(
        f"sm_{report.chip} {report.name:34} {report.registers:4} registers, {report.spilled} spilled, "
        f"{report.shared:7} B shared, {report.per_element:6.2f} instructions per element; {loop}",
        flush=True,
    )


if __name__ == "__main__":
    main()
