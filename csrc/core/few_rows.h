// A product of a few rows with a large matrix as linear layers store it. Libraries pack the matrix first, which takes
// longer than this product; here the rows are packed, and the matrix is read once, as it lies.
#pragma once

#include <algorithm>

#include "core/support.h"

namespace lmtt {

// out[r, m] = sum over k of x[r, k] * stored[m, k]; x [rows, depth], stored [columns, depth], out [rows, columns], and
// at most kPanel rows.
inline void multiply_few_rows(const float* x, int rows, int64_t depth, const float* stored, int64_t columns, float* out,
                              int threads) {
  constexpr int64_t kColumns = 96;  // taken together: several strips of every instruction set
  const Buffer<float> panel(depth * kPanel);
  kernels().pack_rows(x, depth, rows, depth, panel.get());
  parallel_for(threads, (columns + kColumns - 1) / kColumns, [&](int64_t item, int) {
    const int64_t m = item * kColumns, some = std::min(kColumns, columns - m);
    float product[kColumns * kPanel];
    kernels().multiply(some, depth, stored + m * depth, depth, panel.get(), product, kPanel, false);
    for (int r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < some; ++n) out[r * columns + m + n] = product[n * kPanel + r];
    }
  });
}

}  // namespace lmtt
