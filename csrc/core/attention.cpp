// Attention, in five steps; nothing of size T * T * H and nothing of size T * T * D is ever held.
//
// 1. Prepare: |whole|_1 and the fixed parts of each row; each pair's rounding margin; k and v as panels.
// 2. Directions: R[i, h] = sign(whole[i]) W_O[h]^T, for as many rows as fit, by look-up of sums of four.
// 3. Screen, by blocks of rows: logits q k^T, coefficients c = row_scale * A, g = c * (R v^T). Pairs whose
//    bound is at most the threshold are done; the others become records. Rows that are going to be too uncertain
//    are screened again at once, with a lower threshold.
// 4. Evaluate the records, gathered by head and group of sources: u = v[source] W_O[head] once, then
//    proximity = max(0, g - 2 * sum of relu(c u sign(y) - |y|)) for each destination.
// 5. Finish rows: add the exact values, in the order of heads and sources, and divide by the normaliser.
//
// Steps 2 to 5 repeat until all rows are done, as many at a time as their directions and records fit in the
// workspace. No number depends on how rows are grouped, or on which thread computes what.
#include "core/attention.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace lmtt {
namespace {

constexpr int64_t kSources = 48;       // sources whose u are formed together: they stay in the second-level cache
constexpr int64_t kDirectionRows = 512;  // rows of directions that one thread takes: more share a table of sums,
                                         // fewer share the work among threads

// A row's certificate grows about as the square root of its threshold on real activations, so that the threshold for
// a certificate is guessed from one that was tried. Aiming lower than asked saves attempts.
constexpr int kAttempts = 3;
constexpr double kAim = 0.7;
// Before records are evaluated: their exact proximities, as a part of their first-order values, on real activations.
// Only guesses how far a threshold is lowered.
constexpr double kExactPart = 0.75;

// Rows screened together, and what they leave for the later steps.
struct Block {
  std::vector<int32_t> at;          // places of its rows in the list of rows that are done at once
  bool last_word = true;            // its rows' thresholds stand
  std::vector<int32_t> aside;       // rows that left it, to be screened again with a lower threshold
  std::vector<Record> records;      // by head, then row, then source
  std::vector<int64_t> head_begin;  // [H + 1]
  bool screened = false;

  bool contiguous() const { return at.back() - at.front() + 1 == static_cast<int64_t>(at.size()); }
};

// Records of one head and row that stand together in a block and whose sources share a group. Some may be listed only.
struct Run {
  uint32_t block, first, count;
};

// Records of one head whose sources make up one block of u.
struct SourceGroup {
  int64_t head, begin, end;      // of the head's runs
  std::vector<int32_t> sources;  // none with a gate: then every record has a u of its own
};

// What of a row is reported pair by pair.
struct KeptRow {
  std::vector<KeptEdge> edges;
  std::vector<KeptPair> pairs;
};

// One thread's memory.
struct Scratch {
  Buffer<float> q, logits, product, k_panels, v_panels, panel, table, x, u, u_largest;
  Buffer<Record> records;
  Buffer<int32_t> slot;
};

class Pass {
 public:
  Pass(const AttentionInput& input, AttentionOutput& output);
  void run();

 private:
  void prepare();
  void do_rows(const std::vector<int32_t>& rows, bool may_be_doubtful = false);
  void directions(const int32_t* rows, int64_t count);
  std::vector<Block> in_blocks(const std::vector<int32_t>& at, int64_t rows_each, bool last_word) const;
  bool screen(Block& block, const int32_t* rows, Scratch& scratch);
  void lower_threshold(int64_t i, double certificate) {
    const double aim = kAim * in.max_certificate / certificate;
    threshold[i] = static_cast<float>(threshold[i] * aim * aim);
    lowered[i] = 1;
  }
  void set_doubtful_aside(Block& block, const int32_t* rows);
  void evaluate(const std::vector<Block*>& blocks);
  void gather(const std::vector<Block*>& blocks, int64_t h, std::vector<SourceGroup>& groups);
  void evaluate(const SourceGroup& group, const std::vector<Block*>& blocks, Scratch& scratch);
  void finish(const Block& block, const int32_t* rows, Scratch& scratch);
  void keep(const Block& block, const int32_t* rows, Scratch& scratch);

  const AttentionInput& in;
  AttentionOutput& out;
  const Kernels& kernel = kernels();
  const int64_t T, H, E, E_v, D, heads_per_kv;
  const int64_t width;                      // T in whole panels
  const int64_t stride_of_T;                // likewise, and one more: rows of a block 4 KiB apart would collide in cache
  const int64_t width_of_D;                 // D in whole panels
  const int64_t blocks_of_D;                // D in blocks of sixteen coordinates, padded to sixteen blocks
  const int64_t u_stride;                   // D in whole panels, and one more: rows 4 KiB apart would collide in cache
  int64_t block_rows;
  int64_t record_budget;                    // records that the workspace has room for
  bool packed;                              // all of k, v and W_O as panels, or head by head where they are used
  std::vector<float> threshold;             // [T]: pairs with a larger bound are evaluated
  std::vector<float> listed;                // [T]: pairs with a larger g may have a share above `keep`
  std::vector<char> doubtful;               // [T]: rows that leave their block
  std::vector<char> lowered;                // [T]: rows with a lower threshold than was asked for
  std::vector<PartsRow> parts;              // [T]
  std::vector<double> uncertain, signed_sum, absolute;  // [T], as ScreenSums
  std::vector<double> expected, first_order;  // [T]: the normaliser without records, and those as they are screened
  std::vector<int64_t> positive, evaluated;             // [T]
  Buffer<double> head_sums;                 // [T, H]
  Buffer<float> margin;                     // [H, width]: rounding error of R v^T at most
  Buffer<float> smallest;                   // [T, blocks_of_D] of whole
  Buffer<float> k_panels, v_panels;         // [H_kv, panels, E or E_v, 16]
  Buffer<float> o_panels;                   // [H, panels of D, E_v, 16]
  Buffer<float> direction;                  // [rows at a time, H, E_v]
  std::vector<std::vector<Run>> gathered;   // [H]: by group of sources
  std::vector<KeptRow> kept;                // [T]
  std::vector<Scratch> scratch;             // by thread
};

Pass::Pass(const AttentionInput& input, AttentionOutput& output)
    : in(input), out(output), T(in.T), H(in.H), E(in.E), E_v(in.E_v), D(in.parts.D), heads_per_kv(in.H / in.H_kv),
      width(padded(in.T)), stride_of_T(padded(in.T) + kPanel), width_of_D(padded(in.parts.D)), blocks_of_D(padded(panels(in.parts.D))), u_stride(padded(in.parts.D) + kPanel) {
  block_rows = T <= 512 || T > 4096 ? 12 : 24;  // few at small T for balance, few at large T for cache
  record_budget = in.workspace / 2 / int64_t(sizeof(Record) + sizeof(Run));
  packed = (in.H_kv * width * (E + E_v) + H * E_v * width_of_D) * int64_t(sizeof(float)) <= in.workspace / 4;
  threshold.resize(T), listed.resize(T), doubtful.resize(T), lowered.resize(T), parts.resize(T), uncertain.resize(T), expected.resize(T), first_order.resize(T), signed_sum.resize(T), absolute.resize(T);
  positive.resize(T), evaluated.resize(T);
  if (in.keep_pairs) kept.resize(T);
  head_sums = Buffer<double>(T * H);
  margin = Buffer<float>(H * width);
  smallest = Buffer<float>(T * blocks_of_D);
  if (packed) {
    k_panels = Buffer<float>(in.H_kv * width * E);
    v_panels = Buffer<float>(in.H_kv * width * E_v);
    o_panels = Buffer<float>(H * E_v * width_of_D);
  }
  scratch.resize(in.threads);
  for (Scratch& s : scratch) {
    s.q = Buffer<float>(block_rows * std::max(E, E_v));
    s.logits = Buffer<float>(block_rows * stride_of_T);
    s.product = Buffer<float>(block_rows * stride_of_T);
    if (!packed) {
      s.k_panels = Buffer<float>(width * E);
      s.v_panels = Buffer<float>(width * E_v);
    }
    s.panel = Buffer<float>(E_v * kPanel);
    s.table = Buffer<float>(groups(kTableDepth) * (kPanel << kGroup));
    s.x = Buffer<float>(kSources * E_v);
    s.u = Buffer<float>(kSources * u_stride);
    s.u_largest = Buffer<float>(kSources * blocks_of_D);
    s.records = Buffer<Record>(width);
    s.slot = Buffer<int32_t>(T);
    std::fill(s.slot.get(), s.slot + T, -1);
  }
}

void Pass::run() {
  Stopwatch watch;
  prepare();
  out.stages.screening += watch.lap();
  std::vector<int32_t> rows;
  for (int64_t i = T - 1; i >= 0; --i) rows.push_back(static_cast<int32_t>(i));  // the longest first: better balance
  do_rows(rows, in.screen > 0 && in.max_certificate < 1);
  for (int64_t i = 0; i < T; ++i) out.positive += positive[i], out.evaluated += evaluated[i];

  // Rows that are too uncertain all the same, again with a lower threshold; those that still are, at last without one.
  for (int attempt = 1; in.screen > 0 && attempt <= kAttempts; ++attempt) {
    std::vector<int32_t> again;
    for (const int32_t i : rows) {
      if (!(out.certificate[i] > in.max_certificate)) continue;
      again.push_back(i);
      lower_threshold(i, out.certificate[i]);
      if (attempt == kAttempts) threshold[i] = 0;
    }
    if (again.empty()) break;
    // finish() turned the fixed parts' proximities into shares where they stand
    for (const int32_t i : again) parts[i] = fixed_parts(in.parts, i, out.residual, out.bias, out.others);
    do_rows(again);
    for (const int32_t i : again) out.evaluated += evaluated[i];
  }
  for (int64_t i = 0; i < T; ++i) out.reevaluated += lowered[i];
  for (const KeptRow& row : kept) {
    out.kept_edges.insert(out.kept_edges.end(), row.edges.begin(), row.edges.end());
    out.kept.insert(out.kept.end(), row.pairs.begin(), row.pairs.end());
  }
}

void Pass::prepare() {
  const int64_t HE = H * E_v;
  Buffer<float> norm(HE);  // |W_O[h, e]|_1
  parallel_for(in.threads, panels(HE), [&](int64_t p, int) {
    const int64_t c = p * kPanel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, HE - c));
    double sums[kPanel];
    kernel.absolute_column_sums(in.w_o + c, HE, columns, D, sums);
    std::copy(sums, sums + columns, norm + c);
  });
  parallel_for(in.threads, packed ? H : 0, [&](int64_t h, int) {
    for (int64_t d = 0; d < D; d += kPanel) {
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, D - d));
      kernel.pack_rows(in.w_o + d * HE + h * E_v, HE, columns, E_v, o_panels + (h * width_of_D + d) * E_v);
    }
  });
  const double gamma = rounding(sign_chain(D) + chain(E_v) + 8);  // 8: the coefficient, a gate, and the margin itself
  parallel_for(in.threads, panels(T), [&](int64_t p, int) {
    const int64_t begin = p * kPanel, end = std::min(T, begin + kPanel);
    const int count = static_cast<int>(end - begin);
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = fixed_parts(in.parts, i, out.residual, out.bias, out.others);
      kernel.block_smallest(in.parts.whole + i * D, D, smallest + i * blocks_of_D);
      threshold[i] = static_cast<float>(in.screen * parts[i].size);
      // the normaliser is at least what the fixed parts make; 1e-6 for rounding on the way
      listed[i] = in.keep_pairs ? static_cast<float>(in.keep * parts[i].fixed * (1 - 1e-6)) : INFINITY;
    }
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t j = begin; j < begin + kPanel; ++j) {
        margin[h * width + j] =
            j < T ? static_cast<float>(gamma * kernel.absolute_dot(in.v.at(h / heads_per_kv, j), norm + h * E_v, E_v)) : 0.0f;
      }
    }
    for (int64_t g = 0; packed && g < in.H_kv; ++g) {
      kernel.pack_rows(in.k.at(g, begin), in.k.token_stride, count, E, k_panels + (g * width + begin) * E);
      kernel.pack_rows(in.v.at(g, begin), in.v.token_stride, count, E_v, v_panels + (g * width + begin) * E_v);
    }
  });
}

void Pass::do_rows(const std::vector<int32_t>& rows, bool may_be_doubtful) {
  const int64_t all = static_cast<int64_t>(rows.size());
  const int64_t fit = in.workspace / 4 / (H * E_v * int64_t(sizeof(float)));
  const int64_t at_once = std::min(all, std::max(block_rows, fit));
  direction = Buffer<float>(at_once * H * E_v);
  for (int64_t done = 0; done < all; done += at_once) {
    const int32_t* these = rows.data() + done;
    const int64_t count = std::min(at_once, all - done);
    Stopwatch watch;
    directions(these, count);

    std::vector<int32_t> at(count);
    std::iota(at.begin(), at.end(), 0);
    std::vector<Block> blocks = in_blocks(at, block_rows, !may_be_doubtful);
    while (!blocks.empty()) {
      std::atomic<int64_t> recorded{0};
      const auto screen_some = [&](std::vector<Block>& some) {
        parallel_for(in.threads, some.size(), [&](int64_t b, int thread) {
          if (recorded > record_budget) return;
          some[b].screened = screen(some[b], these, scratch[thread]);
          recorded += some[b].records.size();
        });
      };
      screen_some(blocks);
      std::vector<int32_t> aside;
      for (const Block& b : blocks) aside.insert(aside.end(), b.aside.begin(), b.aside.end());
      std::vector<Block> second = in_blocks(aside, block_rows, true);
      screen_some(second);
      out.stages.screening += watch.lap();

      std::vector<Block*> ready;
      for (std::vector<Block>* some : {&blocks, &second}) {
        for (Block& b : *some) {
          if (b.screened) ready.push_back(&b);
        }
      }
      evaluate(ready);
      out.stages.evaluation += watch.lap();
      parallel_for(in.threads, ready.size(),
                   [&](int64_t b, int thread) { finish(*ready[b], these, scratch[thread]); });
      out.stages.reduction += watch.lap();

      std::vector<Block> rest;
      for (std::vector<Block>* some : {&blocks, &second}) {
        for (Block& b : *some) {
          if (b.screened) continue;
          // A block that has records of its own was too large for them and is halved, the others had no turn.
          const int64_t size = static_cast<int64_t>(b.at.size());
          for (Block& part : in_blocks(b.at, b.head_begin.empty() ? size : (size + 1) / 2, b.last_word)) {
            rest.push_back(std::move(part));
          }
        }
      }
      blocks.swap(rest);
    }
  }
}

std::vector<Block> Pass::in_blocks(const std::vector<int32_t>& at, int64_t rows_each, bool last_word) const {
  std::vector<Block> blocks;
  for (int64_t r = 0; r < int64_t(at.size()); r += rows_each) {
    blocks.emplace_back();
    blocks.back().at.assign(at.begin() + r, at.begin() + std::min<int64_t>(at.size(), r + rows_each));
    blocks.back().last_word = last_word;
  }
  return blocks;
}

// Step 2: fills direction[0..count) for these rows.
void Pass::directions(const int32_t* rows, int64_t count) {
  const int64_t HE = H * E_v;
  Buffer<uint16_t> offsets(tables(D) * count * kTableGroups);  // by table, as in neurons.cpp
  parallel_for(in.threads, panels(count), [&](int64_t p, int) {
    for (int64_t r = p * kPanel; r < std::min(count, (p + 1) * kPanel); ++r) {
      for (int64_t d = 0; d < D; d += kTableDepth) {
        kernel.sign_offsets(in.parts.whole + rows[r] * D + d, std::min(kTableDepth, D - d),
                            offsets + (d / kTableDepth * count + r) * kTableGroups);
      }
    }
  });
  const int64_t stripes = (count + kDirectionRows - 1) / kDirectionRows;
  parallel_for(in.threads, panels(HE) * stripes, [&](int64_t item, int thread) {
    Scratch& s = scratch[thread];
    const int64_t c = item % panels(HE) * kPanel;
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, HE - c));
    const int64_t r0 = item / panels(HE) * kDirectionRows, n = std::min(kDirectionRows, count - r0);
    for (int64_t d = 0; d < D; d += kTableDepth) {
      const int64_t depth = std::min(kTableDepth, D - d);
      kernel.sign_table(in.w_o + d * HE + c, HE, columns, depth, s.table.get());
      const uint16_t* from = offsets + (d / kTableDepth * count + r0) * kTableGroups;
      if (columns == kPanel) {
        kernel.add_signed(n, groups(depth), from, kTableGroups, s.table.get(), direction + r0 * HE + c, HE, d > 0);
        continue;
      }
      for (int64_t r = 0; r < n; ++r) {  // the last panel is narrower than what add_signed writes
        float *to = direction + (r0 + r) * HE + c, sums[kPanel] = {};
        if (d > 0) std::copy(to, to + columns, sums);
        kernel.add_signed(1, groups(depth), from + r * kTableGroups, kTableGroups, s.table.get(), sums, kPanel, d > 0);
        std::copy(sums, sums + columns, to);
      }
    }
  });
}

// Step 3. False if the block's records outgrew their share of the workspace; they are dropped then.
bool Pass::screen(Block& block, const int32_t* rows, Scratch& s) {
  const int64_t count = static_cast<int64_t>(block.at.size());
  int64_t first = T, last = 0;
  for (const int32_t n : block.at) {
    const int64_t i = rows[n];
    first = std::min(first, std::max<int64_t>(0, i - in.window + 1));
    last = std::max(last, i);
    std::fill(out.edges + i * T, out.edges + (i + 1) * T, 0.0f);
    uncertain[i] = signed_sum[i] = absolute[i] = 0;
    positive[i] = evaluated[i] = 0;
  }
  const int64_t p0 = first / kPanel, p1 = last / kPanel + 1;
  block.head_begin.assign(1, 0);

  for (int64_t h = 0; h < H; ++h) {
    const int64_t g = h / heads_per_kv;
    const float *k = k_panels + g * width * E, *v = v_panels + g * width * E_v;
    if (!packed) {
      k = s.k_panels.get(), v = s.v_panels.get();
      for (int64_t p = p0; h % heads_per_kv == 0 && p < p1; ++p) {
        const int n = static_cast<int>(std::min<int64_t>(kPanel, T - p * kPanel));
        kernel.pack_rows(in.k.at(g, p * kPanel), in.k.token_stride, n, E, s.k_panels + p * kPanel * E);
        kernel.pack_rows(in.v.at(g, p * kPanel), in.v.token_stride, n, E_v, s.v_panels + p * kPanel * E_v);
      }
    }

    for (int64_t r = 0; r < count; ++r) {
      const float* q = in.q.at(h, rows[block.at[r]]);
      std::copy(q, q + E, s.q + r * E);
    }
    for (int64_t p = p0; p < p1; ++p) {
      kernel.multiply(count, E, s.q.get(), E, k + p * kPanel * E, s.logits + p * kPanel, stride_of_T, false);
    }

    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = rows[block.at[r]];
      AttentionRow row;
      row.first = std::max<int64_t>(0, i - in.window + 1), row.last = i;
      row.begin = row.first / kPanel * kPanel, row.end = padded(i + 1);
      row.scale = in.scale, row.softcap = in.softcap;
      row.mask = in.mask ? in.mask + h * in.mask_stride + i * T : nullptr;
      row.allowed = in.allowed ? in.allowed + h * in.mask_stride + i * T : nullptr;
      row.alibi = in.alibi ? in.alibi[h] : 0;
      row.has_sink = in.sinks != nullptr, row.sink = in.sinks ? in.sinks[h] : 0;
      row.has_lse = in.lse != nullptr, row.lse = in.lse ? in.lse[h * T + i] : 0;
      row.row_scale = in.row_scale ? in.row_scale[i] : 1;
      kernel.attend(row, s.logits + r * stride_of_T);
    }

    const float* towards = direction + (int64_t(block.at[0]) * H + h) * E_v;
    int64_t stride = H * E_v;
    if (in.gate || !block.contiguous()) {
      for (int64_t r = 0; r < count; ++r) {
        const float* from = direction + (int64_t(block.at[r]) * H + h) * E_v;
        const float* gate = in.gate ? in.gate + (rows[block.at[r]] * H + h) * E_v : nullptr;
        for (int64_t e = 0; e < E_v; ++e) s.q[r * E_v + e] = gate ? gate[e] * from[e] : from[e];
      }
      towards = s.q.get(), stride = E_v;
    }
    for (int64_t p = p0; p < p1; ++p) {
      kernel.multiply(count, E_v, towards, stride, v + p * kPanel * E_v, s.product + p * kPanel, stride_of_T, false);
    }

    for (int64_t r = 0; r < count; ++r) {
      const int32_t i = rows[block.at[r]];
      const int64_t begin = std::max<int64_t>(0, i - in.window + 1) / kPanel * kPanel;
      float largest_gate = 1;
      if (in.gate) {
        const float* gate = in.gate + (int64_t(i) * H + h) * E_v;
        largest_gate = 0;
        for (int64_t e = 0; e < E_v; ++e) largest_gate = std::max(largest_gate, std::fabs(gate[e]));
      }
      ScreenSums sums;
      const int64_t found =
          kernel.screen(begin, i + 1, s.logits + r * stride_of_T, s.product + r * stride_of_T, margin + h * width, largest_gate,
                        threshold[i], listed[i], i, out.edges + int64_t(i) * T, s.records.get(), &sums);
      block.records.insert(block.records.end(), s.records.get(), s.records + found);
      head_sums[i * H + h] = sums.skipped;
      uncertain[i] += sums.uncertain, signed_sum[i] += sums.signed_sum, absolute[i] += sums.absolute;
      positive[i] += sums.positive, evaluated[i] += sums.evaluated;
    }
    block.head_begin.push_back(static_cast<int64_t>(block.records.size()));
    if (h == 0) block.records.reserve(block.records.size() * H * 5 / 4);  // growing would move what is there
    if (count > 1 && int64_t(block.records.size()) > record_budget / in.threads) {
      block.records = {};
      return false;
    }
  }
  if (!block.last_word) set_doubtful_aside(block, rows);
  return true;
}

// Lowers the thresholds of rows whose certificate is certain to be too large, and drops their records. Exact
// proximities are at most the first-order values, so that a row's normaliser is at most the sum of all it has now.
void Pass::set_doubtful_aside(Block& block, const int32_t* rows) {
  for (const int32_t n : block.at) {
    const int64_t i = rows[n];
    first_order[i] = 0, expected[i] = parts[i].fixed;
    for (int64_t h = 0; h < H; ++h) expected[i] += head_sums[i * H + h];
  }
  for (const Record& record : block.records) {
    if (record.coefficient != 0 && record.value > 0) first_order[record.row] += record.value;
  }
  bool any = false;
  for (const int32_t n : block.at) {
    const int64_t i = rows[n];
    doubtful[i] = certificate(uncertain[i], expected[i] + first_order[i]) > in.max_certificate;
    if (!doubtful[i]) continue;
    lower_threshold(i, certificate(uncertain[i], expected[i] + kExactPart * first_order[i]));
    any = true;
  }
  if (!any) return;
  int64_t left = 0, end = 0;
  for (int64_t h = 0; h < H; ++h) {
    const int64_t begin = std::exchange(end, block.head_begin[h + 1]);
    for (int64_t n = begin; n < end; ++n) {
      if (!doubtful[block.records[n].row]) block.records[left++] = block.records[n];
    }
    block.head_begin[h + 1] = left;
  }
  block.records.resize(left);
  const auto stays = [&](int32_t n) { return !doubtful[rows[n]]; };
  const auto leaving = std::stable_partition(block.at.begin(), block.at.end(), stays);
  block.aside.assign(leaving, block.at.end());
  block.at.erase(leaving, block.at.end());
}


// Step 4: replaces the value of every record by its exact proximity.
void Pass::evaluate(const std::vector<Block*>& blocks) {
  gathered.resize(H);
  std::vector<std::vector<SourceGroup>> groups(H);
  parallel_for(in.threads, H, [&](int64_t h, int) { gather(blocks, h, groups[h]); });
  std::vector<SourceGroup> all;
  for (const auto& some : groups) all.insert(all.end(), some.begin(), some.end());
  parallel_for(in.threads, all.size(), [&](int64_t n, int thread) { evaluate(all[n], blocks, scratch[thread]); });
}

// Sources of one head to groups, and its records to runs: those of a group stand together, in the order of blocks and
// rows, so that a row of `whole` is read once for all its sources in a group.
void Pass::gather(const std::vector<Block*>& blocks, int64_t h, std::vector<SourceGroup>& groups) {
  std::vector<char> wanted(T, 0);
  for (const Block* b : blocks) {
    for (int64_t n = b->head_begin[h]; n < b->head_begin[h + 1]; ++n) {
      if (b->records[n].coefficient != 0) wanted[b->records[n].source] = 1;
    }
  }
  std::vector<int32_t> group_of(T, 0);
  int64_t sources = 0;
  for (int64_t j = 0; j < T && !in.gate; ++j) {
    if (wanted[j] && sources++ % kSources == 0) groups.push_back({h, 0, 0, {}});
    if (wanted[j]) groups.back().sources.push_back(static_cast<int32_t>(j));
    group_of[j] = std::max<int32_t>(0, static_cast<int32_t>(groups.size()) - 1);
  }

  const int64_t longest = in.gate ? kTogether : T;  // with a gate a group has few records, not few sources
  const auto each_run = [&](const auto& action) {
    for (uint32_t block = 0; block < blocks.size(); ++block) {
      const Record* records = blocks[block]->records.data();
      const int64_t end = blocks[block]->head_begin[h + 1];
      for (int64_t n = blocks[block]->head_begin[h]; n < end;) {
        const int64_t first = n++;
        if (records[first].coefficient == 0) continue;
        const int32_t row = records[first].row, group = group_of[records[first].source];
        const int64_t limit = std::min(end, first + longest);
        while (n < limit && records[n].row == row && group_of[records[n].source] == group) ++n;
        action(group, Run{block, static_cast<uint32_t>(first), static_cast<uint32_t>(n - first)});
      }
    }
  };
  std::vector<int64_t> place(groups.size() + 2, 0);  // of each group's runs, after the number of those before
  each_run([&](int32_t group, const Run&) { ++place[group + 1]; });
  std::partial_sum(place.begin(), place.end(), place.begin());
  gathered[h].resize(place.back());
  for (std::size_t g = 0; g < groups.size(); ++g) groups[g].begin = place[g], groups[g].end = place[g + 1];
  each_run([&](int32_t group, const Run& run) { gathered[h][place[group]++] = run; });
  const int64_t runs = static_cast<int64_t>(gathered[h].size()), few = kSources / kTogether;
  for (int64_t n = 0; in.gate && n < runs; n += few) groups.push_back({h, n, std::min(n + few, runs), {}});
}

void Pass::evaluate(const SourceGroup& group, const std::vector<Block*>& blocks, Scratch& s) {
  const int64_t h = group.head;
  int32_t* slot = s.slot.get();  // [T]: which u is a source's; -1 outside this function
  const auto each_run = [&](const auto& action) {  // with its first record
    for (int64_t n = group.begin; n < group.end; ++n) {
      const Run& run = gathered[h][n];
      action(blocks[run.block]->records.data() + run.first, run.count);
    }
  };

  int32_t count = 0;
  for (const int32_t j : group.sources) {
    const float* v = in.v.at(h / heads_per_kv, j);
    std::copy(v, v + E_v, s.x + count * E_v);
    slot[j] = count++;
  }
  if (in.gate) {
    each_run([&](const Record* record, uint32_t some) {
      for (const Record* end = record + some; record < end; ++record) {
        if (record->coefficient == 0) continue;
        const float *v = in.v.at(h / heads_per_kv, record->source), *gate = in.gate + (record->row * H + h) * E_v;
        for (int64_t e = 0; e < E_v; ++e) s.x[count * E_v + e] = v[e] * gate[e];
        ++count;
      }
    });
  }
  for (int64_t d = 0; d < D; d += kPanel) {
    const int columns = static_cast<int>(std::min<int64_t>(kPanel, D - d));
    const float* panel = s.panel.get();
    if (packed) {
      panel = o_panels + (h * width_of_D + d) * E_v;
    } else {
      kernel.pack_rows(in.w_o + d * H * E_v + h * E_v, H * E_v, columns, E_v, s.panel.get());
    }
    kernel.multiply(count, E_v, s.x.get(), E_v, panel, s.u + d, u_stride, false);
  }

  for (int32_t n = 0; n < count; ++n) kernel.block_largest(s.u + n * u_stride, D, s.u_largest + n * blocks_of_D);

  count = 0;
  each_run([&](Record* record, uint32_t of_run) {
    const int64_t i = record->row;
    Record* together[kTogether];
    const float *u[kTogether], *largest[kTogether];
    float coefficient[kTogether], over[kTogether];
    int some = 0;
    const auto evaluate_these = [&] {
      kernel.overshoots(some, u, largest, in.parts.whole + i * D, smallest + i * blocks_of_D, coefficient, D, over);
      for (int p = 0; p < some; ++p) {
        const float value = together[p]->value - 2 * over[p];
        together[p]->value = value < 0 ? 0 : value;
      }
      some = 0;
    };
    for (Record* const end = record + of_run; record < end; ++record) {
      if (record->coefficient == 0) continue;
      const int64_t m = in.gate ? count++ : slot[record->source];
      u[some] = s.u + m * u_stride, largest[some] = s.u_largest + m * blocks_of_D;
      coefficient[some] = record->coefficient, together[some++] = record;
      if (some == kTogether) evaluate_these();
    }
    if (some > 0) evaluate_these();
  });
  for (const int32_t j : group.sources) slot[j] = -1;
}

// Step 5.
void Pass::finish(const Block& block, const int32_t* rows, Scratch& s) {
  for (int64_t h = 0; h < H; ++h) {
    for (int64_t n = block.head_begin[h]; n < block.head_begin[h + 1]; ++n) {
      const Record& record = block.records[n];
      if (record.coefficient == 0) continue;
      out.edges[record.row * T + record.source] += record.value;
      head_sums[record.row * H + h] += record.value;
    }
  }
  for (const int32_t n : block.at) {
    const int64_t i = rows[n];
    double normaliser = parts[i].fixed;
    for (int64_t h = 0; h < H; ++h) normaliser += head_sums[i * H + h];
    const double inverse = normaliser == 0 ? 0 : 1 / normaliser;
    out.normaliser[i] = static_cast<float>(normaliser);
    out.certificate[i] = certificate(uncertain[i], normaliser);
    out.checksum[i] = checksum(parts[i], signed_sum[i], absolute[i]);
    for (int64_t h = 0; h < H; ++h) out.per_head[i * H + h] = static_cast<float>(head_sums[i * H + h] * inverse);
    for (int64_t j = 0; j <= i; ++j) out.edges[i * T + j] = static_cast<float>(out.edges[i * T + j] * inverse);
    share_fixed_parts(in.parts, i, normaliser, out.residual, out.bias, out.others);
    head_sums[i * H] = inverse;  // needed below, the sums are not
  }
  if (in.keep_pairs) keep(block, rows, s);
}

// What stands above `keep`, edges by source and their pairs by head. head_sums[i, 0] is 1 / normaliser by now.
void Pass::keep(const Block& block, const int32_t* rows, Scratch& s) {
  std::vector<int64_t> next(block.head_begin.begin(), block.head_begin.end() - 1);
  std::vector<int64_t> place;
  for (const int32_t at : block.at) {
    const int32_t i = rows[at];
    KeptRow& row = kept[i];
    row.edges.clear(), row.pairs.clear();
    const float* edges = out.edges + int64_t(i) * T;
    for (int32_t j = 0; j <= i; ++j) {
      if (!(edges[j] > in.keep)) continue;
      s.slot[j] = static_cast<int32_t>(row.edges.size());
      row.edges.push_back({i, j, edges[j], 0});
    }
    const auto each = [&](int64_t h, int64_t& n, const auto& action) {
      for (; n < block.head_begin[h + 1] && block.records[n].row == i; ++n) {
        const Record& record = block.records[n];
        const float share = static_cast<float>(record.value * head_sums[int64_t(i) * H]);
        if (share > in.keep && s.slot[record.source] >= 0) action(s.slot[record.source], record.source, share);
      }
    };
    for (int64_t h = 0; h < H; ++h) {
      int64_t n = next[h];
      each(h, n, [&](int32_t edge, int32_t, float) { ++row.edges[edge].pairs; });
    }
    place.assign(1, 0);
    for (const KeptEdge& edge : row.edges) place.push_back(place.back() + edge.pairs);
    row.pairs.resize(place.back());
    for (int64_t h = 0; h < H; ++h) {
      each(h, next[h], [&](int32_t edge, int32_t source, float share) {
        row.pairs[place[edge]++] = {i, source, static_cast<int32_t>(h), share};
      });
    }
    for (const KeptEdge& edge : row.edges) s.slot[edge.source] = -1;
  }
}

}  // namespace

void attention_contributions(const AttentionInput& in, AttentionOutput& out) { Pass(in, out).run(); }

}  // namespace lmtt
