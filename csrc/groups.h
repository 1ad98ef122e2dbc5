// The random words of many groups at once, for the CPU: the words of philox.h, computed in vectors.
#pragma once
#include <cstring>

#include "philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pats {

#if defined(__AVX2__)
// vpmuludq multiplies the low halves of 64-bit lanes, but no compiler uses it well: they split and join 32-bit lanes
// in every round. So the even and the odd groups have separate vectors of 64-bit lanes, whose high halves are
// ignored. The last round joins them.
#if defined(__AVX512F__)
using Halves = uint64_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));

// With masks of ones, because without a mask GCC 12 warns of an uninitialized value in its own header.
PATS_INLINE Halves product(Halves a, uint32_t b) {
  return reinterpret_cast<Halves>(_mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
PATS_INLINE Halves low_halves(Halves even, Halves odd) {
  return reinterpret_cast<Halves>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(even), 0xAAAA,
                                                            reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
}
PATS_INLINE Halves high_halves(Halves even, Halves odd) {
  return reinterpret_cast<Halves>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(odd), 0x5555,
                                                            reinterpret_cast<__m512i>(even), _MM_PERM_DDBB));
}
#define PATS_UNPACK(half, kind, a, b) _mm512_maskz_unpack##half##_##kind(-1, a, b)
#else
using Halves = uint64_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(32)));

PATS_INLINE Halves product(Halves a, uint32_t b) {
  return reinterpret_cast<Halves>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
PATS_INLINE Halves low_halves(Halves even, Halves odd) {
  return reinterpret_cast<Halves>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd << 32), 0xAA));
}
PATS_INLINE Halves high_halves(Halves even, Halves odd) {
  return reinterpret_cast<Halves>(
      _mm256_blend_epi32(reinterpret_cast<__m256i>(even >> 32), reinterpret_cast<__m256i>(odd), 0xAA));
}
#define PATS_UNPACK(half, kind, a, b) _mm256_unpack##half##_##kind(a, b)
#endif

constexpr int kLanes = sizeof(Halves) / sizeof(uint32_t), kVectors = sizeof(Halves) == 64 ? 4 : 2;

PATS_INLINE Halves everywhere(uint32_t x) { return Halves{} + (uint64_t{x} << 32 | x); }

// The order of groups in a vector's 32-bit lanes: group `place(i)` is in lane i. Consecutive groups are in the same
// lane of the 128-bit parts. Shuffles within these parts are cheap, and `in_order` needs no others.
PATS_INLINE constexpr int place(int i) { return i % 4 * (kLanes / 4) + i / 4; }

class Groups {
  Halves k0[kRounds], k1[kRounds];
  Halves first;                                // the groups of even lanes, from 0 on
  Halves c2_of_1, c0_of_2, c2_of_2, c2_of_3;  // the parts of the rounds' results that are the same for all groups

 public:
  // For groups whose high word is `high`.
  PATS_INLINE Groups(uint32_t high, uint32_t tensor_id, uint32_t step, uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, key0 += kKeyStep0, key1 += kKeyStep1) {
      k0[round] = everywhere(key0);
      k1[round] = everywhere(key1);
    }
    for (int i = 0; i < kLanes / 2; ++i) first[i] = place(2 * i);
    // The first three rounds of the counter's words that are the same for all groups; no compiler hoists all of it.
    const Halves p1 = product(everywhere(tensor_id), kFactor1);
    const Halves p0 = product((p1 >> 32) ^ everywhere(high) ^ k0[0], kFactor0);
    c2_of_1 = everywhere(step) ^ k1[0];
    c0_of_2 = p1 ^ k0[1];
    c2_of_2 = (p0 >> 32) ^ k1[1];
    c2_of_3 = p0 ^ k1[2];
  }

  // The words of the kVectors * kLanes groups from `low` on, if none of them carries into the high word.
  PATS_INLINE void operator()(uint32_t low, uint32_t (*x)[4][kLanes]) const {
    // Each step runs for all vectors, because a processor does not look far ahead for work while it waits.
    constexpr int kAll = 2 * kVectors;
#define PATS_EACH _Pragma("GCC unroll 8") for (int i = 0; i < kAll; ++i)
    Halves c0[kAll], c1[kAll], c2[kAll], c3[kAll], p0[kAll], p1[kAll];
    PATS_EACH p0[i] = product(first + (low + i / 2 * kLanes + i % 2 * place(1)), kFactor0);
    PATS_EACH p1[i] = product((p0[i] >> 32) ^ c2_of_1, kFactor1);
    PATS_EACH c0[i] = (p1[i] >> 32) ^ c0_of_2;
    PATS_EACH c1[i] = p1[i];
    PATS_EACH c2[i] = p0[i] ^ c2_of_2;
    PATS_UNROLL
    for (int round = 2; round < kRounds - 1; ++round) {
      PATS_EACH p0[i] = product(c0[i], kFactor0);
      PATS_EACH p1[i] = product(c2[i], kFactor1);
      PATS_EACH c0[i] = (p1[i] >> 32) ^ (c1[i] ^ k0[round]);
      PATS_EACH c1[i] = p1[i];
      PATS_EACH c2[i] = (p0[i] >> 32) ^ (round == 2 ? c2_of_3 : c3[i] ^ k1[round]);
      PATS_EACH c3[i] = p0[i];
    }
    PATS_EACH p0[i] = product(c0[i], kFactor0);
    PATS_EACH p1[i] = product(c2[i], kFactor1);
    PATS_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int e = 2 * v, o = e + 1;
      const Halves words[4] = {high_halves(p1[e], p1[o]) ^ (low_halves(c1[e], c1[o]) ^ k0[kRounds - 1]),
                               low_halves(p1[e], p1[o]),
                               high_halves(p0[e], p0[o]) ^ (low_halves(c3[e], c3[o]) ^ k1[kRounds - 1]),
                               low_halves(p0[e], p0[o])};
      PATS_UNROLL
      for (int i = 0; i < 4; ++i) memcpy(x[v][i], &words[i], sizeof words[i]);
    }
#undef PATS_EACH
  }
};

// Writes the results for a vector of groups in the order of their elements in memory.
template <class T>
PATS_INLINE void in_order(const T (&from)[4][kLanes], T* to) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Floats a, b, c, d;
    memcpy(&a, from[0], sizeof a);
    memcpy(&b, from[1], sizeof b);
    memcpy(&c, from[2], sizeof c);
    memcpy(&d, from[3], sizeof d);
    const auto ab_low = reinterpret_cast<Doubles>(PATS_UNPACK(lo, ps, a, b));
    const auto ab_high = reinterpret_cast<Doubles>(PATS_UNPACK(hi, ps, a, b));
    const auto cd_low = reinterpret_cast<Doubles>(PATS_UNPACK(lo, ps, c, d));
    const auto cd_high = reinterpret_cast<Doubles>(PATS_UNPACK(hi, ps, c, d));
    const Doubles rows[4] = {PATS_UNPACK(lo, pd, ab_low, cd_low), PATS_UNPACK(hi, pd, ab_low, cd_low),
                             PATS_UNPACK(lo, pd, ab_high, cd_high), PATS_UNPACK(hi, pd, ab_high, cd_high)};
    memcpy(to, rows, sizeof rows);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) to[4 * place(i) + j] = from[j][i];
    }
  }
}
#else
// As many lanes as a compiler vectorizes.
constexpr int kLanes = 16, kVectors = 1;

class Groups {
  uint64_t seed;
  uint32_t high, tensor_id, step;

 public:
  PATS_INLINE Groups(uint32_t high, uint32_t tensor_id, uint32_t step, uint64_t seed)
      : seed(seed), high(high), tensor_id(tensor_id), step(step) {}

  PATS_INLINE void operator()(uint32_t low, uint32_t (*x)[4][kLanes]) const {
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
      const Words words = philox4x32(low + i, high, tensor_id, step, seed);
      x[0][0][i] = words.x0;
      x[0][1][i] = words.x1;
      x[0][2][i] = words.x2;
      x[0][3][i] = words.x3;
    }
  }
};

template <class T>
PATS_INLINE void in_order(const T (&from)[4][kLanes], T* to) {
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    to[4 * i] = from[0][i];
    to[4 * i + 1] = from[1][i];
    to[4 * i + 2] = from[2][i];
    to[4 * i + 3] = from[3][i];
  }
}
#endif

}  // namespace pats
