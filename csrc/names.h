// What the operators' arguments say, as the kernels know it.
#pragma once
#include <torch/extension.h>

#include "table.h"

namespace pats {

inline Storage storage_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Storage::kFloat32;
    case at::kBFloat16: return Storage::kBfloat16;
    case at::kHalf: return Storage::kFloat16;
    case at::kDouble: return Storage::kFloat64;
    default: TORCH_CHECK(false, "pats_kernels: no kernel for ", type);
  }
}

inline Uncertainty uncertainty_of(c10::string_view name) {
  if (name == "product") return Uncertainty::kProduct;
  if (name == "ucb") return Uncertainty::kUcb;
  TORCH_CHECK(name == "none", "pats_kernels: no kernel for uncertainty ", name);
  return Uncertainty::kNone;
}

inline Form form_of(c10::string_view name) {
  if (name == "pats") return Form::kPats;
  if (name == "pats_adamw") return Form::kPatsAdamW;
  TORCH_CHECK(name == "moments_adamw", "pats_kernels: no kernel for form ", name);
  return Form::kMomentsAdamW;
}

inline Phase phase_of(c10::string_view name) {
  if (name == "one_pass") return Phase::kOnePass;
  if (name == "averages") return Phase::kAverages;
  TORCH_CHECK(name == "noise", "pats_kernels: no kernel for phase ", name);
  return Phase::kNoise;
}

}  // namespace pats
