// The decoders of dequant.h, once for each instruction set: blocks in, sixteen floats at a time out.
//
// Layouts are those of ggml (https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h); "half" is IEEE
// binary16, little endian. d times a number of these formats is at most 24 bits wide, so such products are exact, and
// fusing them with the addition that follows changes no bit. Everything lives in an unnamed namespace: see simd.h.
#include "core/dequant.h"
#include "core/simd.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16)));

LMTT_INLINE Bytes bytes_at(const uint8_t* p) {
  Bytes b;
  __builtin_memcpy(&b, p, sizeof b);
  return b;
}
LMTT_INLINE Bytes low_bits(Bytes b) { return b & 15; }
LMTT_INLINE Bytes high_bits(Bytes b) { return b >> 4; }
// 16 where bit n of the sixteen at p is set, else 0.
LMTT_INLINE Bytes fifth_bits(const uint8_t* p) {
  const Words repeated = {p[0] * 0x0101010101010101u, p[1] * 0x0101010101010101u};
  const Words own_bit = {0x8040201008040201u, 0x8040201008040201u};
  const Bytes bit = reinterpret_cast<Bytes>(own_bit);
  return reinterpret_cast<Bytes>((reinterpret_cast<Bytes>(repeated) & bit) == bit) & 16;
}

// Sixteen signed bytes.
LMTT_INLINE Lanes widen(Bytes q) {
  Lanes r;
#if defined(__AVX512F__)
  r.part[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(q)));
#elif defined(__AVX2__)
  const __m128i all = reinterpret_cast<__m128i>(q);
  r.part[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all));
  r.part[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(all, all)));
#elif defined(__SSE2__)
  const __m128i all = reinterpret_cast<__m128i>(q);
  const __m128i low = _mm_unpacklo_epi8(all, all), high = _mm_unpackhi_epi8(all, all);
  r.part[0] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(low, low), 24));
  r.part[1] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpackhi_epi16(low, low), 24));
  r.part[2] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(high, high), 24));
  r.part[3] = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpackhi_epi16(high, high), 24));
#else
  for (int n = 0; n < kLanes; ++n) r.part[n / kPartLanes][n % kPartLanes] = float(int8_t(q[n]));
#endif
  return r;
}

LMTT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
LMTT_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
LMTT_INLINE uint32_t half_at(const uint8_t* p) { return uint32_t(p[0]) | uint32_t(p[1]) << 8; }

// binary16 -> float32, exact. No arithmetic on subnormal floats, which a thread may have been told to flush.
LMTT_INLINE float widen_half(uint32_t half) {
  const uint32_t magnitude = half & 0x7fff;
  const float small = float(int32_t(magnitude)) * 0x1p-24f;  // subnormal: its mantissa alone
  // exponent and mantissa in place; the exponent of infinity and NaN, 31, becomes 255
  const uint32_t big = (magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u);
  return float_of((magnitude < 0x400 ? bits_of(small) : big) | (half & 0x8000) << 16);
}
LMTT_INLINE float scale_at(const uint8_t* p) { return widen_half(half_at(p)); }

// To nearest, ties to even; NaN stays NaN.
LMTT_INLINE uint16_t narrow_to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  // below 2^-14: with 1/2 added, multiples of 2^-24 are what the last bits count, and the adder rounds to them
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? small : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return uint16_t(half | (bits >> 16 & 0x8000));
}

// The three kinds of result; `put` stores sixteen.
struct Float32 {
  using Type = float;
  static LMTT_INLINE void put(float* out, const Lanes& x) { store(out, x); }
};
struct Bfloat16 {
  using Type = uint16_t;
  static LMTT_INLINE void put(uint16_t* out, const Lanes& x) {
    Choice b = bits(x);
    const Choice number = bits(absolute(x));
    LMTT_EACH_PART {
      const IntVector odd = b.part[p] >> 16 & 1;
      b.part[p] = number.part[p] > 0x7f800000 ? IntVector{} + 0x7fc00000 : b.part[p] + 0x7fff + odd;
    }
#if defined(__AVX512F__)
    const __m256i all = _mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(b.part[0]), 16));
    __builtin_memcpy(out, &all, sizeof all);
#elif defined(__AVX2__)
    const __m256i low = _mm256_srli_epi32(reinterpret_cast<__m256i>(b.part[0]), 16);
    const __m256i high = _mm256_srli_epi32(reinterpret_cast<__m256i>(b.part[1]), 16);
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    __builtin_memcpy(out, &all, sizeof all);
#elif defined(__SSE2__)
    for (int p = 0; p < kParts; p += 2) {  // sign-extended, so that the signed saturation keeps all bits
      const __m128i low = _mm_srai_epi32(reinterpret_cast<__m128i>(b.part[p]), 16);
      const __m128i high = _mm_srai_epi32(reinterpret_cast<__m128i>(b.part[p + 1]), 16);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + p * kPartLanes), _mm_packs_epi32(low, high));
    }
#else
    for (int n = 0; n < kLanes; ++n) out[n] = uint16_t(uint32_t(b.part[n / kPartLanes][n % kPartLanes]) >> 16);
#endif
  }
};
struct Float16 {
  using Type = uint16_t;
  static LMTT_INLINE void put(uint16_t* out, const Lanes& x) {
#if defined(__AVX512F__)
    const __m256i all = _mm512_cvtps_ph(x.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(out, &all, sizeof all);
#elif defined(__F16C__)
    LMTT_EACH_PART {
      const __m128i eight = _mm256_cvtps_ph(x.part[p], _MM_FROUND_TO_NEAREST_INT);
      __builtin_memcpy(out + 8 * p, &eight, sizeof eight);
    }
#else
    float all[kLanes];
    store(all, x);
    for (int n = 0; n < kLanes; ++n) out[n] = narrow_to_half(all[n]);
#endif
  }
};

struct Q4_0 {  // half d, 16 bytes: number n in the low, number n + 16 in the high four bits
  static constexpr int kValues = 32, kBytes = 18;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Lanes d = splat(scale_at(b));
    const Bytes q = bytes_at(b + 2);
    Out::put(x, widen(low_bits(q) - 8) * d);
    Out::put(x + 16, widen(high_bits(q) - 8) * d);
  }
};
struct Q4_1 {  // half d, half m, 16 bytes as in Q4_0
  static constexpr int kValues = 32, kBytes = 20;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Lanes d = splat(scale_at(b)), m = splat(scale_at(b + 2));
    const Bytes q = bytes_at(b + 4);
    Out::put(x, widen(low_bits(q)) * d + m);
    Out::put(x + 16, widen(high_bits(q)) * d + m);
  }
};
struct Q5_0 {  // half d, 32 fifth bits, 16 bytes as in Q4_0
  static constexpr int kValues = 32, kBytes = 22;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Lanes d = splat(scale_at(b));
    const Bytes q = bytes_at(b + 6);
    Out::put(x, widen((low_bits(q) | fifth_bits(b + 2)) - 16) * d);
    Out::put(x + 16, widen((high_bits(q) | fifth_bits(b + 4)) - 16) * d);
  }
};
struct Q5_1 {  // half d, half m, 32 fifth bits, 16 bytes as in Q4_0
  static constexpr int kValues = 32, kBytes = 24;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Lanes d = splat(scale_at(b)), m = splat(scale_at(b + 2));
    const Bytes q = bytes_at(b + 8);
    Out::put(x, widen(low_bits(q) | fifth_bits(b + 4)) * d + m);
    Out::put(x + 16, widen(high_bits(q) | fifth_bits(b + 6)) * d + m);
  }
};
struct Q8_0 {  // half d, 32 signed bytes
  static constexpr int kValues = 32, kBytes = 34;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Lanes d = splat(scale_at(b));
    Out::put(x, widen(bytes_at(b + 2)) * d);
    Out::put(x + 16, widen(bytes_at(b + 18)) * d);
  }
};

// Scales and minima of the eight groups of a block: six bits each, in twelve bytes. The first four of both are the low
// bits of bytes 0-3 and 4-7; the others have four bits in bytes 8-11 and two above the first ones.
struct Groups {
  float scale[8], minimum[8];
  explicit LMTT_INLINE Groups(const uint8_t* b) {
    const float d = scale_at(b), dmin = scale_at(b + 2);
    const uint8_t* s = b + 4;
    for (int g = 0; g < 4; ++g) {
      scale[g] = d * float(s[g] & 63), minimum[g] = dmin * float(s[g + 4] & 63);
      scale[g + 4] = d * float((s[g + 8] & 15) | s[g] >> 6 << 4);
      minimum[g + 4] = dmin * float(s[g + 8] >> 4 | s[g + 4] >> 6 << 4);
    }
  }
};
struct Q4_K {  // half d, half dmin, scales and minima, 4 x 32 bytes: group 2 n in the low, 2 n + 1 in the high four bits
  static constexpr int kValues = 256, kBytes = 144;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Groups of(b);
    for (int g = 0; g < 8; g += 2) {
      const Lanes d0 = splat(of.scale[g]), m0 = splat(of.minimum[g]);
      const Lanes d1 = splat(of.scale[g + 1]), m1 = splat(of.minimum[g + 1]);
      for (int half = 0; half < 32; half += 16) {
        const Bytes q = bytes_at(b + 16 + 16 * g + half);
        Out::put(x + 32 * g + half, widen(low_bits(q)) * d0 - m0);
        Out::put(x + 32 * g + 32 + half, widen(high_bits(q)) * d1 - m1);
      }
    }
  }
};
struct Q5_K {  // as Q4_K, with 32 bytes of fifth bits before the numbers: bit g of byte n is for number n of group g
  static constexpr int kValues = 256, kBytes = 176;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const Groups of(b);
    for (int half = 0; half < 32; half += 16) {
      Bytes fifth = bytes_at(b + 16 + half);
      for (int g = 0; g < 8; g += 2, fifth >>= 2) {
        const Lanes d0 = splat(of.scale[g]), m0 = splat(of.minimum[g]);
        const Lanes d1 = splat(of.scale[g + 1]), m1 = splat(of.minimum[g + 1]);
        const Bytes q = bytes_at(b + 48 + 16 * g + half);
        Out::put(x + 32 * g + half, widen(low_bits(q) | (fifth & 1) << 4) * d0 - m0);
        Out::put(x + 32 * g + 32 + half, widen(high_bits(q) | (fifth & 2) << 3) * d1 - m1);
      }
    }
  }
};
// 128 bytes of low four bits, 64 of high two bits, 16 signed scales (of 16 numbers each), half d. 128 numbers share 64
// low and 32 high bytes: numbers 0-63 in the low, 64-127 in the high four bits; 32 n .. 32 n + 31 in high bits 2 n.
struct Q6_K {
  static constexpr int kValues = 256, kBytes = 210;
  template <class Out>
  static LMTT_INLINE void decode(const uint8_t* b, typename Out::Type* x) {
    const float d = scale_at(b + 208);
    for (int part = 0; part < 2; ++part) {
      const uint8_t *low = b + 64 * part, *high = b + 128 + 32 * part, *scale = b + 192 + 8 * part;
      typename Out::Type* out = x + 128 * part;
      for (int n = 0; n < 32; n += 16) {
        const Bytes first = bytes_at(low + n), second = bytes_at(low + 32 + n), two = bytes_at(high + n);
        const int s = n / 16;
        const auto scaled = [&](Bytes q, int group) {
          return widen(q - 32) * splat(d * float(int8_t(scale[2 * group + s])));
        };
        Out::put(out + n, scaled(low_bits(first) | (two & 3) << 4, 0));
        Out::put(out + 32 + n, scaled(low_bits(second) | (two & 12) << 2, 1));
        Out::put(out + 64 + n, scaled(high_bits(first) | (two & 48), 2));
        Out::put(out + 96 + n, scaled(high_bits(second) | (two & 192) >> 2, 3));
      }
    }
  }
};

template <class Format, class Out>
void decode_blocks(const uint8_t* blocks, int64_t count, void* out) {
  auto* x = static_cast<typename Out::Type*>(out);
  for (int64_t n = 0; n < count; ++n) Format::template decode<Out>(blocks + n * Format::kBytes, x + n * Format::kValues);
}

// Plain floats: blocks of one, sixteen read at a time.
struct Half {
  static constexpr int kBytes = 2;
  static LMTT_INLINE Lanes sixteen(const uint8_t* p) {
    float all[kLanes];
    for (int l = 0; l < kLanes; ++l) all[l] = widen_half(half_at(p + 2 * l));
    return load(all);
  }
};
struct Brain {
  static constexpr int kBytes = 2;
  static LMTT_INLINE Lanes sixteen(const uint8_t* p) {
    float all[kLanes];
    for (int l = 0; l < kLanes; ++l) all[l] = float_of(half_at(p + 2 * l) << 16);
    return load(all);
  }
};
struct Single {
  static constexpr int kBytes = 4;
  static LMTT_INLINE Lanes sixteen(const uint8_t* p) {
    float all[kLanes];
    __builtin_memcpy(all, p, sizeof all);
    return load(all);
  }
};
template <class Number, class Out>
void convert(const uint8_t* from, int64_t count, void* out) {
  auto* x = static_cast<typename Out::Type*>(out);
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) Out::put(x + n, Number::sixteen(from + n * Number::kBytes));
  if (n == count) return;
  uint8_t last[kLanes * Number::kBytes] = {};
  typename Out::Type values[kLanes];
  __builtin_memcpy(last, from + n * Number::kBytes, static_cast<std::size_t>(count - n) * Number::kBytes);
  Out::put(values, Number::sixteen(last));
  __builtin_memcpy(x + n, values, static_cast<std::size_t>(count - n) * sizeof values[0]);
}
template <class Type>
void copy(const uint8_t* from, int64_t count, void* out) {
  __builtin_memcpy(out, from, static_cast<std::size_t>(count) * sizeof(Type));
}

template <class F>
constexpr lmtt::BlockFormat in_blocks(const char* name) {
  return {name, F::kValues, F::kBytes, {decode_blocks<F, Float32>, decode_blocks<F, Bfloat16>, decode_blocks<F, Float16>}};
}
constexpr lmtt::BlockFormat kFormats[lmtt::kBlockFormats] = {
    in_blocks<Q4_0>("Q4_0"),
    in_blocks<Q4_1>("Q4_1"),
    in_blocks<Q5_0>("Q5_0"),
    in_blocks<Q5_1>("Q5_1"),
    in_blocks<Q8_0>("Q8_0"),
    in_blocks<Q4_K>("Q4_K"),
    in_blocks<Q5_K>("Q5_K"),
    in_blocks<Q6_K>("Q6_K"),
    {"F16", 1, 2, {convert<Half, Float32>, convert<Half, Bfloat16>, copy<uint16_t>}},
    {"BF16", 1, 2, {convert<Brain, Float32>, copy<uint16_t>, convert<Brain, Float16>}},
    {"F32", 1, 4, {copy<float>, convert<Single, Bfloat16>, convert<Single, Float16>}},
};

}  // namespace
