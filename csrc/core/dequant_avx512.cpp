// The decoders with AVX-512; the flags are in setup.py.
#include "core/dequant.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include "core/dequant.inl"

const lmtt::BlockFormat* lmtt::avx512_formats() { return kFormats; }
#else
const lmtt::BlockFormat* lmtt::avx512_formats() { return nullptr; }
#endif
