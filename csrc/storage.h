// The storage types of tensors, and their conversion to and from the type of the arithmetic.
#pragma once
#include "arithmetic.h"

namespace pats {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

PATS_INLINE float widen(float x) { return x; }
PATS_INLINE double widen(double x) { return x; }
PATS_INLINE float widen(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
PATS_INLINE float widen(Float16 x) { return float_of_half(x.bits); }

// A float that is stored as bfloat16 has been rounded already: its low half is zero.
PATS_INLINE void narrow(double x, float& to) { to = static_cast<float>(x); }
PATS_INLINE void narrow(double x, double& to) { to = x; }
PATS_INLINE void narrow(float x, float& to) { to = x; }
PATS_INLINE void narrow(float x, Bfloat16& to) { to.bits = static_cast<uint16_t>(bits_of(x) >> 16); }
PATS_INLINE void narrow(float x, Float16& to) { to.bits = half_of_float(x); }

}  // namespace pats
