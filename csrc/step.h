// What a step does to one element, shared by the CPU's loop and CUDA's threads. update.h has the formula; this file
// says which of its rows a phase of a form computes, and in which order.
#pragma once
#include "update.h"

namespace pats {

// The first phase of exact normalization does not know the means yet, so it writes only averages. The second adds
// the noise and takes AdamW's step. These are values, not templates; they are constants if the form is one.
struct Does {
  bool reads_averages, averages, from_moments, moments, noise, adamw, sums;
};

PATS_INLINE constexpr Does does(Form form, Phase phase) {
  const bool first = phase == Phase::kAverages, second = phase == Phase::kNoise;
  const bool kept = form == Form::kPats || form == Form::kPatsAdamW;
  const bool from_moments = form == Form::kMomentsAdamW;
  return {kept,
          kept && !second,
          from_moments,
          from_moments || (form != Form::kPats && !first),
          form != Form::kAdamW && !first,
          form != Form::kPats && !first,
          form != Form::kAdamW && !second};
}

// Rows 5 and 6; `noise` is noise_scale z. A closed gate selects w, because infinite noise times 0 would be NaN. The
// faster of the two forms was measured (docs/performance.md).
template <class T>
PATS_INLINE void give_noise(const Constants<T>& c, bool finite, T q, T noise, T& w) {
#if defined(__AVX512F__)
  const T a = finite ? open_gate(c.k, c.gamma, q) : T(0), sum = multiply_add(a, noise, w);
  w = a > 0 ? sum : w;
#else
  const T a = open_gate(c.k, c.gamma, q), sum = multiply_add(a, noise, w);
  w = finite && a > 0 ? sum : w;
#endif
}

// Operands that the form does not have are not read. `stored` rounds S and U to their storage type, with
// `random`; `noise` is noise_scale z. Returns whether the sensitivity is finite. Between the two phases of exact
// normalization, a negative S marks the elements where it was not: they get no noise, and the second phase need
// not read the gradient again. (The numbers are separate arguments, because GCC would not vectorize the loop
// with a struct of them.)
template <class T, class Stored>
PATS_INLINE bool step(const Does does, Uncertainty uncertainty, const Constants<T>& c, const AdamW<T>& adam,
                      const Stored& stored, uint32_t random, T noise, T g, T& w, T& S, T& U, T& m, T& v) {
  bool finite = true;
  g *= c.grad_scale;
  if (does.moments) update_moments(adam, g, m, v);
  if (does.averages) {
    finite = update_averages(uncertainty, c, w, g, S, U);
    S = stored(S, random), U = stored(U, random);
  } else if (does.reads_averages) {
    finite = !is_negative(S);
    S = magnitude(S);
  } else if (does.from_moments) {
    finite = moments_sensitivity(uncertainty, adam, w, m, v, S, U);
  }
  if (does.noise) give_noise(c, finite, importance(uncertainty, c, S, U), noise, w);
  if (does.adamw) w = adamw(adam, w, m, v);
  return finite;
}

}  // namespace pats
