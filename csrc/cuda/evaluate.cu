// Exact L1 proximities of an irregular list of pairs.
//
// A block of threads takes one u into shared memory and serves its pairs, one warp for each. The proximity is
// g - 2 sum relu(t - |y|), and g is known; so y is needed only where c u may exceed it, which the largest |u| and
// the smallest |y| of each block of 32 coordinates tell. A small part skips nearly all reading and arithmetic.
#include "cuda/api.h"
#include <type_traits>

#include "cuda/load.cuh"
#include "cuda/proximity.cuh"

namespace lmtt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kMostWidth = 24576;  // u in float32 with its blocks' largest fits the shared memory of sm_80
constexpr int kMany = 10;              // open blocks of 32 from which on doing all of them costs less (SASS: 34 to 10)
constexpr int kSplits = 8;             // blocks of threads that may share one u: a source that all rows attend to

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

// NaN counts as the largest.
__device__ __forceinline__ float warp_largest(float x) {
  return __uint_as_float(__reduce_max_sync(kAll, __float_as_uint(fabsf(x))));
}

template <class U, class Y>
__global__ void __launch_bounds__(kThreads)
    evaluate(const U* __restrict__ u, int64_t u_stride, const int64_t* __restrict__ first,
             const int32_t* __restrict__ row, const float* __restrict__ coefficient, const float* __restrict__ g,
             const Y* __restrict__ y, int64_t y_stride, const float* __restrict__ smallest, int width,
             float* __restrict__ out) {
  extern __shared__ float shared[];
  const int blocks = (width + kBlock - 1) / kBlock;
  float* const x = shared;                      // [blocks * 32]
  float* const largest = x + blocks * kBlock;   // [blocks]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = first[blockIdx.x] + blockIdx.y * kWarps, end = first[blockIdx.x + 1];
  if (begin >= end) return;

  const U* const from = u + blockIdx.x * u_stride;
  for (int b = warp; b < blocks; b += kWarps) {
    const int d = b * kBlock + lane;
    const float value = d < width ? widen(from[d]) : 0.0f;
    x[d] = value;
    const float most = warp_largest(value);
    if (lane == 0) largest[b] = most;
  }
  __syncthreads();

  for (int64_t n = begin + warp; n < end; n += kWarps * kSplits) {
    const float c = coefficient[n];
    const Y* const whole = y + row[n] * y_stride;
    const float* const least = smallest + static_cast<int64_t>(row[n]) * blocks;
    float over = 0.0f;
    for (int b0 = 0; b0 < blocks; b0 += 32) {
      const int b = b0 + lane;
      unsigned open = __ballot_sync(kAll, b < blocks && may_exceed(c, largest[min(b, blocks - 1)],
                                                                   least[min(b, blocks - 1)]));
      if (__popc(open) >= kMany && (b0 + 32) * kBlock <= width) {
#pragma unroll 8
        for (int m = 0; m < 32; ++m) {
          const int d = (b0 + m) * kBlock + lane;
          over += excess(c * x[d], widen(whole[d]));
        }
        continue;
      }
      while (open) {  // two at a time, so that two loads are in flight
        const int d = (b0 + __ffs(open) - 1) * kBlock + lane;
        open &= open - 1;
        const int e = open ? (b0 + __ffs(open) - 1) * kBlock + lane : width;
        open &= open - 1;
        const float y0 = d < width ? widen(whole[d]) : 0.0f, y1 = e < width ? widen(whole[e]) : 0.0f;
        if (d < width) over += excess(c * x[d], y0);
        if (e < width) over += excess(c * x[e], y1);
      }
    }
    over = warp_sum(over);
    if (lane == 0) out[n] = proximity(g[n], over);
  }
}

template <class Y>
__global__ void __launch_bounds__(kThreads)
    block_smallest(const Y* __restrict__ y, int64_t stride, int width, int blocks, float* __restrict__ smallest) {
  const int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < blocks; b += kWarps) {
    const int d = b * kBlock + lane;
    const float size = d < width ? fabsf(widen(y[blockIdx.x * stride + d])) : INFINITY;
    const unsigned bits = size == size ? __float_as_uint(size) : 0u;  // sizes order as their bits do
    const unsigned least = __reduce_min_sync(kAll, bits);
    if (lane == 0) smallest[blockIdx.x * static_cast<int64_t>(blocks) + b] = __uint_as_float(least);
  }
}

}  // namespace
}  // namespace lmtt

int64_t lmtt_cuda_most_width() { return lmtt::kMostWidth; }

int lmtt_cuda_block_smallest(const void* y, int kind, int64_t rows, int64_t width, int64_t stride, float* smallest,
                             void* stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  const int blocks = static_cast<int>((width + lmtt::kBlock - 1) / lmtt::kBlock);
  return lmtt::with_kind(y, kind, [&](const auto* typed) {
    lmtt::block_smallest<<<static_cast<unsigned>(rows), lmtt::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        typed, stride, static_cast<int>(width), blocks, smallest);
    return static_cast<int>(cudaGetLastError());
  });
}

int lmtt_cuda_evaluate(const void* u, int u_kind, int64_t u_stride, int64_t n_u, const int64_t* first,
                       const int32_t* row, const float* coefficient, const float* g, const void* y, int y_kind,
                       int64_t y_stride, const float* smallest, int64_t width, float* out, void* stream) {
  if (n_u == 0 || width == 0) return cudaSuccess;
  if (width > lmtt::kMostWidth) return cudaErrorInvalidValue;
  const int64_t blocks = (width + lmtt::kBlock - 1) / lmtt::kBlock;
  const int bytes = static_cast<int>((blocks * lmtt::kBlock + blocks) * sizeof(float));
  return lmtt::with_kind(u, u_kind, [&](const auto* typed_u) {
    return lmtt::with_kind(y, y_kind, [&](const auto* typed_y) {
      const auto kernel = lmtt::evaluate<std::decay_t<decltype(*typed_u)>, std::decay_t<decltype(*typed_y)>>;
      const int code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (code != cudaSuccess) return code;
      const dim3 grid(static_cast<unsigned>(n_u), lmtt::kSplits);
      kernel<<<grid, lmtt::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
          typed_u, u_stride, first, row, coefficient, g, typed_y, y_stride, smallest, static_cast<int>(width), out);
      return static_cast<int>(cudaGetLastError());
    });
  });
}
