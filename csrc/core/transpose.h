// A matrix stored by columns, by rows: weights of linear layers lie the other way round from how they are read here.
#pragma once

#include <algorithm>

#include "core/support.h"

namespace lmtt {

// to[c * rows + r] = from[r * columns + c].
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int threads) {
  constexpr int64_t kStrip = 64;  // columns that are turned together, in whole cache lines
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  parallel_for(threads, strips, [&](int64_t strip, int) {
    const int64_t c = strip * kStrip, width = std::min(kStrip, columns - c);
    for (int64_t r = 0; r < rows; r += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, rows - r));
      kernels().turn_rows(from + r * columns + c, columns, count, width, to + c * rows + r, rows);
    }
  });
}

}  // namespace lmtt
