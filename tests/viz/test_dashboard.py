"""The dashboard in a real browser: every click path, people kept apart, hostile text, no request outside."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lmtt.graph.routes import route
from lmtt.graph.text import token_label
from lmtt.trace import Trace
from lmtt.viz.models import DEMO, Models
from lmtt.viz.state import Policy

pytest.importorskip("panel", reason="panel is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::bokeh.util.warnings.BokehUserWarning"),
]
PROMPT = "The capital of France is"
READY = "[data-ready][data-session] .rv-canvas"  # drawn, and its session is there


@pytest.fixture(scope="module")
def traced(demo_engine):
    """What the browser's own run is compared with."""
    return demo_engine.trace(PROMPT)


@pytest.fixture
def models(demo_engine):
    found = Models([DEMO], lambda name: demo_engine)
    found.put(DEMO, demo_engine)
    return found


def no_models():
    return Models([], lambda name: None)


class Person:
    """Somebody at a browser."""

    def __init__(self, watched, address):
        self.watched = watched()
        self.page = self.watched.page
        self.page.goto(address)
        self.page.wait_for_selector(".rv", timeout=60_000)

    def trace(self, prompt):
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Trace", exact=True).click()

    def wait_for_graph(self):
        self.page.wait_for_selector(READY, timeout=60_000)
        return self

    def view(self, expression, argument=None):
        return self.page.locator(".rv").evaluate(
            f"(root, a) => {{ const v = root.view; return {expression} }}", argument
        )

    def pick(self, meaning):
        """Click the glyph itself."""
        script = """(() => {
          const what = v.find(a), s = v.scene;
          if (what.token !== undefined) return [s.x(v.columns.column[what.token]), s.frame.bottom + 18];
          if (what.node !== undefined) return s._node(what.node);
          const p = s.place(what.edge);
          return p.x === undefined ? [(p.x0 + p.x1) / 2, (p.y0 + p.y1) / 2] : [p.x, p.y];
        })()"""
        x, y = self.view(script, meaning)
        box = self.page.locator(".rv-canvas").bounding_box()
        self.page.mouse.click(box["x"] + x, box["y"] + y)

    def cell(self, row, column):
        """Where a cell of the heat map is that is looked at."""
        script = """([row, column]) => {
          const shown = (v) => v.model.renderers?.some((r) => r.name === 'cells');
          for (const v of Bokeh.index.query(shown)) {
            const box = v.canvas_view.el.getBoundingClientRect();
            const [x, y] = [v.frame.x_scale.compute(column), v.frame.y_scale.compute(row)];
            if (box.width) return [box.x + x, box.y + y];
          }
        }"""
        return self.page.evaluate(script, [row, column])

    def expect(self, text):
        self.page.get_by_text(text).first.wait_for(timeout=60_000)

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()


@pytest.mark.model
def test_every_click_path(watched, serving, models, traced, tmp_path):
    """A prompt of one's own, each kind of click, each tab, and the page that can be mailed."""
    one = Person(watched, serving(models))
    one.trace(PROMPT)
    one.wait_for_graph()
    found = route(traced.data, -1, 0.04)
    one.expect(f"{len(found.edges):,} edges above 0.04")

    between = found.edges[(found.edges["kind"] == "attention") & (found.edges["layer"] > 10)]
    between = between[between["source_position"] != between["target_position"]][0]
    layer, source, position = (int(between[n]) for n in ("layer", "source_position", "target_position"))
    one.pick({"kind": "attention", "layer": layer, "source": source, "position": position})
    one.expect("what head")
    strongest = int(traced.heads(layer, source=source, destination=position).argmax())
    one.expect(f"what head {strongest} says by reading")
    said = traced.promoted(layer, position, ("head", strongest, source), k=1)[0][0]
    one.expect(f"{said.score:+.3f}")
    assert one.page.locator(".bk-Figure").count() == 3, "bars and two maps"

    one.pick({"kind": "mlp", "layer": 29, "position": 4})
    best = traced.neurons(29, 4, k=1)[0]
    one.expect("its top neurons")
    one.expect(f"{best.contribution:.4f}")

    one.pick({"kind": "node", "layer": 29, "site": "post", "position": 4})
    one.expect("the model would say here")
    one.expect(f"{traced.lens(29, 4, k=1)[0].probability:.1%}")

    one.pick({"kind": "token", "position": 3})
    one.expect("received: strongest attention edges into it")

    one.tab("Lens")
    one.expect("Click a cell for its whole list.")
    one.tab("Contrast")
    logit = traced.logit_contributions(traced.next_tokens(k=1)[0].id).logit
    one.expect(f"{logit:.3f}")
    one.tab("Heads")
    one.page.locator(".bk-Figure").last.wait_for()
    one.tab("Cost")
    one.expect("pairs evaluated exactly")
    if "unplanned" not in traced.cost["plan"]:
        one.expect("memory planned")
    one.tab("Save")
    with one.page.expect_download() as download:
        one.page.get_by_role("button", name="One interactive page").click()
    text = Path(download.value.path()).read_text("utf-8")
    (tmp_path / "mailed.html").write_text(text, "utf-8")
    mailed = watched(offline=True).page
    mailed.goto((tmp_path / "mailed.html").as_uri())
    mailed.wait_for_selector("html[data-ready]")
    assert mailed.evaluate("lmtt.view.selection.count(0.04)") == len(found.edges)

    # The address holds the state; a start elsewhere is traced at once.
    one.view("v.trace(2)")
    one.page.wait_for_url("**position=2**")
    one.expect(f"{len(route(traced.data, 2, 0.04).edges):,} edges above 0.04")

    # Another run starts at its own last token, and the one before is still there.
    one.trace("Paris")
    one.page.get_by_label("Recent runs").wait_for(timeout=60_000)
    assert "Paris" in one.page.get_by_label("Recent runs").inner_text()
    for _ in range(100):
        if one.view("v && v.store.tokens") == 1:
            break
        one.page.wait_for_timeout(100)
    assert one.view("[v.store.tokens, v.position]") == [1, 0]


@pytest.mark.model
def test_one_person_sees_nothing_of_another_and_waits_in_no_line_to_look(watched, serving, models):
    address = serving(models)
    one, other = Person(watched, address), Person(watched, address)
    one.trace("my secret is 4711")
    one.wait_for_graph()
    one.trace("my secret is 4711 " * 20)  # goes on while the other looks around
    other.expect("No run is shown yet")
    other.tab("Cost")
    other.tab("Details")
    assert "4711" not in other.page.content()
    assert other.page.get_by_text("4711").count() == 0
    cancel = one.page.get_by_role("button", name="Cancel")
    assert cancel.evaluate("(e) => getComputedStyle(e).color") == "rgb(211, 47, 47)", "red, as what stops"
    cancel.click()
    one.expect("The run was cancelled.")
    cancel.wait_for(state="hidden")
    assert one.page.get_by_role("button", name="Trace", exact=True).is_enabled()
    assert one.view("v.store.tokens") < 20, "the run before is still shown"
    other.trace("Hello")
    other.wait_for_graph()


@pytest.mark.model
def test_trouble_is_a_sentence_and_the_server_lives_on(watched, serving, models, tmp_path):
    one = Person(watched, serving(models, policy=Policy(max_tokens=20)))
    one.trace("")
    one.expect("the prompt is empty")
    one.trace("too long " * 40)
    one.expect("prompt and output are too long for this server")
    (tmp_path / "broken.lmtt").write_bytes(b"\xff" * 300)
    one.page.locator("input[type=file]").set_input_files(tmp_path / "broken.lmtt")
    one.expect("This run cannot be opened")
    one.trace("A good prompt")
    one.wait_for_graph()
    one.tab("Lens")
    one.page.get_by_label("rank of token").fill("two words")
    one.page.keyboard.press("Enter")
    one.expect("'two words' is not one token")
    one.page.get_by_label("rank of token").fill(" Paris")
    one.page.keyboard.press("Enter")
    one.expect("Click a cell for its whole list.")


def test_a_model_that_does_not_load_is_a_sentence(watched, serving):
    def broken(name):
        raise OSError("disk on fire")

    one = Person(watched, serving(Models(["broken"], broken)))
    one.trace("Hello")
    one.expect("broken could not be loaded: OSError: disk on fire")
    assert one.page.get_by_role("button", name="Trace", exact=True).is_enabled()


def test_a_slider_move_sends_next_to_nothing(watched, serving, hostile_trace):
    one = watched()
    sent = []
    one.page.on("websocket", lambda socket: socket.on("framesent", lambda payload: sent.append(len(payload))))
    one.page.goto(serving(no_models(), Trace(hostile_trace)))
    one.page.wait_for_selector(READY, timeout=60_000)
    one.page.wait_for_timeout(800)
    sent.clear()
    for value in ("-1.6", "-1.2", "-0.9", "-1.1"):
        one.page.locator(".rv-slider").fill(value)
    one.page.wait_for_timeout(1000)
    assert 0 < sum(sent) < 4000, "a few hundred bytes once it came to rest"


@pytest.mark.model
def test_cells_of_the_lens_can_be_read_pointed_at_and_clicked(watched, serving, models, demo_engine):
    """As many columns as can be read, the last ones first; the strip shows that there are more."""
    text = (
        "The old lighthouse keeper told the children that the storm would reach the harbour before night fell"
    )
    trace = demo_engine.trace(text)
    T = len(trace.tokens)
    one = Person(watched, serving(models, trace)).wait_for_graph()
    one.tab("Lens")
    one.expect("Click a cell for its whole list.")
    one.page.wait_for_timeout(1500)
    seen, words, strip = one.page.evaluate("""() => {
      const plots = Bokeh.index.query((v) => v.model.renderers?.some((r) => r.name === 'cells'));
      const plot = [...plots][0].model, written = plot.renderers[1].data_source.data.word;
      const small = [...Bokeh.index.query((v) => v.model.toolbar?.tools.some((t) => t.type === 'RangeTool'))];
      return [[plot.x_range.start, plot.x_range.end], Array.from(written), small[0].model.visible];
    }""")
    assert 10 <= seen[1] - seen[0] < T
    assert seen[1] == T - 0.5
    assert strip
    says = trace.lens(29, T - 1, k=1)[0]
    assert token_label(says.token).startswith(words[-1].rstrip("…"))
    one.page.mouse.move(*one.cell(29, T - 1))
    one.expect(f"{says.probability:.4f}")
    one.page.mouse.click(*one.cell(28, T - 2))
    one.expect("the model would say here")
    one.expect("after layer 28")
    one.expect(f"{trace.lens(28, T - 2, k=1)[0].probability:.1%}")


@pytest.mark.model
def test_generated_text_is_shown_and_each_of_its_tokens_can_be_traced(watched, serving, models, demo_engine):
    one = Person(watched, serving(models))
    made = demo_engine.generate(PROMPT, max_new_tokens=3)
    one.page.get_by_role("button", name="Options").click()
    one.page.get_by_label("Output tokens to generate").fill("3")
    one.page.keyboard.press("Tab")
    one.trace(PROMPT)
    one.wait_for_graph()
    assert one.view("[v.store.tokens, v.position]") == [len(made.trace.tokens), made.prompt - 1]
    one.tab("Output")
    one.expect("what the whole output rests on in the prompt")
    one.page.locator(".lmtt p", has_text=made.text.strip().splitlines()[0]).wait_for()
    one.expect(f"{made.through.tokens.mean(0).max():.1%}")
    one.page.wait_for_timeout(1000)
    one.page.mouse.move(*one.cell(1, 0))
    one.expect(f"{made.shares[1, 0]:.4f}")
    one.page.mouse.click(*one.cell(1, 0))  # rows run upwards: the second of the three
    one.page.wait_for_url(f"**position={made.prompt}*")
    assert one.view("v.position") == made.prompt


@pytest.mark.model
def test_tabs_that_are_left_before_they_are_drawn_stay_whole(watched, serving, models, traced):
    """Their charts are filled out of sight; then window and theme change, and they are looked at."""
    one = Person(watched, serving(models, traced)).wait_for_graph()
    for n, name in enumerate(("Heads", "Lens", "Heads")):
        one.tab(name)
        one.page.wait_for_timeout(200)
        one.view("v.options.onPick(a)", {"kind": "token", "position": n})
        one.expect("received: strongest attention edges into it")
        one.page.wait_for_timeout(900)
        one.page.set_viewport_size({"width": 1320 - 20 * n, "height": 900})
        one.page.wait_for_timeout(300)
        one.page.emulate_media(color_scheme="light" if n % 2 else "dark")
        one.tab(name)
        one.page.wait_for_timeout(600)
        one.page.set_viewport_size({"width": 1240 + 20 * n, "height": 900})
        one.page.wait_for_timeout(600)
        assert one.page.get_by_role("tab").count() == 7
        assert one.page.get_by_role("tab", name=name).get_attribute("aria-selected") == "true"


def hold_back(page, held):
    """Panel's page goes on only after `let_go`."""
    page.route("**/bokeh.min.js*", lambda request: held.append(request) or None)


def let_go(page, held):
    for _ in range(200):
        if held:
            break
        page.wait_for_timeout(100)
    held[0].continue_()


def test_the_graph_can_be_used_before_there_is_a_session(watched, serving, hostile_trace):
    """It waits for no script of Panel's; what was done to it meanwhile stays, and the server hears of it."""
    one, held = watched(), []
    hold_back(one.page, held)
    address = serving(no_models(), Trace(hostile_trace))
    one.page.goto(f"{address}?position=7", wait_until="commit")
    one.page.wait_for_selector(".front-view .rv-canvas", timeout=60_000)
    assert one.page.evaluate("lmttFront.view.position") == 7
    one.page.locator(".rv-slider").fill("-0.7")
    expected = len(route(hostile_trace, 7, float(f"{10**-0.7:.3g}")).edges)
    one.page.get_by_text(f"{expected:,} edges above 0.2").wait_for()
    one.page.evaluate("lmttFront.view._pick({token: 3})")
    one.page.wait_for_timeout(400)
    assert one.page.evaluate("typeof Bokeh") == "undefined"
    let_go(one.page, held)
    one.page.wait_for_selector(READY, timeout=60_000)
    one.page.get_by_text("received: strongest attention edges into it").wait_for()
    one.page.wait_for_url("**threshold=0.2*")
    state = one.page.locator(".rv").evaluate(
        "(r) => [r.view.threshold, r.view.position, r.view.selected.token]"
    )
    assert state == [0.2, 7, 3]
    assert one.page.locator("#lmtt-front").count() == 0
    assert one.page.locator(".rv").evaluate("(root) => root.view === lmttFront.view"), "drawn and sent once"


def test_a_page_that_holds_another_run_is_sent_this_one(watched, serving, hostile_trace):
    """As after a restart of the server, whose new session answers the old page."""
    one = watched()
    held = []
    hold_back(one.page, held)
    one.page.goto(serving(no_models(), Trace(hostile_trace)), wait_until="commit")
    one.page.wait_for_selector(".front-view .rv-canvas", timeout=60_000)
    one.page.evaluate("lmttFront.digest = 'another'")
    let_go(one.page, held)
    one.page.wait_for_selector(READY, timeout=60_000)
    assert one.page.locator(".rv").evaluate("(root) => root.view !== lmttFront.view")


def test_a_lost_connection_is_said_and_the_graph_goes_on(watched, serving, hostile_trace):
    one = watched()
    sockets = []

    def between(socket):
        socket.connect_to_server()
        sockets.append(socket)

    one.page.route_web_socket("**/ws*", between)
    one.page.goto(serving(no_models(), Trace(hostile_trace)))
    one.page.wait_for_selector(READY, timeout=60_000)
    sockets[0].close(code=3001, reason="the cable")
    one.page.get_by_text("The server does not answer.").first.wait_for()
    one.page.locator(".rv-slider").fill("-0.7")
    expected = len(route(hostile_trace, -1, float(f"{10**-0.7:.3g}")).edges)
    one.page.get_by_text(f"{expected:,} edges above 0.2").wait_for()


def test_two_tabs_of_one_browser_have_a_state_each(watched, serving, hostile_trace):
    address = serving(no_models(), Trace(hostile_trace))
    one = Person(watched, address).wait_for_graph()
    second = one.page.context.new_page()
    second.goto(address)
    second.wait_for_selector(READY, timeout=60_000)
    one.view("v.trace(3)")
    one.page.wait_for_url("**position=3**")
    one.view("v.options.onPick(a)", {"kind": "token", "position": 2})
    one.expect("received: strongest")
    assert second.locator(".rv").evaluate("(root) => root.view.position") == len(hostile_trace.tokens) - 1
    assert second.get_by_text("received: strongest").count() == 0
    one.page.close()
    second.locator(".rv").evaluate("(root) => root.view.options.onPick({kind: 'token', position: 1})")
    second.get_by_text("received: strongest").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_until_it_is_switched(watched, serving, hostile_trace, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    address = serving(no_models(), Trace(hostile_trace))
    page = watched(color_scheme=scheme).page
    page.goto(address)
    page.wait_for_selector(f"html[data-theme={scheme}] {READY}", timeout=60_000)
    page.emulate_media(color_scheme=other)
    page.wait_for_selector(f"html[data-theme={other}]")
    page.wait_for_timeout(400)  # until the server knows of it, and the switch shows it
    page.locator("header button").last.click()
    page.wait_for_selector(f"html[data-theme={scheme}]")
    page.wait_for_timeout(400)
    page.reload()
    page.wait_for_selector(f"html[data-theme={scheme}] {READY}", timeout=60_000)


def test_hostile_tokens_are_shown_harmlessly_everywhere(watched, serving, hostile_trace):
    page = watched().page
    page.goto(serving(no_models(), Trace(hostile_trace)))
    page.wait_for_selector(READY, timeout=60_000)
    page.wait_for_timeout(500)
    page.locator("header button").last.click()
    page.wait_for_selector("html[data-theme=dark]", timeout=60_000)  # every view follows the switch
    for position in (0, 5, 9, 10):
        page.locator(".rv").evaluate(
            "(root, p) => root.view.options.onPick({kind: 'token', position: p})", position
        )
        page.get_by_text("received: strongest").wait_for()
        page.wait_for_timeout(150)
    for tab in ("Lens", "Contrast", "Heads", "Output", "Cost"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(250)
    assert page.title() != "owned"
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    assert "\u202e" not in page.content()


def test_a_hostile_address_is_no_more_than_a_wrong_one(watched, serving, hostile_trace):
    address = serving(no_models(), Trace(hostile_trace))
    one = watched()
    picked = json.dumps({"kind": "attention", "layer": 10**12, "source": -5, "position": "<img src=x>"})
    one.page.goto(f"{address}?threshold=7&position=-99&picked={picked}")
    one.page.wait_for_selector(READY, timeout=60_000)
    again = watched()
    again.page.goto(f"{address}?threshold=0.2&position=3")
    again.page.wait_for_selector(READY, timeout=60_000)
    state = again.page.locator(".rv").evaluate("(root) => [root.view.threshold, root.view.position]")
    assert state == [0.2, 3]


def test_a_password_is_asked_and_nothing_is_there_without_it(watched, serving, hostile_trace):
    address = serving(no_models(), Trace(hostile_trace), password="correct horse")
    one = watched()
    one.page.goto(address)
    one.page.get_by_label("Password").fill("wrong horse")
    one.page.get_by_role("button", name="Enter").click()
    one.page.get_by_text("Invalid").wait_for()
    assert one.page.locator(".rv").count() == 0
    assert "lmtt-front" not in one.page.content()
    socket = urllib.request.Request(f"{address}ws", headers={"Upgrade": "websocket", "Connection": "Upgrade"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(socket, timeout=10)
    assert refused.value.code in (400, 401, 403)
    one.page.get_by_label("Password").fill("correct horse")
    one.page.get_by_role("button", name="Enter").click()
    one.page.wait_for_selector(READY, timeout=60_000)
