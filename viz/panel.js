// The route view as a Panel component. Only what came to rest goes to the server: start and threshold, a pick.
import { unpack } from "./route.mjs";
import { RouteView } from "./view.mjs";

const REMEMBERED_THEME = "lmtt-theme";

export function render({ model }) {
  const root = document.createElement("div");
  root.style.height = "100%";
  let view = null, loading = 0;
  // Custom properties are inherited by every pane's shadow root: one place decides how all our own HTML looks.
  if (!document.getElementById("lmtt-themes")) {
    const style = Object.assign(document.createElement("style"), { id: "lmtt-themes", textContent: model.themes });
    document.head.append(style);
  }

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
  const load = async () => {
    const mine = ++loading;
    view?.destroy();
    view = null;
    root.replaceChildren();
    if (!model.store || !model.store.byteLength) {
      const none = document.createElement("p");
      none.className = "rv-none";
      none.textContent = "No run is shown yet. Write a prompt and press Trace, or open a stored run.";
      root.classList.add("rv");
      root.append(none);
      return;
    }
    const store = await unpack(model.store);
    if (mine !== loading) return; // another run came in meanwhile
    view = new RouteView(root, store, {
      threshold: model.threshold,
      position: place(store),
      tables: false, // the server's own files hold more
      onState: (state) => Object.assign(model, state),
      onPick: (picked) => { model.picked = picked; },
    });
    selected();
    root.view = view; // for those who measure
    root.dataset.ready = String(mine);
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
  model.on("sent", () => { model.received = model.sent; });
  system.addEventListener("change", follow);
  if (remembered()) model.dark = remembered() === "dark";
  else follow();
  theme();
  load();
  return root;
}
