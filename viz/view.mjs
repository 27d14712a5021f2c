// The route graph as a person uses it: slider, start, fold, zoom, pan, overview, hover, selection, keyboard.
//
// The same view is in the exported page and in the dashboard; nothing of it waits for a server. Prompt text
// reaches the document by textContent and the canvas only.

import { ATTENTION, edgeTable, ends, headsOf, MLP, neuronsOf, OPAQUE, nodeName, Selection, SLOTS } from "./route.mjs";
import { columnsOf, frameOf, Scene } from "./scene.mjs";
import { SvgContext } from "./svg.mjs";

const FOLD = 40; // more tokens than this are folded to those on the route, at first
const WINDOW = 48; // columns in view at first
const TOP = 0.8; // of the slider
const STEP = 0.005; // of its logarithm
const REMEMBERED = 8; // starts
const SETTLED = 250; // ms without a change until it is reported
const KINDS = ["attention", "residual", "MLP", "a sublayer not taken apart"];

export class RouteView {
  /**
   * root: an element to fill. options: threshold, position, fold, selected {edge | node | token}, height,
   * onState({threshold, position}) after a change came to rest, onPick({...}) after a click on something.
   */
  constructor(root, store, options = {}) {
    this.root = root;
    this.store = store;
    this.options = options;
    this.position = options.position ?? store.tokens - 1;
    this.threshold = Math.max(options.threshold ?? 0.04, store.floor);
    this.fold = options.fold ?? store.tokens > FOLD;
    this.selected = options.selected ?? null;
    this.cursor = undefined;
    this._selections = new Map();
    this._abort = new AbortController();
    this._build();
    this.recolour();
    this._recolumn();
    this.fit();
    const media = matchMedia("(prefers-color-scheme: dark)");
    this._on(media, "change", () => this.recolour());
    this._sizes = new ResizeObserver(() => this._resize());
    this._sizes.observe(this.stage);
    this._resize();
  }

  destroy() {
    this._abort.abort();
    this._sizes.disconnect();
    clearTimeout(this._settling);
  }

  /** The route to the chosen token; those used last are kept. */
  get selection() {
    let found = this._selections.get(this.position);
    if (!found) {
      found = new Selection(this.store, this.position);
      this._selections.set(this.position, found);
      if (this._selections.size > REMEMBERED) this._selections.delete(this._selections.keys().next().value);
    }
    return found;
  }

  /** Change threshold, position, fold or selected from outside; nothing is reported back. */
  set({ threshold, position, fold, selected }) {
    if (threshold !== undefined) this.threshold = Math.max(threshold, this.store.floor);
    if (position !== undefined) this.position = position;
    if (fold !== undefined) this.fold = fold;
    if (selected !== undefined) this.selected = selected;
    this._changed(false);
  }

  /** Whole route in view, as far as it can be read: else its last columns. */
  fit() {
    const n = this.columns.positions.length, shown = this.fold ? n : Math.min(n, WINDOW);
    const at = this.columns.column[this.position];
    const end = Math.min(n, Math.max(shown, (at < 0 ? n : at) + 1 + Math.floor((n - at - 1 < shown / 4) * shown / 4)));
    this.view = { x0: end - shown, x1: end, y0: -0.25, y1: this.store.layers + 0.15 };
    this.schedule();
  }

  /** Read the theme's colours again, as after a change of theme. */
  recolour() {
    const style = getComputedStyle(this.root), of = (name) => style.getPropertyValue(`--${name}`).trim();
    const ramp = (letter) => [0, 1, 2, 3, 4, 5].map((n) => of(letter + n));
    this.colours = {
      card: of("card"), band: of("band"), text: of("text"), muted: of("muted"), target: of("target"),
      node: of("node"), nodeLine: of("node-line"), opaque: of("opaque"),
      attention: ramp("a"), mlp: ramp("m"), residual: ramp("r"),
    };
    this._legend();
    this.schedule();
  }

  schedule() {
    if (this._waiting) return;
    this._waiting = true;
    requestAnimationFrame(() => {
      this._waiting = false;
      if (!this._abort.signal.aborted) this.draw();
    });
  }

  draw() {
    const width = this.stage.clientWidth, height = this.stage.clientHeight;
    if (!width || !height) return;
    const scale = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
      this.canvas.width = Math.round(width * scale);
      this.canvas.height = Math.round(height * scale);
    }
    const ctx = this.canvas.getContext("2d");
    ctx.setTransform(scale, 0, 0, scale, 0, 0);
    ctx.clearRect(0, 0, width, height);
    this.scene = this._scene(width, height);
    this.scene.draw(ctx, this.colours, this._marks());
    this._strip();
    this._badge();
    this.drawn = (this.drawn ?? 0) + 1; // frames, for those who measure
  }

  _scene(width, height) {
    const frame = frameOf(this.store, this.columns, width, height, this.view);
    return new Scene(this.store, this.selection, this.threshold, this.columns, this.view, frame);
  }

  _marks() {
    return { start: this.position, selected: this.selected, cursor: this.cursor };
  }

  // --- changes ---

  _changed(report = true) {
    this._recolumn();
    this._show();
    this.schedule();
    if (!report) return;
    clearTimeout(this._settling);
    this._settling = setTimeout(() => {
      this.options.onState?.({ threshold: this.threshold, position: this.position });
    }, SETTLED);
  }

  /** Columns follow the route when folded; the view follows them. */
  _recolumn() {
    const before = this.columns?.positions.length;
    this.columns = columnsOf(this.store, this.selection, this.threshold, this.fold);
    const n = this.columns.positions.length;
    if (!this.view || before === n) return;
    const whole = this.view.x0 <= 0 && this.view.x1 >= before;
    const width = whole ? n : Math.min(n, this.view.x1 - this.view.x0);
    this.view.x1 = Math.min(n, Math.max(width, this.view.x1 + n - before));
    this.view.x0 = this.view.x1 - width;
  }

  trace(position) {
    if (position === this.position) return;
    this.position = position;
    this.cursor = undefined;
    this._changed();
    this._reveal(position);
    this.say(`Tracing ${this._named(position)}, which says ${this.store.said[position][0][0]}.`);
  }

  /** Bring a position's column into view. */
  _reveal(position) {
    const column = this.columns.column[position], { view } = this, width = view.x1 - view.x0;
    if (column < 0 || (column >= view.x0 && column + 1 <= view.x1)) return;
    view.x0 = Math.max(0, Math.min(this.columns.positions.length - width, column + 1 - 0.75 * width));
    view.x1 = view.x0 + width;
    this.schedule();
  }

  zoom(factor, at = 0.5, vertical = false) {
    const { view } = this, [low, high, least, most] = vertical
      ? ["y0", "y1", 3, this.store.layers + 0.4]
      : ["x0", "x1", 4, this.columns.positions.length];
    const size = view[high] - view[low], wanted = Math.min(Math.max(size * factor, Math.min(least, most)), most);
    view[low] += (size - wanted) * at;
    view[high] = view[low] + wanted;
    this._inside();
  }

  pan(columns, layers = 0) {
    this.view.x0 += columns;
    this.view.x1 += columns;
    this.view.y0 += layers;
    this.view.y1 += layers;
    this._inside();
  }

  _inside() {
    const { view } = this;
    for (const [low, high, least, most] of [
      ["x0", "x1", 0, this.columns.positions.length],
      ["y0", "y1", -0.25, this.store.layers + 0.15],
    ]) {
      const shift = Math.max(least - view[low], Math.min(0, most - view[high]));
      view[low] += shift;
      view[high] = Math.min(view[high] + shift, Math.max(most, view[low] + 1));
    }
    this.schedule();
  }

  _pick(what) {
    if (what.start !== undefined) return this.trace(what.start);
    this.selected = what;
    this.schedule();
    this.say(this.describe(what).join(". "));
    this.options.onPick?.(this.meaning(what));
    return undefined;
  }

  /** A pick in words that do not depend on this store: what the server and a link are told. */
  meaning(what) {
    const { store } = this;
    if (what.token !== undefined) return { kind: "token", position: what.token };
    if (what.node !== undefined) {
      const [of, ...rest] = nodeName(store, what.node).split(".");
      const position = Number(rest.at(-1));
      return of === "embed"
        ? { kind: "node", layer: -1, site: "embed", position }
        : { kind: "node", layer: Number(of.slice(1)), site: rest[0], position };
    }
    const e = what.edge, position = store.target[e], layer = store.layer[e];
    if (store.kind[e] === ATTENTION) return { kind: "attention", layer, source: store.source[e], position };
    if (store.kind[e] === MLP) return { kind: "mlp", layer, position };
    if (store.kind[e] === OPAQUE) return { kind: "opaque", layer, position };
    return this.meaning({ node: ends(store, e)[1] });
  }

  /** What a meaning points at in this store, or null. */
  find({ kind, layer, source, position, site }) {
    const { store } = this;
    if (kind === "token") return { token: position };
    if (kind === "node") {
      if (site === "embed") return { node: position };
      return { node: (1 + SLOTS * layer + ["opaque", "mid", "mlp", "post"].indexOf(site)) * store.tokens + position };
    }
    const wanted = { attention: ATTENTION, mlp: MLP, opaque: OPAQUE }[kind];
    for (let e = store.size - 1; e >= 0; e--)
      if (store.layer[e] === layer && store.kind[e] === wanted && store.target[e] === position)
        if (kind !== "attention" || store.source[e] === source) return { edge: e };
    return null;
  }

  // --- words ---

  _named(position) { return `${this.store.token[position]} [${position}]`; }

  /** Lines about an edge, a node or a token, with exact values. */
  describe(what) {
    const { store } = this;
    if (what.start !== undefined || what.token !== undefined) {
      const p = what.start ?? what.token;
      const said = store.said[p].map(([token, probability]) => `${token} ${(100 * probability).toFixed(1)} %`);
      const hint = what.start !== undefined ? "Click to trace this prediction" : "Click for what it received and gave";
      return [`After ${this._named(p)} the model says`, said.join("   "), hint];
    }
    if (what.node !== undefined) {
      const { layer, site, position } = this.meaning(what);
      const where = { embed: "embedding", mid: `after layer ${layer}’s attention`, post: `after layer ${layer}` }[site];
      const shown = this.selection.node[what.node];
      return [`${this._named(position)}, ${where}`, shown === Infinity ? "the start" : `revealed at ${shown.toFixed(4)}`];
    }
    const e = what.edge, kind = store.kind[e];
    const at = `layer ${store.layer[e]}, ${KINDS[kind]}`;
    const where = kind === ATTENTION
      ? `${this._named(store.source[e])} → ${this._named(store.target[e])}`
      : `at ${this._named(store.target[e])}`;
    const lines = [`${at} ${where}`, `contribution ${store.weight[e].toFixed(4)}, revealed at ${this.selection.edge[e].toFixed(4)}`];
    if (kind === ATTENTION) {
      const heads = headsOf(store, e).slice(0, 6).map(([head, weight]) => `${head}: ${weight.toFixed(4)}`);
      if (heads.length) lines.push(`heads ${heads.join(",  ")}`);
    }
    if (kind === MLP) {
      const neurons = neuronsOf(store, e).map(({ neuron, contribution }) => `${neuron}: ${contribution.toFixed(4)}`);
      if (neurons.length) lines.push(`neurons ${neurons.join(",  ")}`);
    }
    return lines;
  }

  _badge() {
    const { route, inView, drawn } = this.scene.counts, number = (n) => n.toLocaleString("en");
    const tau = Number(this.threshold.toPrecision(3));
    let text = `${number(route)} edges above ${tau}`;
    if (drawn < inView) text = `${number(drawn)} strongest of ${number(inView)} edges in view above ${tau}: zoom in or raise it`;
    else if (inView < route) text += `, ${number(inView)} in view`;
    if (this.store.left && this.threshold <= this.store.floor * 1.001)
      text += ` (the ${number(this.store.left)} weaker edges of this trace are not in the page)`;
    if (this.badge.textContent !== text) this.badge.textContent = text;
    this.slider.setAttribute("aria-valuetext", text);
  }

  say(text) { this.live.textContent = text; }

  // --- the document ---

  _on(target, type, listener, options = {}) {
    target.addEventListener(type, listener, { ...options, signal: this._abort.signal });
  }

  _build() {
    const { store, root } = this;
    const make = (tag, name, text, parent = root) => {
      const element = document.createElement(tag);
      if (name) element.className = name;
      if (text) element.textContent = text;
      parent.append(element);
      return element;
    };
    const button = (text, title, action, parent) => {
      const element = make("button", "rv-button", text, parent);
      element.type = "button";
      element.title = title;
      element.setAttribute("aria-label", title);
      this._on(element, "click", action);
      return element;
    };
    root.replaceChildren();
    root.classList.add("rv");
    const bar = make("div", "rv-bar");

    const slide = make("label", "rv-slide", "threshold", bar);
    this.slider = make("input", "rv-slider", "", slide);
    Object.assign(this.slider, { type: "range", min: Math.log10(store.floor || 1e-4), max: Math.log10(TOP), step: STEP });
    this.slider.disabled = store.renormalised !== null;
    this.tau = make("output", "rv-tau", "", slide);
    this._on(this.slider, "input", () => {
      this.threshold = Math.max(store.floor, Number((10 ** this.slider.value).toPrecision(3)));
      this._changed();
    });

    const starts = make("label", "rv-start", "why", bar);
    this.start = make("select", "", "", starts);
    for (let p = 0; p < store.tokens; p++) {
      const said = store.said[p][0][0];
      const option = make("option", "", `${said.slice(0, 24)}  after ${store.token[p].slice(0, 24)} [${p}]`, this.start);
      option.value = p;
    }
    this._on(this.start, "change", () => this.trace(Number(this.start.value)));

    this.folder = button("fold", "Fold tokens that are not on the route (f)", () => this._toggleFold(), bar);
    const zooms = make("span", "rv-group", "", bar);
    button("−", "Zoom out (-)", () => this.zoom(1.5), zooms);
    button("+", "Zoom in (+)", () => this.zoom(1 / 1.5), zooms);
    button("⤢", "Whole route (0)", () => this.fit(), zooms);
    const saves = make("span", "rv-group", "", bar);
    button("PNG", "Save the picture as PNG", () => this.savePng(), saves);
    button("SVG", "Save the picture as SVG, for print", () => save(this.svg(), "route.svg", "image/svg+xml"), saves);
    if (this.options.tables !== false) {
      button("CSV", "Save the route's edges as CSV", () => save(this.csv(), "route.csv", "text/csv"), saves);
      button("JSON", "Save all that this page holds of the route as JSON", () => save(this.json(), "route.json", "application/json"), saves);
    }
    this.badge = make("output", "rv-badge", "", bar);

    this.stage = make("div", "rv-stage");
    if (this.options.height) this.stage.style.height = `${this.options.height}px`;
    this.canvas = make("canvas", "rv-canvas", "", this.stage);
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", "route graph; arrow keys move along the stream, Enter opens, Tab leaves");
    this.tip = make("div", "rv-tip", "", this.stage);
    this.strip = make("canvas", "rv-strip");
    this.strip.setAttribute("aria-hidden", "true");
    const foot = make("div", "rv-foot");
    this.legend = make("div", "rv-legend", "", foot);
    make("span", "rv-keys", "drag pans · after a click the wheel zooms · keys: arrows, Enter, e, m, t, f, [ ], + −", foot);
    this.live = make("p", "rv-live");
    this.live.setAttribute("aria-live", "polite");
    this._pointer();
    this._on(this.canvas, "keydown", (event) => this._key(event));
    this._overview();
    this._show();
  }

  /** Widgets say what the state is. */
  _show() {
    const value = String(Math.log10(this.threshold || this.store.floor || 1e-4));
    if (Math.abs(this.slider.value - value) > STEP) this.slider.value = value;
    this.tau.textContent = String(Number(this.threshold.toPrecision(3)));
    this.start.value = String(this.position);
    this.folder.setAttribute("aria-pressed", String(this.fold));
  }

  _toggleFold() {
    this.fold = !this.fold;
    this._changed();
    this.fit();
  }

  _legend() {
    const make = (text, draw, width) => {
      const item = document.createElement("span"), canvas = document.createElement("canvas");
      const scale = window.devicePixelRatio || 1;
      Object.assign(canvas, { width: width * scale, height: 14 * scale });
      canvas.style.width = `${width}px`;
      canvas.style.height = "14px";
      const ctx = canvas.getContext("2d");
      ctx.scale(scale, scale);
      draw(ctx);
      item.append(canvas, text);
      return item;
    };
    const lines = (ramp, widths) => (ctx) => ramp.forEach((colour, n) => {
      ctx.strokeStyle = colour;
      ctx.lineWidth = widths[n];
      ctx.beginPath();
      ctx.moveTo(3 + 14 * n, 11);
      ctx.lineTo(12 + 14 * n, 3);
      ctx.stroke();
    });
    const { colours } = this;
    const items = [
      make("attention 0.02 – 0.4", lines(colours.attention, [0.8, 1.2, 1.8, 2.6, 3.6, 4.8]), 88),
      make("MLP", (ctx) => colours.mlp.forEach((colour, n) => {
        const side = 4 + 1.2 * n;
        ctx.fillStyle = colour;
        ctx.fillRect(6 + 12 * n - side / 2, 7 - side / 2, side, side);
      }), 76),
      make("residual", (ctx) => {
        ctx.strokeStyle = colours.residual[5];
        ctx.lineWidth = 2;
        ctx.beginPath();
        ctx.moveTo(6, 1);
        ctx.lineTo(6, 13);
        ctx.stroke();
      }, 12),
    ];
    if (this.store.kind.includes(OPAQUE))
      items.push(make("not taken apart", (ctx) => {
        ctx.fillStyle = colours.opaque;
        ctx.translate(7, 7);
        ctx.rotate(Math.PI / 4);
        ctx.fillRect(-4, -4, 8, 8);
      }, 14));
    items.push(make("start: click a ▼ to trace it", (ctx) => {
      ctx.fillStyle = colours.target;
      ctx.beginPath();
      ctx.moveTo(1, 2);
      ctx.lineTo(13, 2);
      ctx.lineTo(7, 12);
      ctx.fill();
    }, 14));
    this.legend.replaceChildren(...items);
  }

  _resize() {
    this.stage.style.minHeight = `${Math.min(1100, Math.max(380, 170 + 9 * this.store.layers))}px`;
    this.schedule();
  }

  // --- pointing ---

  _pointer() {
    let from = null;
    const point = (event) => [event.offsetX, event.offsetY];
    this._on(this.canvas, "pointerdown", (event) => {
      if (event.button !== 0) return;
      from = { at: point(event), moved: false, view: { ...this.view } };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this._on(this.canvas, "pointermove", (event) => {
      const [x, y] = point(event);
      if (!from) return this._hover(x, y);
      const [dx, dy] = [x - from.at[0], y - from.at[1]];
      if (!from.moved && Math.hypot(dx, dy) < 5) return undefined;
      from.moved = true;
      this.tip.hidden = true;
      Object.assign(this.view, from.view);
      return this.pan(-dx / this.scene.pitch, dy / this.scene.row);
    });
    this._on(this.canvas, "pointerup", (event) => {
      const was = from;
      from = null;
      if (!was || was.moved) return;
      const what = this.scene.hit(...point(event));
      if (what) this._pick(what);
    });
    this._on(this.canvas, "pointercancel", () => { from = null; });
    this._on(this.canvas, "pointerleave", () => { this.tip.hidden = true; });
    this._on(this.canvas, "dblclick", () => this.fit());
    // The page scrolls under an idle pointer; the wheel zooms once the graph was clicked, and always with Ctrl.
    this._on(this.canvas, "wheel", (event) => {
      const focused = this.root.getRootNode().activeElement === this.canvas;
      if (!focused && !event.ctrlKey) return;
      event.preventDefault();
      const [x, y] = point(event), { frame } = this.scene;
      const turn = event.deltaY || event.deltaX;
      if (event.shiftKey) this.pan(turn / this.scene.pitch);
      else if (event.altKey) this.zoom(1.0015 ** turn, 1 - (y - frame.top) / (frame.bottom - frame.top), true);
      else this.zoom(1.0015 ** turn, (x - frame.left) / (frame.right - frame.left));
    }, { passive: false });
  }

  _hover(x, y) {
    const what = this.scene?.hit(x, y);
    this.canvas.style.cursor = what ? "pointer" : "grab";
    this.tip.hidden = !what;
    if (!what) return;
    this.tip.replaceChildren(...this.describe(what).map((line) => {
      const element = document.createElement("div");
      element.textContent = line;
      return element;
    }));
    const right = x > this.stage.clientWidth / 2;
    this.tip.style.left = right ? "auto" : `${x + 14}px`;
    this.tip.style.right = right ? `${this.stage.clientWidth - x + 14}px` : "auto";
    this.tip.style.top = `${Math.max(2, Math.min(y + 14, this.stage.clientHeight - this.tip.offsetHeight - 4))}px`;
  }

  /** Where each column's route lies, and which columns are in view; drag to move the view. */
  _strip() {
    const n = this.columns.positions.length, { view } = this;
    const whole = view.x0 <= 0 && view.x1 >= n;
    this.strip.hidden = whole;
    if (whole) return;
    const scale = window.devicePixelRatio || 1, width = this.strip.clientWidth, height = this.strip.clientHeight;
    this.strip.width = width * scale;
    this.strip.height = height * scale;
    const ctx = this.strip.getContext("2d");
    ctx.scale(scale, scale);
    const tau = Math.fround(this.threshold), { store, selection } = this, step = SLOTS * store.tokens;
    ctx.fillStyle = this.colours.attention[2];
    for (let c = 0; c < n; c++) {
      let states = 0;
      for (let node = (SLOTS) * store.tokens + this.columns.positions[c]; node < store.nodes; node += step)
        if (selection.node[node] > tau) states++;
      const tall = ((height - 4) * states) / store.layers;
      ctx.fillRect((c * width) / n, height - 2 - tall, Math.max(0.7, width / n - 0.5), tall);
    }
    ctx.fillStyle = ctx.strokeStyle = this.colours.target;
    ctx.globalAlpha = 0.14;
    const [left, wide] = [(view.x0 * width) / n, ((view.x1 - view.x0) * width) / n];
    ctx.fillRect(left, 0, wide, height);
    ctx.globalAlpha = 1;
    ctx.strokeRect(left + 0.5, 0.5, Math.max(2, wide - 1), height - 1);
  }

  _overview() {
    let dragging = false;
    const move = (event) => {
      const at = (event.offsetX / this.strip.clientWidth) * this.columns.positions.length;
      this.pan(at - (this.view.x0 + this.view.x1) / 2);
    };
    this._on(this.strip, "pointerdown", (event) => {
      dragging = true;
      this.strip.setPointerCapture(event.pointerId);
      move(event);
    });
    this._on(this.strip, "pointermove", (event) => { if (dragging) move(event); });
    this._on(this.strip, "pointerup", () => { dragging = false; });
  }

  // --- keys ---

  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = {
      ArrowUp: () => this._step(1), ArrowDown: () => this._step(-1),
      ArrowLeft: () => this._sideways(-1), ArrowRight: () => this._sideways(1),
      Enter: () => this.cursor !== undefined && this._pick({ node: this.cursor }),
      e: () => this._nextEdge(ATTENTION), m: () => this._nextEdge(MLP),
      t: () => this.cursor !== undefined && this.trace(this.cursor % this.store.tokens),
      f: () => this._toggleFold(),
      "+": () => this.zoom(1 / 1.5), "-": () => this.zoom(1.5), 0: () => this.fit(),
      "[": () => this._nudge(-10), "]": () => this._nudge(10),
      Escape: () => { this.cursor = undefined; this.selected = null; this.schedule(); },
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  _nudge(steps) {
    if (this.slider.disabled) return;
    this.slider.value = String(Number(this.slider.value) + steps * STEP);
    this.slider.dispatchEvent(new Event("input"));
    this.say(this.badge.textContent);
  }

  /** Up or down the stream of the cursor's token. */
  _step(direction) {
    const { store } = this, tau = Math.fround(this.threshold);
    if (this.cursor === undefined) return this._moveTo(store.nodes - store.tokens + this.position);
    for (let node = this.cursor + direction * store.tokens; node >= 0 && node < store.nodes; node += direction * store.tokens) {
      const block = Math.floor(node / store.tokens), slot = (block - 1) % SLOTS;
      if ((block === 0 || slot === 1 || slot === 3) && this.selection.node[node] > tau) return this._moveTo(node);
    }
    return undefined;
  }

  _sideways(direction) {
    const { store, columns } = this, tau = Math.fround(this.threshold);
    if (this.cursor === undefined) return this._step(1);
    const base = this.cursor - (this.cursor % store.tokens);
    for (let c = columns.column[this.cursor % store.tokens] + direction; c >= 0 && c < columns.positions.length; c += direction) {
      const node = base + columns.positions[c];
      if (this.selection.node[node] > tau) return this._moveTo(node);
    }
    return undefined;
  }

  _moveTo(node) {
    this.cursor = node;
    this._reveal(node % this.store.tokens);
    this.schedule();
    this.say(this.describe({ node }).join(". "));
  }

  /** The next strongest edge of a kind into the cursor's node (its layer's, for an MLP); Enter is not needed. */
  _nextEdge(kind) {
    if (this.cursor === undefined) return;
    const { store, selection } = this, position = this.cursor % store.tokens;
    const block = Math.floor(this.cursor / store.tokens), layer = Math.max(0, Math.floor((block - 1) / SLOTS));
    const into = Array.from(selection.edges(this.threshold)).filter(
      (e) => store.kind[e] === kind && store.layer[e] === layer && store.target[e] === position && (kind !== MLP || store.slot[e] === 3),
    );
    into.sort((a, b) => store.weight[b] - store.weight[a]);
    if (!into.length) return this.say(`no edge of ${KINDS[kind]} into this node is on the route`);
    return this._pick({ edge: into[(into.indexOf(this.selected?.edge) + 1) % into.length] });
  }

  // --- exports ---

  svg() {
    const width = this.stage.clientWidth, height = this.stage.clientHeight, ctx = new SvgContext(width, height);
    this._scene(width, height).draw(ctx, this.colours, this._marks());
    return ctx.toString(this.colours.card);
  }

  savePng() {
    const width = this.stage.clientWidth, height = this.stage.clientHeight;
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    const ctx = canvas.getContext("2d");
    ctx.scale(2, 2);
    ctx.fillStyle = this.colours.card;
    ctx.fillRect(0, 0, width, height);
    this._scene(width, height).draw(ctx, this.colours, this._marks());
    canvas.toBlob((blob) => save(blob, "route.png"));
  }

  csv() {
    const rows = edgeTable(this.store, this.selection, this.threshold);
    // A cell that begins like a formula would run as one in a spreadsheet.
    const cell = (value) => `"${String(value).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
    const names = Object.keys(rows[0] ?? { source: 0, target: 0, kind: 0, layer: 0, weight: 0, reveal: 0 });
    return [names, ...rows.map((row) => Object.values(row))].map((row) => row.map(cell).join(",")).join("\r\n");
  }

  /** Everything that the page holds of the route that is shown. */
  json() {
    const { store } = this;
    const predictions = store.said[this.position].map(([token, probability]) => ({ token, probability }));
    const edges = edgeTable(store, this.selection, this.threshold);
    this.selection.edges(this.threshold).forEach((e, n) => {
      if (store.kind[e] === ATTENTION) edges[n].heads = headsOf(store, e).map(([head, weight]) => ({ head, weight }));
      else if (store.kind[e] === MLP && store.slot[e] === 3) edges[n].neurons = neuronsOf(store, e);
    });
    return JSON.stringify({
      schema: "lmtt.edges/1", model: store.name, layers: store.layers, tokens: store.token, position: this.position,
      threshold: this.threshold, floor: store.floor, renormalised: store.renormalised, predictions, edges,
    });
  }
}

function save(content, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
