// The interface of cuda_kernel.cu, which is compiled once for each dtype of the parameters. cuda.cpp calls it.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "table.h"

namespace pats {

// Elements for each block; backends/cuda.py cuts the tensors into chunks of this size.
constexpr int kChunk = 4096;

// What the tensors of a launch have in common. All addresses are on the device.
struct CudaLaunch {
  Storage state;
  Form form;
  Uncertainty uncertainty;
  Phase phase;
  bool stochastic_rounding;
  bool strided;  // whether some of the tensors are not contiguous
  bool plain;    // whether some have no statistics: they get AdamW's step alone
  const void* table;       // int64 [tensors, columns], with numbers in the type of the arithmetic
  const Dimension* layout;
  const int2* chunks;      // [chunks]: the table's row, the number of the piece
  const int64_t* starts;   // [tensors + 1]: where each tensor's chunks start
  double* partials;        // [3, chunks]: a chunk's sums of S and of U, its count of elements not finite
  int64_t num_chunks, num_tensors;
  const float* grad_scale;  // a GradScaler's, or null
  const float* found_inf;
};

// Starts one phase: the update of all chunks and, except in the noise phase, the statistics of all tensors.
using CudaFunction = cudaError_t (*)(const CudaLaunch&, cudaStream_t);

cudaError_t launch_float32(const CudaLaunch&, cudaStream_t);
cudaError_t launch_bfloat16(const CudaLaunch&, cudaStream_t);
cudaError_t launch_float16(const CudaLaunch&, cudaStream_t);
cudaError_t launch_float64(const CudaLaunch&, cudaStream_t);

}  // namespace pats
