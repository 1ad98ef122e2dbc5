// The operator torch.ops.pats_kernels.step_ on the CPU. It cuts a launch's tensors into chunks of a fixed size, runs
// these on torch's threads, and adds their partial sums in order, so any number of threads gives the same bits.
// It uses only torch's stable ABI and Python's limited API, so one binary works with every torch from 2.10 on.
#include "module.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <dirent.h>
#include <pthread.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arithmetic.h"
#include "cpu_kernel.h"
#include "names.h"

namespace pats {
namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 16384;  // a multiple of the kernel's block; 448 KiB of float32 operands

ChunkFunction best_for_this_machine() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  // PATS_KERNELS_ISA selects a smaller instruction set, for tests; never one that the machine lacks.
  const char* limit = std::getenv("PATS_KERNELS_ISA");
  const std::string allowed = limit ? limit : "avx512";
  if (avx512 && allowed == "avx512") return chunk_avx512;
  if (avx2 && allowed != "baseline") return chunk_avx2;
#endif
  return chunk_baseline;
}

// A launch's tables, and where each tensor's chunks start in the list of all chunks.
struct Work {
  const Row* rows;
  const Dimension* dimensions;
  std::vector<int64_t> starts;  // the last entry is the number of all chunks

  Work(const Tensor& table, const Tensor& layout)
      : rows(static_cast<const Row*>(table.const_data_ptr())),
        dimensions(static_cast<const Dimension*>(layout.const_data_ptr())),
        starts(table.size(0) + 1, 0) {
    std::transform_inclusive_scan(rows, rows + table.size(0), starts.begin() + 1, std::plus<>(),
                                  [](const Row& row) { return (row.numel + kChunk - 1) / kChunk; }, int64_t{0});
  }

  size_t tensors() const { return starts.size() - 1; }
};

uint32_t step_of(const Row& row, Phase phase) {
  if (!row.step_count) return static_cast<uint32_t>(row.step);
  return steps_of(*row.step_count) + (phase == Phase::kNoise ? 0 : 1);
}

// In a forked child, GNU's OpenMP waits for ever for the threads of its parent. So if the parent had threads, the
// child runs all chunks itself, which gives the same bits. If the parent had none, the child may start its own.
bool forked_with_threads = false;

#if defined(__linux__)
bool forks_with_threads = false;

void before_fork() {
  int entries = 0;
  DIR* threads = opendir("/proc/self/task");
  while (threads && entries < 4 && readdir(threads)) ++entries;
  if (threads) closedir(threads);
  forks_with_threads = !threads || entries > 3;  // ".", ".." and the one that forks
}

void after_fork() { forked_with_threads = forked_with_threads || forks_with_threads; }

[[maybe_unused]] const int watches_forks = pthread_atfork(before_fork, nullptr, after_fork);
#endif

template <class F>
void in_parallel(int64_t count, const F& body) {
  if (forked_with_threads && count > 0) return body(0, count);
  torch::stable::parallel_for(0, count, 1, body);
}

void run_phase(const Work& work, const LaunchArgs& args, std::vector<Partial>& partials) {
  static const ChunkFunction chunk = best_for_this_machine();
  in_parallel(work.starts.back(), [&](int64_t first, int64_t last) {
    size_t tensor = std::upper_bound(work.starts.begin(), work.starts.end(), first) - work.starts.begin() - 1;
    for (int64_t i = first; i < last; ++i) {
      while (i >= work.starts[tensor + 1]) ++tensor;
      const Row& row = work.rows[tensor];
      if (!row.stats && args.phase == Phase::kAverages) continue;
      static constexpr float kNoStatistics[2] = {0, 0};
      const int64_t begin = (i - work.starts[tensor]) * kChunk;
      partials[i] = chunk(args, row, work.dimensions, row.stats ? row.stats : kNoStatistics,
                          step_of(row, args.phase), begin, std::min(begin + kChunk, row.numel));
    }
  });
}

void finish_statistics(const Work& work, const std::vector<Partial>& partials) {
  for (size_t tensor = 0; tensor < work.tensors(); ++tensor) {
    const Row& row = work.rows[tensor];
    if (row.step_count) *row.step_count = advanced(*row.step_count);
    if (!row.stats) continue;
    Partial sum{0, 0, 0};
    for (int64_t i = work.starts[tensor]; i < work.starts[tensor + 1]; ++i) {
      sum.sens += partials[i].sens;
      sum.unc += partials[i].unc;
      sum.nonfinite += partials[i].nonfinite;
    }
    const double whole = static_cast<double>(row.whole);
    row.share[0] = row.whole ? static_cast<float>(sum.sens / whole) : 0.0f;
    row.share[1] = row.whole ? static_cast<float>(sum.unc / whole) : 0.0f;
    if (row.nonfinite) *row.nonfinite += sum.nonfinite;
  }
}

bool is_table(const Tensor& tensor, size_t row) {
  return tensor.dim() == 2 && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long &&
         tensor.size(1) * sizeof(int64_t) == row;
}

float number_in(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1 && tensor.scalar_type() == ScalarType::Float && tensor.is_cpu(),
                  "pats_kernels: grad_scale and found_inf must be one float32 each, on the CPU");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

void step_cpu(const Tensor& table, const Tensor& layout, ScalarType param_dtype, ScalarType state_dtype,
              std::string_view form, std::string_view uncertainty, std::string_view phase,
              bool stochastic_rounding, const std::optional<Tensor>& grad_scale,
              const std::optional<Tensor>& found_inf) {
  STD_TORCH_CHECK(is_table(table, sizeof(Row)) && is_table(layout, sizeof(Dimension)),
                  "pats_kernels: the tables are not this version's");
  if (found_inf && number_in(*found_inf) != 0) return;
  const double scale = grad_scale ? 1.0 / number_in(*grad_scale) : 1.0;
  const LaunchArgs args{storage_of(param_dtype),     storage_of(state_dtype), form_of(form),
                  uncertainty_of(uncertainty), phase_of(phase),         stochastic_rounding,
                  scale};

  const Work work(table, layout);
  // Kept from step to step, because new memory would cost a page fault for every few chunks.
  static thread_local std::vector<Partial> partials;
  partials.resize(work.starts.back());
  run_phase(work, args, partials);
  if (args.phase != Phase::kNoise) finish_statistics(work, partials);
}

}  // namespace
}  // namespace pats

// The tensors in the table's rows are not arguments: a list of a thousand of them would cost more host time than
// everything else, and the caller keeps them alive. So the schema names only the table as written. Functionalization,
// which would rely on the schema for more, is refused (pats_kernels/compiling.py).
STABLE_TORCH_LIBRARY(pats_kernels, library) {
  library.def(
      "step_(Tensor(a!) table, Tensor layout, ScalarType param_dtype, ScalarType state_dtype, str form, "
      "str uncertainty, str phase, bool stochastic_rounding, Tensor? grad_scale, Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pats_kernels, CPU, library) { library.impl("step_", TORCH_BOX(&pats::step_cpu)); }

PATS_MODULE(_C)
