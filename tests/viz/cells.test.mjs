// node --test tests/viz/cells.test.mjs
import assert from "node:assert/strict";
import { test } from "node:test";
import { cut, inView } from "../../viz/cells.mjs";

const letters = (word) => 6 * Array.from(word).length;

test("all columns are in view where each has room, else as many of the last as have", () => {
  assert.deepEqual(inView(15, 700, 27), [0, 15]);
  assert.deepEqual(inView(15, 405, 27), [0, 15]);
  assert.deepEqual(inView(15, 404, 27), [1, 15]);
  assert.deepEqual(inView(64, 280, 27), [54, 64]);
  assert.deepEqual(inView(5, 10, 27), [4, 5]);
});

test("a word is cut to what its cell has room for, and says so", () => {
  assert.equal(cut("·the", 24, letters), "·the");
  assert.equal(cut("·there", 24, letters), "·th…");
  assert.equal(cut("·there", 11, letters), "");
  assert.equal(cut("", 0, letters), "");
});

test("no character of two halves is cut in the middle", () => {
  assert.equal(cut("🧑🧑🧑", 12, letters), "🧑…");
});
