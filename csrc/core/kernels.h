// The inner loops, as a table of function pointers: one table for each instruction set (kernels_*.cpp).
//
// Plain pointers and lengths only. "Panel": sixteen columns of a matrix, stored [depth][16], zero-padded.
// Lengths need not be multiples of anything; no function reads or writes past what its comment names.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmtt {

constexpr int kPanel = 16;          // columns of a panel
constexpr int64_t kDepth = 256;     // longest running sum of a product; longer ones are summed in pieces
constexpr int64_t kGroup = 4;       // coordinates whose sums are looked up together in products with signs
constexpr int64_t kTableDepth = 96;  // coordinates of one table of such sums: 24 KiB, which stay in the first-level cache
constexpr int64_t kTableGroups = kTableDepth / kGroup;
constexpr int kTogether = 4;         // parts whose proximities to one whole are computed together
inline int64_t groups(int64_t n) { return (n + kGroup - 1) / kGroup; }
inline int64_t tables(int64_t n) { return (n + kTableDepth - 1) / kTableDepth; }
inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int64_t padded(int64_t n) { return panels(n) * kPanel; }

// A pair that must be evaluated exactly: part = coefficient * u[source]. One whose coefficient is 0 is only listed:
// its value is final.
struct Record {
  int32_t row;     // destination
  int32_t source;  // or neuron
  float coefficient;
  float value;     // first-order value g, later the exact proximity
};

// Row sums of one screening.
struct ScreenSums {
  double skipped = 0;    // relu(g) of pairs that keep their first-order value
  double uncertain = 0;  // what the true values of those pairs may lack
  double signed_sum = 0; // all g
  double absolute = 0;   // all |g|
  int64_t positive = 0;   // pairs whose bound is positive
  int64_t evaluated = 0;  // pairs to be evaluated exactly
};

// One row of logits, to be turned into coefficients row_scale * A.
struct AttentionRow {
  int64_t first, last;      // sources first..last (inclusive) are attended to
  int64_t begin, end;       // multiples of 16 around them; coefficients outside first..last become 0
  float scale;
  float softcap;            // 0: none
  const float* mask;        // [last + 1] added after the softcap, or null
  const uint8_t* allowed;   // [last + 1] nonzero = may attend, or null
  float alibi;              // adds -alibi * (last - j)
  bool has_sink, has_lse;
  float sink, lse;
  float row_scale;
};

struct Kernels {
  const char* name;

  // panel[k][c] = rows[c * stride + k], c < count <= 16: the transpose of `count` rows.
  void (*pack_rows)(const float* rows, ptrdiff_t stride, int count, int64_t depth, float* panel);
  // to[k * to_stride + c] = rows[c * stride + k], c < count <= 16, k < depth: as pack_rows, into a matrix.
  void (*turn_rows)(const float* rows, ptrdiff_t stride, int count, int64_t depth, float* to, ptrdiff_t to_stride);
  // c[r][0..15] = (accumulate ? c : 0) + sum over k < depth of a[r][k] * panel[k]; in pieces of kDepth.
  // The order of additions does not depend on `rows`.
  void (*multiply)(int64_t rows, int64_t depth, const float* a, ptrdiff_t a_stride, const float* panel, float* c,
                   ptrdiff_t c_stride, bool accumulate);

  // Products with rows of signs, by look-up ("four Russians"; Arlazarov, Dinic, Kronrod, Faradzhev 1970): four
  // coordinates have sixteen sums of signs, which are formed once for a panel and then only added up by every row,
  // an addition in the place of four multiply-adds.
  // offsets[g] = the place, in floats, of the sums for the sign bits of y[4 g .. 4 g + 3] in the group's part of a table.
  void (*sign_offsets)(const float* y, int64_t n, uint16_t* offsets);
  // table[g][s][c] = sum over b < 4 of matrix[(4 g + b) * stride + c] * (bit b of s ? -1 : 1), g < groups(depth),
  // c < count <= 16. What is beyond depth or count counts as zeros.
  void (*sign_table)(const float* matrix, ptrdiff_t stride, int count, int64_t depth, float* table);
  // c[r][0..15] = (accumulate ? c : 0) + sum over g < count of table[g] at offsets[r][g]. The order of additions
  // does not depend on `rows`.
  void (*add_signed)(int64_t rows, int64_t count, const uint16_t* offsets, ptrdiff_t stride, const float* table,
                     float* c, ptrdiff_t c_stride, bool accumulate);

  double (*absolute_sum)(const float* x, int64_t n);                     // sum of |x|
  // sums[c] = sum over k < depth of |matrix[k * stride + c]|, c < count <= 16.
  void (*absolute_column_sums)(const float* matrix, ptrdiff_t stride, int count, int64_t depth, double* sums);
  double (*absolute_dot)(const float* x, const float* w, int64_t n);     // sum of |x| w
  // proximity = max(0, sum of min(t, 2|y| - t)), dot = sum of t unless it is null, with t = x sign(y).
  void (*proximity)(const float* x, const float* y, int64_t n, double* proximity, double* dot);
  // Per block of sixteen: smallest[b] = min |x|, largest[b] = max |x|; padded(panels(n)) floats, zeros at the end.
  void (*block_smallest)(const float* x, int64_t n, float* smallest);
  void (*block_largest)(const float* x, int64_t n, float* largest);
  // result[p] = sum of relu(coefficient[p] * u[p] * sign(y) - |y|) for p < count <= kTogether parts of one y.
  // `u_largest` and `y_smallest` are those of u and y: blocks where |coefficient| * max |u| <= min |y| add nothing
  // and are not looked at, which are most blocks of a small part. No result depends on what it is computed with.
  void (*overshoots)(int count, const float* const* u, const float* const* u_largest, const float* y,
                     const float* y_smallest, const float* coefficient, int64_t n, float* result);

  // logits [begin, end) -> row_scale * A in place.
  void (*attend)(const AttentionRow& row, float* logits);
  // Screens pairs begin..end (begin a multiple of 16; all arrays readable to padded(end), edges to end):
  // g = coefficient * product, bound = g + |coefficient| * margin * margin_scale. Pairs with bound > threshold
  // are written to `records` (room for end - begin), the others add relu(g) to edges; of those, pairs with g > listed
  // are written too, with coefficient 0. Returns the number written.
  int64_t (*screen)(int64_t begin, int64_t end, const float* coefficient, const float* product, const float* margin,
                    float margin_scale, float threshold, float listed, int32_t row, float* edges, Record* records,
                    ScreenSums* sums);
  // Likewise for neurons 0..count of one row, coefficient = scale * act, all arrays of exactly `count`
  // (product padded, its panels panel_stride floats apart). values[n] = 0 where the bound is not positive,
  // -relu(g) (sign bit set) where skipped.
  int64_t (*screen_neurons)(int64_t count, const float* act, float scale, const float* product,
                            ptrdiff_t panel_stride, const float* margin, float threshold, int32_t row, int32_t first,
                            float* values, Record* records, ScreenSums* sums);
  // Bits n < count <= 64 with an exact value (sign bit clear) above `least`, or NaN.
  uint64_t (*exact_above)(int64_t count, const float* values, float least);
  // Bits n < count <= 64 with a first-order value (sign bit set) whose bound
  // relu(g) + |scale * act| * margin is not below `least`.
  uint64_t (*open_from)(int64_t count, const float* values, const float* act, float scale, const float* margin,
                        float least);
  // total = sum of |values|, uncertain = sum of the bounds of first-order values.
  void (*neuron_sums)(int64_t count, const float* values, const float* act, float scale, const float* margin,
                      double* total, double* uncertain);
  // For micro-benchmarks: chains of multiply-adds in registers; their number, and a result nobody needs.
  float (*multiply_add_chain)(int64_t rounds, int64_t* multiply_adds);
};

// Null where the compiler or the architecture lacks the instruction set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace lmtt
