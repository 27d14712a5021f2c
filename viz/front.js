// The page's first part: draws the run that it carries; `panel.js` takes the view over when the session is there.
import { decoded, unpack } from "./route.mjs";
import { RouteView } from "./view.mjs";

const front = document.getElementById("lmtt-front"), text = document.getElementById("lmtt-store");
let remembered = null;
try { remembered = localStorage.getItem("lmtt-theme"); } catch { /* private windows */ }
document.documentElement.dataset.theme =
  remembered ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

const asked = new URLSearchParams(location.search);
const [threshold, position] = [Number(asked.get("threshold")), Number(asked.get("position") ?? NaN)];
const bytes = decoded(text.textContent);
text.remove(); // megabytes
const store = await unpack(bytes);
const root = document.createElement("div");
root.style.height = "100%";
front.querySelector(".front-view").append(root);
const view = new RouteView(root, store, {
  threshold: threshold > 0 && threshold < 1 ? threshold : undefined,
  position: Number.isInteger(position) && position >= 0 && position < store.tokens ? position : undefined,
  tables: false,
});
root.view = view;
window.lmttFront = { digest: front.dataset.digest, store, view, root, touched: false };
view.options.onState = () => { window.lmttFront.touched = true; };
window.dispatchEvent(new Event("lmtt-front"));
// The second frame after: what was drawn is on the screen. For whoever measures how long that took.
requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("lmtt drawn")));
