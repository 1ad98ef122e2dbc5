// Several optimizers step at once, each on two threads. The code is csrc/cpu.cpp and csrc/cpu_kernel.cpp themselves.
// tests/native/stand_in replaces torch, whose libraries a sanitizer cannot see into. Compiled with
// -fsanitize=thread, the program reports every race. In any build it checks that the bits are those of one thread.
//
//   threads         all forms, storages, uncertainties and phases
//   threads race    two optimizers that share a parameter: proves that a race is seen
//   threads digest  a line for each combination, with a hash of all bits: the same on every processor
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu.cpp"
#include "../../csrc/storage.h"

namespace pats {
namespace {

constexpr int kOptimizers = 3, kSteps = 2;
constexpr int64_t kSizes[] = {1, 5, 255, 16383, 3 * 16384 + 77};  // around a chunk's 16384 elements and a block's 256
constexpr size_t kTensors = std::size(kSizes);

struct Names {
  const char *form, *uncertainty;
  ScalarType param, state;
  bool exact, strided;
};

size_t bytes_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Read by all optimizers: a learning rate in a tensor, a GradScaler's scale and its found_inf.
const float kLearningRate = 1e-3f, kScale = 2.0f, kFoundInf = 0.0f;

struct Optimizer {
  std::vector<std::vector<unsigned char>> memory;  // of every operand of every tensor
  std::vector<float> stats, counts;
  std::vector<int64_t> nonfinite;
  std::vector<Row> rows;
  std::vector<Dimension> dimensions;
  Names names;

  Optimizer(const Names& names, uint32_t seed)
      : stats(2 * kTensors, 0.0f), counts(kTensors, 0.0f), nonfinite(kTensors, 0), rows(kTensors), names(names) {
    std::minstd_rand random(seed);
    memory.reserve(6 * kTensors);
    for (size_t i = 0; i < kTensors; ++i) {
      Row& row = rows[i];
      memset(&row, 0, sizeof row);
      row.numel = row.whole = kSizes[i];
      row.param = fill(kSizes[i], names.param, random, true);
      row.grad = fill(kSizes[i], names.param, random, true);
      if (strcmp(names.form, "moments_adamw") != 0) {
        row.sens = fill(kSizes[i], names.state, random, false);
        if (strcmp(names.uncertainty, "none") != 0) row.unc = fill(kSizes[i], names.state, random, false);
      }
      if (strcmp(names.form, "pats") != 0) {
        row.exp_avg = fill(kSizes[i], names.state, random, false);
        row.exp_avg_sq = fill(kSizes[i], names.state, random, false);
        row.lr_tensor = &kLearningRate;
      }
      row.stats = row.share = &stats[2 * i];
      row.step_count = &counts[i];
      row.nonfinite = &nonfinite[i];
      row.tensor_id = static_cast<int64_t>(i);
      row.seed = seed;
      row.noise_scale = 1e-2, row.gamma = 1, row.sens_beta = 0.85, row.sens_rate = 0.15;
      row.unc_beta = 0.95, row.unc_rate = 0.05, row.lr = 1e-3, row.weight_decay = 1e-2, row.decay = 1 - 1e-5;
      row.eps = 1e-8, row.rate1 = 0.1, row.beta2 = 0.999, row.rate2 = 1e-3;
      row.log_beta1 = std::log(0.9), row.log_beta2 = std::log(0.999), row.grad_sign = 1;
      if (names.strided) {  // the path for shards: numbered as every third element of a whole tensor
        row.ndim = 1, row.layout = static_cast<int64_t>(dimensions.size());
        dimensions.push_back({kSizes[i], 1, 1, 1, 1, 1, 1, 3});
      }
    }
  }

  // Numbers of 9 bits between 1/2 and 1, or of either sign: exact in all dtypes but bfloat16, which cuts off the last.
  void* fill(int64_t count, ScalarType type, std::minstd_rand& random, bool is_signed) {
    memory.emplace_back(count * bytes_of(type));
    for (int64_t i = 0; i < count; ++i) {
      const float value = (0.5f + 0.5f * (random() % 256) / 256) * (is_signed && random() % 2 ? -1 : 1);
      void* at = memory.back().data() + i * bytes_of(type);
      switch (type) {
        case ScalarType::Float: memcpy(at, &value, 4); break;
        case ScalarType::Double: { const double wide = value; memcpy(at, &wide, 8); break; }
        case ScalarType::Half: { const uint16_t half = half_of_float(value); memcpy(at, &half, 2); break; }
        default: { const uint16_t upper = bits_of(value) >> 16; memcpy(at, &upper, 2); break; }
      }
    }
    return memory.back().data();
  }

  void step() {
    const int64_t columns = sizeof(Row) / sizeof(int64_t), layout_columns = sizeof(Dimension) / sizeof(int64_t);
    const auto long_ = ScalarType::Long, float_ = ScalarType::Float;
    const Tensor table{rows.data(), kTensors, columns, long_};
    const Tensor layout{dimensions.data(), static_cast<int64_t>(dimensions.size()), layout_columns, long_};
    const std::optional<Tensor> scale{{&kScale, 1, 1, float_}}, found_inf{{&kFoundInf, 1, 1, float_}};
    const auto phase = [&](const char* name) {
      step_cpu(table, layout, names.param, names.state, names.form, names.uncertainty, name, true,
               scale, found_inf);
    };
    if (names.exact) phase("averages"), phase("noise");
    if (!names.exact) phase("one_pass");
  }

  bool operator==(const Optimizer& other) const {
    return memory == other.memory && stats == other.stats && counts == other.counts && nonfinite == other.nonfinite;
  }
};

std::vector<Optimizer> make(const Names& names) {
  std::vector<Optimizer> made;
  made.reserve(kOptimizers);
  for (int i = 0; i < kOptimizers; ++i) made.emplace_back(names, 1 + i);
  return made;
}

void step_together(std::vector<Optimizer>& optimizers) {
  std::vector<std::thread> threads;
  for (Optimizer& optimizer : optimizers) {
    threads.emplace_back([&optimizer] {
      for (int i = 0; i < kSteps; ++i) optimizer.step();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool check(const Names& names) {
  std::vector<Optimizer> alone = make(names), together = make(names);
  torch::stable::kThreads = 1;
  for (Optimizer& optimizer : alone) {
    for (int i = 0; i < kSteps; ++i) optimizer.step();
  }
  torch::stable::kThreads = 2;
  step_together(together);
  if (alone == together && !(alone == make(names))) return true;
  fprintf(stderr, "other bits than of one thread: %s, %s, %s, %s, %s\n", names.form, names.uncertainty,
          toString(names.param), toString(names.state), names.exact ? "exact" : "delayed");
  return false;
}

template <class Function>
void for_each_combination(Function function) {
  constexpr ScalarType kStored[][2] = {
      {ScalarType::Float, ScalarType::Float},       {ScalarType::Float, ScalarType::BFloat16},
      {ScalarType::BFloat16, ScalarType::BFloat16}, {ScalarType::BFloat16, ScalarType::Float},
      {ScalarType::Half, ScalarType::Float},        {ScalarType::Double, ScalarType::Double}};
  for (const char* form : {"pats", "pats_adamw", "moments_adamw"}) {
    for (const char* uncertainty : {"product", "ucb", "none"}) {
      for (const auto& stored : kStored) {
        for (const bool exact : {false, true}) {
          for (const bool strided : {false, true}) {
            function(Names{form, uncertainty, stored[0], stored[1], exact, strided});
          }
        }
      }
    }
  }
}

// float64 is left out: its logarithm, sine and cosine are the C library's.
int digest() {
  torch::stable::kThreads = 1;
  for_each_combination([](const Names& names) {
    if (names.param == ScalarType::Double) return;
    Optimizer optimizer(names, 1);
    for (int i = 0; i < kSteps; ++i) optimizer.step();
    uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
    const auto add = [&hash](const void* data, size_t size) {
      for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001B3;
    };
    for (const auto& operand : optimizer.memory) add(operand.data(), operand.size());
    add(optimizer.stats.data(), optimizer.stats.size() * sizeof(float));
    printf("%s %s %s %s %s %s: %016llx\n", names.form, names.uncertainty, toString(names.param), toString(names.state),
           names.exact ? "exact" : "delayed", names.strided ? "strided" : "contiguous",
           static_cast<unsigned long long>(hash));
  });
  return 0;
}

int run() {
  int checked = 0, wrong = 0;
  for_each_combination([&](const Names& names) {
    wrong += !check(names);
    ++checked;
  });
  printf("%d combinations, %d optimizers at once, %d threads each: %d wrong\n", checked, kOptimizers, torch::stable::kThreads, wrong);
  return wrong > 0;
}

int race() {
  std::vector<Optimizer> optimizers = make({"pats", "product", ScalarType::Float, ScalarType::Float, false, false});
  for (Optimizer& optimizer : optimizers) optimizer.rows.back().param = optimizers[0].rows.back().param;
  step_together(optimizers);
  return 0;
}

}  // namespace
}  // namespace pats

int main(int argc, char** argv) {
  const char* mode = argc > 1 ? argv[1] : "";
  if (!strcmp(mode, "race")) return pats::race();
  return !strcmp(mode, "digest") ? pats::digest() : pats::run();
}
