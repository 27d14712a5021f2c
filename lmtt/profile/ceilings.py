"""What a machine can do at most: measured here and remembered, or the data sheet of one that is not here.

Each measured figure is the best of repeated short runs, since whatever else runs on the machine only ever
makes them worse. They are kept under the user's cache directory, by processor, threads and torch's version.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmtt.errors import InputError

SCHEMA = 1
ARRAY_BYTES = 128 << 20  # far larger than any cache
GEMM = 768  # rows, columns and depth of a product

FILE_BYTES = 64 << 20
SECONDS = 0.25  # for each figure
GB, TERA = 1e9, 1e12
NVME = 3.5e9  # bytes/s that a common PCIe 4 drive reads; stands where no disk could be measured
PCIE = {"3 x16": 16e9, "4 x8": 16e9, "4 x16": 32e9, "5 x16": 64e9}  # bytes/s in one direction


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; a multiply-add counts as two flops."""

    name: str
    source: str  # "measured" or "data sheet"
    device: str  # cpu or cuda
    flops: dict[str, float]  # of matrix products, by dtype
    lanes: float  # float32 operations of vector instructions; a multiply-add is one
    memory: float  # bytes read from the device's memory
    disk: float  # bytes read from storage
    store: float  # bytes written to storage, durably
    bus: float | None  # bytes from host to device; None where they are one
    launch: float  # seconds that the smallest operation takes
    capacity: int | None  # bytes of the device's memory

    def product(self, dtype: str) -> float:
        """Flops per second of a product in a dtype, of float32 where that dtype has no figure."""
        return self.flops.get(dtype, self.flops["float32"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _gpu(
    name: str, *, tensor: float, single: float, memory: float, gigabytes: float, pcie: str
) -> tuple[str, Ceilings]:
    """tensor: bfloat16 TFLOPS without sparsity, single: float32 TFLOPS, memory: GB/s."""
    return name.lower(), Ceilings(
        name=name,
        source="data sheet",
        device="cuda",
        flops={"bfloat16": tensor * TERA, "float16": tensor * TERA, "float32": single * TERA,
               "float64": single * TERA / (2 if tensor > 300 else 64)},
        lanes=single * TERA / 2,
        memory=memory * GB,
        disk=NVME,
        store=NVME / 2,
        bus=PCIE[pcie],
        launch=5e-6,
        capacity=int(gigabytes * 2**30),
    )  # fmt: skip


# Published figures of the vendor's data sheets: dense tensor-core rates with float32 accumulation.
DATA_SHEETS: dict[str, Ceilings] = dict(
    (
        _gpu("H200", tensor=989, single=67, memory=4800, gigabytes=141, pcie="5 x16"),
        _gpu("H100", tensor=989, single=67, memory=3350, gigabytes=80, pcie="5 x16"),
        _gpu("A100", tensor=312, single=19.5, memory=2039, gigabytes=80, pcie="4 x16"),
        _gpu("L40S", tensor=362, single=91.6, memory=864, gigabytes=48, pcie="4 x16"),
        _gpu("L4", tensor=121, single=30.3, memory=300, gigabytes=24, pcie="4 x16"),
        _gpu("RTX 4090", tensor=165.2, single=82.6, memory=1008, gigabytes=24, pcie="4 x16"),
        _gpu("RTX 3090", tensor=71, single=35.6, memory=936, gigabytes=24, pcie="4 x16"),
        _gpu("RTX 4060", tensor=30.2, single=15.1, memory=272, gigabytes=8, pcie="4 x8"),
    )
)


def data_sheet(name: str) -> Ceilings:
    """A GPU that is not here. InputError names those that are known."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    for known, ceilings in DATA_SHEETS.items():
        if wanted == known.replace(" ", ""):
            return ceilings
    names = ", ".join(c.name for c in DATA_SHEETS.values())
    raise InputError("unknown device", expected=f"auto, cpu, cuda, or one of {names}", got=repr(name))


# --- this machine -----------------------------------------------------------------------------------------


def of_this_machine(device: str = "cpu", *, remeasure: bool = False) -> Ceilings:
    """Measured ceilings, from the cache if they are there; measuring takes some seconds."""
    path = cache_path(device)
    if not remeasure:
        remembered = _read(path)
        if remembered is not None:
            return remembered
    found = measure(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({"schema": SCHEMA, "ceilings": found.to_json()}, file, indent=1)
    os.replace(file.name, path)
    return found


def known(device: str = "cpu") -> Ceilings | None:
    """This machine's ceilings if they were measured before."""
    return _read(cache_path(device))


def cache_path(device: str = "cpu") -> Path:
    """Where this machine's ceilings are remembered: another processor or thread count has another file."""
    import torch

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    about = f"{SCHEMA} {describe(device)} {torch.get_num_threads()} {torch.__version__}"
    digest = hashlib.blake2b(about.encode(), digest_size=6).hexdigest()
    return home / "lmtt" / f"ceilings-{digest}.json"


def describe(device: str = "cpu") -> str:
    """The processor's or GPU's own name."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        f"{name[1].strip() if name else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )


def _read(path: Path) -> Ceilings | None:
    """None where nothing usable is kept: it is measured again then."""
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            return None
        ceilings = Ceilings(**found["ceilings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rates = (*ceilings.flops.values(), ceilings.lanes, ceilings.memory, ceilings.disk, ceilings.store)
    return ceilings if all(isinstance(rate, float) and rate > 0 for rate in rates) else None


def best_rate(work: Callable[[], float], seconds: float = SECONDS) -> float:
    """Largest amount per second that `work` (which returns the amount done) reached within `seconds`."""
    work()
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        amount = work()
        now = time.perf_counter()
        best = max(best, amount / (now - start))
        if now >= end:
            return best


def measure(device: str = "cpu", seconds: float = SECONDS) -> Ceilings:
    """Everything, now."""
    import torch

    where = torch.device(device)
    cuda = where.type == "cuda"

    def settled(work: Callable[[], float]) -> Callable[[], float]:
        def done() -> float:
            amount = work()
            if cuda:
                torch.cuda.synchronize(where)
            return amount

        return done

    def product(dtype: torch.dtype) -> float:
        # As linear layers multiply, and smaller where a dtype has no fast product on this processor.
        rows = GEMM if dtype in (torch.float32, torch.float64) or cuda else GEMM // 4
        a = torch.ones(rows, GEMM, dtype=dtype, device=where)
        b = torch.ones(GEMM, GEMM, dtype=dtype, device=where)

        def work() -> float:
            torch.nn.functional.linear(a, b)
            return 2.0 * rows * GEMM**2

        return best_rate(settled(work), seconds)

    source = torch.ones(ARRAY_BYTES // 4, device=where)

    def read() -> float:
        source.sum()
        return float(ARRAY_BYTES)

    one = torch.ones(1, device=where)

    def smallest() -> float:
        for _ in range(100):
            one.neg()
        return 100.0

    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    flops = {str(kind).removeprefix("torch."): product(kind) for kind in kinds}
    disk, store = _disk(seconds)
    return Ceilings(
        name=describe(device) + ("" if cuda else f", {torch.get_num_threads()} threads"),
        source="measured",
        device=where.type,
        flops=flops,
        lanes=flops["float32"] / 2 if cuda else _lanes(seconds) or flops["float32"] / 2,
        memory=best_rate(settled(read), seconds),
        disk=disk,
        store=store,
        bus=_bus(where, seconds) if cuda else None,
        launch=1 / best_rate(settled(smallest), seconds / 2),
        capacity=torch.cuda.get_device_properties(where).total_memory if cuda else _memory(),
    )


def _lanes(seconds: float) -> float | None:
    """Multiply-adds in registers, by the native extension; None without it."""
    try:
        from lmtt import _C
    except ImportError:
        return None
    import torch

    threads = torch.get_num_threads()
    # Long enough for a thread that begins on another's processor to be moved: short bursts showed one's rate.
    return best_rate(lambda: float(_C.multiply_adds(10_000_000, threads)[0]), seconds)


def _bus(device: Any, seconds: float) -> float:
    import torch

    host = torch.ones(ARRAY_BYTES // 4).pin_memory()
    there = torch.empty_like(host, device=device)

    def copy() -> float:
        there.copy_(host)
        torch.cuda.synchronize(device)
        return float(ARRAY_BYTES)

    return best_rate(copy, seconds)


def _disk(seconds: float) -> tuple[float, float]:
    """Bytes per second read and durably written in the folder for temporary files, past the page cache."""
    block = memoryview(bytearray(os.urandom(1 << 20) * (FILE_BYTES >> 20)))
    with tempfile.NamedTemporaryFile(prefix="lmtt-disk-") as file:
        number = file.fileno()

        def write() -> float:
            written = os.pwrite(number, block, 0)
            os.fsync(number)
            return float(written)

        def read() -> float:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
            return float(os.preadv(number, [block], 0))

        stored = best_rate(write, seconds)
        return best_rate(read, seconds), stored


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
