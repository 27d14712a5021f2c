// What the CUDA library offers, without torch: device pointers, sizes, a stream. Every function returns a
// cudaError_t as int (0 = fine) and launches asynchronously; nothing is allocated.
#pragma once
#include <cstdint>

extern "C" {

// Version of this interface: the Python side refuses another one.
int lmtt_cuda_abi();
const char* lmtt_cuda_error(int code);

// Stream compaction. words [groups, words_per_group]: bit b of word m says that row 32 m + b of a group is listed.
// First count: counts [groups] (int32). Then, with offsets [groups] (int64, the exclusive sum of the counts), list:
// group [N] and row [N] (int32), sorted by (group, row).
int lmtt_cuda_count(const uint32_t* words, int64_t groups, int64_t words_per_group, int32_t* counts, void* stream);
int lmtt_cuda_list(const uint32_t* words, int64_t groups, int64_t words_per_group, const int64_t* offsets,
                   int32_t* group, int32_t* row, void* stream);

// The smallest |y| of each block of 32 coordinates, 0 where one is NaN: [rows, blocks].
// y [rows, width] with `stride` elements between rows; kind 0 = float32, 1 = bfloat16, 2 = float16.
int lmtt_cuda_block_smallest(const void* y, int kind, int64_t rows, int64_t width, int64_t stride, float* smallest,
                             void* stream);

// Exact L1 proximities max(0, g - 2 sum_d relu(t - |y|)), t = c u sign(y), g = sum_d t, of a list sorted by u.
// u [n_u, width] (u_kind) with u_stride; pairs of u[s] are first[s] <= n < first[s + 1] (int64 [n_u + 1]);
// row [N] into y; coefficient and g [N]; smallest as above; out [N]. width at most lmtt_cuda_most_width().
int64_t lmtt_cuda_most_width();
int lmtt_cuda_evaluate(const void* u, int u_kind, int64_t u_stride, int64_t n_u, const int64_t* first,
                       const int32_t* row, const float* coefficient, const float* g, const void* y, int y_kind,
                       int64_t y_stride, const float* smallest, int64_t width, float* out, void* stream);
}
