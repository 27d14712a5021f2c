// The route view as a Panel component. Only what came to rest goes to the server: start and threshold, a pick.
import { unpack } from "./route.mjs";
import { RouteView } from "./view.mjs";

const REMEMBERED_THEME = "lmtt-theme";

/** A mend for Bokeh: a chart whose tab was left before it was laid out is measured all the same when the window is
    resized; that failed, and took all tabs with it. Its turn comes when the tab is looked at again. */
function spareUnlaid() {
  const plot = window.Bokeh?.Models?.get?.("Plot")?.prototype.default_view?.prototype;
  if (!plot || plot.lmttSpared) return;
  plot.lmttSpared = true;
  for (const step of ["_measure_layout", "_after_layout"]) {
    const original = plot[step];
    plot[step] = function () { if (this.layout) original?.call(this); };
  }
}

export function render({ model }) {
  spareUnlaid();
  // The page's first part may have drawn this run already; its view moves here with all that was done to it.
  const front = window.lmttFront;
  const drawn = front && !front.taken && front.digest === model.opened && !model.store?.byteLength;
  const root = drawn ? front.root : document.createElement("div");
  root.style.height = "100%";
  let view = null, loading = 0;
  requestAnimationFrame(() => document.getElementById("lmtt-front")?.remove());
  // Custom properties are inherited by every pane's shadow root: one place decides how all our own HTML looks.
  if (!document.getElementById("lmtt-themes")) {
    const style = Object.assign(document.createElement("style"), { id: "lmtt-themes", textContent: model.themes });
    document.head.append(style);
  }

  // Panel loses its answers to whatever comes before the session is up: until then it waits here.
  let up = false;
  const waiting = [];
  const tell = (what) => { if (up) what(); else waiting.push(what); };

  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem(REMEMBERED_THEME); } catch { return null; } };
  const follow = () => {
    if (!model.by_hand && !remembered()) model.dark = system.matches;
  };
  const theme = () => {
    document.documentElement.dataset.theme = model.dark ? "dark" : "light";
    view?.recolour();
    if (!model.by_hand) return;
    try { localStorage.setItem(REMEMBERED_THEME, model.dark ? "dark" : "light"); } catch { /* private windows */ }
  };
  const selected = () => {
    if (!view) return;
    const { kind } = model.picked;
    if (JSON.stringify(view.selected && view.meaning(view.selected)) !== JSON.stringify(model.picked))
      view.set({ selected: kind ? view.find(model.picked) : null });
  };
  // Start and run may come in two messages: what a start of another run means here is the last token.
  const place = ({ tokens }) => (model.position >= 0 && model.position < tokens ? model.position : tokens - 1);
  const report = (state) => tell(() => Object.assign(model, state));
  const pick = (picked) => tell(() => { model.picked = picked; });
  const shown = (id) => {
    root.view = view; // for those who measure
    root.dataset.ready = String(id);
  };
  const adopt = () => {
    front.taken = true;
    view = front.view;
    Object.assign(view.options, { onState: report, onPick: pick });
    if (front.touched) report({ threshold: view.threshold, position: view.position });
    else state();
    if (view.selected && !model.picked.kind) pick(view.meaning(view.selected));
    else selected();
    view.recolour();
    shown(++loading);
  };
  /** The store that the page began with, once its first part has unpacked it; null if it began with another. */
  const held = async () => {
    if (!window.lmttFront && document.getElementById("lmtt-front"))
      await new Promise((done) => { window.addEventListener("lmtt-front", done, { once: true }); });
    return window.lmttFront?.digest === model.opened ? window.lmttFront.store : null;
  };
  const load = async () => {
    const mine = ++loading;
    view?.destroy();
    view = null;
    root.replaceChildren();
    const sent = model.store?.byteLength > 0;
    if (!sent && !model.opened) {
      const none = document.createElement("p");
      none.className = "rv-none";
      none.textContent = "No run is shown yet. Write a prompt and press Trace, or open a stored run.";
      root.classList.add("rv");
      root.append(none);
      return;
    }
    const store = await (sent ? unpack(model.store) : held());
    if (mine !== loading) return; // another run came in meanwhile
    if (!store) {
      tell(() => { model.wanted = true; });
      return;
    }
    view = new RouteView(root, store, {
      threshold: model.threshold,
      position: place(store),
      tables: false, // the server's own files hold more
      onState: report,
      onPick: pick,
    });
    selected();
    shown(mine);
  };
  const state = () => {
    if (view && (model.threshold !== view.threshold || place(view.store) !== view.position))
      view.set({ threshold: model.threshold, position: place(view.store) });
  };
  model.on("store", load);
  model.on("dark", theme);
  model.on("threshold", state);
  model.on("position", state);
  model.on("picked", selected);
  model.on("by_hand", theme);
  // Bokeh takes models that the server sent for unknown to it until the browser has said something: the first click
  // on one of them would carry it in full.
  model.on("sent", () => {
    model.received = model.sent;
    up = true;
    root.dataset.session = "up";
    for (const what of waiting.splice(0)) what();
  });
  system.addEventListener("change", follow);
  // At once, before the page's own switch tells the server of the system's scheme as if somebody had used it.
  if (remembered()) model.dark = remembered() === "dark";
  else follow();
  theme();
  if (drawn) adopt();
  else load();
  return root;
}
