"""`lmtt trace` and its other commands: arguments in, one call each, results on stdout, others on stderr.

Exit codes: 0 done; 2 anything the caller can act on (one line); 130 and 143 interrupted; 1 a defect of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lmtt import __version__
from lmtt.errors import InputError, LmttError, RunError, one_line
from lmtt.interrupt import Interrupts, TerminatedError
from lmtt.profile.command import add_cost_options, add_parsers, show_cost

if TYPE_CHECKING:
    from lmtt.generate import Generation
    from lmtt.graph.routes import Route
    from lmtt.lens.logit_attribution import LogitContributions
    from lmtt.trace import Trace

MAX_PROMPT_BYTES = 16 << 20
LOGIT_PARTS = 10  # how many are worth a line


class _Parser(argparse.ArgumentParser):
    """Usage errors are one line and exit code 2, like every other error of the caller."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message, remedy=f"see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _terminated)
    try:
        options = _parser().parse_args(arguments)
        options.arguments = arguments
        options.run(options)
        sys.stdout.flush()
    except LmttError as error:
        if debug:
            raise
        print(f"lmtt: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(
            f"lmtt: {one_line('out of memory', got=error or None, remedy='trace a shorter prompt')}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("lmtt: interrupted", file=sys.stderr)
        return 130
    except TerminatedError:
        print("lmtt: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error, but nothing more can be written there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TerminatedError


# --- arguments ---


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lmtt", description="Which tokens, heads, neurons and layers made a prediction.")
    parser.add_argument("--version", action="version", version=f"lmtt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _trace_parser(commands)
    _show_parser(commands)
    _serve_parser(commands)
    add_parsers(commands)
    doctor = commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    doctor.add_argument(
        "model", nargs="?", metavar="MODEL", help="also print this model's discovered structure"
    )
    doctor.add_argument(
        "--opaque", action="store_true", help="let sublayers in that cannot be taken apart, as one part"
    )
    doctor.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    doctor.set_defaults(run=_doctor)
    return parser


def _trace_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="run a prompt through a model and attribute it")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="hub id, directory or .gguf file [the demo model]"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="- reads stdin")
    prompt.add_argument(
        "--chat", metavar="FILE.json", help="a list of {role, content}; the chat template is applied"
    )
    parser.add_argument("--no-special-tokens", action="store_true", help="add no BOS or other special tokens")
    parser.add_argument("--generate", type=int, metavar="N", help="let it go on for at most N tokens first")
    parser.add_argument("--temperature", type=_number, help="sample what it generates [the most probable]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    parser.add_argument("--target", metavar="TOKEN", help="also split this next token's logit over its parts")
    parser.add_argument("--foil", metavar="TOKEN", help="of the target's logit minus this token's")
    _route_options(parser)
    parser.add_argument(
        "--floor", type=_number, default=1e-3, help="keep edges with contribution above this [%(default)s]"
    )
    parser.add_argument("--measure", choices=("l1", "l2"), default="l1")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    parser.add_argument("--backend", default="auto", help="auto, or a backend that `lmtt doctor` lists")
    parser.add_argument(
        "--memory", metavar="8GiB", help="stay within this, streaming the weights if they do not fit"
    )
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="instead of a device: auto, balanced, sequential or JSON {module: device}",
    )
    parser.add_argument(
        "--offload-folder",
        metavar="DIR",
        help='for weights that the map puts on "disk", where they are stored anew',
    )
    parser.add_argument(
        "--keep", choices=("full", "light"), default="full", help="light leaves the residual stream out"
    )
    parser.add_argument(
        "--out", metavar="RUN", help="store the run: a directory, or one file if it ends in .lmtt"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing RUN")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted RUN holds")
    parser.add_argument("--html", metavar="FILE", help="write the route as one self-contained page")
    parser.add_argument(
        "--opaque", action="store_true", help="let sublayers in that cannot be taken apart, as one part"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="go on if weights hold NaN or infinity"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    parser.set_defaults(run=_trace)


def _show_parser(commands: Any) -> None:
    parser = commands.add_parser("show", help="a stored run, without the model")
    parser.add_argument("path", metavar="RUN")
    add_cost_options(parser)
    _route_options(parser)
    parser.add_argument("--html", metavar="FILE", help="write the route as one self-contained page")
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    parser.set_defaults(run=_show)


def _serve_parser(commands: Any) -> None:
    from lmtt.viz.login import add_options as add_login_options

    parser = commands.add_parser("serve", help="the dashboard, for browsers on this machine")
    parser.add_argument(
        "target", nargs="?", metavar="MODEL|RUN", help="what to trace with, or a stored run [the demo model]"
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="one more model that may be used; demo is the demo model",
    )
    parser.add_argument("--port", type=int, default=5006, help="[%(default)s]; 0 takes a free one")
    parser.add_argument(
        "--host", default="127.0.0.1", help="let other machines in; needs a password and --allow-origin"
    )
    parser.add_argument("--password", help="asked of every browser; better given as LMTT_PASSWORD")
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="HOST:PORT", help="as browsers show it"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="of a prompt and its output [%(default)s]"
    )
    parser.add_argument("--max-queue", type=int, default=8, help="runs that may wait [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    parser.add_argument("--debug", action="store_true", help="show a traceback with errors")
    add_login_options(parser)
    parser.set_defaults(run=_serve)


def _route_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--position", type=int, help="the route's target [the last token of the prompt]")
    parser.add_argument(
        "--threshold", type=_number, default=0.04, help="edges above this are on the route [%(default)s]"
    )
    parser.add_argument(
        "--renormalize", action="store_true", help="drop contributions below it and renormalise first"
    )
    parser.add_argument(
        "--by",
        choices=("token", "word", "sentence", "turn"),
        default="token",
        help="whose shares to list [%(default)s]",
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal"
    )
    parser.add_argument("--json", metavar="FILE", help="write the route as JSON; - is stdout")
    parser.add_argument("--csv", metavar="FILE", help="write the route's edges as CSV")
    parser.add_argument(
        "--neuronpedia", metavar="FILE", help="write the route as a Neuronpedia / circuit-tracer graph"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


# --- commands ---


def _trace(options: argparse.Namespace) -> None:
    """Everything that can be refused is refused before a model is read."""
    _check_range("threshold", options.threshold)
    _check_range("floor", options.floor)
    if options.threshold < options.floor:
        raise InputError(
            "the threshold is below the floor",
            expected=f"at least {options.floor}",
            got=options.threshold,
            remedy=f"trace with --floor {options.threshold}",
        )
    prompt = _read_prompt(options)
    if options.by == "turn" and not isinstance(prompt, list):
        raise InputError("the prompt has no turns", expected="--chat FILE.json", got="text")
    if options.generate is None and options.temperature is not None:
        raise InputError("--temperature has nothing to sample", remedy="use it with --generate N")
    if options.generate is not None and options.generate < 1:
        raise InputError("--generate is out of range", expected="1 or more", got=options.generate)
    if options.foil is not None and options.target is None:
        raise InputError("a foil without a target", remedy="name the target with --target")
    for path in (options.html, options.json, options.csv, options.neuronpedia):
        _check_writable(path)
    by_layer = bool(options.out) and not options.out.endswith(".lmtt") and options.generate is None
    if options.resume and (not by_layer or options.force):
        raise InputError(
            "--resume goes on with a stored run", expected="--out naming a directory, without --force"
        )
    if options.out:
        _check_leads_somewhere(Path(options.out))
    if options.out and not options.resume:
        _check_run_free(Path(options.out), options.force)
    if by_layer:
        _check_unlocked(Path(options.out))

    from lmtt.engine import check_backend, load

    check_backend(options.backend)
    if by_layer and not options.resume:
        _check_room(options, prompt)
    with _stoppable(options, by_layer) as interrupts, _progress() as report:
        engine = load(
            options.model,
            device=options.device,
            dtype=options.dtype,
            backend=options.backend,
            allow_nonfinite=options.allow_nonfinite,
            opaque=options.opaque,
            memory=options.memory,
            device_map=options.device_map,
            offload_folder=options.offload_folder,
        )
        common: dict[str, Any] = {
            "chat": prompt if isinstance(prompt, list) else None,
            "add_special_tokens": False if options.no_special_tokens else None,
            "floor": options.floor,
            "measure": options.measure,
            "keep": options.keep,
            "progress": report,
        }
        text = prompt if not isinstance(prompt, list) else None
        tokens = [t for t in (options.target, options.foil) if t is not None]
        generation, position = None, -1 if options.position is None else options.position
        if options.generate is None:
            stored = (
                {"out": options.out, "resume": options.resume, "force": options.force} if by_layer else {}
            )
            if by_layer:
                common["progress"] = interrupts.between_layers(report)
                with interrupts.held():
                    trace = engine.trace(text, targets=tokens, **stored, **common)
            else:
                trace = engine.trace(text, targets=tokens, **common)
        else:
            for token in tokens:
                engine.token_id(token)
            generation = engine.generate(
                text,
                max_new_tokens=options.generate,
                do_sample=options.temperature is not None,
                temperature=1.0 if options.temperature is None else options.temperature,
                seed=options.seed,
                **common,
            )
            trace = generation.trace
            position = generation.prompt - 1 if options.position is None else position
        logits = trace.logit_contributions(options.target, options.foil, position) if tokens else None
    route = trace.route(position, options.threshold, options.renormalize)
    if options.out and not by_layer:
        trace.save(options.out, force=options.force)
    _deliver(trace, route, options, generation, logits)


def _show(options: argparse.Namespace) -> None:
    _check_range("threshold", options.threshold)
    for path in (options.html, options.json, options.csv, options.neuronpedia):
        _check_writable(path)
    if options.cost:
        show_cost(options)
        return
    from lmtt.run.partial import read_partial
    from lmtt.run.reader import read_run
    from lmtt.trace import Trace

    files = (options.html, options.json, options.csv, options.neuronpedia)
    if not any(files) and (partial := read_partial(options.path)) is not None:
        print("\n".join(partial.lines()))
        return
    trace = Trace(read_run(options.path, residual=False))
    position = -1 if options.position is None else options.position
    _deliver(trace, trace.route(position, options.threshold, options.renormalize), options)


def _serve(options: argparse.Namespace) -> None:
    from lmtt.viz.login import oauth_of
    from lmtt.viz.serve import Settings, serve

    serve(
        Settings(
            options.target,
            tuple(options.model),
            options.host,
            options.port,
            tuple(options.allow_origin),
            options.password or os.environ.get("LMTT_PASSWORD"),
            options.max_tokens,
            options.max_queue,
            options.device,
            options.dtype,
            oauth_of(options),
        )
    )


def _doctor(options: argparse.Namespace) -> None:
    from lmtt.doctor import report

    for line in report(options.model, options.opaque):
        print(line)


def _deliver(
    trace: Trace,
    route: Route,
    options: argparse.Namespace,
    generation: Generation | None = None,
    logits: LogitContributions | None = None,
) -> None:
    """The files that were asked for, then a summary: on stdout unless JSON goes there."""
    summary = route.summary(options.by)
    if options.html:
        from lmtt.graph.export import write_text
        from lmtt.viz.page import route_page

        write_text(options.html, route_page(route))
    if options.json == "-":
        json.dump(route.to_json(), sys.stdout, ensure_ascii=False, allow_nan=False)
        print()
    elif options.json:
        route.to_json(options.json)
    if options.csv:
        route.to_csv(options.csv)
    if options.neuronpedia:
        route.to_neuronpedia(options.neuronpedia)
    stream = sys.stderr if options.json == "-" else sys.stdout
    if options.color == "always" or (options.color == "auto" and stream.isatty()):
        from lmtt import terminal

        always = options.color == "always"
        terminal.show(trace, route, by=options.by, generation=generation, file=stream, always=always)
    else:
        for line in summary if generation is None else [*summary, "", *generation.summary(options.by)]:
            print(line, file=stream)
    for line in _logit_lines(logits) if logits is not None else ():
        print(line, file=stream)
    for what, path in (
        ("run", getattr(options, "out", None)),
        ("page", options.html),
        ("json", options.json),
        ("csv", options.csv),
        ("neuronpedia", options.neuronpedia),
    ):
        if path and path != "-":
            print(f"{what}: {path}", file=stream)


def _logit_lines(logits: LogitContributions) -> Iterator[str]:
    from lmtt.graph.text import quoted

    foil = "" if logits.foil is None else ", target minus foil"
    yield ""
    yield f"logit of {quoted(logits.name, 48)}{foil}: {logits.logit:.3f}, of which"
    for part in logits.top(LOGIT_PARTS):
        yield f"  {part.logit:+7.3f}  {part.what}"


# --- input and output ---


def _read_prompt(options: argparse.Namespace) -> str | list[dict[str, str]]:
    text: str
    if options.prompt is not None:
        text = options.prompt
    elif options.chat is not None:
        return _read_chat(Path(options.chat))
    elif options.prompt_file == "-":
        text = sys.stdin.read(MAX_PROMPT_BYTES + 1)
    else:
        text = _read_text(Path(options.prompt_file))
    if not text:
        raise InputError("the prompt is empty", expected="at least one token")
    if len(text) > MAX_PROMPT_BYTES:
        raise InputError(
            "the prompt is too long", expected=f"at most {MAX_PROMPT_BYTES} characters", got=len(text)
        )
    return text


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_PROMPT_BYTES:
            raise InputError(
                f"{path} is too long", expected=f"at most {MAX_PROMPT_BYTES} bytes", got=path.stat().st_size
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8", got=f"byte {error.start}") from None


def _read_chat(path: Path) -> list[dict[str, str]]:
    expected = 'a list of {"role": ..., "content": ...}'
    try:
        turns = json.loads(_read_text(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON", expected=expected, got=str(error)) from None
    valid = (
        isinstance(turns, list)
        and turns
        and all(
            isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str)
            for t in turns
        )
    )
    if not valid:
        raise InputError(f"{path} is not a chat", expected=expected)
    return [{"role": t["role"], "content": t["content"]} for t in turns]


def _check_range(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name} is out of range", expected="0 <= value < 1", got=value)


def _check_writable(path: str | None) -> None:
    """Find out that an output cannot be written before anything is computed."""
    if not path or path == "-":
        return
    target = Path(path)
    if target.is_dir():
        raise InputError(f"cannot write {path}: it is a directory", expected="a file name")
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".lmtt-"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", remedy="name a writable folder") from None


@contextmanager
def _stoppable(options: argparse.Namespace, by_layer: bool) -> Iterator[Interrupts]:
    """Signals wait for the layer in hand; what was stored by then is named, and the way to go on."""
    waits = "stopping when the layer in hand is stored; once more to stop at once"
    try:
        with Interrupts(waits) as interrupts:
            yield interrupts
    except (KeyboardInterrupt, TerminatedError):
        if by_layer:
            _say_how_to_resume(options)
        raise


def _say_how_to_resume(options: argparse.Namespace) -> None:
    from lmtt.run.partial import read_partial

    try:
        partial = read_partial(options.out)
    except RunError:
        return
    if partial is None:
        return
    words = [word for word in options.arguments if not (len(word) > 4 and "--force".startswith(word))]
    if not options.resume:
        words.append("--resume")
    print(f"lmtt: {partial.done} of {partial.layers} layers are stored; go on with:", file=sys.stderr)
    print(f"  {shlex.join(['lmtt', *words])}", file=sys.stderr)


def _check_unlocked(path: Path) -> None:
    """Find out that another process writes the run before a model is read; the lock comes with the run."""
    from lmtt.run.files import lock, open_directory

    try:
        directory = open_directory(path)
    except OSError:
        return  # not there yet, or refused by name when it is opened
    try:
        lock(directory, path)
    finally:
        os.close(directory)


def _check_room(options: argparse.Namespace, prompt: str | list[dict[str, str]]) -> None:
    """Find out that the disk is too full before any weight is read."""
    from lmtt.run.preflight import check_room

    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    full = options.keep == "full"
    check_room(options.out, options.model, texts, device=options.device, dtype=options.dtype, full=full)


def _check_leads_somewhere(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise RunError(
            f"{path} is a link that leads nowhere",
            expected="a new name, a run, or a link to one",
            remedy="remove the link, or name another RUN",
        )


def _check_run_free(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise RunError(f"{path} exists", remedy="name another RUN, or use --force to replace it")
    _check_writable(str(path.parent / ".probe"))


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar over the layers, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, description="layers", completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
