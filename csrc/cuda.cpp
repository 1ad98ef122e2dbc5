// The operator torch.ops.pats_kernels.launch_ on CUDA: starts the kernels of one phase of a step over tables
// that lie on the device, on the current stream. It neither waits nor allocates, so a CUDA graph can capture
// it.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda_kernel.h"
#include "names.h"

namespace pats {
namespace {

CudaFunction function_of(at::ScalarType param_dtype) {
  switch (storage_of(param_dtype)) {
    case Storage::kFloat32: return launch_float32;
    case Storage::kBfloat16: return launch_bfloat16;
    case Storage::kFloat16: return launch_float16;
    default: return launch_float64;
  }
}

void check_table(const at::Tensor& table, const char* name, at::ScalarType type, const at::Tensor& first) {
  TORCH_CHECK(table.is_contiguous() && table.scalar_type() == type && table.device() == first.device(),
              "pats_kernels: ", name, " must be contiguous ", type, " on ", first.device());
}

void launch_cuda(const at::Tensor& table, const at::Tensor& layout, const at::Tensor& chunks,
                 const at::Tensor& starts, at::Tensor partials, at::ScalarType param_dtype,
                 at::ScalarType state_dtype, c10::string_view form, c10::string_view uncertainty,
                 c10::string_view phase, bool stochastic_rounding, bool plain,
                 const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  check_table(table, "table", at::kLong, table);
  check_table(layout, "layout", at::kLong, table);
  check_table(chunks, "chunks", at::kInt, table);
  check_table(starts, "starts", at::kLong, table);
  check_table(partials, "partials", at::kDouble, table);
  TORCH_CHECK(table.size(1) * sizeof(int64_t) == sizeof(Row) &&
                  layout.size(1) * sizeof(int64_t) == sizeof(Dimension),
              "pats_kernels: the tables are not this version's");
  TORCH_CHECK(chunks.numel() == 2 * chunks.size(0) && partials.numel() == 3 * chunks.size(0) &&
                  starts.numel() == table.size(0) + 1,
              "pats_kernels: the tables are of different sizes");
  for (const auto* scaler : {&grad_scale, &found_inf}) {
    if (*scaler) check_table(**scaler, "grad_scale and found_inf", at::kFloat, table);
  }

  CudaLaunch launch{};
  launch.state = storage_of(state_dtype);
  launch.form = form_of(form);
  launch.uncertainty = uncertainty_of(uncertainty);
  launch.phase = phase_of(phase);
  launch.stochastic_rounding = stochastic_rounding;
  launch.strided = layout.size(0) > 0;
  launch.plain = plain;
  launch.table = table.const_data_ptr();
  launch.layout = static_cast<const Dimension*>(layout.const_data_ptr());
  launch.chunks = static_cast<const int2*>(chunks.const_data_ptr());
  launch.starts = starts.const_data_ptr<int64_t>();
  launch.partials = partials.mutable_data_ptr<double>();
  launch.num_chunks = chunks.size(0);
  launch.num_tensors = table.size(0);
  launch.grad_scale = grad_scale ? grad_scale->const_data_ptr<float>() : nullptr;
  launch.found_inf = found_inf ? found_inf->const_data_ptr<float>() : nullptr;

  const c10::cuda::CUDAGuard guard(table.device());
  C10_CUDA_CHECK(function_of(param_dtype)(launch, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace
}  // namespace pats

// The tensors that the table's rows name are not among the arguments: a list of a thousand of them would cost
// more of the host's time than all the rest, and who calls this holds them.
TORCH_LIBRARY_FRAGMENT(pats_kernels, library) {
  library.def(
      "launch_(Tensor table, Tensor layout, Tensor chunks, Tensor starts, Tensor(a!) partials, "
      "ScalarType param_dtype, ScalarType state_dtype, str form, str uncertainty, str phase, "
      "bool stochastic_rounding, bool plain, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

TORCH_LIBRARY_IMPL(pats_kernels, CUDA, library) { library.impl("launch_", &pats::launch_cuda); }
