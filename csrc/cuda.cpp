// The operator torch.ops.pats_kernels.launch_ on CUDA. It starts the kernels of one phase of a step on the current
// stream, over tables on the device. It neither waits nor allocates, so a CUDA graph can capture it. As on the CPU, one
// binary works with every torch from 2.10 on. It is a separate library, because only a CUDA build of torch can load it.
#include "module.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "cuda_kernel.h"
#include "names.h"

namespace pats {
namespace {

using torch::stable::Tensor;

CudaFunction function_of(ScalarType param_dtype) {
  switch (storage_of(param_dtype)) {
    case Storage::kFloat32: return launch_float32;
    case Storage::kBfloat16: return launch_bfloat16;
    case Storage::kFloat16: return launch_float16;
#if defined(PATS_NO_FLOAT64)
    default: STD_TORCH_CHECK(false, "pats_kernels: built with PATS_KERNELS_CUDA_FLOAT64=0, without float64");
#else
    default: return launch_float64;
#endif
  }
}

void check_table(const Tensor& table, const char* name, ScalarType type, const Tensor& first) {
  STD_TORCH_CHECK(table.is_contiguous() && table.scalar_type() == type && table.is_cuda() &&
                      table.get_device_index() == first.get_device_index(),
                  "pats_kernels: ", name, " must be contiguous ", torch::headeronly::toString(type),
                  " on GPU ", first.get_device_index());
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "pats_kernels: ", cudaGetErrorString(error));
}

void launch_cuda(const Tensor& table, const Tensor& layout, const Tensor& chunks, const Tensor& starts,
                 Tensor partials, ScalarType param_dtype, ScalarType state_dtype, std::string_view form,
                 std::string_view uncertainty, std::string_view phase, bool stochastic_rounding, bool plain,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  check_table(table, "table", ScalarType::Long, table);
  check_table(layout, "layout", ScalarType::Long, table);
  check_table(chunks, "chunks", ScalarType::Int, table);
  check_table(starts, "starts", ScalarType::Long, table);
  check_table(partials, "partials", ScalarType::Double, table);
  STD_TORCH_CHECK(table.size(1) * sizeof(int64_t) == sizeof(Row) &&
                  layout.size(1) * sizeof(int64_t) == sizeof(Dimension),
              "pats_kernels: the tables are not this version's");
  STD_TORCH_CHECK(chunks.numel() == 2 * chunks.size(0) && partials.numel() == 3 * chunks.size(0) &&
                  starts.numel() == table.size(0) + 1,
              "pats_kernels: the tables are of different sizes");
  for (const auto* scaler : {&grad_scale, &found_inf}) {
    if (*scaler) check_table(**scaler, "grad_scale and found_inf", ScalarType::Float, table);
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
  launch.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  launch.partials = static_cast<double*>(partials.mutable_data_ptr());
  launch.num_chunks = chunks.size(0);
  launch.num_tensors = table.size(0);
  const auto number_in = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
  };
  launch.grad_scale = number_in(grad_scale);
  launch.found_inf = number_in(found_inf);

  const auto device = table.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  check(function_of(param_dtype)(launch, static_cast<cudaStream_t>(stream)));
}

}  // namespace
}  // namespace pats

// The tensors in the table's rows are not arguments: a list of a thousand of them would cost more host time than
// everything else, and the caller keeps them alive.
STABLE_TORCH_LIBRARY_FRAGMENT(pats_kernels, library) {
  library.def(
      "launch_(Tensor table, Tensor layout, Tensor chunks, Tensor starts, Tensor(a!) partials, "
      "ScalarType param_dtype, ScalarType state_dtype, str form, str uncertainty, str phase, "
      "bool stochastic_rounding, bool plain, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pats_kernels, CUDA, library) {
  library.impl("launch_", TORCH_BOX(&pats::launch_cuda));
}

PATS_MODULE(_CUDA)
