// Neurons, in three steps.
//
// 1. Prepare: |whole|_1 and the fixed parts of each row.
// 2. Tiles of 128 neurons by some rows: W_down by neurons and |W_down[n]|_1 for the rounding margins (before all tiles,
//    where they are few), G = sign(whole) W_down^T by look-up of sums of four, c = row_scale * act, g = c * G. Neurons
//    whose bound is above the threshold are evaluated at once: proximity = max(0, g - 2 * sum relu(c w sign(y) - |y|)).
// 3. Rows: the k largest. A neuron that kept its first-order value is evaluated too where its bound reaches the
//    k-th largest exact value, by falling bound; then the sums are taken and divided.
//
// No number depends on the rows of a tile or on which thread computes what: a tile's neurons are the same always.
#include "core/neurons.h"

#include <algorithm>
#include <utility>

#include "core/transpose.h"

namespace lmtt {
namespace {

constexpr int64_t kTile = 8 * kPanel;  // neurons of a tile: their rows of W_down are packed together
constexpr int64_t kTileRows = 512;     // rows that one thread takes: more share a table of sums, fewer share the work
constexpr int64_t kPanelStride = (kTileRows + 1) * kPanel;  // of a tile's products: powers of two collide in cache
constexpr int64_t kTurned = 64;        // neurons whose rows of W_down are written together: they stay in cache
constexpr int64_t kTilesEach = 4;      // for each thread, at least, or tiles are divided by rows too
constexpr int64_t kFewRows = 24;       // taken together however small the workspace is

struct Scratch {  // one thread's memory
  Buffer<float> panel, table, product;
  Buffer<Record> records;
  std::vector<std::pair<float, int32_t>> best, open;
  double evaluating = 0;  // seconds; only of the calling thread, which is number 0
};

class Pass {
 public:
  Pass(const NeuronInput& input, NeuronOutput& output);
  void run();

 private:
  void prepare();
  void tile(int64_t tile, int64_t begin, int64_t end, bool turns, Scratch& scratch, bool timed);
  void turn(int64_t begin, int64_t end, int64_t d, int64_t d_end);
  void measure(int64_t begin, int64_t end);
  void finish(int64_t i, Scratch& scratch);
  // Exact proximities of at most kTogether neurons of row i, of which g is known; NaN has no sign here, for the sign
  // bit marks first-order values.
  void exact(int64_t i, int some, const int64_t* n, const float* coefficient, const float* g, float* value) const {
    const float *u[kTogether], *u_largest[kTogether];
    float over[kTogether];
    for (int p = 0; p < some; ++p) u[p] = in.rows + n[p] * D, u_largest[p] = largest + n[p] * blocks;
    kernel.overshoots(some, u, u_largest, in.parts.whole + i * D, smallest + i * blocks, coefficient, D, over);
    for (int p = 0; p < some; ++p) {
      const float x = g[p] - 2 * over[p];
      value[p] = x < 0 ? 0 : std::fabs(x);
    }
  }
  float scale(int64_t i) const { return in.row_scale ? in.row_scale[i] : 1; }

  const NeuronInput& in;
  NeuronOutput& out;
  const Kernels& kernel = kernels();
  const int64_t T, F, D, tiles, blocks;  // blocks: of sixteen coordinates
  const bool turns_in_tiles;             // W_down is turned and measured by tiles, not before them
  int64_t rows_at_once, first_row = 0;
  std::vector<float> threshold;    // [T]
  std::vector<PartsRow> parts;     // [T]
  Buffer<uint16_t> offsets;        // [tables of D, T, groups of a table]: the signs of whole
  Buffer<float> margin;            // [F]: rounding error of G at most
  Buffer<float> smallest;          // [T, blocks] of whole
  Buffer<float> largest;           // [F, blocks] of W_down
  Buffer<float> values;            // [rows at once, F]: first-order -relu(g) with the sign bit set, or exact
  Buffer<ScreenSums> sums;         // [rows at once, tiles]
  std::vector<int64_t> positive, evaluated;  // [T]
  std::vector<Scratch> scratch;    // by thread
};

Pass::Pass(const NeuronInput& input, NeuronOutput& output)
    : in(input), out(output), T(in.T), F(in.F), D(in.parts.D), tiles((in.F + kTile - 1) / kTile),
      blocks(padded(panels(in.parts.D))), turns_in_tiles(tiles >= kTilesEach * in.threads) {
  const int64_t per_row = F * int64_t(sizeof(float)) + tiles * int64_t(sizeof(ScreenSums));
  rows_at_once = std::min(T, std::max(kFewRows, in.workspace / 2 / per_row));
  threshold.resize(T), parts.resize(T), positive.resize(T), evaluated.resize(T);
  offsets = Buffer<uint16_t>(T * tables(D) * kTableGroups);
  margin = Buffer<float>(F);
  smallest = Buffer<float>(T * blocks);
  largest = Buffer<float>(F * blocks);
  values = Buffer<float>(rows_at_once * F);
  sums = Buffer<ScreenSums>(rows_at_once * tiles);
  scratch.resize(in.threads);
  for (Scratch& s : scratch) {
    s.panel = Buffer<float>(kTableDepth * kPanel);
    s.table = Buffer<float>(groups(kTableDepth) * (kPanel << kGroup));
    s.product = Buffer<float>(kTile / kPanel * kPanelStride);
    s.records = Buffer<Record>(kTile);
  }
}

void Pass::run() {
  Stopwatch watch;
  prepare();
  for (first_row = 0; first_row < T; first_row += rows_at_once) {
    const int64_t end = std::min(T, first_row + rows_at_once);
    const bool turns = turns_in_tiles && first_row == 0;  // then one thread takes all rows of a tile
    const int64_t rows_each = turns ? end : kTileRows, stripes = (end - first_row + rows_each - 1) / rows_each;
    parallel_for(in.threads, tiles * stripes, [&](int64_t item, int thread) {
      const int64_t first = first_row + item / tiles * rows_each, last = std::min(end, first + rows_each);
      for (int64_t begin = first; begin < last; begin += kTileRows) {
        tile(item % tiles, begin, std::min(last, begin + kTileRows), turns && begin == 0, scratch[thread], thread == 0);
      }
    });
    // Screening and evaluation alternate within a tile: the calling thread's own evaluation is told apart.
    const double both = watch.lap(), exact_part = std::min(both, std::exchange(scratch[0].evaluating, 0.0));
    out.stages.screening += both - exact_part, out.stages.evaluation += exact_part;
    parallel_for(in.threads, end - first_row,
                 [&](int64_t r, int thread) { finish(first_row + r, scratch[thread]); });
    out.stages.reduction += watch.lap();
  }
  for (int64_t i = 0; i < T; ++i) out.positive += positive[i], out.evaluated += evaluated[i];
}

void Pass::prepare() {
  parallel_for(in.threads, turns_in_tiles ? 0 : (F + kTurned - 1) / kTurned, [&](int64_t strip, int) {
    const int64_t begin = strip * kTurned, end = std::min(F, begin + kTurned);
    turn(begin, end, 0, D);
    measure(begin, end);
  });
  parallel_for(in.threads, T, [&](int64_t i, int) {
    parts[i] = fixed_parts(in.parts, i, out.residual, out.bias, out.others);
    threshold[i] = static_cast<float>(in.screen * parts[i].size);
    kernel.block_smallest(in.parts.whole + i * D, D, smallest + i * blocks);
    for (int64_t d = 0; d < D; d += kTableDepth) {
      kernel.sign_offsets(in.parts.whole + i * D + d, std::min(kTableDepth, D - d),
                          offsets + (d / kTableDepth * T + i) * kTableGroups);
    }
  });
}

// Coordinates d..d_end of neurons begin..end, where W_down is stored the other way round.
void Pass::turn(int64_t begin, int64_t end, int64_t d, int64_t d_end) {
  if (in.stored) transpose_part(in.stored, D, F, d, d_end, begin, end - begin, in.rows);
}

// What is to be known of neurons begin..end, whose rows are there.
void Pass::measure(int64_t begin, int64_t end) {
  const double gamma = rounding(sign_chain(D) + 8);  // 8: the coefficient and the margin itself
  for (int64_t n = begin; n < end; ++n) {
    margin[n] = static_cast<float>(gamma * kernel.absolute_sum(in.rows + n * D, D));
    kernel.block_largest(in.rows + n * D, D, largest + n * blocks);
  }
}

// Step 2, for rows begin..end. With `turns` it also turns the tile's neurons, a table's coordinates at a time: W_down
// passes through the cache once for both of its uses.
void Pass::tile(int64_t t, int64_t begin, int64_t end, bool turns, Scratch& s, bool timed) {
  const int64_t n0 = t * kTile, count = std::min(F - n0, kTile);
  for (int64_t m = 0; m < count; m += kTurned) {
    const int64_t some = std::min(kTurned, count - m);
    for (int64_t d = 0; d < D; d += kTableDepth) {
      const int64_t depth = std::min(kTableDepth, D - d);
      if (turns) turn(n0 + m, n0 + m + some, d, d + depth);
      for (int64_t n = m; n < m + some; n += kPanel) {
        const int columns = static_cast<int>(std::min<int64_t>(kPanel, count - n));
        if (in.stored) {
          kernel.sign_table(in.stored + d * F + n0 + n, F, columns, depth, s.table.get());
        } else {
          kernel.pack_rows(in.rows + (n0 + n) * D + d, D, columns, depth, s.panel.get());
          kernel.sign_table(s.panel.get(), kPanel, kPanel, depth, s.table.get());
        }
        kernel.add_signed(end - begin, groups(depth), offsets + (d / kTableDepth * T + begin) * kTableGroups,
                          kTableGroups, s.table.get(), s.product + n / kPanel * kPanelStride, kPanel, d > 0);
      }
    }
    if (turns) measure(n0 + m, n0 + m + some);
  }
  for (int64_t i = begin; i < end; ++i) {
    float* row_values = values + (i - first_row) * F + n0;
    ScreenSums& row_sums = sums[(i - first_row) * tiles + t];
    const int64_t found = kernel.screen_neurons(
        count, in.act + i * F + n0, scale(i), s.product + (i - begin) * kPanel, kPanelStride, margin + n0, threshold[i],
        static_cast<int32_t>(i), static_cast<int32_t>(n0), row_values, s.records.get(), &row_sums);
    if (found == 0) continue;
    const auto evaluate = [&] {
      for (int64_t m = 0; m < found; m += kTogether) {
        const int some = static_cast<int>(std::min<int64_t>(kTogether, found - m));
        int64_t n[kTogether];
        float coefficients[kTogether], g[kTogether], value[kTogether];
        for (int p = 0; p < some; ++p) {
          const Record& record = s.records[m + p];
          n[p] = record.source, coefficients[p] = record.coefficient, g[p] = record.value;
        }
        exact(i, some, n, coefficients, g, value);
        for (int p = 0; p < some; ++p) row_values[n[p] - n0] = value[p];
      }
    };
    if (!timed) {
      evaluate();
      continue;
    }
    Stopwatch watch;
    evaluate();
    s.evaluating += watch.lap();
  }
}

// Step 3, for one row.
void Pass::finish(int64_t i, Scratch& s) {
  float* row = values + (i - first_row) * F;
  const float* act = in.act + i * F;
  const auto coefficient = [&](int64_t n) { return act[n] * scale(i); };
  const auto before = [](const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  };
  const auto rank = [](float value) { return value != value ? INFINITY : value; };  // NaN first: an order needs one

  double signed_sum = 0, absolute = 0;
  positive[i] = evaluated[i] = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const ScreenSums& part = sums[(i - first_row) * tiles + t];
    signed_sum += part.signed_sum, absolute += part.absolute;
    positive[i] += part.positive, evaluated[i] += part.evaluated;
  }

  // The k largest exact values, collected with some to spare; then a heap with the worst on top.
  const std::size_t k = static_cast<std::size_t>(in.k);
  constexpr int64_t kSome = 64;
  s.best.clear();
  const auto shrink = [&] {
    if (s.best.size() < k) return -INFINITY;
    std::nth_element(s.best.begin(), s.best.begin() + in.k - 1, s.best.end(), before);
    s.best.resize(k);
    return s.best[k - 1].first;
  };
  float least = -INFINITY;
  for (int64_t n = 0; n < F; n += kSome) {
    for (uint64_t set = kernel.exact_above(std::min(kSome, F - n), row + n, least); set; set &= set - 1) {
      const int64_t m = n + __builtin_ctzll(set);
      s.best.emplace_back(rank(row[m]), static_cast<int32_t>(m));
    }
    if (s.best.size() >= k + kSome) least = shrink();
  }
  shrink();
  std::make_heap(s.best.begin(), s.best.end(), before);
  const auto worst = [&] { return s.best.size() == k ? s.best.front().first : -INFINITY; };
  const auto offer = [&](float value, int64_t n) {
    const std::pair<float, int32_t> entry{rank(value), static_cast<int32_t>(n)};
    if (s.best.size() == k) {
      if (!before(entry, s.best.front())) return;
      std::pop_heap(s.best.begin(), s.best.end(), before);
      s.best.pop_back();
    }
    s.best.push_back(entry);
    std::push_heap(s.best.begin(), s.best.end(), before);
  };

  // Neurons with first-order values, by falling bound; a part of the bounds at a time, for most are far below. All are
  // at most the threshold: none matters where the k-th exact value is above it.
  const auto smaller_bound = [&](const auto& a, const auto& b) { return before(b, a); };
  for (const float part : {0.25f, 0.0625f, 0.0f}) {
    if (worst() > threshold[i]) break;
    const float floor = part > 0 ? std::max(worst(), threshold[i] * part) : worst();
    s.open.clear();
    for (int64_t n = 0; n < F; n += kSome) {
      const int64_t some = std::min(kSome, F - n);
      for (uint64_t set = kernel.open_from(some, row + n, act + n, scale(i), margin + n, floor); set; set &= set - 1) {
        const int64_t m = n + __builtin_ctzll(set);
        s.open.emplace_back(rank(std::fabs(coefficient(m)) * margin[m] - row[m]), static_cast<int32_t>(m));
      }
    }
    std::make_heap(s.open.begin(), s.open.end(), smaller_bound);
    while (!s.open.empty() && !(s.open.front().first < worst())) {
      const int64_t n = s.open.front().second;
      std::pop_heap(s.open.begin(), s.open.end(), smaller_bound);
      s.open.pop_back();
      const float c = coefficient(n), g = -row[n];
      exact(i, 1, &n, &c, &g, row + n);
      ++evaluated[i];
      offer(row[n], n);
    }
    if (worst() >= floor && floor > -INFINITY) break;  // all other bounds are below `floor`
  }

  double total, uncertain;
  kernel.neuron_sums(F, row, act, scale(i), margin.get(), &total, &uncertain);
  const double normaliser = parts[i].fixed + total;
  const double inverse = normaliser == 0 ? 0 : 1 / normaliser;
  std::sort_heap(s.best.begin(), s.best.end(), before);
  for (int64_t n = 0; n < in.k; ++n) {
    out.index[i * in.k + n] = s.best[n].second;
    out.value[i * in.k + n] = static_cast<float>(s.best[n].first * inverse);
  }
  out.normaliser[i] = static_cast<float>(normaliser);
  out.certificate[i] = certificate(uncertain, normaliser);
  out.checksum[i] = checksum(parts[i], signed_sum, absolute);
  share_fixed_parts(in.parts, i, normaliser, out.residual, out.bias, out.others);
}

}  // namespace

void neuron_contributions(const NeuronInput& in, NeuronOutput& out) { Pass(in, out).run(); }

}  // namespace lmtt
