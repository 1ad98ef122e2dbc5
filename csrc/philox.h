// Philox4x32-7 (Salmon et al., SC'11): the random words of one group of four elements.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PATS_INLINE __host__ __device__ __forceinline__
#define PATS_UNROLL _Pragma("unroll")
#else
#define PATS_INLINE inline __attribute__((always_inline))
#define PATS_UNROLL _Pragma("GCC unroll 8")
#endif

namespace pats {

constexpr int kRounds = 7;                      // the fewest that pass BigCrush
constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u, kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;
constexpr uint32_t kRoundingBit = 0x80000000u;  // in the counter's second word, it selects the words for rounding

template <class Lane>
struct WordsOf {
  Lane x0, x1, x2, x3;
};

using Words = WordsOf<uint32_t>;

// The type of a state word where the compiler vectorizes (for elements that are not numbered one after another).
// With AVX-512 it is a 64-bit lane whose high half is ignored: a round is then two multiplies, two shifts and two
// three-way xors, without shuffles. Other instruction sets have no such multiply.
#if defined(__AVX512DQ__)
using Lane = uint64_t;
#else
using Lane = uint32_t;
#endif

PATS_INLINE uint64_t product(Lane lane, uint32_t b) {
  const uint32_t a = static_cast<uint32_t>(lane);
#if defined(__CUDA_ARCH__)
  uint64_t p;  // one instruction; for a product of 64-bit numbers nvcc also adds up the halves that are zero
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return uint64_t{a} * b;
#endif
}

PATS_INLINE Words philox4x32(Lane group_low, Lane group_high, Lane tensor_id, Lane step, uint64_t seed) {
  Lane c0 = group_low, c1 = group_high, c2 = tensor_id, c3 = step;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  PATS_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = product(c0, kFactor0), p1 = product(c2, kFactor1);
    c0 = static_cast<Lane>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<Lane>(p1);
    c2 = static_cast<Lane>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<Lane>(p0);
    k0 += kKeyStep0;
    k1 += kKeyStep1;
  }
  return {static_cast<uint32_t>(c0), static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
          static_cast<uint32_t>(c3)};
}

}  // namespace pats
