// Which decoders run, and how their work is split. See dequant.h.
#include "core/dequant.h"

#include <cstring>
#include <stdexcept>

#include "core/support.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lmtt {
namespace {

// isa.cpp does not ask for F16C when it offers "avx2", and the compilers' own question for it is recent.
bool has_f16c() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
#else
  return false;
#endif
}

const BlockFormat* formats_in_use() {
  const char* isa = kernels().name;
  if (std::strcmp(isa, "avx512") == 0 && avx512_formats()) return avx512_formats();
  if (std::strcmp(isa, "avx2") == 0 && avx2_formats() && has_f16c()) return avx2_formats();
  return portable_formats();
}

}  // namespace

std::vector<BlockFormat> block_formats() { return {formats_in_use(), formats_in_use() + kBlockFormats}; }

BlockFormat block_format(const std::string& name) {
  std::string known;
  for (const BlockFormat& format : block_formats()) {
    if (name == format.name) return format;
    known += std::string(known.empty() ? "" : ", ") + format.name;
  }
  throw std::invalid_argument("block format, expected one of " + known + ", got " + name);
}

void dequantize(const BlockFormat& format, FloatKind kind, const uint8_t* blocks, int64_t count, void* out,
                int threads) {
  constexpr int64_t kValuesAtOnce = 1 << 16;  // large against taking the next piece, small against a matrix
  const int64_t piece = kValuesAtOnce / format.values, pieces = (count + piece - 1) / piece;
  const int64_t value_bytes = kind == FloatKind::kFloat32 ? 4 : 2;
  const DecodeBlocks decode = format.decode[static_cast<int>(kind)];
  parallel_for(pieces < threads ? static_cast<int>(pieces > 0 ? pieces : 1) : threads, pieces, [&](int64_t n, int) {
    const int64_t first = n * piece, some = count - first < piece ? count - first : piece;
    decode(blocks + first * format.bytes, some,
           static_cast<uint8_t*>(out) + first * format.values * value_bytes);
  });
}

}  // namespace lmtt
