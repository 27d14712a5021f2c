// Weights stored in blocks, as GGUF files hold them, turned into floats.
//
// A block holds `values` numbers of a few bits and the scales they share, in `bytes` bytes; a row of a matrix is whole
// blocks, so any range of rows is a range of blocks. Every value is the one that the format defines in float32, to the
// last bit, then rounded to nearest (ties to even) where the result is bfloat16 or float16.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lmtt {

enum class FloatKind { kFloat32, kBfloat16, kFloat16 };

// Decodes `count` blocks. `out` has room for all their values: float, or uint16_t holding bits.
using DecodeBlocks = void (*)(const uint8_t* blocks, int64_t count, void* out);

struct BlockFormat {
  const char* name;  // ggml's, such as "Q4_K"
  int values, bytes;
  DecodeBlocks decode[3];  // for each FloatKind
};

// The formats, decoded with the instruction set in use (isa.cpp).
std::vector<BlockFormat> block_formats();
// Throws std::invalid_argument for a name that is none of theirs.
BlockFormat block_format(const std::string& name);

// `out` is overwritten entirely; the same bits for any number of threads.
void dequantize(const BlockFormat& format, FloatKind kind, const uint8_t* blocks, int64_t count, void* out,
                int threads);

// One table for each instruction set (dequant_*.cpp); null where it was not compiled in.
constexpr int kBlockFormats = 11;
const BlockFormat* portable_formats();
const BlockFormat* avx2_formats();
const BlockFormat* avx512_formats();

}  // namespace lmtt
