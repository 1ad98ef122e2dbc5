// A tensor's row in the table that every launch reads: pats_kernels/plan.py, Column, writes it.
#pragma once
#include <cstdint>

namespace pats {

// A float in the place of a double.
struct alignas(8) Narrowed {
  float value;
  constexpr operator float() const { return value; }
};

// `Number` is double, or on a GPU `Narrowed`: an instruction in float64 may take as long there as 64 others.
template <class Number>
struct RowOf {
  void* param;
  const void* grad;
  void* sens;           // these and those that follow are null where a tensor has none
  void* unc;
  void* exp_avg;
  void* exp_avg_sq;
  float* stats;         // the means that the normalization reads; null: no noise, AdamW's step alone
  float* share;         // where this tensor's part in the new means is written: stats, but for a shard
  float* step_count;    // the steps taken so far, which the launch advances
  int64_t* nonfinite;   // where to count the elements whose sensitivity is not finite
  const float* lr_tensor;           // null, or where it lies on the device
  const float* noise_scale_tensor;  // the same
  int64_t numel;
  int64_t whole;        // elements of the unsharded tensor, the sums' divisor; 0: a share that is not counted
  int64_t offset;       // the first element's row-major number in the unsharded tensor
  int64_t ndim;         // 0: contiguous in every operand, numbered so, from a multiple of 4; else its layout rows
  int64_t layout;       // the first of them
  int64_t vector;       // 1: ndim is 0, and every address a multiple of 16 bytes
  int64_t tensor_id;
  int64_t step;         // t, where there is no counter
  uint64_t seed;
  Number noise_scale;   // where there is no noise_scale_tensor
  Number gamma;
  Number sens_beta;     // b_s, and 1 - b_s as a rate
  Number sens_rate;
  Number unc_beta;
  Number unc_rate;
  Number lr;            // where there is no lr_tensor
  Number weight_decay;
  Number decay;         // 1 - lr weight_decay
  Number eps;
  Number rate1;         // 1 - b_1
  Number beta2;
  Number rate2;
  Number log_beta1;
  Number log_beta2;
  Number grad_sign;     // -1: maximize
};

using Row = RowOf<double>;

// A dimension of a tensor that is not contiguous, outermost first: strides in elements, the last one in the
// unsharded tensor's row-major numbering.
struct Dimension {
  int64_t size, param, grad, sens, unc, exp_avg, exp_avg_sq, number;
};

enum class Storage { kFloat32, kBfloat16, kFloat16, kFloat64 };

enum class Uncertainty { kProduct, kUcb, kNone };

// PATS alone; followed by AdamW; the same with the sensitivity out of AdamW's moments; AdamW alone, which is
// what becomes of a tensor without noise.
enum class Form { kPats, kPatsAdamW, kMomentsAdamW, kAdamW };

// Delayed normalization is one phase. Exact normalization needs the means of what it has just written, hence
// two: averages, then noise. All but the second end with the statistics, and advance the step count.
enum class Phase { kOnePass, kAverages, kNoise };

}  // namespace pats
