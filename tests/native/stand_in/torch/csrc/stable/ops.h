// Replaces torch's threads with std::thread, which ThreadSanitizer can see into.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int kThreads = 2;  // a driver sets it before it starts threads

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const F& body) {
  const int64_t each = (end - begin + kThreads - 1) / kThreads;
  if (kThreads == 1 || each == 0) {
    if (begin < end) body(begin, end);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t first = begin + each; first < end; first += each) {
    others.emplace_back([&body, first, last = std::min(first + each, end)] { body(first, last); });
  }
  body(begin, std::min(begin + each, end));
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
