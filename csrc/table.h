// A tensor's row in the table that every launch reads: pats_kernels/plan.py, Column, writes it.
#pragma once
#include <cstdint>

namespace pats {

struct Row {
  void* param;
  const void* grad;
  void* sens;
  void* unc;            // null where uncertainty is "none"
  float* stats;         // mean(S), mean(U)
  float* step_count;    // null, or the steps taken so far, which the launch advances
  int64_t* nonfinite;   // null, or where to count the elements whose sensitivity is not finite
  int64_t numel;
  int64_t ndim;         // 0: contiguous in every operand; else how many rows of the layout table
  int64_t layout;       // the first of them
  int64_t vector;       // 1: contiguous, and every address a multiple of 16 bytes
  int64_t tensor_id;
  int64_t step;         // t, where there is no counter
  uint64_t seed;
  double noise_scale;
  double gamma;
  double sens_beta;
  double unc_beta;
};

// A dimension of a tensor that is not contiguous, outermost first: strides in elements.
struct Dimension {
  int64_t size, param, grad, sens, unc;
};

enum class Uncertainty { kProduct, kUcb, kNone };

// Delayed normalization is one phase. Exact normalization needs the means of what it has just written,
// hence two: averages, then noise.
enum class Phase { kOnePass, kAverages, kNoise };

}  // namespace pats
