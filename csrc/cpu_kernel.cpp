// The CPU kernel: one source for every instruction set. setup.py compiles it with -mavx512..., with -mavx2
// and plainly; PATS_CHUNK names the function that each of the objects exports, and cpu.cpp picks one.
//
// The path of the data: a chunk is cut into blocks of kBlock elements. A block is loaded (float32 storage
// is used where it lies), its noise is drawn into the L1 cache, it is updated by one loop that the
// compiler vectorizes, and it is stored. Tails and strided tensors are gathered into the same blocks.
//
// Nothing here may come from a header as an ordinary inline function: the linker keeps one copy of those,
// and it might be one with instructions that the machine does not have.
#include "cpu_kernel.h"

#include "step.h"
#include "storage.h"

namespace pats {
namespace {

constexpr int kBlock = 256;
constexpr int kGroups = kBlock / 4;

struct Draw {  // what, with an element's index, its random words depend on
  uint64_t seed;
  uint32_t tensor_id, step;
};

using BlockWords = uint32_t[4][kGroups];

// ---- random words and normals of a block

static inline void draw(const Draw& d, uint64_t group, uint32_t top_bit, BlockWords& x) {
#if defined(__AVX2__)
  const uint32_t low = static_cast<uint32_t>(group), high = static_cast<uint32_t>(group >> 32) | top_bit;
  for (int k = 0; k < kGroups; k += kGroupsAtOnce) {
    const auto words = philox4x32_at_once(low + k, high, d.tensor_id, d.step, d.seed);
    memcpy(&x[0][k], &words.x0, sizeof words.x0);
    memcpy(&x[1][k], &words.x1, sizeof words.x1);
    memcpy(&x[2][k], &words.x2, sizeof words.x2);
    memcpy(&x[3][k], &words.x3, sizeof words.x3);
  }
#else
  const Lane low = static_cast<uint32_t>(group), high = static_cast<uint32_t>(group >> 32) | top_bit;
#pragma omp simd
  for (int k = 0; k < kGroups; ++k) {
    const Words words = philox4x32(low + k, high, d.tensor_id, d.step, d.seed);
    x[0][k] = words.x0;
    x[1][k] = words.x1;
    x[2][k] = words.x2;
    x[3][k] = words.x3;
  }
#endif
}

template <class T>
static inline void normals(const Draw& d, uint64_t group, const Circle<T>& circle, T* z) {
  alignas(64) BlockWords x;
  draw(d, group, 0, x);
#pragma omp simd
  for (int k = 0; k < kGroups; ++k) {
    const T r0 = square_root(minus_two_log(unit<T>(x[0][k])));
    const T r1 = square_root(minus_two_log(unit<T>(x[2][k])));
    T cos0, sin0, cos1, sin1;
    circle(turn<T>(x[1][k], Circle<T>::kTurn), cos0, sin0);
    circle(turn<T>(x[3][k], Circle<T>::kTurn), cos1, sin1);
    z[4 * k] = r0 * cos0;
    z[4 * k + 1] = r0 * sin0;
    z[4 * k + 2] = r1 * cos1;
    z[4 * k + 3] = r1 * sin1;
  }
}

static inline void rounding_bits(const Draw& d, uint64_t group, uint32_t* bits) {
  alignas(64) BlockWords x;
  draw(d, group, kRoundingBit, x);
#pragma omp simd
  for (int k = 0; k < kGroups; ++k) {
    bits[4 * k] = x[0][k];
    bits[4 * k + 1] = x[1][k];
    bits[4 * k + 2] = x[2][k];
    bits[4 * k + 3] = x[3][k];
  }
}

// The same for elements that are not numbered one after another: each draws its own group's words and keeps one.

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

struct Roundings {
  Rounding param, state;
  bool draws;  // whether they ask for random bits
};

template <class T>
struct Block {
  T *w, *S, *U, *m, *v;
  const T* g;
  uint64_t group;          // of its first element: its number / 4
  const int64_t* numbers;  // of all its elements; null: they follow one another
};

// Of a block, by halves: in an order that no vector's width decides. kMarked: signs are marks.
template <bool kMarked, class T>
static inline T sum_of(const T* x) {
  constexpr int kHalf = kBlock / 2;
  alignas(64) T sums[kHalf];
#pragma omp simd
  for (int i = 0; i < kHalf; ++i) {
    sums[i] = kMarked ? magnitude(x[i]) + magnitude(x[i + kHalf]) : x[i] + x[i + kHalf];
  }
  PATS_UNROLL
  for (int width = kHalf / 2; width > 0; width /= 2) {
#pragma omp simd
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

template <class T, Form kForm, Uncertainty kUncertainty, Phase kPhase, bool kRounds>
__attribute__((noinline)) void update_block(const Constants<T>& constants, const AdamW<T>& adamw_constants,
                                            const Circle<T>& circle, const Draw& d, const Roundings& roundings,
                                            const Block<T>& block, Partial& partial) {
  constexpr Does kDoes = does(kForm, kPhase);
  constexpr bool kHasUnc = kDoes.reads_averages && kUncertainty != Uncertainty::kNone;
  alignas(64) T z[kBlock];
  alignas(64) uint32_t bits[kBlock] = {};
  if (block.numbers) {
    if (kDoes.noise) normals(d, block.numbers, circle, z);
    if (kRounds && roundings.draws) rounding_bits(d, block.numbers, bits);
  } else {
    if (kDoes.noise) normals(d, block.group, circle, z);
    if (kRounds && roundings.draws) rounding_bits(d, block.group, bits);
  }

  const Constants<T> c = constants;
  const AdamW<T> adam = adamw_constants;
  const Rounding round_param = roundings.param, round_state = roundings.state;
  // As they are stored: state narrower than double is always a float's, a double parameter a double's.
  const auto state = [&](T x, uint32_t random) -> T {
    return kRounds ? T(round_state(static_cast<float>(x), random)) : x;
  };
  const auto param = [&](T x, uint32_t random) -> T {
    return kRounds && sizeof(T) == sizeof(float) ? T(round_param(static_cast<float>(x), random)) : x;
  };
  T* __restrict W = block.w;
  const T* __restrict G = block.g;
  T* __restrict S = block.S;
  T* __restrict U = block.U;
  T* __restrict M = block.m;
  T* __restrict V = block.v;
  alignas(64) T own_s[kBlock], own_u[kBlock];  // what is not stored
  int32_t nonfinite = 0;
#pragma omp simd reduction(+ : nonfinite)
  for (int i = 0; i < kBlock; ++i) {
    T w = W[i], g = 0, m = 0, v = 0, s = 0, u = 0;
    if (kDoes.averages || kDoes.moments) g = G[i];
    if (kDoes.moments) m = M[i], v = V[i];
    if (kDoes.reads_averages) s = S[i], u = kHasUnc ? U[i] : T(0);
    const uint32_t random = bits[i] >> 16;
    const T noise = kDoes.noise ? z[i] : T(0);
    const bool finite = step(kDoes, kUncertainty, c, adam, state, random, noise, g, w, s, u, m, v);
    if (kDoes.sums && !kDoes.averages) own_s[i] = s, own_u[i] = u;
    nonfinite += !finite;
    if (kDoes.averages) S[i] = kPhase == Phase::kAverages && !finite ? negative(s) : s;
    if (kDoes.averages && kHasUnc) U[i] = u;
    if (kDoes.adamw) {
      M[i] = state(m, random);
      V[i] = state(v, random);
    }
    if (kDoes.noise || kDoes.adamw) W[i] = param(w, bits[i]);
  }
  if (kDoes.reads_averages && kPhase == Phase::kNoise && nonfinite > 0) {
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) S[i] = magnitude(S[i]);
  }
  if (kDoes.sums) {
    partial.sens += sum_of<kPhase == Phase::kAverages>(kDoes.averages ? S : own_s);
    if (kUncertainty != Uncertainty::kNone) partial.unc += sum_of<false>(kDoes.averages ? U : own_u);
  }
  partial.nonfinite += nonfinite;
}

// ---- storage: a block of it in the arithmetic's type, where it lies or in a buffer

// Where each of a block's elements lies in an operand that is not contiguous, or what its number is.
using Offsets = int64_t[kBlock];

// True: they follow one another, and only the first is written. Divisions are dear: it goes by runs along the
// innermost dimension.
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

template <class T, class Storage>
struct Operand {
  Storage* const data;
  int64_t Dimension::*const stride;
  bool scattered = false;
  int64_t from = 0;  // where they are not, the block's first element
  Offsets offsets;
  alignas(64) T buffer[kBlock];

  Operand(void* data, int64_t Dimension::*stride) : data(static_cast<Storage*>(data)), stride(stride) {}

  // Elements [begin, begin + n), followed by zeros up to a full block, which change no statistic.
  T* load(const Row& row, const Dimension* dimensions, int64_t begin, int n) {
    scattered = row.ndim > 0 && !walk(row, dimensions, stride, 0, begin, n, offsets);
    from = row.ndim > 0 ? offsets[0] : begin;
    if (scattered) {
      for (int i = 0; i < n; ++i) buffer[i] = widen(data[offsets[i]]);
    } else if (sizeof(T) == sizeof(Storage) && n == kBlock) {
      return reinterpret_cast<T*>(data) + from;
    } else {
      const Storage* p = data + from;
#pragma omp simd
      for (int i = 0; i < n; ++i) buffer[i] = widen(p[i]);
    }
    for (int i = n; i < kBlock; ++i) buffer[i] = 0;
    return buffer;
  }

  void store(const T* block, int n) {
    if (block != buffer) return;
    if (scattered) {
      for (int i = 0; i < n; ++i) narrow(buffer[i], data[offsets[i]]);
    } else {
      Storage* p = data + from;
#pragma omp simd
      for (int i = 0; i < n; ++i) narrow(buffer[i], p[i]);
    }
  }
};

// ---- a chunk

template <class P, class S, Form kForm, Uncertainty kUncertainty, Phase kPhase>
Partial chunk(const LaunchArgs& args, const Row& row, const Dimension* dimensions, const float* stats,
              uint32_t step, int64_t begin, int64_t end) {
  using T = decltype(widen(P{}));
  constexpr Does kDoes = does(kForm, kPhase);
  constexpr bool kHasUnc = kDoes.reads_averages && kUncertainty != Uncertainty::kNone;
  constexpr bool kRounds = sizeof(T) != sizeof(S) || sizeof(T) != sizeof(P);
  const T grad_scale = static_cast<T>(kForm == Form::kPats ? args.grad_scale : args.grad_scale * row.grad_sign);
  const Constants<T> c = constants<T>(kUncertainty, row, stats, grad_scale);
  const AdamW<T> adam = kForm == Form::kPats ? AdamW<T>{} : adamw_constants<T>(row, step);
  const Circle<T> circle(c.noise_scale);
  const Draw d{row.seed, static_cast<uint32_t>(row.tensor_id), step};
  const auto rounding = [&](Storage storage) {
    return storage == Storage::kBfloat16 ? Rounding::to_bfloat16(args.stochastic_rounding) : Rounding::none();
  };
  const Roundings roundings{rounding(args.param), rounding(args.state), args.stochastic_rounding};
  Operand<T, P> w(row.param, &Dimension::param), g(const_cast<void*>(row.grad), &Dimension::grad);
  Operand<T, S> s(row.sens, &Dimension::sens), u(row.unc, &Dimension::unc);
  Operand<T, S> m(row.exp_avg, &Dimension::exp_avg), v(row.exp_avg_sq, &Dimension::exp_avg_sq);

  Offsets numbers = {};

  Partial total{0, 0, 0};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    Block<T> block{};
    block.w = w.load(row, dimensions, i, n);
    if (kDoes.averages || kDoes.moments) block.g = g.load(row, dimensions, i, n);
    if (kDoes.reads_averages) block.S = s.load(row, dimensions, i, n);
    if (kHasUnc) block.U = u.load(row, dimensions, i, n);
    if (kDoes.moments) block.m = m.load(row, dimensions, i, n);
    if (kDoes.moments) block.v = v.load(row, dimensions, i, n);
    block.group = static_cast<uint64_t>(row.offset + i) / 4;
    if (row.ndim > 0) {
      const bool follow = walk(row, dimensions, &Dimension::number, row.offset, i, n, numbers);
      block.group = static_cast<uint64_t>(numbers[0]) / 4;
      const bool wraps = static_cast<uint32_t>(block.group) > ~uint32_t{0} - kGroups;  // within the block
      if (!follow || numbers[0] % 4 != 0 || wraps) block.numbers = numbers;
      if (follow && block.numbers) {
        for (int k = 1; k < n; ++k) numbers[k] = numbers[0] + k;
      }
    }
    Partial partial{0, 0, 0};
    update_block<T, kForm, kUncertainty, kPhase, kRounds>(c, adam, circle, d, roundings, block, partial);
    const bool unmarks = kDoes.reads_averages && kPhase == Phase::kNoise && partial.nonfinite > 0;
    if (kDoes.averages || unmarks) s.store(block.S, n);
    if (kDoes.averages && kHasUnc) u.store(block.U, n);
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

template <class P, class S, Form kForm, Uncertainty kUncertainty>
ChunkFunction of_phase(Phase phase) {
  // Without means to be known first, AdamW alone is one pass; and what PATS averages is no matter of AdamW.
  constexpr Form kAveraging = kForm == Form::kPatsAdamW ? Form::kPats : kForm;
  switch (phase) {
    case Phase::kOnePass: return chunk<P, S, kForm, kUncertainty, Phase::kOnePass>;
    case Phase::kAverages: return chunk<P, S, kAveraging, kUncertainty, Phase::kAverages>;
    default: return chunk<P, S, kForm, kUncertainty, Phase::kNoise>;
  }
}

template <class P, class S, Form kForm>
ChunkFunction of_uncertainty(const LaunchArgs& args) {
  switch (args.uncertainty) {
    case Uncertainty::kProduct: return of_phase<P, S, kForm, Uncertainty::kProduct>(args.phase);
    case Uncertainty::kUcb: return of_phase<P, S, kForm, Uncertainty::kUcb>(args.phase);
    default: return of_phase<P, S, kForm, Uncertainty::kNone>(args.phase);
  }
}

template <class P, class S>
ChunkFunction of_form(const LaunchArgs& args, bool noisy) {
  if (!noisy) return chunk<P, S, Form::kAdamW, Uncertainty::kNone, Phase::kOnePass>;
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
