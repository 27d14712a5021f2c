// The inner loops for any machine (SSE2 on x86-64, NEON on arm64: what the compiler assumes anyway).
#include "core/kernels.inl"

const lmtt::Kernels* lmtt::portable_kernels() {
  static constexpr Kernels kernels = table("portable");
  return &kernels;
}
