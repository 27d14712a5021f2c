// A matrix stored by columns, by rows: weights of linear layers lie the other way round from how they are read here.
#pragma once

#include <algorithm>

#include "core/support.h"

namespace lmtt {

// to[c * rows + r] = from[r * columns + c] for begin <= r < end and `width` columns from `first` on.
inline void transpose_part(const float* from, int64_t rows, int64_t columns, int64_t begin, int64_t end, int64_t first,
                           int64_t width, float* to) {
  for (int64_t r = begin; r < end; r += kPanel) {
    const int count = static_cast<int>(std::min<int64_t>(kPanel, end - r));
    kernels().turn_rows(from + r * columns + first, columns, count, width, to + first * rows + r, rows);
  }
}

// to[c * rows + r] = from[r * columns + c].
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int threads) {
  constexpr int64_t kStrip = 64;  // columns that are turned together, in whole cache lines
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  parallel_for(threads, strips, [&](int64_t strip, int) {
    const int64_t c = strip * kStrip, width = std::min(kStrip, columns - c);
    transpose_part(from, rows, columns, 0, rows, c, width, to);
  });
}

}  // namespace lmtt
