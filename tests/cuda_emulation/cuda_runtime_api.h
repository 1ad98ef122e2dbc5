// As much of CUDA as csrc/cuda_kernel.cu asks for, on the host: found in the place of CUDA's own header, it
// makes the very same source a program that tests can run where there is no GPU.
//
// A block's threads are fibers, which one after another run as far as the next point where they wait for each
// other. Every other round the last one goes first, and in the next block it is the other rounds, so that what
// needs a barrier and has none shows. Blocks run one after another. A vector access that is not aligned aborts,
// and so do threads that part ways.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t start;  // entered once; later by `resume`, which spares a system call a switch
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(kStack);
  int64_t waits = 0;  // how often it has waited for the others
  bool done = false;
};

inline Index thread, block;
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline void (*body)(const void*);
inline const void* argument;
inline std::vector<double> exchanged[2] = {std::vector<double>(1024), std::vector<double>(1024)};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

inline void wait() {
  Fiber& fiber = fibers[thread.x];
  ++fiber.waits;
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void run() {
  body(argument);
  fibers[thread.x].done = true;
  _longjmp(scheduler, 1);
}

inline void switch_to(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.waits == 0) setcontext(&fiber.start);
  _longjmp(fiber.resume, 1);
}

inline void run_block(unsigned threads) {
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.waits = 0, fiber.done = false;
    makecontext(&fiber.start, run, 0);
  }
  for (bool backwards = block.x % 2 == 0; !fibers[0].done; backwards = !backwards) {
    for (unsigned i = 0; i < threads; ++i) {
      thread.x = backwards ? threads - 1 - i : i;
      switch_to(fibers[thread.x]);
    }
    for (const Fiber& fiber : fibers) {
      const Fiber& first = fibers[0];
      if (fiber.done != first.done || fiber.waits != first.waits) fail("threads part ways at a barrier");
    }
  }
}

template <class Access>
Access* aligned(Access* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Access) != 0) fail("a vector access is not aligned");
  return address;
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block

inline void __syncthreads() { emulation::wait(); }

template <class T>
T __shfl_down_sync(unsigned, T x, unsigned offset) {
  // Every other exchange in a place of its own: who comes first to the next one overwrites nothing unread.
  std::vector<double>& exchanged = emulation::exchanged[emulation::fibers[threadIdx.x].waits % 2];
  exchanged[threadIdx.x] = x;
  emulation::wait();
  const unsigned lane = threadIdx.x % 32, from = lane + offset < 32 ? threadIdx.x + offset : threadIdx.x;
  return static_cast<T>(exchanged[from]);
}

inline uint4 __ldcs(const uint4* from) { return *emulation::aligned(from); }
inline uint4 __ldca(const uint4* from) { return *emulation::aligned(from); }
inline void __stcs(uint4* to, uint4 value) { *emulation::aligned(to) = value; }
inline void __stwb(uint4* to, uint4 value) { *emulation::aligned(to) = value; }

// Of kernels that take one argument by value, as they all do here.
template <class Argument>
cudaError_t start_emulated(void (*kernel)(Argument), dim3 blocks, dim3 threads, const Argument& argument) {
  static void (*current)(Argument);
  current = kernel;
  emulation::body = [](const void* argument) { current(*static_cast<const Argument*>(argument)); };
  emulation::argument = &argument;
  for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) emulation::run_block(threads.x);
  return cudaSuccess;
}
