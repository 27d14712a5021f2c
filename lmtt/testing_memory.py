"""What traces within a memory limit really take, and how far the plan was from it: each in a process of its
own, forked from one that has imported everything.

    python -m lmtt.testing_memory < cases.json    # a list of `Case`s; a list of `Outcome`s on stdout
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SECONDS_BETWEEN_LOOKS = 0.001
MIB = 1 << 20
OVER, UNDER = 0.10, 0.05  # how far a plan may be above and below what was measured, of what was measured
PAGES_OVER, PAGES_UNDER = (
    12 * MIB,
    6 * MIB,
)  # the same of small figures, which the allocator's waste dominates
AMPLE = "8GiB"


@dataclass(frozen=True)
class Case:
    """A trace to be measured."""

    folder: str | None  # None: the demo model
    tokens: int
    memory: str | None
    dtype: str = "float32"
    prompts: int = 1
    floor: float = 0.02  # few pairs are evaluated, which takes time and no more memory
    threads: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of it; bytes."""

    error: str | None
    resident: bool = False
    loading: int = 0  # planned for loading the model
    planned: dict[str, int] | None = None  # `Bytes` and their total
    measured: dict[str, int] | None = None  # what the run itself says
    way: str = ""
    seen: int = 0  # what a thread saw that knows nothing of the run
    phases: dict[str, int] | None = None  # of that, by the phase of the clock

    @property
    def off(self) -> float:
        """How far the plan is above (or below) what was measured, of that."""
        assert self.planned is not None
        assert self.measured is not None
        return self.planned["total"] / self.measured["total"] - 1

    @property
    def as_planned(self) -> bool:
        """Within 10 % of what was measured, never below it by more than 5 %."""
        assert self.planned is not None
        assert self.measured is not None
        return _foretold(self.planned["total"], self.measured["total"])

    @property
    def loaded_as_planned(self) -> bool:
        """The same of what loading the model held."""
        assert self.measured is not None
        return _foretold(self.loading, self.measured["load"])


def _foretold(planned: int, measured: int) -> bool:
    over = planned - measured
    return -max(UNDER * measured, PAGES_UNDER) <= over <= max(OVER * measured, PAGES_OVER)


def least_memory(folder: str | None, tokens: int, dtype: str, prompts: int = 1) -> int:
    """Bytes that the planner says a first pass needs at least."""
    from lmtt.checkpoint.load import quiet_transformers, read_config, resolve
    from lmtt.profile.planning import sizes
    from lmtt.streaming.plan import smallest_limit

    source = resolve(folder)
    with quiet_transformers():
        dims, weights = sizes(source, read_config(source), dtype, "cpu")
    return smallest_limit(dims.shapes, weights, [tokens] * prompts)


def measure(cases: Sequence[Case]) -> list[Outcome]:
    """Each in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lmtt.testing_memory"],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    return [Outcome(**one) for one in json.loads(done.stdout)]


def write_llama(folder: Path, dtype: torch.dtype, *, tied: bool = False, **sizes: int) -> Path:
    """A Llama with random weights as a checkpoint; `sizes` are those of its config."""
    import transformers

    config = transformers.LlamaConfig(
        **{"max_position_embeddings": 8192, **sizes},
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                start = int(torch.randint(len(block), (1,), generator=generator))
                repeats = -(-(start + parameter.numel()) // len(block))
                values = block.repeat(repeats)[start : start + parameter.numel()]
                parameter.copy_((values * parameter.shape[1] ** -0.5).view_as(parameter))
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


def anonymous() -> int:
    """RssAnon + RssShmem of this process, read for itself."""
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(n) for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.M))


def run_case(case: Case) -> Outcome:
    """In this process."""
    import lmtt
    from lmtt.errors import InputError
    from lmtt.profile.clock import recording

    torch.set_num_threads(case.threads)
    over, before = threading.Event(), anonymous()
    looks: list[tuple[float, int]] = []

    def look() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            looks.append((time.perf_counter(), anonymous() - before))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        engine = lmtt.load(case.folder, memory=case.memory, dtype=case.dtype, device="cpu")
        ids = np.random.default_rng(0).integers(0, engine.info.d_vocab, (case.prompts, case.tokens))
        with recording() as record:
            trace = engine.trace(input_ids=ids, floor=case.floor)
        trace = trace[0] if isinstance(trace, list) else trace
    except InputError as error:
        return Outcome(str(error))
    finally:
        over.set()
        watcher.join()
    phases: dict[str, int] = {}
    for span in record.spans:
        begin = record.started + span.begin
        inside = [size for moment, size in looks if begin <= moment <= begin + span.seconds]
        if inside and not span.inner:
            phases[span.phase] = max(phases.get(span.phase, 0), *inside)
    cost: dict[str, Any] = trace.cost
    return Outcome(
        None,
        engine.resident,
        cost["plan"]["loading"],
        cost["plan"]["bytes"],
        cost["measured"]["bytes"],
        cost["measured"]["way"],
        max(size for _, size in looks),
        phases,
    )


def main() -> None:
    """See the head of this file."""
    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama

    import lmtt

    _ = lmtt.load, transformers.models.llama.modeling_llama
    outcomes = []
    for given in json.load(sys.stdin):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                with open(writer, "w") as out:
                    json.dump(asdict(run_case(Case(**given))), out)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        with open(reader) as answers:
            text = answers.read()
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError(f"{given} failed")
        outcomes.append(json.loads(text))
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
