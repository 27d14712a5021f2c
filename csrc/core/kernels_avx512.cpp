// The inner loops with AVX-512; the flags are in setup.py.
#include "core/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "core/kernels.inl"

const lmtt::Kernels* lmtt::avx512_kernels() {
  static constexpr Kernels kernels = table("avx512");
  return &kernels;
}
#else
const lmtt::Kernels* lmtt::avx512_kernels() { return nullptr; }
#endif
