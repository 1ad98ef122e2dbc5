// Philox4x32-7 (Salmon et al., SC'11): the random words of one group of four elements.
#pragma once
#include <cstdint>

#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define PATS_INLINE __host__ __device__ __forceinline__
#define PATS_UNROLL _Pragma("unroll")
#else
#define PATS_INLINE inline __attribute__((always_inline))
#define PATS_UNROLL _Pragma("GCC unroll 8")
#endif

namespace pats {

constexpr int kRounds = 7;                      // the fewest that pass BigCrush
constexpr uint32_t kRoundingBit = 0x80000000u;  // in the counter's second word: the words that round

template <class Lane>
struct WordsOf {
  Lane x0, x1, x2, x3;
};

using Words = WordsOf<uint32_t>;

// What a state word is kept in where the compiler vectorizes (elements that are not numbered one after another).
// With AVX-512 64-bit lanes whose high halves are ignored: a round is then two multiplies, two shifts and two
// three-way xors, with no shuffles. Elsewhere there is no such multiply.
#if defined(__AVX512DQ__)
using Lane = uint64_t;
#else
using Lane = uint32_t;
#endif

PATS_INLINE uint64_t product(Lane lane, uint32_t b) {
  const uint32_t a = static_cast<uint32_t>(lane);
#if defined(__CUDA_ARCH__)
  uint64_t p;  // one instruction; of a product of 64-bit numbers nvcc adds up the halves that are zero too
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return uint64_t{a} * b;
#endif
}

#if defined(__AVX2__) && !defined(__CUDACC__)
// A vector of groups. vpmuludq multiplies the low halves of 64-bit lanes, but no compiler finds it: it takes
// 32-bit lanes apart and together again in every round. So every second group has a vector of 64-bit lanes,
// whose high halves are anything, and they come together at the end.
#if defined(__AVX512F__)
using Halves = uint64_t __attribute__((vector_size(64)));
PATS_INLINE Halves product(Halves a, uint32_t b) {
  // Without a mask GCC 12 warns of what its own header leaves open.
  return reinterpret_cast<Halves>(_mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#else
using Halves = uint64_t __attribute__((vector_size(32)));
PATS_INLINE Halves product(Halves a, uint32_t b) {
  return reinterpret_cast<Halves>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#endif
constexpr int kGroupsAtOnce = sizeof(Halves) / sizeof(uint32_t);
#endif

// The rounds, of one group or of a vector of them. The words that are the same in all lanes of a loop (c1, c2
// and c3 at first) cost their rounds only once: the compiler hoists them.
template <class L>
PATS_INLINE void philox_rounds(L& c0, L& c1, L& c2, L& c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PATS_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const auto p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
    c0 = static_cast<L>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<L>(p1);
    c2 = static_cast<L>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<L>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

PATS_INLINE Words philox4x32(Lane group_low, Lane group_high, Lane tensor_id, Lane step, uint64_t seed) {
  Lane c0 = group_low, c1 = group_high, c2 = tensor_id, c3 = step;
  philox_rounds(c0, c1, c2, c3, seed);
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
          static_cast<uint32_t>(c3)};
}

#if defined(__AVX2__) && !defined(__CUDACC__)
PATS_INLINE Halves together(Halves even, Halves odd) { return (even & 0xFFFFFFFFu) | odd << 32; }

// Of the groups group_low to group_low + kGroupsAtOnce - 1, none of which carries into group_high.
PATS_INLINE WordsOf<Halves> philox4x32_at_once(uint32_t group_low, uint32_t group_high, uint32_t tensor_id,
                                               uint32_t step, uint64_t seed) {
  Halves even[4] = {Halves{} + group_low, Halves{} + group_high, Halves{} + tensor_id, Halves{} + step};
  PATS_UNROLL
  for (int i = 0; i < kGroupsAtOnce / 2; ++i) even[0][i] += 2 * i;
  Halves odd[4] = {even[0] + 1, even[1], even[2], even[3]};
  philox_rounds(even[0], even[1], even[2], even[3], seed);
  philox_rounds(odd[0], odd[1], odd[2], odd[3], seed);
  return {together(even[0], odd[0]), together(even[1], odd[1]), together(even[2], odd[2]),
          together(even[3], odd[3])};
}
#endif

}  // namespace pats
