// The inner loops with AVX2 and FMA; the flags are in setup.py.
#include "core/kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "core/kernels.inl"

const lmtt::Kernels* lmtt::avx2_kernels() {
  static constexpr Kernels kernels = table("avx2");
  return &kernels;
}
#else
const lmtt::Kernels* lmtt::avx2_kernels() { return nullptr; }
#endif
