// A tensor's row in the table that every launch reads. pats_kernels/plan.py writes it; Column has the same order.
#pragma once
#include <cstdint>

namespace pats {

// A float that occupies the space of a double.
struct alignas(8) Narrowed {
  float value;
  constexpr operator float() const { return value; }
};

// `Number` is double, or `Narrowed` on a GPU, where one float64 instruction may take as long as 64 others.
template <class Number>
struct RowOf {
  void* param;
  const void* grad;
  void* sens;           // this and the following addresses are null if a tensor has no such operand
  void* unc;
  void* exp_avg;
  void* exp_avg_sq;
  float* stats;         // the means that the normalization reads; null: no noise, AdamW's step alone
  float* share;         // where this tensor's part of the new means is written: stats, except for a shard
  float* step_count;    // the steps taken so far, which the launch advances
  int64_t* nonfinite;   // where to count the elements whose sensitivity is not finite
  const float* lr_tensor;           // lr on the device, or null
  const float* noise_scale_tensor;  // noise_scale on the device, or null
  int64_t numel;
  int64_t whole;        // elements of the unsharded tensor, the sums' divisor; 0: a share that does not count
  int64_t offset;       // the first element's row-major number in the unsharded tensor
  int64_t ndim;         // layout rows; 0: contiguous in every operand, numbered in order from a multiple of 4
  int64_t layout;       // the first layout row
  int64_t vector;       // 1: ndim is 0, and every address is a multiple of 16 bytes
  int64_t tensor_id;
  int64_t step;         // t, where there is no counter
  uint64_t seed;
  Number noise_scale;   // used if noise_scale_tensor is null
  Number gamma;
  Number sens_beta;     // b_s, and 1 - b_s as a rate
  Number sens_rate;
  Number unc_beta;
  Number unc_rate;
  Number lr;            // used if lr_tensor is null
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

// A dimension of a tensor that is not contiguous; the outermost comes first. Strides are in elements; `number` is the
// stride in the unsharded tensor's row-major numbering.
struct Dimension {
  int64_t size, param, grad, sens, unc, exp_avg, exp_avg_sq, number;
};

enum class Storage { kFloat32, kBfloat16, kFloat16, kFloat64 };

enum class Uncertainty { kProduct, kUcb, kNone };

// PATS alone; PATS, then AdamW; the same with the sensitivity from AdamW's moments; AdamW alone, which is the form
// of a tensor without noise.
enum class Form { kPats, kPatsAdamW, kMomentsAdamW, kAdamW };

// Delayed normalization has one phase. Exact normalization needs the means of the averages that it has just written, so
// it has two: averages, then noise. All phases but noise end with the statistics and advance the step count.
enum class Phase { kOnePass, kAverages, kNoise };

}  // namespace pats
