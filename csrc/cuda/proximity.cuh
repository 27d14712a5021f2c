// Device mathematics of one coordinate and of one block of coordinates. Compiles as plain C++ too, for tests.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define LMTT_DEVICE __host__ __device__ __forceinline__
#else
#define LMTT_DEVICE inline
#endif

namespace lmtt {

constexpr int kBlock = 32;  // coordinates that are skipped together: one for each lane of a warp

// relu(t - |y|) with t = x sign(y): what the part x overshoots the whole y by (kernels/proximity/README.md).
// The sign is that of y's sign bit, as in numerics.sign. NaN gives 0: the pair's g is NaN then, and stays.
LMTT_DEVICE float excess(float x, float y) { return fmaxf(fmaf(x, copysignf(1.0f, y), -fabsf(y)), 0.0f); }

// Whether a block of coordinates of c u, none larger than |c| u_largest, can exceed |y| >= y_smallest anywhere.
// False proves that the block overshoots nowhere. NaN answers true.
LMTT_DEVICE bool may_exceed(float c, float u_largest, float y_smallest) {
  return !(fabsf(c) * u_largest <= y_smallest);
}

LMTT_DEVICE float proximity(float g, float sum_of_excess) {
  const float value = g - 2.0f * sum_of_excess;
  return value <= 0.0f ? 0.0f : value;
}

}  // namespace lmtt
