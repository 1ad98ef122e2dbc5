// The CUDA kernels: one source, which setup.py compiles once for each dtype of the parameters (PATS_PARAM),
// so that the compilations can run in parallel. PATS_LAUNCH names the function that each object exports.
//
// The path of the data: a block updates one chunk. Its first thread computes what is the same for the whole
// tensor. Then each thread takes groups of 4 or 8 neighbouring elements: 16 bytes at a time if all operands
// are aligned, one by one at a ragged end. The random words of a group come from one call, so threads need
// not exchange them. Tensors that are not contiguous and tensors without noise have separate kernels, because
// their code would cost the main kernel registers.
#include "cuda_kernel.h"

#include "step.h"
#include "storage.h"

#define PATS_DEVICE __device__ __forceinline__

#if !defined(PATS_ONLY_FULL)
#define PATS_ONLY_FULL 0  // 1 keeps only the path for full chunks, to study the compiler's output for it
#endif

namespace pats {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// Data that is used only once should not evict other data from the caches.
constexpr bool streams(Phase phase) { return phase != Phase::kAverages; }  // all is read again after it

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// The type of the arithmetic for a parameter, and the row whose numbers have that type.
template <class P>
using Float = decltype(widen(P{}));
template <class T>
struct RowFor {
  using Type = RowOf<Narrowed>;
};
template <>
struct RowFor<double> {
  using Type = RowOf<double>;
};

// How many neighbours a thread updates at a time: 16 bytes of the narrowest operand.
template <class P, class S>
constexpr int kVector = sizeof(P) == 2 || sizeof(S) == 2 ? 8 : 4;

// ---- what the threads of a block share

struct Draw {
  uint64_t seed, group;  // group: of the chunk's first element, if elements are numbered in order
  uint32_t tensor_id, step;
};

template <class T>
struct Shared {
  Constants<T> c;
  AdamW<T> adam;
  Draw draw;
  double sums[3][kWarps];
};

template <class T>
PATS_DEVICE const typename RowFor<T>::Type& row_of(const CudaLaunch& launch, int64_t number) {
  return static_cast<const typename RowFor<T>::Type*>(launch.table)[number];
}

PATS_DEVICE bool skipped(const CudaLaunch& launch) {
  return launch.found_inf && *launch.found_inf != 0.0f;
}

// One thread runs this. The noise phase comes after the statistics, which have advanced the counter.
template <class T, class R>
PATS_DEVICE void prepare(const CudaLaunch& launch, const R& row, Form form, Phase phase,
                         Uncertainty uncertainty, int64_t start, Shared<T>& shared) {
  uint32_t step = static_cast<uint32_t>(row.step);
  if (row.step_count) step = steps_of(*row.step_count) + (phase == Phase::kNoise ? 0u : 1u);
  T grad_scale = launch.grad_scale ? T(1) / static_cast<T>(*launch.grad_scale) : T(1);
  if (form != Form::kPats) {
    grad_scale *= static_cast<T>(row.grad_sign);
    shared.adam = adamw_constants<T>(row, step);
  }
  if (form != Form::kAdamW) shared.c = constants<T>(uncertainty, row, row.stats, grad_scale);
  shared.c.grad_scale = grad_scale;
  const uint64_t group = static_cast<uint64_t>(row.offset + start) / 4;
  shared.draw = {row.seed, group, static_cast<uint32_t>(row.tensor_id), step};
}

// ---- random words and normals

PATS_DEVICE Words draw_group(const Draw& draw, uint64_t group, uint32_t top_bit) {
  const uint32_t low = static_cast<uint32_t>(group), high = static_cast<uint32_t>(group >> 32);
  return philox4x32(low, high | top_bit, draw.tensor_id, draw.step, draw.seed);
}

template <class T>
PATS_DEVICE void normals(const Words& x, T scale, T (&z)[4]) {
  const Circle<T> first(scale * square_root(minus_two_log(unit<T>(x.x0))));
  const Circle<T> second(scale * square_root(minus_two_log(unit<T>(x.x2))));
  first(turn<T>(x.x1, Circle<T>::kTurn), z[0], z[1]);
  second(turn<T>(x.x3, Circle<T>::kTurn), z[2], z[3]);
}

// ---- storage

// The value that `Storage` will hold. No bits may be added to a NaN, which only AdamW can compute. For a value
// copied from bfloat16 the added bits change nothing.
template <class T, class Storage>
struct Stored {
  bool stochastic;

  PATS_DEVICE T operator()(T x, uint32_t random, bool may_be_nan = false) const {
    if constexpr (same<Storage, Bfloat16>) {
      const uint32_t bits = bits_of(static_cast<float>(x));
      const uint32_t increment = stochastic ? random & 0xFFFFu : 0x7FFFu + (bits >> 16 & 1u);
      const float rounded = float_of((bits + increment) & 0xFFFF0000u);
      return may_be_nan && is_nan(static_cast<float>(x)) ? x : T(rounded);
    } else if constexpr (same<T, double> && same<Storage, float>) {
      return T(static_cast<float>(x));
    } else {
      return x;
    }
  }
};

template <class T>
PATS_DEVICE void put(T x, Bfloat16& to) {
  to.bits = static_cast<uint16_t>(bits_of(static_cast<float>(x)) >> 16);
}
template <class T, class Storage>
PATS_DEVICE void put(T x, Storage& to) {
  narrow(x, to);
}

template <bool kStreams, int V, class Storage, class T>
PATS_DEVICE void load(const Storage* from, bool vector, int count, T (&to)[V]) {
  constexpr int kEach = 16 / sizeof(Storage);
  if (vector) {
    PATS_UNROLL
    for (int k = 0; k < V / kEach; ++k) {
      const uint4* address = reinterpret_cast<const uint4*>(from) + k;
      const uint4 bits = kStreams ? __ldcs(address) : __ldca(address);
      Storage stored[kEach];
      memcpy(stored, &bits, sizeof bits);
      PATS_UNROLL
      for (int j = 0; j < kEach; ++j) to[k * kEach + j] = widen(stored[j]);
    }
  } else {
    PATS_UNROLL
    for (int j = 0; j < V; ++j) to[j] = j < count ? T(widen(from[j])) : T(0);  // zeros change no statistic
  }
}

template <bool kStreams, int V, class Storage, class T>
PATS_DEVICE void store(const T (&from)[V], bool vector, int count, Storage* to) {
  constexpr int kEach = 16 / sizeof(Storage);
  if (vector) {
    PATS_UNROLL
    for (int k = 0; k < V / kEach; ++k) {
      Storage stored[kEach];
      PATS_UNROLL
      for (int j = 0; j < kEach; ++j) put(from[k * kEach + j], stored[j]);
      uint4 bits;
      memcpy(&bits, stored, sizeof bits);
      uint4* address = reinterpret_cast<uint4*>(to) + k;
      if (kStreams) {
        __stcs(address, bits);
      } else {
        __stwb(address, bits);
      }
    }
  } else {
    PATS_UNROLL
    for (int j = 0; j < V; ++j) {
      if (j < count) put(from[j], to[j]);
    }
  }
}

// ---- the step of a thread's elements

template <class T>
struct Sums {
  T sens, unc;
  int32_t nonfinite;
};

template <class T, int V>
struct Group {
  T w[V], g[V], S[V], U[V], m[V], v[V];
};

// One instruction that uses the existing predicate; nvcc makes two, an addition and a selection. For 8 elements
// it would make AdamW in bfloat16 spill two registers.
template <int V>
PATS_DEVICE void count_unless(bool condition, int32_t& count) {
#if defined(__CUDA_ARCH__)
  if constexpr (V == 4) {
    asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; @!p add.s32 %0, %0, 1; }" : "+r"(count) : "r"(uint32_t{condition}));
    return;
  }
#endif
  count += !condition;
}

// The step of V elements in registers; results are rounded as stored. `z` is noise_scale times the normals. Returns
// whether any element was marked as not finite.
template <class P, class S, int V>
PATS_DEVICE bool step_group(const Does does, Phase phase, Uncertainty uncertainty, bool stochastic,
                            const Shared<Float<P>>& shared, const uint32_t (&bits)[V], const Float<P> (&z)[V],
                            Group<Float<P>, V>& e, Sums<Float<P>>& sums) {
  using T = Float<P>;
  const Stored<T, P> param{stochastic};
  const Stored<T, S> state{stochastic};
  bool any = false;
  PATS_UNROLL
  for (int j = 0; j < V; ++j) {
    const uint32_t random = bits[j] >> 16;
    const bool finite = step(does, uncertainty, shared.c, shared.adam, state, random, z[j], e.g[j], e.w[j],
                             e.S[j], e.U[j], e.m[j], e.v[j]);
    if (does.sums) {
      sums.sens += e.S[j];
      sums.unc += e.U[j];
      count_unless<V>(finite, sums.nonfinite);
    }
    if (does.averages && phase == Phase::kAverages) e.S[j] = finite ? e.S[j] : negative(e.S[j]);
    any |= !finite;
    if (does.adamw) {
      e.m[j] = state(e.m[j], random, true);
      e.v[j] = state(e.v[j], random, true);
    }
    e.w[j] = param(e.w[j], bits[j], does.adamw);
  }
  return any && does.reads_averages && phase == Phase::kNoise;
}

// Updates a thread's share of a chunk of a contiguous tensor. kFull: a whole chunk of aligned operands.
template <class P, class S, Phase kPhase, bool kFull, class R>
PATS_DEVICE void update(const Does does, Uncertainty uncertainty, bool stochastic, const R& row,
                        const Shared<Float<P>>& shared, int64_t start, int length, Sums<Float<P>>& sums) {
  using T = Float<P>;
  constexpr int V = kVector<P, S>;
  constexpr bool kRounds = same<P, Bfloat16> || same<S, Bfloat16>, kStreams = streams(kPhase);
  const bool has_unc = does.reads_averages && uncertainty != Uncertainty::kNone;
  const bool aligned = kFull || row.vector;
  P* const param = static_cast<P*>(row.param) + start;
  const P* const grad = static_cast<const P*>(row.grad) + start;
  S* const sens = static_cast<S*>(row.sens) + start;
  S* const unc = static_cast<S*>(row.unc) + start;
  S* const exp_avg = static_cast<S*>(row.exp_avg) + start;
  S* const exp_avg_sq = static_cast<S*>(row.exp_avg_sq) + start;

#pragma unroll 1
  for (int i = threadIdx.x * V; i < (kFull ? kChunk : length); i += kThreads * V) {
    const int count = kFull ? V : length - i;
    const bool vector = kFull || (aligned && count >= V);
    Group<T, V> e{};
    load<kStreams>(param + i, vector, count, e.w);
    if (does.averages || does.moments) load<kStreams>(grad + i, vector, count, e.g);
    if (does.reads_averages) load<kStreams>(sens + i, vector, count, e.S);
    if (has_unc) load<kStreams>(unc + i, vector, count, e.U);
    if (does.moments) load<kStreams>(exp_avg + i, vector, count, e.m);
    if (does.moments) load<kStreams>(exp_avg_sq + i, vector, count, e.v);

    uint32_t bits[V] = {};
    T z[V] = {};
    PATS_UNROLL
    for (int k = 0; k < V / 4; ++k) {
      const uint64_t group = shared.draw.group + (static_cast<uint32_t>(i) / 4 + k);
      if (kRounds && stochastic) {
        const Words x = draw_group(shared.draw, group, kRoundingBit);
        bits[4 * k] = x.x0, bits[4 * k + 1] = x.x1, bits[4 * k + 2] = x.x2, bits[4 * k + 3] = x.x3;
      }
      if (does.noise) {
        T four[4];
        normals(draw_group(shared.draw, group, 0), shared.c.noise_scale, four);
        z[4 * k] = four[0], z[4 * k + 1] = four[1], z[4 * k + 2] = four[2], z[4 * k + 3] = four[3];
      }
    }

    const bool unmarks = step_group<P, S>(does, kPhase, uncertainty, stochastic, shared, bits, z, e, sums);
    if (does.averages || unmarks) store<kStreams>(e.S, vector, count, sens + i);
    if (does.averages && has_unc) store<kStreams>(e.U, vector, count, unc + i);
    if (does.adamw) store<kStreams>(e.m, vector, count, exp_avg + i);
    if (does.adamw) store<kStreams>(e.v, vector, count, exp_avg_sq + i);
    if (does.noise || does.adamw) store<kStreams>(e.w, vector, count, param + i);
  }
}

// ---- the statistics of a chunk

template <class T>
PATS_DEVICE T warp_sum(T x) {
  PATS_UNROLL
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, offset);
  return x;
}

// All threads run this; the first one gets the sums. The order is the same in every run.
template <class A, class B, class C>
PATS_DEVICE void block_sums(double (&shared)[3][kWarps], A a, B b, C c, double (&total)[3]) {
  a = warp_sum(a), b = warp_sum(b), c = warp_sum(c);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) shared[0][warp] = a, shared[1][warp] = b, shared[2][warp] = c;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 0; k < 3; ++k) {
      total[k] = 0;
      for (int i = 0; i < kWarps; ++i) total[k] += shared[k][i];
    }
  }
}

template <class T>
PATS_DEVICE void write_partials(const CudaLaunch& launch, const Sums<T>& sums, Shared<T>& shared) {
  double total[3];
  block_sums(shared.sums, sums.sens, sums.unc, sums.nonfinite, total);
  if (threadIdx.x == 0) {
    for (int k = 0; k < 3; ++k) launch.partials[k * launch.num_chunks + blockIdx.x] = total[k];
  }
}

// ---- the kernels

// Blocks per multiprocessor, which limits the registers: as many as need no stack. One more if all operands have
// 16 bits: an H200 is faster with that although AdamW then spills (docs/performance.md).
template <class P, class S>
constexpr int residents(Form form, bool common) {
  const bool pats = form == Form::kPats;
  if (sizeof(P) == 8) return 3;
  if (common && sizeof(P) == 2 && sizeof(S) == 2) return pats ? 6 : 5;
  if (sizeof(P) == 2 || sizeof(S) == 2) return pats ? 5 : common ? 4 : 3;
  return pats ? 8 : common ? 6 : 5;
}

// Updates contiguous tensors: those without noise if the form is kAdamW, else those with noise. kCommon: with
// the usual uncertainty and rounding; otherwise both are decided at run time.
template <class P, class S, Form kForm, Phase kPhase, bool kCommon>
__global__ void __launch_bounds__(kThreads, residents<P, S>(kForm, kCommon))
    update_kernel(const CudaLaunch launch) {
  using T = Float<P>;
  constexpr Does kDoes = does(kForm, kPhase);
  const Uncertainty uncertainty = kCommon ? Uncertainty::kProduct : launch.uncertainty;
  const bool stochastic = kCommon || launch.stochastic_rounding;
  if (skipped(launch)) return;
  const int2 piece = launch.chunks[blockIdx.x];
  const auto& row = row_of<T>(launch, piece.x);
  if (row.ndim > 0 || (row.stats == nullptr) != (kForm == Form::kAdamW)) return;

  __shared__ Shared<T> shared;
  const int64_t start = static_cast<int64_t>(piece.y) * kChunk;
  const int64_t left = row.numel - start;
  if (threadIdx.x == 0) prepare(launch, row, kForm, kPhase, uncertainty, start, shared);
  __syncthreads();
  Sums<T> sums{0, 0, 0};
  if (kCommon && (PATS_ONLY_FULL || (left >= kChunk && row.vector))) {
    update<P, S, kPhase, true>(kDoes, uncertainty, stochastic, row, shared, start, kChunk, sums);
  } else if (!PATS_ONLY_FULL) {
    const int length = left < kChunk ? static_cast<int>(left) : kChunk;
    update<P, S, kPhase, false>(kDoes, uncertainty, stochastic, row, shared, start, length, sums);
  }
  if (kDoes.sums) write_partials(launch, sums, shared);
}

// index / size in a tensor of `numel` elements; a 64-bit division takes four times as many instructions.
PATS_DEVICE int64_t quotient(int64_t index, int64_t size, int64_t numel) {
  if (numel <= 0x7FFFFFFF) return static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
  return index / size;
}

// Updates tensors that are not contiguous, one element at a time, at any address. Everything is decided at run
// time.
template <class P, class S>
__global__ void __launch_bounds__(kThreads) strided_kernel(const CudaLaunch launch) {
  using T = Float<P>;
  if (skipped(launch)) return;
  const int2 piece = launch.chunks[blockIdx.x];
  const auto& row = row_of<T>(launch, piece.x);
  if (row.ndim == 0 || (row.stats == nullptr && launch.phase == Phase::kAverages)) return;
  const Form form = row.stats ? launch.form : Form::kAdamW;
  const Does does_ = does(form, launch.phase);
  const bool has_unc = does_.reads_averages && launch.uncertainty != Uncertainty::kNone;

  __shared__ Shared<T> shared;
  const int64_t start = static_cast<int64_t>(piece.y) * kChunk;
  const int64_t end = row.numel - start < kChunk ? row.numel : start + kChunk;
  if (threadIdx.x == 0) prepare(launch, row, form, launch.phase, launch.uncertainty, start, shared);
  __syncthreads();
  Sums<T> sums{0, 0, 0};
#pragma unroll 1
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads) {
    int64_t index = i, number = row.offset;
    int64_t at_w = 0, at_g = 0, at_s = 0, at_u = 0, at_m = 0, at_v = 0;
#pragma unroll 1
    for (int64_t d = row.ndim - 1; d >= 0; --d) {
      const Dimension& dimension = launch.layout[row.layout + d];
      const int64_t rest = quotient(index, dimension.size, row.numel);
      const int64_t position = index - rest * dimension.size;
      index = rest;
      at_w += position * dimension.param;
      at_g += position * dimension.grad;
      at_s += position * dimension.sens;
      at_u += position * dimension.unc;
      at_m += position * dimension.exp_avg;
      at_v += position * dimension.exp_avg_sq;
      number += position * dimension.number;
    }
    P* const param = static_cast<P*>(row.param) + at_w;
    const P* const grad = static_cast<const P*>(row.grad) + at_g;
    S* const sens = static_cast<S*>(row.sens) + at_s;
    S* const unc = static_cast<S*>(row.unc) + at_u;
    S* const exp_avg = static_cast<S*>(row.exp_avg) + at_m;
    S* const exp_avg_sq = static_cast<S*>(row.exp_avg_sq) + at_v;

    Group<T, 1> e{};
    load<false>(param, false, 1, e.w);
    if (does_.averages || does_.moments) load<false>(grad, false, 1, e.g);
    if (does_.reads_averages) load<false>(sens, false, 1, e.S);
    if (has_unc) load<false>(unc, false, 1, e.U);
    if (does_.moments) load<false>(exp_avg, false, 1, e.m);
    if (does_.moments) load<false>(exp_avg_sq, false, 1, e.v);

    const uint64_t group = static_cast<uint64_t>(number) / 4;
    const bool second = number & 2, odd = number & 1;
    const Words x = draw_group(shared.draw, group, kRoundingBit);
    const uint32_t bits[1] = {second ? (odd ? x.x3 : x.x2) : (odd ? x.x1 : x.x0)};
    T z[1] = {T(0)};
    if (does_.noise) {
      T four[4];
      normals(draw_group(shared.draw, group, 0), shared.c.noise_scale, four);
      z[0] = second ? (odd ? four[3] : four[2]) : (odd ? four[1] : four[0]);
    }

    const bool unmarks = step_group<P, S>(does_, launch.phase, launch.uncertainty, launch.stochastic_rounding,
                                          shared, bits, z, e, sums);
    if (does_.averages || unmarks) store<false>(e.S, false, 1, sens);
    if (does_.averages && has_unc) store<false>(e.U, false, 1, unc);
    if (does_.adamw) store<false>(e.m, false, 1, exp_avg);
    if (does_.adamw) store<false>(e.v, false, 1, exp_avg_sq);
    if (does_.noise || does_.adamw) store<false>(e.w, false, 1, param);
  }
  if (does_.sums) write_partials(launch, sums, shared);
}

// One block for each tensor: adds its chunks' partial sums in a fixed order, and advances its step.
template <class T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const CudaLaunch launch) {
  if (skipped(launch)) return;
  const auto& row = row_of<T>(launch, blockIdx.x);
  if (threadIdx.x == 0 && row.step_count) *row.step_count = advanced(*row.step_count);
  if (!row.stats) return;
  double own[3] = {0, 0, 0}, total[3];
  const int64_t end = launch.starts[blockIdx.x + 1];
  for (int64_t i = launch.starts[blockIdx.x] + threadIdx.x; i < end; i += kThreads) {
    for (int k = 0; k < 3; ++k) own[k] += launch.partials[k * launch.num_chunks + i];
  }
  __shared__ double shared[3][kWarps];
  block_sums(shared, own[0], own[1], own[2], total);
  if (threadIdx.x > 0) return;
  const double whole = static_cast<double>(row.whole);
  row.share[0] = row.whole ? static_cast<float>(total[0] / whole) : 0.0f;
  row.share[1] = row.whole ? static_cast<float>(total[1] / whole) : 0.0f;
  if (row.nonfinite) *row.nonfinite += static_cast<int64_t>(total[2]);
}

// ---- from run-time values to templates, one argument at a time

using Kernel = void (*)(CudaLaunch);

template <class P, class S, Form kForm, bool kCommon>
Kernel of_phase(Phase phase) {
  // The averages of PATS do not depend on AdamW.
  constexpr Form kAveraging = kForm == Form::kPatsAdamW ? Form::kPats : kForm;
  switch (phase) {
    case Phase::kOnePass: return update_kernel<P, S, kForm, Phase::kOnePass, kCommon>;
    case Phase::kAverages: return update_kernel<P, S, kAveraging, Phase::kAverages, kCommon>;
    default: return update_kernel<P, S, kForm, Phase::kNoise, kCommon>;
  }
}

template <class P, class S, bool kCommon>
Kernel of_form(const CudaLaunch& launch) {
  switch (launch.form) {
    case Form::kPats: return of_phase<P, S, Form::kPats, kCommon>(launch.phase);
    case Form::kPatsAdamW: return of_phase<P, S, Form::kPatsAdamW, kCommon>(launch.phase);
    default: return of_phase<P, S, Form::kMomentsAdamW, kCommon>(launch.phase);
  }
}

// AdamW alone does the same in the noise phase as in one pass, except for the counter, which is read at run time.
template <class P, class S>
Kernel without_noise(Phase phase) {
  if (phase == Phase::kOnePass) return update_kernel<P, S, Form::kAdamW, Phase::kOnePass, false>;
  return update_kernel<P, S, Form::kAdamW, Phase::kNoise, false>;
}

cudaError_t start_kernel(Kernel kernel, int64_t blocks, const CudaLaunch& launch, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks)), threads(kThreads);
#if defined(__CUDACC__)
  kernel<<<grid, threads, 0, stream>>>(launch);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  return start_emulated(kernel, grid, threads, launch);  // tests/cuda_emulation
#endif
}

template <class P, class S>
cudaError_t launch_as(const CudaLaunch& launch, cudaStream_t stream) {
  constexpr bool kRounds = same<P, Bfloat16> || same<S, Bfloat16>;
  const bool common = launch.uncertainty == Uncertainty::kProduct && (launch.stochastic_rounding || !kRounds);
  cudaError_t error = cudaSuccess;
  const auto start = [&](Kernel kernel, int64_t blocks) {
    if (error == cudaSuccess && blocks > 0) error = start_kernel(kernel, blocks, launch, stream);
  };
  start(common ? of_form<P, S, true>(launch) : of_form<P, S, false>(launch), launch.num_chunks);
  if (launch.strided) start(strided_kernel<P, S>, launch.num_chunks);
  if (launch.plain && launch.phase != Phase::kAverages) {
    start(without_noise<P, S>(launch.phase), launch.num_chunks);
  }
  if (launch.phase != Phase::kNoise) start(statistics_kernel<Float<P>>, launch.num_tensors);
  return error;
}

}  // namespace

cudaError_t PATS_LAUNCH(const CudaLaunch& launch, cudaStream_t stream) {
  if (launch.state == Storage::kBfloat16) return launch_as<PATS_PARAM, Bfloat16>(launch, stream);
  if constexpr (same<PATS_PARAM, double>) {
    if (launch.state == Storage::kFloat64) return launch_as<double, double>(launch, stream);
  }
  return launch_as<PATS_PARAM, float>(launch, stream);
}

}  // namespace pats
