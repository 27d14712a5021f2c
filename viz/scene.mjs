// What is drawn of a route and where: glyphs in pixels, their drawing on a 2D context, and what lies under a point.
//
// Tokens are columns, the residual stream runs up each; layer l reaches from height l to l + 1. Attention runs
// in the gap between a layer's input and its middle, where no other node lies, so straight lines cross nothing.
// An MLP is a square to the right of its column, a sublayer that was not taken apart a diamond to the left.
//
// At most BUDGET edges are drawn, in the order in which a falling threshold adds them: any beginning of that
// order hangs together. Columns too narrow for single edges show the stream as runs instead (level of detail).

import { ATTENTION, MLP, OPAQUE, RESIDUAL, SLOTS } from "./route.mjs";

export const STEPS = [0.02, 0.05, 0.1, 0.2, 0.4]; // of a contribution: six strengths
export const BUDGET = 4000; // what software rasterisation paints within half of a tenth of a second
const HEIGHT = [0.33, 0.66, 0.83, 1]; // of a layer's blocks within it
const ATTENTION_WIDTH = [0.8, 1.2, 1.8, 2.6, 3.6, 4.8], RESIDUAL_WIDTH = [0.8, 1, 1.3, 1.7, 2.1, 2.5];
const NODE_ROW = 11, NODE_PITCH = 13; // pixels a layer and a token need for nodes to be drawn
const RINGS = 700; // of more nodes each is a dot
const DETOUR_ROW = 24; // for an MLP's way out of the stream and back
const RUNS_ROW = 6, RUNS_PITCH = 7; // and for single residual edges
const SLANTED = 84; // columns narrower than this have slanted labels
const LABEL_PITCH = 13; // pixels between labels
const LABEL = 14; // characters of a slanted label
const CHARACTER = 7.3; // pixels of a monospaced one
export const FONT = '12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';
const SMALL = '11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

const strength = (weight) => {
  let bin = 0;
  while (bin < STEPS.length && weight >= STEPS[bin]) bin++;
  return bin;
};
const cut = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

/** Which positions have a column: those on the route if folded, else all. */
export function columnsOf(store, selection, threshold, folded) {
  const positions = folded
    ? selection.positions(threshold)
    : Array.from({ length: store.tokens }, (_, position) => position);
  const column = new Int32Array(store.tokens).fill(-1);
  positions.forEach((position, c) => { column[position] = c; });
  return { positions, column };
}

/** Where the plot lies in a drawing of some size: labels above and below get what the longest one needs. */
export function frameOf(store, columns, width, height, view) {
  const pitch = (width - 60) / (view.x1 - view.x0);
  const slanted = pitch < SLANTED;
  const longest = (texts) => Math.min(LABEL, texts.reduce((most, text) => Math.max(most, text.length), 1));
  const room = (texts) => (slanted ? 16 + 0.74 * CHARACTER * longest(texts) : 24);
  const shown = columns.positions.slice(Math.max(0, Math.floor(view.x0)), Math.ceil(view.x1));
  const top = room(shown.map((p) => store.said[p][0][0])) + 20;
  const bottom = height - room(shown.map((p) => store.token[p])) - 4;
  return { left: 40, right: width - (slanted ? 52 : 12), top, bottom, width, height, slanted };
}

export class Scene {
  /** view: {x0, x1, y0, y1} in columns and layers; frame: of `frameOf`. */
  constructor(store, selection, threshold, columns, view, frame) {
    Object.assign(this, { store, selection, threshold, columns, view, frame });
    this.pitch = (frame.right - frame.left) / (view.x1 - view.x0);
    this.row = (frame.bottom - frame.top) / (view.y1 - view.y0);
    this.showNodes = this.row >= NODE_ROW && this.pitch >= NODE_PITCH;
    this.runs = this.row < RUNS_ROW || this.pitch < RUNS_PITCH;
    this.aside = Math.min(13, this.pitch * 0.32);
    this._collect();
  }

  x(column) { return this.frame.left + (column + 0.5 - this.view.x0) * this.pitch; }
  y(height) { return this.frame.bottom - (height - this.view.y0) * this.row; }

  /** Height of an edge's source and target. */
  heights(e) {
    const { store } = this, layer = store.layer[e], slot = store.slot[e], kind = store.kind[e];
    const whole = store.parallel[layer] ? 3 : 1;
    const top = layer + HEIGHT[slot];
    if (kind === RESIDUAL && slot === 3 && whole === 1) return [layer + HEIGHT[1], top];
    if (kind === MLP && slot === 3) return [layer + HEIGHT[2], top];
    if (kind === OPAQUE && slot === whole) return [layer + HEIGHT[0], top];
    return [kind === MLP && whole === 1 ? layer + HEIGHT[1] : layer, top];
  }

  /** The glyphs in view: ids of edges by family, weakest first, and the counts that the badge shows. */
  _collect() {
    const { store, selection, columns, view, runs } = this;
    const { kind, source, target, layer, slot } = store, { column } = columns;
    const n = selection.count(this.threshold), order = selection.order;
    const found = { attention: [], residual: [], mlp: [], opaque: [] };
    const stream = runs ? new Uint8Array(columns.positions.length * 2 * store.layers) : null;
    let drawn = 0, inView = 0;
    for (let k = 0; k < n; k++) {
      const e = order[k], of = kind[e], l = layer[e];
      if (l + 1 < view.y0 || l > view.y1) continue;
      const right = column[target[e]];
      if (right + 1 < view.x0) continue;
      const left = of === ATTENTION ? column[source[e]] : right;
      if (left > view.x1) continue;
      inView++;
      if (runs && of === RESIDUAL) {
        const at = right * 2 * store.layers + 2 * l;
        if (slot[e] === 1) stream[at] = 1;
        else if (store.parallel[l]) stream[at] = stream[at + 1] = 1;
        else stream[at + 1] = 1;
        drawn++;
        continue;
      }
      if (drawn >= BUDGET) continue;
      drawn++;
      if (of === ATTENTION) found.attention.push(e);
      else if (of === RESIDUAL) found.residual.push(e);
      else if (of === MLP && slot[e] === 3) found.mlp.push(e);
      else if (of === OPAQUE && slot[e] !== 0) found.opaque.push(e);
    }
    for (const family of Object.values(found)) family.reverse(); // the strongest are painted over the others
    this.glyphs = found;
    this.stream = stream;
    this.counts = { route: n, inView, drawn };
  }

  /** [x, y, node number] of the stream's nodes in view. */
  nodes() {
    const { store, columns, view } = this, tau = Math.fround(this.threshold), found = [];
    if (!this.showNodes) return found;
    const first = Math.max(0, Math.floor(view.x0)), last = Math.min(columns.positions.length, Math.ceil(view.x1));
    for (let c = first; c < last; c++) {
      const p = columns.positions[c];
      for (let block = 0; block <= SLOTS * store.layers; block++) {
        const slot = (block - 1) % SLOTS;
        if (block > 0 && slot !== 1 && slot !== 3) continue;
        const number = block * store.tokens + p;
        if (!(this.selection.node[number] > tau)) continue;
        const height = blockHeight(block);
        if (height >= view.y0 - 0.2 && height <= view.y1 + 0.2) found.push([this.x(c), this.y(height), number]);
      }
    }
    return found;
  }

  side(e) {
    return Math.max(1.5, Math.min(4 + 1.2 * strength(this.store.weight[e]), this.row * 0.5, this.pitch * 0.36));
  }

  /** Where an edge's glyph is: a line, or the centre of a square or diamond. */
  place(e) {
    const { store } = this, column = this.columns.column;
    const x = this.x(column[store.target[e]]), [low, high] = this.heights(e);
    if (store.kind[e] === MLP) return { x: x + this.aside, y: this.y(store.layer[e] + HEIGHT[2]) };
    if (store.kind[e] === OPAQUE) return { x: x - this.aside, y: this.y(store.layer[e] + HEIGHT[0]) };
    return { x0: this.x(column[store.source[e]]), y0: this.y(low), x1: x, y1: this.y(high) };
  }

  draw(ctx, colours, { start, selected, cursor } = {}) {
    const { frame } = this;
    ctx.save();
    ctx.beginPath();
    // On whole pixels: a clip between them has every stroke blended at its border, which takes as long again.
    const left = Math.floor(frame.left), top = Math.floor(frame.top - 2);
    ctx.rect(left, top, Math.ceil(frame.right) - left, Math.ceil(frame.bottom + 2) - top);
    ctx.clip();
    this._bands(ctx, colours);
    if (this.stream) this._runs(ctx, colours);
    this._lines(ctx, this.glyphs.residual, colours.residual, RESIDUAL_WIDTH);
    this._squares(ctx, colours);
    this._lines(ctx, this.glyphs.attention, colours.attention, ATTENTION_WIDTH);
    this._nodes(ctx, colours);
    if (selected) this._selected(ctx, colours, selected);
    if (cursor !== undefined) this._cursor(ctx, colours, cursor);
    ctx.restore();
    this._axis(ctx, colours);
    this._labels(ctx, colours, start);
  }

  _bands(ctx, colours) {
    ctx.fillStyle = colours.band;
    const { frame, view, store } = this;
    for (let l = Math.max(0, Math.floor(view.y0)); l < Math.min(store.layers, view.y1); l++)
      if (l % 2 === 0) ctx.fillRect(frame.left, this.y(l + 1), frame.right - frame.left, this.row);
  }

  _runs(ctx, colours) {
    const halves = 2 * this.store.layers;
    ctx.strokeStyle = colours.residual[4];
    ctx.lineWidth = Math.max(0.6, Math.min(1.6, this.pitch * 0.3));
    ctx.beginPath();
    for (let c = Math.max(0, Math.floor(this.view.x0)); c < Math.min(this.columns.positions.length, this.view.x1); c++)
      for (let h = 0; h < halves; h++) {
        if (!this.stream[c * halves + h]) continue;
        let end = h;
        while (end < halves && this.stream[c * halves + end]) end++;
        ctx.moveTo(this.x(c), this.y(half(h)));
        ctx.lineTo(this.x(c), this.y(half(end)));
        h = end;
      }
    ctx.stroke();
  }

  /** One path for each strength. */
  _lines(ctx, edges, ramp, widths) {
    const { store } = this;
    ctx.lineCap = "butt"; // round ends take three times as long, and lie under nodes
    for (let bin = 0; bin < ramp.length; bin++) {
      let any = false;
      for (const e of edges) {
        if (strength(store.weight[e]) !== bin) continue;
        if (!any) { ctx.beginPath(); any = true; }
        this._trace(ctx, e);
      }
      if (!any) continue;
      ctx.strokeStyle = ramp[bin];
      ctx.lineWidth = Math.min(widths[bin], Math.max(0.6, this.row * 0.4));
      ctx.stroke();
    }
  }

  _trace(ctx, e) {
    const { x0, y0, x1, y1 } = this.place(e);
    ctx.moveTo(x0, y0);
    if (x0 === x1 && this.store.kind[e] === ATTENTION) // as a straight line it would hide under the stream
      ctx.quadraticCurveTo(x0 - 1.6 * this.aside, (y0 + y1) / 2, x1, y1);
    else ctx.lineTo(x1, y1);
  }

  _squares(ctx, colours) {
    const { store, glyphs } = this;
    const detours = this.row >= DETOUR_ROW && this.pitch >= NODE_PITCH;
    for (const [edges, ramp] of [[glyphs.mlp, colours.mlp], [glyphs.opaque, null]])
      for (let bin = 0; bin < 6; bin++) {
        const some = edges.filter((e) => strength(store.weight[e]) === bin);
        if (!some.length) continue;
        ctx.fillStyle = ctx.strokeStyle = ramp ? ramp[bin] : colours.opaque;
        if (detours) {
          ctx.beginPath();
          for (const e of some) this._detour(ctx, e);
          ctx.lineWidth = 0.9;
          ctx.stroke();
        }
        ctx.beginPath();
        for (const e of some) this._mark(ctx, e, this.side(e));
        ctx.fill();
      }
  }

  /** The way out of the stream to the glyph beside it, and back. */
  _detour(ctx, e) {
    const { store } = this, { x, y } = this.place(e), c = this.x(this.columns.column[store.target[e]]);
    const l = store.layer[e];
    const reads = store.kind[e] === MLP && !store.parallel[l] ? l + HEIGHT[1] : l;
    const writes = this.heights(e)[1];
    ctx.moveTo(c, this.y(reads));
    ctx.quadraticCurveTo(x, this.y(reads), x, y);
    ctx.quadraticCurveTo(x, this.y(writes), c, this.y(writes));
  }

  _mark(ctx, e, side) {
    const { x, y } = this.place(e), half_ = side / 2;
    if (this.store.kind[e] === MLP) {
      ctx.rect(x - half_, y - half_, side, side);
      return;
    }
    ctx.moveTo(x, y - half_ * 1.3);
    ctx.lineTo(x + half_ * 1.3, y);
    ctx.lineTo(x, y + half_ * 1.3);
    ctx.lineTo(x - half_ * 1.3, y);
    ctx.closePath();
  }

  _nodes(ctx, colours) {
    const radius = Math.min(2.6, this.row * 0.13, this.pitch * 0.14), nodes = this.nodes();
    if (!nodes.length) return;
    const ring = [radius + 0.45, colours.nodeLine], inside = [radius - 0.45, colours.node];
    // Two discs, as outlines take longer than both; where there are very many nodes one has to do.
    for (const [size, colour] of nodes.length > RINGS ? [[radius - 0.2, colours.nodeLine]] : [ring, inside]) {
      ctx.beginPath();
      for (const [x, y] of nodes) {
        ctx.moveTo(x + size, y);
        ctx.arc(x, y, size, 0, 2 * Math.PI);
      }
      ctx.fillStyle = colour;
      ctx.fill();
    }
  }

  _selected(ctx, colours, selected) {
    ctx.strokeStyle = ctx.fillStyle = colours.target;
    ctx.beginPath();
    if (selected.edge !== undefined) {
      const e = selected.edge, kind = this.store.kind[e];
      if (this.columns.column[this.store.source[e]] < 0 || this.columns.column[this.store.target[e]] < 0) return;
      if (kind === MLP || kind === OPAQUE) {
        this._mark(ctx, e, this.side(e) + 4);
        ctx.fill();
        return;
      }
      this._trace(ctx, e);
      ctx.lineWidth = 4.5;
      ctx.stroke();
    } else if (selected.node !== undefined) {
      const at = this._node(selected.node);
      if (!at) return;
      ctx.arc(...at, 5.5, 0, 2 * Math.PI);
      ctx.fill();
    } else if (selected.token !== undefined && this.columns.column[selected.token] >= 0) {
      const x = this.x(this.columns.column[selected.token]);
      ctx.globalAlpha = 0.12;
      ctx.fillRect(x - this.pitch / 2, this.frame.top, this.pitch, this.frame.bottom - this.frame.top);
      ctx.globalAlpha = 1;
    }
  }

  _cursor(ctx, colours, number) {
    const at = this._node(number);
    if (!at) return;
    ctx.beginPath();
    ctx.arc(...at, 8, 0, 2 * Math.PI);
    ctx.strokeStyle = colours.target;
    ctx.lineWidth = 2;
    ctx.stroke();
  }

  _node(number) {
    const column = this.columns.column[number % this.store.tokens];
    return column < 0 ? null : [this.x(column), this.y(blockHeight(Math.floor(number / this.store.tokens)))];
  }

  _axis(ctx, colours) {
    const { frame, view, store } = this, every = Math.ceil(15 / this.row);
    ctx.font = SMALL;
    ctx.fillStyle = colours.muted;
    ctx.textAlign = "right";
    for (let l = 0; l < store.layers; l += every) {
      const y = this.y(l + 0.5);
      if (l + 0.5 >= view.y0 && l + 0.5 <= view.y1) ctx.fillText(String(l), frame.left - 8, y + 4);
    }
    ctx.fillText("layer", frame.left - 8, frame.top - 7);
  }

  _labels(ctx, colours, start) {
    const { store, columns, frame, view } = this, { slanted } = frame;
    const every = Math.max(1, Math.ceil(LABEL_PITCH / this.pitch));
    const length = slanted ? LABEL : Math.max(2, Math.floor(this.pitch / CHARACTER) - 1);
    const first = Math.max(0, Math.ceil(view.x0 - 0.5)), last = Math.min(columns.positions.length, view.x1);
    const startColumn = columns.column[start];
    const near = (c) => c !== startColumn && Math.abs(c - startColumn) < every; // leaves room for the start's
    ctx.font = FONT;
    for (let c = first; c < last; c++) {
      const p = columns.positions[c], x = this.x(c), goal = p === start;
      if (c % every === 0 || goal || every === 1) {
        triangle(ctx, x, frame.top - 3, goal ? 6.5 : Math.min(4.5, this.pitch * 0.4));
        ctx.fillStyle = goal ? colours.target : colours.card;
        ctx.strokeStyle = goal ? colours.target : colours.nodeLine;
        ctx.lineWidth = 0.9;
        ctx.fill();
        ctx.stroke();
      }
      if (!goal && (c % every !== 0 || near(c))) continue;
      const on = this.selection.node[p] > Math.fround(this.threshold) || goal;
      ctx.fillStyle = goal ? colours.target : colours.muted;
      label(ctx, cut(store.said[p][0][0], length), x, frame.top - 15, slanted ? -1 : 0);
      ctx.fillStyle = goal ? colours.target : colours.text;
      ctx.globalAlpha = on ? 1 : 0.5;
      label(ctx, cut(store.token[p], length), x, frame.bottom + (slanted ? 12 : 17), slanted ? 1 : 0);
      ctx.globalAlpha = 1;
      if (c > 0 && columns.positions[c - 1] !== p - 1 && this.pitch > 16) {
        ctx.fillStyle = colours.muted;
        ctx.textAlign = "center";
        ctx.fillText("⋯", x - this.pitch / 2, frame.bottom + 8);
      }
    }
  }

  /** What a point means: {edge}, {node}, {start: position}, {token: position} or null. */
  hit(px, py) {
    const { frame, columns } = this;
    const c = Math.round((px - frame.left) / this.pitch + this.view.x0 - 0.5);
    const p = columns.positions[c];
    if (px < frame.left - 8 || px > frame.right + 40) return null;
    if (py < frame.top + 1) return p === undefined ? null : { start: p };
    if (py > frame.bottom + 4) return p === undefined ? null : { token: p };
    let best = null, nearest = 7;
    const offer = (distance, what) => { if (distance < nearest) { nearest = distance; best = what; } };
    for (const e of [...this.glyphs.mlp, ...this.glyphs.opaque]) {
      const at = this.place(e), reach = this.side(e) / 2;
      offer(Math.max(0, Math.max(Math.abs(px - at.x), Math.abs(py - at.y)) - reach), { edge: e });
    }
    for (const [x, y, node] of this.nodes()) offer(Math.max(0, Math.hypot(px - x, py - y) - 2), { node });
    for (const e of this.glyphs.attention) {
      const { x0, y0, x1, y1 } = this.place(e);
      const bend = x0 === x1 ? x0 - 0.8 * this.aside : null;
      offer(
        bend === null ? toSegment(px, py, x0, y0, x1, y1) + 1
          : Math.min(toSegment(px, py, x0, y0, bend, (y0 + y1) / 2), toSegment(px, py, bend, (y0 + y1) / 2, x1, y1)) + 1,
        { edge: e },
      );
    }
    for (const e of this.glyphs.residual) {
      const { x0, y0, x1, y1 } = this.place(e);
      offer(toSegment(px, py, x0, y0, x1, y1) + 2.5, { edge: e });
    }
    return best;
  }
}

function blockHeight(block) {
  return block === 0 ? 0 : Math.floor((block - 1) / SLOTS) + HEIGHT[(block - 1) % SLOTS];
}

function half(h) {
  return (h >> 1) + (h & 1 ? HEIGHT[1] : 0);
}

function triangle(ctx, x, y, size) {
  ctx.beginPath();
  ctx.moveTo(x - size, y - 1.5 * size);
  ctx.lineTo(x + size, y - 1.5 * size);
  ctx.lineTo(x, y);
  ctx.closePath();
}

/** Text at a point: centred, or slanted upwards (-1) or downwards (1). */
function label(ctx, text, x, y, slant) {
  if (slant === 0) {
    ctx.textAlign = "center";
    ctx.fillText(text, x, y);
    return;
  }
  ctx.save();
  ctx.translate(x - 1, y);
  ctx.rotate((slant * Math.PI) / 4);
  ctx.textAlign = "left";
  ctx.fillText(text, 0, slant > 0 ? 4 : 0);
  ctx.restore();
}

function toSegment(px, py, x0, y0, x1, y1) {
  const dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy;
  const t = length ? Math.max(0, Math.min(1, ((px - x0) * dx + (py - y0) * dy) / length)) : 0;
  return Math.hypot(px - x0 - t * dx, py - y0 - t * dy);
}
