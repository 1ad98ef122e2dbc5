// What cpu.cpp, the same everywhere, asks of cpu_kernel.cpp, which is compiled once for each instruction set.
#pragma once
#include <cstdint>

#include "table.h"

namespace pats {

// What a launch's tensors have in common.
struct LaunchArgs {
  Storage param, state;
  Form form;
  Uncertainty uncertainty;
  Phase phase;
  bool stochastic_rounding;
  double grad_scale;  // 1 / the GradScaler's scale
};

// One chunk's share of its tensor's statistics.
struct Partial {
  double sens, unc;
  int64_t nonfinite;
};

// Elements [begin, end) of one tensor; begin is a multiple of 4 and the range is not empty. `stats` are the
// means that the normalization asks for, `step` is t. A row without statistics gets AdamW's step alone.
using ChunkFunction = Partial (*)(const LaunchArgs&, const Row&, const Dimension*, const float* stats,
                                  uint32_t step, int64_t begin, int64_t end);

Partial chunk_baseline(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);
Partial chunk_avx2(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);
Partial chunk_avx512(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);

}  // namespace pats
