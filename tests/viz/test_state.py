"""What the dashboard lets through, keeps and shares, without a browser."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import struct
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from lmtt.errors import InputError, LmttError, RunError
from lmtt.graph.routes import RouteGraph, reveal
from lmtt.graph.testing import random_trace
from lmtt.trace import Trace
from lmtt.viz.serve import Settings, _shared, is_run, shown_names
from lmtt.viz.store import pack, page_floor

pn = pytest.importorskip("panel", reason="panel is not installed")
from lmtt.viz import panes, views  # noqa: E402
from lmtt.viz.app import Dashboard  # noqa: E402 - after the check for panel
from lmtt.viz.jobs import Worker  # noqa: E402
from lmtt.viz.login import OAuth  # noqa: E402
from lmtt.viz.models import DEMO, Models  # noqa: E402
from lmtt.viz.state import (  # noqa: E402
    UNSAID,
    Asked,
    Policy,
    Server,
    Shown,
    State,
    read_upload,
    saved,
)


def finished(coroutine):
    """What a coroutine returns. In a thread of its own: this one may be in playwright's loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def unpacked(store):
    raw = zlib.decompress(store)
    (length,) = struct.unpack("<I", raw[:4])
    head = json.loads(raw[4 : 4 + length])
    kinds = {"f4": np.float32, "u4": np.uint32, "u2": np.uint16, "u1": np.uint8}
    columns = {name: np.frombuffer(raw, kinds[kind], n, at) for name, kind, n, at in head["columns"]}
    return head, columns


# --- the store ---


@pytest.mark.parametrize("parallel", [(False, False), (True, False, True)])
def test_the_store_holds_every_edge(parallel):
    data = random_trace(3, tokens=6, parallel=parallel)
    graph = RouteGraph.from_trace(data)
    head, columns = unpacked(pack(data))
    assert head["left"] == 0
    assert np.array_equal(columns["weight"], graph.weight)
    assert np.array_equal(columns["source"], graph.source % 6)
    block = np.repeat(columns["sumBlock"], np.diff(columns["sumPtr"].astype(np.int64)))
    assert np.array_equal(block * 6 + columns["target"], graph.target)


def test_too_many_edges_leave_the_strongest_and_say_from_which_share():
    data = random_trace(3, tokens=20, parallel=(False,) * 6)
    graph = RouteGraph.from_trace(data)
    head, columns = unpacked(pack(data, most=200))
    assert len(columns["weight"]) <= 200
    assert head["left"] == len(graph.weight) - len(columns["weight"])
    assert columns["weight"].min() > head["floor"] == page_floor(graph.weight, 200)
    # What was left out changes no route above that share.
    full = reveal(graph, 19)
    kept = graph.weight > np.float32(head["floor"])
    assert not (full[~kept] > np.float32(head["floor"])).any()


def test_a_huge_token_is_clipped(hostile_trace):
    head, _ = unpacked(pack(hostile_trace))
    assert max(len(token) for token in head["token"]) <= 160
    assert not any("\x00" in token or "\u202e" in token for token in head["token"])


# --- serving safely ---


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"host": "0.0.0.0"}, "no password is set"),
        ({"host": "0.0.0.0", "password": "long enough"}, "--allow-origin"),
        ({"host": "192.168.1.4", "origins": ("a:1",)}, "no password is set"),
        ({"host": "example.org", "origins": ("a:1",)}, "no password is set"),
        ({"host": "0.0.0.0", "password": "short", "origins": ("a:1",)}, "too short"),
        ({"origins": ("*",)}, "without wildcards"),
        ({"port": 70000}, "port is out of range"),
        ({"max_tokens": 0}, "limit is out of range"),
        (
            {"password": "long enough", "oauth": OAuth("github", "k", "s", ("a",))},
            "both a password and OAuth",
        ),
        ({"oauth": OAuth("github", "k", "s", ())}, "anybody with an account"),
    ],
)
def test_what_would_serve_more_than_was_meant_is_refused(settings, complaint):
    with pytest.raises(InputError, match=complaint):
        Settings(**settings).check()


def test_this_machine_alone_is_the_default():
    Settings().check()
    assert Settings().loopback
    assert Settings(host="::1").loopback
    assert set(Settings().allowed(5006)) == {"localhost:5006", "127.0.0.1:5006"}
    open_ = Settings(host="0.0.0.0", password="long enough", origins=("lab.example:5006",))
    open_.check()
    assert open_.allowed(5006) == ["lab.example:5006"], "nobody's localhost is an origin of an open server"


def test_behind_a_proxy_nobody_names_files():
    assert Settings(origins=("localhost:8000", "[::1]:9")).private
    assert not Settings(origins=("lab.example",)).private
    assert not Settings(host="0.0.0.0", origins=("localhost:5006",)).private
    assert Settings(origins=("Lab.example:80",)).hosts == {"localhost", "127.0.0.1", "[::1]", "lab.example"}


def test_other_machines_are_told_no_path_of_a_model(tmp_path, monkeypatch):
    first, second = tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"
    for folder in (first, second):
        folder.mkdir(parents=True)
    names = [DEMO, str(first), "org/model", str(second), str(first)]
    shown = shown_names(names)
    assert shown == {
        DEMO: DEMO, "tiny": str(first), "org/model": "org/model", "tiny (2)": str(second)
    }  # fmt: skip
    monkeypatch.chdir(first)
    assert shown_names(["."]) == {"tiny": "."}

    loaded = []
    monkeypatch.setattr("lmtt.load", lambda name, **_: loaded.append(name) or SimpleNamespace())
    worker = Worker()
    open_ = Settings(target=str(first), models=("demo",), host="0.0.0.0", password="x" * 8, origins=("a:1",))
    try:
        models = _shared(open_, worker).models
        models.get(DEMO)
        assert _shared(Settings(target=str(first)), worker).models.names == (str(first),)
    finally:
        worker.close()
    assert models.names == ("tiny", DEMO)
    assert loaded == [str(first), None, str(first)]


def test_a_run_is_told_from_a_model(tmp_path):
    Trace(random_trace(1)).save(tmp_path / "run")
    assert is_run(str(tmp_path / "run"))
    assert is_run("somewhere.lmtt")
    assert not is_run("org/model")
    assert not is_run(str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (Asked("m", ""), "prompt is empty"),
        (Asked("m", "\x00"), "prompt is empty"),
        (Asked("m", "x" * 200_001), "too long for this page"),
        (Asked("m", "x", generate=-1), "output tokens"),
        (Asked("m", "x", generate=10_000), "output tokens"),
        (Asked("m", "x", floor=0.0), "floor is out of range"),
        (Asked("m", "x", floor=float("nan")), "floor is out of range"),
    ],
)
def test_a_form_is_checked_before_a_model_is_asked(asked, complaint):
    with pytest.raises(InputError, match=complaint):
        asked.check(Policy())


def test_only_listed_models_are_loaded():
    loaded = []
    models = Models(["a", "b"], lambda name: loaded.append(name) or name)
    with pytest.raises(InputError, match="not on this server's list"):
        models.get("../../etc/passwd")
    assert models.get("b") == "b"
    assert loaded == ["b"]


def test_a_model_that_fails_to_load_is_a_sentence():
    def broken(name):
        raise OSError("disk on fire")

    with pytest.raises(LmttError, match="a could not be loaded: OSError: disk on fire"):
        Models(["a"], broken).get("a")


# --- runs that come and go ---


def test_a_saved_run_can_be_opened_again():
    trace = Trace(random_trace(4))
    shown = read_upload("x.lmtt", saved(trace), lambda t: t)
    assert shown.trace.tokens == trace.tokens
    assert np.array_equal(shown.trace.data.edges.weight, trace.data.edges.weight)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x00" * 64, b"\xff" * 1000])
def test_a_broken_file_is_a_sentence(content):
    with pytest.raises(LmttError):
        read_upload("<b>.lmtt", content, lambda t: t)


def test_a_state_keeps_what_a_link_gave_only_for_the_first_run():
    state = State(threshold=0.2, position=2, picked={"kind": "token", "position": 1})
    state.show(Shown(Trace(random_trace(4))), keep=True)
    assert (state.threshold, state.start, state.picked["kind"]) == (0.2, 2, "token")
    state.show(Shown(Trace(random_trace(5))))
    assert (state.start, state.picked) == (4, {})
    assert [len(state.recent), state.recent[0] is state.shown] == [2, True]


def test_a_bomb_is_a_sentence_that_names_the_file_and_no_folder():
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("run.json", bytes(10_000_000))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for content in (bomb.getvalue(), len(header).to_bytes(8, "little") + header):
        assert len(content) < 20_000
        with pytest.raises(RunError) as caught:
            read_upload("bomb.lmtt", content, lambda t: t)
        assert "bomb.lmtt" in str(caught.value)
        assert tempfile.gettempdir() not in str(caught.value)


def test_a_run_of_too_many_tokens_is_not_opened():
    content = saved(Trace(random_trace(4, tokens=9)))
    with pytest.raises(InputError, match="at most 8 tokens, got 9"):
        read_upload("x.lmtt", content, lambda t: t, 8)


@pytest.mark.parametrize(
    ("error", "far"),
    [
        (InputError("the prompt is empty", expected="1 or more"), "the prompt is empty, expected 1 or more"),
        (LmttError("org/model at 3/4 of 1 / 2"), "org/model at 3/4 of 1 / 2"),
        (LmttError("/srv/secret models/a cannot be read"), UNSAID),
        (LmttError("a could not be loaded: OSError: '/srv/secret'"), UNSAID),
        (LmttError("~/secret is missing"), UNSAID),
        (LmttError("C:\\secret is missing"), UNSAID),
        (ValueError("secret"), UNSAID),
    ],
)
def test_other_machines_are_told_no_path_and_the_log_everything(error, far, caplog):
    assert Policy(loopback=False).told(error) == far
    assert (str(error) in caplog.text) == (far == UNSAID)
    assert str(error) in Policy().told(error)


# --- a session without a browser ---


@pytest.fixture
def server():
    made = Server(Models([], lambda name: None), Worker(2), Policy(), Trace(random_trace(4)))
    yield made
    made.worker.close()


def shown_text(pane):
    return " ".join(str(found.object) for found in pane.select(pn.pane.HTML))


def test_sessions_share_nothing(server):
    one, other = Dashboard(server, "a"), Dashboard(server, "b")
    one.state.param.update(threshold=0.3, position=1, picked={"kind": "token", "position": 1})
    one.state.show(Shown(Trace(random_trace(7, tokens=3))))
    assert other.state.threshold == 0.04
    assert other.state.picked == {}
    assert len(other.state.recent) == 1
    assert other.route.store == pack(server.first.data)
    assert not {id(x) for x in one.page.select()} & {id(x) for x in other.page.select()}


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ({"text": "a word", "start": [0, 1, 2, 4], "end": [1, 2, 4, 6], "roles": [], "turns": []}, "a word"),
        ({"text": "chat", "start": [0, 1, 2, 3], "end": [1, 2, 3, 4], "roles": ["user"], "turns": [1]}, ""),
        ({"text": "cut"}, ""),
        (None, ""),
    ],
)
def test_the_form_holds_the_prompt_of_the_run_that_is_shown(server, note, shown):
    data = random_trace(4, tokens=4)
    meta = {**data.meta, **({} if note is None else {"prompt": note})}
    given = Server(
        Models(["m"], lambda name: None), server.worker, Policy(), Trace(dataclasses.replace(data, meta=meta))
    )
    assert Dashboard(given, "a").prompt.value == shown


@pytest.mark.parametrize(
    "picked",
    [
        {"kind": "attention", "layer": 0, "source": 0, "position": 0},
        {"kind": "mlp", "layer": 0, "position": 2},
        {"kind": "node", "layer": 1, "site": "post", "position": 2},
        {"kind": "token", "position": 2},
        {"kind": "opaque", "layer": 0, "position": 1},
        {"kind": "attention", "layer": 99, "source": 0, "position": 0},
        {"kind": "node", "layer": "x"},
        {"kind": "<script>"},
        {"position": 10**9},
    ],
)
def test_every_pick_fills_the_details_without_a_model(server, picked):
    dashboard = Dashboard(server, "a")
    finished(dashboard.details.show(server.first, picked, False))
    assert len(shown_text(dashboard.details.pane)) > 20
    assert not dashboard.details.pane.loading


@pytest.mark.parametrize("dark", [False, True])
def test_every_tab_fills_without_a_model(server, dark):
    dashboard = Dashboard(server, "a")
    dashboard.state.dark = dark
    for index, name in enumerate(("Lens", "Contrast", "Heads", "Output", "Cost"), 1):
        dashboard.tabs.active = index
        finished(dashboard.refresh())
        assert len(dashboard.bodies[name]), name
    assert "opened without its model" in shown_text(dashboard.bodies["Lens"])


def test_parts_that_were_not_taken_apart_are_said(server):
    whole = [{"layer": n, "sublayer": "mixer", "kind": "mixer", "reason": "a <state>"} for n in (0, 2)]
    data = random_trace(4)
    trace = Trace(dataclasses.replace(data, meta={**data.meta, "whole_sublayers": whole}))
    dashboard = Dashboard(server, "a")
    for picked in ({}, {"kind": "opaque", "layer": 0, "position": 1}):
        finished(dashboard.details.show(trace, picked, False))
        said = shown_text(dashboard.details.pane)
        assert "Not taken apart, one part in 2 layers: mixer (mixer, a &lt;state&gt;)." in said
    finished(dashboard.details.show(server.first, {}, False))
    assert "Not taken apart" not in shown_text(dashboard.details.pane)


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({}, ["kept edges"]),
        ({"seconds": {"mlp": 0.25, "total": 0.25}}, ["kept edges"]),
        ({"plan": {"unplanned": "no <config>"}}, ["It could not be planned: no &lt;config&gt;"]),
        (
            {
                "seconds": {"mlp": 0.25, "attention": 1.5, "total": 1.75},
                "plan": {"seconds": {"mlp": 0.2, "read": 0.1, "total": 1.0}, "bytes": {"total": 3 << 20}},
                "peak_bytes": {"process": 5 << 20},
            },
            ["planned", "250 ms", "200 ms", "1.75 s", "100 ms", "3 MiB", "5 MiB"],
        ),
    ],
)
def test_the_cost_tab_shows_plan_and_measurement_where_there_are_any(cost, said):
    trace = Trace(dataclasses.replace(random_trace(4), cost=cost))
    found = views.cost(trace, False, panes.html)
    text = " ".join(pane.object for pane in found if isinstance(pane, pn.pane.HTML))
    for part in said:
        assert part in text
    assert sum(isinstance(pane, pn.pane.Bokeh) for pane in found) == ("seconds" in cost)


def test_files_of_this_machine_can_be_named_on_this_machine_only(server, tmp_path):
    Trace(random_trace(7, tokens=3)).save(tmp_path / "other")
    far = Server(server.models, server.worker, Policy(loopback=False), server.first)
    for given, tokens in ((server, 3), (far, 5)):
        dashboard = Dashboard(given, "a")

        class Event:
            new = str(tmp_path / "other")

        finished(dashboard.open_path(Event))
        assert len(dashboard.state.trace.tokens) == tokens
        assert (dashboard.path in dashboard.page.select()) == (given is server)


def test_no_message_to_a_browser_is_left_lying():
    """Scheduled while an earlier one was on its way: Panel's own task for it would return at once."""
    from panel.io import document

    from lmtt.viz import writes

    writes.mend()
    writes.mend()  # once is enough
    sent = []

    class Socket:
        pass

    class Connection:
        _socket = Socket()

    async def send(doc):
        document._WRITE_MSGS[doc] = {Connection(): ["late"]}
        assert doc not in document._WRITE_BLOCK, "the task before took the mark away"
        await document._dispatch_msgs(doc)
        return doc in document._WRITE_MSGS or doc in document._WRITE_BLOCK

    document.extra_socket_handlers[Socket] = lambda _connection, msg: sent.append(msg) or []
    try:
        assert not finished(send(pn.io.document.Document()))
    finally:
        del document.extra_socket_handlers[Socket]
    assert sent == ["late"]


def test_a_pane_that_nobody_sees_asks_nobody_outside_for_its_styles():
    """As one that is filled again while another tab is looked at: it belongs to no document then."""
    from lmtt.viz import styles

    styles.mend()
    sheets = panes.html("x")._get_properties(None)["stylesheets"]
    addresses = [sheet.url for sheet in sheets if hasattr(sheet, "url")]
    assert addresses
    assert not [address for address in addresses if address.startswith("http")]


def test_a_run_without_a_model_is_a_sentence(server):
    dashboard = Dashboard(server, "a")
    finished(dashboard.run())
    assert "this server has no model" in str(dashboard.message.object)
