// The decoders with AVX2 and F16C; the flags are in setup.py.
#include "core/dequant.h"

#if defined(__AVX2__) && defined(__F16C__)
#include "core/dequant.inl"

const lmtt::BlockFormat* lmtt::avx2_formats() { return kFormats; }
#else
const lmtt::BlockFormat* lmtt::avx2_formats() { return nullptr; }
#endif
