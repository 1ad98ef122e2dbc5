// The CPU kernel: one source for all instruction sets. setup.py compiles it with -mavx512..., with -mavx2, and
// without either. PATS_CHUNK names the function that each object exports; cpu.cpp picks one of them at run time.
//
// The path of the data: a chunk is cut into blocks of kBlock elements. A block's random words are drawn into the L1
// cache. Then its normals are computed from them and it is updated in place, at once or in pieces. Each of these is a
// separate loop that the compiler vectorizes: a processor looks one or two hundred instructions ahead, so it overlaps
// more iterations of short loops. Tails and strided tensors are copied into separate blocks and back.
//
// No header may provide an ordinary inline function to this file: the linker keeps only one copy of such functions,
// and that might be one with instructions that the machine does not have.
#include "cpu_kernel.h"

#include "groups.h"
#include "step.h"
#include "storage.h"

namespace pats {
namespace {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

constexpr int kBlock = 256;
constexpr int kGroups = kBlock / 4;
constexpr int kVector = 4 * kLanes;  // elements of a vector of groups

struct Draw {  // what an element's random words depend on, besides its number
  uint64_t seed;
  uint32_t tensor_id, step, high;
  Groups noise, rounding;  // for groups whose high word is `high`

  Draw(const Row& row, uint32_t step, uint32_t high)
      : seed(row.seed), tensor_id(static_cast<uint32_t>(row.tensor_id)), step(step), high(high),
        noise(high, tensor_id, step, seed), rounding(high | kRoundingBit, tensor_id, step, seed) {}
};

// ---- random words and normals of a block

// Words that are drawn in one call, as consecutive rows in memory.
using BlockWords = uint32_t[kGroups / kLanes][4][kLanes];
static_assert(kGroups % (kVectors * kLanes) == 0);

static inline void draw(const Groups& words, uint32_t low, BlockWords& x) {
  for (int k = 0; k < kGroups / kLanes; k += kVectors) words(low + k * kLanes, x + k);
}

// The normals of a vector of groups.
template <class T>
static inline void normals(const uint32_t (&x)[4][kLanes], const Circle<T>& circle, T* z) {
  alignas(64) T of[4][kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) {
    const T r0 = square_root(minus_two_log(unit<T>(x[0][i])));
    const T r1 = square_root(minus_two_log(unit<T>(x[2][i])));
    T cos0, sin0, cos1, sin1;
    circle(turn<T>(x[1][i], Circle<T>::kTurn), cos0, sin0);
    circle(turn<T>(x[3][i], Circle<T>::kTurn), cos1, sin1);
    of[0][i] = r0 * cos0;
    of[1][i] = r0 * sin0;
    of[2][i] = r1 * cos1;
    of[3][i] = r1 * sin1;
  }
  in_order(of, z);
}

static inline void rounding_bits(const Groups& words, uint32_t low, uint32_t* bits) {
  alignas(64) uint32_t x[kVectors][4][kLanes];
  for (int k = 0; k < kGroups; k += kVectors * kLanes) {
    words(low + k, x);
    PATS_UNROLL
    for (int v = 0; v < kVectors; ++v) in_order(x[v], bits + 4 * (k + v * kLanes));
  }
}

// The same for elements that are not numbered one after another. Each draws its group's words and keeps its own.

static inline Words draw_one(const Draw& d, uint64_t number, uint32_t top_bit) {
  const uint64_t group = number / 4;
  return philox4x32(static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32) | top_bit, d.tensor_id,
                    d.step, d.seed);
}

template <class T>
__attribute__((noinline)) static void normals(const Draw& d, const int64_t* numbers, const Circle<T>& circle, T* z) {
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const Words x = draw_one(d, numbers[i], 0);
    const bool second = numbers[i] & 2;
    T cosine, sine;
    circle(turn<T>(second ? x.x3 : x.x1, Circle<T>::kTurn), cosine, sine);
    z[i] = square_root(minus_two_log(unit<T>(second ? x.x2 : x.x0))) * (numbers[i] & 1 ? sine : cosine);
  }
}

__attribute__((noinline)) static void rounding_bits(const Draw& d, const int64_t* numbers, uint32_t* bits) {
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) {
    const Words x = draw_one(d, numbers[i], kRoundingBit);
    const uint32_t even = numbers[i] & 2 ? x.x2 : x.x0, odd = numbers[i] & 2 ? x.x3 : x.x1;
    bits[i] = numbers[i] & 1 ? odd : even;
  }
}

// ---- the update of a block

template <class P, class S>
struct Block {
  P* w;
  const P* g;
  S *sens, *unc, *m, *v;
  uint64_t group;          // number of its first element / 4
  const int64_t* numbers;  // numbers of all its elements; null: they are consecutive
};

// The value that `Storage` will hold.
template <class Storage, bool kStochastic, bool kAnyNan, class T>
static PATS_INLINE T stored(T x, uint32_t random) {
  if constexpr (same<Storage, Bfloat16>) return T(rounded<kStochastic, kAnyNan>(static_cast<float>(x), random));
  if constexpr (same<Storage, float>) return T(static_cast<float>(x));
  return x;
}

// A block's sum, by places within kPlaces: the order does not depend on the vectors' width. kMarked: signs are marks.
template <bool kMarked, class T>
static inline T sum_of(const T* x) {
  constexpr int kPlaces = 32;
  alignas(64) T sums[kPlaces];
#pragma omp simd
  for (int i = 0; i < kPlaces; ++i) {
    T sum = kMarked ? magnitude(x[i]) : x[i];
    PATS_UNROLL
    for (int row = kPlaces; row < kBlock; row += kPlaces) sum += kMarked ? magnitude(x[row + i]) : x[row + i];
    sums[i] = sum;
  }
  PATS_UNROLL
  for (int width = kPlaces / 2; width > 0; width /= 2) {
#pragma omp simd
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// The values of a block that are not operands.
template <class T>
struct Drawn {
  alignas(64) T z[kBlock];  // the noise
  alignas(64) uint32_t bits[kBlock];
  alignas(64) T sens[kBlock], unc[kBlock];  // values to sum, if they are stored in another type
  alignas(64) T importance[kBlock];         // from a step's first half to its second; negative: not finite
};

// One pass over memory may use two loops over a block. Their iterations are shorter, so a processor can overlap more of
// them. With AVX2 this gains less than the second loop costs.
#if defined(__AVX512F__)
constexpr bool kTwoLoops = true;
#else
constexpr bool kTwoLoops = false;
#endif

// A block is updated in pieces, each right after its normals: the processor then reads one piece's operands while it
// computes another's normals. Short pieces pay off for six float32 operands, and without noise; otherwise a whole block
// at once is faster.
template <class P, class S, Form kForm>
constexpr bool short_pieces =
    same<P, float> && same<S, float> && (kForm == Form::kPatsAdamW || kForm == Form::kAdamW);
template <class P, class S, Form kForm>
constexpr int piece = short_pieces<P, S, kForm> ? kBlock / 4 : kBlock;
static_assert(kBlock / 4 % kVector == 0);

// While normals are made, memory would be idle, so the next block's operands are fetched then. For 16 bits, this
// costs more than it gains.
template <class P, class S>
constexpr bool fetches = same<P, float> && same<S, float>;

// As many elements of the block after `block` as a vector has, from `i` on; past a tensor's end the processor ignores
// it.
template <class Operand>
PATS_INLINE void fetch_next(const Operand* block, int i) {
  constexpr int kLine = 64 / sizeof(Operand);
  PATS_UNROLL
  for (int k = 0; k < kVector; k += kLine) __builtin_prefetch(block + kBlock + i + k);
}

enum class Part { kWhole, kAverages, kNoise };

PATS_INLINE constexpr Does does(Form form, Phase phase, Part part) {
  Does all = does(form, phase);
  if (part == Part::kAverages) all.moments = all.noise = all.adamw = false;
  if (part == Part::kNoise) all.reads_averages = all.averages = all.noise = all.sums = false;
  return all;
}

template <class S, class T>
constexpr bool sums_stored(const Does& does) {
  return does.averages && same<S, T>;
}

// Updates the piece that begins at `from`. Returns how many sensitivities are not finite.
template <class T, class P, class S, Form kForm, Uncertainty kUncertainty, Phase kPhase, bool kStochastic, Part kPart>
static PATS_INLINE int32_t update(const Constants<T>& constants, const AdamW<T>& adamw_constants,
                                  const Block<P, S>& block, int from, Drawn<T>& drawn) {
  constexpr Does kDoes = does(kForm, kPhase, kPart);
  constexpr bool kHasUnc = kDoes.reads_averages && kUncertainty != Uncertainty::kNone;
  // If all operands are bfloat16, the lower half of each NaN is zero; so it is in the NaNs that the processor makes.
  constexpr bool kAnyNan = !same<P, Bfloat16> || !same<S, Bfloat16>;
  const Constants<T> c = constants;
  const AdamW<T> adam = adamw_constants;
  const auto state = [](T x, uint32_t random) { return stored<S, kStochastic, kAnyNan>(x, random); };
  P* __restrict W = block.w;
  const P* __restrict G = block.g;
  S* __restrict SENS = block.sens;
  S* __restrict UNC = block.unc;
  S* __restrict M = block.m;
  S* __restrict V = block.v;
  int32_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
  for (int i = from; i < from + piece<P, S, kForm>; ++i) {
    T w = widen(W[i]), g = 0, m = 0, v = 0, s = 0, u = 0;
    if (kDoes.averages || kDoes.moments) g = widen(G[i]);
    if (kDoes.moments) m = widen(M[i]), v = widen(V[i]);
    if (kDoes.reads_averages) s = widen(SENS[i]), u = kHasUnc ? widen(UNC[i]) : T(0);
    const uint32_t random = kStochastic ? drawn.bits[i] : 0;
    const T noise = kDoes.noise ? drawn.z[i] : T(0);
    if (kPart == Part::kNoise) {
      const T q = drawn.importance[i];
      give_noise(c, !is_negative(q), q, drawn.z[i], w);
    }
    const bool finite = step(kDoes, kUncertainty, c, adam, state, random >> 16, noise, g, w, s, u, m, v);
    if (kPart == Part::kAverages) drawn.importance[i] = finite ? importance(kUncertainty, c, s, u) : T(-1);
    if (kDoes.sums && !sums_stored<S, T>(kDoes)) drawn.sens[i] = s, drawn.unc[i] = u;
    nonfinite += !finite;
    if (kDoes.averages) narrow(kPhase == Phase::kAverages && !finite ? negative(s) : s, SENS[i]);
    if (kDoes.averages && kHasUnc) narrow(u, UNC[i]);
    if (kDoes.adamw) {
      narrow(state(m, random >> 16), M[i]);
      narrow(state(v, random >> 16), V[i]);
    }
    if (kDoes.noise || kDoes.adamw || kPart == Part::kNoise) {
      narrow(stored<P, kStochastic, kAnyNan>(w, random & 0xFFFFu), W[i]);
    }
  }
  return nonfinite;
}

template <class T, class P, class S, Form kForm, Uncertainty kUncertainty, Phase kPhase, bool kStochastic>
__attribute__((noinline)) void update_block(const Constants<T>& c, const AdamW<T>& adam, const Circle<T>& of_chunk,
                                            const Draw& d, const Block<P, S>& block, Partial& partial) {
  constexpr Does kDoes = does(kForm, kPhase);
  constexpr bool kHasUnc = kUncertainty != Uncertainty::kNone;
  const Circle<T> circle = of_chunk;
  const uint32_t low = static_cast<uint32_t>(block.group);
  alignas(64) BlockWords words;
  Drawn<T> drawn;
  if (kDoes.noise && block.numbers) normals(d, block.numbers, circle, drawn.z);
  if (kDoes.noise && !block.numbers) draw(d.noise, low, words);
  if (kStochastic && block.numbers) rounding_bits(d, block.numbers, drawn.bits);
  if (kStochastic && !block.numbers) rounding_bits(d.rounding, low, drawn.bits);

  int32_t nonfinite = 0;
  for (int from = 0; from < kBlock; from += piece<P, S, kForm>) {
    if (kDoes.noise && !block.numbers) {
      for (int i = from; i < from + piece<P, S, kForm>; i += kVector) {
        if constexpr (fetches<P, S>) {
          fetch_next(block.w, i);
          if (kDoes.averages || kDoes.moments) fetch_next(block.g, i);
          if (kDoes.reads_averages) fetch_next(block.sens, i);
          if (kDoes.reads_averages && kHasUnc) fetch_next(block.unc, i);
          if (kDoes.moments) fetch_next(block.m, i), fetch_next(block.v, i);
        }
        normals(words[i / kVector], circle, drawn.z + i);
      }
    }
    if constexpr (kTwoLoops && kDoes.averages && kDoes.noise) {
      nonfinite +=
          update<T, P, S, kForm, kUncertainty, kPhase, kStochastic, Part::kAverages>(c, adam, block, from, drawn);
      update<T, P, S, kForm, kUncertainty, kPhase, kStochastic, Part::kNoise>(c, adam, block, from, drawn);
    } else {
      nonfinite += update<T, P, S, kForm, kUncertainty, kPhase, kStochastic, Part::kWhole>(c, adam, block, from, drawn);
    }
  }
  if constexpr (kDoes.reads_averages && kPhase == Phase::kNoise) {
    if (nonfinite > 0) {
#pragma omp simd
      for (int i = 0; i < kBlock; ++i) narrow(magnitude(widen(block.sens[i])), block.sens[i]);
    }
  }
  if constexpr (sums_stored<S, T>(kDoes)) {
    partial.sens += sum_of<kPhase == Phase::kAverages>(block.sens);
    if (kHasUnc) partial.unc += sum_of<false>(block.unc);
  } else if (kDoes.sums) {
    partial.sens += sum_of<false>(drawn.sens);
    if (kHasUnc) partial.unc += sum_of<false>(drawn.unc);
  }
  partial.nonfinite += nonfinite;
}

// ---- storage: a block of an operand, in place or in a buffer

// The offset of each of a block's elements in an operand that is not contiguous, or the element's number.
using Offsets = int64_t[kBlock];

// Writes a block's offsets. Returns true if they are consecutive; then only the first is written. Divisions are slow,
// so it works in runs along the innermost dimension.
static bool walk(const Row& row, const Dimension* dimensions, int64_t Dimension::*stride, int64_t first,
                 int64_t begin, int n, Offsets& offsets) {
  const Dimension& innermost = dimensions[row.layout + row.ndim - 1];
  const int64_t step = innermost.*stride;
  for (int i = 0, run; i < n; i += run) {
    int64_t index = begin + i, offset = first;
    for (int64_t d = row.ndim - 1; d >= 0; --d) {
      const Dimension& dimension = dimensions[row.layout + d];
      offset += index % dimension.size * (dimension.*stride);
      index /= dimension.size;
    }
    const int64_t left = innermost.size - (begin + i) % innermost.size;
    run = left < n - i ? static_cast<int>(left) : n - i;
    if (run == n && step == 1) {
      offsets[0] = offset;
      return true;
    }
    for (int k = 0; k < run; ++k) offsets[i + k] = offset + k * step;
  }
  return false;
}

template <class Storage>
struct Operand {
  Storage* const data;
  int64_t Dimension::*const stride;
  bool scattered = false;
  int64_t from = 0;  // if not scattered: the block's first element
  Offsets offsets;
  alignas(64) Storage buffer[kBlock];

  Operand(void* data, int64_t Dimension::*stride) : data(static_cast<Storage*>(data)), stride(stride) {}

  // Elements [begin, begin + n), then zeros up to a full block; zeros change no statistic.
  Storage* load(const Row& row, const Dimension* dimensions, int64_t begin, int n) {
    scattered = row.ndim > 0 && !walk(row, dimensions, stride, 0, begin, n, offsets);
    from = row.ndim > 0 ? offsets[0] : begin;
    if (!scattered && n == kBlock) return data + from;
    for (int i = 0; i < n; ++i) buffer[i] = data[scattered ? offsets[i] : from + i];
    for (int i = n; i < kBlock; ++i) buffer[i] = {};
    return buffer;
  }

  void store(const Storage* block, int n) {
    if (block != buffer) return;
    for (int i = 0; i < n; ++i) data[scattered ? offsets[i] : from + i] = buffer[i];
  }
};

// ---- a chunk

template <class P, class S, Form kForm, Uncertainty kUncertainty, Phase kPhase, bool kStochastic>
Partial chunk(const LaunchArgs& args, const Row& row, const Dimension* dimensions, const float* stats,
              uint32_t step, int64_t begin, int64_t end) {
  using T = decltype(widen(P{}));
  constexpr Does kDoes = does(kForm, kPhase);
  constexpr bool kHasUnc = kDoes.reads_averages && kUncertainty != Uncertainty::kNone;
  const T grad_scale = static_cast<T>(kForm == Form::kPats ? args.grad_scale : args.grad_scale * row.grad_sign);
  const Constants<T> c = constants<T>(kUncertainty, row, stats, grad_scale);
  const AdamW<T> adam = kForm == Form::kPats ? AdamW<T>{} : adamw_constants<T>(row, step);
  const Circle<T> circle(c.noise_scale);
  const uint64_t first_group = static_cast<uint64_t>(row.offset + begin) / 4;
  const Draw d(row, step, static_cast<uint32_t>(first_group >> 32));
  Operand<P> w(row.param, &Dimension::param), g(const_cast<void*>(row.grad), &Dimension::grad);
  Operand<S> s(row.sens, &Dimension::sens), u(row.unc, &Dimension::unc);
  Operand<S> m(row.exp_avg, &Dimension::exp_avg), v(row.exp_avg_sq, &Dimension::exp_avg_sq);

  Offsets numbers = {};

  Partial total{0, 0, 0};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    Block<P, S> block{};
    block.w = w.load(row, dimensions, i, n);
    if (kDoes.averages || kDoes.moments) block.g = g.load(row, dimensions, i, n);
    if (kDoes.reads_averages) block.sens = s.load(row, dimensions, i, n);
    if (kHasUnc) block.unc = u.load(row, dimensions, i, n);
    if (kDoes.moments) block.m = m.load(row, dimensions, i, n);
    if (kDoes.moments) block.v = v.load(row, dimensions, i, n);
    bool follow = true;
    numbers[0] = row.offset + i;
    if (row.ndim > 0) follow = walk(row, dimensions, &Dimension::number, row.offset, i, n, numbers);
    block.group = static_cast<uint64_t>(numbers[0]) / 4;
    const bool same_high = block.group >> 32 == d.high && (block.group + kGroups - 1) >> 32 == d.high;
    if (!follow || numbers[0] % 4 != 0 || !same_high) block.numbers = numbers;
    if (follow && block.numbers) {
      for (int k = 1; k < n; ++k) numbers[k] = numbers[0] + k;
    }
    Partial partial{0, 0, 0};
    update_block<T, P, S, kForm, kUncertainty, kPhase, kStochastic>(c, adam, circle, d, block, partial);
    const bool unmarks = kDoes.reads_averages && kPhase == Phase::kNoise && partial.nonfinite > 0;
    if (kDoes.averages || unmarks) s.store(block.sens, n);
    if (kDoes.averages && kHasUnc) u.store(block.unc, n);
    if (kDoes.adamw) m.store(block.m, n);
    if (kDoes.adamw) v.store(block.v, n);
    if (kDoes.noise || kDoes.adamw) w.store(block.w, n);
    total.sens += partial.sens;
    total.unc += partial.unc;
    total.nonfinite += partial.nonfinite;
  }
  return total;
}

// ---- from run-time values to templates, one argument at a time

template <class P, class S, Form kForm, Uncertainty kUncertainty, Phase kPhase>
ChunkFunction of_rounding(const LaunchArgs& args) {
  constexpr bool kRounds = same<P, Bfloat16> || same<S, Bfloat16>;
  if (kRounds && args.stochastic_rounding) return chunk<P, S, kForm, kUncertainty, kPhase, kRounds>;
  return chunk<P, S, kForm, kUncertainty, kPhase, false>;
}

template <class P, class S, Form kForm, Uncertainty kUncertainty>
ChunkFunction of_phase(const LaunchArgs& args) {
  // AdamW alone needs no means, so it has one pass. The averages of PATS do not depend on AdamW: one kernel for both.
  constexpr Form kAveraging = kForm == Form::kPatsAdamW ? Form::kPats : kForm;
  switch (args.phase) {
    case Phase::kOnePass: return of_rounding<P, S, kForm, kUncertainty, Phase::kOnePass>(args);
    case Phase::kAverages: return of_rounding<P, S, kAveraging, kUncertainty, Phase::kAverages>(args);
    default: return of_rounding<P, S, kForm, kUncertainty, Phase::kNoise>(args);
  }
}

template <class P, class S, Form kForm>
ChunkFunction of_uncertainty(const LaunchArgs& args) {
  switch (args.uncertainty) {
    case Uncertainty::kProduct: return of_phase<P, S, kForm, Uncertainty::kProduct>(args);
    case Uncertainty::kUcb: return of_phase<P, S, kForm, Uncertainty::kUcb>(args);
    default: return of_phase<P, S, kForm, Uncertainty::kNone>(args);
  }
}

template <class P, class S>
ChunkFunction of_form(const LaunchArgs& args, bool noisy) {
  if (!noisy) return of_rounding<P, S, Form::kAdamW, Uncertainty::kNone, Phase::kOnePass>(args);
  switch (args.form) {
    case Form::kPats: return of_uncertainty<P, S, Form::kPats>(args);
    case Form::kPatsAdamW: return of_uncertainty<P, S, Form::kPatsAdamW>(args);
    default: return of_uncertainty<P, S, Form::kMomentsAdamW>(args);
  }
}

template <class P>
ChunkFunction of_state(const LaunchArgs& args, bool noisy) {
  return args.state == Storage::kBfloat16 ? of_form<P, Bfloat16>(args, noisy) : of_form<P, float>(args, noisy);
}

ChunkFunction of_storage(const LaunchArgs& args, bool noisy) {
  switch (args.param) {
    case Storage::kFloat32: return of_state<float>(args, noisy);
    case Storage::kBfloat16: return of_state<Bfloat16>(args, noisy);
    case Storage::kFloat16: return of_state<Float16>(args, noisy);
    default:
      return args.state == Storage::kFloat64 ? of_form<double, double>(args, noisy) : of_state<double>(args, noisy);
  }
}

}  // namespace

Partial PATS_CHUNK(const LaunchArgs& args, const Row& row, const Dimension* dimensions, const float* stats,
                   uint32_t step, int64_t begin, int64_t end) {
  return of_storage(args, row.stats != nullptr)(args, row, dimensions, stats, step, begin, end);
}

}  // namespace pats
