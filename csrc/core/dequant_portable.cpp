// The decoders for any machine (SSE2 on x86-64, NEON on arm64: what the compiler assumes anyway).
#include "core/dequant.inl"

const lmtt::BlockFormat* lmtt::portable_formats() { return kFormats; }
