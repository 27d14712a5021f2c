// The exported page: unpack the store that it carries and show it; the address keeps start and threshold.
import { decoded, unpack } from "./route.mjs";
import { RouteView } from "./view.mjs";

const root = document.getElementById("route");
const bytes = decoded(document.getElementById("store").textContent);

const asked = () => {
  const given = new URLSearchParams(location.hash.slice(1));
  const [threshold, position] = [Number(given.get("threshold")), Number(given.get("position") ?? NaN)];
  return {
    threshold: threshold > 0 && threshold < 1 ? threshold : Number(root.dataset.threshold),
    position: Number.isInteger(position) && position >= 0 ? position : Number(root.dataset.position),
  };
};

const store = await unpack(bytes);
const start = asked();
const view = new RouteView(root, store, {
  ...start,
  position: Math.min(start.position, store.tokens - 1),
  onState: ({ threshold, position }) => {
    if (location.protocol.startsWith("about")) return; // a notebook's frame has no address of its own
    history.replaceState(null, "", `#position=${position}&threshold=${Number(threshold.toPrecision(4))}`);
  },
});
addEventListener("hashchange", () => view.set(asked()));

const toggle = document.getElementById("theme");
toggle.hidden = false;
toggle.addEventListener("click", () => {
  const shown = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = shown === "dark" ? "light" : "dark";
  view.recolour();
});
document.documentElement.dataset.ready = "yes";
window.lmtt = { view, store }; // for a reader's console
