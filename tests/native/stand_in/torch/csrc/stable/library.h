// Replaces the registration of operators with functions that are never called.
#pragma once

struct Library {
  template <class... T>
  void def(T&&...) {}
  template <class... T>
  void impl(T&&...) {}
};
#define TORCH_BOX(function) (function)
#define STABLE_TORCH_LIBRARY(name, library) [[maybe_unused]] static void define_##name(Library& library)
#define STABLE_TORCH_LIBRARY_IMPL(name, key, library) [[maybe_unused]] static void implement_##name(Library& library)
