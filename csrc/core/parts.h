// Parts that every row of a whole has beside its pairs or neurons: the residual, a bias, others.
#pragma once

#include <cmath>

#include "core/support.h"

namespace lmtt {

// All [T, D] row by row, except a bias of one row.
struct Parts {
  int64_t T, D, n_others;
  const float* whole;
  const float* residual;
  const float* bias;          // null, [D] or [T, D]
  int64_t bias_stride;        // 0 for [D]
  const float* const* others;  // n_others matrices
};

// What becomes of one row; the sums are of proximities, in units of |whole|.
struct PartsRow {
  double size;        // |whole|_1
  double fixed;       // sum of the proximities below
  double signed_sum;  // sum of <part, sign(whole)>
  double absolute;    // sum of their sizes
};

// Writes the proximities of residual, bias and others (not yet divided) and returns the row's sums.
inline PartsRow fixed_parts(const Parts& p, int64_t i, float* residual, float* bias, float* others) {
  const Kernels& k = kernels();
  const float* y = p.whole + i * p.D;
  PartsRow row{k.absolute_sum(y, p.D), 0, 0, 0};
  const auto part = [&](const float* x, float* out) {
    double proximity, dot;
    k.proximity(x, y, p.D, &proximity, &dot);
    row.fixed += proximity;
    row.signed_sum += dot;
    row.absolute += std::fabs(dot);
    *out = static_cast<float>(proximity);
  };
  part(p.residual + i * p.D, residual + i);
  bias[i] = 0;
  if (p.bias) part(p.bias + i * p.bias_stride, bias + i);
  for (int64_t o = 0; o < p.n_others; ++o) part(p.others[o] + i * p.D, others + i * p.n_others + o);
  return row;
}

// Divides them by the row's normaliser.
inline void share_fixed_parts(const Parts& p, int64_t i, double normaliser, float* residual, float* bias,
                              float* others) {
  const double inverse = normaliser == 0 ? 0 : 1 / normaliser;
  residual[i] = static_cast<float>(residual[i] * inverse);
  bias[i] = static_cast<float>(bias[i] * inverse);
  for (int64_t o = 0; o < p.n_others; ++o) {
    others[i * p.n_others + o] = static_cast<float>(others[i * p.n_others + o] * inverse);
  }
}

inline float checksum(const PartsRow& row, double signed_sum, double absolute) {
  const double all = row.absolute + absolute;
  return all == 0 ? 0.0f : static_cast<float>(std::fabs(row.signed_sum + signed_sum - row.size) / all);
}

inline float certificate(double uncertain, double normaliser) {
  return uncertain == 0 ? 0.0f : static_cast<float>(uncertain >= normaliser ? 1.0 : uncertain / normaliser);
}

}  // namespace lmtt
