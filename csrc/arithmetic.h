// The transcendental functions of the update. In double they are the library's. In float they are only as
// exact as the noise needs (abs(z - z_exact) <= 2e-3), because each instruction here runs for every element
// of the model.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace pats {

template <class To, class From>
PATS_INLINE To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

PATS_INLINE uint32_t bits_of(float x) { return reinterpret<uint32_t>(x); }
PATS_INLINE uint64_t bits_of(double x) { return reinterpret<uint64_t>(x); }
PATS_INLINE float float_of(uint32_t bits) { return reinterpret<float>(bits); }

// The kernel is compiled as if no value were infinite or NaN and no zero had a sign, so that minima and maxima are
// one instruction each. So tests for finite values and for signs look at a value's bits.
constexpr uint32_t kInfinity = 0x7F800000u, kSign = 0x80000000u;
constexpr uint64_t kInfinity64 = 0x7FF0000000000000u, kSign64 = 0x8000000000000000u;

PATS_INLINE bool is_finite(double x) { return (bits_of(x) & ~kSign64) < kInfinity64; }
PATS_INLINE bool is_nan(float x) { return (bits_of(x) & ~kSign) > kInfinity; }
PATS_INLINE bool is_negative(float x) { return bits_of(x) >= kSign; }
PATS_INLINE bool is_negative(double x) { return bits_of(x) >= kSign64; }
PATS_INLINE double magnitude(double x) { return reinterpret<double>(bits_of(x) & ~kSign64); }
PATS_INLINE float negative(float x) { return float_of(bits_of(x) | kSign); }
PATS_INLINE double negative(double x) { return reinterpret<double>(bits_of(x) | kSign64); }

// pats_kernels/counters.py: how a float counts steps past 2^24.
PATS_INLINE uint32_t steps_of(float counter) {
  const uint32_t exact = 1u << 24, bits = bits_of(counter), exact_bits = 0x4B800000u;
  return bits > exact_bits ? exact + (bits - exact_bits) : static_cast<uint32_t>(counter);
}
PATS_INLINE float advanced(float counter) {
  return counter < 0x1p24f ? counter + 1.0f : float_of(bits_of(counter) + 1);
}

template <class T>
PATS_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
PATS_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}

// a b + c, rounded once. Only this function fuses a multiplication and an addition, never the compiler
// (-ffp-contract=off, -fmad=false). So all paths and all instruction sets that have the instruction give the same
// bits. Without the instruction (x86-64's baseline) there are two roundings.
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(PATS_ROOT_FLUSHES)
PATS_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PATS_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
PATS_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
PATS_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif

PATS_INLINE double square_root(double x) { return sqrt(x); }
PATS_INLINE double ratio(double a, double b) { return a / b; }
PATS_INLINE double inverse(double x) { return 1.0 / x; }

#if defined(__CUDA_ARCH__)
// A GPU's approximations, one instruction each; they may take subnormal numbers for 0.
constexpr bool kRootFlushes = true, kGateScales = false;
#define PATS_PTX(name, instruction)                 \
  PATS_INLINE float name(float x) {                 \
    float y;                                        \
    asm(instruction " %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                       \
  }
PATS_PTX(square_root, "sqrt.approx.ftz.f32")
PATS_PTX(reciprocal, "rcp.approx.ftz.f32")
PATS_PTX(log2_of, "lg2.approx.ftz.f32")
PATS_PTX(cosine_of, "cos.approx.ftz.f32")
PATS_PTX(sine_of, "sin.approx.ftz.f32")
PATS_PTX(tanh_of, "tanh.approx.f32")

PATS_INLINE bool is_finite(float x) { return fabsf(x) <= 0x1.fffffep127f; }
PATS_INLINE float magnitude(float x) { return fabsf(x); }
PATS_INLINE float larger(float a, float b) { return fmaxf(a, b); }
PATS_INLINE float smaller(float a, float b) { return fminf(a, b); }
PATS_INLINE float ratio(float a, float b) { return a * reciprocal(b); }
PATS_INLINE float inverse(float x) { return reciprocal(x); }
#else
PATS_INLINE bool is_finite(float x) { return (bits_of(x) & ~kSign) < kInfinity; }
PATS_INLINE float magnitude(float x) { return float_of(bits_of(x) & ~kSign); }
PATS_INLINE float ratio(float a, float b) { return a / b; }
PATS_INLINE float inverse(float x) { return 1.0f / x; }
constexpr bool kGateScales = true;
#if defined(PATS_ROOT_FLUSHES)  // tests/cuda_emulation
constexpr bool kRootFlushes = true;
PATS_INLINE float square_root(float x) { return x < 0x1p-126f ? 0.0f : sqrtf(x); }
#else
constexpr bool kRootFlushes = false;
PATS_INLINE float square_root(float x) { return sqrtf(x); }
#endif
#endif

// U(x) = (x + 1/2) 2^-32. AVX2 converts signed numbers only, so for the upper half the distance from 1 is
// converted.
template <class T>
PATS_INLINE T unit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return multiply_add(static_cast<T>(x), T(0x1p-32), T(0x1p-33));
#else
  const int32_t distance = static_cast<int32_t>(x);
  return multiply_add(static_cast<T>(distance), T(0x1p-32), distance < 0 ? T(1 + 0x1p-33) : T(0x1p-33));
#endif
}

// The angle: U(x), minus one if x is in the upper half, times a full turn.
template <class T>
PATS_INLINE T turn(uint32_t x, T full) {
  return multiply_add(static_cast<T>(static_cast<int32_t>(x)), full * T(0x1p-32), full * T(0x1p-33));
}

// -2 ln(u) for u in (0, 1].
PATS_INLINE double minus_two_log(double u) { return -2.0 * log(u); }

PATS_INLINE float minus_two_log(float u) {
#if defined(__CUDA_ARCH__)
  // Within its documented error the logarithm may be above 0 for u near 1.
  return 1.38629436f * magnitude(log2_of(u));
#else
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f P(f), minimax, with a relative error of 7e-6,
  // so that the radius stays precise for u near 1.
  const uint32_t exponent = (bits_of(u) - 0x3F3504F3u) & 0xFF800000u;
  const float e = static_cast<float>(static_cast<int32_t>(exponent));  // times 2^23
  const float f = float_of(bits_of(u) - exponent) - 1.0f;
  float p = 0.285841542f;
  p = multiply_add(p, f, -0.441118752f);
  p = multiply_add(p, f, 0.508065378f);
  p = multiply_add(p, f, -0.665160468f);
  p = multiply_add(p, f, 0.999804352f);
  p = multiply_add(p, f, -2.00000912f);
  return multiply_add(p, f, -1.38629436f * 0x1p-23f * e);
#endif
}

// scale * (cos, sin) of an angle of at most half a turn; a full turn is kTurn.
template <class T>
struct Circle {
  static constexpr T kTurn = T(6.283185307179586476925);
  T scale;
  PATS_INLINE explicit Circle(T scale) : scale(scale) {}
  PATS_INLINE void operator()(T angle, T& cosine, T& sine) const {
    cosine = scale * cos(angle);
    sine = scale * sin(angle);
  }
};

template <>
struct Circle<float> {
#if defined(__CUDA_ARCH__)
  static constexpr float kTurn = 6.2831853f;
  float scale;
  PATS_INLINE explicit Circle(float scale) : scale(scale) {}
  PATS_INLINE void operator()(float angle, float& cosine, float& sine) const {
    cosine = scale * cosine_of(angle);
    sine = scale * sine_of(angle);
  }
#else  // minimax polynomials, absolute errors 8e-7 and 6e-6, with the scale in the coefficients
  static constexpr float kTurn = 1.0f;
  float c0, c1, c2, c3, c4, c5, s0, s1, s2, s3, s4;
  PATS_INLINE explicit Circle(float scale)
      : c0(0.999999222f * scale), c1(-19.7389825f * scale), c2(64.9287266f * scale),
        c3(-85.2723972f * scale), c4(58.7940396f * scale), c5(-21.0767837f * scale),
        s0(6.2830558f * scale), s1(-41.3312143f * scale), s2(81.3668154f * scale),
        s3(-74.478005f * scale), s4(32.7814015f * scale) {}
  PATS_INLINE void operator()(float y, float& cosine, float& sine) const {
    const float y2 = y * y;
    cosine = multiply_add(multiply_add(c5, y2, c4), y2, c3);
    cosine = multiply_add(multiply_add(cosine, y2, c2), y2, c1);
    cosine = multiply_add(cosine, y2, c0);
    sine = multiply_add(multiply_add(s4, y2, s3), y2, s2);
    sine = y * multiply_add(multiply_add(sine, y2, s1), y2, s0);
  }
#endif
};

// tanh(k / q - gamma) for q >= 0, and 1 if q is 0. Where that is not above 0, the result is any number not above 0.
// The sign of k - gamma q decides, which is the argument times q.
PATS_INLINE double open_gate(double k, double gamma, double q) {
  const double n = multiply_add(-gamma, q, k);
  return n > 0 ? tanh(n / q) : 0.0;
}

PATS_INLINE float open_gate(float k, float gamma, float q) {
#if defined(__CUDA_ARCH__)
  return tanh_of(multiply_add(k, reciprocal(q), -gamma));
#else
  // tanh(x) = x N(x^2) / D(x^2), absolute error 6e-5: below 1 up to the bound on x, and 1 at the bound with fused
  // multiply-adds. The bound on q makes 0 / 0 a 0. Two divisions are faster than code that avoids one of them.
  const float n = larger(multiply_add(-gamma, q, k), 0.0f);
  const float x = smaller(n / larger(q, 0x1p-100f), 5.2406311f), x2 = x * x;
  const float above = multiply_add(multiply_add(0.000632542592f, x2, 0.100938031f), x2, 0.999758623f);
  const float below = multiply_add(multiply_add(0.0124085007f, x2, 0.433590743f), x2, 1.0f);
  return x * above / below;
#endif
}

// Converts between IEEE half and float, to nearest even.
PATS_INLINE float float_of_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  const uint32_t special = magnitude >= 0x7C00u ? 112u << 23 : 0u;  // infinity and NaN keep their exponent
  const uint32_t normal = (magnitude << 13) + (112u << 23) + special;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400u ? subnormal : normal));
#endif
}

PATS_INLINE uint16_t half_of_float(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Adding 1/2 makes 2^-24, the spacing of subnormal halves, the last bit, so the sum is rounded to it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t infinite = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? infinite : finite));
#endif
}

// To bfloat16: adds 16 random bits, or what rounds to nearest with ties to even, then cuts off the lower half.
// The sum could overflow for a NaN with bits in its lower half.
template <bool kStochastic, bool kAnyNan>
PATS_INLINE float rounded(float x, uint32_t random) {
  const uint32_t bits = bits_of(x), sum = bits + (kStochastic ? random : 0x7FFFu + (bits >> 16 & 1u));
  return float_of((kAnyNan && is_nan(x) ? bits | 0x00400000u : sum) & 0xFFFF0000u);
}

}  // namespace pats
