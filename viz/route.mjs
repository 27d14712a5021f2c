// The route graph in the browser: which edges are on the route to a token at a threshold. Nothing here draws.
//
// 1. `decoded`, `unpack`: what store.py packed, as typed arrays.
// 2. `reveal`: from the target down, the threshold at which each edge appears (lmtt/graph/routes.py says why).
// 3. `inOrder`: edges by falling reveal, rising depth, rising id; every route is a prefix of that order.
// 4. `prefix`: how many edges of the order are on the route at a threshold.
// 5. `Selection`: one token's route, computed once for each token and asked for any threshold.
//
// Shares are float32 in Python; Math.fround makes a threshold one too, so that both agree on every edge.

export const ATTENTION = 0, RESIDUAL = 1, MLP = 2, OPAQUE = 3; // kinds of edges
export const SLOTS = 4; // blocks of a layer: opaque, mid, mlp, post; block 0 is the embeddings
const SLOT_OPAQUE = 0, SLOT_MID = 1, SLOT_MLP = 2, SLOT_POST = 3;
const AHEAD = 3; // times lower than the threshold asked for
const TYPES = { f4: Float32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };

/** Bytes of base64. Without the newer method a plain loop: a callback for each of millions of bytes is slow. */
export function decoded(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text), found = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) found[i] = letters.charCodeAt(i);
  return found;
}

/** The store from its bytes (zlib). Throws if they are not a store of this version. */
export async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  if (head.schema !== "lmtt.store/1") throw new Error(`not a store of this version: ${head.schema}`);
  const store = { ...head };
  for (const [name, type, count, offset] of head.columns) store[name] = new TYPES[type](buffer, offset, count);
  store.gate ??= store.weight; // what decides that an edge appears; the renormalised variant has another
  return withGeometry(store);
}

/** Adds each edge's layer, each sum's source blocks and the size of the node numbering. */
export function withGeometry(store) {
  const { sumPtr, sumBlock, parallel } = store;
  const sums = sumBlock.length;
  store.size = store.weight.length;
  store.nodes = (1 + SLOTS * store.layers) * store.tokens;
  store.layer = new Uint16Array(store.size);
  store.slot = new Uint8Array(store.size);
  store.sourceBlock = []; // [sum][kind]
  for (let s = 0; s < sums; s++) {
    const layer = Math.floor((sumBlock[s] - 1) / SLOTS), slot = (sumBlock[s] - 1) % SLOTS;
    store.layer.fill(layer, sumPtr[s], sumPtr[s + 1]);
    store.slot.fill(slot, sumPtr[s], sumPtr[s + 1]);
    const pre = SLOTS * layer, of = (inLayer) => 1 + SLOTS * layer + inLayer;
    const before = parallel[layer] ? pre : of(SLOT_MID);
    store.sourceBlock.push(
      slot === SLOT_OPAQUE ? [pre, pre, pre, pre]
        : slot === SLOT_MLP ? [before, before, before, before]
          : slot === SLOT_MID || parallel[layer] ? [pre, pre, of(SLOT_MLP), of(SLOT_OPAQUE)]
            : [before, before, of(SLOT_MLP), of(SLOT_OPAQUE)],
    );
  }
  return store;
}

/** Reveal thresholds on the way to `position`: `edge` [size] and `node` [nodes], 0 where none leads there. */
export function reveal(store, position) {
  const { tokens, sumPtr, sumBlock, sourceBlock, kind, source, target, gate } = store;
  const edge = new Float32Array(store.size), node = new Float32Array(store.nodes);
  node[store.nodes - tokens + position] = Infinity;
  for (let s = sumBlock.length - 1; s >= 0; s--) {
    const into = sumBlock[s] * tokens, from = sourceBlock[s].map((block) => block * tokens);
    for (let e = sumPtr[s], end = sumPtr[s + 1]; e < end; e++) {
      const above = node[into + target[e]];
      const r = gate[e] < above ? gate[e] : above;
      if (r === 0) continue;
      edge[e] = r;
      const below = from[kind[e]] + source[e];
      if (r > node[below]) node[below] = r;
    }
  }
  return { edge, node };
}

/** Ids of all edges with a reveal above `above`, in the order in which a falling threshold adds them. */
export function inOrder(store, revealed, above = 0) {
  const { sumPtr } = store;
  const bits = new Uint32Array(revealed.buffer, revealed.byteOffset, revealed.length);
  const least = new Uint32Array(Float32Array.of(above).buffer)[0];
  let n = 0;
  for (let e = 0; e < bits.length; e++) if (bits[e] > least) n++;
  // Positive floats sort as their bits do. Keys travel with the ids: looked up by id they would be far apart.
  let ids = new Uint32Array(n), keys = new Uint32Array(n);
  const counts = [0, 11, 22].map(() => new Uint32Array(2049));
  n = 0;
  for (let s = sumPtr.length - 2; s >= 0; s--) // depth rising, id rising: what the stable sort keeps on ties
    for (let e = sumPtr[s]; e < sumPtr[s + 1]; e++) {
      const key = bits[e];
      if (key <= least) continue;
      counts[0][2048 - (key & 2047)]++;
      counts[1][2048 - ((key >>> 11) & 2047)]++;
      counts[2][2048 - (key >>> 22)]++;
      keys[n] = key;
      ids[n++] = e;
    }
  let other = new Uint32Array(n), otherKeys = new Uint32Array(n);
  for (const [pass, count] of counts.entries()) {
    const shift = 11 * pass;
    for (let b = 0, sum = 0; b <= 2048; b++) {
      const here = count[b];
      count[b] = sum;
      sum += here;
    }
    for (let i = 0; i < n; i++) {
      const key = keys[i], at = count[2048 - ((key >>> shift) & 2047)]++;
      other[at] = ids[i];
      otherKeys[at] = key;
    }
    [ids, other, keys, otherKeys] = [other, ids, otherKeys, keys];
  }
  return ids;
}

/** How many edges of `order` have a reveal above `threshold`. */
export function prefix(order, revealed, threshold) {
  const tau = Math.fround(threshold);
  let low = 0, high = order.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (revealed[order[middle]] > tau) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * The route to one token, for any threshold.
 *
 * `order` is sorted as far down as a threshold asked for it so far, and some way on: to sort half a million edges
 * takes longer than all else about a new start, and few of them are ever above the slider.
 */
export class Selection {
  constructor(store, position) {
    this.store = store;
    this.position = position;
    const { edge, node } = reveal(store, position);
    this.edge = edge;
    this.node = node;
    this.order = new Uint32Array(0); // every edge of a reveal above `sorted`; `count` comes first
    this.sorted = Infinity;
  }

  count(threshold) {
    if (Math.fround(threshold) < this.sorted) {
      this.sorted = threshold > 2 * this.store.floor ? Math.fround(threshold / AHEAD) : 0;
      this.order = inOrder(this.store, this.edge, this.sorted);
    }
    return prefix(this.order, this.edge, threshold);
  }

  /** Uint32Array of edge ids, strongest reveal first. */
  edges(threshold) {
    const n = this.count(threshold);
    return this.order.subarray(0, n);
  }

  /** Positions that the route passes through, rising; always the target's own. */
  positions(threshold) {
    const { tokens, nodes } = this.store, tau = Math.fround(threshold);
    if (!this._highest) { // of the states at each position: an edge's ends are revealed no later than it is
      this._highest = new Float32Array(tokens);
      for (let node = 0, p = 0; node < nodes; node++) {
        if (this.node[node] > this._highest[p]) this._highest[p] = this.node[node];
        if (++p === tokens) p = 0;
      }
    }
    const found = [];
    for (let p = 0; p < tokens; p++) if (this._highest[p] > tau) found.push(p);
    return found;
  }
}

/** Node numbers of an edge's ends. */
export function ends(store, e) {
  const of = blockOf(store, e), sum = store.sumBlock.indexOf(of);
  return [
    store.sourceBlock[sum][store.kind[e]] * store.tokens + store.source[e],
    of * store.tokens + store.target[e],
  ];
}

function blockOf(store, e) {
  return 1 + SLOTS * store.layer[e] + store.slot[e];
}

/** What a node is called, as in `Route.node_ids`. */
export function nodeName(store, number) {
  const block = Math.floor(number / store.tokens), position = number % store.tokens;
  if (block === 0) return `embed.${position}`;
  return `L${Math.floor((block - 1) / SLOTS)}.${["opaque", "mid", "mlp", "post"][(block - 1) % SLOTS]}.${position}`;
}

/** [[head, weight], ...] of an attention edge, strongest first; the store has those of strong edges only. */
export function headsOf(store, e) {
  let low = 0, high = store.headEdge.length; // headEdge rises
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (store.headEdge[middle] < e) low = middle + 1;
    else high = middle;
  }
  const found = [];
  for (let i = low; i < store.headEdge.length && store.headEdge[i] === e; i++)
    found.push([store.head[i], store.headWeight[i]]);
  return found.sort((a, b) => b[1] - a[1]);
}

/** [{neuron, contribution}, ...] of an MLP edge, strongest first; the store has those of strong MLPs only. */
export function neuronsOf(store, e) {
  const { neuronRow, neuron, neuronShare } = store, row = store.layer[e] * store.tokens + store.target[e], found = [];
  let low = 0, high = neuronRow.length; // neuronRow rises
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (neuronRow[middle] < row) low = middle + 1;
    else high = middle;
  }
  if (neuronRow[low] !== row) return found;
  const each = neuron.length / neuronRow.length;
  for (let i = each * low; i < each * (low + 1); i++)
    if (neuronShare[i] > 0) found.push({ neuron: neuron[i], contribution: neuronShare[i] });
  return found;
}

/** One row for each edge of a route, as `Route.to_csv` names them, for a download from the page. */
export function edgeTable(store, selection, threshold) {
  const kinds = ["attention", "residual", "mlp", "opaque"];
  return Array.from(selection.edges(threshold), (e) => {
    const [from, to] = ends(store, e);
    return {
      source: nodeName(store, from), target: nodeName(store, to), kind: kinds[store.kind[e]], layer: store.layer[e],
      source_position: store.source[e], target_position: store.target[e],
      source_token: store.token[store.source[e]], target_token: store.token[store.target[e]],
      weight: store.weight[e], reveal: selection.edge[e],
    };
  });
}
