// Replaces torch's dtypes.
#pragma once

namespace torch::headeronly {

enum class ScalarType { Float, BFloat16, Half, Double, Long };

inline const char* toString(ScalarType type) {
  constexpr const char* kNames[] = {"Float", "BFloat16", "Half", "Double", "Long"};
  return kNames[static_cast<int>(type)];
}

}  // namespace torch::headeronly
