// Stands in for as much of torch as csrc/cpu.cpp needs: a tensor is an address and two sizes.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

namespace c10 {
using string_view = std::string_view;
}

namespace at {

enum ScalarType { kFloat, kBFloat16, kHalf, kDouble };

struct Tensor {
  const void* data;
  int64_t rows, columns;

  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(data);
  }
  int64_t size(int d) const { return d == 0 ? rows : columns; }
  bool is_contiguous() const { return true; }
};

template <class T>
struct ArrayRef {
  const T* data;
  size_t length;

  ArrayRef(const T* data, size_t length) : data(data), length(length) {}
  size_t size() const { return length; }
  const T* begin() const { return data; }
  const T* end() const { return data + length; }
  const T& operator[](size_t i) const { return data[i]; }
};

using TensorList = ArrayRef<Tensor>;

}  // namespace at

#define TORCH_CHECK(condition, ...)                                       \
  do {                                                                    \
    if (!(condition)) fprintf(stderr, "%s\n", #condition), abort();       \
  } while (false)

// What registers the operator: functions that nobody calls.
struct Library {
  template <class... T>
  void def(T&&...) {}
  template <class... T>
  void impl(T&&...) {}
};
#define TORCH_LIBRARY(name, library) [[maybe_unused]] static void define_##name(Library& library)
#define TORCH_LIBRARY_IMPL(name, key, library) [[maybe_unused]] static void implement_##name(Library& library)
#define PYBIND11_MODULE(name, module) [[maybe_unused]] static void module_##name()
