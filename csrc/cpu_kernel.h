// The interface of cpu_kernel.cpp, which is compiled once for each instruction set. cpu.cpp is compiled only once.
#pragma once
#include <cstdint>

#include "table.h"

namespace pats {

// What the tensors of a launch have in common.
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

// Updates elements [begin, end) of one tensor; begin is a multiple of 4 and the range is not empty. `stats` are the
// means that the normalization uses, `step` is t. A row without statistics gets AdamW's step alone.
using ChunkFunction = Partial (*)(const LaunchArgs&, const Row&, const Dimension*, const float* stats,
                                  uint32_t step, int64_t begin, int64_t end);

Partial chunk_baseline(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);
Partial chunk_avx2(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);
Partial chunk_avx512(const LaunchArgs&, const Row&, const Dimension*, const float*, uint32_t, int64_t, int64_t);

}  // namespace pats
