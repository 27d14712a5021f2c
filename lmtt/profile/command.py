"""`lmtt plan`, `lmtt profile` and `lmtt show RUN --cost`: arguments in, tables or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtt.errors import InputError

if TYPE_CHECKING:
    from lmtt.engine import Engine
    from lmtt.profile.report import Profile
    from lmtt.trace import Trace

# Prose for `--tokens N`: text, because random tokens leave screening less to do. Repeated as often as needed.
TEXT = (
    "The ferry left at nine, an hour late, with two lorries and a class of schoolchildren aboard. Imke "
    "counted the passengers twice and wrote the number in the ledger, as she had done every morning since "
    "the harbour master retired. When the fog came down she rang the bell by hand. Nobody on the island had "
    "a clock that agreed with any other, so the ferry was the time: when it came it was noon, and when it "
    "had left, evening. "
)


def add_parsers(commands: Any) -> None:
    """`plan` and `profile` beside the other commands."""
    plan = commands.add_parser("plan", help="what a run would take, before anything is loaded")
    _model(plan)
    plan.add_argument("--tokens", type=int, required=True, metavar="N", help="of the prompt")
    plan.add_argument("--memory", metavar="8GiB", help="the limit [what is free, or what the device has]")
    plan.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, or a GPU that is not here, as H100 or 'RTX 4090'"
    )
    plan.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    _common(plan)
    plan.set_defaults(run=_plan)

    profile = commands.add_parser("profile", help="where time, bytes and flops of attribution go")
    _model(profile)
    prompt = profile.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--tokens", type=int, metavar="N", help="of prose that comes with lmtt")
    profile.add_argument("--trace", metavar="FILE", help="write a trace for Perfetto or chrome://tracing")
    profile.add_argument(
        "--compare", metavar="RUN|BACKEND", help="set it beside a stored run, or another backend"
    )
    profile.add_argument(
        "--warm", action="store_true", help="trace once before, so that nothing is discovered or proved anew"
    )
    profile.add_argument("--memory", metavar="8GiB", help="as for `lmtt trace`")
    profile.add_argument("--device-map", metavar="MAP", help="as for `lmtt trace`")
    profile.add_argument("--offload-folder", metavar="DIR", help="as for `lmtt trace`")
    profile.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    profile.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    profile.add_argument("--backend", default="auto", help="auto, or a backend that `lmtt doctor` lists")
    profile.add_argument("--opaque", action="store_true", help="as for `lmtt trace`")
    _common(profile)
    profile.set_defaults(run=_profile)


def add_cost_options(show: argparse.ArgumentParser) -> None:
    """`show RUN --cost`."""
    show.add_argument("--cost", action="store_true", help="what it was planned to take, and what it took")
    show.add_argument("--compare", metavar="RUN", help="with --cost: another run beside it")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="hub id, directory or .gguf file [the demo model]"
    )


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write it as JSON; - is stdout")
    parser.add_argument(
        "--remeasure", action="store_true", help="measure this machine's ceilings anew, not from the cache"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")


def _plan(options: argparse.Namespace) -> None:
    from lmtt.profile.planning import plan_run

    planned = plan_run(
        options.model,
        options.tokens,
        memory=options.memory,
        device=options.device,
        dtype=options.dtype,
        remeasure=options.remeasure,
    )
    if options.json != "-":
        for line in planned.lines():
            print(line)
    _write_json(options.json, planned.to_json())


def _profile(options: argparse.Namespace) -> None:
    from lmtt.engine import check_backend, load
    from lmtt.kernels.registry import BACKENDS
    from lmtt.profile import chrome, show
    from lmtt.profile.ceilings import of_this_machine
    from lmtt.profile.report import measure

    if options.prompt is not None and not options.prompt:
        raise InputError("the prompt is empty", expected="at least one token")
    if options.tokens is not None and options.tokens < 1:
        raise InputError("--tokens is out of range", expected="1 or more", got=options.tokens)
    check_backend(options.backend)
    other = stored = None
    if options.compare in BACKENDS:
        check_backend(options.compare)
        other = options.compare
    elif options.compare is not None:
        stored = read_cost(options.compare)
    loading: dict[str, Any] = {
        "device": options.device, "dtype": options.dtype, "opaque": options.opaque, "memory": options.memory,
        "device_map": options.device_map, "offload_folder": options.offload_folder,
    }  # fmt: skip
    engine = load(options.model, backend=options.backend, **loading)
    ids = prompt_ids(engine, options.prompt, options.tokens)
    ceilings = of_this_machine(engine.info.device, remeasure=options.remeasure)

    def profiled(engine: Engine) -> Profile:
        def run() -> Trace:
            return engine.trace(input_ids=ids)

        if options.warm:
            run()
        return measure(engine, ceilings, run)

    profile = profiled(engine)
    content = profile.to_json()
    names = (_named(profile), "")
    against: Mapping[str, Any] | None = None
    if other is not None:
        del engine
        second = profiled(load(options.model, backend=other, **loading))
        against, names = {"seconds": second.seconds()}, (_named(profile), _named(second))
        content["compared_with"] = second.to_json()
    elif stored is not None:
        against, names = stored, (_named(profile), options.compare)
        content["compared_with"] = stored
    if options.trace:
        about = {key: content[key] for key in ("model", "tokens", "device", "dtype", "threads", "backend")}
        chrome.write(options.trace, profile.spans, profile.samples, name=profile.model, about=about)
    first = {"seconds": profile.seconds()}
    if against is not None:
        content["comparison"] = show.compared(first, against)
    if options.json != "-":
        show.render(show.profile_tables(profile))
        if against is not None:
            show.render(show.comparison(first, against, names))
        if options.trace:
            print(f"trace: {options.trace}")
    _write_json(options.json, content)


def prompt_ids(engine: Engine, prompt: str | None, tokens: int | None) -> list[int]:
    """Token ids of the prompt, or of so many tokens of prose; a model without a tokenizer counts upwards."""
    if prompt is not None:
        if engine.tokenizer is None:
            raise InputError(f"{engine.info.name} has no tokenizer", remedy="use --tokens N")
        return [int(i) for i in engine.tokenizer(prompt).input_ids]
    assert tokens is not None
    limit = engine.info.max_positions
    if limit is not None and tokens > limit:
        raise InputError(
            "the prompt is too long for the model", expected=f"at most {limit} tokens", got=tokens
        )
    if engine.tokenizer is None:
        return [i % engine.info.d_vocab for i in range(tokens)]
    text, ids = TEXT, [int(i) for i in engine.tokenizer(TEXT).input_ids]
    while len(ids) < tokens:
        text += text
        ids = [int(i) for i in engine.tokenizer(text).input_ids]
    return ids[:tokens]


def show_cost(options: argparse.Namespace) -> None:
    """`lmtt show RUN --cost`, `--json` and `--compare` included."""
    from lmtt.profile import show

    cost = read_cost(options.path)
    content: dict[str, Any] = {"cost": dict(cost)}
    if options.compare is not None:
        other = read_cost(options.compare)
        content["compared_with"] = dict(other)
        content["comparison"] = show.compared(cost, other)
    if options.json != "-":
        if options.compare is None:
            show.render(show.cost_tables(cost, Path(options.path).name))
        else:
            show.render(show.comparison(cost, other, (options.path, options.compare)))
    _write_json(options.json, content)


def read_cost(path: str) -> Mapping[str, Any]:
    """A stored run's cost. RunError if it is no run; InputError if it holds nothing measured."""
    from lmtt.run.reader import read_run

    if not Path(path).exists():
        from lmtt.kernels.registry import BACKENDS

        raise InputError(f"no run {path}", expected=f"a stored run, or a backend ({', '.join(BACKENDS)})")
    cost = read_run(path, residual=False).cost
    if not cost.get("seconds"):
        raise InputError(f"{path} holds nothing that was measured", expected="seconds in its cost")
    return cost


def _named(profile: Profile) -> str:
    backends = sorted(set(profile.backend.values()) - {"reference"}) or ["reference"]
    return f"{'+'.join(backends)}, {profile.tokens} tokens"


def _write_json(path: str | None, content: Mapping[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", remedy="name a writable folder") from None
    print(f"json: {path}", file=sys.stdout)
