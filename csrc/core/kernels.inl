// The inner loops, written once; kernels_portable.cpp, kernels_avx2.cpp and kernels_avx512.cpp compile them.
#include "core/kernels.h"
#include "core/simd.h"

namespace {

using lmtt::AttentionRow;
using lmtt::kDepth;
using lmtt::Record;
using lmtt::ScreenSums;

static_assert(kLanes == lmtt::kPanel, "a panel is one row of lanes");

// Rows of a product held in registers: accumulators, one row of the panel and one broadcast must fit.
#if defined(__AVX512F__)
constexpr int kStrip = 12;
#elif defined(__AVX2__)
constexpr int kStrip = 6;
#elif defined(__aarch64__)
constexpr int kStrip = 5;
#else
constexpr int kStrip = 2;
#endif

// Rows of a product with signs that go on together, so that one addition need not wait for the other.
constexpr int kLookupStrip = kParts == 4 ? 3 : 4;
constexpr int kEntries = 1 << lmtt::kGroup;

// to[k * to_stride + c] = rows[c * stride + k], c < count; sixteen rows go in squares of four.
LMTT_INLINE int64_t turn_sixteen(const float* rows, ptrdiff_t stride, int64_t depth, float* to, ptrdiff_t to_stride) {
  int64_t k = 0;
#if defined(__SSE2__)
  for (; k + 4 <= depth; k += 4) {
    for (int c = 0; c < kLanes; c += 4) {
      const float* from = rows + c * stride + k;
      __m128 w = _mm_loadu_ps(from), x = _mm_loadu_ps(from + stride), y = _mm_loadu_ps(from + 2 * stride),
             z = _mm_loadu_ps(from + 3 * stride);
      _MM_TRANSPOSE4_PS(w, x, y, z);
      float* square = to + k * to_stride + c;
      _mm_storeu_ps(square, w);
      _mm_storeu_ps(square + to_stride, x);
      _mm_storeu_ps(square + 2 * to_stride, y);
      _mm_storeu_ps(square + 3 * to_stride, z);
    }
  }
#else
  (void)rows, (void)stride, (void)depth, (void)to, (void)to_stride;
#endif
  return k;
}

void pack_rows(const float* rows, ptrdiff_t stride, int count, int64_t depth, float* panel) {
  int64_t k = count == kLanes ? turn_sixteen(rows, stride, depth, panel, kLanes) : 0;
  for (; k < depth; ++k) {
    for (int c = 0; c < kLanes; ++c) panel[k * kLanes + c] = c < count ? rows[c * stride + k] : 0.0f;
  }
}

void turn_rows(const float* rows, ptrdiff_t stride, int count, int64_t depth, float* to, ptrdiff_t to_stride) {
  int64_t k = count == kLanes ? turn_sixteen(rows, stride, depth, to, to_stride) : 0;
  for (; k < depth; ++k) {
    for (int c = 0; c < count; ++c) to[k * to_stride + c] = rows[c * stride + k];
  }
}

template <int Rows>
LMTT_INLINE void multiply_strip(int64_t depth, const float* a, ptrdiff_t a_stride, const float* panel, float* c,
                                ptrdiff_t c_stride, bool accumulate) {
  Lanes sum[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) sum[r] = splat(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes b = load(panel + k * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sum[r] = fma(splat(a[r * a_stride + k]), b, sum[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* out = c + r * c_stride;
    store(out, accumulate ? load(out) + sum[r] : sum[r]);
  }
}

template <int Rows>
void multiply_rest(int64_t rows, int64_t depth, const float* a, ptrdiff_t a_stride, const float* panel, float* c,
                   ptrdiff_t c_stride, bool accumulate) {
  if (rows == Rows) return multiply_strip<Rows>(depth, a, a_stride, panel, c, c_stride, accumulate);
  if constexpr (Rows > 1) multiply_rest<Rows - 1>(rows, depth, a, a_stride, panel, c, c_stride, accumulate);
}

void multiply(int64_t rows, int64_t depth, const float* a, ptrdiff_t a_stride, const float* panel, float* c,
              ptrdiff_t c_stride, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t piece = depth - k < kDepth ? depth - k : kDepth;
    const bool add = accumulate || k > 0;
    int64_t r = 0;
    for (; r + kStrip <= rows; r += kStrip) {
      multiply_strip<kStrip>(piece, a + r * a_stride + k, a_stride, panel + k * kLanes, c + r * c_stride, c_stride, add);
    }
    multiply_rest<kStrip - 1>(rows - r, piece, a + r * a_stride + k, a_stride, panel + k * kLanes, c + r * c_stride,
                              c_stride, add);
  }
}

void sign_offsets(const float* y, int64_t n, uint16_t* offsets) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const unsigned negative = mask_of(sign_of(load_first(y + d, n - d)) < splat(0.0f));
    for (int64_t b = 0; b < kLanes && d + b < n; b += lmtt::kGroup) {
      offsets[(d + b) / lmtt::kGroup] = static_cast<uint16_t>((negative >> b & 15) * kLanes);
    }
  }
}

// Row(k): sixteen columns of row k of the matrix.
template <class Row>
LMTT_INLINE void fill_sign_table(int64_t depth, float* table, const Row& row_of) {
  for (int64_t k = 0; k < depth; k += lmtt::kGroup, table += kEntries * kLanes) {
    const auto row = [&](int64_t b) { return k + b < depth ? row_of(k + b) : splat(0.0f); };
    const Lanes a = row(0), b = row(1), c = row(2), d = row(3);
    const Lanes minus_a = splat(0.0f) - a, minus_c = splat(0.0f) - c;
    const Lanes low[4] = {a + b, minus_a + b, a - b, minus_a - b};
    const Lanes high[4] = {c + d, minus_c + d, c - d, minus_c - d};
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) store(table + (4 * h + l) * kLanes, low[l] + high[h]);
    }
  }
}

void sign_table(const float* matrix, ptrdiff_t stride, int count, int64_t depth, float* table) {
  if (count == kLanes) {
    fill_sign_table(depth, table, [=](int64_t k) { return load(matrix + k * stride); });
  } else {
    fill_sign_table(depth, table, [=](int64_t k) { return load_first(matrix + k * stride, count); });
  }
}

template <int Rows>
LMTT_INLINE void add_signed_strip(int64_t count, const uint16_t* offsets, ptrdiff_t stride, const float* table,
                                  float* c, ptrdiff_t c_stride, bool accumulate) {
  Lanes sum[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) sum[r] = splat(0.0f);
  for (int64_t g = 0; g < count; ++g, table += kEntries * kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) sum[r] = sum[r] + load(table + offsets[r * stride + g]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    float* out = c + r * c_stride;
    store(out, accumulate ? load(out) + sum[r] : sum[r]);
  }
}

void add_signed(int64_t rows, int64_t count, const uint16_t* offsets, ptrdiff_t stride, const float* table, float* c,
                ptrdiff_t c_stride, bool accumulate) {
  int64_t r = 0;
  for (; r + kLookupStrip <= rows; r += kLookupStrip) {
    add_signed_strip<kLookupStrip>(count, offsets + r * stride, stride, table, c + r * c_stride, c_stride, accumulate);
  }
  for (; r < rows; ++r) {
    add_signed_strip<1>(count, offsets + r * stride, stride, table, c + r * c_stride, c_stride, accumulate);
  }
}

// Calls term(d, lanes available) for d = 0, 16, ...; sums what it returns.
template <class Term>
LMTT_INLINE double sum_over(int64_t n, const Term& term) {
  Sum sum;
  int run = 0;
  for (int64_t d = 0; d < n; d += kLanes) {
    sum.add(term(d, n - d));
    if (++run == kRun) {
      sum.empty();
      run = 0;
    }
  }
  sum.empty();
  return sum.total;
}

double absolute_sum(const float* x, int64_t n) {
  return sum_over(n, [x](int64_t d, int64_t left) { return absolute(load_first(x + d, left)); });
}

void absolute_column_sums(const float* matrix, ptrdiff_t stride, int count, int64_t depth, double* sums) {
  double totals[kLanes] = {};
  for (int64_t k = 0; k < depth; k += kRun) {
    Lanes sum = splat(0.0f);
    for (int64_t n = k; n < depth && n < k + kRun; ++n) sum = sum + absolute(load_first(matrix + n * stride, count));
    float part[kLanes];
    store(part, sum);
    for (int c = 0; c < kLanes; ++c) totals[c] += part[c];
  }
  for (int c = 0; c < count; ++c) sums[c] = totals[c];
}

double absolute_dot(const float* x, const float* w, int64_t n) {
  return sum_over(n, [x, w](int64_t d, int64_t left) {
    return absolute(load_first(x + d, left)) * load_first(w + d, left);
  });
}

void proximity(const float* x, const float* y, int64_t n, double* value, double* dot) {
  const double raw = sum_over(n, [x, y](int64_t d, int64_t left) {
    const Lanes whole = load_first(y + d, left), t = flip_by_sign(load_first(x + d, left), whole);
    const Lanes size = absolute(whole);
    return smaller((size - t) + size, t);  // (size - t) + size: size + size could overflow
  });
  *value = raw < 0 ? 0 : raw;
  if (dot == nullptr) return;
  *dot = sum_over(n, [x, y](int64_t d, int64_t left) {
    return flip_by_sign(load_first(x + d, left), load_first(y + d, left));
  });
}

Lanes lane_numbers() {
  float numbers[kLanes];
  for (int l = 0; l < kLanes; ++l) numbers[l] = static_cast<float>(l);
  return load(numbers);
}

void block_smallest(const float* x, int64_t n, float* smallest) {
  const Lanes lane = lane_numbers();
  int64_t b = 0;
  for (; b * kLanes < n; ++b) {
    const int64_t left = n - b * kLanes;
    Lanes size = absolute(load_first(x + b * kLanes, left));
    if (left < kLanes) size = where(lane < splat(static_cast<float>(left)), size, splat(__builtin_inff()));
    smallest[b] = smallest_of(size);
  }
  for (; b < lmtt::padded(lmtt::panels(n)); ++b) smallest[b] = 0;
}

void block_largest(const float* x, int64_t n, float* largest) {
  int64_t b = 0;
  for (; b * kLanes < n; ++b) largest[b] = largest_of(absolute(load_first(x + b * kLanes, n - b * kLanes)));
  for (; b < lmtt::padded(lmtt::panels(n)); ++b) largest[b] = 0;
}

// s (c u - y) = c s u - |y| for the sign s of y; only y itself is read.
LMTT_INLINE Lanes overshoot_term(const Lanes& c, const Lanes& u, const Lanes& y) {
  return larger(fms(c, flip_by_sign(u, y), absolute(y)), splat(0.0f));
}

// Every one of `blocks`, for `Count` parts of one y, whose signs and sizes are made once for all of them. Machine
// vectors one after the other: sixteen lanes of each sum at once would not fit the registers.
template <int Count>
LMTT_INLINE void overshoots_of_all(int64_t blocks, const float* const* u, int64_t d, const float* y,
                                   const float* coefficient, Lanes* sums) {
  const FloatVector zero{};
  for (int v = 0; v < kParts; ++v) {
    const float* from[Count];
    FloatVector c[Count], sum[Count];
#pragma GCC unroll 4
    for (int p = 0; p < Count; ++p) {
      from[p] = u[p] + d + v * kPartLanes, c[p] = coefficient[p] - zero, sum[p] = sums[p].part[v];
    }
    for (int64_t b = 0; b < blocks * kLanes; b += kLanes) {
      const auto whole = reinterpret_cast<IntVector>(load_part(y + v * kPartLanes + b));
      const IntVector sign = whole & static_cast<int32_t>(0x80000000u);
      const auto size = reinterpret_cast<FloatVector>(whole ^ sign);
#pragma GCC unroll 4
      for (int p = 0; p < Count; ++p) {
        const auto t = reinterpret_cast<FloatVector>(reinterpret_cast<IntVector>(load_part(from[p] + b)) ^ sign);
        const FloatVector over = LMTT_FMS(t, c[p], size);
        sum[p] += LMTT_LARGER(over, zero);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < Count; ++p) sums[p].part[v] = sum[p];
  }
}

template <int Most>
LMTT_INLINE void overshoots_of_first(int count, int64_t blocks, const float* const* u, int64_t d, const float* y,
                                     const float* coefficient, Lanes* sums) {
  if (count == Most) return overshoots_of_all<Most>(blocks, u, d, y, coefficient, sums);
  if constexpr (Most > 1) overshoots_of_first<Most - 1>(count, blocks, u, d, y, coefficient, sums);
}

// Those of `active`, two at a time, so that one addition need not wait for the other.
LMTT_INLINE Lanes overshoots_of(unsigned active, const float* u, const float* y, float coefficient) {
  const Lanes c = splat(coefficient);
  const auto next = [&] {
    const int b = __builtin_ctz(active);
    active &= active - 1;
    return overshoot_term(c, load(u + b * kLanes), load(y + b * kLanes));
  };
  Lanes even = splat(0.0f), odd = splat(0.0f);
  while (active & (active - 1)) {
    even = even + next();
    odd = odd + next();
  }
  if (active) even = even + next();
  return even + odd;
}

void overshoots(int count, const float* const* u, const float* const* u_largest, const float* y,
                const float* y_smallest, const float* coefficient, int64_t n, float* result) {
  using lmtt::kTogether;
  Lanes sums[kTogether];
  for (int p = 0; p < count; ++p) sums[p] = splat(0.0f);
  for (int64_t d = 0; d < n; d += kLanes * kLanes) {
    const int64_t left = n - d, blocks = left < kLanes * kLanes ? left / kLanes : kLanes;
    unsigned active[kTogether];
    int full = 0;
    for (int p = 0; p < count; ++p) {
      active[p] = mask_of(absolute(splat(coefficient[p])) * load(u_largest[p] + d / kLanes) > load(y_smallest + d / kLanes));
      full += __builtin_popcount(active[p]) > blocks / 2;  // going through all is faster than choosing
    }
    if (full == count) {
      overshoots_of_first<kTogether>(count, blocks, u, d, y + d, coefficient, sums);
    } else {
      for (int p = 0; p < count; ++p) {
        if (__builtin_popcount(active[p]) > blocks / 2) {
          overshoots_of_all<1>(blocks, u + p, d, y + d, coefficient + p, sums + p);
        } else {
          sums[p] = sums[p] + overshoots_of(active[p] & ((1u << blocks) - 1), u[p] + d, y + d, coefficient[p]);
        }
      }
    }
    if (blocks < kLanes && left % kLanes) {  // a last block with fewer lanes
      const int64_t b = blocks * kLanes, lanes = left % kLanes;
      for (int p = 0; p < count; ++p) {
        if (!(active[p] >> blocks & 1)) continue;
        sums[p] = sums[p] + overshoot_term(splat(coefficient[p]), load_first(u[p] + d + b, lanes), load_first(y + d + b, lanes));
      }
    }
  }
  for (int p = 0; p < count; ++p) result[p] = short_sum_of(sums[p]);
}

void attend(const AttentionRow& row, float* x) {
  const Lanes nothing = splat(-__builtin_inff());
  const Lanes scale = splat(row.scale);
  const Lanes lane = lane_numbers();

  // 1. logits, and their largest
  Lanes best = nothing;
  for (int64_t j = row.begin; j < row.end; j += kLanes) {
    Lanes z = load(x + j) * scale;
    if (row.softcap > 0) z = splat(row.softcap) * hyperbolic_tangent(z / splat(row.softcap));
    const int64_t left = row.last + 1 - j;
    if (row.mask) z = z + load_first(row.mask + j, left);
    if (row.alibi != 0) z = z - splat(row.alibi) * (splat(static_cast<float>(row.last - j)) - lane);
    if (row.allowed) {
      float may[kLanes] = {};
      for (int l = 0; l < kLanes && l < left; ++l) may[l] = row.allowed[j + l] ? 1.0f : 0.0f;
      z = where(load(may) > splat(0.0f), z, nothing);
    }
    if (j < row.first || left < kLanes) {
      // j counts from the row's ends, so the differences are small and exact in float
      const Lanes after = lane - splat(static_cast<float>(row.first - j)), before = splat(static_cast<float>(left)) - lane;
      z = where((after > splat(-0.5f)) & (before > splat(0.5f)), z, nothing);
    }
    store(x + j, z);
    best = larger(best, z);
  }

  // 2. the row's log-sum-exp as an offset and a factor: A = exp(z - offset) * factor
  float offset = row.has_lse ? row.lse : largest_of(best), factor = row.row_scale;
  if (!row.has_lse && row.has_sink && row.sink > offset) offset = row.sink;
  if (offset == -__builtin_inff()) {  // nothing may be attended to: no source has any weight, unless one is NaN
    Lanes nan = splat(0.0f);
    for (int64_t j = row.begin; j < row.end; j += kLanes) nan = nan + keep_if(load(x + j) != load(x + j), load(x + j));
    if (sum_of(nan) == 0) {
      for (int64_t j = row.begin; j < row.end; j += kLanes) store(x + j, splat(0.0f));
      return;
    }
  }
  if (!row.has_lse) {
    Sum sum;
    int run = 0;
    for (int64_t j = row.begin; j < row.end; j += kLanes) {
      const Lanes a = exponential(load(x + j) - splat(offset));
      store(x + j, a);
      sum.add(a);
      if (++run == kRun) {
        sum.empty();
        run = 0;
      }
    }
    sum.empty();
    if (row.has_sink) sum.total += sum_of(exponential(splat(row.sink - offset))) / kLanes;
    factor = static_cast<float>(static_cast<double>(row.row_scale) / sum.total);
  }

  // 3. coefficients
  for (int64_t j = row.begin; j < row.end; j += kLanes) {
    Lanes a = load(x + j);
    if (row.has_lse) a = exponential(a - splat(offset));
    a = a * splat(factor);
    if (j < row.first || row.last + 1 - j < kLanes) {  // a NaN factor must not reach sources outside the row
      const Lanes after = lane - splat(static_cast<float>(row.first - j));
      const Lanes before = splat(static_cast<float>(row.last + 1 - j)) - lane;
      a = keep_if((after > splat(-0.5f)) & (before > splat(0.5f)), a);
    }
    store(x + j, a);
  }
}

int64_t screen(int64_t begin, int64_t end, const float* coefficient, const float* product, const float* margin,
               float margin_scale, float threshold, float listed, int32_t row, float* edges, Record* records,
               ScreenSums* out) {
  const Lanes zero = splat(0.0f), limit = splat(threshold), list_limit = splat(listed), scale = splat(margin_scale);
  Sum skipped, uncertain, signed_sum, absolute_sum;
  int64_t count = 0, positive = 0, evaluated = 0;
  int run = 0;
  for (int64_t j = begin; j < end; j += kLanes) {
    const Lanes c = load(coefficient + j);
    const Lanes g = keep_if(c != zero, c * load(product + j));  // a source without weight adds nothing, not even NaN
    const Lanes doubt = absolute(c) * (load(margin + j) * scale);
    const Lanes bound = g + doubt;
    const Lanes first_order = larger(g, zero);
    const Choice open = bound > limit, possible = bound > zero;
    const Lanes kept = where(open, zero, first_order);
    skipped.add(kept);
    uncertain.add(where(open, zero, keep_if(possible, first_order + doubt)));
    signed_sum.add(g);
    absolute_sum.add(absolute(g));
    store_first(edges + j, load_first(edges + j, end - j) + kept, end - j);
    positive += __builtin_popcount(mask_of(possible));
    const unsigned exact = mask_of(open);
    evaluated += __builtin_popcount(exact);
    unsigned left = exact | mask_of(g > list_limit);
    if (left) {
      float gs[kLanes];
      store(gs, g);
      for (; left; left &= left - 1) {
        const int l = __builtin_ctz(left);
        records[count++] = {row, static_cast<int32_t>(j + l), exact >> l & 1 ? coefficient[j + l] : 0.0f, gs[l]};
      }
    }
    if (++run == kRun) {
      skipped.empty(), uncertain.empty(), signed_sum.empty(), absolute_sum.empty();
      run = 0;
    }
  }
  skipped.empty(), uncertain.empty(), signed_sum.empty(), absolute_sum.empty();
  out->skipped = skipped.total;
  out->uncertain = uncertain.total;
  out->signed_sum = signed_sum.total;
  out->absolute = absolute_sum.total;
  out->positive = positive;
  out->evaluated = evaluated;
  return count;
}

int64_t screen_neurons(int64_t count, const float* act, float scale, const float* product, ptrdiff_t panel_stride,
                       const float* margin, float threshold, int32_t row, int32_t first, float* values,
                       Record* records, ScreenSums* out) {
  const Lanes zero = splat(0.0f), limit = splat(threshold), factor = splat(scale);
  Sum signed_sum, absolute_sum;
  int64_t found = 0, positive = 0;
  for (int64_t n = 0; n < count; n += kLanes, product += panel_stride) {
    const int64_t left = count - n;
    const Lanes c = load_first(act + n, left) * factor;
    const Lanes g = keep_if(c != zero, c * load(product));
    const Lanes bound = fma(absolute(c), load_first(margin + n, left), g);
    const Choice possible = bound > zero;
    signed_sum.add(g);
    absolute_sum.add(absolute(g));
    store_first(values + n, where(possible, flip_by_sign(larger(g, zero), splat(-1.0f)), where(g != g, g, zero)), left);
    positive += __builtin_popcount(mask_of(possible));
    unsigned open = mask_of(bound > limit);
    if (open) {
      float gs[kLanes], cs[kLanes];
      store(gs, g);
      store(cs, c);
      for (; open; open &= open - 1) {
        const int l = __builtin_ctz(open);
        records[found++] = {row, static_cast<int32_t>(first + n + l), cs[l], gs[l]};
      }
    }
  }
  signed_sum.empty(), absolute_sum.empty();
  out->signed_sum = signed_sum.total;
  out->absolute = absolute_sum.total;
  out->positive = positive;
  out->evaluated = found;
  return found;
}

// The bound of a first-order value, which is stored as -relu(g).
LMTT_INLINE Lanes bound_of(const Lanes& value, const Lanes& act, const Lanes& scale, const Lanes& margin) {
  return fma(absolute(act * scale), margin, absolute(value));
}
LMTT_INLINE Choice is_first_order(const Lanes& value) { return sign_of(value) < splat(0.0f); }

uint64_t exact_above(int64_t count, const float* values, float least) {
  uint64_t found = 0;
  for (int64_t n = 0; n < count; n += kLanes) {
    const Lanes value = load_first(values + n, count - n), limit = splat(least);
    const unsigned exact = mask_of(splat(0.0f) < sign_of(value));
    const unsigned above = mask_of(value > limit) | mask_of(value != value);
    const unsigned inside = count - n < kLanes ? (1u << (count - n)) - 1 : 0xffffu;
    found |= static_cast<uint64_t>(exact & above & inside) << n;
  }
  return found;
}

uint64_t open_from(int64_t count, const float* values, const float* act, float scale, const float* margin,
                   float least) {
  uint64_t found = 0;
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t left = count - n;
    const Lanes value = load_first(values + n, left);
    const Lanes bound = bound_of(value, load_first(act + n, left), splat(scale), load_first(margin + n, left));
    const unsigned below = mask_of(bound < splat(least));
    const unsigned inside = left < kLanes ? (1u << left) - 1 : 0xffffu;
    found |= static_cast<uint64_t>(mask_of(is_first_order(value)) & ~below & inside) << n;
  }
  return found;
}

void neuron_sums(int64_t count, const float* values, const float* act, float scale, const float* margin,
                 double* total, double* uncertain) {
  *total = absolute_sum(values, count);
  *uncertain = sum_over(count, [=](int64_t n, int64_t left) {
    const Lanes value = load_first(values + n, left);
    const Lanes bound = bound_of(value, load_first(act + n, left), splat(scale), load_first(margin + n, left));
    return keep_if(is_first_order(value), bound);
  });
}

float multiply_add_chain(int64_t rounds, int64_t* multiply_adds) {
  constexpr int kChains = kParts == 1 ? 10 : kParts == 2 ? 5 : 3;  // enough to hide the latency, few enough for registers
  Lanes x[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) x[i] = splat(static_cast<float>(i));
  const Lanes a = splat(0.999f), b = splat(0.001f);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) x[i] = fma(x[i], a, b);
  }
  double sum = 0;
  for (int i = 0; i < kChains; ++i) sum += sum_of(x[i]);
  *multiply_adds = rounds * kChains * kLanes;
  return static_cast<float>(sum);
}

constexpr lmtt::Kernels table(const char* name) {
  return {name,          pack_rows, turn_rows, multiply,       sign_offsets,       sign_table, add_signed,
          absolute_sum, absolute_column_sums, absolute_dot, proximity,
          block_smallest, block_largest, overshoots, attend,      screen,      screen_neurons,
          exact_above,   open_from, neuron_sums,  multiply_add_chain};
}

}  // namespace
