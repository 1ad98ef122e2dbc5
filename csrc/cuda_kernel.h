// What cuda.cpp asks of cuda_kernel.cu, which is compiled once for each dtype of the parameters.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "table.h"

namespace pats {

// Elements a block: backends/cuda.py cuts the tensors by it.
constexpr int kChunk = 4096;

// What a launch's tensors have in common. All addresses are the device's.
struct CudaLaunch {
  Storage state;
  Form form;
  Uncertainty uncertainty;
  Phase phase;
  bool stochastic_rounding;
  bool strided;  // whether some of the tensors are not contiguous
  bool plain;    // whether some are without statistics: they get AdamW's step alone
  const void* table;       // int64 [tensors, columns], the numbers in the type of the arithmetic
  const Dimension* layout;
  const int2* chunks;      // [chunks]: the table's row, the number of the piece
  const int64_t* starts;   // [tensors + 1]: where each tensor's chunks start
  double* partials;        // [3, chunks]: a chunk's sums of S and U, its count of what was not finite
  int64_t num_chunks, num_tensors;
  const float* grad_scale;  // null, or a GradScaler's
  const float* found_inf;
};

// Starts one phase: the update of all chunks and, but for the noise phase, the statistics of all tensors.
using CudaFunction = cudaError_t (*)(const CudaLaunch&, cudaStream_t);

cudaError_t launch_float32(const CudaLaunch&, cudaStream_t);
cudaError_t launch_bfloat16(const CudaLaunch&, cudaStream_t);
cudaError_t launch_float16(const CudaLaunch&, cudaStream_t);
cudaError_t launch_float64(const CudaLaunch&, cudaStream_t);

}  // namespace pats
