// The random words that the kernels consume, in their order, to standard output without end: what dieharder,
// PractRand and TestU01 are fed with. The generator is the kernels' own, csrc/philox.h.
//
//   words STREAM [SEED [BYTES]]
//
// STREAM, SEED 1 and no end by default:
//   training  a model's steps: of every tensor, block by block, the words of the noise, then those that round
//   noise     one tensor, element after element
//   rounding  the same of the words that round
//   steps     one group of four elements, step after step
//   tensors   one group, tensor after tensor
//   seeds     one group, seed after seed
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/philox.h"

namespace {

constexpr int kGroups = 64;  // of a block: csrc/cpu_kernel.cpp
// Sizes in groups as of a transformer's layer that is 64 wide: matrices, biases and norms, none a power of two
// times another's.
constexpr uint32_t kTensors[] = {1024, 16, 1024, 16, 1024, 16, 1024, 16, 16, 16, 4096, 64, 4096, 16, 16, 16};

struct Output {
  std::vector<uint32_t> buffer;
  uint64_t left;

  explicit Output(uint64_t words) : left(words) { buffer.reserve(1 << 16); }

  bool put(uint32_t word) {
    buffer.push_back(word);
    if (buffer.size() == size_t{1} << 16 || buffer.size() == left) return flush();
    return true;
  }

  bool put(const pats::Words& x) { return put(x.x0) && put(x.x1) && put(x.x2) && put(x.x3); }

  bool flush() {
    const size_t written = fwrite(buffer.data(), sizeof(uint32_t), buffer.size(), stdout);
    const bool complete = written == buffer.size();
    left -= written;
    buffer.clear();
    return complete && left > 0;
  }
};

pats::Words words(uint64_t group, uint32_t top_bit, uint32_t tensor, uint32_t step, uint64_t seed) {
  return pats::philox4x32(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32) | top_bit, tensor,
                          step, seed);
}

bool training_step(Output& out, uint32_t step, uint64_t seed) {
  uint32_t tensor = 0;
  for (const uint32_t groups : kTensors) {
    for (uint32_t block = 0; block < groups; block += kGroups) {
      for (const uint32_t top_bit : {0u, pats::kRoundingBit}) {
        for (uint32_t k = block; k < groups && k < block + kGroups; ++k) {
          if (!out.put(words(k, top_bit, tensor, step, seed))) return false;
        }
      }
    }
    ++tensor;
  }
  return true;
}

bool put(Output& out, const std::string& stream, uint64_t n, uint64_t seed) {
  const uint32_t low = static_cast<uint32_t>(n);
  if (stream == "training") return training_step(out, low + 1, seed);
  if (stream == "noise") return out.put(words(n, 0, 0, 1, seed));
  if (stream == "rounding") return out.put(words(n, pats::kRoundingBit, 0, 1, seed));
  if (stream == "steps") return out.put(words(0, 0, 0, low + 1, seed));
  if (stream == "tensors") return out.put(words(0, 0, low, 1, seed));
  return out.put(words(0, 0, 0, 1, seed + n));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string stream = argc > 1 ? argv[1] : "";
  bool known = false;
  for (const char* name : {"training", "noise", "rounding", "steps", "tensors", "seeds"}) known |= stream == name;
  if (!known) return fprintf(stderr, "no stream %s\n", stream.c_str()), 2;
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  Output out(argc > 3 ? strtoull(argv[3], nullptr, 10) / sizeof(uint32_t) : ~uint64_t{0});
  for (uint64_t n = 0; put(out, stream, n, seed); ++n) {
  }
  return 0;
}
