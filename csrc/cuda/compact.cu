// Stream compaction: the set bits of many groups of words as one list sorted by (group, row), one warp for each
// group. Two passes with an exclusive sum of the counts between them, so that the list is the same every time.
#include <cuda_runtime.h>

#include "cuda/api.h"

namespace lmtt {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

__global__ void __launch_bounds__(kThreads)
    count(const uint32_t* __restrict__ words, int64_t groups, int64_t words_per_group, int32_t* __restrict__ counts) {
  const int lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (group >= groups) return;
  int found = 0;
  for (int64_t m = lane; m < words_per_group; m += 32) found += __popc(words[group * words_per_group + m]);
  found = __reduce_add_sync(kAll, found);
  if (lane == 0) counts[group] = found;
}

__global__ void __launch_bounds__(kThreads)
    list(const uint32_t* __restrict__ words, int64_t groups, int64_t words_per_group,
         const int64_t* __restrict__ offsets, int32_t* __restrict__ group_of, int32_t* __restrict__ row_of) {
  const int lane = threadIdx.x % 32;
  const int64_t group = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (group >= groups) return;
  int64_t at = offsets[group];
  for (int64_t m0 = 0; m0 < words_per_group; m0 += 32) {
    const int64_t m = m0 + lane;
    uint32_t word = m < words_per_group ? words[group * words_per_group + m] : 0u;
    const int mine = __popc(word);
    int before = mine;  // inclusive sum over lanes
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAll, before, step);
      if (lane >= step) before += other;
    }
    const int all = __shfl_sync(kAll, before, 31);
    int64_t to = at + before - mine;
    for (; word; word &= word - 1, ++to) {
      group_of[to] = static_cast<int32_t>(group);
      row_of[to] = static_cast<int32_t>(m * 32 + __ffs(word) - 1);
    }
    at += all;
  }
}

unsigned blocks_for(int64_t groups) { return static_cast<unsigned>((groups + kWarps - 1) / kWarps); }

}  // namespace
}  // namespace lmtt

int lmtt_cuda_abi() { return 1; }

const char* lmtt_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int lmtt_cuda_count(const uint32_t* words, int64_t groups, int64_t words_per_group, int32_t* counts, void* stream) {
  if (groups == 0) return cudaSuccess;
  lmtt::count<<<lmtt::blocks_for(groups), lmtt::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      words, groups, words_per_group, counts);
  return cudaGetLastError();
}

int lmtt_cuda_list(const uint32_t* words, int64_t groups, int64_t words_per_group, const int64_t* offsets,
                   int32_t* group, int32_t* row, void* stream) {
  if (groups == 0) return cudaSuccess;
  lmtt::list<<<lmtt::blocks_for(groups), lmtt::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      words, groups, words_per_group, offsets, group, row);
  return cudaGetLastError();
}
