// The steps of PATS and AdamW for one element: the formula, shared by the CPU and CUDA.
// pats_kernels/reference.py is its specification and names the sources.
#pragma once
#include "arithmetic.h"
#include "table.h"

namespace pats {

// What is the same for all elements of a tensor. T is the arithmetic's type: float, or double for float64.
template <class T>
struct Constants {
  T grad_scale;            // 1 / the GradScaler's scale, negative to maximize
  T sens_beta, unc_beta;   // b_s, b_u
  T sens_rate, unc_rate;   // 1 - b_s, 1 - b_u
  T sens_factor, unc_factor;  // give q' = k q from S and U: the product of k and the reciprocal means
  T gamma, k;              // 1/q - gamma = (k - gamma q') / q'; k = max(gamma, 1) keeps q' near 1 where
                           // that matters, and k = 0 closes all gates while there are no statistics
  T noise_scale;
};

// As LEAST_MEAN and MOST_MEAN in reference.py: the range of means that float32 can resolve.
template <class T>
PATS_INLINE bool is_statistic(T mean) {
  return mean >= T(0x1p-120) && mean <= T(0x1p112);
}

// `stats` are mean(S) and mean(U) of the state that the normalization uses.
template <class T, class Number>
PATS_INLINE Constants<T> constants(Uncertainty uncertainty, const RowOf<Number>& row, const float* stats,
                                   T grad_scale) {
  const bool is_product = uncertainty == Uncertainty::kProduct;
  const T mean_s = stats[0], mean_u = stats[1];
  const T importance = uncertainty == Uncertainty::kUcb ? mean_s + mean_u : mean_s;
  const bool known = is_statistic(importance) && (!is_product || is_statistic(mean_u));
  // A huge gamma is limited, so that k / mean still fits a float.
  const T gamma = static_cast<T>(row.gamma), most = T(0x1p126) * smaller(importance, T(1));
  const T k = !known ? T(0) : kGateScales ? smaller(larger(gamma, T(1)), most) : T(1);
  const T noise_scale = static_cast<T>(row.noise_scale_tensor ? *row.noise_scale_tensor : +row.noise_scale);
  return {grad_scale,
          static_cast<T>(row.sens_beta),
          static_cast<T>(row.unc_beta),
          static_cast<T>(row.sens_rate),
          static_cast<T>(row.unc_rate),
          known ? k * inverse(importance) : T(0),
          known && is_product ? inverse(mean_u) : T(1),
          gamma,
          k,
          noise_scale};
}

// Rows 1 to 3 of the table, in the form in which b = 0 gives S = s to the last bit. `g` is unscaled. If the
// sensitivity is not finite, both averages stay unchanged.
template <class T>
PATS_INLINE bool update_averages(Uncertainty uncertainty, const Constants<T>& c, T w, T g, T& S, T& U) {
  const T s = magnitude(w * g);
  const bool finite = is_finite(s);
  const T S_new = multiply_add(c.sens_rate, s, c.sens_beta * S);
  if (uncertainty != Uncertainty::kNone) {
    const T U_new = multiply_add(c.unc_beta, U, c.unc_rate * magnitude(s - S_new));
    U = finite ? U_new : U;
  }
  S = finite ? S_new : S;
  return finite;
}

// Row 4, times k.
template <class T>
PATS_INLINE T importance(Uncertainty uncertainty, const Constants<T>& c, T S, T U) {
  T q = S * c.sens_factor;
  if (uncertainty == Uncertainty::kProduct) q *= U * c.unc_factor;
  if (uncertainty == Uncertainty::kUcb) q = (S + U) * c.sens_factor;
  return q;
}

// torch.optim.AdamW's constants, for moments without their bias corrections:
// lr m^ / (sqrt(v^) + eps) = step_size m / (sqrt(v) + eps).
template <class T>
struct AdamW {
  T rate1, beta2, rate2;         // 1 - b_1, b_2, 1 - b_2
  T decay;                       // 1 - lr weight_decay
  T step_size, eps;              // lr sqrt(1 - b_2^t) / (1 - b_1^t), eps sqrt(1 - b_2^t)
  T root_factor, m_factor;       // sqrt(v^) = root_factor sqrt(v), v^ - m^^2 = root_factor^2 (v - (m_factor m)^2)
  T v_scale, least_v;            // all of these are for v_scale v; v^ below 2^-110 counts as 0 in sensitivities
};

// Computed in the type of the row's numbers. If they are floats, each is exact to a few roundings, and so are the
// results, expm1 included.
template <class T, class Number>
PATS_INLINE AdamW<T> adamw_constants(const RowOf<Number>& row, uint32_t step) {
  using N = decltype(+row.lr);
  const N lr = row.lr_tensor ? *row.lr_tensor : +row.lr, t = static_cast<N>(step);
  const N correction1 = -expm1(t * row.log_beta1), correction2 = -expm1(t * row.log_beta2);
  const N root2 = sqrt(correction2);
  const N above_one = N(1) + (sizeof(T) == sizeof(double) ? N(0x1p-49) : N(0x1p-20));
  // A GPU's root takes a subnormal v for 0. With a tiny eps, m would then be divided by almost 0, so v is scaled.
  const N root_scale = kRootFlushes && sizeof(T) == sizeof(float) && row.eps < N(0x1p-40) ? N(0x1p12) : N(1);
  return {static_cast<T>(row.rate1),
          static_cast<T>(row.beta2),
          static_cast<T>(row.rate2),
          static_cast<T>(row.lr_tensor ? N(1) - lr * row.weight_decay : +row.decay),
          static_cast<T>(lr * root2 / correction1 * root_scale),
          static_cast<T>(row.eps * root2 * root_scale),
          static_cast<T>(N(1) / (root2 * root_scale)),
          static_cast<T>(above_one * root2 / correction1 * root_scale),
          static_cast<T>(root_scale * root_scale),
          static_cast<T>(N(0x1p-110) * correction2)};
}

template <class T>
PATS_INLINE T scaled(const AdamW<T>& c, T v) {
  return kRootFlushes ? c.v_scale * v : v;
}

// Row 7.
template <class T>
PATS_INLINE void update_moments(const AdamW<T>& c, T g, T& m, T& v) {
  m = multiply_add(c.rate1, g - m, m);
  v = multiply_add(c.beta2, v, c.rate2 * (g * g));
}

// Rows 1 to 3 with sensitivity="moments". v^ - m^^2 is 0 in the first step, but its computed value is rounding error.
// m_factor is too large by more than that error, which makes the value negative, so rounding does not decide which
// elements get noise.
template <class T>
PATS_INLINE bool moments_sensitivity(Uncertainty uncertainty, const AdamW<T>& c, T w, T m, T v, T& S, T& U) {
  const T scale = magnitude(w) * c.root_factor, scaled_m = c.m_factor * m;
  const T s = scale * square_root(scaled(c, v));
  const bool finite = is_finite(s), counts = finite && v >= c.least_v;
  S = counts ? s : T(0);
  U = 0;
  if (uncertainty != Uncertainty::kNone) {
    const T variance = multiply_add(-scaled_m, scaled_m, scaled(c, v));
    const T u = scale * square_root(larger(variance, T(0)));
    U = counts ? u : T(0);
  }
  return finite;
}

// Row 8.
template <class T>
PATS_INLINE T adamw(const AdamW<T>& c, T w, T m, T v) {
  return multiply_add(c.decay, w, -ratio(c.step_size * m, square_root(scaled(c, v)) + c.eps));
}

}  // namespace pats
