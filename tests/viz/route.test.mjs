// The route module by itself, under node: `node --test tests/viz/route.test.mjs`; pytest runs it too.
import assert from "node:assert/strict";
import { test } from "node:test";

import { ATTENTION, edgeTable, inOrder, MLP, prefix, RESIDUAL, Selection, withGeometry } from "../../viz/route.mjs";

// Two tokens, one sequential layer: blocks embed 0, opaque 1, mid 2, mlp 3, post 4.
const example = () => withGeometry({
  tokens: 2, layers: 1, parallel: [false], floor: 0, token: ["a", "b"],
  sumPtr: Uint32Array.of(0, 4, 5, 7), sumBlock: Uint32Array.of(2, 3, 4),
  kind: Uint8Array.of(RESIDUAL, ATTENTION, ATTENTION, RESIDUAL, MLP, RESIDUAL, MLP),
  source: Uint16Array.of(0, 0, 1, 1, 1, 1, 1), target: Uint16Array.of(0, 1, 1, 1, 1, 1, 1),
  weight: Float32Array.of(1, 0.5, 0.25, 0.25, 0.75, 0.25, 0.75), gate: Float32Array.of(1, 0.5, 0.25, 0.25, 0.75, 0.25, 0.75),
  headEdge: new Uint32Array(), head: new Uint16Array(), headWeight: new Float32Array(),
});

test("an edge is revealed by the weakest edge on the strongest way to the start", () => {
  const { edge, node } = new Selection(example(), 1);
  // The MLP's way (0.75) beats the residual's (0.25), so what enters mid is limited by its own weight only.
  assert.deepEqual(Array.from(edge), [0, 0.5, 0.25, 0.25, 0.75, 0.25, 0.75]);
  assert.equal(node[4 * 2 + 1], Infinity);
  assert.equal(node[0], 0.5);
});

test("no edge leads to another token's start", () => {
  assert.equal(new Selection(example(), 0).count(0), 0);
});

test("strictly above, compared as float32", () => {
  const selection = new Selection(example(), 1);
  assert.equal(selection.count(0.5), 2);
  assert.equal(selection.count(0.5 - 1e-12), 2, "rounds to 0.5 as a float32");
  assert.equal(selection.count(0.4999), 3);
  assert.deepEqual(selection.positions(0.6), [1]);
  assert.deepEqual(selection.positions(0.3), [0, 1]);
});

test("the order is a stable sort by reveal, depth and id", () => {
  const sums = 40, size = 4000;
  const sumPtr = Uint32Array.from({ length: sums + 1 }, (_, s) => (s * size) / sums);
  let seed = 7;
  const random = () => ((seed = (seed * 1103515245 + 12345) % 2 ** 31) / 2 ** 31);
  const revealed = Float32Array.from({ length: size }, () => (random() < 0.1 ? 0 : Math.round(random() * 64) / 64 ** 2 + 1e-30));
  const sum = (e) => Math.floor((e * sums) / size);
  const wanted = Array.from(revealed.keys()).filter((e) => revealed[e] > 0)
    .sort((a, b) => revealed[b] - revealed[a] || sum(b) - sum(a) || a - b);
  const order = inOrder({ size, sumPtr }, revealed);
  assert.deepEqual(Array.from(order), wanted);
  for (const tau of [0, 1e-30, 0.001, 1 / 4096, 0.01, 1])
    assert.equal(prefix(order, revealed, tau), wanted.filter((e) => revealed[e] > Math.fround(tau)).length);
});

test("a table names nodes as Python does", () => {
  const store = example();
  const rows = edgeTable(store, new Selection(store, 1), 0.4);
  assert.deepEqual(rows.map((row) => [row.source, row.target, row.kind]), [
    ["L0.mlp.1", "L0.post.1", "mlp"], ["L0.mid.1", "L0.mlp.1", "mlp"], ["embed.0", "L0.mid.1", "attention"],
  ]);
});

test("a new start sorts no further down than it has to, and a lower threshold finds the rest", () => {
  const store = { ...example(), floor: 1e-3 }, selection = new Selection(store, 1), whole = inOrder(store, selection.edge);
  assert.equal(selection.count(0.9), 0);
  assert.ok(selection.order.length < whole.length);
  for (const tau of [0.6, 0.3, 0.2, 0.001, 0.4, 0]) {
    const kept = Array.from(whole).filter((e) => selection.edge[e] > Math.fround(tau));
    assert.deepEqual(Array.from(selection.edges(tau)), kept);
  }
});
