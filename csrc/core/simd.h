// Sixteen float lanes, as one, two or four machine vectors, and the few functions that kernels are written in.
//
// Included by kernels.inl only, once for each instruction set. Everything lives in an unnamed namespace and
// nothing of the standard library is instantiated here: an inline function compiled with AVX-512 and shared by
// the linker with the rest of the program would crash on a machine without it.
//
// NaN travels: selections keep the NaN operand (`x < 0 ? 0 : x`), so a NaN never turns into a number.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LMTT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LMTT_VECTOR_BYTES 32
#else
#define LMTT_VECTOR_BYTES 16
#endif

#define LMTT_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16;
constexpr int kParts = 4 * kLanes / LMTT_VECTOR_BYTES;
constexpr int kPartLanes = kLanes / kParts;

typedef float FloatVector __attribute__((vector_size(LMTT_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(LMTT_VECTOR_BYTES)));
typedef float FloatVectorAnywhere __attribute__((vector_size(LMTT_VECTOR_BYTES), aligned(4), may_alias));

struct Lanes {
  FloatVector part[kParts];
};
struct Choice {  // all bits of a lane set or clear
  IntVector part[kParts];
};

#define LMTT_EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)

LMTT_INLINE FloatVector load_part(const float* x) { return *reinterpret_cast<const FloatVectorAnywhere*>(x); }
LMTT_INLINE Lanes splat(float x) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = x - FloatVector{};
  return r;
}
LMTT_INLINE Lanes load(const float* x) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = *reinterpret_cast<const FloatVectorAnywhere*>(x + p * kPartLanes);
  return r;
}
LMTT_INLINE void store(float* x, const Lanes& a) {
  LMTT_EACH_PART *reinterpret_cast<FloatVectorAnywhere*>(x + p * kPartLanes) = a.part[p];
}

// The first n of 16 lanes; the others read as 0 and are not written. n may be 0 and may exceed 16.
LMTT_INLINE Lanes load_first(const float* x, int64_t n) {
  if (n >= kLanes) return load(x);
  float all[kLanes] = {};
  for (int64_t l = 0; l < n; ++l) all[l] = x[l];
  return load(all);
}
LMTT_INLINE void store_first(float* x, const Lanes& a, int64_t n) {
  if (n >= kLanes) return store(x, a);
  float all[kLanes];
  store(all, a);
  for (int64_t l = 0; l < n; ++l) x[l] = all[l];
}

#define LMTT_BINARY(name, expression)                       \
  LMTT_INLINE Lanes name(const Lanes& a, const Lanes& b) {  \
    Lanes r;                                                \
    LMTT_EACH_PART r.part[p] = expression;                  \
    return r;                                               \
  }
LMTT_BINARY(operator+, a.part[p] + b.part[p])
LMTT_BINARY(operator-, a.part[p] - b.part[p])
LMTT_BINARY(operator*, a.part[p] * b.part[p])
LMTT_BINARY(operator/, a.part[p] / b.part[p])
// The smaller and the larger of two; where a is NaN, NaN (the instructions return their second operand then).
// fma(a, b, c) = a * b + c and fms(a, b, c) = a * b - c: one instruction, rounded once, where the machine has it.
#if defined(__AVX512F__)
LMTT_BINARY(smaller, _mm512_min_ps(b.part[p], a.part[p]))
#define LMTT_LARGER(a, b) _mm512_max_ps(b, a)
#define LMTT_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define LMTT_FMS(a, b, c) _mm512_fmsub_ps(a, b, c)
#elif defined(__AVX2__)
LMTT_BINARY(smaller, _mm256_min_ps(b.part[p], a.part[p]))
#define LMTT_LARGER(a, b) _mm256_max_ps(b, a)
#define LMTT_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LMTT_FMS(a, b, c) _mm256_fmsub_ps(a, b, c)
#else
LMTT_BINARY(smaller, b.part[p] < a.part[p] ? b.part[p] : a.part[p])
#define LMTT_LARGER(a, b) ((b) > (a) ? (b) : (a))
#define LMTT_FMA(a, b, c) (a) * (b) + (c)
#define LMTT_FMS(a, b, c) (a) * (b) - (c)
#endif
LMTT_BINARY(larger, LMTT_LARGER(a.part[p], b.part[p]))
#undef LMTT_BINARY

LMTT_INLINE Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = LMTT_FMA(a.part[p], b.part[p], c.part[p]);
  return r;
}
LMTT_INLINE Lanes fms(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = LMTT_FMS(a.part[p], b.part[p], c.part[p]);
  return r;
}

LMTT_INLINE Lanes from_bits(const Choice& a) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = reinterpret_cast<FloatVector>(a.part[p]);
  return r;
}
LMTT_INLINE Choice bits(const Lanes& a) {
  Choice r;
  LMTT_EACH_PART r.part[p] = reinterpret_cast<IntVector>(a.part[p]);
  return r;
}

LMTT_INLINE Lanes absolute(const Lanes& a) {
  Choice r = bits(a);
  LMTT_EACH_PART r.part[p] &= 0x7fffffff;
  return from_bits(r);
}
LMTT_INLINE Lanes sign_of(const Lanes& a) {  // +1 or -1; the sign bit decides, so either at zero
  Choice r = bits(a);
  const Choice one = bits(splat(1.0f));
  LMTT_EACH_PART r.part[p] = (r.part[p] & static_cast<int32_t>(0x80000000u)) | one.part[p];
  return from_bits(r);
}
LMTT_INLINE Lanes flip_by_sign(const Lanes& a, const Lanes& sign) {  // a * sign_of(sign)
  Choice r = bits(a);
  const Choice s = bits(sign);
  LMTT_EACH_PART r.part[p] ^= s.part[p] & static_cast<int32_t>(0x80000000u);
  return from_bits(r);
}

#define LMTT_COMPARE(name, op)                              \
  LMTT_INLINE Choice name(const Lanes& a, const Lanes& b) { \
    Choice r;                                               \
    LMTT_EACH_PART r.part[p] = a.part[p] op b.part[p];      \
    return r;                                               \
  }
LMTT_COMPARE(operator>, >)
LMTT_COMPARE(operator<, <)
LMTT_COMPARE(operator!=, !=)
#undef LMTT_COMPARE

LMTT_INLINE Choice operator&(const Choice& a, const Choice& b) {
  Choice r;
  LMTT_EACH_PART r.part[p] = a.part[p] & b.part[p];
  return r;
}
LMTT_INLINE Lanes where(const Choice& c, const Lanes& yes, const Lanes& no) {
  Lanes r;
  LMTT_EACH_PART r.part[p] = c.part[p] ? yes.part[p] : no.part[p];
  return r;
}
LMTT_INLINE Lanes keep_if(const Choice& c, const Lanes& a) { return where(c, a, splat(0.0f)); }

// Bit l is set where lane l is.
LMTT_INLINE unsigned mask_of(const Choice& c) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(c.part[0]));
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(c.part[0]))) |
         static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(c.part[1]))) << 8;
#else
  unsigned m = 0;
  for (int l = 0; l < kLanes; ++l) m |= static_cast<unsigned>(c.part[l / kPartLanes][l % kPartLanes] & 1) << l;
  return m;
#endif
}

// Sum of the lanes, as a tree, in double.
LMTT_INLINE double sum_of(const Lanes& a) {
  float x[kLanes];
  store(x, a);
  double half[8];
  for (int l = 0; l < 8; ++l) half[l] = double(x[l]) + double(x[l + 8]);
  return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}
// Extremes of the lanes; which of them wins against a NaN is not defined.
#if defined(__SSE2__)
#define LMTT_REDUCE(name, op)                                                       \
  LMTT_INLINE float name(const Lanes& a) {                                          \
    __m128 x[4];                                                                    \
    __builtin_memcpy(x, a.part, sizeof x);                                          \
    __m128 best = op(op(x[0], x[1]), op(x[2], x[3]));                               \
    best = op(best, _mm_movehl_ps(best, best));                                     \
    return _mm_cvtss_f32(op(best, _mm_shuffle_ps(best, best, 1)));                  \
  }
LMTT_REDUCE(largest_of, _mm_max_ps)
LMTT_REDUCE(smallest_of, _mm_min_ps)
LMTT_REDUCE(short_sum_of, _mm_add_ps)  // as a tree, in float
#else
#define LMTT_REDUCE(name, op)                                                       \
  LMTT_INLINE float name(const Lanes& a) {                                          \
    float x[kLanes];                                                                \
    store(x, a);                                                                    \
    float best = x[0];                                                              \
    for (int l = 1; l < kLanes; ++l) best = x[l] op best ? x[l] : best;             \
    return best;                                                                    \
  }
LMTT_REDUCE(largest_of, >)
LMTT_REDUCE(smallest_of, <)
LMTT_INLINE float short_sum_of(const Lanes& a) {
  float x[kLanes];
  store(x, a);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) x[l] += x[l + half];
  }
  return x[0];
}
#endif
#undef LMTT_REDUCE

// Sums of many floats: at most kRun additions to a lane before the sixteen lanes are emptied into a double.
constexpr int kRun = 32;
struct Sum {
  Lanes lanes = splat(0.0f);
  double total = 0.0;
  LMTT_INLINE void add(const Lanes& x) { lanes = lanes + x; }
  LMTT_INLINE void empty() {
    total += sum_of(lanes);
    lanes = splat(0.0f);
  }
};

// exp(x), 2 units in the last place, for x <= 88; 0 below -87 (the result would be subnormal), NaN for NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; the Taylor series to r^7 leaves 5e-9.
LMTT_INLINE Lanes exponential(const Lanes& x) {
  const Lanes shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Lanes rounded = fma(x, splat(1.44269504f), shift);
  const Lanes n = rounded - shift;
  Lanes r = fma(n, splat(-0.693145751953125f), x);  // ln 2 to 15 bits: n times it is exact
  r = fma(n, splat(-1.42860682e-6f), r);            // and the rest of ln 2
  Lanes s = splat(1.0f / 5040);
  s = fma(s, r, splat(1.0f / 720));
  s = fma(s, r, splat(1.0f / 120));
  s = fma(s, r, splat(1.0f / 24));
  s = fma(s, r, splat(1.0f / 6));
  s = fma(s, r, splat(0.5f));
  s = fma(s, r, splat(1.0f));
  s = fma(s, r, splat(1.0f));
  Choice b = bits(s);
  const Choice m = bits(rounded);
  LMTT_EACH_PART b.part[p] += m.part[p] << 23;  // times 2^n; what the shift left above bit 8 falls off
  const Lanes low = splat(-87.0f);
  return where(x < low, splat(0.0f), where(x != x, x, from_bits(b)));
}

// tanh(x) to 3e-7 of itself: its series near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
LMTT_INLINE Lanes hyperbolic_tangent(const Lanes& x) {
  const Lanes a = smaller(absolute(x), splat(10.0f));
  const Lanes far = splat(1.0f) - splat(2.0f) / (exponential(a + a) + splat(1.0f));
  const Lanes q = x * x;
  Lanes s = splat(21844.0f / 6081075);
  s = fma(s, q, splat(-1382.0f / 155925));
  s = fma(s, q, splat(62.0f / 2835));
  s = fma(s, q, splat(-17.0f / 315));
  s = fma(s, q, splat(2.0f / 15));
  s = fma(s, q, splat(-1.0f / 3));
  s = fma(s, q, splat(1.0f));
  return where(a < splat(0.4f), s * x, flip_by_sign(far, x));
}

}  // namespace
