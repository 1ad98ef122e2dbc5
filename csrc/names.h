// Converts the operators' arguments into the kernels' enumerations.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string_view>

#include "table.h"

namespace pats {

using torch::headeronly::ScalarType;

inline Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Storage::kFloat32;
    case ScalarType::BFloat16: return Storage::kBfloat16;
    case ScalarType::Half: return Storage::kFloat16;
    case ScalarType::Double: return Storage::kFloat64;
    default: STD_TORCH_CHECK(false, "pats_kernels: no kernel for ", torch::headeronly::toString(type));
  }
}

inline Uncertainty uncertainty_of(std::string_view name) {
  if (name == "product") return Uncertainty::kProduct;
  if (name == "ucb") return Uncertainty::kUcb;
  STD_TORCH_CHECK(name == "none", "pats_kernels: no kernel for uncertainty ", name);
  return Uncertainty::kNone;
}

inline Form form_of(std::string_view name) {
  if (name == "pats") return Form::kPats;
  if (name == "pats_adamw") return Form::kPatsAdamW;
  STD_TORCH_CHECK(name == "moments_adamw", "pats_kernels: no kernel for form ", name);
  return Form::kMomentsAdamW;
}

inline Phase phase_of(std::string_view name) {
  if (name == "one_pass") return Phase::kOnePass;
  if (name == "averages") return Phase::kAverages;
  STD_TORCH_CHECK(name == "noise", "pats_kernels: no kernel for phase ", name);
  return Phase::kNoise;
}

}  // namespace pats
