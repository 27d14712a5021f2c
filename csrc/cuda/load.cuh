// Elements of the three dtypes that are widened on loading, by the `kind` of api.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace lmtt {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// work(pointer to the right type), or cudaErrorInvalidValue for an unknown kind.
template <class Work>
int with_kind(const void* pointer, int kind, Work work) {
  if (kind == 0) return work(static_cast<const float*>(pointer));
  if (kind == 1) return work(static_cast<const __nv_bfloat16*>(pointer));
  if (kind == 2) return work(static_cast<const __half*>(pointer));
  return cudaErrorInvalidValue;
}

}  // namespace lmtt
