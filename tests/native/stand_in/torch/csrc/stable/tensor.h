// Replaces torch's tensor by what csrc/cpu.cpp asks for: an address, two sizes and a dtype.
#pragma once
#include <cstdint>

#include "../../headeronly/core/ScalarType.h"

namespace torch::stable {

struct Tensor {
  const void* data;
  int64_t rows, columns;
  headeronly::ScalarType dtype;

  const void* const_data_ptr() const { return data; }
  int64_t dim() const { return 2; }
  int64_t numel() const { return rows * columns; }
  int64_t size(int64_t d) const { return d == 0 ? rows : columns; }
  bool is_contiguous() const { return true; }
  bool is_cpu() const { return true; }
  headeronly::ScalarType scalar_type() const { return dtype; }
};

}  // namespace torch::stable
