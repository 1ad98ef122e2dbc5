// One dtype's kernels on the host, behind a C function that Python can call. PATS_PARAM and PATS_LAUNCH as
// for csrc/cuda_kernel.cu.
#define PATS_ROOT_FLUSHES  // as a GPU's does
#include "../../csrc/cuda_kernel.cu"

using namespace pats;

extern "C" int launch(int state, int form, int uncertainty, int phase, int stochastic_rounding, int strided,
                      int plain, const void* table, const void* layout, const void* chunks,
                      const int64_t* starts, double* partials, int64_t num_chunks, int64_t num_tensors,
                      const float* grad_scale, const float* found_inf) {
  CudaLaunch launch{};
  launch.state = static_cast<Storage>(state);
  launch.form = static_cast<Form>(form);
  launch.uncertainty = static_cast<Uncertainty>(uncertainty);
  launch.phase = static_cast<Phase>(phase);
  launch.stochastic_rounding = stochastic_rounding;
  launch.strided = strided;
  launch.plain = plain;
  launch.table = table;
  launch.layout = static_cast<const Dimension*>(layout);
  launch.chunks = static_cast<const int2*>(chunks);
  launch.starts = starts;
  launch.partials = partials;
  launch.num_chunks = num_chunks;
  launch.num_tensors = num_tensors;
  launch.grad_scale = grad_scale;
  launch.found_inf = found_inf;
  return PATS_LAUNCH(launch, nullptr);
}
